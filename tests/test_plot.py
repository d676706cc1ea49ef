"""`qgalore plot`: the curves, the table of last values, the pictures of one run and of many, and what it refuses."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from peft_pretraining.commands import plot
from peft_pretraining.errors import UserError
from peft_pretraining.reporting.curves import RunCurves, distinct_labels, read_curves, running_mean, thinned
from peft_pretraining.reporting.similarity import COLUMNS, similarity_layers, similarity_map

ROOT = Path(__file__).resolve().parent.parent


def metrics(updates: int, every: int = 1, evals: bool = True, floor: float = 3.0) -> list[dict[str, Any]]:
    """Lines as run_pretrain.py writes them: 100 tokens and 36 seconds an update, the first of unknown length."""
    lines: list[dict[str, Any]] = []
    for step in range(every, updates + 1, every):
        line = {"update_step": step, "train/loss": floor + 7 / step, "train/lr": 0.01, "train/tokens": 100.0 * step}
        lines.append(line | {"memory/peak_gb": 1.5, "time/update_seconds": 36.0})
        if evals and step % (5 * every) == 0:
            loss = floor + 8 / step
            result = {"eval/loss": loss, "eval/perplexity": math.exp(loss), "eval/perplexity_official": math.exp(2.5)}
            lines.append({"update_step": step, **result, "eval/tokens": 1000.0})
    del lines[0]["time/update_seconds"]
    return lines


def write_run(folder: Path, lines: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


# ---- curves


def test_points_are_at_the_updates_tokens_and_hours_of_their_line(tmp_path: Path) -> None:
    """An evaluation has neither tokens nor time of its own: those of the update before it count."""
    curves = read_curves(write_run(tmp_path, metrics(20)))
    assert curves.series("eval/loss").x == [5, 10, 15, 20]
    assert curves.series("eval/loss", "tokens").x == [500, 1000, 1500, 2000]
    assert curves.series("eval/loss", "hours").x == pytest.approx([0.05, 0.1, 0.15, 0.2])
    # Between two logged lines an update is interpolated.
    sparse = read_curves(write_run(tmp_path, [*metrics(20, every=10), {"update_step": 15, "eval/loss": 1.0}]))
    assert sparse.series("eval/loss", "tokens").x == [1500]
    assert sparse.last_values().hours == pytest.approx(0.2)


def test_values_that_are_not_finite_or_no_numbers_are_no_points(tmp_path: Path) -> None:
    lines = metrics(6, evals=False)
    lines[1]["train/loss"], lines[2]["train/loss"], lines[3]["train/loss"] = None, float("nan"), "high"
    assert read_curves(write_run(tmp_path, lines)).series("train/loss").x == [1, 5, 6]


def test_a_running_mean_is_over_updates_and_not_over_lines() -> None:
    assert running_mean([1, 2, 3, 10], [1.0, 3.0, 8.0, 7.0], 2) == [1.0, 2.0, 5.5, 7.0]
    assert running_mean([1, 2, 3], [1.0, 3.0, 8.0], 1) == [1.0, 3.0, 8.0]
    assert running_mean([1, 2, 3], [1.0, 3.0, 8.0], 99) == [1.0, 2.0, 4.0]


def test_thinning_keeps_ends_and_extremes() -> None:
    y = [0.0] * 10_000
    y[1234], y[7777] = 9.0, -9.0
    x, kept = thinned(range(10_000), y, 100)
    assert len(x) <= 100 and x[0] == 0 and x[-1] == 9999 and x == sorted(x)
    assert kept[x.index(1234)] == 9.0 and kept[x.index(7777)] == -9.0
    assert thinned([1, 2], [3, 4], 2) == ([1, 2], [3, 4])


def test_labels_are_names_with_as_many_parents_as_tell_them_apart(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a/x/run", "b/x/run", "c/run", "c/other")]
    assert distinct_labels(folders) == ["a/x/run", "b/x/run", "c/run", "other"]
    with pytest.raises(UserError, match=r"c/\.\./a is given twice: give each run once"):
        distinct_labels([tmp_path / "a", tmp_path / "c/../a"])


def test_similarity_map_averages_over_bins(tmp_path: Path) -> None:
    name = "subspace/similarity/a"
    lines = [{"update_step": step, name: step / 600} for step in range(0, 600, 5)]
    curves = RunCurves(tmp_path, [*lines, {"update_step": 600, "subspace/similarity/b": 0.5}])
    table = similarity_map(curves, similarity_layers(curves))
    assert [len(row) for row in table] == [COLUMNS, COLUMNS]
    assert table[0][0] == pytest.approx((0 + 5) / 2 / 600) and table[0][59] == pytest.approx((590 + 595) / 2 / 600)
    assert table[1] == [None] * (COLUMNS - 1) + [0.5]


# ---- the table


def test_the_table_has_the_last_values_of_each_run(tmp_path: Path) -> None:
    runs = {"one": metrics(20), "another": metrics(1200, every=100, evals=False), "bare": [{"update_step": 3}]}
    text = plot.table({label: read_curves(write_run(tmp_path / label, lines)) for label, lines in runs.items()})
    rows = [line.split("  ") for line in text.splitlines()]
    cells = [[cell.strip() for cell in row if cell] for row in rows]
    assert cells[0][0] == "run" and cells[0][-1] == "hours"
    assert cells[1][1:] == ["20", "2,000", "3.3500", f"{math.exp(3.4):.3f}", f"{math.exp(2.5):.3f}", "1.50 GB", "0.2"]
    assert cells[2][1:] == ["1,200", "120,000", "3.0058", "-", "-", "1.50 GB", "12"]
    assert cells[3][1:] == ["3", "-", "-", "-", "-", "-", "-"]
    ends = {len(line) for line in text.splitlines()}
    assert len(ends) == 1, "columns are aligned to the right"


def test_a_perplexity_that_is_not_finite_is_inf(tmp_path: Path) -> None:
    lines = [*metrics(5), {"update_step": 6, "eval/loss": 800.0, "eval/perplexity": None}]
    assert read_curves(write_run(tmp_path, lines)).last_values().perplexity == math.inf


# ---- pictures


def drawn(runs: dict[str, Path], **style: Any) -> Any:
    """The axes of the comparison of these runs."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    axes, look = Figure().subplots(), plot.Style(**style)
    curves = {label: read_curves(folder) for label, folder in runs.items()}
    plot.draw_curves(axes, curves, look)
    plot.add_legend(axes, curves, look)
    return axes


def test_several_runs_have_colours_of_their_own_and_one_legend(tmp_path: Path) -> None:
    """The beginning, whose losses are far above the rest, is cut off, but not with --log."""
    runs = {f"r{i}": write_run(tmp_path / str(i), metrics(40 + i, evals=i != 1)) for i in range(10)}
    axes = drawn(runs, by="tokens", smooth=1)
    lines = [line for line in axes.get_lines() if line.get_label() in runs]
    assert len({line.get_color() for line in lines}) == 10
    assert list(lines[0].get_xdata()) == [100.0 * step for step in range(1, 41)]
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == [*runs, "training, running mean", "evaluation"]
    assert axes.get_legend().get_bbox_to_anchor() is not None and axes.get_xlabel() == "tokens"
    assert axes.get_ylim()[1] < 6 and drawn(runs, log=True).get_ylim()[1] > 9
    assert drawn(runs, log=True, log_x=True).get_xscale() == "log"


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    """$ begins a formula in matplotlib's texts, and what begins with _ is left out of its legends."""
    runs = {name: write_run(tmp_path / str(i), metrics(5)) for i, name in enumerate(("_a", "$b_{$", "50%$"))}
    axes = drawn(runs)
    texts = axes.get_legend().get_texts()
    assert [text.get_text() for text in texts][:3] == [" _a", r"\$b_{\$", r"50%\$"]
    axes.figure.canvas.draw()  # a broken formula would raise
    assert texts[1]._preprocess_math(texts[1].get_text()) == ("$b_{$", False)


def test_perplexity_is_that_of_the_mean_loss(tmp_path: Path) -> None:
    run = write_run(tmp_path, metrics(10))
    line = drawn({"r": run, "s": run}, metric="train_perplexity", smooth=2).get_lines()[0]
    assert line.get_ydata()[1] == pytest.approx(math.exp((10.0 + 6.5) / 2))
    points = drawn({"r": run}, metric="eval_perplexity").get_lines()[0]
    assert list(points.get_ydata()) == pytest.approx([math.exp(3 + 8 / 5), math.exp(3 + 8 / 10)])


def test_one_run_is_drawn_into_its_folder_with_its_subspaces(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    names = [f"subspace/similarity/model.layers.{layer}.mlp.up_proj" for layer in range(3)]
    lines = [line | (dict.fromkeys(names, 0.5) if "train/lr" in line else {}) for line in metrics(30)]
    run = write_run(tmp_path / "run", lines)
    assert plot.main([str(run)]) == 0
    picture = (run / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    assert capsys.readouterr().out.splitlines()[-1] == f"drew {run / 'curves.png'}"


def test_several_runs_are_drawn_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    runs = [str(write_run(tmp_path / name, metrics(10, evals=name == "a"))) for name in "ab"]
    assert plot.main([*runs, "--by", "hours"]) == 0
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 4
    assert said.err == "qgalore plot: b: no evaluation yet (--eval_every of run_pretrain.py, or its end)\n"


# ---- what is refused


@pytest.mark.parametrize(
    ("make", "flags", "text"),
    [
        ("", "", "nothing does not exist: give the --save_dir of a run"),
        ("file", "", "nothing is a file: give the --save_dir of a run"),
        ("folder", "", "nothing/metrics.jsonl does not exist: {0}/nothing must be the --save_dir of a run"),
        ("checkpoint", "", "nothing is a checkpoint: give the folder of its run, {0}"),
        ("empty", "", "nothing/metrics.jsonl has no lines yet: let the run finish an update first"),
        ("cut", "", "nothing/metrics.jsonl has no lines yet"),
        ("binary", "", "nothing/metrics.jsonl is damaged: none of its 2 lines has metrics of an update"),
        ("bare", "", "--metric loss: no run has a finite training loss or an evaluation yet"),
        ("bare", "--metric eval_loss", "--metric eval_loss: no run has an evaluation yet; give another --metric"),
        ("losses", "--by tokens", "--by tokens: {0}/nothing has logged no train/tokens; --by updates needs nothing"),
        ("losses", "--by hours", "--by hours: {0}/nothing has logged no time/update_seconds"),
        ("losses", "--output {0}/nowhere/a.png", "--output {0}/nowhere/a.png cannot be written (No such file"),
        ("losses", "--output {0}/a.pgn", "--output {0}/a.pgn cannot be written (Format 'pgn' is not supported"),
    ],
)
def test_what_cannot_be_drawn_is_a_sentence(
    make: str, flags: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    run = tmp_path / "nothing"
    contents = {
        "empty": b"", "cut": b'{"update_step": 1', "binary": b"\xff\xfe\n[1]\n", "bare": b'{"update_step": 3}\n',
        "losses": b'{"update_step": 3, "train/loss": 2.0}\n',
    }  # fmt: skip
    if make == "file":
        run.touch()
    elif make:
        run.mkdir()
    if make == "checkpoint":
        (run / "manifest.json").touch()
    if make in contents:
        (run / "metrics.jsonl").write_bytes(contents[make])
    assert plot.main([str(run), *flags.format(tmp_path).split()]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("qgalore plot: ") and text.format(tmp_path) in said


def test_damaged_lines_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path, metrics(3))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('\x00\x00\n{"train/loss": 3.0}\n{"update_step": 4, "train/loss": 5.0}\n{"update_step": 5, "tr')
    curves = read_curves(run)
    assert curves.damaged == 2 and curves.updates == 4
    assert plot.remarks({"run": curves})[0] == "run: 2 lines of its metrics.jsonl are damaged and left out"


def test_runs_with_different_tokenizers_are_told_apart(tmp_path: Path) -> None:
    """By the name on the hub, or by the contents of a file; what is not known differs from nothing."""

    def run(name: str, **flags: object) -> Path:
        folder = write_run(tmp_path / name, metrics(10))
        if flags:
            (folder / "step_00000010").mkdir()
            for file in ("manifest.json", "state.json"):
                (folder / "step_00000010" / file).write_text(json.dumps({"dataset": "c4", "tokenizer": ""} | flags))
        return folder

    for name in ("one.json", "copy.json", "other.json"):
        (tmp_path / name).write_text("another" if name == "other.json" else "one")
    default, unknown = run("default", optimizer="adam"), run("unknown")
    same = run("same", tokenizer="t5-base")
    one, copy, other = (run(name, tokenizer=str(tmp_path / f"{name}.json")) for name in ("one", "copy", "other"))

    def said(*folders: Path) -> list[str]:
        runs = dict(zip(distinct_labels(folders), map(read_curves, folders), strict=True))
        return [text for text in plot.remarks(runs) if "tokenizers" in text]

    assert said(default, same, unknown) == said(one, copy) == said(one) == []
    (text,) = said(one, copy, other, default)
    assert text.startswith(f"tokenizers differ: one has {tmp_path}/one.json, other has {tmp_path}/other.json, default")
    assert "qgalore evaluate RUN" in text and "copy has" not in text


def test_without_matplotlib_the_table_is_printed_and_a_sentence_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot.main([str(write_run(tmp_path, metrics(10)))]) == 2
    said = capsys.readouterr()
    assert said.out.startswith("run ") and "pip install 'qgalore[plot]'" in said.err


def test_torch_is_not_loaded_for_a_picture() -> None:
    program = "import sys, peft_pretraining.commands.plot; sys.exit(' '.join({'torch', 'numpy'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr == "\n"


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "x"])
def test_a_running_mean_is_over_a_whole_number_of_updates(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        plot.parse_args(["run", f"--smooth={value}"])
    assert f"{value} is no number of updates: give a whole number of at least 1" in capsys.readouterr().err
