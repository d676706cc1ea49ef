"""`benchmarks/bench_fp8_rounding.py` on a CPU, with kernels in Triton's interpreter."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_fp8_rounding, models
from qgalore.layer.layout import padded_width


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr(bench_fp8_rounding, "REPEATS", 1)
    return importlib.import_module("qgalore.kernels.triton.fp8_matmul")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def run(path: Path, *arguments: str) -> list[dict[str, str]]:
    assert bench_fp8_rounding.main([*arguments, "--device", "cpu", "--results", str(path)]) == 0
    return rows_of(path)


def test_what_a_layer_rounds_is_timed_once_a_shape(ours: Any) -> None:
    found = bench_fp8_rounding.specs_of("1b")
    assert len(found) == len(set(found)) == 2 + 3 + 3 + 3 + 2
    assert bench_fp8_rounding.Spec("gradients", 4096, (5461, 5461)) in found
    assert bench_fp8_rounding.Spec("turned weight", 2048, (5461,)) in found
    assert set(bench_fp8_rounding.MODELS) <= set(models.MICRO_BATCHES)
    for spec in found:
        settings = bench_fp8_rounding.settings_of(spec, sweeps=True)
        own = next(iter(settings.values()))
        assert own == bench_fp8_rounding.own_setting(spec) and 3 < len(settings) < 12, spec


def test_inputs_lie_as_in_training(ours: Any) -> None:
    for spec in bench_fp8_rounding._given("9x21,9x21+5"):
        work = bench_fp8_rounding.Work(spec, torch.device("cpu"))
        given = work._inputs[0]
        widths = [given.qdata.shape[1]] if "weight" in spec.kernel else [part.shape[1] for part in given[0]]
        assert widths == list(map(padded_width, spec.columns)), spec


def test_rows_of_every_kernel(ours: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(tmp_path / "rows.csv", "--shapes", "20x37,20x21+40")
    kernels = ["gradients", "rows", "columns", "weight", "turned weight", "gradients"]
    assert [row["kernel"] for row in rows] == kernels
    assert {row["chosen"] for row in rows} == {row["same"] for row in rows} == {"yes"}
    # Five matrices of 20 x 37 or 48 bytes, with scales and factors.
    rounded = 20 * 48 + 20 * 4
    assert float(rows[1]["mb"]) == pytest.approx((20 * 48 * 2 + rounded) / 1e6, abs=0.005)
    written = bench_fp8_rounding.ROOT / "benchmarks/results/fp8_rounding.csv"
    assert written.read_text(encoding="utf-8").splitlines()[0].split(",") == list(rows[0])
    assert capsys.readouterr().out.count("us by bytes; table") == len(rows)


def test_a_sweep_sets_the_tables_and_puts_them_back(
    ours: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, used = (ours.rows_tile, ours.WEIGHT), list[int]()
    monkeypatch.setattr(bench_fp8_rounding, "ROWS", ((2, 16, 1, True), (2, 12, 1, True)))
    launch = ours.fp8_rows
    monkeypatch.setattr(
        ours, "fp8_rows", lambda *given: (used.append(ours.rows_tile((37,)).columns), launch(*given))[1]
    )
    monkeypatch.setattr(bench_fp8_rounding, "_given", lambda shapes: [bench_fp8_rounding.Spec("rows", 5, (37,))])
    rows = run(tmp_path / "rows.csv", "--shapes", "any", "--sweep")
    assert [row["setting"] for row in rows] == ["4x256x4 kept", "2x16x1 kept"] and {*used} == {256, 16, 12}
    assert [row["chosen"] for row in rows] == ["yes", "no"] and {row["same"] for row in rows} == {"yes"}
    assert "rows 5x37: 2x12x1 kept does not run" in capsys.readouterr().out, "12 lanes are no power of two"
    assert kept == (ours.rows_tile, ours.WEIGHT)


def test_other_codes_are_told(
    ours: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_fp8_rounding.Work, "expected", lambda self: [torch.zeros_like(x) for x in self.run()])
    rows = run(tmp_path / "rows.csv", "--shapes", "4x5")
    assert {row["same"] for row in rows} == {"no"}
    assert capsys.readouterr().err.count("IS NOT WHAT THE REFERENCE GIVES") == len(rows)


def test_no_shape_is_begun_after_its_time(ours: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.csv"
    assert bench_fp8_rounding.main(f"--shapes 4x5 --seconds 0 --device cpu --results {path}".split()) == 0
    assert not path.exists() and "given turned weight 4x5" in capsys.readouterr().out
