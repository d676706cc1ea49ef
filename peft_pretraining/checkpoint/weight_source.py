"""The weights that `--init_from` names: a model in Hugging Face's format, here or on the hub, or a checkpoint of ours.

Opening a source reads the headers of its files alone. A tensor is read when it is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_pretraining.checkpoint.folder import list_checkpoints
from peft_pretraining.checkpoint.manifest import MANIFEST, DamagedError, check_hash, check_sizes
from peft_pretraining.checkpoint.store import MODEL, with_todays_names
from peft_pretraining.checkpoint.tensor_file import StoredTensor, stored_tensors
from peft_pretraining.checkpoint.weight_files import find_weight_files, in_folder, read_headers, what_else_is_there
from peft_pretraining.errors import UserError
from peft_pretraining.models.config_source import CONFIG, IN_STATE, STATE
from peft_pretraining.models.hub_files import commit_of, hub_file, is_hub_name
from qgalore.layer.quantization import QuantizedTensor, row_bytes

_PARTS = ("_qdata", "_scale", "_zero_point", "_format")


@dataclass(frozen=True)
class WeightSource:
    """Named weights, floats or codes with their scales."""

    name: str
    """As `--init_from` has it."""
    words: str
    """What it is, for the run's first lines: the path or name, and what stands for its version."""
    stored: Mapping[str, StoredTensor]
    """By the names of a state dict."""
    tied: bool = False
    """Whether its model has one tensor for embeddings and head."""
    commit: str = ""
    """Of the hub."""
    format: tuple[int, int] = (8, 256)
    """Bits and group size of codes, where old checkpoints do not have them beside the codes."""
    parts: frozenset[str] = field(default_factory=frozenset)
    """Names of `stored` that are codes, or belong to some."""

    @property
    def names(self) -> list[str]:
        """The names of the weights, however they are stored."""
        of_codes = [name.removesuffix(_PARTS[0]) for name in self.parts if name.endswith(_PARTS[0])]
        return list(dict.fromkeys([*(name for name in self.stored if name not in self.parts), *of_codes]))

    def is_quantized(self, name: str) -> bool:
        """Whether there are codes of this weight."""
        return f"{name}{_PARTS[0]}" in self.parts

    def renamed(self, prefix: str) -> WeightSource:
        """The same with `prefix` before each name."""
        stored = {f"{prefix}{name}": tensor for name, tensor in self.stored.items()}
        return _with_parts(self, stored)

    def read(self, name: str) -> Tensor:
        """A float weight on the CPU. Raises UserError."""
        try:
            return self.stored[name].read()
        except (OSError, ValueError) as error:
            raise UserError(f"--init_from {self.name}: {name} cannot be read ({error}).") from error

    def read_codes(self, name: str, columns: int) -> QuantizedTensor:
        """A quantized weight (rows, columns) on the CPU. Raises UserError, also for another number of columns."""
        codes, scale, zero_point = (self.read(f"{name}{part}") for part in _PARTS[:3])
        stated = f"{name}{_PARTS[3]}" in self.stored
        bits, group_size = self.read(f"{name}{_PARTS[3]}").tolist() if stated else self.format
        groups = (codes.shape[0], -(-columns // group_size))
        if codes.shape[1] != row_bytes(columns, bits) or scale.shape != groups or zero_point.shape != groups:
            raise UserError(
                f"--init_from {self.name}: the codes of {name} are {' x '.join(map(str, codes.shape))} bytes with "
                f"{' x '.join(map(str, scale.shape))} scales, which is no matrix of {columns} columns in {bits} bits "
                f"and groups of {group_size}."
            )
        return QuantizedTensor(codes, scale, zero_point, columns, bits, group_size)


def open_source(name: str, commit: str = "", check: bool = True) -> WeightSource:
    """Open the weights that `--init_from` names; raises UserError.

    commit: of the hub, "" for the newest. check: compare the hash of a checkpoint of ours, which one rank may do for
    all.
    """
    folder = Path(name)
    try:
        if folder.is_dir():
            steps = [folder] if (folder / MANIFEST).is_file() else list_checkpoints(folder)
            return _checkpoint(name, steps[-1], check) if steps else _model_in(name, folder)
        if is_hub_name(name):
            return _model_on_hub(name, commit)
    except (ValueError, DamagedError) as error:
        raise UserError(f"--init_from {name}: {error}.") from error
    except OSError as error:
        raise UserError(f"--init_from {name}: cannot be read ({error.strerror or error}).") from error
    what = "it is a file: give the folder that it is in" if folder.is_file() else "no such folder"
    raise UserError(
        f"--init_from {name}: {what}; it takes the folder of a model in Hugging Face's format, ORGANISATION/NAME of "
        "the hub, or a run or checkpoint of run_pretrain.py."
    )


def _model_in(name: str, folder: Path) -> WeightSource:
    files = find_weight_files(lambda file: in_folder(folder, file))
    if not files:
        raise ValueError(what_else_is_there(folder))
    return _hugging_face(name, name, files, folder / CONFIG)


def _model_on_hub(name: str, commit: str) -> WeightSource:
    config = hub_file(name, CONFIG, "--init_from", commit)
    if config is not None:
        commit = commit_of(config, CONFIG)  # all files are of one commit, on all ranks
    files = find_weight_files(lambda file: hub_file(name, file, "--init_from", commit))
    if not files:
        raise ValueError("on the hub it has no model.safetensors and no pytorch_model.bin, or the hub is out of reach")
    source = _hugging_face(name, f"{name} at commit {commit or 'unknown'}", files, config)
    return _with_parts(source, source.stored, commit=commit)


def _hugging_face(name: str, words: str, files: list[Path], config: Path | None) -> WeightSource:
    stored, raw = read_headers(files), dict[str, Any]()
    if config is not None and config.is_file():
        raw = json.loads(config.read_text(encoding="utf-8"))
    source = WeightSource(name, words, {}, tied=bool(raw.get("tie_word_embeddings")))
    return _with_parts(source, stored)


def _checkpoint(name: str, step: Path, check: bool) -> WeightSource:
    manifest = check_sizes(step)
    stored: dict[str, StoredTensor] = {}
    for file in manifest.parts(MODEL):
        if check:
            check_hash(step, manifest, file)
        found = stored_tensors(step / file)
        aliases = manifest.aliases.get(file, {})
        found |= {alias: found[original] for alias, original in aliases.items()}
        stored |= {name: x if name not in stored else _with_rows(stored[name], x) for name, x in found.items()}
    state = json.loads((step / STATE).read_text(encoding="utf-8"))
    if (method := state.get("method", "full")) != "full":
        raise UserError(
            f"it is a run of --method {method}, whose matrices are in parts; write it as a plain model first "
            f"(qgalore export {name} FOLDER --dtype float32) and give that folder"
        )
    raw = state.get(IN_STATE) or {}
    # Codes of a whole row are in one group of at least as many values as it has.
    format = (
        state.get("weight_bits", 8),
        1 << 30 if state.get("int8_products") else state.get("weight_group_size", 256),
    )
    source = WeightSource(
        name, f"{step} ({manifest.update_step:,} updates)", {}, bool(raw.get("tie_word_embeddings")), format=format
    )
    return _with_parts(source, with_todays_names(stored))  # type: ignore[arg-type]


def _with_rows(before: StoredTensor, rows: StoredTensor) -> StoredTensor:
    """A tensor of which ranks before this one have stored the rows `before`."""
    shape = (before.shape[0] + rows.shape[0], *before.shape[1:])
    return StoredTensor(before.dtype, shape, lambda: torch.cat([before.read(), rows.read()]))


def _with_parts(source: WeightSource, stored: Mapping[str, StoredTensor], commit: str = "") -> WeightSource:
    starts = [name.removesuffix(_PARTS[0]) for name in stored if name.endswith(_PARTS[0])]
    parts = frozenset(f"{start}{part}" for start in starts for part in _PARTS if f"{start}{part}" in stored)
    return WeightSource(source.name, source.words, stored, source.tied, commit or source.commit, source.format, parts)
