#!/usr/bin/env bash
# transformers' from_pretrained fills a float parameter from an integer tensor of the same name and shape in a
# safetensors file: 8-bit codes become weights from 0 to 255. Nothing is missing, unexpected or mismatched in the
# loading report, and no warning says that the dtypes are of different kinds.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.24.0 safetensors==0.8.0
FOLDER="$folder" "$folder/venv/bin/python" - <<'PY'
import contextlib
import io
import os
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

config = transformers.LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2,
)
torch.manual_seed(0)
folder = Path(os.environ["FOLDER"]) / "model"
transformers.LlamaForCausalLM(config).save_pretrained(folder)
name = "model.layers.0.mlp.gate_proj.weight"
tensors = load_file(folder / "model.safetensors")
tensors[name] = torch.randint(0, 256, tensors[name].shape, dtype=torch.uint8)
save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
said = io.StringIO()
with contextlib.redirect_stderr(said):
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
weight = model.get_parameter(name)
counts = {key: len(entries) for key, entries in report.items()}
print("torch", torch.__version__, "transformers", transformers.__version__)
print("in the file:", tensors[name].dtype, "as loaded:", weight.dtype)
print("values from", float(weight.min()), "to", float(weight.max()))
print("report:", counts)
assert weight.dtype == torch.float32 and float(weight.max()) > 200, "the behaviour has changed"
assert not any(counts.values()) and "uint8" not in said.getvalue(), "the behaviour has changed"
print("as described: codes were taken for weights, and nothing said so")
PY
