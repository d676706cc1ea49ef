"""How much of the momentum of each decoder matrix lies in its largest singular directions.

    python run_pretrain.py --rank full --save_every 400 --save_dir RUN ...
    python -m benchmarks.bench_spectrum RUN/step_00000400 RUN/step_00000800

What a rank throws away is the rest: by kind of matrix and depth it says where ranks are worth most. A row a matrix: the
shares of the squared Frobenius norm and of the nuclear norm, the sum of the singular values, in the first 1/16, 1/8,
1/4, 7/16 and 3/4 of the singular directions of its shorter side. The printed table has means of either over thirds of
the layers, and the ranks by which a budget is spent best: dimension by dimension where the next one, for the bytes of a
momentum and a projection, holds most of it. An orthogonalised step along a momentum lowers the loss, to first order, by
its nuclear norm, so that is what ranks for the orthogonal direction should hold.
"""

from __future__ import annotations

import argparse
import heapq
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.rows import ROOT, append_row, commit
from peft_pretraining.checkpoint.store import Checkpoint, load_checkpoint
from peft_pretraining.errors import UserError
from peft_pretraining.models.build import low_rank_names, network_on_meta
from peft_pretraining.models.registry import config_from
from qgalore.update import moments

SHARES = {"1/16": 1 / 16, "1/8": 1 / 8, "1/4": 1 / 4, "7/16": 7 / 16, "3/4": 3 / 4}
"""Of the shorter side."""
PARTS = 3


def momenta(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The momentum (m, n) of each decoder matrix by name, float32. Raises UserError for a run of another kind."""
    names = low_rank_names(network_on_meta(config_from(checkpoint.state["model_config_contents"], "the model config")))
    _, *groups = checkpoint.optimizer_state["param_groups"]
    numbers = [number for group in groups for number in group["params"]]
    if checkpoint.state.get("rank") != "full" or checkpoint.state.get("mlp_rank") or len(numbers) != len(names):
        raise UserError(f"{checkpoint.path}: the spectrum is that of whole momenta: train with --rank full.")
    states = checkpoint.optimizer_state["state"]
    return {name: moments.read_moment(states[number], "exp_avg") for name, number in zip(names, numbers, strict=True)}


def energies(momentum: Tensor) -> Tensor:
    """The squared singular values of a matrix, largest first, in float64, as shares of their sum."""
    gram = momentum.double()
    gram = gram @ gram.T if gram.shape[0] <= gram.shape[1] else gram.T @ gram
    values = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)
    return values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)


def singular_shares(momentum: Tensor) -> dict[str, Tensor]:
    """The `energies` of a matrix, and its singular values as shares of their sum, the nuclear norm."""
    squares = energies(momentum)
    values = squares.sqrt()
    return {"squared": squares, "nuclear": values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)}


def part_of(name: str, layers: int) -> tuple[str, int]:
    """(kind, part of the depth) of a decoder matrix by its name, such as ("q_proj", 0)."""
    number = next(int(word) for word in name.split(".") if word.isdecimal())
    return name.rpartition(".")[2], number * PARTS // layers


def dealt_ranks(found: Mapping[str, tuple[Tensor, tuple[int, int]]], share: float) -> dict[str, int]:
    """Ranks by matrix that hold most of the norms at the bytes of one rank, `share` of each shorter side.

    found: (shares of a norm, shape) by name. A dimension of (m, n) takes max(m, n) bytes of the momentum and half a
    byte for each of min(m, n) values of the projection.
    """
    price = {name: max(shape) + min(shape) / 2 for name, (_, shape) in found.items()}
    left = sum(price[name] * int(share * min(shape)) for name, (_, shape) in found.items())
    ranks = dict.fromkeys(found, 0)
    queue = [(-float(values[0]) / price[name], name) for name, (values, _) in found.items()]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        if price[name] > left:
            continue
        left -= price[name]
        ranks[name] += 1
        values = found[name][0]
        if ranks[name] < len(values):
            heapq.heappush(queue, (-float(values[ranks[name]]) / price[name], name))
    return ranks


def table(found: Mapping[str, tuple[Tensor, tuple[int, int]]]) -> list[str]:
    """Means over the matrices of a kind in a third of the layers: shares, and ranks dealt at the bytes of 7/16."""
    layers = 1 + max(int(word) for name in found for word in name.split(".") if word.isdecimal())
    ranks, lines = (
        dealt_ranks(found, SHARES["7/16"]),
        [f"{'kind':12} part {' '.join(f'{x:>6}' for x in SHARES)}   rank"],
    )
    for kind, part in sorted({part_of(name, layers) for name in found}):
        names = [name for name in found if part_of(name, layers) == (kind, part)]
        cells = [sum(held(found[name][0], share) for name in names) / len(names) for share in SHARES.values()]
        rank = sum(ranks[name] / min(found[name][1]) for name in names) / len(names)
        lines.append(f"{kind:12} {part:4} {' '.join(f'{cell:6.3f}' for cell in cells)} {rank:6.3f}")
    return lines


def held(values: Tensor, share: float) -> float:
    """The sum of the first `share` of the energies."""
    return float(values[: int(share * len(values))].sum())


def main(argv: Sequence[str] | None = None) -> int:
    """Measure checkpoints, append their rows and print a table for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path, help="step_... folders of a run with --rank full")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "spectrum.csv")
    parser.add_argument("--note", default="", help="such as the text that was trained on")
    args = parser.parse_args(argv)
    for path in args.checkpoints:
        try:
            checkpoint = load_checkpoint(path)
            whole = momenta(checkpoint)
        except UserError as error:
            print(f"bench_spectrum: {error}", file=sys.stderr)
            return 2
        shares = {name: singular_shares(value) for name, value in whole.items()}
        for name, shape in ((name, value.shape) for name, value in whole.items()):
            row = {"commit": commit(), "model": Path(checkpoint.state["model_config"]).stem, "note": args.note}
            row |= {"update": checkpoint.update_step, "matrix": name, "rows": shape[0], "columns": shape[1]}
            for norm, values in shares[name].items():
                row |= {f"{norm} {key}": f"{held(values, share):.4f}" for key, share in SHARES.items()}
            append_row(args.results, row)
        for norm in ("squared", "nuclear"):
            found = {name: (shares[name][norm], (value.shape[0], value.shape[1])) for name, value in whole.items()}
            print("\n".join([f"{path}, {norm} norm:", *table(found)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
