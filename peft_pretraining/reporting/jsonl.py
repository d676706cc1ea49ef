"""The metrics of a run: metrics.jsonl has all of them; wandb and TensorBoard mirror it, the progress bar shows some.

A line of metrics.jsonl is a JSON object with `update_step` and the metrics of one call of `log_metrics`. The lines of
two equal runs differ only in metrics that were measured, whose names start with `throughput/`, `memory/`, `data/` or
`time/`; `deterministic_metrics` removes those.
"""

import errno
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

from peft_pretraining.errors import UserError
from peft_pretraining.reporting.progress import Progress
from peft_pretraining.reporting.tensorboard import TensorBoardMirror
from peft_pretraining.reporting.wandb import WandbMirror

__all__ = ["METRICS_FILE", "MetricsLogger", "deterministic_metrics", "read_lines", "read_metrics"]

METRICS_FILE = "metrics.jsonl"
MEASURED_PREFIXES = ("throughput/", "memory/", "data/", "time/")


def deterministic_metrics(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl without the metrics that depend on the machine."""
    return {name: value for name, value in line.items() if not name.startswith(MEASURED_PREFIXES)}


def read_metrics(save_dir: Path) -> list[dict[str, Any]]:
    """Read the lines of a run's metrics.jsonl, without a last one that a crash has cut off. Raises UserError."""
    return read_lines(save_dir)[0]


def read_lines(save_dir: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of a run's metrics.jsonl, and how many others are no JSON objects, but for a last one that is cut off.

    Raises UserError if the file cannot be read.
    """
    path = save_dir / METRICS_FILE
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} does not exist: {save_dir} must be the --save_dir of a run") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): it must be a file of metrics of a run") from None
    finished = [line for line in text.splitlines(keepends=True) if line.endswith("\n") and line.strip()]
    found = [values for line in finished if (values := _json_object(line)) is not None]
    return found, len(finished) - len(found)


def _whole_lines(text: str) -> list[str]:
    lines = text.splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n") and line.strip() and _json_object(line) is not None]


def _json_object(line: str) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


class MetricsLogger:
    """Writes metrics on rank 0; on other ranks every method does nothing."""

    def __init__(
        self,
        save_dir: Path,
        run_args: Mapping[str, Any],
        *,
        rank: int = 0,
        wandb_mode: str = "off",
        project: str = "test",
        name: str = "test",
        tags: Sequence[str] = (),
        run_id: str | None = None,
        tensorboard: bool = False,
        total_updates: int,
        start_update: int | None = None,
        show_progress: bool = True,
    ) -> None:
        """Open the files; `run_id`: wandb's id of the run that is resumed; `tensorboard`: whether to write event files.

        `start_update` is the number of updates that the run had made: lines after it, whose updates are made again,
        are removed; -1: all are. Without it all are kept. Raises UserError if `save_dir` cannot be written.
        """
        self._path = save_dir / METRICS_FILE
        self._file: FileIO | None = None
        self._progress: Progress | None = None
        self._wandb: WandbMirror | None = None
        self._tensorboard: TensorBoardMirror | None = None
        self._run_id = run_id
        if rank != 0:
            return
        self._open()
        # A crash may have cut off the last line, and a new one must not be appended to it.
        self.truncate_after(sys.maxsize if start_update is None else start_update)
        self._wandb = WandbMirror(
            save_dir, wandb_mode, project=project, name=name, tags=tags, config=run_args, run_id=run_id, warn=self.log,
            history=lambda: read_metrics(save_dir),
        )  # fmt: skip
        self._run_id = self._wandb.run_id
        if tensorboard:
            self._tensorboard = TensorBoardMirror(save_dir, max(0, start_update or 0), self.log)
        if show_progress:
            self._progress = Progress(total_updates, max(0, start_update or 0))

    @property
    def run_id(self) -> str | None:
        """wandb's id of this run, for the checkpoint; None if wandb never ran."""
        return self._run_id

    def log_metrics(self, update_step: int, metrics: Mapping[str, float]) -> None:
        """Append one line; values that are not finite become null, since JSON cannot express them."""
        if self._file is None:
            return
        values = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        try:
            self._append(json.dumps({"update_step": update_step, **values}) + "\n")
        except OSError as error:
            raise self._cannot_write(error) from error
        if self._wandb is not None:
            self._wandb.log_metrics(update_step, values)
        if self._tensorboard is not None:
            self._tensorboard.log_metrics(update_step, metrics)
        if self._progress is not None:
            self._progress.show(update_step, metrics)

    def truncate_after(self, update_step: int) -> None:
        """Remove the lines after `update_step`, whose updates a resumed run repeats; replaces the file atomically."""
        if self._file is None:
            return
        kept = [
            line
            for line in _whole_lines(self._path.read_text(encoding="utf-8"))
            if json.loads(line).get("update_step", 0) <= update_step
        ]
        temporary = self._path.with_suffix(".jsonl.tmp")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.writelines(kept)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._path)
        except OSError as error:
            raise self._cannot_write(error) from error
        self._file.close()
        self._open()

    def sync(self) -> None:
        """Flush the lines to the disk, so that no checkpoint is there without the metrics before it."""
        if self._file is not None:
            os.fsync(self._file.fileno())
        if self._tensorboard is not None:
            self._tensorboard.sync()

    def log(self, text: str) -> None:
        """Print a line on rank 0 without breaking the progress bar."""
        if self._progress is not None:
            self._progress.log(text)
        elif self._file is not None:
            print(text, file=sys.stderr, flush=True)

    def close(self, failed: bool = False) -> None:
        """Close the files, the bar and wandb's run; logs how a run of wandb that is offline is uploaded."""
        if self._progress is not None:
            self._progress.close()
        if self._wandb is not None:
            self._wandb.close(failed)
            if command := self._wandb.upload_command:
                self.log(f"wandb recorded offline; upload the run with: {command}")
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: a line is one write, and a write that failed is not tried again when the file is closed.
            self._file = self._path.open("ab", buffering=0)
        except OSError as error:
            raise self._cannot_write(error) from error

    def _append(self, line: str) -> None:
        assert self._file is not None
        data = line.encode()
        if self._file.write(data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _cannot_write(self, error: OSError) -> UserError:
        return UserError(
            f"{self._path} cannot be written ({error.strerror or error}): give a --save_dir on a disk with free space "
            "where you may write; checkpoints that are there stay as they are"
        )
