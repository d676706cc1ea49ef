"""What waits in host memory takes the bytes that are planned there and on the device, and the time that is counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from peft_pretraining.build import build_training
from peft_pretraining.config.parse import parse_args
from peft_pretraining.config.run_config import RunArgs
from peft_pretraining.errors import UserError
from peft_pretraining.memory.budget import parse_within_budget
from peft_pretraining.memory.candidates import Candidates
from peft_pretraining.memory.host import missing_host_memory
from peft_pretraining.memory.lasting import GRADIENTS, REFRESHES, SLOTS, lasting_bytes
from peft_pretraining.memory.offloaded import offloaded
from peft_pretraining.memory.plan import plan
from peft_pretraining.memory.planned_run import PlannedRun
from peft_pretraining.models.registry import read_config
from peft_pretraining.speed.cards import CARDS, SHARE_OF_LINK
from peft_pretraining.speed.host_link import link_bytes
from peft_pretraining.speed.run_speed import counted_seconds, setting_of
from qgalore.optimizer import LowRankAdamW
from tests.small_run import FULL_RANK, SmallRun, flags_of
from tests.test_offload import updates

Q_GALORE = "--optimizer q_galore_adamw8bit_per_layer --dataset pydocs --device cuda"
PAGE = 4096


def run(model: str, flags: str) -> RunArgs:
    return parse_args(["--model_config", model, *Q_GALORE.split(), *flags.split()])


def planned(model: str, flags: str) -> tuple[float, float]:
    """GB at the peak of the device, and in host memory."""
    found = plan(run(model, flags), read_config(f"configs/llama_{model}.json"))
    return found.peak_bytes / 1e9, found.host / 1e9


STREAMING = flags_of("q_galore_adamw8bit_per_layer") | {"subspace": "streaming", "norm_growth": 1.01}


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (STREAMING, "states"),
        (STREAMING, "weights"),
        (FULL_RANK, "weights"),
        (FULL_RANK | {"momentum_rank": "1/8"}, "weights"),
        (flags_of("galore_adamw8bit_per_layer"), "states"),
    ],
    ids=["streaming", "streaming_weights", "full_rank", "in_parts", "float_weights"],
)
def test_blocks_and_slots_are_those_of_the_plan(tmp_path: Path, flags: dict[str, object], what: str) -> None:
    small = SmallRun(tmp_path, layers=3)
    args = parse_args(small.argv("run", flags | {"offload": what, "batch_size": 8, "cuda_graphs": "off"}))
    model, optimizer = build_training(args, torch.device("cpu"))
    assert isinstance(optimizer, LowRankAdamW) and optimizer.offload is not None
    updates(model, optimizer, 3)
    run_ = PlannedRun(args, read_config(args.model.model_config))
    expected = offloaded(run_)
    kinds = {"bases": optimizer.offload._bases, "moments": optimizer.offload._moments}
    kinds |= {} if optimizer.offload._weights is None else {"weights": optimizer.offload._weights}
    for name, part in kinds.items():
        on_host = [-(-block.host.nbytes // PAGE) * PAGE for block in part._blocks.values()]
        assert sum(on_host) == getattr(expected, name).on_host, name
        assert [slot.buffer.numel() for slot in part._slots if slot.buffer is not None] == [
            getattr(expected, name).of_layer
        ] * (2 if on_host else 0)
    # All else that lasts is where it would be without.
    waiting = {id(x) for part in kinds.values() for block in part._blocks.values() for x in block.tensors}
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [x for state in optimizer.state.values() for key, x in state.items() if key not in ("step", "schedule")]
    here = sum(x.nbytes for x in tensors if id(x) not in waiting and x.dtype != torch.float64)
    lasting = lasting_bytes(run_)
    assert here == sum(size for name, size in lasting.items() if name not in (SLOTS, GRADIENTS, REFRESHES))
    assert lasting[SLOTS] == expected.in_slots > 0


@pytest.mark.parametrize(
    ("model", "flags", "device", "host"),
    [
        ("13b", "--total_batch_size 512 --batch_size 64 --offload weights", 10, 80),
        ("30b", "--total_batch_size 256 --batch_size 64 --offload weights", 24, 120),
        ("70b", "--total_batch_size 128 --batch_size 32 --offload weights --recipe orthogonal --rank 1024", 80, 137),
        ("70b", "--total_batch_size 128 --batch_size 32 --offload states --recipe orthogonal --rank 1024", 80, 137),
    ],
)
def test_large_models_are_planned_to_fit(model: str, flags: str, device: float, host: float) -> None:
    """As docs/guide/offload.md says, with updates made layer by layer; 128 GiB are 137 GB."""
    peak, on_host = planned(model, f"{flags} --accumulate_by layer")
    assert peak < device and on_host < host
    if "--rank 1024" in flags:  # codes, bases and one moment, with embeddings and head
        whole = plan(run(model, f"{flags} --accumulate_by layer"), read_config("configs/llama_70b.json"))
        assert 80e9 < whole.weights_and_states_bytes < 91e9


def test_the_plan_prints_what_is_on_the_host() -> None:
    text = plan(run("1b", "--batch_size 8 --offload weights"), read_config("configs/llama_1b.json")).table()
    assert "slots for layers from host memory" in text and "GB of weights and states of layers" in text
    assert "hidden states" not in text


def test_host_memory_that_is_not_free_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = run("13b", "--total_batch_size 512 --batch_size 16 --offload weights")
    assert missing_host_memory(args, free=26 * 10**9) is None
    message = missing_host_memory(args, free=20 * 10**9)
    assert message is not None and "--offload weights keeps 25.78 GB of weights and optimizer states in" in message
    assert "5.78 GB are missing. Free them, or use --offload states" in message
    both = missing_host_memory(
        run("13b", "--total_batch_size 512 --batch_size 16 --offload states --accumulate_by layer"), 0
    )
    assert both is not None and "53.69 GB of hidden states and --offload states keeps 12.89 GB" in both
    monkeypatch.setattr("peft_pretraining.memory.host.free_host_bytes", lambda: 1000)
    small = SmallRun(tmp_path)
    assert small.main("refused", **flags_of("adamw"), offload="states") == 2
    assert "--offload states keeps 0.00 GB of optimizer states" in capsys.readouterr().err
    assert not (small.folder / "refused").exists()


# ---- time


def test_copies_are_counted_where_they_take_longer_than_what_computes() -> None:
    config, card = read_config("configs/llama_13b.json"), CARDS["h100"]
    stays = run("13b", "--total_batch_size 512 --batch_size 16 --accumulate_by layer")
    waits = run("13b", "--total_batch_size 512 --batch_size 16 --accumulate_by layer --offload weights")
    assert counted_seconds(stays, config, card) == counted_seconds(waits, config, card), (
        "hidden behind 32 micro-batches"
    )
    moved = link_bytes(waits, setting_of(waits, config))
    # Codes in the forward and in the backward pass, moments with that; three rows of hidden states a layer.
    states = link_bytes(stays, setting_of(stays, config)).beside_passes
    assert states == 3 * plan(stays, config).hidden_states
    codes = offloaded(PlannedRun(waits, config)).weights.on_host
    assert moved.beside_passes - states == pytest.approx(3 * codes, rel=0.01)
    slow = card._replace(link=0.1)
    alone = moved.total / (0.1e9 * SHARE_OF_LINK)
    assert alone > counted_seconds(stays, config, card)
    assert counted_seconds(waits, config, slow) == pytest.approx(alone)
    plain = run("13b", "--total_batch_size 512 --batch_size 16")
    assert counted_seconds(plain, config, slow) == counted_seconds(plain, config, card)


def test_micro_batches_one_after_the_other_copy_weights_for_each() -> None:
    config = read_config("configs/llama_1b.json")
    once, eight = (run("1b", f"--batch_size 8 --total_batch_size {8 * n} --offload weights") for n in (1, 8))
    codes = offloaded(PlannedRun(once, config)).weights.on_host
    first, all_ = (link_bytes(args, setting_of(args, config)) for args in (once, eight))
    assert all_.beside_passes == pytest.approx(16 * codes, rel=0.01) and first.of_step == 0 < all_.of_step


def test_every_card_has_a_link() -> None:
    """PCI Express 4.0 or 5.0 over 8 or 16 lanes."""
    assert {card.link for card in CARDS.values()} == {15.75, 31.5, 63.0}
    assert (
        CARDS["4090"].link == 31.5 and CARDS["h100"].link == CARDS["5090"].link == 63.0 and CARDS["4060"].link == 15.75
    )


# ---- the budget


def test_a_budget_offloads_where_nothing_else_fits() -> None:
    argv = ["--model_config", "1b", *Q_GALORE.split(), "--total_batch_size", "8"]
    smallest = Candidates([*argv, "--memory_budget", "1GB"]).smallest
    fits = f"{smallest.needs // 10**6 + 1}MB"
    args = parse_within_budget([*argv, "--memory_budget", fits], card=CARDS["h100"])
    assert args.runtime.offload == "none" and args.subspace.rank != "full"
    below = f"{smallest.needs // 10**6 - 50}MB"
    args = parse_within_budget([*argv, "--memory_budget", below], card=CARDS["h100"])
    assert args.runtime.offload != "none" and args.subspace.rank == "full"
    assert args.notes[-1].endswith(f"nothing fits without --offload {args.runtime.offload}")
    assert plan(args, read_config("configs/llama_1b.json")).peak_bytes <= args.runtime.memory_budget
    with pytest.raises(UserError, match=r"too small: the least that works is .*with --offload weights"):
        parse_within_budget([*argv, "--memory_budget", "100MB"], card=CARDS["h100"])
    with pytest.raises(UserError, match=r"too small: the least that works is (?!.*offload)"):
        parse_within_budget([*argv, "--memory_budget", "100MB", "--offload", "none"], card=CARDS["h100"])
