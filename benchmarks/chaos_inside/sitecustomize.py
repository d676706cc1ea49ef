"""Runs inside every process that `benchmarks/chaos.py` starts, since Python imports a `sitecustomize` that it finds.

CHAOS_MOMENT="low_rank_weight.py:update:call:7" kills the process with SIGKILL at the seventh call of that function
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

_moment, _limit = os.environ.get("CHAOS_MOMENT"), os.environ.get("CHAOS_FILE_LIMIT")
_is_rank = any(word.endswith("run_pretrain.py") for word in sys.orig_argv) and (
    "torch.distributed.run" not in sys.orig_argv
    and os.environ.get("RANK", "0") == os.environ.get("CHAOS_RANK", "0")
    and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
)
if _is_rank and _limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(_limit), resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
if _is_rank and _moment:
    _file, _function, _event, _count = _moment.split(":")
    _left = int(_count)

    def _watch(frame: FrameType, event: str, arg: object) -> None:
        global _left
        code = frame.f_code
        if event == _event and code.co_name == _function and code.co_filename.endswith("/" + _file):
            _left -= 1
            if _left == 0:
                Path(os.environ["CHAOS_LOG"]).write_text(f"{_moment}\n")
                os.kill(os.getpid(), signal.SIGKILL)

    threading.setprofile(_watch)
    sys.setprofile(_watch)
