"""Time and error of each product of a layer and of the head in FP8, beside bfloat16, with what rounds its factors.

    python -m benchmarks.bench_fp8_products [--models 60m,1b,7b] [--results FILE]

Prints a row for each product of a micro-batch of `benchmarks/compare.py` (of the head: of a chunk of its loss):
queries, keys and values, the attention's output, gate and up, down, head; forward, for the gradient of the input, for
that of the weight as a whole, and projected. Weights are INT8, the head's bfloat16. Where there is no GPU, errors alone
are found, with 256 tokens. Columns:

- bfloat16_ms: with what it takes to dequantize weights;
- fp8_ms: with what it takes to round both factors; factors_ms: that alone; codes that the loss or another product has
  made, for the head's input gradient and for projected gradients, are there already;
- gain_ms: of them all, for one layer or one chunk: above 0, FP8 pays there;
- fp8_error, bfloat16_error: the norm of the difference to a float32 product, over the norm of that.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import models
from benchmarks.bench_int8_products import measure
from benchmarks.rows import ROOT, append_row, commit
from peft_pretraining.models.config import ModelConfig
from peft_pretraining.models.ops.linear_cross_entropy import token_chunks
from qgalore import kernels

MODELS = ("60m", "130m", "350m", "1b", "7b", "13b")
GROUPS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "o": ("self_attn.o_proj",),
    "gate, up": ("mlp.gate_proj", "mlp.up_proj"), "down": ("mlp.down_proj",),
}  # fmt: skip
COLUMNS = (
    "model", "product", "op", "tokens", "inputs", "outputs", "bfloat16_ms", "fp8_ms", "factors_ms", "gain_ms",
    "fp8_error", "bfloat16_error",
)  # fmt: skip

CPU_TOKENS = 256

Factors = list[tuple[kernels.Fp8Matrix, kernels.Fp8Matrix, int]]


class Work(NamedTuple):
    """One product of some weights with one input, two ways."""

    op: str
    in_bfloat16: Callable[[], list[Tensor]]
    factors: Callable[[], Factors]
    """Rounded, with the columns of each result."""
    multiply: Callable[[Factors], list[Tensor]]
    exact: Callable[[], list[Tensor]]


class Group:
    """Weights (out, in) with one input (tokens, in), and the gradients (tokens, out) of their outputs."""

    def __init__(self, shapes: Sequence[tuple[int, int]], tokens: int, rank: int, device: str, head: bool) -> None:
        """head: the weight is bfloat16, and its gradient that of a cross-entropy."""
        self._generator = torch.Generator(device).manual_seed(0)
        self._device, self._head, self.inputs = device, head, shapes[0][1]
        self.outputs = [rows for rows, _ in shapes]
        floats = [self._normal(*shape) * 0.02 for shape in shapes]
        self.weights: list[kernels.QuantizedMatrix | Tensor] = [self._stored(weight) for weight in floats]
        self.x = self._normal(tokens, self.inputs).bfloat16()
        self.grads = [self._normal(tokens, rows).bfloat16() for rows in self.outputs]
        if head:
            self.grads = [(self.x.float() @ floats[0].T).softmax(1).bfloat16()]
            self.grads[0][torch.arange(tokens), torch.arange(tokens) % self.outputs[0]] -= 1
        self.bases = [self._normal(rank, min(shape)).div(min(shape) ** 0.5).bfloat16() for shape in shapes]

    def _stored(self, weight: Tensor) -> kernels.QuantizedMatrix | Tensor:
        if self._head:
            return weight.bfloat16()
        return kernels.QuantizedMatrix(*kernels.quantize(weight, 8, 256), self.inputs, 8, 256)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self._device, generator=self._generator)

    def floats(self, dtype: torch.dtype) -> list[Tensor]:
        """The weights in a dtype."""
        return [w.to(dtype) if isinstance(w, Tensor) else kernels.dequantize([w], dtype)[0] for w in self.weights]

    def works(self) -> Iterator[Work]:
        """All its products."""
        yield self._forward()
        yield self._input_gradient()
        yield self._weight_gradient()
        if not self._head:
            yield self._projected()

    def _forward(self) -> Work:
        def factors() -> Factors:
            rows = kernels.fp8_rows([self.x], [self.inputs])
            pairs = zip(self.weights, self.outputs, strict=True)
            return [(rows, kernels.fp8_weight(weight), width) for weight, width in pairs]

        return Work(
            "forward",
            lambda: [self.x @ weight.T for weight in self.floats(torch.bfloat16)],
            factors,
            _products,
            lambda: [self.x.float() @ weight.T for weight in self.floats(torch.float32)],
        )

    def _input_gradient(self) -> Work:
        def summed(dtype: torch.dtype) -> list[Tensor]:
            first, *rest = zip(self.grads, self.floats(dtype), strict=True)
            total = first[0].to(dtype) @ first[1]
            for grad, weight in rest:
                total.addmm_(grad.to(dtype), weight)
            return [total]

        values = self.grads[0].float() * 448 if self._head else self.grads[0][:0].float()
        values = torch.nn.functional.pad(values, (0, kernels.fp8_width(values.shape[1]) - values.shape[1]))
        codes = kernels.Fp8Matrix(values.to(torch.float8_e4m3fn), values.new_full((len(values),), 1 / 448))

        def factors() -> Factors:
            if isinstance(self.weights[0], Tensor):  # the head's, where the loss has written the codes of its gradient
                return [(codes, kernels.fp8_columns(self.weights[0], self.inputs), self.inputs)]
            turned, scales = kernels.fp8_turned_weights(self.weights)
            return [(kernels.fp8_rows(self.grads, self.outputs, scales), turned, self.inputs)]

        return Work(
            "input gradient",
            lambda: summed(torch.bfloat16),
            factors,
            lambda made: _products(made, exact=self._head),
            lambda: summed(torch.float32),
        )

    def _weight_gradient(self) -> Work:
        def factors() -> Factors:
            columns = kernels.fp8_columns(self.x, self.inputs)
            pairs = zip(self.grads, self.outputs, strict=True)
            return [(kernels.fp8_columns(grad, width), columns, self.inputs) for grad, width in pairs]

        return Work(
            "weight gradient",
            lambda: [grad.T @ self.x for grad in self.grads],
            factors,
            lambda made: [full[:width] for full, width in zip(_products(made, True), self.outputs, strict=True)],
            lambda: [grad.T.float() @ self.x.float() for grad in self.grads],
        )

    def _projected(self) -> Work:
        """gᵀ (x Pᵀ), or (g Pᵀ)ᵀ x: what is projected comes with the codes of its rows."""
        right = [rows >= self.inputs for rows in self.outputs]
        pairs = zip(self.grads, right, strict=True)
        sides = [(self.x, grad) if of_input else (grad, self.x) for grad, of_input in pairs]
        codes = [kernels.fp8_rows([short], [short.shape[1]]) for short, _ in sides]

        def turned(of_input: bool, product: Tensor) -> Tensor:
            return product if of_input else product.T

        def in_dtype(dtype: torch.dtype) -> list[Tensor]:
            parts = zip(right, sides, self.bases, strict=True)
            return [turned(r, long.to(dtype).T @ (short.to(dtype) @ p.to(dtype).T)) for r, (short, long), p in parts]

        def multiply(made: Factors) -> list[Tensor]:
            found = []
            for of_input, (rows, basis, rank), (_, long) in zip(right, made, sides, strict=True):
                projected = kernels.fp8_product(rows, basis, rank, torch.bfloat16)
                pair = kernels.fp8_columns(long, long.shape[1]), kernels.fp8_columns(projected, rank)
                full = kernels.fp8_product(*pair, rank, torch.bfloat16, exact=True)[: long.shape[1]]
                found.append(turned(of_input, full))
            return found

        def factors() -> Factors:
            made = zip(codes, self.bases, strict=True)
            return [(rows, kernels.fp8_weight(basis), len(basis)) for rows, basis in made]

        return Work(
            "projected gradient", lambda: in_dtype(torch.bfloat16), factors, multiply, lambda: in_dtype(torch.float32)
        )


def _products(factors: Factors, exact: bool = False) -> list[Tensor]:
    return [kernels.fp8_product(a, b, width, torch.bfloat16, exact) for a, b, width in factors]


def groups(config: ModelConfig, tokens: int, rank: int, device: str) -> Iterator[tuple[str, int, Group]]:
    """The groups of weights of a layer and the head by name, with the tokens of each."""
    shapes = config.matrix_shapes()
    for name, members in GROUPS.items():
        yield name, tokens, Group([shapes[member] for member in members], tokens, rank, device, head=False)
    start, stop = token_chunks(tokens, 2 * config.vocab_size)[0]
    yield "head", stop - start, Group([(config.vocab_size, config.hidden_size)], stop - start, rank, device, head=True)


def error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The norm of the difference over the norm of what is exact, of all at once."""
    pairs = list(zip(found, exact, strict=True))
    difference = sum(float((a.float() - b).square().sum(dtype=torch.float64)) for a, b in pairs)
    return (difference / sum(float(b.square().sum(dtype=torch.float64)) for b in exact)) ** 0.5


@torch.no_grad()
def row_of(work: Work, time: Callable[[Callable[[], object]], float] | None) -> dict[str, object]:
    """The columns of one product; time: the milliseconds of a call, None where they are not to be measured."""
    exact = work.exact()
    errors = error(work.multiply(work.factors()), exact), error(work.in_bfloat16(), exact)
    del exact
    row: dict[str, object] = {"op": work.op, "bfloat16_ms": "", "fp8_ms": "", "factors_ms": "", "gain_ms": ""}
    if time is not None:
        plain, rounded = time(work.in_bfloat16), time(lambda: work.multiply(work.factors()))
        row |= {"bfloat16_ms": plain, "fp8_ms": rounded, "factors_ms": time(work.factors)}
        row |= {"gain_ms": round(plain - rounded, 4)}
    return row | {"fp8_error": round(errors[0], 5), "bfloat16_error": round(errors[1], 5)}


def table(rows: Sequence[dict[str, object]]) -> str:
    """Format the rows as a Markdown table."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
    return "\n".join(lines + [f"| {' | '.join(str(row[column]) for column in COLUMNS)} |" for row in rows])


def main(argv: list[str] | None = None) -> int:
    """Measure every product of the models, append a row for each, and print them as a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="60m,1b,7b", help="names, separated by commas")
    parser.add_argument("--repeats", type=int, default=20, help="timed replays of ten calls")
    parser.add_argument("--results", default=str(ROOT / "benchmarks/results/fp8_products.csv"), help="CSV to append to")
    parser.add_argument("--note", default="", help="what to remember of the circumstances")
    args = parser.parse_args(argv)
    names = args.models.split(",")
    if unknown := [name for name in names if name not in MODELS]:
        parser.error(f"--models: {unknown[0]} is none of {', '.join(MODELS)}")
    on_gpu = torch.cuda.is_available()
    if on_gpu and torch.cuda.get_device_capability() < (8, 9):
        print(f"bench_fp8_products needs a GPU with FP8: {torch.cuda.get_device_name()} has none", file=sys.stderr)
        return 2
    circumstances = {"device": torch.cuda.get_device_name() if on_gpu else "cpu", "torch": torch.__version__}
    circumstances |= {"commit": commit(), "note": args.note}

    def time(run: Callable[[], object]) -> float:
        return measure(run, args.repeats)["ms"]

    rows: list[dict[str, object]] = []
    for model in names:
        tokens = models.tokens(model) if on_gpu else CPU_TOKENS
        of_model = groups(models.config(model), tokens, models.RANKS[model], "cuda" if on_gpu else "cpu")
        for name, in_chunk, group in of_model:
            for work in group.works():
                about: dict[str, object] = {"model": model, "product": name, "tokens": in_chunk}
                about |= {"inputs": group.inputs, "outputs": "+".join(map(str, group.outputs))}
                row = about | row_of(work, time if on_gpu else None)
                append_row(Path(args.results), {column: row[column] for column in COLUMNS} | circumstances)
                rows.append(row)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
