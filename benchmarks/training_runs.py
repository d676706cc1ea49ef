"""Train runs of `run_pretrain.py` in worker processes, one after another in each, and read what a run measured.

Starting PyTorch and compiling take as long as a third of a short run of 60M, and a worker does both once. A job is
whatever the program that asks makes of it; it travels as JSON, and so does the answer, a row of results or what went
wrong. A program gives its workers a command of its own that calls `work`.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import platform
import queue
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, TextIO, TypeVar

import torch
import torch._dynamo

from benchmarks.rows import ROOT, commit

Answer = dict[str, object]
J = TypeVar("J")

FAILED, STOPPED = "failed", "stopped"
"""Keys of an answer that is no row."""


# ---- the program that asks


class Worker:
    """A process that does one job after another, on `gpu` or on one that it chooses.

    It starts with its first job, and anew after one that failed: nobody knows what that has left on the device.
    """

    def __init__(self, command: Sequence[str], gpu: str = "", fresh: bool = False) -> None:
        """command: starts the process; gpu: its index, or ""; fresh: a process for each job."""
        self._command, self._gpu, self._fresh = command, gpu, fresh
        self._process: subprocess.Popen[str] | None = None
        self._stopping = False

    def answer(self, job: object) -> Answer:
        """Do a job; returns its answer, which has the key `failed` or `stopped` if there is no result."""
        if self._stopping:
            return {STOPPED: "before it began"}
        process = self._process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
        text = process.stdout.readline()
        found: Answer = json.loads(text) if text.endswith("\n") else {FAILED: "its worker has ended"}
        if FAILED in found or self._fresh:
            self.close()
        return {STOPPED: "while it began"} if FAILED in found and self._stopping else found

    def _start(self) -> subprocess.Popen[str]:
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": self._gpu} if self._gpu else {})
        # In a session of its own: Ctrl-C is for the program that asks, which stops its workers.
        return subprocess.Popen(
            self._command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip

    def stop(self) -> None:
        """Have the run that is being trained save its state and end."""
        self._stopping = True
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)

    def close(self) -> None:
        """Wait until the process has ended; it ends where it is given no more jobs."""
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None and process.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.wait()
            process.stdout.close()


def answers(
    jobs: Sequence[J], command: Sequence[str], gpus: Sequence[str], fresh: bool = False
) -> Generator[tuple[J, Answer], None, None]:
    """Do the jobs with a worker for each entry of `gpus`; yields (job, answer) as each is done.

    fresh: each job in a process of its own, which has no memory of others.
    On an exception, such as KeyboardInterrupt, runs that are being trained save their state before it goes on.
    """
    workers = [Worker(command, gpu, fresh) for gpu in gpus]
    idle: queue.Queue[Worker] = queue.Queue()
    for worker in workers:
        idle.put(worker)

    def answer_of(job: J) -> Answer:
        worker = idle.get()
        try:
            return worker.answer(job)
        finally:
            idle.put(worker)

    pool = ThreadPoolExecutor(len(workers))
    futures = {pool.submit(answer_of, job): job for job in jobs}
    try:
        for done in as_completed(futures):
            yield futures[done], done.result()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.stop()
        raise
    finally:
        pool.shutdown(wait=True)
        for worker in workers:
            worker.close()


# ---- a worker


def serve(measure: Callable[[Any], Answer]) -> None:
    """Do the jobs of standard input in this process, and answer on standard output, until it is closed."""
    stdout = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints is no answer
    work(sys.stdin, stdout, measure)


def work(asked: Iterable[str], stdout: TextIO, measure: Callable[[Any], Answer]) -> None:
    """Do the job of each input line and answer with a line; the output of a run is kept in case it fails.

    What `measure` raises becomes `failed`: a SystemExit with its own words, any other exception with its traceback.
    """
    for line in asked:
        job, printed = json.loads(line), io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            try:
                answer = measure(job)
            except SystemExit as end:
                answer = {FAILED: f"{printed.getvalue()[-3000:]}{end}"}
            except Exception:
                answer = {FAILED: printed.getvalue()[-3000:] + traceback.format_exc()}
        print(json.dumps(answer), file=stdout, flush=True)
        torch._dynamo.reset()  # of another model it would compile the same function again, and that only a few times
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def measurements(lines: Sequence[Mapping[str, float]]) -> Answer:
    """What the lines of the metrics.jsonl of a finished run say of it, with device, PyTorch's version and commit."""
    train = [line for line in lines if "train/loss" in line]
    speed = "throughput/tokens_per_second"
    speeds = sorted(line[speed] for line in train if speed in line) or [0.0]
    last, evaluation = train[-1], lines[-1]
    return {
        "perplexity": round(evaluation["eval/perplexity"], 3),
        "perplexity_official": round(evaluation["eval/perplexity_official"], 3),
        "eval_tokens": int(evaluation["eval/tokens"]),
        "tokens_per_second_median": round(speeds[len(speeds) // 2]),
        "peak_gb": round(last["memory/peak_gb"], 2),
        "reserved_gb": round(last.get("memory/reserved_gb", 0.0), 2),
        "refreshes": last.get("subspace/refreshes", 0),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "torch": torch.__version__,
        "commit": commit(),
    }
