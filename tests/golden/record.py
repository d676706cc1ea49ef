"""Golden losses: what short runs of every mode compute, written down so that a change can show that it changed nothing.

    python -m tests.golden.record                                # renew tests/golden/cpu.jsonl
    python -m tests.golden.record --device cuda                  # renew tests/golden/cuda_<card>.jsonl
    python -m tests.golden.record --device cuda --out new.jsonl  # write another file, or into a folder

`tests/test_golden.py` makes the runs again and compares. Where nothing is recorded, two checkouts can be compared, of
which one may be older than this program:

    python -m tests.golden.record --device cuda --tree OLD_CHECKOUT --out old.jsonl
    diff old.jsonl new.jsonl

All goes through the command line of `run_pretrain.py` and the files that a run leaves: a recording outlives any change
of the code's layout. Recording twice gives the same file.

The first line of a file is the place, that is what the last bits of a number depend on apart from this project. Then
each update of each mode has a line with its loss, the norm of its gradient and the refreshes of subspaces so far, all
digits of them, and each mode a last line with the loss of the final evaluation and a hash of the final weights.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.golden.modes import command_line, mode_of, names

FOLDER = Path(__file__).resolve().parent
KEPT = ("train/loss", "train/grad_norm", "subspace/refreshes", "eval/loss")
"""What is recorded of a line of metrics.jsonl."""

Line = dict[str, Any]


@dataclass(frozen=True)
class Recording:
    """What was computed, and where."""

    place: Line
    lines: dict[str, list[Line]]
    """Of each run, in the order of its updates."""

    def write(self, path: Path) -> None:
        """As lines of JSON."""
        lines: list[Line] = [{"place": self.place}]
        lines += [{"run": name} | line for name, own in self.lines.items() for line in own]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Recording:
        """What `write` wrote."""
        first, *rest = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
        lines: dict[str, list[Line]] = {}
        for line in rest:
            lines.setdefault(line.pop("run"), []).append(line)
        return cls(first["place"], lines)


def recording_for(here: Line) -> Recording | None:
    """The one made in this place; else another one of this device, if there is any."""
    found = [Recording.read(path) for path in sorted(FOLDER.glob(f"{here['device']}*.jsonl"))]
    return next((each for each in found if each.place == here), found[0] if found else None)


def place(device: str) -> Line:
    """What bits depend on, apart from this project's code."""
    found: Line = {"device": device, "torch": torch.__version__}
    # On a GPU for the sake of the initial weights, which are drawn on the CPU.
    found["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    if device == "cuda":
        import triton

        versions = {"cuda": torch.version.cuda, "triton": triton.__version__}
        return found | {"card": torch.cuda.get_device_name()} | versions
    return found | {"threads": torch.get_num_threads(), "arithmetic": arithmetic()}


def arithmetic() -> str:
    """A fingerprint of what the CPU's libraries compute: they choose their code by the processor's maker and age."""
    x = torch.arange(133 * 64, dtype=torch.float32).view(133, 64).mul_(0.7).sin_()
    products = [x.T @ x, (x.bfloat16().T @ x.bfloat16()).float()]
    results = [*products, x.exp().sum(1), x.softmax(1), *torch.linalg.svd(x, full_matrices=False)]
    return hashlib.sha256(b"".join(result.contiguous().numpy().tobytes() for result in results)).hexdigest()[:12]


def path_for(here: Line) -> Path:
    """The file of a recording that is made in a place."""
    card = re.sub(r"[^a-z0-9]+", "_", here.get("card", "").lower()).strip("_")
    return FOLDER / (f"{here['device']}_{card}.jsonl" if card else f"{here['device']}.jsonl")


def run(name: str, device: str, folder: Path) -> list[Line]:
    """Make one of the runs in `tests.golden.modes.names`, in an empty folder; returns what is recorded of it."""
    flags = command_line(name, device, folder)
    if mode_of(name).ranks == 1:
        in_this_process(flags, device)
    else:
        by_torchrun(flags, mode_of(name).ranks)
    text = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    metrics = [json.loads(line) for line in text.splitlines()]
    lines = [{"update_step": line["update_step"]} | {key: line[key] for key in KEPT if key in line} for line in metrics]
    (model,) = (folder / "run").glob("step_*/model.safetensors")
    lines[-1]["weights"] = hash_of_tensors(model.read_bytes())
    return lines


def in_this_process(flags: Sequence[str], device: str) -> None:
    """`run_pretrain.main`, which must end well; what it changes for the process is put back."""
    program = importlib.import_module("run_pretrain")
    if device == "cuda":
        import torch._dynamo

        torch._dynamo.reset()  # what is compiled must not depend on the runs before
        gc.collect()  # a model and its hooks refer to each other, and so their memory stays
    with restored_process():
        code = program.main(list(flags))
    if code != 0:
        raise RuntimeError(f"run_pretrain.py ended with {code}: {' '.join(flags)}")


@contextlib.contextmanager
def restored_process() -> Iterator[None]:
    """Put back signal handlers, whether kernels must be deterministic, and how sums of float16 are made."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    deterministic = torch.are_deterministic_algorithms_enabled()
    products = torch.backends.cuda.matmul
    reduced = products.allow_fp16_reduced_precision_reduction
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        torch.use_deterministic_algorithms(deterministic)
        products.allow_fp16_reduced_precision_reduction = reduced


def by_torchrun(flags: Sequence[str], ranks: int) -> None:
    """The same on several ranks, processes of their own with as many threads as this one."""
    program = Path(str(importlib.import_module("run_pretrain").__file__))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, *launcher, str(program), *flags]
    subprocess.run(command, cwd=program.parent, env=environment, check=True, timeout=300)


def hash_of_tensors(data: bytes) -> str:
    """Of the contents of a safetensors file: names, types, shapes and bits, in the order of the names.

    The names are those of version 0.1, in which codes were `weight` and a layer's format was not stored beside them.
    """
    size = int.from_bytes(data[:8], "little")
    start, digest = 8 + size, hashlib.sha256()
    entries = {name.removesuffix("_qdata"): entry for name, entry in json.loads(data[8:start]).items()}
    for name, entry in sorted(entries.items()):
        if name != "__metadata__" and not name.endswith(".weight_format"):
            begin, end = entry["data_offsets"]
            digest.update(f"{name} {entry['dtype']} {entry['shape']}".encode() + data[start + begin : start + end])
    return digest.hexdigest()[:16]


def main(argv: Sequence[str] | None = None) -> None:
    """The recorder."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.golden.record", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="file or folder to write to; default: tests/golden")
    parser.add_argument("--tree", type=Path, help="checkout whose code is run; default: this one")
    parser.add_argument("--threads", type=int, default=1, help="threads on the CPU; default: 1, as in the tests")
    parser.add_argument("--runs", nargs="+", metavar="NAME", help="only these")
    args = parser.parse_args(argv)
    unknown = set(args.runs or ()) - set(names(args.device))
    if unknown:
        parser.error(f"no runs on {args.device}: {sorted(unknown)}; there are: {names(args.device)}")
    if args.out is None and (args.runs or args.tree or args.threads != 1):
        parser.error("give --out FILE: what lies in tests/golden is of all runs, of this checkout, on one thread")
    sys.path.insert(0, str((args.tree or FOLDER.parent.parent).resolve()))
    torch.set_num_threads(args.threads)
    here, lines = place(args.device), {}
    for name in args.runs or names(args.device):
        with tempfile.TemporaryDirectory() as folder:
            lines[name] = run(name, args.device, Path(folder))
    out = args.out or path_for(here)
    out = out / path_for(here).name if out.is_dir() else out
    Recording(here, lines).write(out)
    print(f"{out}: {len(lines)} runs in {json.dumps(here)}")


if __name__ == "__main__":
    main()
