#!/usr/bin/env bash
# torch.distributed.checkpoint.state_dict.get_optimizer_state_dict returns the state of every parameter, and
# set_optimizer_state_dict silently leaves out that of parameters that do not require a gradient at the moment. A
# parameter that is frozen for a while (or an integer one, which cannot require a gradient) loses its moments over a
# save and a load, without an error or a warning.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import warnings

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


model, optimizer = build()
for _ in range(3):
    optimizer.zero_grad()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
model[0].weight.requires_grad_(False)
saved = get_optimizer_state_dict(model, optimizer)
other, other_optimizer = build()
other.load_state_dict(model.state_dict())
other[0].weight.requires_grad_(False)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    set_optimizer_state_dict(other, other_optimizer, saved)
loaded = sorted(name for name, param in other.named_parameters() if param in other_optimizer.state)
about_state = [str(each.message) for each in caught if "state" in str(each.message).lower()]
print("torch", torch.__version__)
print("saved: ", sorted(saved["state"]))
print("loaded:", loaded)
print("warnings about it:", about_state)
assert sorted(saved["state"]) == ["0.bias", "0.weight", "1.bias", "1.weight"], "the behaviour has changed"
assert loaded == ["0.bias", "1.bias", "1.weight"] and not about_state, "the behaviour has changed"
print("as described: the state of the frozen parameter was saved and is not loaded")
PY
