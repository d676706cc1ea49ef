"""Time of all directions of an update at full rank beside the least time that their products can take.

    python -m benchmarks.bench_direction --models 7b                      # every method
    python -m benchmarks.bench_direction --models 7b --sweep              # tiles of the kernels, one by one
    python -m benchmarks.bench_direction --models 350m,1b,7b --sweep --methods muon_fp8   # of those in FP8 alone
    python -m benchmarks.bench_direction --shapes 48x130,48x48 --device cpu --results FILE

A sample of each distinct shape is timed, as many matrices as are updated at once, and multiplied by how many there are.
Rows have an op: `direction` is the whole of it, momentum in 8 bits, orthogonalisation and scale, `normuon` that with
rows of one size; `orthogonalize` is the middle alone, in the plain form and in segments. Their floors are the
multiply-adds of the form's products over the rate of one large product on the same device: `floor_ms` with symmetric
products counted by half, `floor_full_ms` the plain form with all products counted whole. `--sweep` times one product at
a time, `gram`, `square` and `apply` (`qgalore.kernels.triton.newton_schulz`), each with every candidate for its tiles
(`benchmarks.tile_sweep`), and prints the fastest: what `TILES` and `WHOLE_TILES` there should have.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import models
from benchmarks.rows import ROOT, append_row, commit
from benchmarks.timing import median_ms
from qgalore import kernels
from qgalore.kernels.arguments import GROUP_LIMIT
from qgalore.update import moments
from qgalore.update.directions import DIRECTIONS, direction_of, made_by_steps
from qgalore.update.newton_schulz import AUTO, METHODS, SEGMENT, multiply_adds, segments_of

Shape = tuple[int, int]
MODELS = ("60m", "130m", "350m", "1b", "7b")
OPS = {"orthogonal": "direction", "normuon": "normuon"}
"""Ops of rows by the names of directions."""
REPEATS = 5


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
            for fp8 in sorted({METHODS[method].fp8 for method in args.methods.split(",")}):
                bench.sweep(model, shapes, fp8)
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

    def method(self, model: str, shapes: Mapping[Shape, int], name: str) -> None:
        """Rows of a method for each shape and for all."""
        method, advance = METHODS[name], {op: direction_of(op, name).advance for op in OPS}
        speed, segmented = self.fp8_rate / self.rate if method.fp8 else 1.0, method.segmented
        steps = len(method.polynomials)
        plain = (1,) * steps
        forms = {"plain": plain, "segments": (SEGMENT, steps - SEGMENT)} if segmented else {"plain": plain}
        totals: Counter[tuple[str, str, str]] = Counter()
        for shape, count in shapes.items():
            chosen = segments_of(shape, steps) if segmented else plain
            together = min(count, _at_once(shape))
            adam_steps = [self._step(shape) for _ in range(together)]
            runs: dict[tuple[str, str], tuple[Callable[[], object], tuple[int, ...]]] = {
                (op, "chosen"): (lambda run=advance[direction], steps=adam_steps: run(steps, None), chosen)
                for direction, op in OPS.items()
            }
            momenta = [step.grad for step in adam_steps]
            for form, segments in forms.items():
                given = segments if segmented else None
                run = lambda momenta=momenta, given=given: made_by_steps(momenta, method, given)  # noqa: E731
                runs["orthogonalize", form] = run, segments
            for (op, form), (run, segments) in runs.items():
                values = {
                    "ms": self._ms(run) / together * count,
                    "floor_ms": self._floor(shape, segments) * count / speed,
                    "floor_full_ms": self._floor(shape, plain, symmetric=False) * count / speed,
                }
                self._append(model, op, name, form, "{}x{}".format(*shape), count, values)
                totals.update({(op, form, column): value for column, value in values.items()})
        for op, form in dict.fromkeys((op, form) for op, form, _ in totals):
            values = {column: totals[op, form, column] for column in ("ms", "floor_ms", "floor_full_ms")}
            self._append(model, op, name, form, "all", sum(shapes.values()), values)

    def sweep(self, model: str, shapes: Mapping[Shape, int], fp8: bool) -> None:
        """Rows of single products of as many matrices as are updated at once, and which tiles are the fastest."""
        from benchmarks import tile_sweep  # which needs Triton

        if fp8 and not kernels.has_fp8(self.device):
            return
        rows, width = max(((min(shape), max(shape)) for shape in shapes), key=lambda sides: sides[0] * sides[1])
        count = min(GROUP_LIMIT, _at_once((rows, width)))
        matrices = [torch.randn(rows, width, device=self.device).to(self.dtype) for _ in range(count)]
        tile_sweep.sweep(tile_sweep.Case(model, matrices, fp8), self, REPEATS, self._append)
        if not fp8:
            milliseconds, floor = self._by_library(matrices)
            values = {"ms": milliseconds, "floor_ms": floor, "floor_full_ms": floor}
            self._append(model, "apply", "", "library", f"{rows}x{width}", count, values)

    def _by_library(self, matrices: Sequence[Tensor]) -> tuple[float, float]:
        """Time and floor of products with X by cuBLAS, one matrix after the other, in milliseconds."""
        rows, width = matrices[0].shape
        factor, outs = torch.eye(rows, device=self.device).to(self.dtype), [torch.empty_like(x) for x in matrices]

        def multiply() -> None:
            for x, out in zip(matrices, outs, strict=True):
                torch.addmm(x, factor, x, out=out)

        return self._ms(multiply), 2e3 * len(matrices) * rows**2 * width / self.rate

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
