"""Runs inside every process that `benchmarks/chaos.py` starts, since Python imports a `sitecustomize` that it finds.

CHAOS_MOMENT="update/step.py:update_weights:call:7" kills the process with SIGKILL at the seventh call of that function
("return": when it returns), wherever it is made. CHAOS_FILE_LIMIT="5000" lets no file grow beyond that many bytes, as
on a full disk. Both hold for the rank CHAOS_RANK, and only for the first start of torchrun's ranks. So the command that
runs is the user's, and nothing in the program knows of it.
"""

import os
import resource
import signal
import sys
import threading
from pathlib import Path
from types import FrameType


def arm() -> None:
    """Do what the environment asks for, if it asks this process."""
    rank = os.environ.get("RANK", "0") == os.environ.get("CHAOS_RANK", "0")
    if not rank or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return
    if limit := os.environ.get("CHAOS_FILE_LIMIT"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    if moment := os.environ.get("CHAOS_MOMENT"):
        die_at(moment)


def die_at(moment: str) -> None:
    """Kill this process at a named moment, in whatever thread."""
    file, function, event, count = moment.split(":")
    left = int(count)

    def watch(frame: FrameType, what: str, argument: object) -> None:
        nonlocal left
        code = frame.f_code
        if what == event and code.co_name == function and code.co_filename.endswith("/" + file):
            left -= 1
            if left == 0:
                Path(os.environ["CHAOS_LOG"]).write_text(f"{moment}\n")
                os.kill(os.getpid(), signal.SIGKILL)

    threading.setprofile(watch)
    sys.setprofile(watch)


if any(word.endswith("run_pretrain.py") for word in sys.orig_argv) and "torch.distributed.run" not in sys.orig_argv:
    arm()
