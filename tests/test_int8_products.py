"""Products in INT8: as far from a float layer with the dequantized weight as rounding activations goes, and no further.

The kernels' own bits are in `tests/kernels/test_agreement.py`, whole runs in `test_run_pretrain.py`, `test_resume.py`.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from qgalore import LowRankLinear, QGaLoreAdamW8bit, WeightFormat, convert_linears, kernels, low_rank_param_groups
from qgalore.kernels.reference import int8_matmul
from tests.kernels.comparison import step_row
from tests.sinks import FactorSink

INT8 = WeightFormat(bits=8, int8_products=True)
# Tokens, inputs, outputs; ragged on purpose, and the last one is longer than what float32 sums exactly.
SHAPES = [(7, 21, 10), (64, 300, 33), (9, 33, 300), (3, 5461, 8), (4, 8, 5461)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(inputs: int, outputs: int, bias: bool = False, pads_output: bool = False) -> LowRankLinear:
    torch.manual_seed(3)
    return LowRankLinear.from_linear(nn.Linear(inputs, outputs, bias=bias), INT8, pads_output=pads_output)


def step(x: Tensor) -> Tensor:
    """The distance between two codes of each row, (rows, 1)."""
    return x.abs().amax(dim=1, keepdim=True) / 127


# ---- rounding of rows


def test_rows_are_rounded_to_the_nearest_of_255_steps() -> None:
    x = torch.cat((normal(50, 97), normal(3, 97) * 1e30, normal(3, 97) * 1e-30, torch.full((1, 97), -2.5)))
    codes, scale = int8_matmul.quantize_rows(x)
    assert codes.dtype == torch.int8 and scale.shape == (57,) and scale.dtype == torch.float32
    assert int(codes.abs().amax()) == 127 and (codes.abs().amax(dim=1) == 127).all()
    assert ((codes * scale[:, None] - x).abs() <= 0.5001 * step(x)).all()
    assert torch.equal(int8_matmul.quantize_rows(-x)[0], -codes), "rounding favours a sign"
    assert torch.equal(int8_matmul.quantize_rows(4 * x[:50])[0], codes[:50])


def test_rows_of_nothing_are_zeros() -> None:
    codes, scale = int8_matmul.quantize_rows(torch.stack((torch.zeros(5), torch.full((5,), 1e-38))))
    assert codes.count_nonzero() == scale.count_nonzero() == 0


@pytest.mark.parametrize("depth", [1, 1024, 1025, 5000])
def test_integer_products_are_exact(depth: int) -> None:
    """Also where every product is as large as can be, so that float32 would lose bits from 1032 of them on."""
    a = torch.full((2, depth), 127, dtype=torch.int8)
    a[1] = torch.randint(-127, 128, (depth,), generator=torch.Generator().manual_seed(0))
    b = torch.full((depth, 3), -128, dtype=torch.int8)
    b[:, 1], b[0, 2] = 127, 1
    assert torch.equal(int8_matmul.int8_product(a, b).long(), a.long() @ b.long())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(int8_matmul.int8_product(a, b).long(), a.long() @ b.long())


# ---- the layer


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("sizes", SHAPES)
def test_output_is_within_the_rounding_of_the_input(sizes: tuple[int, int, int], attached: bool) -> None:
    tokens, inputs, outputs = sizes
    module, x = layer(inputs, outputs), normal(tokens, inputs) * torch.logspace(-3, 3, tokens)[:, None]
    if attached:
        module.attach(FactorSink())
    weight = module.dequantized_weight(torch.float32).double()
    found, expected = module(x).double(), x.double() @ weight.T
    assert ((found - expected).abs() <= 0.501 * step(x).double() * weight.abs().sum(dim=1)).all()
    # Of the rounded input the product is exact, but for float32.
    codes, scale = int8_matmul.quantize_rows(x)
    rounded = codes.double() * scale.double()[:, None]
    assert ((found - rounded @ weight.T).abs() <= 1e-6 * (rounded.abs() @ weight.abs().T + step(x))).all()
    assert tokens == 3 or (found - expected).abs().max() > 1e-5, "nothing was rounded"


@pytest.mark.parametrize("sizes", SHAPES)
def test_input_gradient_is_within_the_rounding_of_the_output_gradient(sizes: tuple[int, int, int]) -> None:
    tokens, inputs, outputs = sizes
    module, sink = layer(inputs, outputs), FactorSink()
    module.attach(sink)
    x, grad = normal(tokens, inputs).requires_grad_(), normal(tokens, outputs, seed=1) ** 3
    module(x).backward(grad)
    weight, scale = module.dequantized_weight(torch.float32), module.weight_scale
    assert scale is not None and x.grad is not None
    expected = grad.double() @ weight.double()
    signed = (module.weight[:, :inputs].double() - 128).abs().sum(dim=0)  # of each input, over the outputs
    bound = 0.501 * step(grad * scale.float().T).double() * signed
    assert ((x.grad.double() - expected).abs() <= bound + 1e-6 * (grad.abs() @ weight.abs())).all()
    # The gradient of the weight is made of what came, not of what was rounded.
    assert torch.equal(sink.input[:, :inputs], x) and torch.equal(sink.grad_output[:, :outputs], grad)


def test_a_row_is_one_group_whatever_the_group_size() -> None:
    for columns in (85, 300, 1376):
        module = LowRankLinear(normal(6, columns), None, WeightFormat(bits=8, group_size=64, int8_products=True))
        assert module.weight_scale is not None and module.weight_scale.shape == (6, 1)
        before = module.dequantized_weight(torch.float32)
        assert ((before - normal(6, columns)).abs() <= module.weight_scale.float() / 2 + 1e-6).all()
        module.update_(torch.ones(6, columns), None, None, step_row(0.5, 1.0, 1))
        assert float((before - module.dequantized_weight(torch.float32)).mean()) == pytest.approx(0.5, abs=2e-3)
        assert module.weight_scale.shape == (6, 1)


def test_a_whole_number_of_eights_has_kernels_that_read_rows_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("QGALORE_KERNELS", "triton")
    # The widths of all matrices of the configs.
    for columns in (512, 768, 1024, 1376, 1708, 2048, 2736, 4096, 5120, 5461, 11008, 13824):
        assert kernels.reads_rows_on_device(torch.device("cpu"), INT8.group_size_of(columns))


@pytest.mark.parametrize(
    ("format", "message"),
    [
        ({"bits": 4}, "bits=4"),
        ({}, "bits=None"),
        ({"bits": 8, "simulate": True}, "a simulated weight"),
    ],
)
def test_only_weights_stored_in_8_bits(format: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightFormat(**format, int8_products=True)  # type: ignore[arg-type]


def test_shapes_that_do_not_fit_are_refused() -> None:
    stored = kernels.quantize(normal(10, 24), 8, 24)
    for x, width, message in (
        (normal(2, 23), 10, r"\(2, 23\) -> 10 columns do not fit a weight of shape \(10, 24\)"),
        (normal(2, 24), 9, r"\(2, 24\) -> 9 columns do not fit"),
        (normal(24), 10, "x must be a matrix"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.int8_linear(x, *stored, width)
    with pytest.raises(ValueError, match=r"\(2, 9\) -> 24 columns do not fit"):
        kernels.int8_linear_backward(normal(2, 9), *stored, 24)
    with pytest.raises(ValueError, match="one group a row"):
        kernels.int8_linear(normal(2, 24), *kernels.quantize(normal(10, 24), 8, 16), 10)
    long = torch.zeros(1, 200_000, dtype=torch.uint8), torch.ones(1, 1), torch.ones(1, 1)
    with pytest.raises(ValueError, match="a sum of 200000 products in INT8 may overflow: at most 132104"):
        kernels.int8_linear(torch.ones(1, 200_000), *long, 1)


# ---- in a model


def trained(update_in_backward: bool, compiled: bool = False, autocast: bool = False) -> tuple[list[float], nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 8))
    names = ["0", "2", "4"]
    convert_linears(model, names, INT8)
    groups = low_rank_param_groups(model, names, rank=6, update_proj_gap=4)
    optimizer = QGaLoreAdamW8bit(groups, lr=0.02)
    optimizer.attach(model, update_in_backward=update_in_backward)
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    losses, target = [], normal(64, 8, seed=9)
    for _ in range(30):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = (run(normal(64, 24)).float() - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, model


def test_training_lowers_the_loss_and_is_the_same_however_it_is_run() -> None:
    losses, model = trained(False)
    assert losses[-1] < 0.75 * losses[0], losses
    for again in (trained(False), trained(True), trained(True, compiled=True)):
        assert again[0] == losses
        tensors = zip(model.state_dict().values(), again[1].state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in tensors)


def test_autocast_rounds_activations_and_not_sums() -> None:
    assert trained(False, autocast=True)[0] == pytest.approx(trained(False)[0], rel=0.05)


def test_a_copy_is_independent() -> None:
    module = layer(24, 16)
    twin, x = copy.deepcopy(module), normal(4, 24)
    before = twin(x)
    module.update_(torch.ones(16, 24), None, None, step_row(0.1, 1.0, 0))
    assert torch.equal(twin(x), before) and not torch.equal(module(x), before)
