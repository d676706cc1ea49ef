"""The manifest of a checkpoint: the names, sizes and SHA-256 of its files.

It is written last, so a directory without one was never finished. It protects itself, too: it contains a hash of its
own body, and its bytes must be exactly those that `write_manifest` writes for its contents.
"""

import hashlib
import json
import mmap
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

MANIFEST = "manifest.json"
_FORMAT = "q-galore checkpoint"
_VERSION, _VERSION_OF_PARTS = 1, 2
"""Of checkpoints that one rank wrote, and several, each a part."""
_REQUIRED = ("model.safetensors", "optimizer.safetensors", "optimizer.json", "state.json")
_OPTIONAL = ("state.safetensors",)
_OF_PART = re.compile(r"(model|optimizer)_(\d{5})\.(safetensors|json)")
_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")


class DamagedError(Exception):
    """A directory is no valid checkpoint; the text is the end of a sentence without its full stop."""


@dataclass(frozen=True)
class Manifest:
    """Sizes and hashes by file name; `aliases`: by file, names of tensors that share the memory of another."""

    update_step: int
    files: dict[str, tuple[int, str]]
    aliases: dict[str, dict[str, str]]

    def parts(self, name: str) -> list[str]:
        """The files of all ranks that hold what `name` holds where one rank wrote all; that of the first rank first."""
        found = ((match, other) for other in self.files if (match := _OF_PART.fullmatch(other)))
        return [name, *sorted(other for match, other in found if part_name(name, int(match.group(2))) == other)]


def part_name(name: str, part: int) -> str:
    """The name of a file of the part that rank number `part` wrote."""
    stem, _, ending = name.partition(".")
    return f"{stem}_{part:05d}.{ending}" if part else name


def write_manifest(
    file: BinaryIO, update_step: int, files: dict[str, tuple[int, str]], aliases: dict[str, dict[str, str]]
) -> None:
    """Write the manifest of files that are finished and synced."""
    listed = {name: {"bytes": size, "sha256": sha256} for name, (size, sha256) in files.items()}
    version = _VERSION_OF_PARTS if any(map(_OF_PART.fullmatch, files)) else _VERSION
    body = {"format": _FORMAT, "version": version, "update_step": update_step, "files": listed, "aliases": aliases}
    file.write(_encode(body))


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest alone; raises DamagedError or OSError."""
    if not folder.is_dir():
        raise DamagedError(_not_a_directory(folder))
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        raise DamagedError(
            f"it holds {', '.join(pickles)}, a pickle, which could run code on loading; "
            "only safetensors and JSON are read: give a checkpoint that run_pretrain.py wrote"
        )
    try:
        data = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise DamagedError(_no_manifest(folder)) from None
    try:
        body: dict[str, Any] = json.loads(data)
        version = body.get("version")
        if body["format"] == _FORMAT and isinstance(version, int) and version > _VERSION_OF_PARTS:
            raise DamagedError(
                f"its format has version {version}; this program reads up to {_VERSION_OF_PARTS}: update it"
            )
        del body["sha256"]
        if data != _encode(body) or body["format"] != _FORMAT:
            raise ValueError
        files = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in body["files"].items()}
        manifest = Manifest(body["update_step"], files, body["aliases"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DamagedError(f"its {MANIFEST} is damaged: take an older checkpoint") from None
    unknown = [name for name in files if name not in _REQUIRED + _OPTIONAL and not _OF_PART.fullmatch(name)]
    missing = [name for name in _REQUIRED if name not in files]
    if unknown or missing:
        raise DamagedError(f"its {MANIFEST} lists other files than a checkpoint has ({', '.join(unknown + missing)})")
    return manifest


def check_sizes(folder: Path) -> Manifest:
    """Check manifest, presence and sizes of all files; raises DamagedError or OSError."""
    manifest = read_manifest(folder)
    for name, (size, _) in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise DamagedError(f"{name} is missing: take an older checkpoint")
        if path.stat().st_size != size:
            raise DamagedError(f"{name} has {path.stat().st_size} bytes instead of {size}: take an older checkpoint")
    return manifest


def check_hashes(manifest: Manifest, contents: Mapping[str, mmap.mmap]) -> None:
    """Check the SHA-256 of every file, by its name; raises DamagedError."""
    for name, (_, sha256) in manifest.files.items():
        if hashlib.sha256(contents[name]).hexdigest() != sha256:
            raise DamagedError(f"{name} is damaged, its SHA-256 differs: take an older checkpoint")


def check_hash(folder: Path, manifest: Manifest, name: str) -> None:
    """Check the SHA-256 of one file, of which no more than a block is in memory; raises DamagedError or OSError."""
    with (folder / name).open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != manifest.files[name][1]:
            raise DamagedError(f"{name} is damaged, its SHA-256 differs: take an older checkpoint")


def _encode(body: dict[str, Any]) -> bytes:
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, indent=1, sort_keys=True).encode() + b"\n"


def _no_manifest(folder: Path) -> str:
    if any(path.is_dir() for path in folder.glob("step_*")):
        return (
            f"it holds checkpoints but is none: give one of its step_... directories, or auto with --save_dir {folder}"
        )
    return f"it has no {MANIFEST}: it was not finished, or is no checkpoint of run_pretrain.py"


def _not_a_directory(folder: Path) -> str:
    if not folder.exists():
        return "there is no such directory: give a step_... directory, or auto for the newest in --save_dir"
    if folder.suffix in _PICKLES:
        return (
            "it is a pickle, which could run code on loading; "
            "only directories of safetensors and JSON that run_pretrain.py wrote are read"
        )
    return "it is a file: give a step_... directory that run_pretrain.py wrote"
