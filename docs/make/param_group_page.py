"""The page of the keys of a low-rank param group, from `qgalore.config`."""

from __future__ import annotations

import dataclasses

import torch

from docs.make.markdown import sections, table
from peft_pretraining.config.flags import FlagSpec, read_specs
from qgalore import QGaLoreAdamW8bit
from qgalore.config import SPELLINGS, SubspaceConfig, WeightFormat

_INTRODUCTION = """# Param groups of the library

The optimizers of `qgalore` are `torch.optim.Optimizer`s. A param group without `rank` is plain AdamW in the
optimizer's precision; one with `rank` is low-rank, and its further keys are the options of
`qgalore.SubspaceConfig`, under the names of the command line's flags. `qgalore.low_rank_param_groups(model,
names, rank=128, ...)` makes both groups.

```python
groups = [
    {"params": others},
    {"params": matrices, "rank": 128, "update_proj_gap": 200, "galore_scale": 0.25, "proj_quant": True},
]
optimizer = qgalore.QGaLoreAdamW8bit(groups, lr=1e-2)
```

`QGaLoreAdamW8bit` has `proj_quant` on by default. Values that make no sense, alone or together, raise
`ValueError` when the optimizer is made."""


def page() -> str:
    """The text of the page."""
    return sections(
        _INTRODUCTION,
        "## Keys of every group",
        _of_every_group(),
        "## Keys of a low-rank group: `qgalore.SubspaceConfig`",
        _table(SubspaceConfig),
        "Keys of q-galore-torch are taken, too, for scripts that were written for it:",
        table(["key there", "key here"], [[f"`{theirs}`", f"`{ours}`"] for theirs, ours in SPELLINGS.items()]),
        "## How a weight is stored: `qgalore.WeightFormat`",
        "The second argument of `qgalore.convert_linears`, not a key of a param group.",
        _table(WeightFormat),
    )


_MEANINGS = {
    "lr": "learning rate",
    "betas": "decay of the two moments; a direction without a second moment reads the first alone",
    "eps": "added to the root of the second moment",
    "weight_decay": "share of a weight, times the rate, that an update takes off",
    "decoupled_weight_decay": "as in AdamW; `False`, as in Adam, is refused with a rank",
    "accumulator_dtype": "in which gradients are summed over micro-batches: float32, bfloat16 or int8",
    "norm_growth": "how much the norm of a gradient may grow from one update to the next, such as 1.01; 0: no limit",
    "second_moment": "of matrices without a rank: one a `value`, or one a `row`",
    "cautious_decay": "leave out the weight decay of values that an update moves away from zero",
    "state_bits": "of Adam's states: 32, or 8 in blocks; by the class of the optimizer",
}


def _of_every_group() -> str:
    """The defaults of `QGaLoreAdamW8bit`; a key without a meaning here raises KeyError."""
    optimizer = QGaLoreAdamW8bit([torch.nn.Parameter(torch.zeros(2))])
    rows = [[f"`{key}`", f"`{value!r}`", _MEANINGS[key]] for key, value in optimizer.defaults.items()]
    return table(["key", "default", "meaning"], rows)


def _table(options: type) -> str:
    return table(["option", "values", "default", "meaning"], [_row(spec) for spec in read_specs(options)])


def _row(spec: FlagSpec) -> list[str]:
    flag = spec.flag
    values = ", ".join(f"`{choice}`" for choice in flag.choices) or ("`True`, `False`" if spec.is_switch else "")
    limits = [
        f"{word} {limit:g}"
        for word, limit in (("at least", flag.at_least), ("more than", flag.above), ("at most", flag.at_most))
        if limit is not None
    ]
    values = values or ", ".join([*([flag.unit.replace("_", " ")] if flag.unit else []), *limits])
    values += "".join(f", or `{word!r}`" for word in flag.words)
    default = "required" if spec.default is dataclasses.MISSING else f"`{spec.default!r}`"
    if flag.auto and isinstance(flag.auto, str):
        default += f": {flag.auto}"
    return [f"`{spec.name}`", values, default, spec.help]
