"""Set up deterministic kernels at the start of the process, and end it with the right exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

import torch

from peft_pretraining.data.sources.builders import remove_scratch
from peft_pretraining.errors import UserError, missing_package
from peft_pretraining.runtime.rendezvous import world_size_of_launch
from peft_pretraining.runtime.world import is_lost_rank, tells_of_a_connection


def make_reproducible(dtype: str = "") -> None:
    """Allow deterministic kernels only, so that the same seed gives the same bits; dtype: that of the run."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # A debugging aid that fills every new buffer.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if dtype == "float16":
        # A gradient over many tokens is summed in parts, and a part may be beyond float16 where the sum is not.
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def _end_at_once(code: int) -> NoReturn:
    """End the process without Python's shutdown; flushes output and removes temporary files."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
        remove_scratch()
    finally:
        os._exit(code)


def exit_code_of(program: Callable[[], None], name: str) -> int:
    """Run `program`; returns 0 if it ended or was stopped cleanly, 2 for a UserError or a missing package.

    What the user can do about these is printed as `name`'s.
    Where another rank is lost, or a collective has failed, the process ends here, with exit code 1.
    """
    try:
        program()
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (advice := missing_package(error)) is None:
            raise
        print(f"{name}: {advice}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        if tells_of_a_connection(error):
            print(f"{name}: another rank has ended or cannot be reached ({error})", file=sys.stderr)
        else:  # as where two ranks have one GPU: the cause is here
            traceback.print_exception(error)
            print(f"{name}: what the ranks do together has failed on this one, as above", file=sys.stderr)
        _end_at_once(1)  # an ordinary exit would wait for collectives that this rank has queued
    return 0


def leave(code: int) -> NoReturn:
    """End the process, after everything of a run was closed.

    With several ranks it skips Python's shutdown. Threads that libraries have left behind can abort that (seen once:
    "terminate called without an active exception"), and torchrun would report a finished run as failed.
    """
    if world_size_of_launch() > 1:
        _end_at_once(code)
    sys.exit(code)
