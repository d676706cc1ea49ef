"""Atomic checkpoints: safetensors and JSON in a directory that is published by one rename.

    <save_dir>/step_00001000/
        model.safetensors       weights: codes, scales and zero points where they are quantized
        optimizer.safetensors   projections and moments; the rest of the optimizer's state is in optimizer.json
        state.json              schedule, data, arguments, ids (tensors among them: state.safetensors)
        manifest.json           size and SHA-256 of each of the above, and of itself

Saving writes a temporary directory beside the target, syncs each file, writes the manifest last, syncs the directory,
renames it and syncs the parent. So a crash at any moment leaves the older checkpoints and at most a temporary
directory, which the next save removes. Loading checks every size and hash first and never unpickles.

Where states are dealt to several ranks, each writes those of the weights that it owns, and these weights, at the same
time: rank 1 model_00001.safetensors, optimizer_00001.safetensors and optimizer_00001.json, and so on. Rank 0 has the
rest, and publishes the folder when the files of all are there and synced. What several files have by the same name are
rows that follow each other. Read by any number of ranks, such a checkpoint is what one rank would have written.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import torch
from torch import Tensor

from peft_pretraining.checkpoint.folder import (
    checkpoint_path,
    list_checkpoints,
    prune,
    put_in_place,
    remove_leftovers,
    set_aside_later,
    step_of,
    sync_directory,
    temporary_path,
)
from peft_pretraining.checkpoint.manifest import (
    MANIFEST,
    DamagedError,
    check_hashes,
    check_sizes,
    part_name,
    read_manifest,
    write_manifest,
)
from peft_pretraining.checkpoint.recorded_flags import differing_keys
from peft_pretraining.checkpoint.tensor_file import (
    HashingFile,
    join_tree,
    map_file,
    split_tree,
    tensors_in,
    write_tensors,
)
from peft_pretraining.errors import UserError

__all__ = [
    "MODEL",
    "Checkpoint",
    "Part",
    "Unfinished",
    "check_compatible",
    "check_model_tensors",
    "list_checkpoints",
    "load_checkpoint",
    "load_newest_checkpoint",
    "save_checkpoint",
    "set_aside_later",
    "with_todays_names",
]

MODEL = "model.safetensors"

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: the arguments of `save_checkpoint`, and its path."""

    model_tensors: dict[str, Tensor]
    optimizer_state: dict[str, Any]
    state: dict[str, Any]
    path: Path
    update_step: int


class Part(NamedTuple):
    """What one rank has written of a checkpoint."""

    files: dict[str, tuple[int, str]]
    """Size and SHA-256 by name."""
    aliases: dict[str, dict[str, str]]
    """By file, names of tensors that share the memory of another."""


class Unfinished(NamedTuple):
    """A checkpoint that is being written, by one rank or several that see the same file system."""

    temporary: Path
    """The folder of its files, until they are all there."""
    target: Path

    @classmethod
    def begin(cls, save_dir: str | Path, update_step: int) -> Unfinished:
        """Make the folder in which all ranks write; one of them does so. Raises UserError."""
        folder = Path(save_dir)
        target = checkpoint_path(folder, update_step)
        unfinished = cls(temporary_path(target), target)
        with unfinished._in_a_sentence():
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder)
            unfinished.temporary.mkdir()
        return unfinished

    def write(
        self,
        number: int,
        model_tensors: Mapping[str, Tensor],
        optimizer_state: Mapping[str, Any],
        state: Mapping[str, Any] | None,
    ) -> Part:
        """Write and sync the files of part `number`: 0 is the one that has a `state`. Raises UserError.

        Then note what was written in a file beside them, for `noted_parts`.
        """
        with self._in_a_sentence():
            part = _write_parts(self.temporary, number, model_tensors, optimizer_state, state)
            note = self._note(number)
            draft = note.with_suffix(".draft")
            draft.write_text(json.dumps(part._asdict()), encoding="utf-8")
            draft.rename(note)
            return part

    def noted_parts(self, numbers: Collection[int], patience: float) -> list[Part] | None:
        """The parts of these numbers that have been written, without asking who wrote them.

        None where one is not there after `patience` seconds.
        """
        end = time.monotonic() + patience
        while not all(self._note(number).exists() for number in numbers):
            if time.monotonic() > end:
                return None
            time.sleep(0.05)
        found = [json.loads(self._note(number).read_text(encoding="utf-8")) for number in sorted(numbers)]
        files = [{name: (size, digest) for name, (size, digest) in each["files"].items()} for each in found]
        return [Part(each, other["aliases"]) for each, other in zip(files, found, strict=True)]

    def _note(self, number: int) -> Path:
        return self.temporary / f"{number}.written"

    def publish(self, parts: Sequence[Part], keep: int = 0) -> Path:
        """Write the manifest of all parts, give the folder its name and prune; one rank does so. Raises UserError."""
        files = {name: entry for part in parts for name, entry in part.files.items()}
        aliases = {name: names for part in parts for name, names in part.aliases.items()}
        with self._in_a_sentence():
            for note in self.temporary.glob("*.written"):
                note.unlink()
            with _synced_file(self.temporary / MANIFEST) as file:
                write_manifest(file, step_of(self.target), files, aliases)
            sync_directory(self.temporary)
            put_in_place(self.temporary, self.target)
        if keep > 0:
            prune(self.target.parent, keep, just_written=self.target)
        return self.target

    def abandon(self) -> None:
        """Remove what was written and not published; one rank does so, when no other writes any more."""
        shutil.rmtree(self.temporary, ignore_errors=True)

    @contextlib.contextmanager
    def _in_a_sentence(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(_why_not_saved(self.target.parent, self.target, error)) from error


def save_checkpoint(
    save_dir: str | Path,
    update_step: int,
    model_tensors: Mapping[str, Tensor],
    optimizer_state: Mapping[str, Any],
    state: Mapping[str, Any],
    keep: int = 0,
) -> Path:
    """Write `<save_dir>/step_<update_step>` and prune to the newest `keep` (0: all); returns its path.

    `optimizer_state` and `state` may nest dicts, lists, tuples, plain values and tensors. On failure the older
    checkpoints are untouched, the unfinished directory is removed and UserError says what to do.
    """
    unfinished = Unfinished.begin(save_dir, update_step)
    try:
        return unfinished.publish([unfinished.write(0, model_tensors, optimizer_state, state)], keep)
    finally:
        unfinished.abandon()  # also after a KeyboardInterrupt or a bug


def load_checkpoint(path: str | Path, check: bool = True, asked_by: str = "--continue_from") -> Checkpoint:
    """Read a checkpoint onto the CPU; raises UserError if it is absent, damaged or of another format.

    `check=False` skips the hashes, for ranks beside the one that has checked them. `asked_by`: the flag that the path
    is from, for the error text.
    """
    folder = Path(path)
    try:
        return _read(folder, check)
    except DamagedError as error:
        raise UserError(f"{asked_by} {folder}: {error}.") from error
    except (OSError, KeyError, ValueError) as error:
        raise UserError(_unreadable(asked_by, folder, error)) from error


def load_newest_checkpoint(save_dir: str | Path) -> tuple[Checkpoint | None, list[str]]:
    """Load the newest valid checkpoint in `save_dir`; also returns a sentence for each newer one that was refused."""
    refusals: list[str] = []
    for path in reversed(list_checkpoints(save_dir)):
        try:
            return _read(path, check=True), refusals
        except DamagedError as error:
            refusals.append(f"{path} refused: {error}.")
        except OSError as error:
            refusals.append(f"{path} refused: cannot be read ({error.strerror}).")
        except (KeyError, ValueError) as error:  # whole, and yet not what this program writes
            raise UserError(_unreadable("--continue_from", path, error)) from error
    return None, refusals


def _unreadable(asked_by: str, folder: Path, error: Exception) -> str:
    return f"{asked_by} {folder}: cannot be read ({error!r}); take an older checkpoint."


def _read(folder: Path, check: bool) -> Checkpoint:
    """Load a checkpoint; every file is read once, for its hash and for its contents."""
    manifest = check_sizes(folder) if check else read_manifest(folder)
    contents = {name: map_file(folder / name) for name in manifest.files}
    if check:
        check_hashes(manifest, contents)
    parts = {name: tensors_in(content) for name, content in contents.items() if name.endswith(".safetensors")}
    for name, aliases in manifest.aliases.items():
        parts[name].update({alias: parts[name][original] for alias, original in aliases.items()})
    model: dict[str, Tensor] = {}
    for file in manifest.parts(MODEL):
        model |= {name: _with_rows(model.get(name), value) for name, value in parts[file].items()}
    optimizer = _merged(
        [
            join_tree(json.loads(contents[tree][:]), parts[tensors])
            for tree, tensors in zip(*map(manifest.parts, ("optimizer.json", "optimizer.safetensors")), strict=True)
        ]
    )
    state = join_tree(json.loads(contents["state.json"][:]), parts.get("state.safetensors", {}))
    return Checkpoint(model, optimizer, state, folder, manifest.update_step)


def _merged(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """An optimizer's state of what each rank has of it, in the order in which one rank would have it."""
    first, *others = parts
    if not others:
        return first
    state: dict[Any, dict[str, Tensor]] = {}
    for part in parts:
        for key, entries in part["state"].items():
            before = state.get(key, {})
            state[key] = before | {name: _with_rows(before.get(name), value) for name, value in entries.items()}
    ids = [key for group in first["param_groups"] for key in group["params"] if key in state]
    return first | {"state": {key: state[key] for key in ids} | state}


def _with_rows(before: Tensor | None, value: Tensor) -> Tensor:
    """A weight, or an entry of a state, of which ranks before this one had the rows `before`; what has none is the same
    on all."""
    return value if before is None or not value.dim() else torch.cat([before, value])


def with_todays_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename quantized weights of old checkpoints, `weight` beside a `weight_scale`, to `weight_qdata`."""
    return {f"{name}_qdata" if f"{name}_scale" in tensors else name: tensor for name, tensor in tensors.items()}


def check_compatible(checkpoint: Checkpoint, expected: Mapping[str, object]) -> None:
    """Compare `expected`, by flag name as a rule, with the checkpoint's state; a missing entry is a difference, too.

    Raises one UserError for all differences.
    """
    if refusal := refusal_of(checkpoint.path, checkpoint.state, expected):
        raise UserError(refusal)


def refusal_of(path: Path, state: Mapping[str, Any], expected: Mapping[str, object]) -> str:
    """The sentence on all differences between a checkpoint's state and what is expected; "" where there are none."""
    absent = object()
    differences = list[str]()
    for name, here in expected.items():
        there = state.get(name, absent)
        if there is absent:
            differences.append(f"{name} is {here!r} here and not recorded there")
        elif isinstance(there, dict) and isinstance(here, dict):
            differences += differing_keys(there, here)
        elif there != here:
            differences.append(f"{name} is {here!r} here and {there!r} there")
    if not differences:
        return ""
    return (
        f"--continue_from {path} is of another run: {'; '.join(differences)}. Give the flags of that run or another "
        "checkpoint."
    )


def check_model_tensors(checkpoint: Checkpoint, model_tensors: Mapping[str, Tensor]) -> None:
    """Raise UserError unless a checkpoint's weights fit the model's state dict in names, shapes and dtypes.

    Old checkpoints lack the entries `weight_format`: the format is then known from the run's flags alone.
    """
    there, here = with_todays_names(checkpoint.model_tensors), with_todays_names(model_tensors)
    lacking = [name for name in here if name not in there and not name.endswith(".weight_format")]
    problems = [f"{name} is missing there" for name in lacking]
    problems += [f"{name} is not in this model" for name in there if name not in here]
    for name in here:
        if name in there and (here[name].shape != there[name].shape or here[name].dtype != there[name].dtype):
            problems.append(f"{name} is {_describe(here[name])} here and {_describe(there[name])} there")
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(
            f"--continue_from {checkpoint.path} is of another model: {'; '.join(problems[:3])}{more}. "
            f"Give the --model_config, --optimizer and quantization flags of that run."
        )


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {' x '.join(map(str, tensor.shape)) or 'scalar'}"


def _write_parts(
    folder: Path,
    number: int,
    model_tensors: Mapping[str, Tensor],
    optimizer_state: Mapping[str, Any],
    state: Mapping[str, Any] | None,
) -> Part:
    """Write everything but the manifest of part `number`."""
    optimizer_tensors: dict[str, Tensor] = {}
    state_tensors: dict[str, Tensor] = {}
    jsons = {part_name("optimizer.json", number): split_tree(dict(optimizer_state), optimizer_tensors)}
    if state is not None:
        jsons["state.json"] = split_tree(dict(state), state_tensors)
    parts = {part_name(MODEL, number): dict(model_tensors)}
    parts[part_name("optimizer.safetensors", number)] = optimizer_tensors
    if state_tensors:
        parts["state.safetensors"] = state_tensors
    files: dict[str, tuple[int, str]] = {}
    aliases: dict[str, dict[str, str]] = {}

    def write(name: str, content: Callable[[HashingFile], None]) -> None:
        with _synced_file(folder / name) as raw:
            file = HashingFile(raw)
            content(file)
            files[name] = (file.size, file.sha256)

    for name, tensors in parts.items():
        unique, shared = _without_shared(tensors)
        write(name, lambda file, unique=unique: write_tensors(file, unique))  # type: ignore[misc]
        if shared:
            aliases[name] = shared
    for name, tree in jsons.items():
        write(name, lambda file, tree=tree: file.write(json.dumps(tree).encode()))  # type: ignore[misc]
    return Part(files, aliases)


def _without_shared(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Split off names of tensors that share their memory with another (a tied head), which is then stored once.

    Returns (tensors to store, {other name: stored name}).
    """
    first: dict[tuple[object, ...], str] = {}
    unique: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        memory = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and memory in first:
            aliases[name] = first[memory]
        else:
            first[memory] = name
            unique[name] = tensor
    return unique, aliases


@contextlib.contextmanager
def _synced_file(path: Path) -> Iterator[BinaryIO]:
    with path.open("xb") as file:
        yield cast(BinaryIO, file)
        file.flush()
        os.fsync(file.fileno())


def _why_not_saved(folder: Path, target: Path, error: OSError) -> str:
    if error.errno in _NO_SPACE:
        right = "free some space, lower --keep_checkpoints or give another --save_dir"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        right = "give a --save_dir that this user may write to"
    else:
        right = "give a --save_dir that is a writable directory"
    older: list[Path] = []
    with contextlib.suppress(UserError):
        older = list_checkpoints(folder)
    intact = f" The checkpoint before it, {older[-1]}, is untouched." if older else ""
    return f"--save_dir {folder}: {target.name} could not be written ({error.strerror or error}); {right}.{intact}"
