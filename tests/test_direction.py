"""Directions of low-rank updates, several updates at once, residuals of the projection, the limit on growing norms."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qgalore import (
    GaLoreAdamW,
    GaLoreAdamW8bit,
    QGaLoreAdamW8bit,
    WeightFormat,
    convert_linears,
    kernels,
    low_rank_param_groups,
)
from qgalore.layer.linear import LowRankLinear
from qgalore.subspace.fira import full_direction
from qgalore.subspace.fit import rotate_moment
from qgalore.update import moments
from qgalore.update.directions import ADAM_BY_ROW, DIRECTIONS, orthogonal_directions
from qgalore.update.weight import Weight
from tests.kernels.comparison import step_row


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (16, 16)])
def test_orthogonalized_matrices_have_singular_values_near_1(shape: tuple[int, int]) -> None:
    matrix = normal(*shape)
    u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
    (found,) = orthogonal_directions([matrix * 1e-6])
    found = found / (0.2 * max(shape) ** 0.5)
    inner = u.T @ found @ vt.T
    assert ((inner.diagonal() > 0.6) & (inner.diagonal() < 1.3)).all(), values
    assert (inner - inner.diagonal().diag()).abs().max() < 1e-3


def trained(
    shape: tuple[int, int] = (24, 40), kind: type[GaLoreAdamW] = GaLoreAdamW, **keys: object
) -> tuple[nn.Linear, GaLoreAdamW, Weight]:
    """A linear layer, its optimizer and weight."""
    model = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False))
    layer = model[0]
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        layer.weight.copy_(normal(*shape, seed=5))
    growth = {"norm_growth": keys.pop("norm_growth", 0.0)}
    groups = low_rank_param_groups(model, ["0"], rank=8, scale=0.5, subspace="streaming", **keys)
    optimizer = kind([group for group in groups if group["params"]], lr=0.1, **growth)  # type: ignore[arg-type]
    (weight,) = optimizer.low_rank_weights()
    return layer, optimizer, weight


def bases(weight: Weight) -> tuple[Tensor | None, Tensor | None]:
    """As they are before a refresh."""
    weight.init_state()
    left, right = weight.subspace.stored.read("left"), weight.subspace.stored.read("right")
    return None if left is None else left.clone(), None if right is None else right.clone()


def update(layer: nn.Linear, optimizer: GaLoreAdamW, grad: Tensor) -> Tensor:
    """One update with this gradient; what it took away from the weight."""
    before = layer.weight.detach().clone()
    layer.weight.grad = grad.clone()
    optimizer.step()
    optimizer.zero_grad()
    return before - layer.weight.detach()


@pytest.mark.parametrize("kind", [GaLoreAdamW, GaLoreAdamW8bit])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_an_orthogonal_step_is_muons_in_the_subspace(shape: tuple[int, int], kind: type[GaLoreAdamW]) -> None:
    layer, optimizer, weight = trained(shape, kind, direction="orthogonal", update_proj_gap=100)
    for step in range(3):
        grad = normal(*shape, seed=step)
        left, right = bases(weight)
        momentum = moments.read_moment(weight.state, "exp_avg").clone()  # in the newest basis
        projected = grad if left is None else left @ grad
        projected = projected if right is None else projected @ right.T
        momentum = 0.9 * momentum + 0.1 * projected
        taken = update(layer, optimizer, grad)
        (direction,) = orthogonal_directions([0.9 * momentum + 0.1 * projected])
        assert 0.15 < float(direction.square().mean().sqrt()) < 0.25
        expected = direction if left is None else left.T @ direction
        expected = expected if right is None else expected @ right
        torch.testing.assert_close(taken, 0.1 * 0.5 * expected, rtol=1e-4, atol=1e-5)
    assert "exp_avg" in weight.state and "exp_avg_sq" not in weight.state


def test_directions_are_grouped_up_to_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the weights of one rank, and each weight gets its own: what comes out does not depend on how many wait."""
    shapes, ranks = [(24, 40), (40, 24), (24, 24), (40, 24)], [8, 8, 6, 8]
    values = [rank * max(shape) for rank, shape in zip(ranks, shapes, strict=True)]
    calls: list[list[int]] = []

    orthogonalize = kernels.orthogonalize

    def noted(momenta: Sequence[Tensor], *how: Any) -> list[Tensor]:
        calls.append([momentum.numel() for momentum in momenta])
        return orthogonalize(momenta, *how)

    monkeypatch.setattr("qgalore.kernels.orthogonalize", noted)

    def trained_weights(limit: int) -> list[Tensor]:
        monkeypatch.setitem(DIRECTIONS, "orthogonal", DIRECTIONS["orthogonal"]._replace(batch_values=limit))
        layers = nn.ModuleList(nn.Linear(columns, rows, bias=False) for rows, columns in shapes)
        for index, layer in enumerate(layers):
            layer.weight.data.copy_(normal(*shapes[index], seed=index))  # type: ignore[operator, union-attr]
        keys: dict[str, object] = {"subspace": "streaming", "direction": "orthogonal", "update_proj_gap": 2}
        groups: list[dict[str, object]] = [
            {"params": [layer.weight], "rank": rank, "scale": 0.5, **keys}
            for layer, rank in zip(layers, ranks, strict=True)
        ]
        optimizer = GaLoreAdamW(groups, lr=0.1)
        for step in range(3):
            for index, layer in enumerate(layers):
                layer.weight.grad = normal(*shapes[index], seed=10 * step + index)
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()
        return [layer.weight.detach() for layer in layers]  # type: ignore[operator, union-attr]

    together = trained_weights(1 << 24)
    assert calls == 3 * [[values[0], values[1], values[3]], [values[2]]]
    calls.clear()
    in_two = trained_weights(values[0])
    assert calls == 3 * [[values[0], values[1]], [values[2]], [values[3]]]
    calls.clear()
    alone = trained_weights(0)
    assert calls == 3 * [[count] for count in values]
    for one, other, third in zip(together, in_two, alone, strict=True):
        assert torch.equal(one, other) and torch.equal(one, third)


def test_small_quantized_weights_are_updated_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as have no more values than a limit; what comes out does not depend on it."""
    shapes = [(64, 96), (96, 64), (64, 64), (96, 64), (64, 64)]
    values = [16 * max(shape) for shape in shapes]
    calls: dict[str, list[int]] = {"adam_steps": [], "update_quantized_": []}
    for name, counts in calls.items():
        function = getattr(kernels, name)

        def noted(given: Sequence[object], *rest: object, function: Any = function, counts: Any = counts) -> object:
            counts.append(len(given))
            return function(given, *rest)

        monkeypatch.setattr(kernels, name, noted)

    def trained_layers(limit: int, clip: float | None = None) -> list[Tensor]:
        for counts in calls.values():
            counts.clear()
        monkeypatch.setitem(DIRECTIONS, "adam", DIRECTIONS["adam"]._replace(batch_values=limit))
        model = nn.ModuleDict({f"l{i}": nn.Linear(n, m, bias=False) for i, (m, n) in enumerate(shapes)})
        for index, linear in enumerate(model.values()):
            linear.weight.data.copy_(normal(*shapes[index], seed=index))
        # One is float, and goes alone.
        convert_linears(model, ["l0", "l1", "l2", "l3"], WeightFormat(8, 32))
        groups = low_rank_param_groups(model, list(model), rank=16, subspace="streaming", update_proj_gap=2, scale=0.5)
        optimizer = QGaLoreAdamW8bit([group for group in groups if group["params"]], lr=0.1)
        optimizer.attach(model, update_in_backward=False)
        for step in range(3):
            for index, layer in enumerate(model.values()):
                layer(normal(4, shapes[index][1], seed=10 * step + index)).square().sum().backward()
            if clip is not None:
                optimizer.clip_grad_norm_(clip)
            optimizer.step()
            optimizer.zero_grad()
        states = [value for state in optimizer.state.values() for value in state.values()]
        return [*model.state_dict().values(), *states]

    for clip in (None, 1.0):
        together = trained_layers(1 << 20, clip)
        assert calls == {"adam_steps": 3 * [5], "update_quantized_": 3 * [4]}
        in_two = trained_layers(values[0] + values[1], clip)
        assert calls == {"adam_steps": 3 * [3, 2], "update_quantized_": 3 * [3, 1]}
        alone = trained_layers(0, clip)
        assert calls["adam_steps"] == 15 * [1]
        for one, other, third in zip(together, in_two, alone, strict=True):
            assert torch.equal(one, other) and torch.equal(one, third)


def test_updates_of_layers_are_those_of_each() -> None:
    layers = [LowRankLinear(normal(20, 64, seed=seed), None, WeightFormat(8, 32)) for seed in range(3)]
    alone = copy.deepcopy(layers)
    directions, bases = [normal(4, 64, seed=10 + i) for i in range(3)], [normal(4, 20, seed=20 + i) for i in range(3)]
    how = [(0.1, 0.9, 5), (0.0, 1.0, 6), (0.2, 0.8, 7)]
    updates = [
        layer.quantized_update(direction, basis, None, step_row(*numbers))
        for layer, direction, basis, numbers in zip(layers, directions, bases, how, strict=True)
    ]
    stays = layers[1].weight.clone()
    kernels.update_quantized_(updates)
    for layer, direction, basis, numbers in zip(alone, directions, bases, how, strict=True):
        layer.update_(direction, basis, None, step_row(*numbers))
    for one, other in zip(layers, alone, strict=True):
        assert all(torch.equal(one.state_dict()[key], value) for key, value in other.state_dict().items())
    assert torch.equal(layers[1].weight, stays), "a learning rate of 0"
    float_layer = LowRankLinear(normal(20, 64), None, WeightFormat())
    with pytest.raises(ValueError, match="float"):
        float_layer.quantized_update(directions[0], bases[0], None, step_row(*how[0]))
    # Autograd has to see what a kernel writes, unless CUDA graphs run the layer.
    layers[2].allow_backward_after_update()
    before = [layer.weight._version for layer in layers]
    for layer in layers:
        layer.was_written()
    assert [layer.weight._version > old for layer, old in zip(layers, before, strict=True)] == [True, True, False]


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_a_refresh_rotates_both_moments(shape: tuple[int, int]) -> None:
    layer, optimizer, weight = trained(shape, update_proj_gap=100)
    (side,) = weight.subspace.sides
    weight.init_state()
    old, grad = weight.subspace.stored.read(side).clone(), normal(*shape)
    update(layer, optimizer, grad)  # and the first refresh
    projected, change = old @ grad if side == "left" else grad @ old.T, weight.subspace.stored.read(side) @ old.T
    for power, (name, share) in enumerate((("exp_avg", 0.1), ("exp_avg_sq", 0.001)), start=1):
        expected = rotate_moment(share * projected**power, change, side, power)
        torch.testing.assert_close(weight.state[name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_residual_has_adams_size_in_each_column(side: str) -> None:
    rank, m, n = 4, 12, 20
    basis = torch.linalg.qr(normal(m if side == "left" else n, rank))[0].T
    full, dim = normal(m, n, seed=1), 0 if side == "left" else 1
    projected = basis @ full if side == "left" else full @ basis.T
    direction = normal(*projected.shape, seed=2)
    left, right = (basis, None) if side == "left" else (None, basis)
    found = full_direction(direction, projected, full, left, right)
    scales = direction.norm(dim=dim, keepdim=True) / projected.norm(dim=dim, keepdim=True)
    inside = basis.T @ projected if side == "left" else projected @ basis
    back = basis.T @ direction if side == "left" else direction @ basis
    torch.testing.assert_close(found, back + scales * (full - inside), rtol=1e-4, atol=1e-5)
    none = full_direction(torch.zeros_like(direction), torch.zeros_like(projected), full, left, right)
    assert not none.any(), "nothing projected: no size to take"


def test_a_residual_reaches_the_weight() -> None:
    """An update moves the weight outside its subspace, unlike one without."""
    for kind, outside in (("none", False), ("fira", True)):
        layer, optimizer, weight = trained(residual=kind)
        left, _ = bases(weight)
        assert left is not None
        taken = update(layer, optimizer, normal(24, 40))
        beyond = taken - left.T @ (left @ taken)
        assert bool(beyond.norm() > 0.3 * taken.norm()) == outside
        assert weight.gradient._last_full is None, "not kept"


def test_the_residual_of_the_last_micro_batch_stands_for_all() -> None:
    """Three equal micro-batches are one three times as large."""
    grad = normal(24, 40)
    layer, optimizer, weight = trained(residual="fira")
    before = layer.weight.detach().clone()
    for last in (False, False, True):
        optimizer.is_last_micro_batch = last
        with torch.no_grad():
            weight.accumulate_full(grad)
        optimizer.cycle.gradients_ready([weight])
    optimizer.step()
    whole_layer, whole, _ = trained(residual="fira")
    torch.testing.assert_close(before - layer.weight.detach(), update(whole_layer, whole, 3 * grad))


def test_the_residual_is_that_of_the_last_micro_batch() -> None:
    _, optimizer, weight = trained(residual="fira")
    for seed in range(3):
        optimizer.is_last_micro_batch = seed == 2
        with torch.no_grad():
            weight.accumulate_full(normal(24, 40, seed=seed))
        optimizer.cycle.gradients_ready([weight])
    full = weight.gradient.full_of_last_micro_batch(torch.float32)
    assert full is not None and torch.equal(full, 3 * normal(24, 40, seed=2))


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_residual_of_a_layer_that_is_used_twice_is_that_of_both_uses(micro_batches: int) -> None:
    taken = []
    for form in ("used twice", "at once"):
        layer = LowRankLinear(normal(24, 40, seed=5), None, WeightFormat())
        optimizer = GaLoreAdamW([{"params": [layer.weight], "rank": 8, "residual": "fira"}], lr=0.1)
        optimizer.attach(layer)
        before = layer.weight.detach().clone()
        for number in range(micro_batches):
            optimizer.is_last_micro_batch = number + 1 == micro_batches
            inputs, grads = [normal(6, 40, seed=seed) for seed in (1, 2)], [normal(6, 24, seed=seed) for seed in (3, 4)]
            if form == "at once":
                inputs, grads = [torch.cat(inputs)], [torch.cat(grads)]
            torch.autograd.backward([layer(x) for x in inputs], grads)
        optimizer.step()
        taken.append(before - layer.weight.detach())
    torch.testing.assert_close(*taken)


def test_norms_grow_by_the_limit_at_most() -> None:
    layer, optimizer, weight = trained(norm_growth=1.1, update_proj_gap=100)
    direction = normal(24, 40)
    update(layer, optimizer, direction)  # and the first refresh
    first = float((weight.subspace.stored.read("left") @ direction).norm())
    weight.state["limited_norm"].zero_()
    weight.state["exp_avg"].zero_()
    sizes, limited = [1.0, 5.0, 1.05, 0.1, float("nan"), 1.0], [1.0, 1.1, 1.05, 0.1, 0.1, 0.11]
    mean = 0.0
    for size, expected in zip(sizes, limited, strict=True):
        update(layer, optimizer, direction * size)
        assert float(weight.state["limited_norm"]) == pytest.approx(expected * first, rel=1e-5)
        mean = 0.9 * mean + 0.1 * expected if size == size else mean
    # What reached the moments was the limited gradient.
    assert float(weight.state["exp_avg"].norm()) == pytest.approx(mean * first, rel=1e-4)


def test_norms_are_limited_and_clipped_at_once() -> None:
    layer, optimizer, weight = trained(norm_growth=1.1, update_proj_gap=100)
    direction = normal(24, 40)
    update(layer, optimizer, direction)  # and the first refresh
    norm = float((weight.subspace.stored.read("left") @ direction).norm())
    weight.state["limited_norm"].fill_(norm)
    weight.state["exp_avg"].zero_()
    layer.weight.grad = 5 * direction
    optimizer.clip_grad_norm_(2.5 * norm)  # to a half, before any limit
    optimizer.step()
    assert float(weight.state["exp_avg"].norm()) == pytest.approx(0.1 * 1.1 * norm * 0.5, rel=1e-4)


# ---- second moments of rows


def adam_by_row(weight: Tensor, grads: list[Tensor], lr: float, betas: tuple[float, float]) -> Tensor:
    """Adam with Nesterov's momentum and one second moment a row, written down again."""
    value, first, second = weight.clone(), torch.zeros_like(weight), torch.zeros(len(weight), 1)
    for step, grad in enumerate(grads, start=1):
        first = betas[0] * first + (1 - betas[0]) * grad
        second = betas[1] * second + (1 - betas[1]) * grad.square().mean(1, keepdim=True)
        ahead = (betas[0] * first + (1 - betas[0]) * grad) / (1 - betas[0] ** (step + 1))
        value -= lr * ahead / ((second / (1 - betas[1] ** step)).sqrt() + 1e-8)
    return value


@pytest.mark.parametrize("shape", [(11, 24), (5000, 300)])  # the larger one is updated some of its rows at a time
def test_second_moments_of_rows(shape: tuple[int, int]) -> None:
    weight = nn.Parameter(normal(*shape))
    vector = nn.Parameter(torch.ones(7))
    before, lr, betas = weight.detach().clone(), 0.05, (0.8, 0.9)
    optimizer = GaLoreAdamW([weight, vector], lr=lr, betas=betas, weight_decay=0.0, second_moment="row")
    grads = [normal(*shape, seed=i) * (1 + torch.arange(len(before)))[:, None] for i in range(1, 5)]
    for grad in grads:
        weight.grad, vector.grad = grad.clone(), torch.ones(7)
        optimizer.step()
        assert weight.grad is not None and torch.equal(weight.grad, grad), "it is still the gradient"
    assert torch.allclose(weight, adam_by_row(before, grads, lr, betas), atol=1e-5)
    assert optimizer.state[weight].keys() == {"step", "exp_avg", "exp_avg_sq_row"}
    assert optimizer.state[weight]["exp_avg_sq_row"].shape == shape[:1]
    assert optimizer.state[vector].keys() == {"step", "exp_avg", "exp_avg_sq"}, "a vector has no rows"


def test_second_moments_of_rows_are_kept_in_a_skipped_update() -> None:
    weight = nn.Parameter(normal(6, 8))
    optimizer = GaLoreAdamW([weight], lr=0.1, second_moment="row")
    weight.grad = normal(6, 8, seed=1)
    optimizer.step()
    row = torch.tensor(kernels.StepScalars(1, 0.1, 1.0, 2.0, 3.0).pack(), dtype=torch.int32)
    state = optimizer.state[weight]
    kept = {name: value.clone() for name, value in state.items()}
    for skip in (torch.tensor(True), torch.tensor(False)):
        step = kernels.AdamStep(
            weight.grad, state["exp_avg"], None, state["exp_avg_sq_row"], None, row, (0.9, 0.99), 1e-8
        )
        ADAM_BY_ROW.advance([step], skip)
        same = [torch.equal(state[name], kept[name]) for name in ("exp_avg", "exp_avg_sq_row")]
        assert same == [bool(skip)] * 2


# ---- NorMuon


def test_normuon_is_muon_with_rows_of_one_size() -> None:
    shape, betas = (12, 40), (0.9, 0.5)
    weights = [nn.Parameter(normal(*shape)) for _ in range(2)]
    optimizers = [
        GaLoreAdamW(
            [{"params": [weight], "rank": "full", "direction": name, "galore_scale": 1.0}],
            lr=1.0,
            betas=betas,
            weight_decay=0.0,
        )
        for weight, name in zip(weights, ("orthogonal", "normuon"), strict=True)
    ]
    second = torch.zeros(shape[0])
    for step in range(1, 4):
        grad, moved = normal(*shape, seed=step) * torch.linspace(0.01, 5, shape[0])[:, None], []
        for weight, optimizer in zip(weights, optimizers, strict=True):
            before, weight.grad = weight.detach().clone(), grad.clone()
            optimizer.step()
            moved.append(before - weight.detach())
        muon, normuon = moved
        second = 0.5 * second + 0.5 * muon.square().mean(1)
        expected = muon / (second / (1 - 0.5**step)).sqrt()[:, None]
        expected *= muon.square().mean().sqrt() / expected.square().mean().sqrt()
        assert torch.allclose(normuon, expected, rtol=1e-3, atol=1e-5)
    assert torch.allclose(optimizers[1].state[weights[1]]["exp_avg_sq_row"], second, rtol=1e-4)


# ---- cautious decay


@pytest.mark.parametrize("storage", ["plain", "int8", "simulated"])
def test_cautious_decay_spares_what_grows(storage: str) -> None:
    """With a step too small to be seen, the weights that change are those that the direction moves towards zero."""
    layer = nn.Linear(32, 48, bias=False)
    model = nn.Sequential(layer)
    if storage != "plain":
        convert_linears(model, ["0"], WeightFormat(8, 16, stochastic_rounding=False, simulate=storage == "simulated"))
    groups = low_rank_param_groups(model, ["0"], rank="full", direction="adam", galore_scale=1e-9)
    optimizer = GaLoreAdamW(groups[1:], lr=0.5, weight_decay=0.8, cautious_decay=True)
    optimizer.attach(model)
    read = lambda: getattr(model[0], "dequantized_weight", lambda _: model[0].weight.detach().clone())(torch.float32)  # noqa: E731
    before = read().clone()
    model(normal(64, 32)).mul(normal(64, 48, seed=1)).sum().backward()
    gradient = normal(64, 48, seed=1).T @ normal(64, 32)
    optimizer.step()
    expected = before * torch.where(before * gradient >= 0, 0.6, 1.0)
    error = 1e-5 if storage == "plain" else 0.02 * float(before.detach().abs().max())
    assert torch.allclose(read(), expected, atol=error)
