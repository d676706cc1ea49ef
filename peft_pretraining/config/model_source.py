"""What `--init_from` says about the model: its configuration, where --model_config is left out or differs."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from peft_pretraining.config.flag_groups import CheckpointArgs, DataArgs, ModelArgs
from peft_pretraining.data.sources.kind import TextKind
from peft_pretraining.data.sources.registry import find_kind
from peft_pretraining.errors import UserError
from peft_pretraining.models.config import read_config_json
from peft_pretraining.models.config_source import config_in, config_path
from peft_pretraining.models.registry import config_from
from peft_pretraining.models.source_tokenizer import fingerprint, tokenizer_of_source

_SHAPES = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim",
)  # fmt: skip
_CONSTANTS = ("rms_norm_eps", "rope_theta", "rope_scaling")


def fill_model_config(values: dict[str, Any]) -> list[str]:
    """Set a --model_config that is left out, among the `values` of the flags that are given, to that of --init_from.

    A run that is resumed may have lost its source, and has the configuration in its checkpoints. Returns problems.
    """
    source = values.get("init_from")
    if not source or "model_config" in values:
        return []
    if Path(source).expanduser().is_file():
        return [f"--init_from {source} is a file: give the folder that it is in"]
    try:
        path = config_path(source, "--init_from")
        if path.is_file():
            values["model_config"] = source
            return []
        problem = _not_there(source)
    except UserError as error:
        problem = f"{str(error).removesuffix('.')} (--model_config is taken from there if it is left out)"
    resumed = values.get("continue_from", "")
    folder = Path(values.get("save_dir", "") if resumed == "auto" else resumed)
    if resumed and folder.is_dir() and config_in(folder):
        values["model_config"] = str(folder)
        return []
    return [problem]


def source_problems(model: ModelArgs, checkpoint: CheckpointArgs) -> list[str]:
    """List what of `--init_from` cannot fit `--model_config`; nothing of a run that may be resumed, which has its own.

    What only its tensors tell is seen when they are read.
    """
    if not model.init_from or checkpoint.continue_from or not model.model_config:  # the last is a problem already
        return []
    try:
        if not config_path(model.init_from, "--init_from").exists():
            return [_not_there(model.init_from)]
    except UserError as error:
        # A model without a config.json has a --model_config beside it, or its absence is a problem already.
        return [] if Path(model.init_from).is_dir() else [str(error)]
    if model.model_config == model.init_from:
        return []
    with contextlib.suppress(UserError):  # of either, which are problems of their own
        there, here = read_config_json(model.init_from, "--init_from"), read_config_json(model.model_config)
        differing = [key for key in _SHAPES if key in there and key in here and there[key] != here[key]]
        if differing:
            named = "; ".join(f"{key} is {there[key]} there and {here[key]} here" for key in differing)
            return [
                f"--init_from {model.init_from} is not of the shape of --model_config {model.model_config}: {named}. "
                "Leave --model_config out to take that of --init_from, or give a model of this shape"
            ]
    return []


def source_warnings(model: ModelArgs, data: DataArgs) -> list[str]:
    """List what differs from the model of `--init_from`, whose weights fit its own: the tokenizer, and constants."""
    return [*_of_another_tokenizer(model, data), *_of_other_constants(model)]


def _of_another_tokenizer(model: ModelArgs, data: DataArgs) -> list[str]:
    if not model.init_from or not data.tokenizer:
        return []
    own = ""
    with contextlib.suppress(UserError, OSError, ValueError):  # problems of their own, or no problem of a resumed run
        if isinstance(find_kind(data.dataset), TextKind):
            own = tokenizer_of_source(model.init_from)
    if not own or fingerprint(own) == fingerprint(data.tokenizer):
        return []
    return [
        f"--tokenizer {data.tokenizer} is not {own}, the tokenizer of --init_from {model.init_from}: by another one "
        "the ids stand for other pieces of text than the weights were trained with; leave --tokenizer out, unless both "
        "are the same"
    ]


def _of_other_constants(model: ModelArgs) -> list[str]:
    """Constants in which `--model_config` differs."""
    if not model.init_from or model.model_config == model.init_from:
        return []
    with contextlib.suppress(UserError):
        there = config_from(read_config_json(model.init_from, "--init_from"), model.init_from)
        here = config_from(read_config_json(model.model_config), model.model_config)
        differing = [key for key in _CONSTANTS if getattr(there, key, None) != getattr(here, key, None)]
        return [
            f"{key} is {getattr(there, key, None)} in --init_from {model.init_from} and {getattr(here, key, None)} in "
            f"--model_config {model.model_config}: the weights were trained with another computation"
            for key in differing
        ]
    return []


def _not_there(source: str) -> str:
    return (
        f"--init_from {source}: no such folder; give the folder of a model in Hugging Face's format, ORGANISATION/NAME "
        "of the hub, or a run or checkpoint of run_pretrain.py"
    )
