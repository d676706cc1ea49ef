"""The documents: generated pages are those of today's code and rows, links lead somewhere, the README is one page."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest

from docs.make import __main__ as command
from docs.make import bars, flags_page, generated, memory_tables, pictures, rooms_page, speed_tables
from docs.make.csv_rows import rows_of
from docs.make.markdown import table
from docs.make.update_flow import PARAMETERS_OF_7B
from peft_pretraining.commands import main as qgalore
from peft_pretraining.config.flags import read_specs
from peft_pretraining.config.run_config import GROUPS
from peft_pretraining.reporting.jsonl import read_metrics
from peft_pretraining.reporting.metric_names import METRICS, described
from tests.small_run import ROOT, SmallRun, flags_of
from tests.test_args import OFFICIAL_DEFAULTS

SLOW = {"docs/results/cards.md"}
"""Made by planning all models for all cards."""


def markdown_files() -> list[str]:
    """Every file of Markdown that git knows or would take."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=False)
    found = done.stdout.split() if done.returncode == 0 else [str(path) for path in ROOT.rglob("*.md")]
    return sorted(name for name in found if (ROOT / name).is_file())


# ---- generated pages


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.slow if path in SLOW else ()) for path in generated.all_paths()],
)
def test_a_generated_page_is_of_today(path: str) -> None:
    assert not generated.is_stale(path), f"renew it with: {generated.COMMAND}"


@pytest.mark.parametrize("path", pictures.PICTURES)
def test_a_picture_is_drawn_from_todays_figures(path: str) -> None:
    assert not pictures.is_stale(path), f"renew it with: {generated.COMMAND}"


def test_what_is_stale_is_named_and_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    page, picture = "docs/reference/metrics.md", "docs/pictures/frontier.svg"
    for module in (generated, pictures, command):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / page).parent.mkdir(parents=True)
    (tmp_path / page).write_text("old\n")
    assert command.main([page, picture, "--check"]) == 1
    assert capsys.readouterr().out.splitlines()[:2] == [f"{page} is stale", f"{picture} is stale"]
    assert (tmp_path / page).read_text() == "old\n" and not (tmp_path / picture).exists()
    assert command.main([page, picture]) == 0
    assert (tmp_path / page).read_text() == (ROOT / page).read_text(encoding="utf-8")
    assert command.main([page, picture, "--check"]) == 0
    drawn = tmp_path / picture
    drawn.write_text(drawn.read_text().replace("digest ", "digest 0"))
    assert command.main([picture, "--check"]) == 1


def test_blocks_between_marks_are_replaced_and_nothing_else() -> None:
    name = "faults"
    made = generated.filled(f"before\n<!-- begin: {name} -->\nold\n<!-- end -->\nafter\n")
    assert made.startswith(f"before\n<!-- begin: {name} -->\n\n| fault |") and made.endswith(
        "|\n\n<!-- end -->\nafter\n"
    )
    assert "old" not in made and generated.filled(made) == made
    with pytest.raises(KeyError, match="nobody"):
        generated.filled("<!-- begin: nobody -->\n<!-- end -->\n")


def test_every_block_and_every_picture_is_shown_somewhere() -> None:
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in markdown_files())
    for name in generated.BLOCKS:
        assert f"<!-- begin: {name} -->" in text, name
    for path in pictures.PICTURES:
        assert f"{Path(path).parent.name}/{Path(path).name})" in text, path


def test_bars_and_tags_in_a_cell_are_escaped() -> None:
    made = table(["a", "b"], [["x|y <z>", "`<code>` < 1"]])
    assert made.splitlines() == ["| a | b |", "| --- | --- |", "| x\\|y &lt;z> | `<code>` &lt; 1 |"]


# ---- reference


def test_the_page_of_flags_has_every_flag_in_its_group_and_marks_the_projects_own() -> None:
    text = (ROOT / "docs/reference/flags.md").read_text(encoding="utf-8")
    assert OFFICIAL_DEFAULTS.keys() | {"model_config", "batch_size"} == flags_page.OFFICIAL
    for title, group in GROUPS.items():
        part = text.split(f"\n## {title}\n")[1].split("\n## ")[0]
        rows = (
            dict(re.findall(r"^\| (\**)`--(\w+)`", part, re.MULTILINE)),
            re.findall(r"^\| .*`--(\w+)`\** \|", part, re.M),
        )
        assert rows[1] == [spec.name for spec in read_specs(group)], title
        for bold, name in re.findall(r"^\| (\**)`--(\w+)`", part, re.MULTILINE):
            assert (bold == "") == (name in flags_page.OFFICIAL), name


def test_metrics_of_runs_have_their_entries_and_units(tmp_path: Path) -> None:
    small, found = SmallRun(tmp_path), set[str]()
    paper = flags_of("q_galore_adamw8bit_per_layer") | {"batch_size": 8, "subspace": "streaming", "eval_every": 2}
    for name, flags in (
        ("paper", paper | {"average_last": 0.5}),
        ("float16", {"dtype": "float16", "batch_size": 8, "num_training_steps": 2}),
    ):
        small.run(name, **({"num_training_steps": 4} | flags))
        found |= {key for line in read_metrics(tmp_path / name) for key in line} - {"update_step"}
    assert not {key for key in found if described(key) is None}
    on_gpu = {"throughput/mfu", "memory/reserved_gb"}
    assert {described(key) for key in found} == METRICS.keys() - on_gpu
    assert described("train/unknown") is None


def test_the_page_of_rooms_has_all_of_them() -> None:
    text = (ROOT / "docs/reference/rooms.md").read_text(encoding="utf-8")
    inside = [room for room in rooms_page.rooms() if "." in room]
    assert len(inside) > 25
    for room in inside:
        library, _, path = rooms_page.path_of(room).partition("/")
        assert f"| `{path}` | {rooms_page.purpose(room)} |" in text.split(f"## `{library}`")[1], room


def test_the_page_of_scripts_names_every_method() -> None:
    text = (ROOT / "docs/reference/scripts.md").read_text(encoding="utf-8")
    (methods,) = re.findall(r'^METHODS="(.*)"$', (ROOT / "scripts/recipe.sh").read_text(encoding="utf-8"), re.MULTILINE)
    named = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", text.split("Perplexity")[0], re.MULTILINE)))
    assert named == methods.split()


# ---- links


def slugs(text: str) -> set[str]:
    """The anchors that GitHub and mkdocs give to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def links(text: str) -> Iterator[str]:
    """The targets of links and pictures in a page, without those in code."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    yield from re.findall(r"\]\(([^)\s]+)\)", text)


@cache
def page(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def broken_links(path: Path) -> list[str]:
    """The links of a page to files or headings that are not there."""
    found = []
    for target in links(page(path)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = unquote(target).partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in slugs(page(file))):
            found.append(target)
    return found


@pytest.mark.parametrize("name", markdown_files())
def test_links_lead_to_files_and_headings_that_are_there(name: str) -> None:
    assert not broken_links(ROOT / name)


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# A heading, of two words\n")
    text = (
        "[a](other.md) ![b](none.png) [c](other.md#a-heading-of-two-words) [d](other.md#none) [e](https://x.y) `[f](g)`"
    )
    (tmp_path / "page.md").write_text(f"# Top\n{text} [h](#top) [i](#bottom)\n```\n[j](k)\n```\n")
    assert broken_links(tmp_path / "page.md") == ["none.png", "other.md#none", "#bottom"]


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen, ahead = set[Path](), [ROOT / "README.md"]
    while ahead:
        path = ahead.pop()
        seen.add(path)
        near = [(path.parent / target.partition("#")[0]).resolve() for target in links(page(path)) if ":" not in target]
        ahead += [file for file in near if file.suffix == ".md" and file not in seen]
    assert not [name for name in markdown_files() if name.startswith("docs/") and ROOT / name not in seen]


def test_the_site_is_built_without_a_network(tmp_path: Path) -> None:
    """With --strict: a link, an anchor or a name of the API that is not there fails."""
    for package in ("mkdocs", "mkdocstrings"):
        pytest.importorskip(package, reason="pip install -e '.[docs]' for the site of the documents")
    nowhere = {f"{kind}_proxy": "http://127.0.0.1:9" for kind in ("http", "https", "HTTP", "HTTPS")}
    program = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(program, cwd=ROOT, env={**os.environ, **nowhere}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = {file.relative_to(tmp_path / "site").as_posix(): page(file) for file in (tmp_path / "site").rglob("*.html")}
    assert len(pages) > 30 and not [name for name in pages if name.startswith("make/")]
    for name, text in pages.items():
        assert not re.search(r'<(?:script|img|link)[^>]* (?:src|href)="(?:https?:)?//', text), name
    assert all(f'id="qgalore.{name}"' in pages["reference/api.html"] for name in ("config.SubspaceConfig",))


# ---- the page for a stranger


README = page(ROOT / "README.md")


def test_the_readme_is_one_page_with_its_two_commands() -> None:
    assert len(README.splitlines()) <= 150
    first = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)[0].splitlines()
    assert [line.split("#")[0].strip() for line in first] == ["bash scripts/quickstart.sh", "bash scripts/test.sh"]


def test_the_readme_says_what_was_not_measured() -> None:
    section = README.split("## What fits which card")[1].split("\n## ")[0]
    assert "**No consumer card was measured**" in " ".join(section.split())


def test_the_figures_in_the_readmes_sentences_are_those_of_rows() -> None:
    plain, recomputed = [], []
    for model in speed_tables.MODELS:
        found = {method: (float(row["in_a_row_tokens_per_second"]), float(row["run_peak_gb"]))
                 for method, row in speed_tables.comparison(model).items()}  # fmt: skip
        speed, peak = found["adamw_compiled"]
        plain.append((found["q_galore"][0] / speed, found["q_galore"][1] / peak))
        recomputed.append((found["q_galore_checkpointing"][0] / speed, found["q_galore_checkpointing"][1] / peak))
    speeds, shares = zip(*plain, strict=True)
    text = " ".join(README.split())
    faster = f"{100 * min(speeds) - 100:.0f} to {100 * max(speeds) - 100:.0f} % faster"
    assert f"{faster} in half to two thirds of the memory" in text and f"it is {faster} than AdamW up to 1B" in text
    assert min(shares) > 0.49 and max(shares) < 0.68
    slower, small = zip(*recomputed, strict=True)
    assert f"at {min(slower):.2f} to {max(slower):.2f} of the speed in a seventh to a quarter" in text
    assert round(1 / min(small)) == 7 and round(1 / max(small)) in (4, 5)
    capped = memory_tables.measured_7b()
    assert capped and f"takes {float(capped['run_peak_gb']):.1f} GB for 7B" in text
    assert f"of 7B are {8 * PARAMETERS_OF_7B / 1e9:.0f} GB in bfloat16" in text
    assert f"7B takes {bars.figures()['7b']['q_galore_checkpointing'][1]:.1f} GB" in text


def test_the_figures_of_7b_in_the_readme_are_those_of_rows() -> None:
    rows, text = [row for row in rows_of("compare.csv") if row["model"] == "7b"], " ".join(README.split())
    (default,) = (line for line in README.splitlines() if line.startswith("| **the default**"))
    perplexities, speeds = default.split("|")[2:4], default.split("|")[5].strip()
    (adamw_line,) = (line for line in README.splitlines() if line.startswith("| AdamW, tuned"))
    below = [
        100 - 100 * float(ours) / float(other)
        for ours, other in zip(perplexities, adamw_line.split("|")[2:4], strict=True)
    ]
    assert f"{below[0]:.0f} to {below[1]:.0f} % below that of AdamW tuned at 60M" in text
    fast, slow = speeds.split(", ")
    assert f"it has {fast} (60M) to {slow} (350M) of AdamW's speed" in text
    (by_layer,) = (row for row in rows if "--accumulate_by layer" in row["flags"] and row["run_peak_gb"])
    assert f"7B has trained in {float(by_layer['run_peak_gb']):.1f} GB" in text and by_layer["last_loss"]
    for commit, recomputed, said in (("9c880eb", "_checkpointing", " tokens/s"), ("cd1b21d", "", "")):
        (adamw,) = (row for row in rows if (row["commit"], row["method"]) == (commit, f"adamw_compiled{recomputed}"))
        (fp8,) = (row for row in rows if (row["commit"], row["method"]) == (commit, f"q_galore_fp8{recomputed}"))
        (ours, peak), (other, other_peak) = (
            (int(row["in_a_row_tokens_per_second"]), float(row["run_peak_gb"])) for row in (fp8, adamw)
        )
        assert f"{ours:,}{said} in {peak:.1f} GB, AdamW {other:,} in {other_peak:.1f}" in text


def test_the_readmes_commands_are_those_of_the_program() -> None:
    """Those after a training are run by tests of their own, with the same words."""
    lines = "".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL)).replace("\\\n", "").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    first, second = [line[2:] for line in words if line[:2] == ["python", "run_pretrain.py"]]
    for flags, said in ((first, "--recipe full_rank"), ([*second, "--device", "cuda"], "--memory_budget 23GB chooses")):
        program = [sys.executable, "run_pretrain.py", *flags, "--dataset", "pydocs", "--dry_run"]
        done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and "Planned memory" in done.stdout and said in done.stdout, done.stderr
    assert "--recipe full_rank" in done.stdout, "7B fits by the default recipe"
    after = [line[1] for line in words if line and line[0] == "qgalore"]
    assert after == ["generate", "evaluate", "plot", "export"]


def test_the_readmes_memory_of_1b_is_that_of_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    lines = "".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL)).replace("\\\n", "").splitlines()
    (command,) = (line for line in lines if "--model_config 1b" in line)
    peaks = []
    for gpu in ("4090", "h100"):
        assert qgalore(["plan", *shlex.split(command)[2:], "--dataset", "pydocs", "--gpu", gpu]) == 0
        peaks += re.findall(r"^  peak +([\d.]+) GB$", capsys.readouterr().out, re.MULTILINE)
    assert f"is planned to take up to {max(map(float, peaks)):.1f} GB of a 24 GB card." in " ".join(README.split())


def test_the_readmes_example_of_the_library_trains() -> None:
    pytest.importorskip("transformers")
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    smaller = example.replace("configs/llama_60m.json", "configs/llama_9m.json").replace("rank=128", "rank=32")
    assert smaller != example
    scope: dict[str, object] = {}
    exec(smaller.replace("32000, (3, 2, 128)", "8000, (3, 2, 16)"), scope)
    weight = next(iter(scope["optimizer"].param_groups[-1]["params"]))  # type: ignore[attr-defined]
    assert int(scope["optimizer"].state[weight]["step"]) == 3  # type: ignore[attr-defined]


def test_the_bibtex_entry_names_the_paper_of_the_citation_file() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    (title,) = re.findall(r"title\s*= \{(.*?)\}", README)
    assert f'title: "{title}"' in citation
