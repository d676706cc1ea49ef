"""Train with random settings of the library in two checkouts, and say whether both end with the same bits.

    git worktree add /tmp/before COMMIT
    python -m benchmarks.same_bits --before /tmp/before --before_commit COMMIT --settings 300

For changes that shall change nothing: the goldens in `tests/golden` are runs of chosen modes, these are drawn by lot. A
setting is a small network trained for 11 updates on a CPU with any optimizer, format of weights, subspace, direction,
sum, clipping, skipped updates, frozen layers, sum over ranks, and a state loaded in between. The norm of the last
gradient, all weights and all states are compared. A setting that one checkout refuses has to be refused by the other.
Appends a row to `benchmarks/results/same_bits.csv`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.rows import ROOT, append_row, commit

TRAIN = """
import copy, hashlib, os, random, sys, warnings
sys.path.insert(0, os.getcwd())
warnings.filterwarnings("ignore")
import torch
from torch import nn
import qgalore
from qgalore.config import WeightFormat

torch.set_num_threads(1)
OPTIMIZERS = (qgalore.GaLoreAdamW, qgalore.GaLoreAdamW8bit, qgalore.QGaLoreAdamW8bit)
FORMATS = {
    "float": dict(bits=None), "int8": dict(bits=8, group_size=16), "int4": dict(bits=4, group_size=8),
    "simulated": dict(bits=8, group_size=16, simulate=True), "int8 products": dict(bits=8, int8_products=True),
}

class Net(nn.Module):
    def __init__(self, inner, outer, bias):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(11, inner), nn.LayerNorm(inner)
        self.up, self.down = nn.Linear(inner, outer, bias=bias), nn.Linear(outer, inner, bias=False)
        self.head = nn.Linear(inner, 11, bias=False)

    def forward(self, ids):
        x = self.embedding(ids)
        return self.head(self.norm(x + self.down(torch.relu(self.up(x)))))

def options_of(lot):
    subspace = lot.choice(["svd", "streaming"])
    options = dict(
        rank=lot.choice([4, 8]), subspace=subspace, update_proj_gap=lot.choice([1, 2, 3, 7]),
        scale=lot.choice([0.25, 1.0]), direction=lot.choice(["adam", "orthogonal"]), quant_group_size=16,
        proj_type=lot.choice(["std", "reverse_std", "left", "right"] + ["full"] * (subspace == "svd")),
    )
    if subspace == "svd":
        options |= dict(
            svd_method=lot.choice(["full", "randomized"]), gamma_proj=lot.choice([1, 2.0]),
            cos_threshold=lot.choice([0.0, 0.4]), queue_size=2,
        )
    if lot.random() < 0.3:
        options["rotate_moments"] = lot.random() < 0.5
    if lot.random() < 0.3:
        options["quant"] = lot.random() < 0.5
    if options["proj_type"] != "full" and lot.random() < 0.2:
        options["residual"] = "fira"
    return options

def digest(number):
    lot, names = random.Random(number), ["up", "down"]
    inner, outer = lot.choice([(24, 40), (40, 24), (32, 32), (17, 48), (64, 96)])
    torch.manual_seed(number)
    model = Net(inner, outer, lot.random() < 0.5).to(lot.choice([torch.float32, torch.float32, torch.bfloat16]))
    store, rounding = lot.choice(["plain", *FORMATS]), lot.random() < 0.7
    if store != "plain":
        qgalore.convert_linears(model, names, WeightFormat(stochastic_rounding=rounding, **FORMATS[store]))
    frozen = lot.choice([None, None, "norm", "down"])
    if frozen:
        getattr(model, frozen).requires_grad_(False)
    options = options_of(lot)
    values = dict(
        lr=10 ** lot.uniform(-3, -1.5), weight_decay=lot.choice([0, 0.1]), norm_growth=lot.choice([0, 0, 1.05]),
        accumulator_dtype=lot.choice(["float32", "bfloat16", "int8"]), seed=lot.randrange(9),
    )
    attached = lot.choice([None, False, True] if store in ("plain", "float", "simulated") else [False, True])
    count, clipped = lot.choice([1, 1, 2, 3]), 0 if attached else lot.choice([0, 0, 0.5])
    skipped, reloaded, kind = lot.choice([None, None, 5]), lot.choice([None, 4, 8]), lot.choice(OPTIMIZERS)
    ranks = (lambda tensor: (tensor.mul_(2), None)[1]) if lot.random() < 0.4 else None

    def new():
        groups = qgalore.low_rank_param_groups(model, names, **options)
        optimizer = kind([group for group in groups if group["params"]], **values)
        if attached is not None:
            optimizer.attach(model, update_in_backward=attached, all_reduce=ranks)
        return optimizer

    optimizer, generator = new(), torch.Generator().manual_seed(number)
    for update in range(11):
        for micro_batch in range(count):
            ids = torch.randint(0, 11, (6, 5), generator=generator)
            optimizer.is_last_micro_batch = micro_batch == count - 1
            loss = nn.functional.cross_entropy(model(ids).float().flatten(0, 1), ids.flatten()) / count
            if skipped == update and optimizer.is_last_micro_batch:
                loss = loss * float("nan") if lot.random() < 0.5 else loss
                optimizer.skip_update_if(torch.tensor(True))
            loss.backward()
        if clipped:
            optimizer.clip_grad_norm_(clipped)
        for group in optimizer.param_groups:
            group["lr"] *= 0.97
        optimizer.step()
        norm = float(optimizer.grad_norm())
        optimizer.zero_grad()
        if reloaded == update:
            state = copy.deepcopy(optimizer.state_dict())
            if attached is not None:
                optimizer.detach()
            optimizer = new()
            optimizer.load_state_dict(state)
    bits = hashlib.sha256(repr(norm).encode())
    saved = optimizer.state_dict()["state"].items()
    states = {f"{key} {name}": value for key, each in saved for name, value in each.items()}
    for name, value in sorted((model.state_dict() | states).items()):
        bits.update(name.encode() + value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return bits.hexdigest()

for number in range(int(sys.argv[1]), int(sys.argv[2])):
    try:
        print(number, digest(number), flush=True)
    except (ValueError, RuntimeError, TypeError) as error:
        print(number, "refused:", type(error).__name__, flush=True)
"""
"""Run by Python in each checkout, with what every one since 99f339d has."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns 0 if all settings end with the same bits, 1 if one does not."""
    parser = argparse.ArgumentParser(prog="same_bits", description=__doc__.splitlines()[0])
    parser.add_argument("--before", required=True, help="folder of the checkout to compare with")
    parser.add_argument("--before_commit", required=True, help="its commit")
    parser.add_argument("--settings", type=int, default=300, help="how many are tried")
    parser.add_argument("--first", type=int, default=0, help="number of the first; each number is a setting")
    parser.add_argument("--results", default=str(ROOT / "benchmarks/results/same_bits.csv"), help="CSV to append to")
    args = parser.parse_args(argv)
    with ThreadPoolExecutor(2) as threads:
        trees = (Path(args.before).resolve(), ROOT)
        before, after = threads.map(lambda tree: lines(tree, args.first, args.settings), trees)
    differing = [number for number, line in after.items() if before[number] != line]
    for number in differing:
        print(f"setting {number}: {before[number]} before, {after[number]} after")
    row = {
        "before": args.before_commit,
        "after": commit(),
        "settings": args.settings,
        "first": args.first,
        "refused_by_both": sum(line.startswith("refused") and before[n] == line for n, line in after.items()),
        "differing": len(differing),
    }
    append_row(Path(args.results), row)
    print(json.dumps(row))
    return int(bool(differing))


def lines(tree: Path, first: int, count: int) -> dict[int, str]:
    """What each setting ends with in a checkout, by its number: a digest of all bits, or the error that refused it."""
    command = [sys.executable, "-c", TRAIN, str(first), str(first + count)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"training in {tree} failed:\n{done.stderr}")
    return {int(number): rest for number, rest in (line.split(" ", 1) for line in done.stdout.splitlines())}


if __name__ == "__main__":
    sys.exit(main())
