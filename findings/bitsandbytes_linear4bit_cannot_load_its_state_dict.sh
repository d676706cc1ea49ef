#!/usr/bin/env bash
# bitsandbytes.nn.Linear4bit writes a state dict that it cannot load: a quantized layer of the same shape calls the scales
# unexpected keys. With strict=False it takes the codes and keeps its own scales, so that the weight is another, without
# an error.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 bitsandbytes==0.50.2
"$folder/venv/bin/python" - <<'PY'
import bitsandbytes
import torch


def quantized(size):
    layer = bitsandbytes.nn.Linear4bit(64, 32, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)) * size
    layer.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    return layer.to("cpu")


one, other, x = quantized(1.0), quantized(3.0), torch.ones(1, 64)
print("bitsandbytes", bitsandbytes.__version__)
try:
    other.load_state_dict(one.state_dict())
    refused = ""
except RuntimeError as error:
    refused = " ".join(str(error).split())
print("load_state_dict of its own:", refused or "works")
other.load_state_dict(one.state_dict(), strict=False)
ratio = float((other(x) / one(x)).mean())
print(f"with strict=False its output is {ratio:.2f} times that of the layer it was loaded from")
assert "Unexpected key(s)" in refused and abs(ratio - 3) < 0.3, "the behaviour has changed"
print("as described: a Linear4bit cannot load the state dict of another, and takes codes without scales silently")
PY
