"""How the process of a run begins and ends: deterministic kernels, and an exit code for each kind of end."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

import torch

from peft_pretraining.data.sources.builders import remove_scratch
from peft_pretraining.errors import UserError
from peft_pretraining.runtime.rendezvous import world_size_of_launch
from peft_pretraining.runtime.world import is_lost_rank


def make_reproducible() -> None:
    """Same seed, same bits: only deterministic kernels, and no global generator in use anywhere."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # A debugging aid that costs a pass over every new buffer.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _end_at_once(code: int) -> NoReturn:
    """Without what is done at an ordinary end, but for what has been printed and temporary files."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
        remove_scratch()
    finally:
        os._exit(code)


def exit_code_of(program: Callable[[], None], name: str) -> int:
    """Run it: 0 if it ran or stopped in good order, 2 for what the user can mend, said in a sentence after its name.

    Where another rank is lost the process ends here, with 1.
    """
    try:
        program()
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        print(f"{name}: another rank has ended or cannot be reached ({error})", file=sys.stderr)
        _end_at_once(1)  # an ordinary end would wait for what the device still expects of that rank
    return 0


def leave(code: int) -> NoReturn:
    """End the process; everything of a run is closed by now.

    One of several ranks leaves at once. Threads that libraries have left behind can abort an ordinary end (seen once:
    "terminate called without an active exception"), and torchrun would then take a run that is over for a failed one.
    """
    if world_size_of_launch() > 1:
        _end_at_once(code)
    sys.exit(code)
