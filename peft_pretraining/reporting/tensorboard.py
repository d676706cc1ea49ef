"""TensorBoard as a mirror of metrics.jsonl: event files in a run's folder, with the same metrics.

PyTorch's writer needs the package `tensorboard`, without which a command line with `--tensorboard` is refused. A run
that is resumed writes another event file, whose first event makes TensorBoard forget what the ones before have from the
first update that is made again.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

EVENTS_FOLDER = "tensorboard"


class TensorBoardMirror:
    """Writes event files. No method raises: `warn` gets the first failure, after which the run goes on without it."""

    def __init__(self, save_dir: Path, start_update: int, warn: Callable[[str], None]) -> None:
        """`start_update`: the number of updates that the run had made already."""
        self._warn = warn
        self._writer: Any = None
        self._guard("start", lambda: self._start(save_dir / EVENTS_FOLDER, start_update))

    def log_metrics(self, update_step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of one update; the values are on the host already."""
        if self._writer is not None:
            self._guard("write", lambda: self._write(update_step, metrics))

    def sync(self) -> None:
        """Write what is still in memory to the files."""
        if self._writer is not None:
            self._guard("write", self._writer.flush)

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._guard("close", self._writer.close)
            self._writer = None

    def _start(self, folder: Path, start_update: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=start_update + 1)

    def _write(self, update_step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, update_step)

    def _guard(self, action: str, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # a mirror may break in any way; the run must not
            self._writer = None
            reason = (str(error).strip() or "no reason").splitlines()[0]
            self._warn(
                f"warning: TensorBoard could not {action} ({type(error).__name__}: {reason}); the run goes on without "
                "it, and metrics.jsonl has every metric"
            )
