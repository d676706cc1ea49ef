"""The options of the library: how a weight is stored, and the subspace that its gradient is projected onto.

Each option is declared once, here: its type, limits, default and meaning. Param groups, checkpoints, the memory plan
and the command line of `run_pretrain.py` take them from these classes.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, get_args, get_origin, get_type_hints

FULL = "full"
"""The rank of the whole space: nothing is projected, stored or refreshed."""

FLOAT_PRODUCTS, INT8_PRODUCTS, FP8_PRODUCTS, FP8_GRADIENTS = range(4)
"""What a layer multiplies: values in the dtype of its activations, or both factors rounded to INT8 or FP8, the last for
its weight's gradient, too."""


@dataclass(frozen=True)
class Allowed:
    """What an annotation says of an option beyond its type: `Annotated[int, Allowed("updates", at_least=1)]`."""

    unit: str = ""
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    choices: tuple[str | int, ...] = ()
    words: tuple[str, ...] = ()
    """Values beside numbers."""
    auto: str | Callable[[], str] = ""
    """The default in words, or what gives them, where its value (0, "", None or False) means that it is worked out."""

    def missed_limits(self, value: float) -> str:
        """In words the limits, of which the value misses one, such as "at least 1"; empty where it keeps them all."""
        limits = [
            ("at least", self.at_least, lambda limit: value >= limit),
            ("more than", self.above, lambda limit: value > limit),
            ("at most", self.at_most, lambda limit: value <= limit),
            ("less than", self.below, lambda limit: value < limit),
        ]
        if all(limit is None or holds(limit) for _, limit, holds in limits):
            return ""
        return " and ".join(f"{word} {limit:g}" for word, limit, _ in limits if limit is not None)


@dataclass(frozen=True)
class WeightFormat:
    """How a low-rank weight is stored and rounded when it is written."""

    bits: int | None = None
    """8 or 4: quantized in groups; None: float."""
    group_size: int = 256
    """Values of a row that share a scale."""
    stochastic_rounding: bool = True
    """Round updates up or down at random, unbiased; else to nearest."""
    simulate: bool = False
    """Fake quantization: keep a float weight whose values lie on the quantized grid."""
    int8_products: bool = False
    """Quantize activations as they come and multiply in INT8: 8 bits, a row is one group and group_size has no say."""
    fp8_products: bool = False
    """Round activations, gradients and weights to FP8 as they come, with a scale a row, and multiply those: whatever
    the weight is stored in."""
    fp8_weight_gradients: bool = False
    """Beside fp8_products, round both factors of the weight's gradient, too, with a scale a column, where it is formed
    as a whole."""

    def __post_init__(self) -> None:
        """Raises ValueError for products in INT8 of a weight that is not stored in 8 bits, or in FP8, too."""
        if self.int8_products and self.fp8_products:
            raise ValueError("int8_products and fp8_products are two ways to multiply: leave one out")
        if self.fp8_weight_gradients and not self.fp8_products:
            raise ValueError("fp8_weight_gradients comes beside fp8_products: give both")
        if self.int8_products and (self.bits != 8 or self.simulate):
            stored = "a simulated weight" if self.simulate else f"bits={self.bits}"
            raise ValueError(f"int8_products multiplies the codes of an 8-bit weight: it cannot work with {stored}")

    @property
    def stored_bits(self) -> int | None:
        """8 or 4 where the weight is stored as codes; None where it is float."""
        return None if self.simulate else self.bits

    @property
    def products(self) -> int:
        """What is multiplied: `FLOAT_PRODUCTS`, `INT8_PRODUCTS`, `FP8_PRODUCTS` or `FP8_GRADIENTS`."""
        if self.fp8_products:
            return FP8_GRADIENTS if self.fp8_weight_gradients else FP8_PRODUCTS
        return INT8_PRODUCTS if self.int8_products else FLOAT_PRODUCTS

    def group_size_of(self, columns: int) -> int:
        """Values that share a scale in a row of so many columns; for a whole row a multiple of 8, as kernels want."""
        return -(-columns // 8) * 8 if self.int8_products else self.group_size


@dataclass(frozen=True)
class SubspaceConfig:
    """The subspace that the gradients of a weight matrix are projected onto: how it is found, refreshed and used."""

    rank: Annotated[int | str, Allowed("dimensions", at_least=1, words=(FULL,))]
    """Dimensions of the subspace of each decoder matrix; full: the whole space, with no projection."""
    galore_scale: Annotated[float, Allowed("factor", above=0)] = 0.25
    """Multiplier of the update once it is projected back (alpha in the papers), at full rank of the update itself."""
    proj_type: Annotated[str, Allowed(choices=("std", "reverse_std", "left", "right", "full"))] = "std"
    """Side that is projected: std the smaller one, reverse_std the larger one, full both."""
    subspace: Annotated[str, Allowed(choices=("svd", "streaming"))] = "svd"
    """How it is found: svd of the full gradient as in the paper, or streaming, one step of subspace iteration from
    projected gradients alone."""
    svd_method: Annotated[str, Allowed(choices=("full", "randomized"))] = "full"
    """Which SVD the svd subspace uses."""
    update_proj_gap: Annotated[int, Allowed("updates", at_least=1)] = 200
    """Interval between two refreshes; the lazy rule, for svd subspaces alone, may make it longer."""
    max_update_proj_gap: Annotated[int, Allowed("updates", at_least=0, auto="8 x update_proj_gap")] = 0
    """Longest interval that the lazy rule may reach."""
    cos_threshold: Annotated[float, Allowed("ratio", at_least=0, at_most=1)] = 0.4
    """Lazy rule: similarity of successive subspaces above which the interval grows."""
    gamma_proj: Annotated[float, Allowed("factor", at_least=1)] = 2.0
    """Lazy rule: factor by which the interval grows; 1 keeps it."""
    queue_size: Annotated[int, Allowed("refreshes", at_least=1)] = 5
    """Lazy rule: successive refreshes that must all be similar."""
    direction: Annotated[str, Allowed(choices=("adam", "orthogonal", "normuon"))] = "adam"
    """Step inside the subspace: Adam's, or along the orthogonalised momentum (Muon), without a second moment; normuon:
    with all rows of that of one size."""
    newton_schulz: Annotated[str, Allowed(choices=("auto", "muon", "muon_fp8", "muon4_fp8", "polar5", "polar4"))] = (
        "muon"
    )
    """Polynomials that orthogonalise a momentum: Muon's one polynomial five times, with fp8 in products of FP8 whose
    diagonals are exact, or there four steeper ones that bear its rounding; or five or four, each the best for what the
    one before leaves (Polar Express), on Gram matrices where that is cheaper. auto: muon4_fp8 for matrices with a
    shorter side of at least 768 on a GPU with FP8 (compute capability 8.9), else muon."""
    rounding_feedback: Annotated[float, Allowed("share", at_least=0, at_most=1)] = 0.0
    """Share of the rounding error of quantized weights that is fed into their momentum, by which the next updates make
    up for what they can of it; for rank full with the orthogonal direction. 0 is off, 1 all."""
    residual: Annotated[str, Allowed(choices=("none", "fira"))] = "none"
    """What the projection leaves out of the last micro-batch's gradient: not used, or added to the update at the size
    that Adam gives the rest (fira)."""
    momentum_rank: Annotated[float, Allowed("dimensions_or_share", at_least=0, auto="stored as a whole")] = 0.0
    """At full rank, store the momentum as low-rank factors in 8 bits, of so many dimensions or below 1 of that share of
    the shorter side, and a rest of momentum_rest_bits (Muon-GRASP); whole where the shorter side is no longer."""
    momentum_rest_bits: Annotated[int, Allowed(choices=(8, 4, 2, 0))] = 4
    """Bits in which a value of that rest is stored; 0: what the factors leave out is lost."""
    sum_in_momentum: bool = False
    """At full rank, add the gradient of each micro-batch to the momentum, so that no sum of gradients takes memory; the
    orthogonalised momentum is then without Nesterov's look ahead."""
    rotate_moments: Annotated[bool | None, Allowed(auto="on for streaming, off for svd as in the paper")] = None
    """Rotate Adam's moments into the new basis at a refresh."""
    proj_quant: bool = False
    """Store the projections as integers of proj_bits."""
    proj_bits: Annotated[int, Allowed(choices=(4, 8))] = 4
    """Bits in which a value of a projection is stored."""
    proj_group_size: Annotated[int, Allowed("values", at_least=2)] = 256
    """Neighbours in a basis vector that share a scale and a zero point."""

    def __post_init__(self) -> None:
        """Raises ValueError, with a sentence, for values that make no sense, alone or together."""
        for name, allowed in limits_of(SubspaceConfig).items():
            value = getattr(self, name)
            if allowed.choices and value not in allowed.choices:
                known = ", ".join(map(str, allowed.choices))
                raise ValueError(f"{name}={value!r} is unknown: it must be one of {known}")
            if not allowed.choices and value is not None and (limits := _missed(name, value, allowed)):
                raise ValueError(f"{name}={value!r} must be {limits}")
        for problem in self.problems(lambda name: f"{name}={getattr(self, name)!r}"):
            raise ValueError(problem)

    def problems(self, label: Callable[[str], str]) -> list[str]:
        """Combinations that cannot work, each as a sentence; label(option) names an option with its value."""
        problems = self.full_rank_problems(label)
        if self.rank == FULL:
            given = [label(name) for name in OF_PROJECTIONS if getattr(self, name) != default_of(type(self), name)]
            none = f"{label('rank')} projects nothing, so that {{}} has no meaning: leave it out, or give a rank"
            return [*problems, *(none.format(each) for each in given)]
        both = self.proj_type == "full"
        if self.subspace == "streaming" and both:
            problems.append(
                f"{label('proj_type')} projects both sides, and {label('subspace')} follows one: use svd, or "
                "std, reverse_std, left or right"
            )
        if self.subspace == "streaming" and self.svd_method == "randomized":
            problems.append(f"{label('svd_method')} is for subspaces by SVD: {label('subspace')} needs no SVD")
        if self.residual != "none" and both:
            problems.append(
                f"{label('residual')} scales across one projected side, and {label('proj_type')} has two: use std, "
                "reverse_std, left or right"
            )
        if 0 < self.max_update_proj_gap < self.update_proj_gap:
            problems.append(
                f"{label('max_update_proj_gap')} is less than {label('update_proj_gap')}: the longest interval cannot "
                "be shorter than the first"
            )
        return problems

    def full_rank_problems(self, label: Callable[[str], str]) -> list[str]:
        """Those of `problems` that do not depend on projections."""
        return [
            *self._direction_problems(label),
            *self._momentum_problems(label),
            *self._feedback_problems(label),
            *self._summing_problems(label),
        ]

    def _direction_problems(self, label: Callable[[str], str]) -> list[str]:
        if self.newton_schulz in ("auto", "muon") or self.direction != "adam":
            return []
        return [
            f"{label('newton_schulz')} orthogonalises a momentum, and {label('direction')} has none that is "
            "orthogonalised: leave it out, or use direction orthogonal or normuon"
        ]

    def _momentum_problems(self, label: Callable[[str], str]) -> list[str]:
        given = label("momentum_rank")
        if not self.momentum_rank:
            default = default_of(type(self), "momentum_rest_bits")
            idle = (
                f"{label('momentum_rest_bits')} is about a momentum in parts: give momentum_rank, too, or leave it out"
            )
            return [idle] if self.momentum_rest_bits != default else []
        problems = []
        if self.momentum_rank > 1 and self.momentum_rank != int(self.momentum_rank):
            problems.append(f"{given} must be a whole number of dimensions, or a share of the shorter side below 1")
        problems += self._needs_full_rank(f"{given} stores the momentum of a full rank in parts", label)
        if self.direction == "adam":
            problems.append(
                f"{given} stores a momentum in parts that is then orthogonalised, and {label('direction')} needs every "
                "value of it and a second moment: use the direction orthogonal or normuon, or leave momentum_rank out"
            )
        return problems

    def _feedback_problems(self, label: Callable[[str], str]) -> list[str]:
        if not self.rounding_feedback:
            return []
        given = label("rounding_feedback")
        problems = self._needs_full_rank(f"{given} feeds errors into a momentum of the weight's shape", label)
        if self.direction != "orthogonal":
            problems.append(
                f"{given} is worked out for an orthogonalised momentum, and not for {label('direction')}: use the "
                "direction orthogonal, or leave one out"
            )
        return [*problems, *self._needs_whole_momentum(f"{given} adds to every value of a momentum", label)]

    def _summing_problems(self, label: Callable[[str], str]) -> list[str]:
        if not self.sum_in_momentum:
            return []
        given = label("sum_in_momentum").removesuffix(" True")
        problems = self._needs_full_rank(f"{given} adds gradients to a momentum of the weight's shape", label)
        if self.direction == "adam":
            problems.append(
                f"{given} is exact for a momentum alone, and {label('direction')} has a second moment, of the sum of "
                "all gradients: use the direction orthogonal or normuon, or leave it out"
            )
        problems += self._needs_whole_momentum(f"{given} adds to every value of a momentum", label)
        if self.rounding_feedback:
            problems.append(
                f"{given} makes directions without Nesterov's momentum, for which {label('rounding_feedback')} is "
                "worked out: leave one out"
            )
        return problems

    def _needs_full_rank(self, needed_by: str, label: Callable[[str], str]) -> list[str]:
        """A sentence where the momentum is projected; needed_by: what needs the one of full rank, in words."""
        projected = f"{needed_by}, and {label('rank')} projects it: give the rank {FULL}, or leave it out"
        return [projected] if self.rank != FULL else []

    def _needs_whole_momentum(self, needed_by: str, label: Callable[[str], str]) -> list[str]:
        """A sentence where the momentum is stored in parts; needed_by: what needs it whole, in words."""
        in_parts = f"{needed_by}, and {label('momentum_rank')} stores it in parts: leave one out"
        return [in_parts] if self.momentum_rank else []

    @property
    def dimensions(self) -> int:
        """The rank as a number; raises ValueError for the whole space."""
        if not isinstance(self.rank, int):
            raise ValueError(f"rank={self.rank!r} is no number of dimensions")
        return self.rank

    @property
    def rotates_moments(self) -> bool:
        """Whether moments are rotated, with the default worked out."""
        return self.subspace == "streaming" if self.rotate_moments is None else self.rotate_moments

    @property
    def shortest_interval(self) -> int:
        """Between two refreshes of a weight, in updates; the memory plan counts with it."""
        return self.update_proj_gap

    @property
    def longest_interval(self) -> int:
        """Of the lazy rule, in updates, with the default worked out."""
        return self.max_update_proj_gap or 8 * self.update_proj_gap

    @property
    def basis_bits(self) -> int | None:
        """Bits of a stored basis; None where it is float."""
        return self.proj_bits if self.proj_quant else None

    def sides(self, shape: tuple[int, ...]) -> tuple[str, ...]:
        """The sides of an (m, n) matrix that are projected: ("left",), ("right",), both, or none."""
        shorter, longer = ("right", "left") if shape[0] >= shape[1] else ("left", "right")
        if self.rank == FULL:
            return ()
        by_type = {"std": (shorter,), "reverse_std": (longer,), "left": ("left",), "right": ("right",)}
        return by_type.get(self.proj_type, ("left", "right"))

    def check_shape(self, shape: tuple[int, ...], name: str) -> None:
        """Raise ValueError where the weight `name` of this shape cannot have this rank."""
        if len(shape) != 2:
            raise ValueError(
                f"parameter {name} of shape {shape} is not a matrix: it cannot have a rank; put it into a param group "
                "without one"
            )
        for side in self.sides(shape):
            if self.dimensions > shape[0 if side == "left" else 1]:
                raise ValueError(
                    f"rank={self.rank} is larger than the {side} side of {name}, of shape {shape}: give a smaller "
                    "rank, or put it into a param group without one"
                )

    def momentum_dimensions(self, shape: tuple[int, ...]) -> int:
        """The rank of the factors of the momentum of an (m, n) matrix; 0 where that is stored as a whole.

        So it is, too, where the shorter side is no longer than momentum_rank.
        """
        given = self.momentum_rank
        rank = max(1, round(given * min(shape))) if 0 < given < 1 else int(given)
        return rank if rank < min(shape) else 0

    def gradient_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Of the projected gradient of an (m, n) matrix: (rank, n), (m, rank) or (rank, rank)."""
        sides = self.sides(shape)
        rows, columns = shape
        return self.dimensions if "left" in sides else rows, self.dimensions if "right" in sides else columns


def scaled_too_late(given: str, summing: str, instead: str) -> str:
    """The sentence for what scales an update's gradients beside `SubspaceConfig.sum_in_momentum`.

    given: what scales them; summing: sum_in_momentum; instead: what would be right; each as the user writes it.
    """
    return (
        f"{given} scales the sum of an update's gradients, and with {summing} they are part of the momentum by then: "
        f"{instead}, or leave {summing} out"
    )


def default_of(options: type, name: str) -> Any:
    """The default of a dataclass's field."""
    return next(field.default for field in dataclasses.fields(options) if field.name == name)


_ALWAYS = {
    *("rank", "galore_scale", "direction", "newton_schulz", "momentum_rank", "momentum_rest_bits", "rounding_feedback"),
    "sum_in_momentum",
}
OF_PROJECTIONS = tuple(field.name for field in dataclasses.fields(SubspaceConfig) if field.name not in _ALWAYS)
"""Options of a `SubspaceConfig` that have no meaning with the rank `FULL`."""


@cache
def limits_of(options: type) -> dict[str, Allowed]:
    """The limits of a dataclass's fields by name, those of a field that a subclass restates from where they stand."""
    found = {}
    for field in dataclasses.fields(options):
        for owner in options.__mro__:
            hint = get_type_hints(owner, include_extras=True).get(field.name)
            if get_origin(hint) is Annotated:
                found[field.name] = get_args(hint)[1]
                break
    return found


@cache
def _types_of(options: type) -> dict[str, Any]:
    """The types of a dataclass's fields by name, without what is annotated."""
    return get_type_hints(options)


def _missed(name: str, value: Any, allowed: Allowed) -> str:
    """What an option of a subspace must be, in words, where its value is not: its type, finite, within its limits."""
    if value in allowed.words:
        return ""
    kind = _types_of(SubspaceConfig)[name]
    kind = get_args(kind)[0] if allowed.words else kind
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if kind is int and not (number and isinstance(value, numbers.Integral)):
        return _with_limits("a whole number", allowed)
    if kind is float and not (number and math.isfinite(value)):
        return _with_limits("a finite number", allowed)
    return allowed.missed_limits(value)


def _with_limits(what: str, allowed: Allowed) -> str:
    limits = allowed.missed_limits(math.nan)  # misses every limit that there is
    return " or ".join([f"{what}, {limits}" if limits else what, *map(repr, allowed.words)])


SPELLINGS = {
    "scale": "galore_scale",
    "quant": "proj_quant",
    "quant_n_bit": "proj_bits",
    "quant_group_size": "proj_group_size",
}
"""Keys of q-galore-torch, which also the checkpoints of version 0.1.0 have, and ours."""

_ASK_FOR_NOTHING: dict[str, tuple[Any, ...]] = {
    "correct_bias": (True,), "no_deprecation_warning": (True, False), "amsgrad": (False,), "optim_bits": (8, 32),
    "args": (None,), "min_8bit_size": (4096,), "percentile_clipping": (100,), "block_wise": (True,),
    "is_paged": (False,),
}  # fmt: skip
"""Arguments of the optimizers of galore-torch and q-galore-torch that ours do not have, and the values that say nothing
else than what happens here anyway. (Theirs do not read `amsgrad` and `optim_bits`, either.)"""


def ignored_arguments(kind: str, given: Mapping[str, Any]) -> str:
    """A sentence that names what an optimizer of the class `kind` ignores of arguments that it does not have itself.

    Empty where there is none. given: arguments by name. Raises TypeError for one that galore-torch and q-galore-torch
    do not have, either, ValueError for one that would change the training.
    """
    unknown = [name for name in given if name not in _ASK_FOR_NOTHING]
    if unknown:
        raise TypeError(f"{kind} got an unexpected argument {unknown[0]!r}: options of a subspace go into param groups")
    if not given.get("correct_bias", True):
        raise ValueError(
            f"{kind} got correct_bias={given['correct_bias']!r}: the bias of Adam's moments is always corrected here; "
            "leave it out, or take GaLoreAdamW of qgalore.compat"
        )
    ignored = [f"{name}={value!r}" for name, value in given.items() if value not in _ASK_FOR_NOTHING[name]]
    if not ignored:
        return ""
    return f"{kind} ignores {', '.join(ignored)}: arguments of galore-torch that have no meaning here"


def complete_names(group: Mapping[str, Any]) -> set[str]:
    """The keys of a param group, those of q-galore-torch under our names."""
    return {SPELLINGS.get(key, key) for key in group}


def _without_dim(group: Mapping[str, Any]) -> Mapping[str, Any]:
    """A param group without galore-torch's key `dim` of its low-rank tensors, which are matrices here."""
    if "rank" not in group or "dim" not in group:
        return group
    if not isinstance(group["dim"], int) or group["dim"] > 2:
        raise ValueError(
            f"a param group with a rank has dim={group['dim']!r}: the gradients of matrices alone are projected here; "
            "put tensors of more dimensions into a param group without a rank"
        )
    return {key: value for key, value in group.items() if key != "dim"}


def complete_group(group: Mapping[str, Any], **defaults: Any) -> dict[str, Any]:
    """A param group with all options of a `SubspaceConfig` under their own names, if it has a rank; else without.

    The options may be given under the names of q-galore-torch. defaults: of options that are not given. Raises
    ValueError for what makes no sense.
    """
    names = {field.name for field in dataclasses.fields(SubspaceConfig)}
    group = _without_dim(group)
    options: dict[str, Any] = {}
    spelling: dict[str, str] = {}
    rest: dict[str, Any] = {}
    for key, value in group.items():
        name = SPELLINGS.get(key, key)
        if name in options and options[name] != value:
            raise ValueError(
                f"a param group has {spelling[name]}={options[name]!r} and {key}={value!r}: give one of them"
            )
        if name in names:
            options[name], spelling[name] = value, key
        else:
            rest[key] = value
    if options and "rank" not in options:
        given = ", ".join(spelling.values())
        raise ValueError(
            f"a param group has {given} and no rank: give its rank, or leave them out to train in full rank"
        )
    if options.get("rank") is None:
        return rest
    options = {name: value for name, value in options.items() if value is not None}  # None: not given
    if options["rank"] == FULL:
        defaults = {name: value for name, value in defaults.items() if name not in OF_PROJECTIONS}
    try:
        return {**rest, **dataclasses.asdict(SubspaceConfig(**(defaults | options)))}
    except ValueError as error:
        text = str(error)
        for ours, theirs in spelling.items():
            text = text.replace(ours, theirs)
        raise ValueError(text) from None


def subspace_of(group: Mapping[str, Any]) -> SubspaceConfig:
    """The options of a param group that `complete_group` has made."""
    return SubspaceConfig(**{field.name: group[field.name] for field in dataclasses.fields(SubspaceConfig)})
