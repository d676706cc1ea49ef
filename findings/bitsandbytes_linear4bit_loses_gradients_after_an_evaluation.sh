#!/usr/bin/env bash
# On a CPU with AVX512-BF16 bitsandbytes.nn.Linear4bit packs its codes anew in the first evaluation, in place, and does
# not take that back in training: its forward pass then goes through an operator without an autograd kernel, so that the
# gradient of its input is wrong, with a warning of PyTorch at most. Elsewhere the same is shown by setting the layer's
# own switch for such CPUs.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 bitsandbytes==0.50.2
"$folder/venv/bin/python" - <<'PY'
import warnings

import bitsandbytes
import torch

warnings.simplefilter("ignore")
layer = bitsandbytes.nn.Linear4bit(64, 32, bias=False, quant_type="nf4", compute_dtype=torch.float32)
weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
layer.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
layer = layer.to("cpu")
right = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).sum(0)


def error_of_gradient():
    x = torch.ones(2, 64, requires_grad=True)
    layer.train()(x).sum().backward()
    return float((x.grad - right).abs().max() / right.abs().max())


print("bitsandbytes", bitsandbytes.__version__, "AVX512-BF16:", layer.support_avx512bf16_for_cpu)
before = error_of_gradient()
layer.support_avx512bf16_for_cpu = True
with torch.no_grad():
    layer.eval()(torch.ones(1, 64))
after = error_of_gradient()
print(f"error of the gradient before an evaluation: {before:.6f}, after it: {after:.6f}")
assert before < 1e-5 and after > 0.1, "the behaviour has changed"
print("as described: after an evaluation the layer's gradient is another")
PY
