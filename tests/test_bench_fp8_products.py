"""`benchmarks/bench_fp8_products.py` on a CPU: every product both ways, and what it refuses."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import pytest
import torch

from benchmarks import bench_fp8_products, models

SMALL = dataclasses.replace(
    models.config("60m"), hidden_size=48, intermediate_size=104, num_attention_heads=4, num_key_value_heads=4,
    vocab_size=176,
)  # fmt: skip


@pytest.mark.parametrize("inner", [104, 101])
def test_every_product_is_near_the_exact_one_both_ways(inner: int) -> None:
    config = dataclasses.replace(SMALL, intermediate_size=inner)
    groups = list(bench_fp8_products.groups(config, 80, 12, "cpu"))
    # As in training: a product of another width takes ten times as long.
    assert all(x.shape[1] % 8 == 0 and x.is_contiguous() for _, _, group in groups for x in (group.x, group.grads[-1]))
    found = {
        (name, work.op): bench_fp8_products.row_of(work, lambda run: float(bool(run())))
        for name, _, group in groups for work in group.works()
    }  # fmt: skip
    assert len(found) == 4 * 4 + 3
    for name, row in found.items():
        assert 0.01 < float(str(row["fp8_error"])) < 0.08, (name, row)
        assert 1e-4 < float(str(row["bfloat16_error"])) < 0.01, (name, row)
    assert found["head", "forward"]["gain_ms"] == 0


def test_rows_without_a_gpu_have_errors_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "config", lambda name: SMALL)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_fp8_products.main(["--models", "60m", "--results", str(tmp_path / "rows.csv")]) == 0
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 19 and {row["device"] for row in rows} == {"cpu"}
    assert {row["fp8_ms"] for row in rows} == {""} and all(0 < float(row["fp8_error"]) < 0.1 for row in rows)
    assert capsys.readouterr().out.count("| 60m | head |") == 3


def test_what_it_needs_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    assert bench_fp8_products.main([]) == 2
    assert "needs a GPU with FP8: NVIDIA A100 has none" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench_fp8_products.main(["--models", "2b"])
    assert "2b is none of 60m" in capsys.readouterr().err
