"""Products in FP8: as far from a float layer with the dequantized weight as rounding both factors goes, and no further.

The kernels' own bits are in `tests/kernels/test_agreement.py`, whole runs in `test_run_pretrain.py`, `test_resume.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

from qgalore import LowRankLinear, QGaLoreAdamW8bit, WeightFormat, convert_linears, kernels, low_rank_param_groups
from qgalore.layer.linear import columns_bytes, fused_product_bytes, grouped_linear, product_bytes
from tests.sinks import FactorSink

FORMATS = {
    "int8": WeightFormat(8, fp8_products=True),
    "int4": WeightFormat(4, 64, fp8_products=True),
    "simulated": WeightFormat(8, 64, simulate=True, fp8_products=True),
    "float": WeightFormat(fp8_products=True),
}
# Tokens, inputs, outputs; ragged on purpose, and sides that are a multiple of 8 and not of 16.
SHAPES = [(7, 21, 10), (64, 300, 33), (9, 24, 304), (3, 1376, 8)]
STEP = 2.0**-4
"""Half the distance between two values of e4m3, at most, beside the value; below 2^-6 x 448 / 448 an absolute one."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(inputs: int, outputs: int, format: str = "int8", **options: bool) -> LowRankLinear:
    torch.manual_seed(3)
    return LowRankLinear.from_linear(nn.Linear(inputs, outputs, bias=False), FORMATS[format], **options)


def rounding(x: Tensor, largest: Tensor) -> Tensor:
    """How far each value of x may move, with the largest magnitude of its row (rows, 1)."""
    return torch.maximum(x.abs() * STEP, largest * (2.0**-10 / 448)) * 1.001


# ---- rounding


def test_rows_are_rounded_to_the_nearest_value_of_their_scale() -> None:
    x = torch.cat((normal(50, 97), normal(3, 97) * 1e30, normal(3, 97) * 1e-30, torch.full((1, 97), -2.5)))
    codes, scale = kernels.fp8_rows([x], [97])
    assert codes.dtype == torch.float8_e4m3fn and codes.shape == (57, 112) and scale.shape == (57,)
    values = codes.float()
    assert (values.abs().amax(dim=1) == 448).all() and values[:, 97:].count_nonzero() == 0
    assert ((values[:, :97] * scale[:, None] - x).abs() <= rounding(x, x.abs().amax(1, keepdim=True))).all()
    assert torch.equal(kernels.fp8_rows([-x], [97]).codes.float(), -values), "rounding favours a sign"
    assert torch.equal(kernels.fp8_rows([4 * x[:50]], [97]).codes.float(), values[:50])


def test_rows_of_nothing_are_zeros_and_of_no_number_none() -> None:
    x = torch.stack((torch.zeros(5), torch.full((5,), 1e-38), torch.full((5,), float("inf")), torch.full((5,), 1.0)))
    x[3, 2] = float("nan")
    found = kernels.fp8_rows([x], [5])
    product = kernels.fp8_product(found, kernels.fp8_rows([torch.ones(2, 5)], [5]), 2, torch.float32)
    assert product[:2].count_nonzero() == 0 and not product[2:].isfinite().any()


@pytest.mark.parametrize("format", FORMATS)
def test_a_weight_has_the_same_codes_both_ways(format: str) -> None:
    module = layer(40, 21, format)
    weight = module.quantized_weight
    stored = module.weight.detach() if weight is None else weight.stored()
    codes, scale = kernels.fp8_weight(stored)
    (turned, ones), (factor,) = kernels.fp8_turned_weights([stored])
    assert torch.equal(factor, scale) and (ones == 1).all()
    assert codes.shape == (32, 48) and torch.equal(turned.float(), codes.float().T)
    values, expected = codes.float() * scale[:, None], module.dequantized_weight(torch.float32)
    assert values[21:].count_nonzero() == values[:, 40:].count_nonzero() == 0
    # The bound of a row is not below its largest magnitude, and hardly above.
    assert float(codes.float().abs().amax(dim=1)[:21].min()) > 200
    assert ((values[:21, :40] - expected).abs() <= rounding(expected, 448 * scale[:21, None])).all()


# ---- the layer


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("sizes", SHAPES)
def test_output_is_within_the_rounding_of_both_factors(
    sizes: tuple[int, int, int], format: str, attached: bool
) -> None:
    tokens, inputs, outputs = sizes
    module, x = layer(inputs, outputs, format), normal(tokens, inputs) * torch.logspace(-3, 3, tokens)[:, None]
    if attached:
        module.attach(FactorSink())
    weight = module.dequantized_weight(torch.float32)
    found, expected = module(x), x @ weight.T
    each = rounding(x, x.abs().amax(1, keepdim=True)), rounding(weight, weight.abs().amax(1, keepdim=True) * 1.2)
    bound = each[0] @ (weight.abs() + each[1]).T + x.abs() @ each[1].T
    assert ((found - expected).abs() <= bound + 2.0**-8 * (expected.abs() + bound)).all()
    assert 1e-3 < float((found - expected).detach().norm() / expected.norm()) < 0.06


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("sizes", SHAPES)
def test_input_gradient_is_near_and_the_weight_gradient_is_of_what_came(
    sizes: tuple[int, int, int], format: str
) -> None:
    tokens, inputs, outputs = sizes
    module, sink = layer(inputs, outputs, format), FactorSink()
    module.attach(sink)
    x, grad = normal(tokens, inputs).requires_grad_(), normal(tokens, outputs, seed=1) ** 3
    module(x).backward(grad)
    assert x.grad is not None
    expected = grad @ module.dequantized_weight(torch.float32)
    assert 1e-3 < float((x.grad - expected).norm() / expected.norm()) < 0.08
    assert torch.equal(sink.input[:, :inputs], x) and torch.equal(sink.grad_output[:, :outputs], grad)


def test_layers_of_one_input_give_what_each_gives() -> None:
    layers = [layer(24, outputs) for outputs in (40, 21, 16)]
    alone, sinks = [each(normal(4, 24)) for each in layers], [FactorSink() for _ in layers]
    for each, sink in zip(layers, sinks, strict=True):
        each.attach(sink)
    x = normal(4, 24).requires_grad_()
    together = grouped_linear(x, layers)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    sum(y.square().sum() for y in together).backward()  # type: ignore[union-attr]
    assert x.grad is not None and all(len(sink.input) == 4 for sink in sinks)


def test_two_ways_to_multiply_are_refused() -> None:
    with pytest.raises(ValueError, match="int8_products and fp8_products are two ways to multiply"):
        WeightFormat(8, int8_products=True, fp8_products=True)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x \(2, 23\) and its factor do not have 24 columns"):
        kernels.fp8_rows([normal(2, 23)], [24])
    with pytest.raises(ValueError, match="do not have 24 columns"):
        kernels.fp8_rows([normal(2, 24)], [24], [torch.ones(16)])
    with pytest.raises(ValueError, match=r"\(2, 32\) and \(2, 48\) are not of one depth"):
        kernels.fp8_product(*(kernels.fp8_rows([normal(2, n)], [n]) for n in (24, 40)), 3, torch.float32)


def test_what_products_take_is_counted() -> None:
    """Codes and scales of both factors, of one weight or of those with one input."""
    layers, tokens = [layer(40, 304), layer(40, 21)], 64
    stored = [each.quantized_weight.stored() for each in layers if each.quantized_weight is not None]
    for weights in (stored[:1], stored):
        turned, factors = kernels.fp8_turned_weights(weights)
        rows = kernels.fp8_rows(
            [normal(tokens, len(x.qdata)) for x in weights], [len(x.qdata) for x in weights], factors
        )
        shapes = [(len(x.qdata), 40) for x in weights]
        assert sum(x.nbytes for x in (*turned, *factors, *rows)) == fused_product_bytes(shapes, tokens)
        if len(weights) == 1:
            assert product_bytes(layers[0].format, shapes[0], tokens, torch.bfloat16) == fused_product_bytes(
                shapes, tokens
            )
    made = (*kernels.fp8_weight(stored[0]), *kernels.fp8_rows([normal(tokens, 40)], [40]))
    assert sum(x.nbytes for x in made) < product_bytes(layers[0].format, (304, 40), tokens, torch.bfloat16)


def test_gradients_of_one_input_are_summed_in_the_product() -> None:
    """One scale a token for all: as near the sum of the float ones as each is to its own."""
    layers = [layer(24, outputs) for outputs in (40, 21, 16)]
    for each in layers:
        each.attach(FactorSink())
    x, grads = normal(6, 24).requires_grad_(), [normal(6, n, seed=n) for n in (40, 21, 16)]
    torch.autograd.backward(grouped_linear(x, layers), grads)
    expected = sum(grad @ each.dequantized_weight(torch.float32) for grad, each in zip(grads, layers, strict=True))
    assert x.grad is not None and isinstance(expected, Tensor)
    assert 1e-3 < float((x.grad - expected).norm() / expected.norm()) < 0.06


# ---- the gradient of a weight


class WholeSink(FactorSink):
    """A sink that wants the whole gradient."""

    def __init__(self, rows: int) -> None:
        self.out_features = rows

    def forms_gradient(self, input: Tensor) -> bool:
        return True

    def accumulate_full(self, grad: Tensor) -> None:
        self.grad = grad


@pytest.mark.parametrize("sizes", SHAPES)
def test_a_whole_gradient_is_within_the_rounding_of_both_factors(sizes: tuple[int, int, int]) -> None:
    tokens, inputs, outputs = sizes
    torch.manual_seed(3)
    format, sink = WeightFormat(8, fp8_products=True, fp8_weight_gradients=True), WholeSink(outputs)
    module = LowRankLinear.from_linear(nn.Linear(inputs, outputs, bias=False), format)
    module.attach(sink)
    # Columns of any size have a scale of their own.
    x = (normal(tokens, inputs) * torch.logspace(-3, 3, inputs)).requires_grad_()
    grad = normal(tokens, outputs, seed=1) ** 3
    module(x).backward(grad)
    expected, x = grad.T @ x.detach(), x.detach()
    assert sink.grad.shape == expected.shape and x.grad is None
    each = rounding(grad.T, grad.abs().amax(0)[:, None]), rounding(x.T, x.abs().amax(0)[:, None])
    bound = each[0] @ (x.T.abs() + each[1]).T + grad.T.abs() @ each[1].T
    assert ((sink.grad - expected).abs() <= bound + 2.0**-8 * (expected.abs() + bound)).all()
    assert not torch.equal(sink.grad, expected.bfloat16().float()), "nothing was rounded"


def test_a_projected_gradient_is_of_what_came() -> None:
    torch.manual_seed(3)
    format, sink = WeightFormat(8, fp8_products=True, fp8_weight_gradients=True), FactorSink()
    module = LowRankLinear.from_linear(nn.Linear(24, 40, bias=False), format)
    module.attach(sink)
    x, grad = normal(5, 24), normal(5, 40)
    module(x).backward(grad)
    assert torch.equal(sink.input, x) and torch.equal(sink.grad_output, grad)


def test_what_a_gradient_takes_is_counted() -> None:
    made = [*kernels.fp8_columns(normal(50, 40), 40), *kernels.fp8_columns(normal(50, 21), 21)]
    maxima = 4 * 48  # of the columns of one factor at a time
    assert sum(x.nbytes for x in made) + maxima == columns_bytes((21, 40), 50)


def test_gradients_in_fp8_come_beside_products() -> None:
    with pytest.raises(ValueError, match="fp8_weight_gradients comes beside fp8_products"):
        WeightFormat(8, fp8_weight_gradients=True)


# ---- in a model


def trained(
    format: WeightFormat, update_in_backward: bool = False, compiled: bool = False, parts: int = 1
) -> tuple[list[float], nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 8))
    names = ["0", "2", "4"]
    convert_linears(model, names, format)
    groups = low_rank_param_groups(model, names, rank=6, update_proj_gap=4)
    optimizer = QGaLoreAdamW8bit(groups, lr=0.02)
    optimizer.attach(model, update_in_backward=update_in_backward)
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    losses = []
    for _ in range(30):
        total = 0.0
        batches = zip(normal(64, 24).chunk(parts), normal(64, 8, seed=9).chunk(parts), strict=True)
        for number, (part, target) in enumerate(batches, start=1):
            loss = (run(part).float() - target).square().mean() / parts
            optimizer.is_last_micro_batch = number == parts
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, model


def test_training_lowers_the_loss_and_is_the_same_however_it_is_run() -> None:
    losses, model = trained(FORMATS["int8"])
    assert losses[-1] < 0.75 * losses[0], losses
    for again in (trained(FORMATS["int8"]), trained(FORMATS["int8"], True), trained(FORMATS["int8"], True, True)):
        assert again[0] == losses
        tensors = zip(model.state_dict().values(), again[1].state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in tensors)


@pytest.mark.parametrize("recomputes", [False, True])
def test_a_compiler_rounds_an_input_with_what_it_comes_from(recomputes: bool) -> None:
    """The forward pass writes codes of the norm and of the product with its gate, and neither in 16 bits or 32."""
    norm, gate, up, down = nn.RMSNorm(48), layer(48, 32), layer(48, 32), layer(32, 48)
    for each in (gate, up, down):
        each.attach(FactorSink())

    def run(x: Tensor) -> Tensor:
        first, second = grouped_linear(norm(x), [gate, up])
        out: Tensor = x + down(torch.nn.functional.silu(first) * second)
        return out

    def block(x: Tensor) -> Tensor:
        out: Tensor = checkpoint(run, x, use_reentrant=False, preserve_rng_state=False) if recomputes else run(x)
        return out

    passes: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: object) -> Any:
        passes.append(graph)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    x, found = normal(2, 5, 48).requires_grad_(), []
    with torch._functorch.config.patch(ban_recompute_materialized_backward=False):
        for function in (run, torch.compile(block, backend=backend, fullgraph=True)):
            out = function(x)
            out.square().sum().backward()
            assert x.grad is not None and isinstance(down.sink, FactorSink) and isinstance(gate.sink, FactorSink)
            found.append((out.detach(), x.grad, gate.sink.input.view(10, -1), down.sink.input.view(10, -1)))
            x.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    forward, backward = passes
    operators = torch.ops.qgalore
    products = [node for node in forward.graph.nodes if node.target == operators.grouped_linear_of_codes.default]
    assert len(products) == 2 and not forward.graph.find_nodes(
        op="call_function", target=operators.grouped_linear.default
    )
    assert all(node.args[0].meta["val"].dtype == torch.float8_e4m3fn for node in products)
    results = [node for node in forward.graph.output_node().args[0] if node.op == "call_function"]
    kept = sorted(tuple(node.meta["val"].shape) for node in results)
    shapes = {(2, 5, 48), (2, 5, 1), (2, 5, 32)}  # the output, a number a token of the norm, gate and up
    assert {*kept} <= shapes and kept.count((2, 5, 48)) == 1, kept
    again = backward.graph.find_nodes(op="call_function", target=operators.grouped_linear_of_codes.default)
    assert len(again) == recomputes, "of a layer that is computed again gate and up, and not what no gradient reads"


def test_a_ragged_input_is_rounded_by_the_operator() -> None:
    """A compiler would write it in float32 to pad it."""
    module, graphs = layer(40, 16), list[torch.fx.GraphModule]()
    module.attach(FactorSink())

    def keep(graph: torch.fx.GraphModule, inputs: object) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    x = normal(4, 40).requires_grad_()
    torch.compile(lambda x: module(x), backend=aot_autograd(fw_compiler=keep), fullgraph=True)(x)
    (node,) = graphs[0].graph.find_nodes(op="call_function", target=torch.ops.qgalore.grouped_linear.default)
    assert node.args[0].meta["val"].dtype == torch.float32


def test_training_follows_that_in_float() -> None:
    for name, format in FORMATS.items():
        plain = WeightFormat(format.bits, format.group_size, simulate=format.simulate)
        found, expected = trained(format)[0], trained(plain)[0]
        assert found != expected and found == pytest.approx(expected, rel=0.05), name


def test_micro_batches_are_rounded_as_the_whole_batch_is() -> None:
    """A token's scale is its own: only sums of gradients are in another order."""
    assert trained(FORMATS["int8"], parts=2)[0] == pytest.approx(trained(FORMATS["int8"])[0], rel=1e-2)
