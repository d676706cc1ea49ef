"""One line from a model to an optimizer that trains it through low-rank gradients: `qgalore.optimizer_for`.

It chooses the matrices (`qgalore.layer.choice`), converts linear layers, splits stacks of matrices, makes param groups
with the options of a recipe (`qgalore.recipes`), attaches the optimizer, and prints what it chose.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from qgalore.config import FULL, OF_PROJECTIONS, SubspaceConfig, WeightFormat, complete_names, subspace_of
from qgalore.integrations.connection import connect
from qgalore.layer.choice import Choice, choose_matrices
from qgalore.layer.conversion import convert_linears
from qgalore.layer.linear import LowRankLinear
from qgalore.layer.linear_names import in_words
from qgalore.layer.stacks import split_stacks
from qgalore.optimizer import LowRankAdamW, QGaLoreAdamW8bit
from qgalore.optimizer.param_groups import is_finite, low_rank_param_groups
from qgalore.optimizer.training_summary import summary
from qgalore.recipes import RECIPES, Recipe

_OF_SUBSPACE = {field.name for field in dataclasses.fields(SubspaceConfig)}
_OF_FORMAT = {field.name for field in dataclasses.fields(WeightFormat)} - {"bits"}
_OF_RUN = {"updates": 0, "tokens_per_update": 65_536, "full_rank_lr": None, "full_rank_weight_decay": None}
"""Options of neither, with their defaults."""
_RATES = {"lr", "weight_decay", "full_rank_lr", "full_rank_weight_decay"}
_COUNTS = {"updates": 0, "tokens_per_update": 1}
"""Options that are whole numbers, each with the least."""


def optimizer_for(
    model: nn.Module,
    rank: int | str | None = None,
    names: Iterable[str] | None = None,
    *,
    weight_bits: int | None = 8,
    recipe: str = "orthogonal",
    optimizer_class: type[LowRankAdamW] = QGaLoreAdamW8bit,
    update_in_backward: bool = False,
    **options: Any,
) -> LowRankAdamW:
    """Make a model ready for low-rank training, in place, and return an optimizer that is attached to it.

    All linear layers of the model's blocks are converted and get the rank, whatever the model: not embeddings, head
    and norms, which train at full rank, as do matrices with a shorter side than the rank. Stacks of matrices in one
    parameter, such as experts, are split and stay float, as do layers whose weight the model itself reads. What is
    frozen is converted and stays frozen. What was chosen is printed, on the first rank alone;
    `qgalore.summary(model, optimizer)` gives the numbers. Move the model to its device before.

    The optimizer is attached by `qgalore.integrations.connect`: `.grad` holds no gradients, but functions that clip by
    the norm find it there. Before a micro-batch that is not the last of its update set `optimizer.is_last_micro_batch =
    False`. On several ranks call `connect` yourself, when the model is on its device: gradients are averaged from then.

    rank: "full" for the whole space, without a projection (galore_scale still scales its updates); None takes the
    recipe's share of the width. names: of linear layers, or of stacks, instead of all.
    weight_bits: 8 or 4, or None for float weights. recipe: "orthogonal", "full_rank" or "paper" (`qgalore.recipes`).
    optimizer_class: holds the bits of the states. update_in_backward: as of `LowRankAdamW.attach`.

    options, which have their say over the recipe: those of the optimizer (lr, betas, weight_decay, seed, ...), of a
    `SubspaceConfig`, and of a `WeightFormat` but bits. With `updates`, the length of the run, and `tokens_per_update`
    (default 65,536) all recipes but the paper's set weight decays, which are 0 else, and `full_rank_lr`, the learning
    rate of what is not low-rank, which is `lr` else; `full_rank_weight_decay` is the decay there.

    Raises ValueError where nothing would be low-rank or values make no sense, TypeError for unknown options or modules
    that are not linear; the model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimizer_for got a {type(model).__name__} as model: give the torch.nn.Module itself")
    _check(rank, weight_bits, recipe, optimizer_class, options)
    choice, given = choose_matrices(model, names), RECIPES[recipe]
    format = WeightFormat(weight_bits, **{key: options[key] for key in options.keys() & _OF_FORMAT})
    _check_model(model, choice, format)
    rank = given.rank(_width(choice)) if rank is None else rank
    low_rank = _subspace(given, options, rank) | {"rank": rank}
    arguments, full_rank = _rates(given, options, optimizer_class)
    narrow = _narrow(choice, _probe(optimizer_class, rank, low_rank, arguments), names is not None)
    chosen = [name for name in [*choice.linears, *choice.stacks] if name not in narrow]
    _check_any_trains(model, chosen)

    groups = low_rank_param_groups(model, _convert(model, choice, chosen, format), **low_rank)
    groups[0] |= full_rank
    optimizer = optimizer_class(groups, **arguments)
    shows_norm = _ranks() == 1 and any(param.is_floating_point() for param in model.parameters())
    (connect if shows_norm else LowRankAdamW.attach)(optimizer, model, update_in_backward)
    if _is_first_rank():
        rates = f"recipe {recipe}, lr {optimizer.param_groups[1].get('lr')}, at full rank {groups[0]['lr']}"
        if given.by_length and not options.get("updates"):
            rates += "; with updates=N, those of a run, the recipe has a rate at full rank and weight decays"
        print(summary(model, optimizer, (rates, *_notes(choice, narrow, rank, weight_bits))))
    return optimizer


def _probe(
    optimizer_class: type[LowRankAdamW], rank: int | str, low_rank: Mapping[str, Any], arguments: Mapping[str, Any]
) -> SubspaceConfig:
    """The subspace of such a weight; raises ValueError, before anything is changed, for what makes no sense."""
    size = rank if isinstance(rank, int) else 1
    optimizer = optimizer_class([{"params": [torch.empty(size, size, device="meta")], **low_rank}], **arguments)
    return subspace_of(optimizer.param_groups[0])


def _convert(model: nn.Module, choice: Choice, chosen: list[str], format: WeightFormat) -> list[str]:
    """Convert linear layers, split the chosen stacks, and return the names of the chosen layers and matrices."""
    convert = [name for name in choice.linears if name not in choice.float_only and not _is_converted(model, name)]
    if convert:
        convert_linears(model, convert, format)
    matrices = split_stacks(model, [name for name in choice.stacks if name in chosen])
    return [*(name for name in choice.linears if name in chosen), *matrices]


def _ranks() -> int:
    ranks = torch.distributed
    return ranks.get_world_size() if ranks.is_available() and ranks.is_initialized() else 1


def _is_first_rank() -> bool:
    return _ranks() == 1 or torch.distributed.get_rank() == 0


def _check(
    rank: int | str | None,
    weight_bits: int | None,
    recipe: str,
    optimizer_class: type[LowRankAdamW],
    options: Mapping[str, Any],
) -> None:
    """Raise for arguments that no model makes right."""
    if rank not in (None, FULL) and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(
            f"rank={rank!r} must be a whole number of dimensions, at least 1, or None for the recipe's, or {FULL!r} "
            "for the whole space"
        )
    if weight_bits is not None and (not isinstance(weight_bits, int) or weight_bits not in (8, 4)):
        raise ValueError(f"weight_bits={weight_bits!r} must be 8 or 4, or None for weights that stay float")
    if recipe not in RECIPES:
        raise ValueError(f"recipe={recipe!r} is unknown: it must be one of {', '.join(RECIPES)}")
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, LowRankAdamW)):
        raise TypeError(
            f"optimizer_class={optimizer_class!r} must be one of this library's classes: QGaLoreAdamW8bit, "
            "GaLoreAdamW8bit, GaLoreAdamW or GaLoreAdafactor"
        )
    known = {*_OF_SUBSPACE, *_OF_FORMAT, *_OF_RUN, *_arguments_of(optimizer_class)}
    for name in options:
        if complete_names({name: None}) <= known:
            continue
        close = difflib.get_close_matches(name, [*known, "weight_bits", "recipe", "names", "update_in_backward"], 1)
        raise TypeError(
            f"optimizer_for has no option {name}{f' (did you mean {close[0]}?)' if close else ''}: options are those "
            f"of {optimizer_class.__name__}, SubspaceConfig and WeightFormat, and {', '.join(_OF_RUN)}"
        )
    for name, value in options.items():
        unset = value is None and (name in _OF_RUN or _finds_its_rate(optimizer_class, options))
        if name in _RATES and not unset and not (is_finite(value) and value >= 0):
            raise ValueError(f"{name}={value!r} must be a finite number, at least 0")
        if name in _COUNTS and (isinstance(value, bool) or not isinstance(value, int) or value < _COUNTS[name]):
            raise ValueError(f"{name}={value!r} must be a whole number, at least {_COUNTS[name]}")


def _arguments_of(optimizer_class: type[LowRankAdamW]) -> set[str]:
    parameters = inspect.signature(optimizer_class).parameters.values()
    return {each.name for each in parameters if each.kind is not each.VAR_KEYWORD} - {"params"}


def _finds_its_rate(optimizer_class: type[LowRankAdamW], options: Mapping[str, Any]) -> bool:
    """Whether an optimizer has no learning rate to be given, as Adafactor with relative steps."""
    own = inspect.signature(optimizer_class).parameters.get("relative_step")
    return own is not None and bool(options.get("relative_step", own.default))


def _check_model(model: nn.Module, choice: Choice, format: WeightFormat) -> None:
    """Raise ValueError for what cannot be attached to, has no values, or is converted already, to another format."""
    for name, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError(
                f"{name or 'the model'} is a DistributedDataParallel, which does not see the gradients that an "
                "attached optimizer takes: give the model itself, and then call attach(model, all_reduce=...)"
            )
    for name, param in model.named_parameters():
        if param.is_meta:
            raise ValueError(
                f"{name} is on the meta device and has no values: load the model, or move it with to_empty and "
                "initialise it, before optimizer_for"
            )
        if param.dtype == torch.float64 and param.requires_grad:
            raise ValueError(f"{name} is float64: updates are made in float32; convert the model to it with float()")
    for name in choice.linears:
        layer = model.get_submodule(name)
        if isinstance(layer, LowRankLinear) and layer.format != format:
            raise ValueError(
                f"{name} is converted to {layer.format} already, not to {format}: give optimizer_for the options of "
                "that format, or a model whose layers are float"
            )


def _is_converted(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name), LowRankLinear)


def _width(choice: Choice) -> int:
    """The width of a model: the commonest shorter side of its matrices."""
    shapes = [*choice.linears.values(), *(shape[1:] for shape in choice.stacks.values())]
    return statistics.mode(min(shape) for shape in shapes)


def _subspace(recipe: Recipe, options: Mapping[str, Any], rank: int | str) -> dict[str, Any]:
    """The options of the subspace, those that are given under their names or under those of q-galore-torch."""
    given = {key: value for key, value in options.items() if complete_names({key: value}) & _OF_SUBSPACE}
    unwanted = complete_names(given).union(OF_PROJECTIONS if rank == FULL else ())
    return {key: value for key, value in recipe.subspace.items() if key not in unwanted} | given


def _rates(
    recipe: Recipe, options: Mapping[str, Any], optimizer_class: type[LowRankAdamW]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of the optimizer, and the learning rate and weight decay of the full-rank group."""
    known = _arguments_of(optimizer_class)
    arguments = {"lr": recipe.lr, **{key: value for key, value in recipe.optimizer.items() if key in known}}
    arguments |= {key: options[key] for key in options.keys() & known}
    updates, tokens, rest_lr, rest_decay = (options.get(key, default) for key, default in _OF_RUN.items())
    if _finds_its_rate(optimizer_class, options):
        arguments["lr"] = options.get("lr")
        given = {"lr": rest_lr, "weight_decay": rest_decay}
        return arguments, {key: value for key, value in given.items() if value is not None}
    lr, by_length = arguments["lr"], recipe.by_length if updates else None
    if rest_lr is None:
        rest_lr = lr * by_length.full_rank_multiple(updates) if by_length else lr
    if by_length and "weight_decay" not in options and lr > 0:
        decay = by_length.decay_of_matrices(updates, tokens)
        arguments["weight_decay"] = decay / lr
        if rest_decay is None and rest_lr > 0:
            rest_decay = by_length.full_rank_decay(updates) * decay / rest_lr
    rest = {"lr": rest_lr} | ({} if rest_decay is None else {"weight_decay": rest_decay})
    return arguments, rest


def _narrow(choice: Choice, config: SubspaceConfig, given: bool) -> dict[str, str]:
    """Matrices with a side that is shorter than the rank, by name in words; raises ValueError where they were given."""
    shapes: dict[str, tuple[int, ...]] = {**choice.linears, **{name: x[1:] for name, x in choice.stacks.items()}}
    found = {}
    for name, shape in shapes.items():
        if any(config.dimensions > shape[0 if side == "left" else 1] for side in config.sides(shape)):
            found[name] = _shape(shape)
    if found and (given or len(found) == len(shapes)):
        raise ValueError(
            f"rank={config.rank} is larger than the projected side of {in_words(found)}: give a smaller rank"
            + (", or leave their names out" if given and len(found) < len(shapes) else "")
        )
    return found


def _check_any_trains(model: nn.Module, names: Iterable[str]) -> None:
    """Raise ValueError where all that is named is frozen."""
    for name in names:
        owner = model.get_submodule(name.rpartition(".")[0])
        module = owner._modules.get(name.rpartition(".")[2])
        if isinstance(module, LowRankLinear):
            trains = not module.frozen
        elif module is not None:
            trains = module.get_parameter("weight").requires_grad
        else:
            trains = getattr(owner, name.rpartition(".")[2]).requires_grad
        if trains:
            return
    raise ValueError(
        f"all that would be low-rank of {type(model).__name__} is frozen: free the layers with requires_grad_(True), "
        "or name others"
    )


def _notes(choice: Choice, narrow: Mapping[str, str], rank: int | str, weight_bits: int | None) -> tuple[str, ...]:
    """What is not as one might expect, in sentences."""
    notes = []
    if narrow:
        notes.append(f"at full rank, since a side is shorter than {rank}: {in_words(dict(narrow))}")
    for why in dict.fromkeys(choice.float_only.values()) if weight_bits is not None else ():
        layers = {name: _shape(choice.linears[name]) for name, other in choice.float_only.items() if other == why}
        notes.append(f"float, since {why}: {in_words(layers)}")
    split = {name: shape for name, shape in choice.stacks.items() if name not in narrow}
    if split:
        described = {name: _shape(shape) for name, shape in split.items()}
        notes.append(f"stacks of matrices, each a low-rank matrix of its own, float: {in_words(described)}")
    return tuple(notes)


def _shape(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))
