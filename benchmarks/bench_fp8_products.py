"""Time and error of each product of a layer and of the head in FP8, beside bfloat16, with what rounds its factors.

    python -m benchmarks.bench_fp8_products [--models 60m,1b,7b] [--results FILE]

Prints a row for each product of a micro-batch of `benchmarks/compare.py` (of the head: of a chunk of its loss):
queries, keys and values, the attention's output, gate and up, down, head; forward, for the gradient of the input, for
that of the weight as a whole, and projected. Weights are INT8, the head's bfloat16. Activations, weights and gradients
lie in memory as they do in training, those of a ragged width (5461 at 1B) with zeros behind. Where there is no GPU,
errors alone are found, with 256 tokens. Columns:

- bfloat16_ms: what a layer does without the flag, with what it takes to dequantize weights;
- fp8_ms: with what it takes to round both factors; factors_ms: that alone; codes that the loss or another product has
  made, for the head's input gradient and for projected gradients, are there already;
- gain_ms: of them all, for one layer or one chunk: above 0, FP8 pays there;
- fp8_error, bfloat16_error: the norm of the difference to a float32 product, over the norm of that.
"""

from __future__ import annotations

import argparse
import itertools
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
from qgalore.layer.autograd_op import Weight, WeightHandle, linear
from qgalore.layer.layout import as_one_view, padded_width
from qgalore.layer.quantization import QuantizedTensor, quantize
from qgalore.subspace import fit

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
        self.weights: list[Weight] = [
            weight.bfloat16() if head else quantize(weight).with_aligned_rows() for weight in floats
        ]
        self.stored = [weight.stored() if isinstance(weight, QuantizedTensor) else weight for weight in self.weights]
        self.x = self._activations(tokens, self.inputs)
        # The first two of queries, keys and values are columns of one matrix, as the rotation leaves them.
        self._adjacent = 2 if len(shapes) == 3 else 1
        first = self._activations(tokens, sum(self.outputs[: self._adjacent]))
        self.grads = [
            *(first.split(self.outputs[: self._adjacent], dim=1) if self._adjacent > 1 else [first]),
            *(self._activations(tokens, rows) for rows in self.outputs[self._adjacent :]),
        ]
        if head:
            self.grads = [(self.x.float() @ floats[0].T).softmax(1).bfloat16()]
            self.grads[0][torch.arange(tokens), torch.arange(tokens) % self.outputs[0]] -= 1
        self.bases = [self._normal(rank, min(shape)).div(min(shape) ** 0.5).bfloat16() for shape in shapes]

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self._device, generator=self._generator)

    def _activations(self, tokens: int, width: int) -> Tensor:
        """bfloat16, with zeros up to the padded width."""
        return torch.nn.functional.pad(self._normal(tokens, width).bfloat16(), (0, padded_width(width) - width))

    def exact(self) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The input, weights and gradients in float32, without padding."""
        weights = [w.dequantize() if isinstance(w, QuantizedTensor) else w.float() for w in self.weights]
        grads = [grad[:, :width].float() for grad, width in zip(self.grads, self.outputs, strict=True)]
        return self.x[:, : self.inputs].float(), weights, grads

    def works(self) -> Iterator[Work]:
        """All its products."""
        yield self._forward()
        yield self._input_gradient()
        yield self._weight_gradient()
        if not self._head:
            yield self._projected()

    def _forward(self) -> Work:
        widths = list(map(padded_width, self.outputs))

        def factors() -> Factors:
            rows = kernels.fp8_rows([self.x], [self.inputs])
            return [(rows, kernels.fp8_weight(weight), w) for weight, w in zip(self.stored, widths, strict=True)]

        def exact() -> list[Tensor]:
            x, weights, _ = self.exact()
            return [x @ weight.T for weight in weights]

        pairs = list(zip(self.weights, widths, strict=True))
        return Work(
            "forward", lambda: [linear(self.x, weight, width, 0) for weight, width in pairs], factors, _products, exact
        )

    def _input_gradient(self) -> Work:
        width, adjacent = self.x.shape[1], self._adjacent

        def in_bfloat16() -> list[Tensor]:
            """As the backward pass: adjacent gradients at once, the others one by one, and added to it."""
            storage, handles, total = self._storage(), [WeightHandle() for _ in self.weights], None
            for start, stop in itertools.pairwise((0, *range(adjacent, len(self.weights) + 1))):
                stored = [tensor for weight in self.weights[start:stop] for tensor in _tensors(weight)]
                part = torch.ops.qgalore.grouped_linear_input_gradient(
                    self.grads[start:stop], stored, handles[start:stop], storage, width, None
                )
                total = part if total is None else total + part
            assert total is not None
            return [total]

        def exact() -> list[Tensor]:
            _, weights, grads = self.exact()
            return [torch.stack([grad @ weight for grad, weight in zip(grads, weights, strict=True)]).sum(dim=0)]

        values = self.grads[0].float() * 448 if self._head else self.grads[0][:0].float()
        values = torch.nn.functional.pad(values, (0, kernels.fp8_width(values.shape[1]) - values.shape[1]))
        codes = kernels.Fp8Matrix(values.to(torch.float8_e4m3fn), values.new_full((len(values),), 1 / 448))

        def factors() -> Factors:
            if isinstance(self.stored[0], Tensor):  # the head's, where the loss has written the codes of its gradient
                return [(codes, kernels.fp8_columns(self.stored[0], self.inputs), width)]
            turned, scales = kernels.fp8_turned_weights(self.stored)
            return [(kernels.fp8_rows(self.grads, self.outputs, scales), turned, width)]

        return Work("input gradient", in_bfloat16, factors, lambda made: _products(made, exact=self._head), exact)

    def _storage(self) -> list[int]:
        """`qgalore.layer.autograd_op.Storage`, of products in bfloat16."""
        return [self.inputs, 0 if self._head else 8, 0 if self._head else 256, 0]

    def _weight_gradient(self) -> Work:
        def factors() -> Factors:
            columns = kernels.fp8_columns(self.x, self.inputs)
            pairs = zip(self.grads, self.outputs, strict=True)
            return [(kernels.fp8_columns(grad, width), columns, self.inputs) for grad, width in pairs]

        def exact() -> list[Tensor]:
            x, _, grads = self.exact()
            return [grad.T @ x for grad in grads]

        # Adjacent ones are one product.
        first, heights = as_one_view(self.grads[: self._adjacent], 1), self.outputs[: self._adjacent]
        assert first is not None
        others = zip(self.grads[self._adjacent :], self.outputs[self._adjacent :], strict=True)
        sides = [(first, heights), *((grad, [height]) for grad, height in others)]
        return Work(
            "weight gradient",
            lambda: [
                part
                for grad, heights in sides
                for part in fit.gradient(grad, self.x, (sum(heights), self.inputs)).split(heights)
            ],
            factors,
            lambda made: [full[:width] for full, width in zip(_products(made, True), self.outputs, strict=True)],
            exact,
        )

    def _projected(self) -> Work:
        """gᵀ (x Pᵀ), or (g Pᵀ)ᵀ x: what is projected comes with the codes of its rows."""
        right = [rows >= self.inputs for rows in self.outputs]
        x = self.x, self.inputs
        pairs = zip(zip(self.grads, self.outputs, strict=True), right, strict=True)
        sides = [(x, grad) if of_input else (grad, x) for grad, of_input in pairs]
        codes = [kernels.fp8_rows([short], [width]) for (short, width), _ in sides]

        def turned(of_input: bool, product: Tensor) -> Tensor:
            return product if of_input else product.T

        stacked, ranks = torch.cat(self.bases), list(map(len, self.bases))

        def in_bfloat16() -> list[Tensor]:
            if all(right) and len(right) > 1:  # the input is read once
                projected = (self.x[:, : self.inputs] @ stacked.T).split(ranks, dim=1)
                triples = zip(self.grads, projected, self.outputs, strict=True)
                return [fit.gradient(grad, short, (rows, short.shape[1])) for grad, short, rows in triples]
            parts = zip(self.grads, self.outputs, right, self.bases, strict=True)
            return [
                fit.project_factors(grad, self.x, (rows, self.inputs), None if r else basis, basis if r else None)
                for grad, rows, r, basis in parts
            ]

        def exact() -> list[Tensor]:
            x, _, grads = self.exact()
            parts = zip(grads, right, self.bases, strict=True)
            return [grad.T @ (x @ p.float().T) if r else (grad @ p.float().T).T @ x for grad, r, p in parts]

        def multiply(made: Factors) -> list[Tensor]:
            found = []
            for of_input, (rows, basis, rank), (_, (long, width)) in zip(right, made, sides, strict=True):
                projected = kernels.fp8_product(rows, basis, rank, torch.bfloat16)
                pair = kernels.fp8_columns(long, width), kernels.fp8_columns(projected, rank)
                full = kernels.fp8_product(*pair, rank, torch.bfloat16, exact=True)[:width]
                found.append(turned(of_input, full))
            return found

        def factors() -> Factors:
            made = zip(codes, self.bases, strict=True)
            return [(rows, kernels.fp8_weight(basis), len(basis)) for rows, basis in made]

        return Work("projected gradient", in_bfloat16, factors, multiply, exact)


def _tensors(weight: Weight) -> list[Tensor]:
    """As the operators take a weight."""
    return [weight.qdata, weight.scale, weight.zero_point] if isinstance(weight, QuantizedTensor) else [weight]


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
    """The norm of the difference over the norm of what is exact, of all at once; padding is not looked at."""
    pairs = [(a[:, : b.shape[1]], b) for a, b in zip(found, exact, strict=True)]
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
    if on_gpu and not kernels.has_fp8(torch.device("cuda")):
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
