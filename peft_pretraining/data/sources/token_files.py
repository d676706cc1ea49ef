"""`--dataset` with token ids: memory-mapped files of little-endian uint16 or uint32.

The type of the ids is given by a sidecar `<file>.json` with a field dtype (`qgalore tokenize` writes one),
else by a suffix .uint16 or .uint32. A folder has files train* and validation*. For a single file the validation set is
the file beside it with "validation" instead of "train" in its name; without one, the last hundredth of the file (at
most 10 M ids) is held out.

A token file has one of these suffixes, or .bin, or a sidecar with a dtype. In a folder with text a .bin alone does not
count: it may be anything, such as the training_args.bin of a model. A sidecar is checked against its file: another
length, and a type that the ids cannot have, are errors.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from peft_pretraining.data.sources.kind import SourceOptions, TokenKind
from peft_pretraining.data.sources.local import is_data
from peft_pretraining.data.sources.log_once import log_once
from peft_pretraining.data.sources.mapped_tokens import TokenFile, TokenFiles
from peft_pretraining.data.sources.split_names import has_word
from peft_pretraining.errors import UserError

SUFFIXES = (".bin", ".uint16", ".uint32")
_FEWEST_CHECKED, _CHECKED = 64, 1 << 16  # ids by which the type is checked
_HELD_OUT_FRACTION = 100
_HELD_OUT_LIMIT = 10_000_000


class TokenFilesKind(TokenKind):
    """Token ids in a file, or in a folder with train* files."""

    in_words = "a file or folder of little-endian uint16 or uint32 token ids"
    precedence = 1  # before kinds that take any folder

    def recognises(self, dataset: str) -> bool:
        """Whether it is a file of ids or a folder with some; beside text their type has to be known."""
        path = Path(dataset).expanduser()
        if not path.is_dir():
            return _is_token_file(path)
        try:
            named = [file for split in ("train", "validation") for file in _split_files(path, split)]
            if any(map(_has_a_type, named)):
                return True
            return bool(named or _unnamed_files(path)) and not _texts(path)
        except OSError:
            return False  # the kind that takes any folder reports the error

    def open(self, dataset: str, split: str, options: SourceOptions) -> TokenFiles:
        """See `DatasetKind.open`."""
        return open_token_files(dataset, split)


KIND = TokenFilesKind()


def open_token_files(dataset: str, split: str) -> TokenFiles:
    """Open the token files of split "train" or "validation". Raises UserError."""
    path = Path(dataset).expanduser()
    if path.is_dir():
        paths = _split_files(path, split)
        if not paths:
            there = _unnamed_files(path) or _split_files(path, "train") or _split_files(path, "validation")
            raise UserError(
                f"--dataset {dataset}: it has no file {split}* with one of the suffixes {' '.join(SUFFIXES)}, but "
                f"{', '.join(file.name for file in there[:3])}{' ...' * (len(there) > 3)}: name the files to train on "
                "train* and those to evaluate on validation*, such as train-0.uint16 and validation.uint16; or give a "
                "single file, the end of which is held out."
            )
        if texts := _texts(path):
            log_once(f"--dataset {dataset}: its token ids are read, and its text, such as {texts[0].name}, is left out")
        return TokenFiles(dataset, tuple(_open(file) for file in paths))
    validation = path.with_name(path.name.replace("train", "validation"))
    beside = validation != path and validation.is_file()
    if split == "validation" and beside:
        return TokenFiles(dataset, (_open(validation),))
    whole = _open(path)
    held_out = 0 if beside else min(len(whole.ids) // _HELD_OUT_FRACTION, _HELD_OUT_LIMIT)
    cut = len(whole.ids) - held_out
    part = whole.ids[:cut] if split == "train" else whole.ids[cut:]
    if not len(part):
        raise UserError(
            f"--dataset {dataset}: {len(whole.ids)} ids are too few to hold out a validation set; put a validation "
            "file beside it."
        )
    return TokenFiles(dataset, (TokenFile(path, part, whole.settings, 0 if split == "train" else cut),))


def _split_files(folder: Path, split: str) -> list[Path]:
    """The files of a split in a folder; a .bin of unknown type only if the split is a whole word of its name."""
    named = sorted(path for path in folder.glob(f"{split}*") if _is_token_file(path))
    return [path for path in named if _has_a_type(path) or has_word(path.name, split)]


def _unnamed_files(folder: Path) -> list[Path]:
    """The token files in a folder whose names do not begin with a split."""
    splits = ("train", "validation")
    files = (path for path in sorted(folder.iterdir()) if not path.name.startswith((".", *splits)))
    return [path for path in files if _is_token_file(path) and _has_a_type(path)]


def _texts(folder: Path) -> list[Path]:
    """The files of text directly in a folder."""
    return [path for path in sorted(folder.iterdir()) if is_data(path) and not _names_a_dtype(_sidecar_of(path))]


def _is_token_file(path: Path) -> bool:
    return path.is_file() and (path.suffix in SUFFIXES or _names_a_dtype(_sidecar_of(path)))


def _has_a_type(path: Path) -> bool:
    return path.suffix in SUFFIXES[1:] or _names_a_dtype(_sidecar_of(path))


def _sidecar_of(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _names_a_dtype(sidecar: Path) -> bool:
    try:
        return isinstance(json.loads(sidecar.read_text(encoding="utf-8")).get("dtype"), str)
    except (OSError, ValueError, AttributeError):
        return False


def _open(path: Path) -> TokenFile:
    settings = _read_sidecar(path)
    sidecar = _sidecar_of(path).name
    name = settings.get("dtype", path.suffix.removeprefix("."))
    if "dtype" in settings and name not in ("uint16", "uint32"):
        raise UserError(
            f"--dataset {path}: {sidecar} says that its ids are of the type {name!r}, they must be uint16 or uint32"
        )
    if name not in ("uint16", "uint32"):
        raise UserError(
            f"--dataset {path}: the type of its ids is unknown. Name it .uint16 or .uint32, or put a {sidecar} beside "
            'it that says {"dtype": "uint16"}.'
        )
    dtype = np.dtype(name).newbyteorder("<")
    try:
        size = path.stat().st_size
        if size == 0 or size % dtype.itemsize:
            raise UserError(
                f"--dataset {path}: its {size} bytes are no whole number of {name} ids: it is empty, cut off or of "
                "another type."
            )
        ids = np.memmap(path, dtype, mode="r")
    except OSError as error:
        raise UserError(f"--dataset: {path} cannot be read ({error.strerror}).") from error
    halves = ids[: 2 * (_CHECKED // 2)]
    if name == "uint16" and len(halves) >= _FEWEST_CHECKED and halves[::2].any() and not halves[1::2].any():
        raise UserError(
            f"--dataset {path}: every second id is 0, so its ids are uint32 and not uint16: correct "
            f"{sidecar if settings else 'its name'}."
        )
    _check_sidecar(path, name, len(ids), settings)
    return TokenFile(path, ids, settings)


def _read_sidecar(path: Path) -> dict[str, Any]:
    """The contents of the sidecar; {} without one. Raises UserError."""
    sidecar = _sidecar_of(path)
    if not sidecar.is_file():
        return {}
    try:
        settings = json.loads(sidecar.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"--dataset: {sidecar} is not a JSON object ({error}).") from error
    if not isinstance(settings, dict):
        raise UserError(f"--dataset: {sidecar} is not a JSON object, but a {type(settings).__name__}.")
    for field in ("vocab_size", "tokens"):
        value = settings.get(field)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UserError(f"--dataset: {sidecar} has {field} {value!r}, which must be a positive whole number.")
    return {field: value for field, value in settings.items() if value is not None}


def _check_sidecar(path: Path, dtype: str, ids: int, settings: dict[str, Any]) -> None:
    """Check a sidecar against its file; raises UserError."""
    sidecar, tokens = _sidecar_of(path).name, settings.get("tokens", ids)
    if ids != tokens:
        fault = "cut off" if ids < tokens else "longer"
        raise UserError(
            f"--dataset {path}: it holds {ids} ids of {dtype}, but {sidecar} says {tokens}: it is {fault}, of another "
            "type, or the sidecar belongs to another file. Copy both again, or tokenize the text again."
        )
    if dtype == "uint16" and settings.get("vocab_size", 0) > 1 << 16:
        raise UserError(
            f"--dataset {path}: {sidecar} says that its ids are uint16, which cannot hold a vocabulary of "
            f"{settings['vocab_size']} ids: the dtype must be uint32, or the vocabulary is another."
        )
