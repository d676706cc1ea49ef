"""The page of all flags of `run_pretrain.py`, from the dataclasses that declare them."""

from __future__ import annotations

import inspect

from docs.make.markdown import sections, table
from peft_pretraining.config.flag_groups import FULL_RANK_OPTIMIZERS, GALORE_OPTIMIZERS, Q_GALORE_OPTIMIZERS
from peft_pretraining.config.flags import FlagSpec, read_specs
from peft_pretraining.config.run_config import GROUPS

OFFICIAL = {
    "activation_checkpointing", "batch_size", "beta1", "beta2", "continue_from", "cos_threshold", "dtype",
    "eval_every", "galore_scale", "gamma_proj", "grad_clipping", "gradient_accumulation", "lr", "max_length",
    "max_train_tokens", "min_lr_ratio", "model_config", "name", "num_training_steps", "optimizer", "project",
    "proj_bits", "proj_group_size", "proj_quant", "proj_type", "queue_size", "rank", "save_dir", "save_every",
    "scheduler", "seed", "simulation", "single_gpu", "stochastic_round", "tags", "total_batch_size",
    "unset_wandb", "update_proj_gap", "use_hf_model", "warmup_steps", "weight_bits", "weight_decay",
    "weight_group_size", "weight_quant", "workers",
}  # fmt: skip
"""The flags of the official code of arXiv 2407.08296; the others are this project's own."""
OFFICIAL_OPTIMIZERS = {
    "adam", "adamw", "sgd", "adafactor", "adam8bit", "galore_adamw8bit", "galore_adamw8bit_per_layer",
    "q_galore_adamw8bit", "q_galore_adamw8bit_per_layer",
}  # fmt: skip
_INTRODUCTION = """# Flags of `run_pretrain.py`

`qgalore pretrain` takes the same flags, and `--help` prints this page. A switch stands alone (`--dry_run`);
those that can be on by default have a form with `no-`, such as `--no-weight_quant`. Counts may be written as
5000, 100M or 1e9. All problems of a command line are reported at once, before anything is loaded.

Flags of the official code keep their name, their default and the meaning that the name promises. Those **in
bold** are this project's own. A `q_galore` optimizer means INT8 weights with stochastic rounding and INT4
projections unless `--no-weight_quant`, `--no-stochastic_round` or `--no-proj_quant` say otherwise; what else
its command line leaves out comes from `--recipe` ([which recipe](../guide/which_recipe.md))."""


def page() -> str:
    """The text of the page."""
    parts = [_INTRODUCTION, f"## Optimizers\n\n{_optimizers()}"]
    for title, group in GROUPS.items():
        rows = [row_of(spec) for spec in read_specs(group)]
        parts.append(f"## {title}\n\n{' '.join((inspect.getdoc(group) or '').split())}")
        parts.append(table(["flag", "value", "default", "meaning"], rows))
    return sections(*parts)


def _optimizers() -> str:
    names = {
        "full rank": FULL_RANK_OPTIMIZERS,
        "GaLore, float weights": GALORE_OPTIMIZERS,
        "Q-GaLore, INT8 weights": Q_GALORE_OPTIMIZERS,
    }
    rows = [
        [kind, " ".join(_marked(name, name in OFFICIAL_OPTIMIZERS) for name in found)] for kind, found in names.items()
    ]
    end = (
        "Names that end in `_per_layer` update each weight inside the backward pass, as soon as its gradient is there."
    )
    return f"{table(['kind', 'names for `--optimizer`'], rows)}\n\n{end}"


def row_of(spec: FlagSpec) -> list[str]:
    """The cells of a flag: name, value, default, meaning."""
    flag = spec.flag
    if spec.is_switch:
        value = "switch"
    elif flag.choices:
        value = " ".join(f"`{choice}`" for choice in flag.choices)
    else:
        limits = " and ".join(
            f"{word} {limit:g}"
            for word, limit in (
                ("at least", flag.at_least),
                ("more than", flag.above),
                ("at most", flag.at_most),
                ("less than", flag.below),
            )
            if limit is not None
        )
        value = ", ".join(
            part for part in (flag.unit.replace("_", " "), limits, *(f"or `{word}`" for word in flag.words)) if part
        )
    default = spec.default_text.removeprefix("default: ")
    return [_marked(f"--{spec.name}", spec.name in OFFICIAL), value, default, spec.help]


def _marked(name: str, official: bool) -> str:
    return f"`{name}`" if official else f"**`{name}`**"
