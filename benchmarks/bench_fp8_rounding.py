"""Time of each kernel that rounds a factor of an FP8 product, beside its bytes.

    python -m benchmarks.bench_fp8_rounding                       # as the tables of the kernels have it
    python -m benchmarks.bench_fp8_rounding --sweep               # with every candidate for a tile, one by one
    python -m benchmarks.bench_fp8_rounding --shapes 48x85,48x21+21 --device cpu --results FILE

Kernels are those of `qgalore/kernels/triton/fp8_matmul.py`. A model has, for a micro-batch of `benchmarks/compare.py`:
`rows` of activations; `gradients`, rows of one to three outputs with a factor a column; `columns` of activations, which
are read twice; `weight`, in INT8 as a layer stores it, and `turned weight`. Each row of results is one of them with one
setting: rows, columns and warps of a tile, `kept` where values wait in registers (of which there may be a limit), or
`again` where they are read twice; rows, columns, blocks and warps of a weight; both tiles of columns. `mb` are bytes
read and written, `tbps` those over `ms`, `copy_tbps` what a copy on the device reaches, and `same` whether codes and
scales, of inputs that are not all finite, are those of the reference. Inputs have so many copies that a cache holds few
of them, and results of all calls are kept. `--sweep` compiles in processes beside, and prints at the end, for each
kernel, the fastest settings: what the tables there should have. No shape is begun after `--seconds`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import models
from benchmarks.rows import ROOT, append_row, commit
from benchmarks.timing import median_ms
from qgalore import kernels
from qgalore.kernels import reference
from qgalore.layer.layout import padded_width
from qgalore.layer.quantization import aligned_row_bytes

MODELS = ("7b", "60m", "1b", "350m")
REPEATS, GROUP_SIZE = 5, 256
ROWS: tuple[tuple[Any, ...], ...] = (
    (8, 256, 4, True), (4, 256, 4, True), (4, 512, 4, True), (1, 512, 2, True), (1, 1024, 4, True), (1, 2048, 8, True),
    (1, 4096, 16, True), (1, 2048, 8, True, 64), (1, 2048, 8, True, 128), (1, 4096, 16, True, 64), (1, 1024, 4, False),
    (1, 2048, 8, False), (1, 4096, 16, False), (4, 256, 4, False),
)  # fmt: skip
"""Rows, columns and warps of a program, whether values are kept, and the most registers."""
WEIGHT = ((16, 256, 2, 8), (16, 256, 4, 8), (16, 256, 8, 8), (8, 256, 4, 4), (8, 256, 8, 4), (8, 256, 16, 4))
TURNED_WEIGHT = (
    (64, 256, 1, 8), (64, 256, 2, 8), (64, 256, 4, 8), (128, 128, 1, 8), (128, 128, 2, 8), (128, 256, 1, 8),
    (64, 128, 4, 4),
)  # fmt: skip
"""Rows, columns, blocks, warps."""
COLUMN_MAXIMA = ((128, 64, 8), (256, 64, 8), (512, 64, 8), (256, 128, 8))
COLUMNS = ((128, 64, 8), (128, 64, 4), (64, 64, 4), (128, 128, 8), (64, 128, 8))
"""Rows, columns, warps."""

Setting = Mapping[str, Any]
"""A tile, or two, by the name of what gives it in `qgalore.kernels.triton.fp8_matmul`."""


class Spec(NamedTuple):
    """What is rounded: a matrix (rows, columns), or several side by side."""

    kernel: str
    rows: int
    columns: tuple[int, ...]

    @property
    def shape(self) -> str:
        """As a row of results has it."""
        return f"{self.rows}x{'+'.join(map(str, self.columns))}"


def specs_of(model: str) -> list[Spec]:
    """All that a layer of a model rounds, each shape once."""
    config, tokens = models.config(model), models.tokens(model)
    hidden, inner = config.hidden_size, config.intermediate_size
    # Queries, keys and values; the attention's output, and down; gate and up.
    gradients = [(hidden,) * 3, (hidden,), (inner,) * 2]
    sides = dict.fromkeys((rows, (columns,)) for rows, columns in config.matrix_shapes().values())
    return [
        *(Spec("rows", tokens, (width,)) for width in (hidden, inner)),
        *(Spec("gradients", tokens, widths) for widths in gradients),
        *(Spec("weight", *side) for side in sides), *(Spec("turned weight", *side) for side in sides),
        *(Spec("columns", tokens, (width,)) for width in (hidden, inner)),
    ]  # fmt: skip


class Work:
    """A kernel's inputs, in several copies, and what it makes of them."""

    def __init__(self, spec: Spec, device: torch.device, copies: int = 1) -> None:
        from qgalore.kernels.triton import fp8_matmul

        self.spec, self._ours = spec, fp8_matmul
        self._generator = torch.Generator(device).manual_seed(0)
        self._device = device
        self._inputs = [self._input() for _ in range(copies)]

    def _input(self) -> Any:
        kernel, rows, columns = self.spec
        if "weight" in kernel:
            width = aligned_row_bytes(columns[0], 8)
            codes = torch.randint(256, (rows, width), generator=self._generator, device=self._device, dtype=torch.uint8)
            scale = self._normal(rows, -(-columns[0] // GROUP_SIZE)).abs().mul_(1e-4).bfloat16()
            return kernels.QuantizedMatrix(codes, scale, scale * -128, columns[0], 8, GROUP_SIZE)
        parts = [self._normal(rows, padded_width(width)).bfloat16() for width in columns]
        if rows > 3:
            parts[0][0, 0], parts[-1][1, 1] = float("inf"), float("nan")
            for part in parts:
                part[2] = 0.0
        factors = [self._normal(kernels.fp8_width(width)).abs() for width in columns]
        return parts, factors if kernel == "gradients" else None

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self._device, generator=self._generator)

    def run(self, copy: int = 0, module: Any = None) -> list[Tensor]:
        """All tensors that are written; module: whose operations, those of Triton where it is not given."""
        module, given, (kernel, _, columns) = module or self._ours, self._inputs[copy % len(self._inputs)], self.spec
        if kernel == "weight":
            return list(module.fp8_weight(given))
        if kernel == "turned weight":
            turned, scales = module.fp8_turned_weights([given])
            return [*turned, *scales]
        parts, factors = given
        return list(module.fp8_columns(parts[0], *columns) if kernel == "columns" else module.fp8_rows(
            parts, list(columns), factors
        ))  # fmt: skip

    def read(self) -> int:
        """The bytes of one input."""
        given = self._inputs[0]
        if isinstance(given, kernels.QuantizedMatrix):
            return sum(tensor.nbytes for tensor in given[:3])
        return sum(tensor.nbytes for tensor in (*given[0], *(given[1] or ())))

    def moved(self, written: Sequence[Tensor]) -> int:
        """The bytes that are read and written."""
        return self.read() * (2 if self.spec.kernel == "columns" else 1) + sum(each.nbytes for each in written)

    @torch.no_grad()
    def expected(self) -> list[Tensor]:
        """What the reference makes of the first input."""
        return self.run(module=reference.fp8_matmul)


def same(expected: Sequence[Tensor], found: Sequence[Tensor]) -> bool:
    """Whether two factors have the same values, those that are not a number in the same places."""
    pairs = zip(expected, found, strict=True)
    return all(torch.equal(*(torch.nan_to_num(each.float(), nan=-1e9) for each in pair)) for pair in pairs)


# ---- settings


def own_setting(spec: Spec) -> Setting:
    """What the tables have for a shape."""
    from qgalore.kernels.triton import fp8_matmul

    if spec.kernel in ("rows", "gradients"):
        return {"rows_tile": fp8_matmul.rows_tile(spec.columns)}
    if spec.kernel == "columns":
        return {name: getattr(fp8_matmul, name) for name in ("COLUMN_MAXIMA", "COLUMNS")}
    name, groups = spec.kernel.replace(" ", "_").upper(), -(-spec.columns[0] // GROUP_SIZE)
    tiles: Mapping[int, Any] = getattr(fp8_matmul, name)
    return {name: next(tile for limit, tile in tiles.items() if groups <= limit)}


def settings_of(spec: Spec, sweeps: bool) -> dict[str, Setting]:
    """By name what is to be timed for a shape, the tables' own first."""
    from qgalore.kernels.triton import fp8_matmul

    own, found = own_setting(spec), list[Setting]()
    if spec.kernel in ("rows", "gradients"):
        depth = sum(map(kernels.fp8_width, spec.columns))
        for tile in (fp8_matmul.RowsTile(*numbers) for numbers in ROWS):
            waiting = depth * tile.rows / (32 * tile.warps)
            pieces = sum(-(-width // tile.columns) for width in spec.columns)
            # Not what would leave registers or not need them, lanes without work, or thousands of instructions.
            most = tile.registers or 150
            fits = waiting <= 0.75 * most and (tile.registers is None or waiting > 0.3 * most)
            if tile.columns < 2 * max(spec.columns) and (fits if tile.keeps else 4 < pieces <= 24):
                found.append({"rows_tile": tile})
    elif spec.kernel == "columns":
        found += [{**own, "COLUMN_MAXIMA": tile} for tile in COLUMN_MAXIMA]
        found += [{**own, "COLUMNS": tile} for tile in COLUMNS]
    else:
        (name,) = own
        found += [{name: fp8_matmul.WeightTile(*tile)} for tile in {"WEIGHT": WEIGHT}.get(name, TURNED_WEIGHT)]
    return {_name(setting): setting for setting in (own, *(found if sweeps else ()))}


def _name(setting: Setting) -> str:
    """Such as `4x256x4 kept`, or `512x64x8 128x64x8`."""
    if "rows_tile" in setting:
        rows, columns, warps, keeps, registers = setting["rows_tile"]
        return f"{rows}x{columns}x{warps} {'kept' if keeps else 'again'}{f' {registers}' if registers else ''}"
    return " ".join("x".join(map(str, tile)) for tile in setting.values())


@contextlib.contextmanager
def using(setting: Setting) -> Iterator[None]:
    """The kernels with these tiles, whatever the shape."""
    from qgalore.kernels.triton import fp8_matmul

    def in_module(name: str, tile: Any) -> Any:
        if name == "rows_tile":
            return lambda columns: tile
        return {1 << 30: tile} if "WEIGHT" in name else tile

    before = {name: getattr(fp8_matmul, name) for name in setting}
    try:
        for name, tile in setting.items():
            setattr(fp8_matmul, name, in_module(name, tile))
        yield
    finally:
        for name, value in before.items():
            setattr(fp8_matmul, name, value)


# ---- compiling ahead


@functools.lru_cache(maxsize=2)
def _small_work(spec: Spec) -> Work:
    """Of fewer tokens: kernels know of their number whether it is a multiple of 16."""
    rows = spec.rows if "weight" in spec.kernel or spec.rows % 1024 else 1024
    return Work(spec._replace(rows=rows), torch.device("cuda"))


def _compile(task: tuple[Spec, str]) -> bool:
    """Put a kernel into Triton's cache on disk, in a process of its own; whether that could be done."""
    spec, name = task
    with contextlib.suppress(Exception), using(settings_of(spec, sweeps=True)[name]):  # why not is said by `measure`
        _small_work(spec).run()
        return True
    return False


def compile_ahead(specs: Sequence[Spec], seconds: float) -> None:
    """Compile every kernel of a sweep, as many at once as there are cores; what is not done in time is left."""
    tasks = [(spec, name) for spec in specs for name in settings_of(spec, sweeps=True)]
    start = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(min(16, os.cpu_count() or 1)) as pool:
        done = pool.map_async(_compile, tasks, chunksize=4)
        done.wait(seconds)
        count = f"{sum(done.get())} of {len(tasks)}" if done.ready() else f"not all {len(tasks)}"
        pool.terminate()
    print(f"{count} settings compiled in {time.perf_counter() - start:.1f} s", flush=True)


# ---- timing


class Bench:
    """What is timed on one device, and where rows go."""

    def __init__(self, device: torch.device, results: Path, note: str) -> None:
        import triton

        self.device, self._results = device, results
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        size = (1 << 28) if device.type == "cuda" else 1 << 16
        source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
        copied = self._ms(lambda _: target.copy_(source), 4)
        self.copy_tbps = 2 * size / copied / 1e9
        self._circumstances = {
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "torch": torch.__version__,
            "triton": triton.__version__, "commit": commit(), "note": note,
        }  # fmt: skip

    @torch.no_grad()
    def _ms(self, run: Callable[[int], object], calls: int) -> float:
        return median_ms(run, self.device, REPEATS, calls, self._pool)

    def measure(self, model: str, spec: Spec, sweeps: bool) -> str:
        """Rows of one shape with each setting, and a line with the fastest."""
        first = Work(spec, self.device)
        expected = first.expected()
        moved = first.moved(expected)
        copies = -(-200_000_000 // first.read()) if self.device.type == "cuda" else 1
        calls = max(5, min(40, 1_500_000_000 // moved)) if self.device.type == "cuda" else 1
        work, times = Work(spec, self.device, min(copies, calls)), dict[str, float]()
        for name, setting in settings_of(spec, sweeps).items():
            try:
                with using(setting):
                    agrees, ms = same(expected, first.run()), self._ms(work.run, calls)
            except Exception as error:  # of Triton, whose classes differ by version: more registers than there are
                print(f"{model} {spec.kernel} {spec.shape}: {name} does not run: {str(error).splitlines()[:1]}")
                continue
            times[name] = ms
            if not agrees:
                print(f"{model} {spec.kernel} {spec.shape}: {name} IS NOT WHAT THE REFERENCE GIVES", file=sys.stderr)
            row = {
                "model": model, "kernel": spec.kernel, "shape": spec.shape, "setting": name,
                "chosen": "yes" if setting == own_setting(spec) else "no", "ms": f"{ms:.5f}",
                "mb": f"{moved / 1e6:.2f}", "tbps": f"{moved / ms / 1e9:.3f}", "copy_tbps": f"{self.copy_tbps:.3f}",
                "same": "yes" if agrees else "no",
            }  # fmt: skip
            append_row(self._results, row | self._circumstances)
        return self._line(model, spec, moved, times)

    def _line(self, model: str, spec: Spec, moved: int, times: Mapping[str, float]) -> str:
        """Microseconds: by bytes, of the tables' setting, and of the fastest ones."""
        floor = moved / self.copy_tbps / 1e6
        if not times:
            return f"{model} {spec.kernel} {spec.shape}: nothing runs"
        own = times.get(_name(own_setting(spec)), float("nan"))
        fastest = sorted(times.items(), key=lambda item: item[1])[:4]
        found = ", ".join(f"{name} {1e3 * ms:.1f}" for name, ms in fastest)
        return f"{model} {spec.kernel} {spec.shape}: {floor:.1f} us by bytes; table {1e3 * own:.1f}; {found}"


def _given(shapes: str) -> list[Spec]:
    """Every kernel of the shapes of a command line: several widths are gradients alone."""
    found = []
    for shape in shapes.split(","):
        rows, columns = shape.split("x")
        widths = tuple(map(int, columns.split("+")))
        names = ("gradients", "rows", "columns", "weight", "turned weight")[: 5 if len(widths) == 1 else 1]
        found += [Spec(name, int(rows), widths) for name in names]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print and append the rows."""
    start = time.perf_counter()
    parser = argparse.ArgumentParser(prog="bench_fp8_rounding", description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help="names, comma-separated")
    parser.add_argument("--shapes", default="", help="matrices instead, such as 4096x512,4096x512+512")
    parser.add_argument("--sweep", action="store_true", help="time every candidate for a tile")
    parser.add_argument("--seconds", type=float, default=80.0, help="after which no shape is begun")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/fp8_rounding.csv", help="CSV")
    parser.add_argument("--note", default="", help="what to remember of the circumstances")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and not kernels.has_fp8(device):
        print(f"bench_fp8_rounding needs a GPU with FP8: {torch.cuda.get_device_name()} has none", file=sys.stderr)
        return 2
    jobs = [("given", spec) for spec in _given(args.shapes)] if args.shapes else [
        (model, spec) for model in args.models.split(",") for spec in specs_of(model)
    ]  # fmt: skip
    if args.sweep and device.type == "cuda":
        compile_ahead([spec for _, spec in jobs], args.seconds / 2)
    bench, lines, left = Bench(device, args.results, args.note), list[str](), list[str]()
    gc.freeze()  # a capture collects garbage first
    for model, spec in jobs:
        if time.perf_counter() - start > args.seconds:
            left.append(f"{model} {spec.kernel} {spec.shape}")
            continue
        try:
            lines.append(bench.measure(model, spec, args.sweep))
        except torch.OutOfMemoryError as error:
            lines.append(f"{model} {spec.kernel} {spec.shape}: {str(error).splitlines()[0]}")
        torch.cuda.empty_cache()
    seconds = time.perf_counter() - start
    print(f"a copy: {bench.copy_tbps:.2f} TB/s; {seconds:.0f} s; left out: {', '.join(left) or 'none'}")
    print("\n".join(lines), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
