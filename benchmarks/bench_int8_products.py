"""Time and memory of a linear layer's products, forward and for the input gradient, in INT8, FP8 and bfloat16.

    python -m benchmarks.bench_int8_products [--models 60m,1b] [--results FILE] [--tile 128,256,128,8,3]

Shapes are those of the models' matrices with the tokens of a micro-batch of `benchmarks/compare.py`. Methods:

- int8: `--int8_products`: quantize activations, convert the weight's codes to signed ones, multiply;
- int8, products alone: only the last of these;
- torch._int_mm: only PyTorch's product of signed INT8 matrices into int32, for shapes that it supports;
- fp8: `--fp8_products`: round activations and the weight, multiply;
- fp8, factors alone: only the first of these;
- fp8, products alone: only the last;
- bfloat16, dequantized: what a layer with an INT8 weight does without the flag;
- bfloat16, products alone: the same with a bfloat16 weight.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import models
from benchmarks.rows import ROOT, append_row, commit
from benchmarks.timing import median_ms
from qgalore import LowRankLinear, WeightFormat, kernels
from qgalore.kernels.reference.int8_matmul import quantize_rows
from qgalore.layer import autograd_op

MODELS = ("60m", "1b", "7b")
CALLS = 10  # in one graph
OPERATIONS = ("forward", "input gradient")
COLUMNS = ("model", "op", "tokens", "inputs", "outputs", "method", "ms", "tops", "peak_gb")

Product = Callable[[], Tensor]


def layer_products(layer: LowRankLinear, x: Tensor, grad: Tensor) -> tuple[Product, Product]:
    """A layer's own products, as in training."""
    weight, products = layer.quantized_weight, layer.format.products
    assert weight is not None
    return (
        lambda: autograd_op.linear(x, weight, layer.width, products),
        lambda: autograd_op.input_gradient(grad, weight, x.shape[-1], products),
    )


def int8_products_alone(layer: LowRankLinear, x: Tensor, grad: Tensor) -> tuple[Product, Product]:
    """The products of our kernel with activations that were quantized before."""
    from qgalore.kernels.triton import int8_matmul

    quantized = layer.quantized_weight
    assert quantized is not None
    scales = (quantized.scale, quantized.zero_point)
    signed, turned = (int8_matmul._signed(quantized.qdata[:, : layer.in_features], turns) for turns in (False, True))
    rounded_x = int8_matmul._quantize_rows(x, layer.in_features, None, None)
    rounded_grad = int8_matmul._quantize_rows(grad, layer.out_features, *scales)
    return (
        lambda: int8_matmul._multiply(rounded_x, signed, *scales, grad.shape[1], x.dtype, forward=True),
        lambda: int8_matmul._multiply(rounded_grad, turned, *scales, x.shape[1], x.dtype, forward=False),
    )


def torch_products(layer: LowRankLinear, x: Tensor, grad: Tensor) -> tuple[Product, Product] | None:
    """PyTorch's products of signed codes; None for shapes that it does not support."""
    if layer.in_features % 8 or layer.out_features % 8:
        return None
    codes = (layer.weight[:, : layer.in_features] ^ 128).view(torch.int8)
    other_way = codes.T.contiguous()
    rounded_x, rounded_grad = (quantize_rows(t.float())[0] for t in (x, grad))
    return lambda: torch._int_mm(rounded_x, codes.T), lambda: torch._int_mm(rounded_grad, other_way.T)


def fp8_parts(layer: LowRankLinear, x: Tensor, grad: Tensor) -> dict[str, tuple[Product, Product] | None]:
    """What `--fp8_products` does, in two parts; none where the GPU has no FP8."""
    quantized = layer.quantized_weight
    assert quantized is not None
    stored, (outputs, inputs), factors = quantized.stored(), quantized.shape, dict[bool, Any]()

    def make(backward: bool) -> Tensor:
        if backward:
            weight, scales = kernels.fp8_turned_weights([stored])
            rows = kernels.fp8_rows([grad], [outputs], scales)
        else:
            weight, rows = kernels.fp8_weight(stored), kernels.fp8_rows([x], [inputs])
        factors[backward] = rows, weight, (x if backward else grad).shape[1]
        return rows.codes

    def multiply(backward: bool) -> Tensor:
        if backward not in factors:
            make(backward)
        return kernels.fp8_product(*factors[backward], x.dtype)

    return {
        "fp8, factors alone": (lambda: make(False), lambda: make(True)),
        "fp8, products alone": (lambda: multiply(False), lambda: multiply(True)),
    }


def bfloat16_products(layer: LowRankLinear, x: Tensor, grad: Tensor) -> tuple[Product, Product]:
    """The products with a weight that was dequantized before."""
    weight = layer.padded_weight(torch.bfloat16)
    return lambda: x @ weight.T, lambda: grad @ weight


def _has_fp8(device: str) -> bool:
    return device == "cpu" or kernels.has_fp8(torch.device(device))


def methods(inputs: int, outputs: int, tokens: int, device: str = "cuda") -> dict[str, tuple[Product, Product] | None]:
    """Both products by method, with the same weight and activations; ragged dimensions padded as in our model."""
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(outputs, inputs, device=device, generator=generator) * 0.02
    rounded = LowRankLinear(weight, None, WeightFormat(bits=8, int8_products=True), pads_output=True)
    ordinary = LowRankLinear(weight, None, WeightFormat(bits=8), pads_output=True)
    rows, columns = ordinary.padded_weight(torch.bfloat16).shape
    in_fp8 = LowRankLinear(weight, None, WeightFormat(bits=8, fp8_products=True), pads_output=True)
    x, grad = (torch.randn(tokens, width, device=device, generator=generator).bfloat16() for width in (columns, rows))
    x[:, inputs:], grad[:, outputs:] = 0.0, 0.0
    return {
        "int8": layer_products(rounded, x, grad),
        "int8, products alone": int8_products_alone(rounded, x, grad),
        "torch._int_mm": torch_products(rounded, x, grad),
        **({"fp8": layer_products(in_fp8, x, grad), **fp8_parts(in_fp8, x, grad)} if _has_fp8(device) else {}),
        "bfloat16, dequantized": layer_products(ordinary, x, grad),
        "bfloat16, products alone": bfloat16_products(ordinary, x, grad),
    }


@torch.no_grad()
def measure(product: Callable[[], object], repeats: int) -> dict[str, float]:
    """The median milliseconds in a CUDA graph, without Python, and the peak beyond the operands in GB."""

    def call(_: int) -> None:  # what is made is freed, as in training
        product()

    call(0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(0)
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 1e9
    ms = median_ms(call, torch.device("cuda"), repeats, CALLS)
    return {"ms": round(ms, 4), "peak_gb": round(peak, 4)}


def table(rows: list[dict[str, object]]) -> str:
    """Format the rows as a Markdown table."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
    return "\n".join(lines + [f"| {' | '.join(str(row[column]) for column in COLUMNS)} |" for row in rows])


def use_tile(sizes: tuple[int, int, int, int, int]) -> None:
    """Set the tile of our kernel for many rows: rows, columns, depth, warps, stages."""
    from qgalore.kernels.triton import int8_matmul

    usual = int8_matmul.tile
    int8_matmul.tile = lambda rows: sizes if rows >= 128 else usual(rows)


def main(argv: list[str] | None = None) -> int:
    """Measure every method at the shapes of the models, append a row for each, and print them as a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help="names, separated by commas")
    parser.add_argument("--repeats", type=int, default=20, help="timed replays of ten calls")
    parser.add_argument("--tile", default="", help="rows,columns,depth,warps,stages of our kernel instead of its own")
    parser.add_argument(
        "--results", default=str(ROOT / "benchmarks/results/int8_products.csv"), help="CSV to append to"
    )
    parser.add_argument("--note", default="", help="what to remember of the circumstances")
    args = parser.parse_args(argv)
    unknown = [name for name in args.models.split(",") if name not in MODELS]
    if unknown:
        parser.error(f"--models: {unknown[0]} is none of {', '.join(MODELS)}")
    sizes = [int(text) for text in args.tile.split(",") if text.isdecimal()]
    if args.tile and (len(sizes) != 5 or not sizes[2] or 128 % sizes[2]):
        parser.error(f"--tile: {args.tile} is not rows,columns,depth,warps,stages with a depth that divides 128")
    if not torch.cuda.is_available():
        print("bench_int8_products needs a CUDA GPU, and there is none here", file=sys.stderr)
        return 2
    if not kernels.use_triton(torch.device("cuda")):
        print("bench_int8_products needs Triton, and QGALORE_KERNELS must not be reference", file=sys.stderr)
        return 2
    if sizes:
        use_tile((sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]))
    import triton

    circumstances = {"tile": args.tile, "device": torch.cuda.get_device_name(), "torch": torch.__version__}
    circumstances |= {"triton": triton.__version__, "commit": commit(), "note": args.note}
    rows: list[dict[str, object]] = []
    for model in args.models.split(","):
        tokens = models.tokens(model)
        # Of the attention, of gate and up, and of down; each once.
        for outputs, inputs in dict.fromkeys(models.config(model).matrix_shapes().values()):
            for method, products in methods(inputs, outputs, tokens).items():
                for op, product in zip(OPERATIONS, products or (), strict=bool(products)):
                    row: dict[str, object] = {"model": model, "op": op, "tokens": tokens, "inputs": inputs}
                    measured = measure(product, args.repeats)
                    tops = round(2 * tokens * inputs * outputs / measured["ms"] / 1e9, 1)
                    row |= {"outputs": outputs, "method": method, "ms": measured["ms"], "tops": tops}
                    row |= {"peak_gb": measured["peak_gb"], **circumstances}
                    append_row(Path(args.results), row)
                    rows.append(row)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
