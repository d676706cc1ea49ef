"""`--rank auto`: ranks of the attention and of the MLP that take the bytes of one rank for all matrices.

An orthogonalised step along a projected momentum lowers the loss, to first order, by the nuclear norm of what the
subspace holds. So of all pairs of ranks that take no more bytes, the one is chosen whose subspaces hold most, by what
the largest singular directions of whole momenta were measured to hold. The MLP's momenta are flatter and a dimension of
their subspaces takes twice the bytes, so a small budget goes to the attention: at 1/8 of the width three dimensions for
one, at 1/4 two, at 7/16 one for one but for a seventh. The depth says little: from the first third of the layers to the
last a budget's ranks fall by a tenth.

What is dealt is resolved into --rank and --mlp_rank: a run, its plan and its checkpoints know numbers alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from peft_pretraining.config.flag_groups import AUTO, SubspaceArgs
from peft_pretraining.config.recipes import recipe_name, with_recipe
from peft_pretraining.config.run_config import RunArgs
from peft_pretraining.errors import UserError
from peft_pretraining.models.config import is_of_mlp
from peft_pretraining.models.registry import read_config
from qgalore.config import SubspaceConfig

HELD_BY_ATTENTION, HELD_BY_MLP = (3.0, 0.43), (1.7, 0.56)
"""(c, b) of (1 - (1 - s)^c)^b, the share of a momentum's nuclear norm in the largest s of its singular directions:
fitted to the means of the rows of benchmarks/results/spectrum.csv at commit 2843f12, which they meet to 0.011."""
_STEP, _SMALL = 8, 64
"""From the latter on ranks are multiples of the former, as those of the recipes."""
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def rank_to_deal(given: Mapping[str, Any]) -> int | str | None:
    """The rank whose bytes are dealt to a command line with these values; None where its --rank is not auto.

    auto:256 names it; auto alone is the rank that the command line would have without the flag.
    """
    word, _, number = str(given.get("rank", "")).partition(":")
    if word != AUTO:
        return None
    if number:
        return int(number)
    without = {name: value for name, value in given.items() if name != "rank"} | {"recipe": recipe_name(given)}
    rank: int | str = with_recipe(without).get("rank", SubspaceArgs.rank)
    return rank


def with_dealt_ranks(args: RunArgs, rank: int | str) -> RunArgs:
    """`args` with --rank and --mlp_rank that together take at most the bytes of `rank` for all decoder matrices.

    They are as they were where a check refuses them, or no matrix is in an MLP.
    """
    subspace, shapes = args.subspace, _shapes(args)
    if not isinstance(rank, int) or shapes is None or not args.optimizer.is_low_rank or subspace.mlp_rank:
        return args
    if rank > min(map(min, shapes.values())):
        return args
    parts = [[shape for name, shape in shapes.items() if is_of_mlp(name) == of_mlp] for of_mlp in (False, True)]
    if not all(parts):
        return args
    try:
        config = subspace.config()
    except ValueError:  # of options that the checks refuse
        return args
    basis_bytes = config.basis_bits / 8 if config.basis_bits else _BYTES[args.model.dtype]
    bytes_of_value = 1 if "8bit" in args.optimizer.optimizer else 4, basis_bytes
    prices = [sum(bytes_of_dimension(config, shape, *bytes_of_value) for shape in part) for part in parts]
    attention, mlp = dealt_ranks(parts, prices, rank)
    return dataclasses.replace(args, subspace=dataclasses.replace(subspace, rank=attention, mlp_rank=mlp))


def bytes_of_dimension(config: SubspaceConfig, shape: tuple[int, int], state_bytes: float, basis_bytes: float) -> float:
    """Bytes that a dimension of the subspace of a matrix (m, n) takes, by those of a value of moments and of a basis.

    Where both sides are projected it is that at the rank of `config`.
    """
    moments = 2 if config.direction == "adam" else 1
    sides = sum(shape[0 if side == "left" else 1] for side in config.sides(shape))
    return moments * state_bytes * math.prod(config.gradient_shape(shape)) / config.dimensions + basis_bytes * sides


def dealt_ranks(parts: Sequence[Sequence[tuple[int, int]]], prices: Sequence[float], rank: int) -> tuple[int, int]:
    """The ranks of attention and MLP that hold most of the nuclear norms at the bytes of `rank` for both.

    parts: the shapes of the matrices of either; prices: bytes of a dimension of all of them.
    """
    step, budget = _STEP if rank >= _SMALL else 1, rank * sum(prices)
    narrowest = [min(map(min, part)) for part in parts]
    best, most = (rank, rank), -1.0
    for attention in range(step, narrowest[0] + 1, step):
        mlp = min(int((budget - attention * prices[0]) / prices[1]) // step * step, narrowest[1])
        if mlp < 1:
            break
        pair = attention, mlp
        total = sum(
            nuclear_share(fit, each / min(shape))
            for fit, part, each in zip((HELD_BY_ATTENTION, HELD_BY_MLP), parts, pair, strict=True)
            for shape in part
        )
        if total > most:
            best, most = pair, total
    return best


def nuclear_share(parameters: tuple[float, float], share: float) -> float:
    """The share of a nuclear norm that `share` of the directions hold, by one of the fits."""
    inner, outer = parameters
    return float((1 - (1 - share) ** inner) ** outer)


def dealing_problems(args: RunArgs, given: Mapping[str, Any]) -> list[str]:
    """List what keeps ranks from being dealt to a command line with the values `given`, in sentences."""
    problems, rank = list[str](), rank_to_deal(given)
    if rank is None:
        return problems
    if args.method.method != "full":
        return [
            f"--rank {given['rank']} cannot work with --method {args.method.method}, whose factors have one rank: give "
            f"a whole number such as {rank if isinstance(rank, int) else 128}"
        ]
    if not args.optimizer.is_low_rank:
        return problems
    if not isinstance(rank, int):
        problems.append(
            f"--rank {given['rank']} deals the bytes of a number of dimensions, and without it the rank is {rank}: "
            f"give the number, as in --rank {AUTO}:256, or another --recipe"
        )
    if given.get("mlp_rank"):
        problems.append(
            f"--mlp_rank {given['mlp_rank']} is a part of what --rank {given['rank']} deals: leave it out, or "
            "give --rank a number"
        )
    if args.model.use_hf_model and _shapes(args) is None:
        problems.append(
            f"--rank {given['rank']} needs the shapes of the matrices, and only transformers' own class reads "
            f"--model_config {args.model.model_config}: give a number of dimensions"
        )
    return problems


def dealt_in_words(args: RunArgs, given: Mapping[str, Any]) -> str:
    """A note on the ranks that were dealt; "" where none were."""
    rank = rank_to_deal(given)
    if rank is None or not args.optimizer.is_low_rank:
        return ""
    subspace = args.subspace
    return (
        f"--rank {given['rank']} deals the bytes of rank {rank}: --rank {subspace.rank} for the attention, --mlp_rank "
        f"{subspace.mlp_rank or subspace.rank} for the MLP"
    )


def _shapes(args: RunArgs) -> dict[str, tuple[int, int]] | None:
    """Of the decoder matrices of a layer; None for what the checks report, or what transformers alone reads."""
    try:
        return read_config(args.model.model_config).matrix_shapes()
    except UserError:
        return None
