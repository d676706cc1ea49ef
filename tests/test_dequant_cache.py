"""A layer's quantized matrices are dequantized once a pass, with the bits of one by one, and never used when stale."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qgalore import QGaLoreAdamW8bit, WeightFormat, convert_linears, kernels, low_rank_param_groups
from qgalore.graphs import dequant_cache
from qgalore.graphs.dequant_cache import cached_bases, cached_weights
from qgalore.graphs.runner import LayerGraphs
from qgalore.layer.linear import LowRankLinear
from qgalore.update.weight import Weight
from tests.kernels.comparison import step_row
from tests.test_layer_graphs import CASES, record_graphs, trained

MATRICES = 3
"""Low-rank matrices of a `Block`."""


class Block(nn.Module):
    """Square, wide and tall matrices, of which a side is ragged; a norm beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.square, self.up, self.down = nn.Linear(24, 24, False), nn.Linear(24, 37, False), nn.Linear(37, 24, False)
        self.norm = nn.LayerNorm(24)
        self.recomputed = False

    def forward(self, x: Tensor) -> Tensor:
        if self.recomputed:
            out: Tensor = checkpoint(self._run, x, use_reentrant=False)
            return out
        return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        out: Tensor = x + self.down(self.up(self.square(x)).relu())
        return out


class Training:
    """Two blocks behind `LayerGraphs`, with quantized weights and bases."""

    def __init__(self, format: WeightFormat | None = None, at_once: bool = True, recomputed: bool = False) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(Block(), Block())
        names = [name for name, module in self.model.named_modules() if isinstance(module, nn.Linear)]
        convert_linears(self.model, names, format or WeightFormat(8, 16))
        for block in self.model:
            block.recomputed = recomputed
        groups = low_rank_param_groups(self.model, names, rank=4, quant_group_size=16, subspace="streaming")
        self.optimizer = QGaLoreAdamW8bit(groups, lr=0.01)
        self.optimizer.attach(self.model, update_in_backward=at_once)
        self.layers = LayerGraphs(list(self.model), lambda layer, x: layer(x), self.optimizer)

    def step(self, micro_batches: int = 1) -> None:
        for left in reversed(range(micro_batches)):
            self.optimizer.is_last_micro_batch = left == 0
            x = torch.randn(5, 24, generator=torch.Generator().manual_seed(left)).requires_grad_()
            self.layers(x).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def until_no_refresh(self) -> Training:
        while any(weight.subspace.due for weight in self.optimizer.low_rank_weights()):
            self.step()
        return self

    @property
    def linears(self) -> list[LowRankLinear]:
        return [module for module in self.model.modules() if isinstance(module, LowRankLinear)]

    @property
    def weights(self) -> list[Weight]:
        return list(self.optimizer.low_rank_weights())

    @property
    def nothing_is_held(self) -> bool:
        cached = any(layer.cached_weight is not None for layer in self.linears)
        return not cached and not any(weight.subspace.stored.cached for weight in self.weights)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of matrices of each call into the door to dequantize."""
    found: list[int] = []
    dequantize = kernels.dequantize

    def counted(matrices: Sequence[kernels.QuantizedMatrix], dtype: torch.dtype) -> list[Tensor]:
        found.append(len(matrices))
        return dequantize(matrices, dtype)

    monkeypatch.setattr(kernels, "dequantize", counted)
    yield found


@pytest.mark.parametrize("recomputed", [False, True])
def test_a_layer_dequantizes_once_forward_and_twice_backward(recomputed: bool, calls: list[int]) -> None:
    training = Training(recomputed=recomputed).until_no_refresh()
    calls.clear()
    training.step()
    assert calls == [MATRICES] * 2 * (1 + 2), "weights forward; bases, for gradient and update, and weights backward"
    assert training.nothing_is_held


def test_every_micro_batch_dequantizes_once(calls: list[int]) -> None:
    training = Training().until_no_refresh()
    calls.clear()
    training.step(micro_batches=3)
    # The updates come when all gradients are there, with what is not held any longer: the bases of a batch at once.
    assert calls == [MATRICES] * 3 * 2 * (1 + 2) + [2 * MATRICES]


def test_one_by_one_above_the_limit(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training().until_no_refresh()
    bases = sum(4 * 4 * min(layer.out_features, layer.in_features) for layer in training.linears[:MATRICES])
    monkeypatch.setattr(dequant_cache, "CACHE_BYTES", bases)
    calls.clear()
    training.step()
    assert calls == 2 * [1] * MATRICES + 2 * ([MATRICES] + [1] * MATRICES), "bases fit, weights do not"
    monkeypatch.setattr(dequant_cache, "CACHE_BYTES", bases - 1)
    calls.clear()
    training.step()
    assert calls == 2 * [1] * MATRICES + 2 * ([1] * 2 * MATRICES + [MATRICES]), "bases of a batch of updates at once"


def test_nothing_is_made_where_nothing_is_dequantized(calls: list[int]) -> None:
    training = Training(WeightFormat(8, int8_products=True)).until_no_refresh()
    calls.clear()
    training.step()
    assert calls == 2 * [MATRICES], "bases"
    training = Training(WeightFormat()).until_no_refresh()
    calls.clear()
    training.step()
    assert calls == 2 * [MATRICES], "bases"


@pytest.mark.parametrize(
    ("case", "sums"),
    [
        ("streaming", True),
        ("svd", False),
        ("checkpointing", False),
        ("int4", False),
        ("sums", False),
        ("recipe", False),
    ],
)
def test_the_bits_are_those_of_one_by_one(
    case: str, sums: bool, tmp_path: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    record_graphs(monkeypatch)
    flags = f"{CASES[case]} --dtype float32"
    together = trained(tmp_path, "cpu", flags, sums=sums)
    assert calls.count(7) > 9 * 3
    calls.clear()
    monkeypatch.setattr(dequant_cache, "CACHE_BYTES", 0)
    assert trained(tmp_path, "cpu", flags, sums=sums)[:2] == together[:2]
    of_updates = {count for count in calls if count % 7 == 0}
    assert set(calls) - of_updates == {1, 2}, "two where one product takes the weights of queries and keys"


def test_a_held_weight_is_that_of_its_own(calls: list[int]) -> None:
    layers = Training().linears
    expected = [layer.padded_weight(torch.bfloat16) for layer in layers]
    with cached_weights(layers, torch.bfloat16):
        calls.clear()
        assert all(
            torch.equal(layer.padded_weight(torch.bfloat16), w) for layer, w in zip(layers, expected, strict=True)
        )
        assert not calls
        layers[0].padded_weight(torch.float32)
        assert calls == [1], "another dtype is made as ever"
        assert copy.deepcopy(layers[0]).cached_weight is None
    assert all(layer.cached_weight is None for layer in layers)


def test_a_weight_is_not_held_beyond_its_update() -> None:
    training = Training()
    changed, other = training.linears[:2]
    with cached_weights([changed, other], torch.float32):
        before = changed.padded_weight(torch.float32)
        changed.update_(torch.ones(24, 24), None, None, step_row(0.1, 1.0, 0))
        assert not torch.equal(changed.padded_weight(torch.float32), before)
        assert changed.cached_weight is None and other.cached_weight is not None


def refresh(training: Training) -> None:
    """New bases of all weights, in the places of the old ones."""
    for weight in training.weights:
        for side in weight.subspace.sides:
            rank, d = weight.subspace.stored.quantized()[side].shape
            sketch = torch.randn(rank, d, generator=torch.Generator().manual_seed(7))
            weight.subspace.refresh_from_sketches({side: sketch}, weight.rotate_moments, None)


def load(training: Training) -> None:
    """The state of another training."""
    other = Training()
    other.step()
    refresh(other)
    training.optimizer.load_state_dict(other.optimizer.state_dict())


def add_a_group(training: Training) -> None:
    training.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})


@pytest.mark.parametrize("change", [refresh, load, add_a_group, lambda training: training.optimizer.zero_grad()])
def test_bases_are_not_held_beyond_what_they_were_made_of(change: Callable[[Training], None]) -> None:
    training = Training()
    training.step()
    weights = training.weights
    before = [weight.subspace.stored.read(weight.subspace.sides[0]) for weight in weights]
    with cached_bases(weights, torch.float32):
        for bases in (weight.subspace.stored for weight in weights):
            assert bases.read(bases.sides[0]) is bases.cached[bases.sides[0]]
        change(training)
        assert not any(weight.subspace.stored.cached for weight in weights)
        after = [weight.subspace.stored.read(weight.subspace.sides[0]) for weight in weights]
    changes = [not torch.equal(old, new) for old, new in zip(before, after, strict=True)]  # type: ignore[arg-type]
    assert all(changes) if change in (refresh, load) else not any(changes)


def test_bases_are_forgotten_with_the_end_of_their_update() -> None:
    training = Training().until_no_refresh()
    (block, _), weights = training.model, training.weights[:MATRICES]
    training.optimizer.is_last_micro_batch = False
    with cached_bases(weights, torch.float32):
        block(torch.randn(5, 24)).square().sum().backward()
        assert all(weight.subspace.stored.cached for weight in weights), "a micro-batch is no update"
        training.optimizer.is_last_micro_batch = True
        block(torch.randn(5, 24)).square().sum().backward()
        training.optimizer.step()
        assert not any(weight.subspace.stored.cached for weight in weights)


def test_nothing_is_held_beyond_an_error() -> None:
    training = Training()
    training.step()
    with (
        pytest.raises(RuntimeError, match="a layer failed"),
        cached_weights(training.linears, torch.float32),
        cached_bases(training.weights, torch.float32),
    ):
        assert not training.nothing_is_held
        raise RuntimeError("a layer failed")
    assert training.nothing_is_held
