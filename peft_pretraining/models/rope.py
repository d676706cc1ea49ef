"""The frequencies of rotary positions, as the `config.json` of a model gives them.

A pair of a head's values turns by position times f_i = theta^(-2i / head_dim) (Su et al., arXiv 2104.09864). For a
context that is longer than the one in training, LLaMA 3.1 (Grattafiori et al., arXiv 2407.21783) slows down the pairs
that do not come around often enough in the old one: `RopeScaling`, transformers' rope_type "llama3".
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from peft_pretraining.errors import UserError
from peft_pretraining.models.config import HF_HINT

_TYPES = ("default", "llama3")
_IN_EVERY_TYPE = ("rope_theta", "rope_type", "type", "partial_rotary_factor")


@dataclass(frozen=True)
class RopeScaling:
    """LLaMA 3.1's scaling, under transformers' names.

    With t = L f / 2 pi, how often a pair comes around in the L = `original_max_position_embeddings` tokens:
    f / factor for t below `low_freq_factor`, f for t above `high_freq_factor`, and linear in t between the two.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def to_hf_dict(self) -> dict[str, Any]:
        """As it stands in a config.json, beside rope_theta."""
        return {"rope_type": "llama3", **asdict(self)}


def read_rope(raw: dict[str, Any], source: str) -> tuple[Any, RopeScaling | None]:
    """theta, unchecked, and the scaling, from the contents of a config.json.

    They stand in today's `rope_parameters`, or in the older `rope_theta` and `rope_scaling`. Raises UserError that
    names the file `source` and the key for what is neither plain nor LLaMA 3.1's.
    """
    given = [key for key in ("rope_parameters", "rope_scaling") if raw.get(key) is not None]
    key = given[0] if given else "rope_parameters"
    rope = raw.get(key) or {}
    if not isinstance(rope, dict):
        raise UserError(f"{source}: {key} is {rope!r}; it must be an object with rope_theta and rope_type.")
    if len(given) == 2 and raw["rope_scaling"] != rope:
        raise UserError(f"{source}: rope_scaling and rope_parameters differ; give rope_parameters alone.")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _TYPES:
        allowed = " or ".join(map(repr, _TYPES))
        raise UserError(f"{source}: {key} has rope_type {kind!r}; it must be {allowed}, {HF_HINT}.")
    for name, value in rope.items():
        if isinstance(value, dict):
            raise UserError(f"{source}: {key} has values of its own for {name}; all layers must share one, {HF_HINT}.")
    partial = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise UserError(f"{source}: partial_rotary_factor is {partial!r}; it must be 1.0, {HF_HINT}.")
    theta = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
    return theta, _scaling(rope, key, source) if kind == "llama3" else None


def _scaling(rope: dict[str, Any], key: str, source: str) -> RopeScaling:
    names = [field.name for field in fields(RopeScaling)]
    missing = [name for name in names if name not in rope]
    if missing:
        raise UserError(
            f"{source}: {key} of rope_type 'llama3' lacks {', '.join(missing)}; it needs {', '.join(names)}."
        )
    unknown = sorted(set(rope) - set(names) - set(_IN_EVERY_TYPE))
    if unknown:
        raise UserError(f"{source}: {key} of rope_type 'llama3' has {', '.join(unknown)}, which it does not know.")
    scaling = RopeScaling(*(rope[name] for name in names))
    low, length = scaling.low_freq_factor, scaling.original_max_position_embeddings
    checks = {
        "factor": (_is_number(scaling.factor) and scaling.factor >= 1, "a number, 1 or more"),
        "low_freq_factor": (_is_number(low) and low > 0, "a positive number"),
        "high_freq_factor": (
            _is_number(scaling.high_freq_factor) and _is_number(low) and scaling.high_freq_factor > low,
            f"a number above low_freq_factor ({low!r})",
        ),
        "original_max_position_embeddings": (
            isinstance(length, int) and not isinstance(length, bool) and length > 0,
            "a positive whole number",
        ),
    }
    for name, (holds, right) in checks.items():
        if not holds:
            raise UserError(f"{source}: {name} of {key} is {rope[name]!r}; it must be {right}.")
    return scaling


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
