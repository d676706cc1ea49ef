"""The files of a model's weights in Hugging Face's format: safetensors or a pickle, one or shards with an index."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from peft_pretraining.checkpoint.tensor_file import StoredTensor, stored_tensors

_STEMS = ("model.safetensors", "pytorch_model.bin")
"""In the order in which they are looked for, each also as shards with `.index.json` behind the name."""
_OTHERS = {
    "adapter_model.safetensors": "an adapter, and not a whole model: merge it into its base model first",
    "adapter_model.bin": "an adapter, and not a whole model: merge it into its base model first",
    "consolidated.00.pth": "Meta's own format: take the same model in Hugging Face's format",
}


def find_weight_files(get: Callable[[str], Path | None]) -> list[Path]:
    """The files that hold a model's weights; get: gives the path of a file of the model by its name, None without it.

    Empty where there are none. Raises ValueError, whose text is the end of a sentence, for an index without its shards.
    """
    for stem in _STEMS:
        if (path := get(stem)) is not None:
            return [path]
        if (index := get(f"{stem}.index.json")) is not None:
            return _shards(index, get)
    return []


def _shards(index: Path, get: Callable[[str], Path | None]) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index.name} is no index of shards: it has no weight_map of names and files") from None
    outside = [
        name for name in names if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts
    ]
    if outside:
        raise ValueError(f"{index.name} names {outside[0]!r}, which is not in its folder")
    found = {name: get(name) for name in names}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        raise ValueError(f"{index.name} names {', '.join(missing[:3])}, which is missing: fetch it, too")
    return [path for path in found.values() if path is not None]


def what_else_is_there(folder: Path) -> str:
    """What a folder without weights holds, for a sentence that begins with the folder: "holds ..."."""
    for name, what in _OTHERS.items():
        if (folder / name).is_file():
            return f"holds {name}, {what}"
    names = sorted(path.name for path in folder.iterdir())
    listed = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return f"holds {listed or 'nothing'}: there is no {' or '.join(_STEMS)}, nor an index of such"


def read_headers(files: list[Path]) -> dict[str, StoredTensor]:
    """What is stored in the files, by name; a tensor is read when it is asked for.

    A pickle is only read for tensors (PyTorch's weights_only), and mapped into memory, so that its pages are the
    system's to take back. Raises ValueError, whose text is the end of a sentence.
    """
    stored: dict[str, StoredTensor] = {}
    for file in files:
        stored |= stored_tensors(file) if file.suffix == ".safetensors" else _in_pickle(file)
    return stored


def _in_pickle(file: Path) -> dict[str, StoredTensor]:
    try:
        try:
            contents = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before PyTorch 1.6, or no such file at all
            contents = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no pickle raise whatever they happen to mean
        raise ValueError(
            f"{file.name} is not read: it is cut off, or has more in it than tensors, and that could run code; save "
            "the model as safetensors"
        ) from error
    if not isinstance(contents, dict) or not all(isinstance(value, Tensor) for value in contents.values()):
        raise ValueError(f"{file.name} is no dict of tensors by name, as save_pretrained writes it")
    return {
        name: StoredTensor(tensor.dtype, tuple(tensor.shape), partial(_itself, tensor))
        for name, tensor in contents.items()
    }


def _itself(tensor: Tensor) -> Tensor:
    return tensor.detach()


def in_folder(folder: Path, name: str) -> Path | None:
    """A file of a folder, for `find_weight_files`."""
    path = folder / name
    return path if path.is_file() else None
