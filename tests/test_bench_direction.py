"""`benchmarks/bench_direction.py` on a CPU: floors by hand, totals, and tiles in Triton's interpreter."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks import bench_direction, models
from qgalore.update.newton_schulz import multiply_adds
from tests.kernels.comparison import use_tiles


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_have_floors_and_totals(tmp_path: Path) -> None:
    path = tmp_path / "direction.csv"
    argv = ["--shapes", "16x48,16x16,16x16", "--methods", "muon,polar4", "--device", "cpu", "--results", str(path)]
    assert bench_direction.main(argv) == 0
    rows = rows_of(path)
    written = Path(bench_direction.ROOT / "benchmarks/results/direction.csv")
    assert list(rows[0]) == list(rows_of(written)[0]), "the file of results has other columns"
    by_key = {(row["method"], row["op"], row["form"], row["shape"]): row for row in rows}
    assert len(by_key) == len(rows) == 3 * 3 + 3 * 4
    for row in rows:
        assert 0 < float(row["floor_ms"]) < float(row["floor_full_ms"]) and float(row["ms"]) > 0
    # In products of two (16, 16) matrices: a wide one in four plain steps, as is chosen for so small ones, or in two
    # segments, and two square ones.
    expected = {
        ("direction", "chosen"): 20 + 16,
        ("normuon", "chosen"): 20 + 16,
        ("orthogonalize", "plain"): 20 + 16,
        ("orthogonalize", "segments"): 14 + 16,
    }
    rate = 1e12 * float(rows[0]["large_product_tflops"])
    for (op, form), products in expected.items():
        total = by_key["polar4", op, form, "all"]
        assert total["matrices"] == "3"
        assert float(total["floor_ms"]) == pytest.approx(2e3 * products * 16**3 / rate, rel=0.01)
        assert float(total["floor_full_ms"]) == pytest.approx(2e3 * (28 + 24) * 16**3 / rate, rel=0.01)


def test_floors_of_7b_are_those_of_the_plan() -> None:
    """Seconds an update at 790 TFLOP/s: five plain steps, with their symmetry, and what the methods choose."""
    shapes = bench_direction._shapes_by_model("7b", "")["7b"]
    assert sum(shapes.values()) == 7 * 32
    seconds = []
    for wide, square, symmetric in (
        ((1,) * 5, (1,) * 5, False), ((1,) * 5, (1,) * 5, True), ((2, 3), (1,) * 5, True), ((2, 2), (1,) * 4, True),
    ):  # fmt: skip
        counted = sum(
            count * multiply_adds(shape, square if shape[0] == shape[1] else wide, symmetric)
            for shape, count in shapes.items()
        )
        seconds.append(round(2 * counted / 790e12, 2))
    assert seconds == [0.87, 0.60, 0.47, 0.40]
    assert set(bench_direction.MODELS) <= set(models.MICRO_BATCHES)


def sweep_once(monkeypatch: pytest.MonkeyPatch, methods: str, path: Path) -> None:
    """A sweep of one shape on a CPU, each product timed once."""
    monkeypatch.setattr(bench_direction, "REPEATS", 1)
    argv = ["--shapes", "32x64", "--sweep", "--methods", methods, "--device", "cpu", "--results", str(path)]
    assert bench_direction.main(argv) == 0


def test_a_sweep_times_single_products(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each once, though a candidate is in a table, too, or is the same of symmetric products."""
    sweep = pytest.importorskip("benchmarks.tile_sweep", reason="Triton is not installed")
    path = tmp_path / "direction.csv"
    use_tiles(monkeypatch, sweep.newton_schulz, [(16, 16, 16, 4, 1)] * 3)
    use_tiles(monkeypatch, sweep.newton_schulz, [(16, 32, 16, 4, 1)] * 3, whole=True)
    candidates = ((32, 16, 16, 4, 1), (16, 32, 16, 4, 1), (16, 12, 16, 4, 1))
    monkeypatch.setattr(sweep, "MASKED", candidates)
    monkeypatch.setattr(sweep, "WHOLE", candidates[:1])
    sweep_once(monkeypatch, "muon,polar4", path)
    found = [(row["op"], row["form"]) for row in rows_of(path)]
    wide, square, tall = "16x32x16x4x1", "16x16x16x4x1", "32x16x16x4x1"
    assert found == [
        *[(op, f"{wide} whole") for op in sweep.OPS], *[(op, square) for op in sweep.OPS],
        ("gram", wide), ("square", wide), ("apply", tall), ("apply", wide), ("apply", f"{tall} whole"),
        ("apply", "library"),
    ]  # fmt: skip
    said = capsys.readouterr()
    assert "tiles 12x16x16x4x1 do not run" in said.err and "tiles 16x16x16x4x1" not in said.err
    lines = [line for line in said.out.splitlines() if "fastest" in line]
    assert len(lines) == 3
    for op, line in zip(sweep.OPS, lines, strict=True):
        times = {row["form"]: float(row["ms"]) for row in rows_of(path) if row["op"] == op}
        best = min((form for form in times if "x" in form and "whole" not in form), key=lambda form: times[form])
        assert f"32 rows, {op}: fastest with masks {best} " in line and " through descriptors " in line
        start, took = line.removesuffix(" ms").rsplit(" ", 1)
        assert start.endswith(f"the table has {wide} whole")
        assert float(took) == pytest.approx(times[f"{wide} whole"], rel=1e-3), "rows have four digits"


def test_a_sweep_compiles_before_it_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = pytest.importorskip("benchmarks.tile_sweep", reason="Triton is not installed")
    called: list[object] = []
    run = lambda self, *given, **how: called.append((given, how))  # noqa: E731
    monkeypatch.setattr(sweep.JITFunction, "run", run)
    with pytest.raises(ZeroDivisionError), sweep._compiled_together():
        sweep.JITFunction.run(None, 3, grid=(1,), warmup=False, T=16)
        raise ZeroDivisionError
    assert called == [((3,), {"grid": (1,), "warmup": True, "T": 16})] and sweep.JITFunction.run is run


def test_a_sweep_of_methods_in_fp8_has_those_products_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = pytest.importorskip("benchmarks.tile_sweep", reason="Triton is not installed")
    path = tmp_path / "direction.csv"
    use_tiles(monkeypatch, sweep.newton_schulz_fp8, [(16, 16, 32, 4, 1)] * 3)
    monkeypatch.setattr(sweep, "FP8_MASKED", ((32, 32, 32, 4, 1),))
    sweep_once(monkeypatch, "muon_fp8", path)
    assert not path.exists(), "a CPU has no products in FP8"
    monkeypatch.setattr(bench_direction.kernels, "has_fp8", lambda device: True)
    monkeypatch.setattr(bench_direction.kernels, "fp8_product", lambda *given: None)
    sweep_once(monkeypatch, "muon_fp8", path)
    rows = rows_of(path)
    assert [(row["op"], row["form"]) for row in rows] == [
        ("gram", "16x16x32x4x1"), ("square", "16x16x32x4x1"), ("apply", "16x16x32x4x1"), ("gram", "32x32x32x4x1"),
        ("square", "32x32x32x4x1"), ("apply", "32x32x32x4x1"),
    ]  # fmt: skip
    assert {row["method"] for row in rows} == {"fp8"}
    assert "of 32 rows, gram in FP8: fastest with masks" in capsys.readouterr().out


@pytest.mark.parametrize(("methods", "said"), [("auto", "; auto is one of the first two"), ("muon,polar6", "polar6")])
def test_methods_are_those_that_can_be_timed(
    methods: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--shapes", "8x8", "--device", "cpu", "--results", str(tmp_path / "rows.csv")]
    with pytest.raises(SystemExit):
        bench_direction.main(["--methods", methods, *small])
    error = capsys.readouterr().err
    assert said in error and "it must be of muon, muon_fp8, muon4_fp8, polar5, polar4" in error
