#!/usr/bin/env bash
# torch.optim.Optimizer.load_state_dict adds a key to the optimizer's `defaults`, which it did not have before. A param
# group that is added after a load then has a key that the groups before it lack, and an optimizer that checks a state
# against its own defaults refuses the second load of a state that it took the first time.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import torch


class Plain(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    def step(self):
        pass


optimizer = Plain([torch.nn.Parameter(torch.ones(2))])
before = sorted(optimizer.defaults)
optimizer.load_state_dict(optimizer.state_dict())
after = sorted(optimizer.defaults)
optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
groups = [sorted(group) for group in optimizer.param_groups]
print("torch", torch.__version__)
print("defaults before a load:", before)
print("defaults after it:     ", after)
print("keys of the groups:    ", groups)
assert before == ["lr"] and after == ["differentiable", "lr"], "the behaviour has changed"
assert groups == [["lr", "params"], ["differentiable", "lr", "params"]], "the behaviour has changed"
print("as described: loading a state changed the defaults, and with them a group that is added later")
PY
