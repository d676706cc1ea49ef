"""The low-rank linear layer: values, gradients, state, copies, checkpointing, compilation."""

import copy
import io
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

from qgalore import GaLoreAdamW, LowRankLinear, QGaLoreAdamW8bit, WeightFormat, convert_linears, low_rank_param_groups
from tests.kernels.comparison import step_row
from tests.sinks import FactorSink

FORMATS = {
    "float": WeightFormat(),
    "int8": WeightFormat(bits=8),
    "int4": WeightFormat(bits=4),
    "simulated": WeightFormat(bits=8, simulate=True),
}
every_format = pytest.mark.parametrize("storage", FORMATS)


class Recorder(FactorSink):
    """A sink that sums the gradient from its factors."""

    def __init__(self) -> None:
        self.grad: Tensor | None = None
        self.calls = 0

    def accumulate(self, grad_output: Tensor, input: Tensor, projected: Tensor | None = None) -> None:
        assert grad_output.dim() == input.dim() == 2
        grad = grad_output.T @ input
        self.grad = grad if self.grad is None else self.grad + grad
        self.calls += 1


def layer(storage: str, bias: bool = True, seed: int = 0, sizes: tuple[int, int] = (21, 10)) -> LowRankLinear:
    torch.manual_seed(seed)
    return LowRankLinear.from_linear(nn.Linear(*sizes, bias=bias), FORMATS[storage])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- values and gradients


@every_format
@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("shape", [(21,), (4, 21), (2, 3, 21)])
def test_output_is_that_of_a_float_layer_with_the_dequantized_weight(
    shape: tuple[int, ...], attached: bool, storage: str
) -> None:
    module, x = layer(storage), normal(*shape)
    if attached:
        module.attach(Recorder())
    weight = module.dequantized_weight(torch.float32)
    assert weight.shape == (10, 21)
    assert torch.allclose(module(x), F.linear(x, weight, module.bias), atol=1e-6)


@every_format
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(21,), (4, 21), (2, 3, 21)])
def test_gradients_are_those_of_a_float_layer(shape: tuple[int, ...], bias: bool, storage: str) -> None:
    module, sink = layer(storage, bias), Recorder()
    module.attach(sink)
    x, weight = normal(*shape).requires_grad_(), module.dequantized_weight(torch.float32).detach().requires_grad_()
    other_x = x.detach().clone().requires_grad_()
    other_bias = module.bias.detach().clone().requires_grad_() if module.bias is not None else None
    module(x).square().sum().backward()
    F.linear(other_x, weight, other_bias).square().sum().backward()
    assert sink.grad is not None and weight.grad is not None and x.grad is not None and other_x.grad is not None
    # The factors may come with columns of zeros.
    assert torch.allclose(sink.grad[:10, :21], weight.grad, atol=1e-4)
    assert sink.grad[10:].count_nonzero() == sink.grad[:, 21:].count_nonzero() == 0
    assert torch.allclose(x.grad, other_x.grad, atol=1e-4)
    assert module.weight.grad is None
    if bias:
        assert module.bias is not None and module.bias.grad is not None and other_bias is not None
        assert torch.allclose(module.bias.grad, other_bias.grad, atol=1e-4)  # type: ignore[arg-type]


@every_format
def test_the_weight_gets_its_gradient_where_the_input_needs_none(storage: str) -> None:
    module, sink = layer(storage), Recorder()
    hooked: list[int] = []
    module.attach(sink).register_post_accumulate_grad_hook(lambda proxy: hooked.append(1))
    module(normal(4, 21)).sum().backward()
    assert sink.calls == 1 and hooked == [1]


def test_the_hook_of_the_proxy_leaf_fires_once_after_every_use() -> None:
    module, sink = layer("int8", sizes=(10, 10)), Recorder()
    calls: list[int] = []
    module.attach(sink).register_post_accumulate_grad_hook(lambda proxy: calls.append(sink.calls))
    module(torch.tanh(module(normal(4, 10)))).sum().backward()
    assert calls == [2]


@every_format
def test_a_weight_changed_between_forward_and_backward_is_noticed(storage: str) -> None:
    module = layer(storage)
    module.attach(Recorder())
    output = module(normal(4, 21).requires_grad_()).sum()
    module.update_(torch.ones(10, 21), None, None, step_row(0.1, 1.0, 0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


def test_bfloat16_activations_give_bfloat16() -> None:
    module = layer("int8", bias=False)
    module.attach(Recorder())
    x = normal(4, 21).bfloat16().requires_grad_()
    output = module(x)
    output.sum().backward()
    assert output.dtype == torch.bfloat16
    assert x.grad is not None and x.grad.dtype == torch.bfloat16


def test_autocast_trains() -> None:
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
    convert_linears(model, ["0", "2"], FORMATS["int8"])
    optimizer = QGaLoreAdamW8bit(low_rank_param_groups(model, ["0", "2"], rank=3), lr=0.05)
    optimizer.attach(model)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(normal(6, 12))
    assert output.dtype == torch.bfloat16
    before = model[2].dequantized_weight(torch.float32)
    output.float().square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, model[2].dequantized_weight(torch.float32))


# ---- storage


@pytest.mark.parametrize(("storage", "shape"), [("int8", (10, 21)), ("int4", (10, 11))])
def test_a_quantized_weight_is_plain_state(storage: str, shape: tuple[int, int]) -> None:
    module = layer(storage)
    state = module.state_dict()
    assert set(state) == {"weight_qdata", "bias", "weight_scale", "weight_zero_point", "weight_format"}
    assert state["weight_qdata"].dtype == torch.uint8 and state["weight_qdata"].shape == shape
    assert state["weight_format"].tolist() == [8 if storage == "int8" else 4, 256]
    assert state["weight_scale"].dtype == state["weight_zero_point"].dtype == torch.bfloat16
    assert state["weight_scale"].shape == (10, 1)
    assert not module.weight.requires_grad
    assert type(state["weight_qdata"]) is Tensor and not vars(module.weight), "no loose attributes"


def test_a_float_weight_has_the_state_of_a_linear_layer() -> None:
    for storage in ("float", "simulated"):
        assert set(layer(storage).state_dict()) == {"weight", "bias"}


@every_format
@pytest.mark.parametrize("rounds", [1, 30])
def test_update_moves_the_weight(rounds: int, storage: str) -> None:
    module = layer(storage, sizes=(300, 32))
    start = module.dequantized_weight(torch.float32).detach().clone()
    direction, left = normal(4, 300), normal(4, 32, seed=1) / 8
    expected = start.clone()
    for seed in range(rounds):
        module.update_(direction, left, None, step_row(0.003 / rounds, 1 - 0.01 / rounds, seed))
        expected = expected * (1 - 0.01 / rounds) - 0.003 / rounds * left.T @ direction
    change = module.dequantized_weight(torch.float32).detach() - start
    wanted = expected - start
    # Rounding makes noise but no bias: the change lies along what was asked for.
    assert float((change * wanted).sum() / wanted.square().sum()) == pytest.approx(1.0, abs=0.12)


def test_simulation_keeps_the_weight_on_the_grid() -> None:
    simulated, quantized = layer("simulated", sizes=(300, 32)), layer("int8", sizes=(300, 32))
    assert torch.equal(simulated.weight, quantized.dequantized_weight(torch.float32))
    for seed in range(5):
        for module in (simulated, quantized):
            module.update_(normal(32, 300, seed=seed), None, None, step_row(0.001, 1.0, seed))
        assert torch.equal(simulated.weight, quantized.dequantized_weight(torch.float32))
    assert simulated.weight[0].unique().numel() <= 2 * 256


def test_nearest_rounding_forgets_small_updates_and_stochastic_does_not() -> None:
    for stochastic in (False, True):
        module = LowRankLinear(normal(64, 256), None, WeightFormat(bits=8, stochastic_rounding=stochastic))
        module.update_(torch.zeros(64, 256), None, None, step_row(1.0, 1.0, 0))  # settle on a grid
        start = module.dequantized_weight(torch.float32)
        direction = torch.full((64, 256), -1.0)
        low, high = start.aminmax(dim=1, keepdim=True)
        direction[(start == low) | (start == high)] = 0.0
        step = float((high - low).mean()) / 255
        for seed in range(100):
            module.update_(direction, None, None, step_row(0.02 * step, 1.0, seed))
        share = float((module.dequantized_weight(torch.float32) - start).mean()) / (2 * step)
        assert abs(share - (1.0 if stochastic else 0.0)) < 0.1


# ---- copies, devices, dtypes, files


@every_format
def test_a_copy_is_independent(storage: str) -> None:
    module, sink = layer(storage), Recorder()
    module.attach(sink)
    twin = copy.deepcopy(module)
    assert twin.sink is None and twin.proxy is None and module.sink is sink
    x = normal(4, 21).requires_grad_()
    before = twin(x)
    module.update_(torch.ones(10, 21), None, None, step_row(0.1, 1.0, 0))
    assert torch.equal(twin(x), before)
    assert not torch.equal(module(x), before)
    twin_sink = Recorder()
    twin.attach(twin_sink)
    twin(x).sum().backward()
    assert (sink.calls, twin_sink.calls) == (0, 1)


@every_format
def test_state_dict_round_trip(storage: str) -> None:
    module, other = layer(storage), layer(storage, seed=1)
    x = normal(4, 21)
    assert not torch.equal(module(x), other(x))
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(module(x), other(x))


@every_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_dtype_leaves_the_codes_alone(dtype: torch.dtype, storage: str) -> None:
    module = layer(storage)
    before = module.dequantized_weight(torch.float32).clone()
    module.to(dtype)
    assert module(normal(4, 21).to(dtype)).dtype == dtype
    if storage in ("int8", "int4"):
        assert module.weight.dtype == torch.uint8
        assert torch.equal(module.dequantized_weight(torch.float32), before)
    else:
        assert module.weight.dtype == dtype


@every_format
def test_pickle_gives_the_same_layer(storage: str) -> None:
    module = layer(storage)
    module.attach(Recorder())
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert again.sink is None
    assert torch.equal(again(normal(4, 21)), module(normal(4, 21)))


@every_format
def test_what_an_older_version_has_pickled_can_be_trained(storage: str) -> None:
    module = layer(storage)
    del module._storage, module._stored_as
    again = pickle.loads(pickle.dumps(module))
    again.attach(Recorder())
    assert torch.equal(again(normal(4, 21)), layer(storage)(normal(4, 21)))


def test_conversion_keeps_names_bias_and_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Sequential(nn.Linear(8, 8)))
    model.eval()
    inner, names = model[2][0], set(model.state_dict())
    convert_linears(model, ["0", "2.0"], FORMATS["int8"])
    assert isinstance(model[0], LowRankLinear) and isinstance(model[2][0], LowRankLinear)
    assert model[2][0].bias is inner.bias and not model[2][0].training
    assert names == set(dict(model.named_parameters()))
    assert (model[0].in_features, model[0].out_features) == (4, 8)
    assert "in_features=4, out_features=8" in repr(model[0])


def test_a_layer_of_two_places_is_converted_in_both() -> None:
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "other": nn.Sequential(nn.Linear(4, 4))})
    model["second"] = model["other"][0] = model["first"]
    convert_linears(model, ["first"], WeightFormat(bits=8))
    assert isinstance(model["first"], LowRankLinear)
    assert model["first"] is model["second"] is model["other"][0]


def test_a_weight_of_two_modules_is_not_converted() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5)})
    model["head"].weight = model["embed"].weight
    with pytest.raises(ValueError, match=r"head\.weight is a parameter of another module"):
        convert_linears(model, ["head"], WeightFormat())


@pytest.mark.parametrize("tied", ["head", "embed"])
def test_a_weight_of_a_layer_and_another_module_is_not_attached(tied: str) -> None:
    model = nn.ModuleDict({"layer": nn.Linear(4, 5), "head": nn.Linear(4, 5), "embed": nn.Embedding(5, 4)})
    convert_linears(model, ["layer", "head"], WeightFormat())
    model[tied].weight = model["layer"].weight
    optimizer = GaLoreAdamW(model.parameters())
    with pytest.raises(ValueError, match=rf"layer\.weight and {tied}\.weight are one parameter"):
        optimizer.attach(model)


@every_format
def test_a_weight_may_lie_by_columns(storage: str) -> None:
    linear = nn.Linear(21, 10)
    plain = LowRankLinear.from_linear(copy.deepcopy(linear), FORMATS[storage])
    linear.weight.data = linear.weight.data.T.contiguous().T
    layer = LowRankLinear.from_linear(linear, FORMATS[storage])
    for name, value in layer.state_dict().items():
        assert value.is_contiguous() and torch.equal(value, plain.state_dict()[name]), name


def test_only_linear_layers_are_converted() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
    with pytest.raises(TypeError, match=r"1 is a Tanh: only nn\.Linear"):
        convert_linears(model, ["1"], FORMATS["int8"])


# ---- in a model


class Net(nn.Module):
    def __init__(self, run: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.run = run
        self.first, self.shared, self.last = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def body(self, x: Tensor) -> Tensor:
        return torch.tanh(self.shared(torch.tanh(self.shared(x))))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        x = self.body(x) if self.run is None else self.run(self.body, x)
        return self.last(x)


NAMES = ["first", "shared", "last"]


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, forward: Callable[[Tensor], Tensor] | None = None
) -> None:
    forward = model if forward is None else forward
    for update in range(6):
        forward(normal(8, 12, seed=update)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def low_rank(model: nn.Module, storage: str, update_in_backward: bool = False) -> QGaLoreAdamW8bit:
    convert_linears(model, NAMES, FORMATS[storage])
    groups = low_rank_param_groups(model, NAMES, rank=3, update_proj_gap=2)
    optimizer = QGaLoreAdamW8bit(groups, lr=0.02)
    optimizer.attach(model, update_in_backward=update_in_backward)
    return optimizer


def same(model: nn.Module, other: nn.Module) -> bool:
    pairs = zip(model.state_dict().items(), other.state_dict().items(), strict=True)
    return all(name == other_name and torch.equal(a, b) for (name, a), (other_name, b) in pairs)


@pytest.mark.parametrize("update_in_backward", [False, True])
def test_a_layer_used_twice_gets_the_sum_of_its_gradients(update_in_backward: bool) -> None:
    model, plain = Net(), Net()
    convert_linears(model, NAMES, FORMATS["float"])
    optimizer = GaLoreAdamW(model.parameters(), lr=0.02)
    optimizer.attach(model, update_in_backward=update_in_backward)
    train(model, optimizer)
    train(plain, torch.optim.AdamW(plain.parameters(), lr=0.02, weight_decay=0.0))
    for name, value in plain.state_dict().items():
        assert torch.allclose(model.state_dict()[name], value, atol=1e-5), name


@every_format
@pytest.mark.parametrize("update_in_backward", [False, True])
def test_activation_checkpointing_changes_nothing(update_in_backward: bool, storage: str) -> None:
    model = Net()
    recomputing = Net(lambda body, x: checkpoint(body, x, use_reentrant=False))
    for net in (model, recomputing):
        train(net, low_rank(net, storage, update_in_backward))
    assert same(model, recomputing)


@pytest.mark.parametrize("update_in_backward", [False, True])
def test_training_a_copy_leaves_the_original_alone(update_in_backward: bool) -> None:
    model = Net()
    optimizer = low_rank(model, "int8", update_in_backward)
    train(model, optimizer)
    twin, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    twin(normal(8, 12)).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    again = QGaLoreAdamW8bit(low_rank_param_groups(twin, NAMES, rank=3), lr=0.02)
    again.attach(twin, update_in_backward=update_in_backward)
    train(twin, again)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not same(model, twin)


@pytest.mark.parametrize("update_in_backward", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_model_trains_the_same(backend: str, update_in_backward: bool) -> None:
    model, compiled = Net(), Net()
    train(model, low_rank(model, "int8", update_in_backward))
    optimizer = low_rank(compiled, "int8", update_in_backward)
    torch._dynamo.reset()
    train(compiled, optimizer, torch.compile(compiled, fullgraph=True, backend=backend))
    # A compiler may order sums differently, and a value that rounds the other way is a whole step away.
    for name in NAMES:
        ours, theirs = (net.get_submodule(name).dequantized_weight(torch.float32) for net in (model, compiled))
        assert (ours - theirs).abs().max() < 0.03
        assert float(((ours - theirs).abs() > 1e-5).float().mean()) < (0.0 if backend == "aot_eager" else 0.05) + 1e-9


@pytest.mark.parametrize("frees", [True, False])
def test_a_compiled_input_gradient_waits_for_the_sink_where_it_frees_the_input(frees: bool) -> None:
    """Else a compiler may make, in one kernel, what the sink needs and what follows the gradient, and keep it all."""
    linear, graphs = nn.Linear(21, 10), list[torch.fx.GraphModule]()
    module = LowRankLinear.from_linear(linear, FORMATS["int8"], frees_input=frees)
    module.attach(Recorder())

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return make_boxed_func(graph.forward)  # type: ignore[no-any-return]

    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph.forward), bw_compiler=keep)
    x = torch.randn(3, module.in_features, requires_grad=True)
    torch.compile(module, backend=backend)(x).sum().backward()
    (graph,) = graphs
    calls = {node.target: node for node in graph.graph.nodes if node.op == "call_function"}
    sink = calls[torch.ops.qgalore.grouped_linear_accumulate.default]
    gradient = calls[torch.ops.qgalore.grouped_linear_input_gradient.default]
    waits = sink in gradient.all_input_nodes
    assert waits == frees and x.grad is not None


def test_a_float_weight_is_freed_as_soon_as_it_is_converted() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    watched = [weakref.ref(layer.weight) for layer in model]
    alive: list[int] = []
    register = LowRankLinear.train

    def counting(self: LowRankLinear, mode: bool = True) -> LowRankLinear:
        alive.append(sum(reference() is not None for reference in watched))
        return register(self, mode)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LowRankLinear, "train", counting)
        convert_linears(model, ["0", "1", "2", "3"], FORMATS["int8"])
    assert alive[-1] <= 2
