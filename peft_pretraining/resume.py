"""Which checkpoint a run continues from."""

from __future__ import annotations

from pathlib import Path

from peft_pretraining.checkpoint import Checkpoint, find_checkpoint, load_checkpoint, set_aside_later
from peft_pretraining.checkpoint_folder import step_of
from peft_pretraining.distributed import Processes


def choose_checkpoint(continue_from: str, save_dir: Path, processes: Processes) -> Checkpoint | None:
    """The checkpoint of `--continue_from`: a folder, `auto` for the newest valid one in save_dir, or none.

    The main rank checks hashes and tells what it refused; checkpoints later than the one taken are renamed, so that
    `auto` never mixes two courses of a run. Raises UserError.
    """
    if not continue_from:
        return None

    def choose() -> Path | None:
        if continue_from == "auto":
            path, refusals = find_checkpoint(save_dir)
            for refusal in refusals:
                print(refusal, flush=True)
        else:
            path = load_checkpoint(continue_from).path
        if path is not None and path.parent == save_dir:
            set_aside_later(save_dir, step_of(path))
        return path

    path = processes.from_main(choose)
    return None if path is None else load_checkpoint(path, check=False)
