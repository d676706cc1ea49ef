"""The study of perplexity: real runs of two updates, their rows, and the picture made of them."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from benchmarks import quality
from benchmarks.rows import append_row
from peft_pretraining.args import parse_args

SMALL = ["--model", "9m", "--updates", "2", "--sequences", "2", "--batch_size", "1", "--device", "cpu"]


def token_folder(folder: Path, seed: int) -> str:
    folder.mkdir()
    random = np.random.default_rng(seed)
    for name in ("train", "validation"):
        (folder / f"{name}.uint16").write_bytes(random.integers(2, 4000, 20_000, dtype=np.uint16).tobytes())
    return str(folder)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_runs_give_rows_and_rows_a_picture(tmp_path: Path) -> None:
    results, picture = tmp_path / "quality.csv", tmp_path / "frontier.png"
    bench, c4 = token_folder(tmp_path / "bench", 0), token_folder(tmp_path / "c4", 1)
    argv = ["--tokens", bench, *SMALL, "--settings", "q_galore_streaming", "--results", str(results)]
    argv += ["--extra=--rank 64 --eval_tokens 2000"]
    quality.main([*argv, "--c4_tokens", c4, "--seeds", "0,1", "--parallel", "2"])
    # On the run's own validation tokens its checkpoint has the perplexity that the run gave.
    quality.main([*argv, "--c4_tokens", bench, "--plot", str(picture)])
    first, second, again = sorted(rows_of(results)[:2], key=lambda row: row["seed"]) + rows_of(results)[2:]
    assert (first["seed"], second["seed"], again["seed"]) == ("0", "1", "0")
    assert first["perplexity"] == again["perplexity"] != second["perplexity"]
    assert float(again["c4_perplexity"]) == pytest.approx(float(again["perplexity"]), rel=1e-4)
    assert first["c4_perplexity"] != again["c4_perplexity"] and float(first["c4_perplexity"]) > 1000
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_bytes_are_those_of_the_plan(tmp_path: Path) -> None:
    args = quality.build_parser().parse_args(["--tokens", token_folder(tmp_path / "bench", 0), "--device", "cuda"])

    def planned(name: str) -> dict[str, float]:
        return quality.planned_bytes(parse_args([*quality.flags_of_run(name, 0, args), "--save_dir", str(tmp_path)]))

    full, ours, at_once = (planned(name) for name in ("adamw_tuned", "q_galore_streaming", "q_galore_per_layer"))
    parameters = 58.07e6
    assert full["weights_gb"] == pytest.approx(2 * parameters / 1e9, rel=0.01)
    assert full["states_gb"] == pytest.approx(8 * parameters / 1e9, rel=0.01)
    assert ours["weights_gb"] < full["weights_gb"] and ours["states_gb"] < 0.3 * full["states_gb"]
    assert at_once["gradients_gb"] == 0 < ours["gradients_gb"] < full["gradients_gb"]


@pytest.mark.parametrize("name", quality.SETTINGS)
def test_every_setting_parses(name: str, tmp_path: Path) -> None:
    args = quality.build_parser().parse_args(["--tokens", token_folder(tmp_path / "bench", 0)])
    parse_args([*quality.flags_of_run(name, 0, args), "--save_dir", str(tmp_path / "run")])


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--tokens", "x", "--settings", "adamw,sgdw"], "--settings sgdw: there are adamw, adamw_tuned,"),
        ([], "--tokens is missing: a folder with train and validation token files"),
    ],
)
def test_what_the_user_can_mend(argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        quality.main(argv)
    assert sentence in capsys.readouterr().err


def test_rows_of_other_columns_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.csv"
    append_row(path, {"a": 1, "b": "x"})
    append_row(path, {"b": "y", "a": 2})
    with pytest.raises(SystemExit, match=r"has not the columns of this row \(b, c\)"):
        append_row(path, {"a": 3, "c": 4})
    assert path.read_text() == "a,b\n1,x\n2,y\n"


def test_the_plot_names_the_best_of_each_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    results = tmp_path / "quality.csv"
    columns = ("model", "updates", "setting", "flags", "seed", "perplexity", *quality.BYTES)
    rows = [
        ("60m", 800, "a", "--lr 1", 0, 50.0, 1, 2, 0), ("60m", 800, "a", "--lr 2", 0, 48.0, 1, 2, 0),
        ("60m", 800, "b", "", 0, 50.0, "", "", ""), ("60m", 800, "b", "", 1, 52.0, 3, 1, 1),
        ("130m", 800, "a", "--lr 2", 0, 40.0, 1, 2, 0), ("60m", 3200, "c", "", 0, 30.0, 1, 2, 0),
        ("60m", 800, "old", "", 0, 45.0, "", "", ""),
    ]  # fmt: skip
    results.write_text("\n".join(",".join(map(str, row)) for row in [columns, *rows]) + "\n")
    drawn: list[tuple[float, float, object]] = []
    plain = Axes.errorbar

    def errorbar(axes: Axes, x: float, y: float, **style: object) -> object:
        drawn.append((x, y, style.get("label")))
        return plain(axes, x, y, **style)

    monkeypatch.setattr(Axes, "errorbar", errorbar)
    quality.plot(results, tmp_path / "plot.png", "60m", 800)
    assert drawn == [(3.0, 48.0, "a: 48.0"), (3.0, 50.0, None), (5.0, 51.0, "b: 51.0 (2 seeds)")]
