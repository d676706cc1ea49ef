"""What a run's folder says of the run itself: config.json has its model, command.txt every command that trained it.

transformers and `--model_config` read the config.json. A line of command.txt is a command as a shell takes it, with its
circumstances as a comment; each start of the run, one that goes on included, adds one.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

from peft_pretraining.config.run_config import RunArgs
from peft_pretraining.errors import UserError
from peft_pretraining.models.registry import WITHOUT_MODEL_TYPE
from qgalore import __version__

CONFIG_FILE, COMMAND_FILE = "config.json", "command.txt"
_TREE = Path(__file__).resolve().parents[2]
_GIT_SECONDS = 10.0


def write_run_files(args: RunArgs, model_config: Mapping[str, Any], update_step: int) -> None:
    """Write both files into the run's folder, each by a rename; update_step: the updates made before this start.

    model_config: the contents of the model's config.json.

    Raises UserError if the folder cannot be written, or has the config.json of something else.
    """
    folder = Path(args.checkpoint.save_dir)
    config = {"model_type": WITHOUT_MODEL_TYPE} | dict(model_config)
    commands, kept = folder / COMMAND_FILE, folder / CONFIG_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        earlier = commands.read_text(encoding="utf-8", errors="replace") if commands.exists() else ""
        if not _has(kept, config):
            if kept.exists() and not earlier:
                raise UserError(
                    f"--save_dir {folder}: {kept} is not of this model, nor of a run: give another --save_dir, or move "
                    "the file away"
                )
            _replace(kept, json.dumps(config, indent=2) + "\n")
        _replace(commands, f"{earlier}{command_line(args.command)}  # {_circumstances(args, update_step)}\n")
    except OSError as error:
        raise UserError(
            f"--save_dir {folder}: {error.filename or COMMAND_FILE} cannot be written ({error.strerror}); give a "
            "--save_dir on a disk with free space where you may write"
        ) from error


def _has(path: Path, config: Mapping[str, Any]) -> bool:
    """Whether a file has these values, in whatever form and beside the model_type."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return isinstance(found, dict) and {"model_type": config["model_type"]} | found == config
    return False


def command_line(arguments: Sequence[str]) -> str:
    """A training command with these arguments, as one line for a shell."""
    started, program = Path(sys.argv[0]), ["python", "run_pretrain.py"]
    if started.name == "qgalore":
        program = ["qgalore", "pretrain"]
    elif started.name == "__main__.py" and started.parent.name == "peft_pretraining":
        program = ["python", "-m", "peft_pretraining", "pretrain"]
    return " ".join(map(_quoted, [*program, *arguments]))


def _quoted(word: str) -> str:
    if word.isprintable():
        return shlex.quote(word)
    # A line break within quotes would begin another line.
    return f"$'{''.join(map(_escaped, word))}'"


def _escaped(character: str) -> str:
    """A character within $'...' of a shell; what cannot be seen as bytes of UTF-8, or as what was no UTF-8."""
    if not character.isprintable():
        return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogateescape"))
    return f"\\{character}" if character in "'\\" else character


def _circumstances(args: RunArgs, update_step: int) -> str:
    parts = [
        f"{datetime.now().astimezone():%Y-%m-%dT%H:%M:%S%z}",
        f"from update {update_step}",
        f"{args.world_size} rank(s)",
        f"qgalore {__version__}",
        f"torch {torch.__version__}",
        f"python {platform.python_version()}",
    ]
    return ", ".join([*parts, *([f"commit {found}"] if (found := commit()) else [])])


@cache
def commit() -> str:
    """The commit of the checkout that this program runs from, with `-dirty` if files differ from it; "" if none."""
    if not (_TREE / ".git").exists():
        return ""
    command = ["git", "-C", str(_TREE), "describe", "--always", "--dirty", "--abbrev=12", "--exclude", "*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_GIT_SECONDS)
    except (OSError, subprocess.SubprocessError):  # git is not there, or waits for a lock
        return ""
    return done.stdout.strip()


def _replace(path: Path, text: str) -> None:
    """Write a file by a rename, so that a crash leaves the old one or the new one."""
    temporary = path.with_name(f".tmp_{path.name}_{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
