"""Layers with one input as one node: the same outputs and gradients, the input read once for all projections."""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import os
import pickle
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.symbolic_convert import InstructionTranslatorBase
from torch._dynamo.utils import counters
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from peft_pretraining.models.llama.config import LlamaConfig
from peft_pretraining.models.llama.modeling import LlamaForCausalLM
from qgalore import LowRankLinear, QGaLoreAdamW8bit, WeightFormat, convert_linears, low_rank_param_groups
from qgalore.graphs.dequant_cache import cached_bases, cached_weights
from qgalore.layer import autograd_op, linear
from qgalore.layer.gradient_sink import GradientSink
from qgalore.layer.layout import as_one_view, new_stack
from qgalore.layer.linear import grouped_linear
from qgalore.subspace import fit, methods
from tests.sinks import FactorSink
from tests.small_run import ROOT

CONFIG = LlamaConfig.from_dict(
    {
        "vocab_size": 130,
        "hidden_size": 96,
        "intermediate_size": 342,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
)

FORMATS = {
    "int8": WeightFormat(bits=8),
    "int4": WeightFormat(bits=4),
    "float": WeightFormat(),
    "int8 products": WeightFormat(bits=8, int8_products=True),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Sink(FactorSink):
    """`basis` is what it asks to have multiplied; or it wants the `whole` gradient."""

    def __init__(self, basis: Tensor | None = None, whole: bool = False) -> None:
        self.basis, self.whole = basis, whole

    def forms_gradient(self, input: Tensor) -> bool:
        return self.whole

    def input_basis(self, input: Tensor) -> Tensor | None:
        return self.basis

    def accumulate_full(self, grad: Tensor) -> None:
        self.gradient = grad


# ---- adjacent matrices


def test_adjacent_matrices_are_found_in_one_storage() -> None:
    whole = torch.arange(60.0).view(6, 10)
    assert as_one_view([whole[:2], whole[2:5]], 0).equal(whole[:5])  # type: ignore[union-attr]
    columns = as_one_view([whole[:, 1:3], whole[:, 3:4], whole[:, 4:9]], 1)
    assert columns is not None and columns.equal(whole[:, 1:9]) and columns.data_ptr() == whole[:, 1:].data_ptr()
    stack = new_stack(whole, [(2, 10), (3, 10)], torch.bfloat16)
    assert [m.shape for m in stack] == [(2, 10), (3, 10)] and stack[0].dtype == torch.bfloat16
    assert as_one_view(stack, 0) is not None


@pytest.mark.parametrize(
    ("case", "dim"), [("order", 0), ("gap", 0), ("width", 0), ("copy", 0), ("order", 1), ("gap", 1), ("rows", 1)]
)
def test_what_only_looks_adjacent(case: str, dim: int) -> None:
    whole = torch.zeros(6, 12)
    a, b = {
        ("order", 0): (whole[2:4], whole[:2]),
        ("gap", 0): (whole[:2], whole[3:4]),
        ("width", 0): (whole[:2], whole[2:, :6]),
        ("copy", 0): (whole[:2], whole.clone()[2:4]),
        ("order", 1): (whole[:, 4:8], whole[:, :4]),
        ("gap", 1): (whole[:, :4], whole[:, 5:8]),
        ("rows", 1): (whole[:1], whole[1:2]),
    }[case, dim]
    assert as_one_view([a, b], dim) is None


# ---- the node


def layers_of(format: WeightFormat, outputs: Sequence[int], inputs: int = 24) -> list[LowRankLinear]:
    return [LowRankLinear(normal(rows, inputs, seed=i), None, format) for i, rows in enumerate(outputs)]


@pytest.mark.parametrize("adjacent", [True, False])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("outputs", [(16, 8, 40), (16, 16), (21, 10, 7)], ids=str)
def test_several_layers_make_what_each_makes_alone(outputs: tuple[int, ...], format: str, adjacent: bool) -> None:
    layers, x = layers_of(FORMATS[format], outputs), normal(2, 5, 24, seed=9).requires_grad_()
    both = normal(2, 5, sum(outputs), seed=10)
    grads = list(both.split(list(outputs), dim=-1))
    if not adjacent:
        grads = [grad.clone() for grad in grads]
    alone = list[Tensor]()
    for layer, grad in zip(layers, grads, strict=True):
        layer.attach(Sink())
        y = layer(x)
        alone += [y.detach(), *torch.autograd.grad(y, x, grad)]
    expected = [(layer.sink.grad_output, layer.sink.input) for layer in layers]  # type: ignore[union-attr]
    ys = grouped_linear(x, layers, adjacent=2)
    (gradient,) = torch.autograd.grad(ys, x, grads)
    assert len({y.grad_fn for y in ys}) == 1
    assert all(torch.equal(y, expected_y) for y, expected_y in zip(ys, alone[::2], strict=True))
    torch.testing.assert_close(gradient, sum(alone[1::2]), rtol=1e-4, atol=1e-4)
    for layer, factors in zip(layers, expected, strict=True):
        assert isinstance(layer.sink, Sink) and layer.sink.projected is None
        assert torch.equal(layer.sink.grad_output, factors[0]) and torch.equal(layer.sink.input, factors[1])


def test_a_layer_without_an_optimizer_or_frozen_or_of_another_kind_is_run_alone() -> None:
    first, second = layers_of(WeightFormat(), (8, 8))
    x, other = normal(3, 24).requires_grad_(), nn.Linear(24, 8)
    for layers in ([first, second], [first, other]):
        assert all(torch.equal(y, layer(x)) for y, layer in zip(grouped_linear(x, layers), layers, strict=True))
    for layer in (first, second):
        layer.attach(Sink())
    second.weight.requires_grad_(False)
    grouped_linear(x, [first, second])[0].sum().backward()
    assert not hasattr(second.sink, "input") and hasattr(first.sink, "input")


def test_biases_are_added() -> None:
    layers = [
        LowRankLinear(normal(rows, 24), nn.Parameter(normal(rows)), WeightFormat(8), pads_output=rows == 21)
        for rows in (8, 21)
    ]
    x = normal(3, 24)
    expected = [layer(x) for layer in layers]
    for layer in layers:
        layer.attach(Sink())
    ys = grouped_linear(x, layers)
    assert [y.shape for y in ys] == [(3, 8), (3, 32)]
    assert all(map(torch.equal, ys, expected))
    ys[1].sum().backward()
    assert layers[1].bias is not None and torch.equal(layers[1].bias.grad, torch.full((21,), 3.0))  # type: ignore[arg-type]


# ---- what PyTorch is told of the operators


@pytest.mark.parametrize(("inputs", "outputs"), [(24, (16, 24)), (21, (21, 10, 7))], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_the_operators_are_what_they_are_declared_to_be(format: str, inputs: int, outputs: tuple[int, ...]) -> None:
    """Schema, autograd, shapes without data, and tracing; the operator of the sinks shows its effect in these alone."""
    layers = [
        LowRankLinear(normal(rows, inputs, seed=i), None, FORMATS[format], pads_output=i == 0)
        for i, rows in enumerate(outputs)
    ]
    for layer in layers:
        layer.attach(Sink())
    operators, x = torch.ops.qgalore, normal(2, 5, inputs, seed=9)
    stored, handles = [tensor for layer in layers for tensor in layer._stored], [layer.handle for layer in layers]
    storage, widths = list(layers[0]._storage), [layer.width for layer in layers]
    adjacent = 2 if format != "int8 products" else 1
    grads = [normal(2, 5, width) for width in widths]
    for proxies in ([layer.proxy for layer in layers], []):
        arguments = (x.clone().requires_grad_(), stored, proxies, handles, storage, widths, adjacent, False)
        opcheck(operators.grouped_linear.default, arguments)
    accumulate = operators.grouped_linear_accumulate.default
    opcheck(accumulate, (grads, x, handles, inputs, adjacent))
    assert accumulate(grads, x, handles, inputs, adjacent).tolist() == [0.0] * len(layers)
    detached = [tensor.detach() for tensor in stored]
    opcheck(operators.grouped_linear_input_gradient.default, (grads, detached, handles, storage, inputs, None))


class Recorded(TorchDispatchMode):
    """Remembers the names of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names = list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("adjacent", [1, 2])
@pytest.mark.parametrize("format", FORMATS)
def test_who_traces_sees_operators_and_all_others_go_round_them(format: str, adjacent: int) -> None:
    layers, x = layers_of(FORMATS[format], (16, 16, 40)), normal(2, 5, 24, seed=9).requires_grad_()
    grads, found = [normal(2, 5, rows, seed=rows) for rows in (16, 16, 40)], list[list[Tensor]]()
    for layer in layers:
        layer.attach(Sink())
    recorded = Recorded()
    for mode, node in (
        (contextlib.nullcontext(), "_GroupedLinearBackward"),
        (recorded, "GeneratedBackwardFor_qgalore_grouped_linear_defaultBackward"),
    ):
        with mode:
            ys = grouped_linear(x, layers, adjacent=adjacent)
        assert type(ys[0].grad_fn).__name__ == node
        gradients = torch.autograd.grad(ys, [x, *(layer.proxy for layer in layers)], grads)  # type: ignore[list-item]
        sinks = [layer.sink for layer in layers]
        found.append([*ys, *gradients, *(part for sink in sinks for part in (sink.grad_output, sink.input))])  # type: ignore[union-attr]
    assert "qgalore::grouped_linear" in recorded.names
    assert all(map(torch.equal, *found)) and [each.shape for each in found[0][4:7]] == [()] * 3


def test_a_backward_pass_that_is_compiled_by_itself_gives_the_same() -> None:
    found = []
    for compiled in (False, True):
        net, optimizer = attached(Net())
        optimizer.attach(net)  # an update inside of it would be traced, too
        torch._dynamo.reset()
        backend = torch.compile(backend="aot_eager")
        with torch._dynamo.compiled_autograd._enable(backend) if compiled else contextlib.nullcontext():
            for update in range(3):
                net(normal(64, 48, seed=update)).square().sum().backward()
                optimizer.step()
        found.append([layer.dequantized_weight(torch.float32) for layer in net.layers])
    assert all(map(torch.equal, *found))


def test_a_gradient_of_a_gradient_is_refused() -> None:
    layer, x = layers_of(WeightFormat(8), (8,))[0], normal(3, 24).requires_grad_()
    layer.attach(Sink())
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_a_frozen_layer_has_second_derivatives(format: str) -> None:
    """As the penalty of a gradient through a frozen model needs them."""
    layer, found = layers_of(FORMATS[format], (8,))[0].requires_grad_(False), list[Tensor]()
    weight = layer.dequantized_weight(torch.float32)
    for product in (layer, lambda x: x @ weight.T):
        x = normal(3, 24).requires_grad_()
        (gradient,) = torch.autograd.grad(product(x).pow(3).sum(), x, create_graph=True)
        found += torch.autograd.grad(gradient.square().sum(), x)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("format", [FORMATS["int8"], FORMATS["int4"], FORMATS["float"]], ids=["int8", "int4", "float"])
@pytest.mark.parametrize("subspace", ["svd", "streaming"])
def test_one_compilation_serves_all_layers_through_refreshes(format: WeightFormat, subspace: str) -> None:
    plain = attached(Net(), format, subspace=subspace)
    pairs = [attached(Net(), format, subspace=subspace, update_proj_gap=gap) for gap in (3, 2, 4)]
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(Net.forward, fullgraph=True, dynamic=False, backend="aot_eager")
    for update in range(7):
        for net, optimizer in pairs:
            compiled(net, normal(64, 48, seed=update)).square().sum().backward()
            optimizer.step()
    assert counters["stats"]["unique_graphs"] == 1
    expected = trained(*plain)
    assert all(map(torch.equal, [layer.dequantized_weight(torch.float32) for layer in pairs[0][0].layers], expected))


def test_a_compiler_has_little_to_trace_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each start traces it anew, from whatever cache: a third of the first update of 60M, where all is compiled."""
    net, _ = attached(Net())
    torch._dynamo.reset()
    instructions = Counter[str]()
    step = InstructionTranslatorBase.step

    def counted(translator: InstructionTranslatorBase) -> Any:
        instructions[translator.f_code.co_name] += 1
        return step(translator)

    monkeypatch.setattr(InstructionTranslatorBase, "step", counted)
    torch.compile(Net.forward, fullgraph=True, dynamic=False, backend="aot_eager")(net, normal(4, 48))
    assert 0 < instructions.total() <= 650, instructions


_START = """
import json, torch
from torch._dynamo.utils import counters
from tests.test_linear_operator import Net, attached, normal
net, optimizer = attached(Net())
compiled = torch.compile(lambda layer, x: layer(x), fullgraph=True, dynamic=False)  # nothing that needs a C++ compiler
compiled(net.q, normal(4, 48)).square().sum().backward()
print(json.dumps({name: counters[kind][name] for kind, name in NAMES}))
"""


@pytest.mark.slow
def test_a_second_start_finds_all_that_was_compiled(tmp_path: Path) -> None:
    """Opaque operands, and effects more so, are what PyTorch may refuse to keep on disk: every start would compile."""
    kinds = ("autograd_cache", "aot_autograd"), ("fxgraph_cache", "inductor")
    names = [(kind, f"{name}_{how}") for name, kind in kinds for how in ("hit", "miss", "bypass")]
    found = []
    for _ in range(2):
        started = subprocess.run(
            [sys.executable, "-c", f"NAMES = {names}\n{_START}"], cwd=ROOT, capture_output=True, text=True, check=False,
            env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert started.returncode == 0, started.stderr
        found.append(json.loads(started.stdout.splitlines()[-1]))
    first, second = found
    assert first["autograd_cache_miss"] == 1 and first["fxgraph_cache_miss"] == 2, first
    hits = {"autograd_cache_hit": 1, "fxgraph_cache_hit": 2}
    assert second == dict.fromkeys(second, 0) | hits, second


def test_what_is_compiled_keeps_no_weight_alive() -> None:
    net, optimizer = attached(Net())
    torch._dynamo.reset()
    compiled = torch.compile(Net.forward, fullgraph=True, dynamic=False, backend="aot_eager")
    compiled(net, normal(4, 48)).square().sum().backward()
    kept = [weakref.ref(net.q), *map(weakref.ref, (net.q.weight, *optimizer.low_rank_weights()))]
    del net, optimizer
    gc.collect()
    assert [reference() for reference in kept] == [None] * 5


def test_copies_of_an_operand_refer_to_nothing() -> None:
    """torch.compile makes some, and with them would copy the optimizer."""
    (layer,) = layers_of(WeightFormat(8), (16,))
    layer.attach(Sink())
    layer.cached_weight = layer.padded_weight(torch.float32)
    for copied in (copy.copy(layer.handle), copy.deepcopy(layer.handle), pickle.loads(pickle.dumps(layer.handle))):
        assert isinstance(copied, autograd_op.WeightHandle) and copied.sink is None and copied.cached is None
    assert len(pickle.dumps(layer.handle)) < 200 and layer.sink is not None


@pytest.mark.parametrize("part", ["weight", "weight_scale", "weight_zero_point"])
def test_a_backward_pass_through_what_was_written_in_between_is_refused(part: str) -> None:
    (layer,) = layers_of(WeightFormat(8), (16,))
    layer.attach(Sink())
    y = layer(normal(3, 24).requires_grad_())
    getattr(layer, part).data.flatten()[0] += 1  # behind autograd's back
    torch.autograd.graph.increment_version(getattr(layer, part))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ---- projections


def test_an_input_is_projected_once_for_all_that_want_it() -> None:
    stack = new_stack(torch.empty(0), [(3, 24), (5, 24)], torch.float32)
    for basis, values in zip(stack, (normal(3, 24), normal(5, 24, seed=1)), strict=True):
        basis.copy_(values)
    x = normal(7, 24, seed=2)
    for bases in (stack, [basis.clone() for basis in stack]):
        found = autograd_op.project_grouped([Sink(basis) for basis in bases], x)
        for projected, basis in zip(found, bases, strict=True):
            assert projected is not None
            torch.testing.assert_close(projected, x @ basis.T)
    wide = torch.cat((x, torch.zeros(7, 8)), 1)
    first = autograd_op.project_grouped([Sink(basis) for basis in stack], wide)[0]
    assert first is not None
    torch.testing.assert_close(first, x @ stack[0].T)
    alone: list[list[Sink | None]] = [[Sink(stack[0])], [Sink(stack[0]), Sink()], [Sink(stack[0]), None], []]
    for sinks in alone:
        assert autograd_op.project_grouped(sinks, x) == [None] * len(sinks)


@pytest.mark.parametrize("wanted", [(True, True, True), (True, False, True)])
@pytest.mark.parametrize("adjacent", [True, False])
@pytest.mark.parametrize("inputs", [24, 21])
def test_whole_gradients_are_one_product_where_they_can(wanted: tuple[bool, ...], adjacent: bool, inputs: int) -> None:
    layers, x = layers_of(WeightFormat(8), (16, 8, 40), inputs), normal(2, 5, inputs).requires_grad_()
    grads = list(normal(2, 5, 64, seed=1).split([16, 8, 40], dim=-1))
    if not adjacent:
        grads = [grad.clone() for grad in grads]
    for layer, whole in zip(layers, wanted, strict=True):
        layer.attach(Sink(whole=whole))
    torch.autograd.backward(grouped_linear(x, layers, adjacent=2), grads)
    for index, (layer, grad) in enumerate(zip(layers, grads, strict=True)):
        joint = index < 2 and adjacent and all(wanted)
        assert hasattr(layer.sink, "gradient") == joint and hasattr(layer.sink, "input") != joint
        if joint:
            assert isinstance(layer.sink, Sink)
            expected = grad.flatten(0, 1).T @ x.detach().flatten(0, 1)
            torch.testing.assert_close(layer.sink.gradient, expected, rtol=1e-5, atol=1e-5)


class Net(nn.Module):
    """Three layers with one input."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(width, rows, bias=False) for rows in (48, 56, 64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(grouped_linear(x, (self.q, self.k, self.v)), -1)

    @property
    def layers(self) -> list[LowRankLinear]:
        return [layer for layer in self.children() if isinstance(layer, LowRankLinear)]


def attached(net: Net, format: WeightFormat = FORMATS["int8"], **flags: object) -> tuple[Net, QGaLoreAdamW8bit]:
    net = copy.deepcopy(net)
    convert_linears(net, ("q", "k", "v"), format)
    groups = low_rank_param_groups(net, ["q", "k", "v"], **{"rank": 4, "update_proj_gap": 3, **flags})
    optimizer = QGaLoreAdamW8bit(groups, lr=0.01)
    optimizer.attach(net, update_in_backward=True)
    return net, optimizer


@pytest.fixture
def directly(monkeypatch: pytest.MonkeyPatch) -> None:
    """These matrices are too small for it to pay."""
    monkeypatch.setattr(fit, "projects_directly", lambda tokens, *rest: tokens > 1)


def trained(net: Net, optimizer: QGaLoreAdamW8bit, updates: int = 7) -> list[Tensor]:
    """The weights after some updates."""
    for update in range(updates):
        net(normal(64, 48, seed=update)).square().sum().backward()
        optimizer.step()
    return [layer.dequantized_weight(torch.float32) for layer in net.layers]


@pytest.mark.usefixtures("directly")
def test_training_is_that_of_projections_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(fit, "project_factors", None)  # which would project again
        joint = trained(*attached(Net(), subspace="streaming"))
    found = list[bool]()
    together = autograd_op.project_grouped

    def apart(sinks: Sequence[GradientSink | None], input: Tensor) -> list[Tensor | None]:
        found.append(together(sinks, input)[0] is not None)
        return [None] * len(sinks)

    monkeypatch.setattr(autograd_op, "project_grouped", apart)
    for ours, alone in zip(joint, trained(*attached(Net(), subspace="streaming")), strict=True):
        assert ((ours - alone).abs() > 1e-5).float().mean() < 0.02, "more than roundings that went the other way"
    assert found == [True] * 7


@pytest.mark.parametrize(
    ("flags", "tokens", "wanted"),
    [
        ({"subspace": "streaming"}, 64, True),
        ({"subspace": "streaming"}, 1, False),
        ({"subspace": "streaming", "proj_type": "left"}, 64, False),
        ({"subspace": "svd", "proj_type": "full"}, 64, False),
        ({"subspace": "streaming", "residual": "fira"}, 64, False),
        ({"subspace": "svd", "update_proj_gap": 1}, 64, False),
        ({"subspace": "svd"}, 64, True),
    ],
    ids=str,
)
@pytest.mark.usefixtures("directly")
def test_only_what_is_projected_directly_from_the_right_is_joined(
    flags: dict[str, object], tokens: int, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, optimizer = attached(Net(), **flags)
    trained(net, optimizer, 1)
    weights, x = list(optimizer.low_rank_weights()), normal(tokens, 48)
    assert all((weight.input_basis(x) is not None) == wanted for weight in weights)
    monkeypatch.setattr(fit, "project_factors", None)
    for weight in weights:
        if weight.forms_gradient(x):  # and the factors are not projected one by one
            weight.accumulate(normal(tokens, weight.shape[0]), x)
    monkeypatch.setattr(methods, "GROUPED_BASIS_BYTES", 4 * 48 * 4 - 1)
    assert all(weight.input_basis(x) is None for weight in weights), "too large"


@pytest.mark.usefixtures("directly")
def test_what_is_held_needs_no_copy() -> None:
    net, optimizer = attached(Net(), subspace="streaming")
    trained(net, optimizer, 1)
    layers = net.layers
    weights = list(optimizer.low_rank_weights())
    with cached_weights(layers, torch.float32), cached_bases(weights, torch.float32):
        bases = [weight.input_basis(normal(64, 48)) for weight in weights]
        assert as_one_view([basis for basis in bases if basis is not None], 0) is not None and None not in bases
        assert layers[0].cached_weight is not None
        stored = [layer.quantized_weight or layer.weight for layer in layers]
        below = autograd_op.stacked_weights(stored, torch.float32, [layer.cached_weight for layer in layers])
        assert below.data_ptr() == layers[0].cached_weight.data_ptr()
    expected = torch.cat([layer.dequantized_weight(torch.float32) for layer in layers])
    again = autograd_op.stacked_weights(stored, torch.float32, [None] * len(layers))
    assert torch.equal(below, expected) and torch.equal(again, expected)


def test_large_weights_and_products_in_int8_are_multiplied_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, accumulate_whole = list[int](), autograd_op._accumulate_whole

    def spied(sinks: Sequence[GradientSink | None], *factors: Any) -> int:
        asked.append(len(sinks))
        return accumulate_whole(sinks, *factors)

    monkeypatch.setattr(autograd_op, "_accumulate_whole", spied)
    monkeypatch.setattr(linear, "GROUPED_WEIGHT_BYTES", 4 * 24 * (16 + 24))
    for format, outputs in (
        (FORMATS["int8"], (16, 24, 99)),
        (FORMATS["int8"], (16, 25)),
        (FORMATS["int8 products"], (8, 8)),
    ):
        layers = layers_of(format, outputs)
        for layer in layers:
            layer.attach(Sink())
        torch.cat(grouped_linear(normal(3, 24), layers, adjacent=2), 1).sum().backward()
    assert asked == [2]


def test_queries_and_keys_of_a_llama_share_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LlamaForCausalLM(CONFIG)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "layers" in name]
    convert_linears(model, names, WeightFormat(8))
    optimizer = QGaLoreAdamW8bit(low_rank_param_groups(model, names, rank=4), lr=1e-3)
    optimizer.attach(model)
    found = list[bool]()

    def spied(matrices: Sequence[Tensor], dim: int) -> Tensor | None:
        whole = as_one_view(matrices, dim)
        found.extend([whole is not None] if dim == 1 else [])
        return whole

    monkeypatch.setattr(autograd_op, "as_one_view", spied)
    tokens = torch.randint(0, CONFIG.vocab_size, (2, 8))
    loss = model(tokens, tokens).loss_sum
    assert loss is not None
    loss.backward()
    assert found == [True] * CONFIG.num_hidden_layers
