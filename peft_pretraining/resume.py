"""Which checkpoint a run continues from."""

from __future__ import annotations

from pathlib import Path

from peft_pretraining.args import RunArgs
from peft_pretraining.checkpoint import Checkpoint, find_checkpoint, list_checkpoints, load_checkpoint, set_aside_later
from peft_pretraining.distributed import Processes
from peft_pretraining.errors import UserError


def choose_checkpoint(continue_from: str, save_dir: Path, processes: Processes) -> Checkpoint | None:
    """The checkpoint of `--continue_from`: a folder, `auto` for the newest valid one in save_dir, or none.

    The main rank checks hashes and tells what it refused. Raises UserError, also where save_dir holds another run.
    """
    processes.from_main(lambda: _refuse_another_run(continue_from, save_dir))
    if not continue_from:
        return None

    def choose() -> Path | None:
        if continue_from == "auto":
            path, refusals = find_checkpoint(save_dir)
            for refusal in refusals:
                print(refusal, flush=True)
        else:
            path = load_checkpoint(continue_from).path
        return path

    path = processes.from_main(choose)
    return None if path is None else load_checkpoint(path, check=False)


def take_over(checkpoint: Checkpoint, save_dir: Path, processes: Processes) -> None:
    """Rename checkpoints later than the one a run goes on from, so that `auto` never mixes two courses of it."""
    if checkpoint.path.resolve().parent == save_dir.resolve():
        processes.from_main(lambda: set_aside_later(save_dir, checkpoint.update_step) and None)


def from_newest_checkpoint(args: RunArgs, processes: Processes) -> RunArgs:
    """The arguments of a run that has to go back: to the newest checkpoint in its folder, else to where it began."""
    save_dir = Path(args.checkpoint.save_dir)
    has_one = processes.from_main(lambda: bool(list_checkpoints(save_dir)))
    return args.in_folder(save_dir, "auto" if has_one else None)


def _refuse_another_run(continue_from: str, save_dir: Path) -> None:
    if continue_from == "auto" or (continue_from and Path(continue_from).resolve().parent == save_dir.resolve()):
        return
    if list_checkpoints(save_dir):
        raise UserError(
            f"--save_dir {save_dir} holds the checkpoints of another run: give --continue_from auto to go on with it, "
            "or another --save_dir"
        )
