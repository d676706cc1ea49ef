"""The tokenizer that belongs to a model or a run: ids and losses of another one mean something else."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

from peft_pretraining.data.sources.kind import TextKind
from peft_pretraining.data.sources.registry import find_kind
from peft_pretraining.data.tokenizer import kept_tokenizers
from peft_pretraining.errors import UserError
from peft_pretraining.models.config_source import STATE, config_in
from peft_pretraining.models.hub_files import is_hub_name

_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json")


def tokenizer_of_source(init_from: str) -> str:
    """What --tokenizer would name it by, whose default it is beside --init_from; "" where the source has none.

    Raises UserError for a source that is gone, whose tokenizer a run that goes on would lose.
    """
    folder = Path(init_from)
    if not folder.is_dir():
        if is_hub_name(init_from):
            return init_from
        raise UserError(
            f"--init_from {init_from} is not there, and its tokenizer is the default of --tokenizer: give --tokenizer."
        )
    config = config_in(folder)
    if config is None or config.name != STATE:
        return init_from if any((folder / name).is_file() for name in _FILES) else ""
    run = config.parent.parent
    trained = [path for path in kept_tokenizers(str(run), "") if path.is_file()]
    return str(trained[0]) if trained else _of_flags(json.loads(config.read_text(encoding="utf-8")))


def tokenizer_of_run(folder: Path) -> str:
    """What --tokenizer would name that of a run by; "" where it is not known: of token ids, or without a checkpoint."""
    try:
        return tokenizer_of_source(str(folder)) if config_in(folder) else ""
    except (OSError, ValueError):  # damaged, or its source is gone
        return ""


def fingerprint(tokenizer: str) -> str:
    """What tells the tokenizer that --tokenizer names so from another: the hash of its file, or its name on the hub."""
    path = Path(tokenizer)
    with contextlib.suppress(OSError):
        files = [path / name for name in _FILES if (path / name).is_file()] if path.is_dir() else [path]
        if files and files[0].is_file():
            return hashlib.sha256(files[0].read_bytes()).hexdigest()
    return tokenizer


def _of_flags(flags: dict[str, Any]) -> str:
    """The tokenizer of a run with these flags."""
    if flags.get("tokenizer"):
        return str(flags["tokenizer"])
    if flags.get("init_from"):
        return tokenizer_of_source(str(flags["init_from"]))
    kind = find_kind(str(flags.get("dataset", "c4")))
    default = kind.default_tokenizer if isinstance(kind, TextKind) else ""
    return default if isinstance(default, str) else ""
