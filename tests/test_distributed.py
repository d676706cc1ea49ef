"""The collectives of a `World` and the rendezvous, on one rank and on several."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from peft_pretraining.errors import UserError
from peft_pretraining.runtime import process, rendezvous, world
from peft_pretraining.runtime.rendezvous import world_size_of_launch
from peft_pretraining.runtime.signals import StopRequest
from peft_pretraining.runtime.world import World, start_world
from tests.small_run import on_ranks, restored_process


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    with restored_process():
        yield


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> World:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return start_world("cpu", StopRequest())


def test_plain_python_is_one_rank(alone: World) -> None:
    assert (alone.rank, alone.world_size, alone.device.type, alone.is_main) == (0, 1, "cpu", True)
    assert world_size_of_launch() == 1 and not torch.distributed.is_initialized()
    tensor = torch.ones(3)
    alone.all_reduce(tensor)
    assert torch.equal(tensor, torch.ones(3))
    assert alone.gradient_all_reduce() is None
    assert alone.sum_on_host(7) == 7 and alone.gather("x") == ["x"] and alone.from_main(lambda: 5) == 5
    alone.check_replicas({"weight": tensor}, 1)
    alone.close()


def test_what_fails_on_the_main_rank_fails(alone: World) -> None:
    def fail() -> int:
        raise UserError("a sentence")

    with pytest.raises(UserError, match="a sentence"):
        alone.from_main(fail)


def test_the_launcher_says_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert world_size_of_launch() == 8


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_auto_takes_the_cpu_where_there_is_nothing_else(alone: World) -> None:
    assert start_world("auto", StopRequest()).device.type == "cpu"
    with pytest.raises(UserError, match="--device cuda: no CUDA device is visible"):
        start_world("cuda", StopRequest())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_more_ranks_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", str(torch.cuda.device_count()))
    with pytest.raises(UserError, match=r"--nproc_per_node started rank \d+ of this machine"):
        start_world("auto", StopRequest())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_segments_of_device_memory_can_grow() -> None:
    """In a process of its own: the allocator reads its settings once."""
    code = """
import torch
from peft_pretraining.runtime.world import start_world
from peft_pretraining.runtime.signals import StopRequest
start_world("cuda", StopRequest())
kept = torch.zeros(1 << 20, device="cuda")
assert all(segment["is_expandable"] for segment in torch.cuda.memory_snapshot())
"""
    environment = {key: value for key, value in os.environ.items() if "ALLOC_CONF" not in key}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def talk(folder: str) -> int:
    """One of several ranks: says everything that can be said and writes down what it heard."""
    world = start_world("cpu", StopRequest())
    rank = world.rank
    heard: dict[str, object] = {"is_main": world.is_main, "size": world.world_size}
    tensor = torch.full((2,), float(rank + 1))
    reduce = world.gradient_all_reduce()
    assert reduce is not None
    waiting = reduce(tensor)
    assert waiting is not None
    waiting.wait()
    heard["sum"] = tensor.tolist()
    heard["host_sum"] = world.sum_on_host(10**12 + rank)
    heard["gathered"] = world.gather({"rank": rank, "list": [rank] * rank})
    heard["from_main"] = world.from_main(lambda: f"said by {rank}")

    def fail() -> int:
        raise UserError(f"refused by {rank}")

    try:
        world.from_main(fail)
    except UserError as error:
        heard["refusal"] = str(error)
    codes = torch.arange(6, dtype=torch.uint8).reshape(2, 3).T  # not contiguous
    world.check_replicas({"codes": codes, "empty": torch.empty(0), "scale": torch.ones(1).bfloat16()}, 4)
    broken = {"same": codes, "other": torch.tensor([0.0, -0.0][rank == world.world_size - 1])}
    try:
        world.check_replicas(broken, 9)
    except UserError as error:
        heard["replicas"] = str(error)
    world.close()
    assert not torch.distributed.is_initialized()
    (Path(folder) / str(rank)).write_text(json.dumps(heard))
    return 0


@pytest.mark.parametrize("ranks", [2, 3])
def test_several_ranks_agree(tmp_path: Path, ranks: int) -> None:
    assert on_ranks(ranks, talk, str(tmp_path)) == [0] * ranks
    heard = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(ranks)]
    total = ranks * (ranks + 1) / 2
    for rank, each in enumerate(heard):
        assert each["is_main"] == (rank == 0) and each["size"] == ranks
        assert each["sum"] == [total, total]
        assert each["host_sum"] == ranks * 10**12 + ranks * (ranks - 1) // 2, "beyond what float32 counts exactly"
        assert each["gathered"] == [{"rank": r, "list": [r] * r} for r in range(ranks)]
        assert each["from_main"] == "said by 0" and each["refusal"] == "refused by 0"
        assert "--check_replicas: after 9 updates" in each["replicas"]
    # Minus zero is another bit pattern, on the last rank alone.
    assert "(other)" in heard[-1]["replicas"] and "same" not in heard[-1]["replicas"]


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> torch.distributed.TCPStore:
    """A store that outlives the ranks, as torchrun's over its restarts."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("WORLD_SIZE", "3")
    return store


def test_a_start_sees_nothing_of_the_starts_before(launcher: torch.distributed.TCPStore) -> None:
    """Whichever rank is first, and although ranks of earlier starts asked and were answered."""
    launcher.set("ask/2", "a rank that was killed while it waited")
    stop = StopRequest()
    for attempt in range(6):
        with ThreadPoolExecutor(3) as ranks:
            order = [(attempt + i) % 3 for i in range(3)]
            met = {rank: ranks.submit(world.agree_on_store, rank, 3, stop) for rank in order}
            stores = {rank: each.result(timeout=30) for rank, each in met.items()}
        assert not stores[0].check(["address"]), "left by the start before"
        stores[2].set("address", f"of attempt {attempt}")
        assert stores[0].get("address") == stores[1].get("address") == f"of attempt {attempt}".encode()


def test_ranks_that_do_not_come(launcher: torch.distributed.TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "TIMEOUT", timedelta(seconds=1.2))
    for rank in (0, 1):
        with pytest.raises(UserError, match="not all 3 ranks started within 0 minutes: start torchrun on all machines"):
            world.agree_on_store(rank, 3, StopRequest())


def test_a_signal_ends_the_wait_for_other_ranks(launcher: torch.distributed.TCPStore) -> None:
    for rank in (0, 1):
        stop = StopRequest()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(UserError, match="SIGTERM came while this rank waited for the others"):
            world.agree_on_store(rank, 3, stop)


@pytest.mark.parametrize(("ranks", "at_once"), [("1", False), ("2", True)])
def test_one_of_several_ranks_leaves_at_once(ranks: str, at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    monkeypatch.setenv("WORLD_SIZE", ranks)
    monkeypatch.setattr(process.os, "_exit", left.append)
    with pytest.raises(SystemExit) as end:
        process.leave(2)
    assert end.value.code == 2 and left == ([2] if at_once else [])


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("[/pytorch/third_party/gloo/pair.cc:537] Read error [127.0.0.1]:41654: Connection reset by peer", True),
        ("NCCL error in: x.cpp:1, remote process exited or there was a network error, NCCL version 2.27.3", True),
        (
            "NCCL error in: x.cpp:1, invalid usage\nDuplicate GPU detected : rank 0 and rank 1 both on CUDA device",
            False,
        ),
    ],
)
def test_a_failed_collective_keeps_its_cause(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, lost: bool
) -> None:
    """Only where another rank is gone there is nothing to look for on this one."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(process, "_end_at_once", sys.exit)

    def collective_of_the_run() -> None:
        raise RuntimeError(text)

    with pytest.raises(SystemExit, match="1"):
        process.exit_code_of(collective_of_the_run, "run_pretrain.py")
    said = capsys.readouterr().err
    assert text.splitlines()[-1] in said
    assert ("another rank has ended" in said) == lost
    assert ("in collective_of_the_run" in said) != lost
