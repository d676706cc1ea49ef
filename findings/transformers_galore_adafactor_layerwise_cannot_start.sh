#!/usr/bin/env bash
# transformers' Trainer offers optim="galore_adafactor_layerwise" and can never start it: it sets relative_step=False
# for "galore_adafactor" alone, so that the optimizers of the layerwise mode get the learning rate together with
# relative_step=True, which Adafactor refuses. The same arguments without "_layerwise" make an optimizer.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.24.0 accelerate==1.15.0 \
    galore-torch==1.0 bitsandbytes==0.50.2
FOLDER="$folder" "$folder/venv/bin/python" - <<'PY'
import os

import torch
import transformers

config = transformers.LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2,
)
found = {}
for optim in ("galore_adafactor", "galore_adamw_layerwise", "galore_adafactor_layerwise"):
    args = transformers.TrainingArguments(
        os.environ["FOLDER"], optim=optim, optim_target_modules=[r".*mlp.*proj"], optim_args="rank=4",
        learning_rate=0.01, use_cpu=True, report_to=[],
    )
    try:
        trainer = transformers.Trainer(model=transformers.LlamaForCausalLM(config), args=args)
        found[optim] = type(trainer.create_optimizer()).__name__
    except ValueError as error:
        found[optim] = f"ValueError: {error}"
print("torch", torch.__version__, "transformers", transformers.__version__)
for optim, outcome in found.items():
    print(f"{optim}: {outcome}")
assert found["galore_adafactor"] == "Adafactor", "the behaviour has changed"
assert found["galore_adamw_layerwise"] == "LayerWiseDummyOptimizer", "the behaviour has changed"
assert found["galore_adafactor_layerwise"].startswith("ValueError: Cannot combine"), "the behaviour has changed"
print("as described: no learning rate lets galore_adafactor_layerwise start")
PY
