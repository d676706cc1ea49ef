"""The share of momenta in their largest singular directions, and ranks that are dealt by it."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from benchmarks.bench_spectrum import SHARES, dealt_ranks, energies, held, main
from tests.small_run import FULL_RANK, SmallRun, flags_of


@pytest.mark.parametrize("shape", [(48, 32), (32, 48)])
def test_energies_are_squared_singular_values(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    squares = torch.linalg.svdvals(matrix.double()) ** 2
    torch.testing.assert_close(energies(matrix), squares / squares.sum())
    assert held(energies(matrix), 1.0) == pytest.approx(1.0)


def test_ranks_go_where_a_byte_holds_most() -> None:
    steep, flat = torch.tensor([0.9, 0.1, 0.0, 0.0]), torch.full((4,), 0.25)
    shapes = {"steep": (steep, (4, 6)), "flat": (flat, (4, 6))}
    # Two dimensions each: the third and fourth of the flat one hold more than what the steep one has left.
    assert dealt_ranks(shapes, 0.5) == {"steep": 1, "flat": 3}
    twice = shapes | {"flat": (flat, (4, 100))}
    assert dealt_ranks(twice, 0.5)["flat"] < 3, "a long matrix pays more for a dimension"


def test_a_run_of_full_rank_has_a_row_a_matrix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small, results = SmallRun(tmp_path), tmp_path / "spectrum.csv"
    run = small.run("run", **FULL_RANK, num_training_steps=2)
    assert main([str(run.checkpoints[-1]), "--results", str(results)]) == 0
    with results.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["matrix"] for row in rows][:2] == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]
    assert len(rows) == 7 and {row["update"] for row in rows} == {"2"}
    for row in rows:
        squared, nuclear = ([float(row[f"{norm} {key}"]) for key in SHARES] for norm in ("squared", "nuclear"))
        for shares in (squared, nuclear):
            assert shares == sorted(shares) and shares[0] > 0 and shares[-1] <= 1
        # The largest hold more of a sum of squares than of a sum.
        assert all(more >= less for more, less in zip(squared, nuclear, strict=True))
    assert "down_proj" in capsys.readouterr().out
    low_rank = small.run("low", **flags_of("q_galore_adamw8bit"), num_training_steps=1)
    assert main([str(low_rank.checkpoints[-1]), "--results", str(results)]) == 2
    assert "train with --rank full" in capsys.readouterr().err
