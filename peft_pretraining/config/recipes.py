"""Recipes: defaults of flags that a command line does not give, from the study in `docs/quality.md`.

`qgalore.recipes` says what each is, with its values. Without flags of its own, the command line's paper has the
official defaults.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from peft_pretraining.config.flag_groups import FULL_RANK_OPTIMIZERS, Q_GALORE_OPTIMIZERS, OptimizerArgs, ScheduleArgs
from peft_pretraining.errors import UserError
from peft_pretraining.models.config_source import states_in
from peft_pretraining.models.registry import read_config
from qgalore.config import FULL, OF_PROJECTIONS
from qgalore.recipes import RECIPES, ByLength, Recipe

_FLAGS = {"second_moment": "full_rank_second_moment"}
"""Of arguments of the optimizer: the flags with other names."""
_PAPERS = {"galore_scale", "svd_method", "max_update_proj_gap", "cos_threshold", "gamma_proj", "queue_size"}
"""Flags of subspaces by SVD, and galore_scale, which all official command lines set: a command line that gives one of
them is tuned for the paper's algorithm."""
_OF_MUON = ("newton_schulz", "momentum_rank", "rounding_feedback", "sum_in_momentum")
"""Flags of a momentum that is orthogonalised: a command line that gives one of them asks for such a direction."""


def with_recipe(given: Mapping[str, Any]) -> dict[str, Any]:
    """Add the recipe's values to `given`, the values of the flags on the command line by name."""
    name = recipe_name(given)
    values = {**given, "recipe": name}
    if name == "paper" or given.get("optimizer", OptimizerArgs.optimizer) in FULL_RANK_OPTIMIZERS:
        return values
    recipe = RECIPES[name]
    rank = _rank_of(given.get("model_config", ""), recipe)
    if rank:
        values.setdefault("rank", rank)
    whole = values.get("rank") == FULL and values.get("mlp_rank", FULL) == FULL
    left_out = {*(OF_PROJECTIONS if whole else ()), *(["norm_growth"] if values.get("sum_in_momentum") else ())}
    chosen = {"lr": recipe.lr, **recipe.subspace, **recipe.optimizer}
    return {**{_FLAGS.get(key, key): value for key, value in chosen.items() if key not in left_out}, **values}


def recipe_name(given: Mapping[str, Any]) -> str:
    """The recipe of a command line with the values `given` by name.

    Without --recipe the optimizer decides: a q_galore one trains at full rank. Official command lines get the paper's
    algorithm, as do weights that Adam has trained, for which an orthogonal direction is the wrong one (arXiv
    2605.10468); those with a rank or with flags of projections get the subspace that they are about.
    """
    if given.get("recipe"):
        return str(given["recipe"])
    if given.get("optimizer", OptimizerArgs.optimizer) not in Q_GALORE_OPTIMIZERS or _papers_flags(given):
        return "paper"
    if _source_of_adam(given):
        return "paper"
    return "orthogonal" if _is_about_a_subspace(given) else "full_rank"


def _is_about_a_subspace(given: Mapping[str, Any]) -> bool:
    if given.get("direction") == "adam":  # which has the rate of a subspace, where the recipes are orthogonal
        return True
    ranks = [given[name] for name in ("rank", "mlp_rank") if name in given]
    return any(rank not in (0, FULL) for rank in ranks) or (not ranks and any(name in given for name in OF_PROJECTIONS))


def _source_of_adam(given: Mapping[str, Any]) -> str:
    """--init_from where Adam is taken to have trained those weights, and no flag is about another direction; or "".

    A run or checkpoint of this program says what has trained it. Nearly all other models were trained by Adam.
    """
    source = str(given.get("init_from") or "")
    if not source or given.get("direction", "adam") != "adam" or any(given.get(name) for name in _OF_MUON):
        return ""
    with contextlib.suppress(OSError, ValueError):  # of no folder, or of what is found when its weights are read
        for path in states_in(Path(source)):
            state = json.loads(path.read_text(encoding="utf-8"))
            orthogonal = state.get("direction", "adam") != "adam" and "galore" in state.get("optimizer", "")
            return "" if orthogonal or state.get("optimizer") == "muon" else source
    return source


def why_recipe(given: Mapping[str, Any]) -> str:
    """The flags by which a q_galore command line has another recipe than the default; "" if it gives --recipe."""
    name = recipe_name(given)
    if given.get("recipe") or name == "full_rank" or given.get("optimizer") not in Q_GALORE_OPTIMIZERS:
        return ""
    if not _papers_flags(given) and (source := _source_of_adam(given)):
        return f"recipe {name}, because of --init_from {source}, whose weights keep Adam's direction"
    names = {"rank", "mlp_rank", "direction", *OF_PROJECTIONS} & given.keys()
    of_subspace = [f"--{each} {given[each]}".removesuffix(" True") for each in sorted(names)]
    return f"recipe {name}, because of {' and '.join(_papers_flags(given) or of_subspace)}"


def recipe_in_words(given: Mapping[str, Any]) -> str:
    """A sentence on the flags by which a q_galore command line has another recipe than full_rank; "" with --recipe."""
    flags, why = _papers_flags(given), why_recipe(given)
    if not why:
        return ""
    if not flags and _source_of_adam(given):
        return f"{why}: flags left out have the official defaults; --recipe full_rank is for weights that Muon trained"
    if not flags:
        return f"{why}: flags left out have its values, --recipe paper has the official defaults"
    # The streaming subspace needs no SVD, and follows one side of a gradient.
    apart = [flag for flag in ("--proj_type full", "--svd_method randomized") if flag in flags]
    keep = f"leave {' and '.join(apart)} out and add" if apart else "add"
    return f"{why}: flags left out have the official defaults; for those of this project {keep} --recipe orthogonal"


def _papers_flags(given: Mapping[str, Any]) -> list[str]:
    """The given flags, with values, by which a command line counts as tuned for the paper's algorithm.

    Which has a rank, and not the whole space.
    """
    if given.get("rank") == FULL:
        return []
    names = [name for name in given if name in _PAPERS or (name, given[name]) == ("proj_type", "full")]
    return [f"--{name} {given[name]}" for name in sorted(names)]


def with_length(args: OptimizerArgs, updates: int, tokens: int, given: AbstractSet[str]) -> OptimizerArgs:
    """Set what the recipe derives from the length of the run, except flags that are `given` by name: the learning rate
    of embeddings, head and norms, and the weight decays.

    updates: of the run; tokens: of an update.
    """
    rule = _rule(args)
    if rule is None or args.lr <= 0:
        return args
    if "full_rank_lr" not in given:
        args = dataclasses.replace(args, full_rank_lr=rule.full_rank_multiple(updates) * args.lr)
    if "weight_decay" in given:
        return args
    decay = rule.decay_of_matrices(updates, tokens)
    args = dataclasses.replace(args, weight_decay=decay / args.lr)
    if "full_rank_weight_decay" in given or args.peak_full_rank_lr <= 0:
        return args
    full_rank_decay = rule.full_rank_decay(updates) * decay / args.peak_full_rank_lr
    return dataclasses.replace(args, full_rank_weight_decay=full_rank_decay)


def _rule(args: OptimizerArgs) -> ByLength | None:
    """What the recipe derives from the length of the run, if anything."""
    return RECIPES[args.recipe or "paper"].by_length if args.is_low_rank else None


def length_in_words(args: OptimizerArgs, schedule: ScheduleArgs, given: AbstractSet[str]) -> str:
    """A sentence with the flags that `with_length` set, where the schedule lets a run be made longer; else ""."""
    if not schedule.can_be_extended or _rule(args) is None:
        return ""
    values = {
        "full_rank_lr": args.full_rank_lr,
        "weight_decay": args.weight_decay,
        "full_rank_weight_decay": args.full_rank_weight_decay,
    }
    flags = [f"--{name} {value!r}" for name, value in values.items() if name not in given and value is not None]
    if not flags:
        return ""
    return (
        f"recipe {args.recipe} derives {' '.join(flags)} from the length of the run; a run that is to go on with more "
        f"updates as if it had been planned so needs the same values from its start: give them as flags"
    )


def _rank_of(model_config: str, recipe: Recipe) -> int | str | None:
    """The recipe's, as a number at most the smallest matrix dimension; None if the model is unknown."""
    try:
        config = read_config(model_config)
    except UserError:  # which the checks report
        return None
    narrowest = min(min(shape) for shape in config.matrix_shapes().values())
    rank = recipe.rank(config.hidden_size)
    return min(narrowest, rank) if isinstance(rank, int) else rank
