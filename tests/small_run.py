"""A run of `run_pretrain.py` so small that a test can afford dozens: the files it needs, its command line, its results.

Time goes by the number of tensors here, so one layer is the rule. Hidden size 64 and rank 32 are chosen so that of
every kind of tensor some are there: embeddings and MLP gradients are large enough for 8-bit moments, attention's are
not; groups of 48 leave a ragged one at the end of every row.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import run_pretrain
from peft_pretraining.build import build_training
from peft_pretraining.checkpoint.store import Checkpoint, list_checkpoints, load_checkpoint
from peft_pretraining.config.flag_groups import FULL_RANK_OPTIMIZERS, GALORE_OPTIMIZERS, Q_GALORE_OPTIMIZERS
from peft_pretraining.config.parse import parse_args
from peft_pretraining.config.run_config import RunArgs
from peft_pretraining.memory.dealt_states import prepare_mesh
from peft_pretraining.models.network import CausalLM
from peft_pretraining.reporting.jsonl import deterministic_metrics, read_metrics
from peft_pretraining.runtime.signals import StopRequest
from peft_pretraining.runtime.world import World, start_world
from qgalore.optimizer import LowRankAdamW
from tests.golden.record import restored_process

ROOT = Path(__file__).resolve().parent.parent
OPTIMIZERS = (*FULL_RANK_OPTIMIZERS, *GALORE_OPTIMIZERS, *Q_GALORE_OPTIMIZERS)
VOCAB = 256
CONFIG = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
    "tie_word_embeddings": False,
}
DEFAULTS: Mapping[str, object] = {
    "batch_size": 4,
    "total_batch_size": 8,
    "max_length": 32,
    "data_lanes": 8,
    "workers": 0,
    "dtype": "float32",
    "device": "cpu",
    "optimizer": "adamw",
    "num_training_steps": 8,
    "warmup_steps": 0,
    "save_every": 0,
    "eval_every": 0,
    "eval_tokens": 400,
    "unset_wandb": True,
}
LOW_RANK: Mapping[str, object] = {"rank": 32, "update_proj_gap": 3, "proj_group_size": 48}
Q_GALORE: Mapping[str, object] = {
    "recipe": "paper",
    "weight_quant": True,
    "weight_group_size": 48,
    "stochastic_round": True,
    "proj_quant": True,
}
FULL_RANK: Mapping[str, object] = {
    "optimizer": "q_galore_adamw8bit_per_layer", "recipe": "orthogonal", "rank": "full", "weight_quant": True,
    "weight_group_size": 48, "stochastic_round": True,
}  # fmt: skip
RECIPE: Mapping[str, object] = {"recipe": None, "rank": None, "lr": None}
"""Beside the flags of a q_galore optimizer: its default recipe decides."""
INT8_PRODUCTS: Mapping[str, object] = {"int8_products": True, "weight_group_size": None}
# The largest steps that are safe for each; what a test of learning needs.
LEARNING_RATES = {"sgd": 1.0}


def flags_of(optimizer: str) -> dict[str, object]:
    """The flags that go with an optimizer's name, as in the recipes."""
    flags: dict[str, object] = {"optimizer": optimizer, "lr": LEARNING_RATES.get(optimizer, 1e-2)}
    if "galore" in optimizer:
        flags |= LOW_RANK
    if optimizer.startswith("q_galore"):
        flags |= Q_GALORE
    return flags


def token_stream(count: int, seed: int) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """A chain in which four tokens of about equal probability follow each token: entropy ln 4."""
    noise = np.random.default_rng(seed).integers(0, 4, count)
    ids = np.zeros(count, np.uint16)
    for i in range(1, count):
        ids[i] = (3 * int(ids[i - 1]) + 7 + 31 * int(noise[i])) % VOCAB
    return ids


@cache
def _streams() -> tuple[bytes, bytes]:
    return token_stream(40_000, 1).tobytes(), token_stream(2_000, 2).tobytes()


def write_text(folder: Path, words: int = 200, documents: int = 300) -> dict[str, object]:
    """A folder in C4's layout whose documents have 1 to 40 words, and a tokenizer; returns the flags that name them."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir()
    random = np.random.default_rng(3)
    for split, count in (("train", documents), ("validation", documents // 5)):
        texts = [" ".join(f"w{i}" for i in random.integers(0, words, random.integers(1, 41))) for _ in range(count)]
        with gzip.open(folder / f"c4-{split}.00000-of-00001.json.gz", "wt") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    vocab = {name: i for i, name in enumerate(["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(words))])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return {"dataset": folder, "tokenizer": folder / "tokenizer.json", "shuffle_buffer": 4}


@dataclass(frozen=True)
class Result:
    """What a finished run left in its folder."""

    save_dir: Path

    @property
    def lines(self) -> list[dict[str, Any]]:
        """metrics.jsonl without what is measured."""
        return [deterministic_metrics(line) for line in read_metrics(self.save_dir)]

    @property
    def train_lines(self) -> list[dict[str, Any]]:
        """Of these, the lines of updates."""
        return [line for line in self.lines if "train/loss" in line]

    @property
    def losses(self) -> list[float]:
        """The training loss of every update."""
        return [line["train/loss"] for line in self.train_lines]

    @property
    def eval_loss(self) -> float:
        """The last one."""
        return float([line["eval/loss"] for line in self.lines if "eval/loss" in line][-1])

    @property
    def checkpoints(self) -> list[Path]:
        """Oldest first."""
        return list_checkpoints(self.save_dir)

    def checkpoint(self, update_step: int | None = None) -> Checkpoint:
        """The checkpoint of an update step; without one, the newest."""
        path = self.checkpoints[-1] if update_step is None else self.save_dir / f"step_{update_step:08d}"
        return load_checkpoint(path)

    def weights(self, update_step: int | None = None) -> dict[str, Tensor]:
        """The model's float tensors, quantized ones dequantized."""
        tensors = self.checkpoint(update_step).model_tensors
        values = {}
        for key, tensor in tensors.items():
            name = key.removesuffix("_qdata")
            scale, zero_point = tensors.get(f"{name}_scale"), tensors.get(f"{name}_zero_point")
            if tensor.is_floating_point() and not name.endswith(("_scale", "_zero_point")):
                values[name] = tensor
            elif scale is not None and zero_point is not None:
                columns = tensor.shape[1]
                group_size = columns if scale.shape[1] == 1 else 48
                wide = [t.float().repeat_interleave(group_size, 1)[:, :columns] for t in (scale, zero_point)]
                values[name] = tensor.float() * wide[0] + wide[1]
        return values


class SmallRun:
    """Runs in one folder that share model and data."""

    def __init__(self, folder: Path, layers: int = 1) -> None:
        self.folder = folder
        self.config, self.data = folder / "small.json", folder / "tokens"
        self.config.write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
        self.data.mkdir()
        for name, content in zip(("train", "validation"), _streams(), strict=True):
            (self.data / f"{name}.uint16").write_bytes(content)

    def argv(self, name: str, flags: Mapping[str, object] = {}) -> list[str]:
        """The command line of the run `name`; True is a switch, False its --no- form, None leaves a default out."""
        values = DEFAULTS | {"model_config": self.config, "dataset": self.data, "save_dir": self.folder / name} | flags
        argv: list[str] = []
        for flag, value in values.items():
            if isinstance(value, bool):
                argv.append(f"--{flag}" if value else f"--no-{flag}")
            elif value is not None:
                argv += [f"--{flag}", str(value)]
        return argv

    def main(self, name: str, **flags: object) -> int:
        """`run_pretrain.main` in this process; returns its exit code."""
        with restored_process():
            return run_pretrain.main(self.argv(name, flags))

    def run(self, name: str, **flags: object) -> Result:
        """The same for a run that must end well."""
        assert self.main(name, **flags) == 0
        return self.result(name)

    def run_on(self, ranks: int, name: str, **flags: object) -> Result:
        """The same on several ranks, processes of their own over gloo."""
        flags = {"batch_size": 2} | flags
        assert on_ranks(ranks, run_pretrain.main, self.argv(name, flags)) == [0] * ranks
        return self.result(name)

    def stop(self, name: str, at: int, micro_batch: int = 1, number: int = signal.SIGTERM, **flags: object) -> Result:
        """A run that gets a signal after `at` updates, before the given micro-batch of the next."""
        with stopping(at, micro_batch, number):
            return self.run(name, **flags)

    def result(self, name: str) -> Result:
        """What is in the folder of the run `name`."""
        return Result(self.folder / name)

    def copy(self, source: str, name: str) -> None:
        """A second folder with what the run `source` left."""
        shutil.copytree(self.folder / source, self.folder / name)


@contextlib.contextmanager
def stopping(at: int, micro_batch: int, number: int) -> Iterator[None]:
    """Every run in this process sends itself a signal after `at` updates, before a micro-batch of the next one."""
    update = run_pretrain.Run.update

    def send(*_: object) -> None:
        os.kill(os.getpid(), number)

    def update_with_signal(run: run_pretrain.Run) -> bool:
        if run.update_step != at:
            return update(run)
        if micro_batch == 1:
            send()
            return update(run)
        calls = itertools.count(1)
        # The hook of the pass before: the signal comes while that one is computed.
        hook = run.model.register_forward_pre_hook(lambda *_: send() if next(calls) == micro_batch - 1 else None)
        try:
            return update(run)
        finally:
            hook.remove()

    with mock.patch.object(run_pretrain.Run, "update", update_with_signal):
        yield


# ---- several processes


def environment(**extra: str) -> dict[str, str]:
    """For processes that are started here: one thread each."""
    return os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"} | extra


def start(argv: Sequence[str], launcher: Sequence[str] = ()) -> subprocess.Popen[str]:
    """`python run_pretrain.py` (or `python -m <launcher> run_pretrain.py`) as a process of its own."""
    command = [sys.executable, *launcher, str(ROOT / "run_pretrain.py"), *argv]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def torchrun(ranks: int, *options: str) -> tuple[str, ...]:
    """What `start` puts before the program for that many ranks on this machine, with more of torchrun's options."""
    return ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), *options)


TORCHRUN = torchrun(2)


def ranks_of(launcher: subprocess.Popen[str]) -> list[int]:
    """Process ids of the ranks that torchrun started, in their order."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # a process may end meanwhile
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher.pid and b"run_pretrain.py" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
    return sorted(found)


def build_on_rank(argv: list[str]) -> tuple[RunArgs, World, CausalLM, LowRankAdamW]:
    """On one of the two ranks of `on_ranks`: what a run with `--shard` has built before it loads or reads anything."""
    args, world = parse_args(argv, 2), start_world("cpu", StopRequest())
    mesh = world.shard_mesh(args.runtime.shard)
    assert mesh is not None
    prepare_mesh(mesh, args)
    model, optimizer = build_training(args, world.device, None, mesh)
    assert isinstance(optimizer, LowRankAdamW)
    return args, world, model, optimizer


def on_ranks(ranks: int, function: Callable[..., int | None], *args: Any, log: Path | None = None) -> list[int | None]:
    """Call a function on several ranks, as torchrun would start them; returns the exit codes."""
    processes = start_ranks(ranks, function, *args, log=log)
    end = time.monotonic() + _PATIENCE_SECONDS
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def start_ranks(
    ranks: int, function: Callable[..., int | None], *args: Any, log: Path | None = None, **variables: str
) -> list[ForkServerProcess]:
    """The same without waiting for their end, with more variables in their environment.

    The ranks are forked from one process that has loaded torch, and what a run loads and reads first: that saves five
    seconds a rank. What they print goes to the file `log`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    port = _free_port()
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)} for rank in range(ranks)]
    master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common = master | variables
    processes = [context.Process(target=_rank, args=(place | common, log, function, args)) for place in places]
    for process in processes:
        process.start()
    return processes


_PATIENCE_SECONDS = 600.0
"""Ranks that take longer hang; a busy machine was seen to need 125 s for what takes 20 alone."""
_PORTS = itertools.count(os.getpid() * 97)


def _free_port() -> int:
    """A port below those that systems give out by themselves: nobody else is given it before a rank listens on it."""
    for number in _PORTS:
        port = 10_000 + number % 20_000
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise AssertionError("unreachable")


def _rank(
    variables: dict[str, str], log: Path | None, function: Callable[..., int | None], args: tuple[Any, ...]
) -> None:
    os.environ |= variables
    if log is not None:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
    torch.set_num_threads(1)
    sys.exit(function(*args))


# ---- comparisons


def assert_same_bits(a: object, b: object, where: str = "") -> None:
    """Equal all the way down, tensors to the bit."""
    assert type(a) is type(b), where
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict) and isinstance(b, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same_bits(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_bits(x, y, f"{where}/{index}")
    else:
        assert a == b, where


def assert_same_run(a: Result, b: Result) -> None:
    """Two runs that ended with the same weights, optimizer state, data order and metrics, bit for bit."""
    one, other = a.checkpoint(), b.checkpoint()
    assert one.update_step == other.update_step
    assert_same_bits(one.model_tensors, other.model_tensors, "model")
    assert_same_bits(one.optimizer_state, other.optimizer_state, "optimizer")
    assert_same_bits(one.state["data"], other.state["data"], "data")
    assert a.lines == b.lines
