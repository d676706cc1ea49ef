#!/usr/bin/env bash
# transformers' Trainer resumes a Mixtral with experts and routers at their initial values. save_pretrained writes them
# under the names of the original checkpoints, one tensor an expert, and resuming reads the file with load_state_dict,
# which knows neither these names nor their form. Two warnings name the keys, and training goes on: with the optimizer's
# state of trained weights on weights that were never trained.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.24.0 accelerate==1.15.0
FOLDER="$folder" "$folder/venv/bin/python" - <<'PY'
import os

import torch
import transformers

FOLDER = os.environ["FOLDER"]
SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"input_ids": torch.arange(8) + index, "labels": torch.arange(8) + index}


def fresh():
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, **HEADS))


def train(resume=None):
    """Two steps; resumed after the second one, there is nothing left to train, and the weights are as they were read."""
    model = fresh()
    arguments = transformers.TrainingArguments(
        output_dir=FOLDER, max_steps=2, save_steps=2, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    transformers.Trainer(model=model, args=arguments, train_dataset=Rows()).train(resume_from_checkpoint=resume)
    return model.state_dict()


trained, resumed, initial = train(), train(f"{FOLDER}/checkpoint-2"), fresh().state_dict()
print("torch", torch.__version__, "transformers", transformers.__version__)
lost = [name for name in trained if not torch.equal(trained[name], resumed[name])]
assert lost and all(torch.equal(resumed[name], initial[name]) for name in lost), "the behaviour has changed"
assert any("experts" in name for name in lost) and len(lost) < len(trained), "the behaviour has changed"
print("as described: at their initial values after resuming:", ", ".join(lost))
PY
