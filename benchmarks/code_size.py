"""Count the code of a checkout: lines, files, and functions that a gradient passes until its weight has new codes.

    git worktree add /tmp/before COMMIT
    python -m benchmarks.code_size --tree /tmp/before --commit COMMIT

A gradient passes a function of `qgalore` that takes or gives it, or what becomes of it: a float tensor of the shape of
the output's gradient or of the projected gradient, also in a list or a dictionary. One layer is trained for that by
Q-GaLore on a CPU, updated inside the backward pass. Appends a row to `benchmarks/results/code_size.csv`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.rows import ROOT, append_row, commit

LIBRARIES = ("qgalore", "peft_pretraining")
TRACE = """
import json, os, sys, threading
sys.path.insert(0, os.getcwd())
import torch
from torch import Tensor, nn
import qgalore
from qgalore.config import WeightFormat

torch.manual_seed(0)
model, root = nn.Sequential(nn.Sequential(nn.Linear(64, 96, bias=False))), os.path.dirname(qgalore.__file__)
qgalore.convert_linears(model, ["0.0"], WeightFormat(8, 32))
options = dict(rank=8, subspace="streaming", update_proj_gap=1000, quant_group_size=32)
groups = qgalore.low_rank_param_groups(model, ["0.0"], **options)
optimizer = qgalore.QGaLoreAdamW8bit([group for group in groups if group["params"]], lr=1e-3)
optimizer.attach(model, update_in_backward=True)
losses = lambda: model(torch.randn(16, 64)).square().sum()
for _ in range(12):
    losses().backward()
    optimizer.step()
SHAPES = {(16, 96), (96, 8)}

def is_gradient(value, depth=0):
    if isinstance(value, Tensor):
        return value.is_floating_point() and tuple(value.shape) in SHAPES
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return depth < 4 and any(is_gradient(part, depth + 1) for part in parts)

passed = []

def trace(frame, event, result):
    code = frame.f_code
    if not code.co_filename.startswith(root + os.sep) or code.co_name.startswith("<"):
        return
    named = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    takes = event == "call" and any(is_gradient(frame.f_locals.get(name)) for name in named)
    function = (os.path.relpath(code.co_filename, root), code.co_qualname)
    if (takes or event == "return" and is_gradient(result)) and function not in passed:
        passed.append(function)

loss = losses()
threading.setprofile(trace)
sys.setprofile(trace)
loss.backward()
sys.setprofile(None)
print(json.dumps(passed))
"""
"""Run by Python in the checkout, with what every one since 99f339d has."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns 0."""
    parser = argparse.ArgumentParser(prog="code_size", description=__doc__.splitlines()[0])
    parser.add_argument("--tree", default=str(ROOT), help="folder of the checkout")
    parser.add_argument("--commit", default="", help="its commit, if that is not this checkout's")
    parser.add_argument("--results", default=str(ROOT / "benchmarks/results/code_size.csv"), help="CSV to append to")
    args = parser.parse_args(argv)
    tree = Path(args.tree).resolve()
    passed = functions_of_a_gradient(tree)
    for file, function in passed:
        print(f"{file:<32} {function}")
    files = {path for library in LIBRARIES for path in (tree / library).rglob("*.py")} | {tree / "run_pretrain.py"}
    row = {
        "commit": args.commit or commit(),
        "lines": sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files),
        "files": len(files),
        "gradient_functions": len(passed),
        "gradient_functions_in_kernels": sum(file.startswith("kernels") for file, _ in passed),
        "gradient_files": len({file for file, _ in passed}),
    }
    append_row(Path(args.results), row)
    print(json.dumps(row))
    return 0


def functions_of_a_gradient(tree: Path) -> list[tuple[str, str]]:
    """(file, function) that a gradient passes in an eager update, in the order of the first calls."""
    command = [sys.executable, "-c", TRACE]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{tree} could not be traced:\n{done.stderr}")
    return [(file, function) for file, function in json.loads(done.stdout.splitlines()[-1])]


if __name__ == "__main__":
    sys.exit(main())
