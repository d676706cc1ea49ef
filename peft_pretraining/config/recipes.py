"""Recipes: the values of flags that a command line leaves out, found by the study in `docs/quality.md`.

- paper: the algorithm of arXiv 2407.08296 with the official defaults: subspaces by SVD, Adam's moments.
- orthogonal: the streaming subspace and Muon's orthogonalised momentum in it. There is no second moment, so seven
  sixteenths of the width take the bytes of the paper's quarter. Weights decay.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Any

from peft_pretraining.config.flag_groups import FULL_RANK_OPTIMIZERS, Q_GALORE_OPTIMIZERS, OptimizerArgs
from peft_pretraining.errors import UserError
from peft_pretraining.models.registry import read_config

_ORTHOGONAL: Mapping[str, Any] = {
    "lr": 1e-2,
    "galore_scale": 0.5,
    "norm_growth": 1.01,
    "subspace": "streaming",
    "update_proj_gap": 200,
    "direction": "orthogonal",
}
_PAPERS = {"galore_scale", "svd_method", "max_update_proj_gap", "cos_threshold", "gamma_proj", "queue_size"}
"""Flags of subspaces by SVD, and the scale, which all official command lines set: one that gives such a flag is tuned
for the paper's algorithm."""
_FULL_RANK_LR, _ITS_UPDATES = 2.0, 800
"""The learning rate of embeddings, head and norms, as a multiple of the matrices', in runs of up to so many updates; in
longer ones it falls with the root of their number, 2 in 800 and 1 in 3,200: the best that was measured at both."""
_DECAY, _ITS_TOKENS, _DECAYS_A_RUN = 2.5e-3, 65_536, 8.0
"""At the peak of the learning rate a matrix loses 0.0025 of itself in an update of 65,536 tokens or more, in
proportion of fewer, or 8 over the updates of the run if that is less: it then remembers an eighth of the run. Measured
with so many tokens at 800 and 3,200 updates. In small updates most embeddings would decay without being seen, and in
150,000 updates it comes to 5e-5, which is common practice."""
_FULL_RANK_DECAY = 2.0
"""The decay of embeddings, head and norms, as a multiple."""


def with_recipe(given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the flags that were given, by name, and those of the recipe for flags that were not.

    Without `recipe` among them the recipe goes by the optimizer, and official command lines keep the paper's.
    """
    optimizer = given.get("optimizer", OptimizerArgs.optimizer)
    papers = optimizer not in Q_GALORE_OPTIMIZERS or _papers_flags(given)
    name = given.get("recipe") or ("paper" if papers else "orthogonal")
    values = {**given, "recipe": name}
    if name == "paper" or optimizer in FULL_RANK_OPTIMIZERS:
        return values
    values = {**_ORTHOGONAL, **values}
    rank = _rank_of(given.get("model_config", ""))
    if rank:
        values.setdefault("rank", rank)
    return values


def recipe_in_words(given: Mapping[str, Any]) -> str:
    """Which recipe a q_galore command line gets because of which other flag, as a sentence; "" where it says one
    itself, or gets what the optimizer's name stands for."""
    flags = _papers_flags(given)
    if given.get("recipe") or not flags or given.get("optimizer") not in Q_GALORE_OPTIMIZERS:
        return ""
    # The streaming subspace needs no SVD, and follows one side of a gradient.
    apart = [flag for flag in ("--proj_type full", "--svd_method randomized") if flag in flags]
    keep = f"leave {' and '.join(apart)} out and add" if apart else "add"
    return (
        f"recipe paper, because of {' and '.join(flags)}: flags left out have the official defaults; for those of "
        f"this project {keep} --recipe orthogonal"
    )


def _papers_flags(given: Mapping[str, Any]) -> list[str]:
    """Those of the flags that tell a command line which is tuned for the paper's algorithm, with their values."""
    names = [name for name in given if name in _PAPERS or (name, given[name]) == ("proj_type", "full")]
    return [f"--{name} {given[name]}" for name in sorted(names)]


def with_length(args: OptimizerArgs, updates: int, tokens: int, given: AbstractSet[str]) -> OptimizerArgs:
    """With what the recipe takes from the length of the run, but for what is `given`, the flags' names: the learning
    rate of embeddings, head and norms, and the weight decays.

    updates: of the run; tokens: of an update.
    """
    if args.recipe != "orthogonal" or not args.is_low_rank or args.lr <= 0:
        return args
    if "full_rank_lr" not in given:
        multiple = _FULL_RANK_LR * math.sqrt(min(1.0, _ITS_UPDATES / max(1, updates)))
        args = dataclasses.replace(args, full_rank_lr=multiple * args.lr)
    if "weight_decay" in given:
        return args
    decay = min(_DECAY, _DECAY * tokens / _ITS_TOKENS, _DECAYS_A_RUN / max(1, updates))
    args = dataclasses.replace(args, weight_decay=decay / args.lr)
    if "full_rank_weight_decay" in given or args.peak_full_rank_lr <= 0:
        return args
    return dataclasses.replace(args, full_rank_weight_decay=_FULL_RANK_DECAY * decay / args.peak_full_rank_lr)


def _rank_of(model_config: str) -> int | None:
    """Seven sixteenths of the model's width, in eights, but no more than the narrowest matrix has; None if unknown."""
    try:
        config = read_config(model_config)
    except UserError:  # which the checks report
        return None
    narrowest = min(min(shape) for shape in config.matrix_shapes().values())
    rank = config.hidden_size * 7 // 16
    return min(narrowest, rank // 8 * 8 or rank)
