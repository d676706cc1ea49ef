"""The head's loss in FP8: near the float one by what rounding its factors is, and exact where nothing is to be rounded.

Whole runs are in `test_run_pretrain.py`, `test_resume.py` and, on a GPU, `test_cuda_runs.py`.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from peft_pretraining.build import shape_of
from peft_pretraining.config.parse import parse_args
from peft_pretraining.errors import UserError
from peft_pretraining.memory.fp8_gain import warning_of_fp8_gain
from peft_pretraining.memory.fp8_gradients import warning_of_fp8_gradients
from peft_pretraining.models.build import network_on_meta
from peft_pretraining.models.network import CausalLM
from peft_pretraining.models.ops import linear_cross_entropy as module
from peft_pretraining.models.ops.linear_cross_entropy import linear_cross_entropy, training_bytes
from peft_pretraining.speed.cards import CARDS
from qgalore import kernels
from qgalore.config import FLOAT_PRODUCTS, FP8_GRADIENTS, FP8_PRODUCTS
from tests.test_linear_cross_entropy import error, problem

SHAPES = [(1, 16, 3), (70, 33, 16), (256, 64, 8), (300, 257, 24)]
CHUNK_BYTES = [module.CHUNK_BYTES, 5000]


def found(shape: tuple[int, int, int], products: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The loss and both gradients."""
    hidden, weight, targets = problem(shape, dtype, torch.device("cpu"))
    loss = linear_cross_entropy(hidden, weight, targets, products=products)
    return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]


@pytest.mark.parametrize("chunk_bytes", CHUNK_BYTES)
@pytest.mark.parametrize("products", [FP8_PRODUCTS, FP8_GRADIENTS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradients_are_near(
    shape: tuple[int, int, int], dtype: torch.dtype, products: int, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rounding moves a value by 2^-4 of itself at most, 0.026 of it in the mean square; two of a product 0.037."""
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
    expected, rounded = found(shape, FLOAT_PRODUCTS, torch.float32), found(shape, products, dtype)
    counted = shape[0] - len(range(1, shape[0], 5))
    # Logits, about 1 in size, are moved by 0.04 each; of many tokens the mean hardly moves.
    assert 0 < abs(float(rounded[0] - expected[0])) / counted < (0.1 if counted == 1 else 0.02)
    for gradient, wanted in zip(rounded[1:], expected[1:], strict=True):
        assert gradient.dtype == dtype and gradient.shape == wanted.shape
        assert 1e-3 < error(gradient, wanted) < 0.09


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_of_the_weight_is_of_what_was_not_rounded_but_where_asked_for(dtype: torch.dtype) -> None:
    hidden, weight, targets = problem((70, 33, 16), dtype, torch.device("cpu"))
    gradients = {}
    for products in (FP8_PRODUCTS, FP8_GRADIENTS):
        loss = linear_cross_entropy(hidden, weight, targets, products=products)
        gradients[products] = torch.autograd.grad(loss, (hidden, weight))
    assert torch.equal(gradients[FP8_PRODUCTS][0], gradients[FP8_GRADIENTS][0])
    # The logits' gradient, from logits in FP8.
    rows, columns = kernels.fp8_rows([hidden.detach()], [16]), kernels.fp8_weight(weight.detach())
    logits = kernels.fp8_product(rows, columns, 33, dtype).float()
    ignored = targets == -100
    exact = logits.softmax(1)
    exact[torch.arange(70), targets.masked_fill(ignored, 0)] -= 1
    exact = exact.masked_fill(ignored[:, None], 0).to(dtype).float().T @ hidden.detach().float()
    assert error(gradients[FP8_PRODUCTS][1], exact) < (1e-5 if dtype == torch.float32 else 1e-2)
    assert 0.01 < error(gradients[FP8_GRADIENTS][1], exact) < 0.06


def test_a_rare_token_keeps_its_gradient() -> None:
    """In a row of logits it is next to nothing, but its row of the weight's gradient has a scale of its own."""
    hidden, weight = torch.ones(64, 16, requires_grad=True), torch.zeros(32, 16)
    weight[1:] = torch.linspace(-0.75, -1.25, 31)[:, None]
    weight.requires_grad_()
    targets = torch.zeros(64, dtype=torch.int64)
    for products in (FP8_PRODUCTS, FP8_GRADIENTS):
        (gradient,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, products=products), [weight])
        assert (gradient[1:] > 0).all(), products


@pytest.mark.parametrize("products", [FP8_PRODUCTS, FP8_GRADIENTS])
def test_without_gradients_nothing_is_rounded(products: int) -> None:
    hidden, weight, targets = problem((70, 33, 16), torch.float32, torch.device("cpu"))
    with torch.no_grad():
        expected = linear_cross_entropy(hidden, weight, targets)
        assert torch.equal(linear_cross_entropy(hidden, weight, targets, products=products), expected)
    frozen = linear_cross_entropy(hidden.detach(), weight.detach(), targets, products=products)
    assert torch.equal(frozen, expected)
    no_tokens = linear_cross_entropy(hidden[:0], weight, targets[:0], products=products)
    no_tokens.backward()
    assert no_tokens == 0 and weight.grad is not None and not weight.grad.any()


@pytest.mark.parametrize("products", [FP8_PRODUCTS, FP8_GRADIENTS])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_shows(value: float, products: int) -> None:
    hidden, weight, targets = problem((70, 33, 16), torch.bfloat16, torch.device("cpu"))
    with torch.no_grad():
        hidden[2, 5] = value
    loss = linear_cross_entropy(hidden, weight, targets, products=products)
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    assert not loss.isfinite() and not hidden.grad.isfinite().all() and not weight.grad.isfinite().all()


def test_what_it_takes_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both forms of the weight, and the factors of a chunk with their product, at most."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 128 * 384 * 2)
    tokens, vocabulary, size = 300, 350, 40
    hidden, weight = torch.randn(tokens, size).bfloat16(), torch.randn(vocabulary, size).bfloat16()
    (start, stop), *_ = module.token_chunks(tokens, 384 * 2)
    logits = torch.randn(stop - start, vocabulary).bfloat16()

    def nbytes(*tensors: Tensor) -> int:
        return sum(tensor.nbytes for tensor in tensors)

    both = nbytes(*kernels.fp8_weight(weight), *kernels.fp8_columns(weight, size))
    rows = nbytes(*kernels.fp8_rows([logits], [vocabulary])) + (stop - start) * size * 2
    columns = nbytes(*kernels.fp8_columns(logits, vocabulary), *kernels.fp8_columns(hidden[start:stop], size))
    columns += 352 * size * 2 + 4 * 48  # and the maxima of the last columns
    plain = training_bytes(tokens, size, vocabulary, torch.bfloat16)
    for products, of_gradient in ((FP8_PRODUCTS, rows), (FP8_GRADIENTS, max(rows, columns))):
        assert training_bytes(tokens, size, vocabulary, torch.bfloat16, products) == plain + both + of_gradient


# ---- flags

FLAGS = "--batch_size 8 --total_batch_size 8 --dataset pydocs --optimizer q_galore_adamw8bit_per_layer"
STREAMING = "--subspace streaming --rank 128 --fp8_weight_gradients"


def warning(more: str, root: Path) -> str | None:
    args = parse_args(f"--model_config {root}/configs/llama_350m.json {FLAGS} --fp8_products {more}".split())
    return warning_of_fp8_gradients(args, shape_of(args.model))


@pytest.mark.parametrize("head", ["", " --fp8_head"])
def test_fp8_that_gains_less_than_rounding_is_worth_is_told(root: Path, head: str) -> None:
    def told(model: str, size: int, flags: str = "") -> str | None:
        argv = f"--model_config {root}/configs/llama_{model}.json --dataset pydocs --batch_size {size} --device cuda"
        argv += f" --optimizer q_galore_adamw8bit_per_layer --recipe paper --subspace streaming{flags}"
        args = parse_args(argv.split())
        return warning_of_fp8_gain(args, shape_of(args.model), CARDS["h100"])

    small = told("60m", 256, f" --fp8_products{head}")
    assert small is not None and small.startswith("--fp8_products: 1,4") and "tokens/s counted for H100 SXM" in small
    with_fp8, without = (int(found.replace(",", "")) for found in re.findall(r"([\d,]+) (?:tokens|without)", small))
    assert with_fp8 < 1.05 * without and "Leave it out" in small
    assert told("7b", 16, f" --fp8_products{head}") is None and told("60m", 256) is None


def test_gradients_in_fp8_without_a_whole_gradient_are_told(root: Path) -> None:
    told = warning(STREAMING, root)
    assert told is not None and told.startswith("--fp8_weight_gradients changes nothing: with --rank 128 gradients are")
    head = warning(f"{STREAMING} --fp8_head", root)
    assert head is not None and head.startswith("--fp8_weight_gradients changes the head's gradient alone: ")
    assert warning("--subspace streaming --rank 128", root) is None
    for formed in ("--residual fira", "--rank 1000"):
        assert warning(f"{STREAMING} {formed}", root) is None, formed
    for formed in ("--rank full", "--rank 128 --subspace svd"):
        assert warning(f"{formed} --fp8_weight_gradients", root) is None, formed


def test_a_network_with_another_loss_refuses(root: Path) -> None:
    args = parse_args(f"--model_config {root}/configs/llama_9m.json {FLAGS} --rank 8".split())
    config = shape_of(args.model)
    assert config is not None
    network = network_on_meta(config)
    network.multiply_head_in_fp8(FP8_PRODUCTS)
    assert network.head_products == FP8_PRODUCTS and CausalLM.head_products == FLOAT_PRODUCTS
    with pytest.raises(UserError, match="leave --fp8_head out"):
        CausalLM().multiply_head_in_fp8(FP8_PRODUCTS)
