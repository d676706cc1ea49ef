"""The tables of `benchmarks/tables.py` as Markdown: the papers' layout, with our figure beside the paper's."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks import paper_figures
from benchmarks.models import LENGTH
from benchmarks.table_jobs import SPEED_UPDATES, Job, Key, Row, Study, perplexity_of
from benchmarks.table_methods import ABLATION, METHODS, RECIPES, SEQUENCES

Chosen = Mapping[tuple[str, str], Sequence[Job]]
Rows = Mapping[Key, Row]


def markdown(head: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """A Markdown table; None is an empty cell."""
    cells = [[str("" if cell is None else cell).replace("|", "/") for cell in line] for line in [head, *lines]]
    text = [f"| {' | '.join(line)} |" for line in cells]
    return "\n".join([text[0], "|" + " --- |" * len(head), *text[1:]])


def failures(errors: Sequence[tuple[str, str]]) -> list[str]:
    """A paragraph with the runs that failed, of the errors of all runs; none where no run has failed."""
    found = [f"- {run}: {error}" for run, error in errors if error]
    return ["\n".join(["Failed:", "", *found])] if found else []


def pretrain(study: Study, chosen: Chosen, rows: Rows) -> str:
    """Perplexity / GB of weights and states by method and model, and what each run measured."""
    head = ["method", *(f"{model.upper()}, {who}" for model in study.models for who in ("ours", "paper"))]
    lines = []
    for method in study.methods:
        line = [METHODS[method].label]
        for model in study.models:
            figure = paper_figures.PRETRAINING.get((method, model))
            line += [_ours(_found(chosen, rows, model, method)), _paper(figure)]
        lines.append(line)
    parts = [
        "Perplexity / GB of weights and optimizer states, ours by the plan and the paper's by its own count.",
        markdown(head, lines),
        _lengths(study, chosen),
        _runs(study, chosen, rows),
    ]
    return "\n\n".join([*parts, *failures(_errors(chosen, rows)), *_sources(study)])


def memory(study: Study, chosen: Chosen, rows: Rows) -> str:
    """Bytes by count beside the paper's count, and planned beside measured peaks."""
    head = ["model", "method", "weights and states GB", "paper", "planned peak GB", "measured peak GB", "paper's peak"]
    lines = []
    for (model, method), row in _first_rows(chosen, rows):
        figure, peak = paper_figures.PRETRAINING.get((method, model)), paper_figures.PEAK_GB.get((method, model))
        own = [row.get("weights_and_states_gb"), f"{figure.gigabytes:g}" if figure else ""]
        own += [row.get("planned_peak_gb"), _measured_peak(row), f"{peak[0]:g}" if peak else ""]
        lines.append([model, METHODS[method].label, *own, *_of_the_card(row)])
    return "\n\n".join([markdown([*head, *_CARD], lines), *failures(_errors(chosen, rows)), *_sources(study)])


def throughput(study: Study, chosen: Chosen, rows: Rows) -> str:
    """Tokens a second, as a share of GaLore's beside the paper's share, and hours of the paper's run at that speed."""
    head = ["model", "method", "tokens/s", "x GaLore", "paper", "hours of the paper's run", "measured peak GB"]
    lines = []
    for (model, method), row in _first_rows(chosen, rows):
        speed = float(row.get("tokens_per_second_steady") or 0)
        galore = next(iter(_found(chosen, rows, model, "galore")), {}).get("tokens_per_second_steady")
        paper = paper_figures.SPEED_AGAINST_GALORE.get(method)
        share = f"{speed / float(galore):.2f}" if speed and galore else ""
        tokens = RECIPES[model].updates * SEQUENCES * LENGTH if model in RECIPES else 0
        hours = f"{tokens / speed / 3600:,.1f}" if speed and tokens else ""
        own = [f"{speed:,.0f}" if speed else "", share, f"{paper[0]:.2f}" if paper else "", hours, _measured_peak(row)]
        lines.append([model, METHODS[method].label, *own, *_of_the_card(row)])
    words = (
        f"Over the last {SPEED_UPDATES} updates of a run, a micro-batch each, after all subspaces were found once; the "
        "SVDs that fall into them, a few weights at a time, are in it."
    )
    return "\n\n".join([markdown([*head, *_CARD], lines), words, *failures(_errors(chosen, rows)), *_sources(study)])


def ablation(study: Study, chosen: Chosen, rows: Rows) -> str:
    """Q-GaLore with one thing changed: perplexity, its change beside the paper's, and refreshes kept."""
    head = ["Q-GaLore with"]
    for model in study.models:
        head += [f"{model.upper()}", "change", "paper's change", "refreshes kept"]
    lines = []
    for method in study.methods:
        line = [ABLATION[method].label if method in ABLATION else "nothing changed"]
        for model in study.models:
            found = _found(chosen, rows, model, method)
            line += [_mean(found), _change(found, _found(chosen, rows, model, "q_galore"))]
            paper = paper_figures.NEAREST_ROUNDING.get(model) if method == "nearest_rounding" else None
            line += [f"{paper[0]:+.2f}" if paper else ""]
            line += [_kept(method, found, _found(chosen, rows, model, "lazy_off"))]
        lines.append(line)
    words = (
        f"Refreshes kept are those of the run with as many intervals and none left out; in the paper "
        f"{100 * paper_figures.SVDS_KEPT[0]:.1f} % are."
    )
    parts = [markdown(head, lines), words, _lengths(study, chosen), _runs(study, chosen, rows)]
    return "\n\n".join([*parts, *failures(_errors(chosen, rows)), *_sources(study)])


LAYOUTS: Mapping[str, Callable[[Study, Chosen, Rows], str]] = {
    "pretrain": pretrain,
    "memory": memory,
    "throughput": throughput,
    "ablation": ablation,
}


# ---- cells


def _found(chosen: Chosen, rows: Rows, model: str, method: str) -> list[Row]:
    """The rows of the runs of a cell, a seed each."""
    return [rows[job.key] for job in chosen.get((model, method), ()) if job.key in rows]


def _first_rows(chosen: Chosen, rows: Rows) -> list[tuple[tuple[str, str], Row]]:
    return [(cell, next(iter(_found(chosen, rows, *cell)), {})) for cell in chosen]


def _perplexities(rows: Sequence[Row]) -> list[float]:
    return [perplexity_of(row) for row in rows if row["perplexity"]]


def _mean(rows: Sequence[Row]) -> str:
    """The mean perplexity, with the number of seeds where there are several; or that the runs have failed."""
    found = _perplexities(rows)
    if not found:
        return "failed" if rows else ""
    return f"{statistics.mean(found):.2f}" + (f" ({len(found)} seeds)" if len(found) > 1 else "")


def _ours(rows: Sequence[Row]) -> str:
    sizes = [float(row["weights_and_states_gb"]) for row in rows if row["weights_and_states_gb"]]
    return " / ".join(filter(None, [_mean(rows), f"{sizes[0]:.2f}" if sizes else ""]))


def _paper(figure: paper_figures.Figure | None) -> str:
    return f"{figure.perplexity:.2f} / {figure.gigabytes:g}" if figure else ""


def _change(rows: Sequence[Row], base: Sequence[Row]) -> str:
    ours, others = _perplexities(rows), _perplexities(base)
    if not ours or not others or rows == base:
        return ""
    return f"{statistics.mean(ours) - statistics.mean(others):+.2f}"


def _kept(method: str, rows: Sequence[Row], all_kept: Sequence[Row]) -> str:
    """Refreshes as a share of those of the run that leaves out none, for methods with as many intervals."""
    if not method.startswith("lazy_"):
        return ""
    done, every = (
        statistics.mean([float(row["refreshes"] or 0) for row in found] or [0]) for found in (rows, all_kept)
    )
    return f"{100 * done / every:.1f} %" if done and every else ""


def _measured_peak(row: Row) -> str:
    """The peak that PyTorch's allocator measured; on a CPU that of the whole process says nothing of a plan."""
    return row.get("peak_gb", "") if row.get("reserved_gb") not in (None, "", "0.0", "0") else ""


_CARD = ("micro-batch", "GPUs", "card", "PyTorch", "commit")


def _of_the_card(row: Row) -> list[str]:
    return [row.get(name, "") for name in ("micro_batch", "ranks", "device", "torch", "commit")]


# ---- what stands below a table


def _runs(study: Study, chosen: Chosen, rows: Rows) -> str:
    """A line for each run in the table."""
    head = ["model", "method", "rates", "seed", "perplexity", "by the papers' formula", "planned peak GB"]
    head += ["measured peak GB", "tokens/s", "hours"]
    lines = []
    for (model, method), jobs in chosen.items():
        for job in jobs:
            if (row := rows.get(job.key)) is None or row["error"]:
                continue
            hours = f"{float(row['train_hours']):.2f}"
            figures = [row["perplexity"], row["perplexity_official"], row["planned_peak_gb"], _measured_peak(row)]
            speed = f"{float(row['tokens_per_second_median']):,.0f}"
            lines.append([model, method, f"x {job.rates:g}", job.seed, *figures, speed, hours, *_of_the_card(row)])
    return markdown([*head, *_CARD], lines)


def _lengths(study: Study, chosen: Chosen) -> str:
    """How long the runs are, on what, and what that says of the papers' figures beside them."""
    updates = {model: study.budget.updates(model, study.sequences) for model in study.models}
    each = [
        f"{model.upper()} {number:,} updates ({number * study.sequences * study.length / 1e6:,.4g}M tokens)"
        for model, number in updates.items()
    ]
    text = f"Ours: {', '.join(each)} of {study.sequences} sequences of {study.length} on {Path(study.dataset).name}"
    if study.tuned:
        text += f"; learning rates times the best of 0.5, 1 and 2, over a run of {study.tune_model.upper()}"
    end = "as in the paper" if study.is_the_papers else "which is not the paper's run: compare ours with each other"
    # Beyond the largest or below the smallest factor there may be a better one.
    outer = {method for (_, method), jobs in chosen.items() for job in jobs if job.rates != 1}
    edge = f" The best rate of {', '.join(sorted(outer))} is the largest or smallest that was tried." if outer else ""
    return f"{text}, {end}.{edge}"


def _errors(chosen: Chosen, rows: Rows) -> list[tuple[str, str]]:
    return [
        (f"{model} {method}, seed {job.seed}", rows[job.key]["error"])
        for (model, method), jobs in chosen.items()
        for job in jobs
        if job.key in rows
    ]


def _sources(study: Study) -> list[str]:
    """Where the papers' figures in the table stand."""
    cells = {(method, model) for method in study.methods for model in study.models}
    found: list[str] = []
    if study.table in ("pretrain", "memory"):
        found += [figure.source for cell, figure in paper_figures.PRETRAINING.items() if cell in cells]
    if study.table == "memory":
        found += [source for cell, (_, source) in paper_figures.PEAK_GB.items() if cell in cells]
    if study.table == "throughput":
        found += [paper_figures.SPEED_AGAINST_GALORE[name][1] for name in ("q_galore",) if name in study.methods]
    if study.table == "ablation":
        found += [source for model, (_, source) in paper_figures.NEAREST_ROUNDING.items() if model in study.models]
        found.append(paper_figures.SVDS_KEPT[1])
    return ["The paper's figures: " + "; ".join(dict.fromkeys(found)) + "."] if found else []
