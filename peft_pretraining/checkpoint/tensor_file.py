"""Trees of tensors and plain values on disk: one safetensors file for the tensors, JSON for everything else.

A training state consists of nested dicts, lists, tuples, numbers, strings and tensors. `split_tree` takes the tensors
out, so that JSON can represent the rest exactly, and `join_tree` puts them back: types, integer keys, tuples and
non-finite floats are kept. Loading runs no code, unlike with a pickle.

The safetensors file is written here, tensor by tensor: the library's own writer copies all tensors into memory first,
which is too much for a 7B state on a small machine, and here the hash is taken while writing. It is read here, too, so
that the bytes that are hashed and those that are loaded are the same, read once.
Format: https://github.com/huggingface/safetensors (8 bytes length, JSON header, data).
"""

import hashlib
import json
import math
import mmap
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}
_CHUNK_BYTES = 1 << 24


class HashingFile:
    """A binary file that counts and hashes (SHA-256) everything written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`."""
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    @property
    def sha256(self) -> str:
        """The hash so far, in hexadecimal."""
        return self._hash.hexdigest()


def map_file(path: Path) -> mmap.mmap:
    """Map a file into memory, copy-on-write: pages are read on first access, and the file is never changed."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def write_tensors(file: HashingFile, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file; at most one tensor at a time is copied to the CPU."""
    # Wide types first: so every tensor is aligned to its element size, which readers that map the file need.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, dict[str, object]] = {}
    offset = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _DTYPE_NAMES or tensor.layout is not torch.strided:
            raise TypeError(f"tensor {name} is {tensor.dtype}, {tensor.layout}: safetensors has no such type")
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        flat = tensors[name].detach().to("cpu").contiguous().reshape(-1)
        if flat.numel():
            data = flat.view(torch.uint8).numpy().data
            for start in range(0, len(data), _CHUNK_BYTES):
                file.write(data[start : start + _CHUNK_BYTES])


def tensors_in(content: mmap.mmap) -> dict[str, Tensor]:
    """All tensors of a mapped safetensors file, as views of that memory; raises ValueError or KeyError."""
    data = 8 + int.from_bytes(content[:8], "little")
    tensors = {}
    for name, entry in json.loads(content[8:data]).items():
        dtype, shape, (start, end) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        count = math.prod(shape)
        if end - start != count * dtype.itemsize or not 0 <= start <= end <= len(content) - data:
            raise ValueError(f"the bytes of {name} are not those of its shape")
        if count:
            tensors[name] = torch.frombuffer(content, dtype=dtype, count=count, offset=data + start).view(shape)
        else:
            tensors[name] = torch.empty(shape, dtype=dtype)
    return tensors


class StoredTensor(NamedTuple):
    """A tensor in a file: what is known of it without reading it, and how to read it."""

    dtype: torch.dtype | str
    """The file's own name of one that PyTorch does not have."""
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    """Gives it on the CPU, in memory of its own or of the file's; raises ValueError or OSError."""


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name, each read when it is asked for, into memory that nothing else holds.

    Raises ValueError, whose text is the end of a sentence, for another file and for one that was cut off.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        data = 8 + int.from_bytes(file.read(8), "little")
        try:
            if not 8 < data <= size:
                raise ValueError
            header = json.loads(file.read(data - 8))
            header.pop("__metadata__", None)
            entries = {
                name: (entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"]) for name, entry in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(_no_tensors(path)) from None
    stored = {}
    for name, (kind, shape, start, end) in entries.items():
        dtype = _DTYPES.get(kind, kind)
        if data + end > size:
            raise ValueError(f"{path.name} is cut off: {name} ends at byte {data + end:,} of {size:,}; fetch it again")
        if isinstance(dtype, torch.dtype) and end - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{path.name} is damaged: the bytes of {name} are not those of its shape")
        stored[name] = StoredTensor(dtype, shape, partial(_read_bytes, path, data + start, end - start, dtype, shape))
    return stored


def _read_bytes(path: Path, start: int, count: int, dtype: torch.dtype | str, shape: tuple[int, ...]) -> Tensor:
    if isinstance(dtype, str):
        raise ValueError(f"{path.name} has a tensor of type {dtype}, which PyTorch does not have")
    raw = torch.empty(count, dtype=torch.uint8)
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        left = raw.numpy().data
        while len(left):
            got = file.readinto(left[: _CHUNK_BYTES * 4])
            if not got:
                raise ValueError(f"{path.name} is cut off: it was longer when its header was read")
            left = left[got:]
    return raw.view(dtype).view(shape)


def _no_tensors(path: Path) -> str:
    with path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            return f"{path.name} is a pointer of Git LFS: fetch the file itself with git lfs pull"
    return f"{path.name} is no safetensors file, or is cut off: fetch it again"


def split_tree(tree: object, tensors: dict[str, Tensor], at: str = "") -> Any:
    """Move the tensors of `tree` into `tensors`, named by their path in it, and return the JSON-able rest.

    Raises TypeError, naming the path, for anything but dict, list, tuple, str, int, float, bool, None and Tensor.
    """
    if tree is None or isinstance(tree, bool | str):
        return tree
    if type(tree) is int or (type(tree) is float and math.isfinite(tree)):
        return tree
    if type(tree) is float:
        return {"$float": repr(tree)}
    if isinstance(tree, Tensor):
        name = at or "tensor"
        while name in tensors:  # as for the keys 1 and "1" of one dict
            name += "'"
        tensors[name] = tree.detach()
        return {"$tensor": name}
    if type(tree) is list or type(tree) is tuple:
        items = [split_tree(item, tensors, f"{at}/{index}" if at else str(index)) for index, item in enumerate(tree)]
        return items if type(tree) is list else {"$tuple": items}
    if isinstance(tree, dict):
        pairs = [(key, split_tree(value, tensors, f"{at}/{key}" if at else str(key))) for key, value in tree.items()]
        if all(isinstance(key, str) and not key.startswith("$") for key in tree):
            return dict(pairs)
        return {"$dict": [[split_tree(key, {}, f"{at} key"), value] for key, value in pairs]}
    raise TypeError(f"{at or 'the state'} is a {type(tree).__name__}: a checkpoint holds tensors and plain values only")


def join_tree(rest: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `split_tree`; raises ValueError or KeyError if the two parts do not belong together."""
    if isinstance(rest, list):
        return [join_tree(item, tensors) for item in rest]
    if not isinstance(rest, dict):
        return rest
    mark: str = next(iter(rest)) if len(rest) == 1 else ""
    value: Any = rest.get(mark)
    if mark == "$float":
        return float(value)
    if mark == "$tensor":
        return tensors[value]
    if mark == "$tuple":
        return tuple(join_tree(item, tensors) for item in value)
    if mark == "$dict":
        return {join_tree(key, tensors): join_tree(item, tensors) for key, item in value}
    if mark.startswith("$"):
        raise ValueError(f"unknown mark {mark}")
    return {key: join_tree(item, tensors) for key, item in rest.items()}
