"""Time of all directions of an update at full rank beside the least time that their products can take.

    python -m benchmarks.bench_direction --models 7b                      # every method
    python -m benchmarks.bench_direction --models 7b --sweep              # tiles of the kernels, one by one
    python -m benchmarks.bench_direction --shapes 48x130,48x48 --device cpu --results FILE

A sample of each distinct shape is timed, as many matrices as are updated at once, and multiplied by how many there are.
Rows have an op: `direction` is the whole of it, momentum in 8 bits, orthogonalisation and scale, `normuon` that with
rows of one size; `orthogonalize` is the middle alone, in the plain form and in segments. Their floors are the
multiply-adds of the form's products over the rate of one large product on the same device: `floor_ms` with symmetric
products counted by half, `floor_full_ms` the plain form with all products counted whole. `--sweep` times one product at
a time, `gram`, `square` and `apply` (`qgalore.kernels.triton.newton_schulz`), each with every candidate for its tiles,
and prints the fastest: what `TILES` there should have.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import models
from benchmarks.rows import ROOT, append_row, commit
from benchmarks.timing import median_ms
from qgalore import kernels
from qgalore.kernels.arguments import GROUP_LIMIT
from qgalore.update import moments
from qgalore.update.directions import DIRECTIONS, direction_of
from qgalore.update.newton_schulz import AUTO, METHODS, SEGMENT, multiply_adds, segments_of

Shape = tuple[int, int]
MODELS = ("60m", "130m", "350m", "1b", "7b")
OPS = {"orthogonal": "direction", "normuon": "normuon"}
"""Ops of rows by the names of directions."""
REPEATS = 5
CANDIDATES = (
    (64, 64, 64, 4, 4), (64, 128, 64, 4, 3), (64, 128, 64, 4, 4), (64, 256, 64, 4, 4), (128, 128, 32, 4, 4),
    (128, 128, 64, 4, 3), (128, 128, 64, 4, 4), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 128, 8, 3),
    (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (256, 128, 64, 8, 3), (256, 128, 64, 8, 4),
)  # fmt: skip
"""Rows and columns of a tile, terms summed at a time, warps, stages."""
FP8_CANDIDATES = (
    (64, 64, 128, 4, 3), (64, 64, 128, 4, 4), (64, 64, 256, 4, 2), (64, 128, 64, 4, 4), (64, 128, 128, 4, 3),
    (64, 128, 128, 4, 4), (128, 128, 64, 4, 4), (128, 128, 128, 4, 2), (128, 128, 128, 4, 3), (128, 128, 64, 8, 4),
    (128, 128, 128, 8, 3), (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 256, 128, 8, 2), (256, 128, 64, 8, 4),
)  # fmt: skip
"""The same in FP8."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print and append the rows."""
    parser = argparse.ArgumentParser(prog="bench_direction", description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help="names, comma-separated")
    parser.add_argument("--shapes", default="", help="matrices of one layer instead, such as 48x130,48x48")
    parser.add_argument("--methods", default=",".join(METHODS), help="of --newton_schulz, comma-separated")
    parser.add_argument("--sweep", action="store_true", help="time single products with different tiles; needs Triton")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/direction.csv", help="CSV")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.methods.split(",") if name not in METHODS]:
        also = "; auto is one of the first two, by size and card" if AUTO in unknown else ""
        parser.error(f"--methods has {', '.join(unknown)}: it must be of {', '.join(METHODS)}{also}")
    bench = Bench(torch.device(args.device), args.results)
    for model, shapes in _shapes_by_model(args.models, args.shapes).items():
        if args.sweep:
            bench.sweep(model, shapes)
        else:
            for method in args.methods.split(","):
                bench.method(model, shapes, method)
    return 0


def _shapes_by_model(names: str, given: str) -> dict[str, Counter[Shape]]:
    """The matrices of each model by shape, with their number."""
    if given:
        sizes = [each.split("x") for each in given.split(",")]
        return {"given": Counter((int(rows), int(columns)) for rows, columns in sizes)}
    found = {}
    for name in names.split(","):
        config = models.config(name)
        layer = Counter(config.matrix_shapes().values())
        found[name] = Counter({shape: count * config.num_hidden_layers for shape, count in layer.items()})
    return found


def _at_once(shape: Shape) -> int:
    """Matrices of a shape that an optimizer makes directions of together."""
    return -(-DIRECTIONS["orthogonal"].batch_values // (shape[0] * shape[1]))


class Bench:
    """What is timed on one device, and where rows go."""

    def __init__(self, device: torch.device, results: Path) -> None:
        self.device, self._results = device, results
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        size = 8192 if device.type == "cuda" else 256
        a, b, out = (torch.randn(size, size, device=device).to(self.dtype) for _ in range(3))
        self.rate = 2 * size**3 / (self._ms(lambda: torch.mm(a, b, out=out)) / 1e3)
        """Of a large product, operations a second, two for a multiply-add."""
        self.fp8_rate = self.rate
        """The same in FP8, where the device has that."""
        if kernels.has_fp8(device):
            first, second = (kernels.fp8_rows([x], [size], None) for x in (a, b))
            run = lambda: kernels.fp8_product(first, second, size, self.dtype)  # noqa: E731
            self.fp8_rate = 2 * size**3 / (self._ms(run) / 1e3)

    def method(self, model: str, shapes: Mapping[Shape, int], method: str) -> None:
        """Rows of a method for each shape and for all."""
        polynomials, segmented, fp8 = METHODS[method]
        speed = self.fp8_rate / self.rate if fp8 else 1.0
        steps, advance = len(polynomials), {name: direction_of(name, method).advance for name in OPS}
        plain = (1,) * steps
        forms = {"plain": plain, "segments": (SEGMENT, steps - SEGMENT)} if segmented else {"plain": plain}
        totals: Counter[tuple[str, str, str]] = Counter()
        for shape, count in shapes.items():
            chosen = segments_of(shape, steps) if segmented else plain
            together = min(count, _at_once(shape))
            adam_steps = [self._step(shape) for _ in range(together)]
            runs: dict[tuple[str, str], tuple[Callable[[], object], tuple[int, ...]]] = {
                (op, "chosen"): (lambda run=advance[name], steps=adam_steps: run(steps, None), chosen)
                for name, op in OPS.items()
            }
            momenta = [step.grad for step in adam_steps]
            for form, segments in forms.items():
                given = segments if segmented else None
                if fp8:
                    run = lambda momenta=momenta: kernels.orthogonalize_fp8(momenta, polynomials)  # noqa: E731
                else:
                    run = lambda momenta=momenta, given=given: kernels.orthogonalize(momenta, polynomials, given)  # noqa: E731
                runs["orthogonalize", form] = run, segments
            for (op, form), (run, segments) in runs.items():
                values = {
                    "ms": self._ms(run) / together * count,
                    "floor_ms": self._floor(shape, segments) * count / speed,
                    "floor_full_ms": self._floor(shape, plain, symmetric=False) * count / speed,
                }
                self._append(model, op, method, form, "{}x{}".format(*shape), count, values)
                totals.update({(op, form, name): value for name, value in values.items()})
        for op, form in dict.fromkeys((op, form) for op, form, _ in totals):
            values = {name: totals[op, form, name] for name in ("ms", "floor_ms", "floor_full_ms")}
            self._append(model, op, method, form, "all", sum(shapes.values()), values)

    def sweep(self, model: str, shapes: Mapping[Shape, int]) -> None:
        """Rows of single products of as many matrices as are updated at once, and which tiles are the fastest."""
        from qgalore.kernels.triton import newton_schulz, newton_schulz_fp8

        plain = lambda given: newton_schulz._Group(given, in_segments=True)  # noqa: E731
        self._sweep(model, shapes, newton_schulz, plain, self._products, CANDIDATES, "")
        if self.fp8_rate != self.rate:
            group = lambda given: newton_schulz_fp8._Group(given, *newton_schulz_fp8.TILES.values())  # noqa: E731
            self._sweep(model, shapes, newton_schulz_fp8, group, self._fp8_products, FP8_CANDIDATES, "fp8")

    def _sweep(
        self, model: str, shapes: Mapping[Shape, int], triton_kernels: Any, group: Callable[[Sequence[Tensor]], Any],
        products: Callable[[Any, int, int], dict[str, tuple[float, float]]], candidates: Sequence[Sequence[int]],
        method: str,
    ) -> None:  # fmt: skip
        rows, width = max(((min(shape), max(shape)) for shape in shapes), key=lambda sides: sides[0] * sides[1])
        count = min(GROUP_LIMIT, _at_once((rows, width)))
        matrices = [torch.randn(rows, width, device=self.device).to(self.dtype) for _ in range(count)]
        fastest: dict[str, tuple[float, str]] = {}
        kept = dict(triton_kernels.TILES)

        def note(name: str, found: Mapping[str, tuple[float, float]]) -> None:
            for op, (milliseconds, floor) in found.items():
                values = {"ms": milliseconds, "floor_ms": floor, "floor_full_ms": 2 * floor if op != "apply" else floor}
                self._append(model, op, method, name, f"{rows}x{width}", count, values)
                fastest[op] = min(fastest.get(op, (milliseconds, name)), (milliseconds, name))

        for height, columns, depth, warps, stages in candidates:
            rest = depth, warps, stages
            square = (min(height, columns), max(height, columns), *rest)
            triton_kernels.TILES = {1 << 30: triton_kernels.Tiles(square, (height, max(columns, depth), *rest))}
            name = "x".join(map(str, (height, columns, depth, warps, stages)))
            try:
                note(name, products(group(matrices), rows, width))
            except Exception as error:  # of Triton, whose classes differ by version: more memory than the card has
                print(f"{model}: tiles {name} do not run: {str(error).splitlines()[0]}", file=sys.stderr)
        if not method:
            note("library", self._by_library(matrices))
        triton_kernels.TILES = kept
        where = " in FP8" if method else ""
        for op, (milliseconds, name) in fastest.items():
            print(
                f"{model}, {count} of {rows} rows: the fastest tiles of {op}{where} are {name}, {milliseconds:.3f} ms"
            )

    def _products(self, group: Any, rows: int, width: int) -> dict[str, tuple[float, float]]:
        """Time and floor of each product of a group in milliseconds."""
        group._x.copy_(torch.randn(group._x.shape, device=self.device) / width**0.5)
        first, second, out = group._squares(3)
        for square in (first, second):
            square.copy_(torch.eye(rows, device=self.device)[None])
        unit = 2e3 * len(group._matrices) * rows**2 / self.rate
        return {
            "gram": (self._ms(lambda: group._gram(out, 1.0)), unit * width / 2),
            "square": (self._ms(lambda: group._square(first, second, out, (1.0, 1.0, 0.0), None, 0)), unit * rows / 2),
            "apply": (self._ms(lambda: group._apply(first, 1.0, None, group._out)), unit * width),
        }

    def _fp8_products(self, group: Any, rows: int, width: int) -> dict[str, tuple[float, float]]:
        """The same in FP8."""
        group._fill()
        unit, polynomial = 2e3 * len(group._side_by_side.matrices) * rows**2 / self.fp8_rate, (3.0, -4.0, 2.0)
        group._form_gram(1.0)
        group._square(polynomial, 1.0)
        return {
            "gram": (self._ms(lambda: group._form_gram(1.0)), unit * width / 2),
            "square": (self._ms(lambda: group._square(polynomial, 1.0)), unit * rows / 2),
            "apply": (self._ms(lambda: group._apply(last=False)), unit * width),
        }

    def _by_library(self, matrices: Sequence[Tensor]) -> dict[str, tuple[float, float]]:
        """The same of products of X by cuBLAS, one matrix after the other."""
        rows, width = matrices[0].shape
        factor, outs = torch.eye(rows, device=self.device).to(self.dtype), [torch.empty_like(x) for x in matrices]

        def multiply() -> None:
            for x, out in zip(matrices, outs, strict=True):
                torch.addmm(x, factor, x, out=out)

        return {"apply": (self._ms(multiply), 2e3 * len(matrices) * rows**2 * width / self.rate)}

    def _floor(self, shape: Shape, segments: tuple[int, ...], symmetric: bool = True) -> float:
        return 2e3 * multiply_adds(shape, segments, symmetric) / self.rate

    def _step(self, shape: Shape) -> kernels.AdamStep:
        """Of one weight, with a momentum in 8 bits."""
        state: dict[str, Tensor] = {}
        moments.init_moments(state, torch.Size(shape), 8, self.device, moments.MOMENTS[:1])
        grad = torch.randn(shape, device=self.device).to(self.dtype)
        row = kernels.StepScalars(1, 1.0, 1.0).row(self.device)
        rows = torch.zeros(shape[0], device=self.device)
        momentum = (state["exp_avg"], state.get("exp_avg_absmax"), rows, None)
        return kernels.AdamStep(grad, *momentum, row, (0.9, 0.99), 1e-8)

    def _ms(self, run: Callable[[], object]) -> float:
        return median_ms(lambda _: run(), self.device, REPEATS)

    def _append(
        self, model: str, op: str, method: str, form: str, shape: str, count: int, values: Mapping[str, float]
    ) -> None:
        on_gpu = self.device.type == "cuda"
        row = {
            "model": model, "op": op, "method": method, "form": form, "shape": shape, "matrices": count,
            **{name: f"{value:.4g}" for name, value in values.items()},
            "large_product_tflops": f"{self.rate / 1e12:.4g}",
            "device": torch.cuda.get_device_name() if on_gpu else "cpu", "torch": torch.__version__,
            "commit": commit(),
        }  # fmt: skip
        print(", ".join(f"{name} {value}" for name, value in list(row.items())[:10]), flush=True)
        append_row(self._results, row)


if __name__ == "__main__":
    sys.exit(main())
