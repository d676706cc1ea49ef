"""The directory of a run's checkpoints: list them, publish one by rename, prune, and clean up after a crash.

Names: `step_<n>` is a checkpoint; `.tmp_step_<n>_...` is unfinished or being deleted; `.replaced_step_<n>` is one that
is being replaced by a newer checkpoint of the same step; `abandoned_<k>_step_<n>` is later than the checkpoint from
which the run was resumed.
"""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from peft_pretraining.checkpoint.manifest import DamagedError, check_sizes
from peft_pretraining.errors import UserError

_STEP = re.compile(r"(\.replaced_)?step_\d{8,}")
_TEMPORARY, _REPLACED, _LOCK = ".tmp_", ".replaced_", ".lock"


@dataclass(frozen=True)
class FolderLock:
    """A run's folder that is locked until `release`, or until the process ends."""

    file: IO[str]
    created: tuple[Path, ...]
    """The folder, and those above it, as far as they were not there; the folder first."""

    def remove_unused(self) -> None:
        """Delete the lock's file, and folders that were made for it, where there is nothing else in the folder."""
        path = Path(self.file.name)
        with contextlib.suppress(OSError):
            if [each.name for each in path.parent.iterdir()] == [_LOCK]:
                path.unlink()
                for folder in self.created:
                    folder.rmdir()

    def release(self) -> None:
        """Let other runs have the folder: at once, and not when nothing refers to this object any more."""
        self.file.close()


def lock_folder(save_dir: str | Path) -> FolderLock:
    """Lock a run's folder until the lock is released or the process ends; a file system without locks is warned of.

    Two runs in one folder would delete each other's unfinished checkpoints. Raises UserError if another process has
    locked it or it cannot be created.
    """
    path = Path(save_dir) / _LOCK
    created = tuple(folder for folder in path.parents if not folder.exists())
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a")
        except OSError as error:
            raise UserError(
                f"--save_dir {save_dir}: {path} cannot be written ({error.strerror}); "
                "give a --save_dir that is a writable directory"
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # the latter where a network file system has locks of its own
            raise UserError(
                f"--save_dir {save_dir}: another process is running there; stop it first or give another --save_dir"
            ) from None
        except OSError as error:
            print(
                f"warning: --save_dir {save_dir}: its file system has no locks ({error.strerror}): nothing keeps a "
                "second run out of this folder, and two would delete each other's unfinished checkpoints",
                file=sys.stderr,
            )
            return FolderLock(file, created)
        with contextlib.suppress(OSError):
            # A run that ended meanwhile may have deleted the file that is locked now.
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return FolderLock(file, created)


def checkpoint_path(folder: Path, update_step: int) -> Path:
    """The path of the checkpoint after `update_step` updates."""
    return folder / f"step_{update_step:08d}"


def temporary_path(target: Path) -> Path:
    """The path at which a checkpoint is written before it is renamed to `target`."""
    return target.with_name(f"{_TEMPORARY}{target.name}_{os.getpid()}")


def list_checkpoints(save_dir: str | Path) -> list[Path]:
    """The checkpoint directories in `save_dir`, valid or not, oldest step first."""
    folder = Path(save_dir)
    found: dict[int, Path] = {}
    try:
        # ".replaced_step_..." sorts before "step_...", which then overwrites its entry.
        for path in sorted(folder.iterdir()):
            if _STEP.fullmatch(path.name) and path.is_dir():
                found[step_of(path)] = path
    except FileNotFoundError:
        return []
    except OSError as error:
        # Not the same as an empty directory: a new run there would hide the old one.
        raise UserError(
            f"--save_dir {folder}: cannot be read ({error.strerror}); give a readable directory."
        ) from error
    return [found[step] for step in sorted(found)]


def step_of(path: Path) -> int:
    """The number of updates in the name of a checkpoint directory."""
    return int(path.name.rpartition("_")[2])


def prune(save_dir: str | Path, keep: int, just_written: Path) -> list[Path]:
    """Delete all but the newest `keep` valid checkpoints up to `just_written`; returns the deleted paths.

    Damaged ones do not count, so that none of them causes a good one to be deleted. Checkpoints of later steps, which
    an earlier attempt may have left, are not touched.
    """
    newest = step_of(just_written)
    earlier = [path for path in list_checkpoints(save_dir) if step_of(path) < newest]
    whole = [path for path in earlier if _looks_whole(path)]
    if len(whole) < keep:
        return []
    oldest_kept = step_of(whole[1 - keep]) if keep > 1 else newest
    doomed = [path for path in earlier if step_of(path) < oldest_kept]
    for path in doomed:
        # Renamed first: a crash half-way through deleting must not leave what looks like a checkpoint.
        with contextlib.suppress(OSError):
            grave = path.with_name(f"{_TEMPORARY}step_{step_of(path):08d}_pruned")
            path.rename(grave)
            shutil.rmtree(grave)
    return doomed


def set_aside_later(save_dir: str | Path, update_step: int) -> list[Path]:
    """Rename checkpoints after `update_step` to `abandoned_<n>_step_...`, so that `auto` will not take them.

    For a run that is resumed from an older checkpoint than the newest; returns the new names.
    """
    renamed = []
    for path in list_checkpoints(save_dir):
        if step_of(path) > update_step:
            number = 0
            while (new := path.with_name(f"abandoned_{number}_step_{step_of(path):08d}")).exists():
                number += 1
            try:
                renamed.append(path.rename(new))
            except OSError as error:
                raise UserError(
                    f"--save_dir {save_dir}: {path.name} is later than the checkpoint of --continue_from and could not "
                    f"be renamed ({error.strerror}); give a --save_dir that this user may write to."
                ) from error
    return renamed


def sync_directory(path: Path) -> None:
    """Flush the names in a directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems cannot sync a directory.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def put_in_place(temporary: Path, target: Path) -> None:
    """Rename `temporary` to `target`; an older directory of that name is kept aside until the new one is safe."""
    aside = target.with_name(_REPLACED + target.name)
    if target.exists():
        target.rename(aside)
    temporary.rename(target)
    sync_directory(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Delete what a crashed save or prune left; a `.replaced_` checkpoint without a successor gets its name back."""
    for path in folder.iterdir():
        if path.name.startswith(_TEMPORARY + "step_"):
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.startswith(_REPLACED + "step_"):
            original = path.with_name(path.name.removeprefix(_REPLACED))
            if original.exists():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.rename(original)


def _looks_whole(path: Path) -> bool:
    try:
        check_sizes(path)
    except (DamagedError, OSError):
        return False
    return True
