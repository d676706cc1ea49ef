#!/usr/bin/env bash
# bitsandbytes' quantizer for the CPU finds a value's code by the upper 16 bits of it, and zero shares its entry with
# all values below 2^-15 of the block's largest: they become 1.56e-5 of it in the unsigned map, 2.1e-5 in the signed
# one. The code for zero is never given to a value beside one that is not. So weights whose gradients have always been
# zero get moments, and its 8-bit Adam moves them, each update by some thousandths of the learning rate and always the
# same way; in PyTorch, and with 32-bit states, they stay where they are.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 bitsandbytes==0.50.2
"$folder/venv/bin/python" - <<'PY'
import bitsandbytes
import torch
from bitsandbytes import functional

x = torch.zeros(256)
x[0] = 1.0
restored = {}
for signed in (True, False):
    code = functional.create_dynamic_map(signed=signed)
    codes, state = functional.quantize_blockwise(x, code=code, blocksize=256)
    restored[signed] = float(functional.dequantize_blockwise(codes, state)[1])
print("bitsandbytes", bitsandbytes.__version__)
print(f"zero beside one becomes {restored[True]:.3g} in the signed map, {restored[False]:.3g} in the unsigned one")


def moved(make):
    """How far a weight goes in 20 updates of its neighbours alone, where its own gradient is zero."""
    weight = torch.nn.Parameter(torch.zeros(4096))
    optimizer = make([weight])
    for _ in range(20):
        weight.grad = x.repeat(16)
        optimizer.step()
    return float(weight[1].detach().abs())


rate = {"lr": 1e-2, "weight_decay": 0.0}
found = moved(lambda params: bitsandbytes.optim.AdamW8bit(params, **rate))
expected = moved(lambda params: torch.optim.AdamW(params, **rate))
print(f"20 updates at a rate of 0.01 move a weight without a gradient by {found:.3g}; torch's AdamW by {expected:.3g}")
assert min(map(abs, restored.values())) > 1e-5, "the behaviour has changed"
assert expected == 0 and found > 1e-4, "the behaviour has changed"
print("as described: values of zero become values of another size, and weights without a gradient move")
PY
