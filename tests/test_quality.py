"""The study of perplexity: real runs of two updates, their rows, and the picture made of them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import quality, quality_plot
from benchmarks.rows import ROOT, append_row
from peft_pretraining.config.parse import parse_args

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


@pytest.mark.slow
def test_runs_give_rows_and_rows_a_picture(tmp_path: Path) -> None:
    results, picture = tmp_path / "quality.csv", tmp_path / "frontier.png"
    bench, c4 = token_folder(tmp_path / "bench", 0), token_folder(tmp_path / "c4", 1)
    argv = ["--tokens", bench, *SMALL, "--settings", "q_galore_streaming", "--results", str(results)]
    argv += ["--extra=--rank 64 --eval_tokens 2000"]
    quality.main([*argv, "--c4_tokens", c4, "--seeds", "1,0"])
    # On the run's own validation tokens its checkpoint has the perplexity that the run gave.
    runs = tmp_path / "runs.txt"
    runs.write_text("# again\n--seeds 0\n\n--updates 3 --extra '--rank 32 --eval_tokens 2000'  # longer\n")
    quality.main([*argv, "--c4_tokens", bench, "--plot", str(picture), "--runs", str(runs), "--parallel", "2"])
    other, first, *rest = rows_of(results)
    again, longer = sorted(rest, key=lambda row: row["updates"])
    assert [row["seed"] for row in (other, first, again, longer)] == ["1", "0", "0", "0"]
    assert first["perplexity"] == again["perplexity"] != other["perplexity"], "who trained before leaves no trace"
    assert (longer["updates"], longer["flags"].split()[-4:]) == ("3", ["--rank", "32", "--eval_tokens", "2000"])
    assert float(again["c4_perplexity"]) == pytest.approx(float(again["perplexity"]), rel=1e-4)
    assert first["c4_perplexity"] != again["c4_perplexity"] and float(first["c4_perplexity"]) > 1000
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_run_that_fails_says_why_and_spoils_no_other(tmp_path: Path) -> None:
    results, runs = tmp_path / "quality.csv", tmp_path / "runs.txt"
    argv = ["--tokens", token_folder(tmp_path / "bench", 0), *SMALL, "--settings", "q_galore_streaming"]
    runs.write_text("--extra '--rank 999'\n--extra '--rank 64 --eval_tokens 2000'\n")
    with pytest.raises(SystemExit) as failure:
        quality.main([*argv, "--results", str(results), "--runs", str(runs)])
    assert "q_galore_streaming with seed 0 failed: " in str(failure.value) and "--rank is 999" in str(failure.value)
    assert [row["flags"].split()[-3] for row in rows_of(results)] == ["64"]


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
    run = parse_args([*quality.flags_of_run(name, 0, args), "--save_dir", str(tmp_path / "run")])
    # As in the rows that were measured, whatever an optimizer's name has come to mean.
    quantized = run.optimizer.is_q_galore and not name.endswith("_float")
    assert run.quantization.weight_quant == quantized
    assert run.quantization.stochastic_round == (quantized and not name.endswith("_nearest"))
    assert run.subspace.proj_quant == (quantized and run.subspace.projects)


def test_the_runs_that_are_open_parse(tmp_path: Path) -> None:
    parser = quality.build_parser()
    argv = ["--tokens", token_folder(tmp_path / "bench", 0), "--runs", str(ROOT / "benchmarks/open_runs.txt")]
    runs = quality.runs_of(argv, parser)
    assert len(runs) > len({run.setting for run in runs}) > 1
    for run in runs:
        flags = quality.flags_of_run(run.setting, run.seed, parser.parse_args(run.argv))
        parse_args([*flags, "--save_dir", str(tmp_path / "run")])


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--tokens", "x", "--settings", "adamw,sgdw"], "--settings sgdw: there are adamw, adamw_tuned,"),
        (["--tokens", "x", "--plot", "y", "--settings", "q_galore_streaming_20_polar"], "_polar: there are adamw,"),
        (["--plot", "y", "--settings", "sgdw"], "--settings sgdw: there are adamw, adamw_tuned,"),
        (["--plot", "y", "--settings", "sgdw"], ", q_galore_streaming_20_polar"),
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


NORMUON, ROW_MOMENTS = "--direction normuon", "--full_rank_second_moment row"
PARTS = "--momentum_rank 1/16 --momentum_rest_bits 4"
ROWS = [
    ("60m", 800, "adamw", "--lr 1", 0, 50.0, 5, 2, 0), ("60m", 800, "adamw", "--lr 2", 0, 48.0, 5, 2, 0),
    ("60m", 800, "muon", "", 0, 90.0, 3, 1, 1), ("60m", 800, "muon", "", 1, 52.0, 3, 1, 1),
    ("60m", 800, "muon", "", 0, 50.0, 3, 1, 1), ("60m", 800, "muon", "--rank 64", 0, 60.0, 1, 1, 1),
    ("60m", 800, "muon", "--rank 64 --rank 8 --weight_bits 4", 0, 70.0, 1, 0, 1),
    ("60m", 800, "muon", f"--rank full --mlp_rank 3 {NORMUON} {ROW_MOMENTS}", 0, 71.0, 1, 1, 1),
    ("60m", 800, "muon", f"--rank full {PARTS} --momentum_rest_bits 2", 0, 72.0, 1, 1, 1),
    ("60m", 800, "muon", "--lr 9", 0, 49.0, "", "", ""),
    ("130m", 800, "adamw", "--lr 2", 0, 40.0, 1, 2, 0), ("60m", 3200, "adamw", "", 0, 30.0, 1, 2, 0),
    ("60m", 800, "old", "", 0, 45.0, 1, 1, 1),
]  # fmt: skip


def rows_to_plot(path: Path) -> Path:
    columns = ("model", "updates", "setting", "flags", "seed", "perplexity", *quality_plot.BYTES)
    path.write_text("\n".join(",".join(map(str, row)) for row in [columns, *ROWS]) + "\n")
    return path


def test_a_point_is_the_mean_of_the_newest_runs_of_its_seeds(tmp_path: Path) -> None:
    points = quality_plot.read_points(rows_to_plot(tmp_path / "quality.csv"), "60m", 800, ["adamw", "muon"])
    assert [(point.mean, point.size, point.setting, point.label) for point in points] == [
        (48.0, 7.0, "adamw", ""),
        (50.0, 7.0, "adamw", ""),
        (51.0, 4.0, "muon", ""),
        (60.0, 2.0, "muon", "rank 64"),
        (70.0, 1.0, "muon", "rank 8, INT4 weights"),
        (71.0, 2.0, "muon", "rank full and 3, NorMuon, row moments"),
        (72.0, 2.0, "muon", "parts 1/16 + 2 bits"),
    ]
    assert points[2].seeds == [50.0, 52.0]
    assert [point.mean for point in quality_plot.frontier(points)] == [70.0, 60.0, 51.0, 48.0]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, object, object]]:
    """The points and the label of each line that a plot draws."""
    from matplotlib.axes import Axes

    lines: list[tuple[object, object, object]] = []
    plain = Axes.errorbar

    def errorbar(axes: Axes, x: list[float], y: list[float], **style: Any) -> object:
        lines.append((x, y, style["label"]))
        return plain(axes, x, y, **style)

    monkeypatch.setattr(Axes, "errorbar", errorbar)
    return lines


def test_the_plot_draws_the_frontier_of_each_setting(
    tmp_path: Path, drawn: list[tuple[object, object, object]]
) -> None:
    results = rows_to_plot(tmp_path / "quality.csv")
    quality_plot.plot(results, tmp_path / "plot.png", "60m", 800, ["adamw", "muon"])
    # Twice, for the two parts of the axis; 70 is beyond the top.
    top = 1.45 * 48
    assert drawn[::2] == [([7.0], [48.0], "adamw: 48.0"), ([1.0, 2.0, 4.0], [top, 60.0, 51.0], "muon: 51.0 (2 seeds)")]
    with pytest.raises(SystemExit, match="no run of --model 60m over --updates 7"):
        quality_plot.plot(results, tmp_path / "plot.png", "60m", 7, ["adamw", "muon"])


def test_labels_of_points_that_lie_close_cover_neither_each_other_nor_points() -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    figure = Figure(figsize=(9, 6))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_xlim(0.13, 0.25)
    axes.set_ylim(39.0, 61.0)
    near = [("parts 1/16 + 4 bits", 0.174, 41.8), ("parts 1/64 + 4 bits", 0.172, 42.0), ("rank 512", 0.191, 41.6)]
    near += [("parts 1/4 + 4 bits", 0.182, 41.6), ("NorMuon, row moments, parts 1/16 + 4 bits", 0.141, 41.0)]
    labels = [*near, ("rank full, NorMuon, row moments", 0.151, 40.7)]
    written = quality_plot.place_labels(axes, labels)
    assert sorted((each.get_text(), *each.xy) for each in written) == sorted(labels)
    figure.canvas.draw()
    texts = [Text.get_window_extent(each) for each in written]
    points = axes.transData.transform([label[1:] for label in labels])
    for index, text in enumerate(texts):
        assert not text.count_overlaps([*texts[:index], *texts[index + 1 :]])
        assert not any(text.contains(*point) for point in points)
        assert axes.get_window_extent().containsx(text.x0) and axes.get_window_extent().containsx(text.x1)


def test_rows_of_settings_that_are_gone_can_be_drawn(
    tmp_path: Path, drawn: list[tuple[object, object, object]]
) -> None:
    argv = ["--plot", str(tmp_path / "plot.png"), "--results", str(rows_to_plot(tmp_path / "quality.csv"))]
    quality.main([*argv, "--settings", "old"])
    assert drawn == [([2.0], [45.0], "old: 45.0")] and (tmp_path / "plot.png").is_file()
