"""`qgalore report`: the page about a run, its figures and tables, what it escapes, and that a browser shows it."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from peft_pretraining.after_training.trained_model import open_trained
from peft_pretraining.after_training.trained_tokenizer import tokenizer_of
from peft_pretraining.commands import report
from peft_pretraining.commands.generate import Generator, Sampling
from peft_pretraining.commands.report_page.recorded_run import read_run
from peft_pretraining.commands.report_page.samples import MAX_TOKENS, PROMPTS, SampleOptions
from peft_pretraining.reporting.markup import element, table
from peft_pretraining.reporting.page import sample
from peft_pretraining.reporting.svg import POINTS, heat_map, log_ticks, short, ticks
from tests.small_run import ROOT, SmallRun, flags_of, write_text
from tests.test_plot import metrics, write_run

VOID = {"meta", "br", "img"}


def built(run: Path, wanted: bool = False, **options: object) -> str:
    """The page about a run, by default without generated text."""
    return report.build(run, SampleOptions(wanted, **options))  # type: ignore[arg-type]


class Page(HTMLParser):
    """A page, parsed: it must be well-formed."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in {tag}"
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("h1", "h2", "h3"):
            self.headings.append("")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings[-1] += data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    def row(self, first: str) -> list[str]:
        """The cells after the first of the last row that begins with it."""
        return [row for row in self.rows if row and row[0] == first][-1][1:]

    def attributes(self, name: str) -> list[str]:
        return [value for _, given in self.elements if (value := given.get(name)) is not None]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """With a run `run` by SVD on text, whose lazy rule leaves refreshes out."""
    small = SmallRun(tmp_path_factory.mktemp("report"))
    text = write_text(small.folder / "text")
    lazy = {"update_proj_gap": 1, "cos_threshold": 0.0, "queue_size": 1, "subspace": "svd"}
    flags = flags_of("q_galore_adamw8bit") | lazy | {"eval_every": 4, "save_every": 4}
    small.run("run", **text, **flags)
    return small


@pytest.fixture(scope="module")
def page(small: SmallRun) -> str:
    assert report.main([str(small.folder / "run")]) == 0
    return (small.folder / "run" / "report.html").read_text(encoding="utf-8")


def test_the_page_has_its_sections_and_figures_and_is_well_formed(page: str) -> None:
    parsed = Page(page)
    assert parsed.headings == [
        "run", "Summary", "Curves", "Loss", "Perplexity", "Learning rate", "Tokens per second", "Gradient norm",
        "Memory", "Planned memory of one rank", "Subspaces", "Similarity of successive subspaces", "Refreshes",
        "Samples", "Configuration", "Commands",
    ]  # fmt: skip
    ids = parsed.attributes("id")
    assert len(set(ids)) == len(ids)
    assert {link.removeprefix("#") for link in parsed.attributes("href")} <= set(ids)
    assert {name for names in parsed.attributes("aria-labelledby") for name in names.split()} <= set(ids)
    charts = [given for tag, given in parsed.elements if tag == "svg"]
    assert len(charts) == 8 and all(given["role"] == "img" and given["aria-labelledby"] for given in charts)
    figures = [tag for tag, _ in parsed.elements if tag in ("figure", "figcaption", "svg")]
    assert figures == ["figure", "svg", "figcaption"] * 8, "each has a chart and a caption"
    for tag in ("thead", "tbody", "caption"):
        assert sum(each == tag for each, _ in parsed.elements) >= 8, "a table stands under each"


def test_the_page_loads_nothing(page: str) -> None:
    tags = {tag for tag, _ in Page(page).elements}
    assert not tags & {"script", "link", "img", "image", "iframe", "object", "use", "base", "form"}
    assert not re.search(r"""(src|href|action)\s*=\s*["'](?!#)|url\((?!#)|@import""", page)
    assert set(re.findall(r"https?://[^\s\"<]+", page)) <= {"http://www.w3.org/2000/svg"}
    assert """content="default-src &#x27;none&#x27;; style-src &#x27;unsafe-inline&#x27;\"""" in page
    assert "prefers-color-scheme: dark" in page


def test_figures_are_those_of_the_run(small: SmallRun, page: str) -> None:
    parsed, result = Page(page), small.result("run")
    last = [line for line in result.lines if "eval/loss" in line][-1]
    for text in (f"{last['eval/perplexity']:.3f}", f"{last['eval/perplexity_official']:.3f}", "8 of 8"):
        assert text in parsed.text
    assert parsed.row("8")[0] and f"{last['eval/loss']:.6g}" in {row[2] for row in parsed.rows if len(row) == 3}
    plan = read_run(result.save_dir).memory(on_gpu=False)
    assert parsed.row("decoder weights")[0] == f"{plan.lasting['decoder weights'] / 1e9:.4g}"
    assert parsed.row("planned peak")[1] == "100.0%"
    assert "The run has made all of its 8 updates." in parsed.text
    made, share = (result.train_lines[-1][f"subspace/{name}"] for name in ("refreshes", "refreshes_saved_fraction"))
    saved = made * share / (1 - share)
    assert saved > 0 and f"{made:.0f} refreshes were made, and the lazy rule has left out {saved:.0f} (" in parsed.text
    assert sum(read_run(result.save_dir).refresh_intervals().values()) == 7
    assert (
        min(read_run(result.save_dir).refresh_intervals()) > 1 and "Intervals at the newest checkpoint" in parsed.text
    )
    similarities = [value for line in result.lines for name, value in line.items() if name.endswith("up_proj")]
    count, mean, *_ = parsed.row("up_proj")
    assert (count, mean) == (str(len(similarities)), f"{sum(similarities) / len(similarities):.3f}")
    assert parsed.row("--optimizer") == ["q_galore_adamw8bit"] and parsed.row("hidden_size") == ["64"]
    assert "<b>--optimizer</b>" in page and "<b>--scheduler</b>" not in page, "bold is what is not the default"


def test_samples_are_what_generate_gives_for_these_seeds(small: SmallRun, page: str) -> None:
    trained = open_trained(small.folder / "run", "cpu")
    generator = Generator(trained, tokenizer_of(trained))
    for number, prompt in enumerate(PROMPTS):
        text, _ = generator.continue_text(prompt, MAX_TOKENS, Sampling(seed=number))
        assert text and str(sample(prompt, text)) in page
    assert "after 8 updates" in Page(page).text
    assert built(small.folder / "run", True, prompts=["<w1>"]).count("<b>&lt;w1&gt;</b>") == 1


@pytest.mark.parametrize(
    ("make", "options", "reason"),
    [
        (lambda run: (run / "step_00000008" / "model.safetensors").write_bytes(b""), {}, "model.safetensors"),
        (lambda run: None, {"tokenizer": "./nowhere.json"}, "No text could be generated. --tokenizer ./nowhere.json"),
        (lambda run: None, {"seed": -9}, "No text could be generated. --seed is -9, it must be at least 0"),
        (lambda run: None, {"wanted": False}, "Left out, as --no_samples asks."),
    ],
)
def test_a_page_without_samples_says_why(
    make: Callable[[Path], object], options: dict[str, Any], reason: str, small: SmallRun, tmp_path: Path
) -> None:
    shutil.copytree(small.folder, tmp_path / "all")
    run = tmp_path / "all" / "run"
    for step in (0, 4):
        shutil.rmtree(run / f"step_{step:08d}")
    make(run)
    assert reason in Page(built(run, **{"wanted": True} | options)).text


def test_a_measured_peak_stands_beside_the_plan_of_a_gpu(small: SmallRun, tmp_path: Path) -> None:
    """Reserved memory is logged on a GPU alone; --device cpu of the flags is then not what ran."""
    shutil.copytree(small.folder / "run", run := tmp_path / "run")
    state = json.loads((run / "step_00000008" / "state.json").read_text())
    (run / "step_00000008" / "state.json").write_text(json.dumps(state | {"device": "auto"}))
    lines = [line | {"memory/reserved_gb": 7.0} for line in metrics(4)]
    parsed = Page(built(write_run(run, lines)))
    assert parsed.row("measured, allocated")[0] == "1.5" and parsed.row("measured, reserved")[0] == "7"
    assert parsed.row("workspaces of cuBLAS")[0] == f"{(64 << 20) / 1e9:.4g}"
    peak = read_run(run).memory(on_gpu=True).peak_bytes
    assert parsed.row("measured, reserved")[1] == f"{7e9 / peak:.1%}"


def test_a_run_without_checkpoint_evaluation_or_subspace_is_a_page_that_says_so(tmp_path: Path) -> None:
    lines = [line | {"train/skipped": float(line["update_step"] in (2, 3))} for line in metrics(4, evals=False)]
    text = Page(built(write_run(tmp_path / "bare", lines))).text
    for sentence in (
        "The run has logged 4 updates; it has no checkpoint.", "has not been evaluated yet: --eval_every",
        "The memory is not planned here: no checkpoint has recorded the flags of this run.",
        "This run refreshes no subspaces", "they changed nothing: 2, 3.", "(--save_every)",
    ):  # fmt: skip
        assert sentence in text
    only = Page(built(write_run(tmp_path / "nothing", [{"update_step": 1}])))
    assert "Nothing has been logged that could be drawn." in only.text


def test_the_commands_and_the_model_of_a_run_without_checkpoint_are_in_its_folder(tmp_path: Path) -> None:
    run = write_run(tmp_path, metrics(4))
    (run / "command.txt").write_text("qgalore pretrain --lr 0.1  # from update 0, qgalore 0.1.0\n" * 2)
    (run / "config.json").write_text((ROOT / "configs" / "llama_60m.json").read_text())
    parsed = Page(built(run))
    assert "Commands" in parsed.headings and parsed.text.count("--lr 0.1  # from update 0, qgalore 0.1.0") == 2
    assert "58.1 M parameters: 8 layers, width 512" in parsed.text and parsed.row("hidden_size") == ["512"]


def test_the_memory_of_a_model_that_only_transformers_reads_is_not_planned(small: SmallRun, tmp_path: Path) -> None:
    shutil.copytree(small.folder / "run", run := tmp_path / "run")
    path = run / "step_00000008" / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps(state | {"use_hf_model": True, "model_config_contents": {"model_type": "gpt2"}}))
    parsed = Page(built(run))
    assert "The memory is not planned here: only transformers reads the model's configuration." in parsed.text
    assert "gpt2, q_galore_adamw8bit, rank 32, on " in parsed.text


def test_whatever_comes_from_data_is_escaped(small: SmallRun, tmp_path: Path) -> None:
    evil = "</title></style><script>alert('&\"')</script>\x00"
    run = tmp_path / "<script>alert(1)<"
    shutil.copytree(small.folder / "run", run)
    state = json.loads((run / "step_00000008" / "state.json").read_text())
    state |= {"dataset": evil, "optimizer": evil, "num_training_steps": 99}
    state["model_config_contents"] |= {evil: evil}
    (run / "step_00000008" / "state.json").write_text(json.dumps(state))
    (run / "STOPPED").write_text(evil)
    text = built(write_run(run, [line | {f"subspace/similarity/{evil}": 0.5} for line in metrics(6)]))
    parsed = Page(text)
    assert "script" not in {tag for tag, _ in parsed.elements} and "\x00" not in text
    assert "<script" not in text and parsed.headings[0] == "<script>alert(1)<"
    assert parsed.text.count(evil.replace("\x00", "\N{SYMBOL FOR NULL}")) >= 4
    assert element("p", "<", title='"<') == '<p title="&quot;&lt;">&lt;</p>'
    assert "<td>&lt;b&gt;</td>" in table(("a", "b"), [("x", "<b>")], "c")


def test_a_long_run_is_a_small_page(tmp_path: Path) -> None:
    """Points are thinned, but neither a spike nor the end of a curve."""
    lines = [{"update_step": step, "train/loss": 3 + math.sin(step) / 9, "train/lr": 0.01} for step in range(1, 20_001)]
    lines[12_344]["train/loss"] = 9.0
    text = built(write_run(tmp_path, lines))
    curves = re.findall(r'<polyline points="([^"]+)"', text)
    assert len(curves) == 4 and max(len(points.split()) for points in curves) <= POINTS
    assert len(text) < 100_000
    raw = [tuple(map(float, point.split(","))) for point in curves[0].split()]
    assert min(raw, key=lambda point: point[1])[0] == pytest.approx(70 + 776 * 12_345 / 20_000, abs=0.1)


@pytest.mark.slow
def test_a_hundred_thousand_lines_of_a_7b_model_are_below_a_megabyte(tmp_path: Path) -> None:
    lines = metrics(100_000)
    names = [f"subspace/similarity/model.layers.{i}.{kind}_proj" for i in range(32) for kind in "qkvogud"]
    for number, line in enumerate(lines):
        line |= {names[number % 224]: (number * 7 % 100) / 100, "train/grad_norm": 1.0, "train/skipped": 0.0}
        line |= {"throughput/tokens_per_second": 1e5 + number, "subspace/refreshes": float(number)}
    assert len(built(write_run(tmp_path, lines))) < 1_000_000


def test_the_map_joins_adjacent_cells_of_one_colour() -> None:
    chart = heat_map("k", "t", "d", [[0.5, 0.55, None, 1.0], [None] * 4], [("a", 0, 1), ("b", 1, 2)], 8.0)
    assert re.findall(r'<path d="([^"]+)" class="([^"]+)"', chart) == [
        ("M100.0 18.0h373.0", "cell h5"),
        ("M659.5 18.0h186.5", "cell h9"),
    ]


def test_ticks_are_round_numbers() -> None:
    assert ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(2.9, 3.31) == [2.9, 3.0, 3.1, 3.2, 3.3]
    assert log_ticks(12, 900) == [30, 100, 300] and log_ticks(1, 1e4) == [1, 10, 100, 1000, 10_000]
    assert log_ticks(20.1, 20.9) == [20.2, 20.4, 20.6, 20.8]
    assert [short(x) for x in (0.00125, 950, 12345, 1.26e6, 2e9, math.inf)] == [
        "0.00125", "950", "12.35k", "1.26M", "2B", "inf",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("contents", "flags", "text"),
    [
        (None, "", "{0}/run does not exist: give the --save_dir of a run"),
        ("", "", "{0}/run/metrics.jsonl has no lines yet"),
        ('{"update_step": 1}\n', "--output {0}/no/a.html", "--output {0}/no/a.html cannot be written (No such file"),
    ],
)
def test_what_cannot_be_reported_is_a_sentence(
    contents: str | None, flags: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if contents is not None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "metrics.jsonl").write_text(contents)
    assert report.main([str(tmp_path / "run"), *flags.format(tmp_path).split()]) == 2
    assert capsys.readouterr().err.startswith(f"qgalore report: {text.format(tmp_path)}")


def browser() -> str:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "headless_shell")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is installed")
    return found


def test_a_browser_shows_the_page_without_a_complaint(page: str, small: SmallRun, tmp_path: Path) -> None:
    """A console message would be the browser's about what it cannot parse, or has refused to load."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--enable-logging=stderr"]
    where = (small.folder / "run" / "report.html").as_uri()
    command = [browser(), *flags, "--window-size=1000,1500", f"--screenshot={tmp_path / 'a.png'}", "--dump-dom", where]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr
    assert Page(done.stdout).headings == Page(page).headings
