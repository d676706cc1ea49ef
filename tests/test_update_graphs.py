"""Updates replayed from CUDA graphs inside somebody else's training loop: the bits of plain calls."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qgalore
from peft_pretraining.runtime.process import make_reproducible
from qgalore.graphs import updates
from qgalore.graphs.updates import UpdateGraphs
from qgalore.integrations import connect
from qgalore.layer.linear import LowRankLinear
from qgalore.optimizer import LowRankAdamW
from tests.recorded_graphs import record, record_kernels
from tests.test_layer_graphs import CASES, QUANTIZED, STREAMING, skip_for_kernels, trained

PER_LAYER = "_per_layer"
ONE_BY_ONE = ("streaming", "svd", "other side", "int4", "float weights", "recipe", "normuon", "full rank")
REPLAYED = {
    **{name: CASES[name] for name in (*ONE_BY_ONE, "momentum in parts", "rounding feedback")},
    "limited": f"{STREAMING} --norm_growth 1.01",
    # Where all weights are one batch, few updates are without a refresh.
    **{name: f"{CASES[name]} --update_proj_gap 50" for name in ("clipping", "sums", "int8 sums")},
    "second moments of rows": f"{QUANTIZED} --full_rank_second_moment row --update_proj_gap 50".replace(PER_LAYER, ""),
    "limited and clipped": (
        f"{STREAMING} --norm_growth 1.01 --grad_clipping 0.5 --update_proj_gap 50".replace(PER_LAYER, "")
    ),
}
IN_GATE = ("streaming", "svd", "sums", "limited and clipped")


class RecordedUpdates(UpdateGraphs):
    """The graphs on a CPU."""

    def _capture(self, device: torch.device, work: Any) -> Any:
        return record(work)


def attach_with(graphs: UpdateGraphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each optimizer that is attached replay its updates from these graphs."""
    attach = LowRankAdamW.attach
    monkeypatch.setattr(
        LowRankAdamW, "attach", lambda optimizer, *given, **named: attach(optimizer, *given, **named, replay=graphs)
    )


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> RecordedUpdates:
    skip_for_kernels(monkeypatch)
    record_kernels(monkeypatch)
    return RecordedUpdates()


@pytest.mark.parametrize(
    "case", [name if name in IN_GATE else pytest.param(name, marks=pytest.mark.slow) for name in REPLAYED]
)
def test_the_bits_of_plain_calls(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: RecordedUpdates
) -> None:
    """With refreshes of each subspace every third update, and one that is skipped."""
    flags = f"{REPLAYED[case]} --dtype float32"
    plain = trained(tmp_path, "cpu", flags, 16)
    attach_with(recorded, monkeypatch)
    assert trained(tmp_path, "cpu", flags, 16)[:2] == plain[:2]
    assert recorded.replays > 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("stream", ["default", "other"])
@pytest.mark.parametrize("case", REPLAYED)
def test_the_bits_of_plain_calls_on_a_gpu(
    case: str, stream: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags, graphs = f"{REPLAYED[case]} --cuda_graphs off", UpdateGraphs()
    make_reproducible()
    try:
        with torch.cuda.stream(torch.cuda.Stream()) if stream == "other" else contextlib.nullcontext():
            plain = trained(tmp_path, "cuda", flags, 16)
            attach_with(graphs, monkeypatch)
            replayed = trained(tmp_path, "cuda", flags, 16)
    finally:
        torch.use_deterministic_algorithms(False)
    assert replayed[:2] == plain[:2]
    assert graphs.replays > 2


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)) for _ in range(2)))


def hashed(model: nn.Module) -> list[list[float]]:
    return [value.float().flatten().tolist() for value in model.state_dict().values()]


class Loop:
    """A loop of somebody else's."""

    def __init__(self, graphs: UpdateGraphs | None) -> None:
        self.model = small_model()
        self.optimizer = qgalore.optimizer_for(self.model, rank=16, weight_bits=8, lr=1e-2)
        self.optimizer.attach(self.model, replay=graphs)

    def train(self, updates: int, seed: int = 0) -> None:
        for step in range(updates):
            x = torch.randn(32, 64, generator=torch.Generator().manual_seed(100 * seed + step))
            self.model(x).square().mean().backward()
            self.optimizer.clip_grad_norm_(1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()


@pytest.mark.parametrize("change", ["betas", "state", "lr", "moved"])
def test_a_graph_is_of_the_options_and_tensors_that_there_are(change: str, recorded: RecordedUpdates) -> None:
    """What changes in between is as without graphs: it is captured again, or read by the graph."""
    loops = [Loop(None), Loop(recorded)]
    before = 0
    for loop in loops:
        loop.train(6)
        state = copy.deepcopy(loop.optimizer.state_dict())
        loop.train(2, seed=1)
        before = len(captured(recorded))
        if change == "state":
            loop.optimizer.load_state_dict(state)
        for group in loop.optimizer.param_groups:
            if change == "betas":
                group["betas"] = (0.5, 0.9)
            if change == "lr":
                group["lr"] = 3e-2
        if change == "moved":
            for param in loop.model.parameters():
                param.data = param.data.clone()
        loop.train(1, seed=2)
        again = change != "lr" and loop is loops[1]
        assert len(captured(recorded)) == (0 if again else before)
        loop.train(5, seed=3)
    assert hashed(loops[0].model) == hashed(loops[1].model)
    assert len(captured(recorded)) == before > 0


def captured(graphs: UpdateGraphs) -> list[Any]:
    return [batch for batch in graphs._batches.values() if batch.graph is not None]


def test_what_is_too_large_or_one_of_many_goes_without(
    recorded: RecordedUpdates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(updates, "_MOST_BYTES", 8)
    loops = [Loop(None), Loop(recorded)]
    for loop in loops:
        loop.train(6)
    assert recorded.replays == 0 and hashed(loops[0].model) == hashed(loops[1].model)


def test_a_connection_replays_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for capture in (False, True):
        model = small_model()
        optimizer = qgalore.optimizer_for(model, rank=16, weight_bits=8)
        connection = connect(optimizer, model, capture_updates=capture)
        assert isinstance(optimizer.cycle.replay, UpdateGraphs) == capture
        connection.close()
        assert optimizer.cycle.replay is None


def test_batches_that_change_with_each_update_are_forgotten(
    recorded: RecordedUpdates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where tokens reach some experts and not others."""
    monkeypatch.setattr(updates, "_MOST_BATCHES", 3)
    loops = [Loop(None), Loop(recorded)]
    for loop in loops:
        layers = [each for each in loop.model.modules() if isinstance(each, (LowRankLinear, nn.LayerNorm))]
        for step in (*range(7), *range(7)):  # never all of them frozen
            for number, layer in enumerate(layers):
                layer.requires_grad_(not step >> number % 3 & 1)
            loop.train(1, seed=step)
            assert len(recorded._batches) <= 3
    assert hashed(loops[0].model) == hashed(loops[1].model)
