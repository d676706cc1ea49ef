"""`--dataset` of token ids: files of little-endian uint16 or uint32 that are mapped into memory, not read.

The type of the ids comes from a sidecar `<file>.json` with a field dtype (scripts/tokenize_dataset.py writes one), else
from a suffix .uint16 or .uint32. A folder has files train* and validation*. Of a single file the validation set is the
file beside it with "validation" for "train" in its name; without one, the last hundredth of the file (at most 10 M ids)
is held out.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from peft_pretraining.data.sources.kind import SourceOptions, TokenKind
from peft_pretraining.data.sources.mapped_tokens import TokenFile, TokenFiles
from peft_pretraining.errors import UserError

SUFFIXES = (".bin", ".uint16", ".uint32")
_HELD_OUT_FRACTION = 100
_HELD_OUT_LIMIT = 10_000_000


class TokenFilesKind(TokenKind):
    """A file, or a folder with train* token files."""

    in_words = "a file or folder of little-endian uint16 or uint32 token ids"
    precedence = 1  # any file that no other kind recognises

    def recognises(self, dataset: str) -> bool:
        """Any file, and a folder that holds files of ids."""
        path = Path(dataset).expanduser()
        if not path.is_dir():
            return path.is_file()
        return bool(_split_files(path, "train") or _split_files(path, "validation"))

    def open(self, dataset: str, split: str, options: SourceOptions) -> TokenFiles:
        """See `DatasetKind.open`."""
        return open_token_files(dataset, split)


KIND = TokenFilesKind()


def open_token_files(dataset: str, split: str) -> TokenFiles:
    """The token files of split "train" or "validation". Raises UserError."""
    path = Path(dataset).expanduser()
    if path.is_dir():
        paths = _split_files(path, split)
        if not paths:
            raise UserError(
                f"--dataset {dataset}: it has no file {split}* with one of the suffixes {' '.join(SUFFIXES)}."
            )
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
    return TokenFiles(dataset, (TokenFile(path, part, whole.settings),))


def _split_files(folder: Path, split: str) -> list[Path]:
    return sorted(path for path in folder.glob(f"{split}*") if path.suffix in SUFFIXES)


def _open(path: Path) -> TokenFile:
    sidecar = path.with_name(path.name + ".json")
    settings: dict[str, Any] = {}
    if sidecar.is_file():
        try:
            settings = dict(json.loads(sidecar.read_text(encoding="utf-8")))
        except (ValueError, TypeError, OSError) as error:
            raise UserError(f"--dataset: {sidecar} is not a JSON object ({error}).") from error
    name = settings.get("dtype", path.suffix.removeprefix("."))
    if name not in ("uint16", "uint32"):
        raise UserError(
            f"--dataset {path}: the type of its ids is unknown. Name it .uint16 or .uint32, or put a {sidecar.name} "
            "beside it "
            'that says {"dtype": "uint16"}.'
        )
    dtype = np.dtype(name).newbyteorder("<")
    try:
        size = path.stat().st_size
        if size == 0 or size % dtype.itemsize:
            raise UserError(
                f"--dataset {path}: its {size} bytes are no whole number of {name} ids: it is empty, cut off or of "
                "another type."
            )
        return TokenFile(path, np.memmap(path, dtype, mode="r"), settings)
    except OSError as error:
        raise UserError(f"--dataset: {path} cannot be read ({error.strerror}).") from error
