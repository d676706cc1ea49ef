"""The pretrained model and tokenizer of a fine-tuning, from a folder or the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from peft_pretraining.errors import UserError


def load_tokenizer(init_from: str, max_length: int) -> Any:
    """The tokenizer of a pretrained model. Raises UserError."""
    from transformers import AutoTokenizer

    tokenizer = _load(AutoTokenizer, init_from, "tokenizer")
    longest = int(min(tokenizer.model_max_length, 10**9))
    if max_length > longest:
        raise UserError(f"--max_length {max_length}: the tokenizer of {init_from} gives at most {longest} tokens")
    return tokenizer


def load_model(head: str, init_from: str, dtype: torch.dtype, tokenizer: Any, **options: Any) -> Any:
    """A pretrained model with a head of transformers such as "AutoModelForCausalLM". Raises UserError.

    A classifier is new, from torch's generator, unless the pretrained model has one of as many labels. options: of its
    configuration, such as num_labels.
    """
    import transformers

    options |= {"dtype": dtype, "ignore_mismatched_sizes": True, "output_loading_info": True}
    model, loaded = _load(getattr(transformers, head), init_from, "model", **options)
    other = sorted(key[0] for key in loaded["mismatched_keys"])
    if wrong := [key for key in other if "num_labels" not in options or key.startswith(f"{model.base_model_prefix}.")]:
        raise UserError(
            f"--init_from {init_from}: its config.json and its weights are of two models: {wrong[0]} has another shape"
            + (f", and {len(wrong) - 1} more" if len(wrong) > 1 else "")
        )
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise UserError(
            f"--init_from {init_from}: its tokenizer has {len(tokenizer)} tokens and its model {rows} embeddings; they "
            "do not belong to each other"
        )
    if tokenizer.pad_token_id is not None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model


def check_length(model: Any, max_length: int) -> None:
    """Raise UserError for sequences that are longer than the positions of a model."""
    config = model.config
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return
    if "roberta" in config.model_type:  # whose positions begin after that of padding
        positions -= config.pad_token_id + 1
    if max_length > positions:
        raise UserError(f"--max_length {max_length}: the model has positions for {positions} tokens")


def _load(auto: Any, init_from: str, what: str, **options: Any) -> Any:
    path = Path(init_from).expanduser()
    if init_from.startswith(("/", ".", "~")) and not path.is_dir():
        raise UserError(f"--init_from {init_from}: there is no such folder")
    try:
        return auto.from_pretrained(str(path) if path.is_dir() else init_from, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"--init_from {init_from}: there is no {what} that transformers can load ({reason}); give a folder with "
            "config.json, weights and tokenizer, or a name on the hub while it can be reached"
        ) from error
