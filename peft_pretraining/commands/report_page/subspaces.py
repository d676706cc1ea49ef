"""How alike successive subspaces of a run were, and how many refreshes its lazy rule left out."""

from __future__ import annotations

from peft_pretraining.commands.report_page.curve_figures import curve_figure
from peft_pretraining.commands.report_page.recorded_run import RecordedRun
from peft_pretraining.reporting.curves import RunCurves, Series
from peft_pretraining.reporting.markup import Markup, element, table
from peft_pretraining.reporting.page import Section, figure, paragraph
from peft_pretraining.reporting.similarity import PREFIX, kind_of, rows_of_kinds, similarity_layers, similarity_map
from peft_pretraining.reporting.svg import LEVELS, Line, heat_map


def subspaces_section(run: RecordedRun, curves: RunCurves) -> Section:
    """How alike successive subspaces were, and how many refreshes the lazy rule left out."""
    layers = similarity_layers(curves)
    made = curves.series("subspace/refreshes")
    key, title = "subspaces", "Subspaces"
    if not layers and not made.x:
        text = "This run refreshes no subspaces: its optimizer is full-rank, or its --rank is full."
        return Section(key, title, [paragraph(text)])
    parts: list[Markup] = []
    if layers:
        rows, groups = similarity_map(curves, layers), rows_of_kinds(layers)
        means = _mean_similarities(curves, layers)
        name = "Similarity of successive subspaces"
        told = "; ".join(f"{kind} {mean:.2f}" for kind, (_, mean, _, _) in means.items())
        chart = heat_map("similarity", name, f"Means over the run: {told}.", rows, groups, float(curves.updates))
        ramp = [element("i", class_=f"key h{level}") for level in range(LEVELS)]
        legend = element("p", element("span", "0"), *ramp, element("span", "1: the same again"), class_="legend ramp")
        text = "A row is a matrix, grouped by kind and ordered by depth; where nothing is drawn, nothing was refreshed."
        cells = [
            (kind, f"{n:,}", f"{mean:.3f}", f"{low:.3f}", f"{last:.3f}") for kind, (n, mean, low, last) in means.items()
        ]
        values = table(("matrices", "refreshes logged", "mean", "lowest", "last"), cells, name)
        parts.append(figure(name, Markup(legend + chart), text, values))
    if made.x:
        parts.append(_refreshes(run, curves, made))
    if (failures := curves.series("subspace/failures").y) and failures[-1]:
        text = f"{failures[-1]:,.0f} refreshes failed, and their matrices kept the subspace of before."
        parts.append(paragraph(text))
    return Section(key, title, parts)


def _mean_similarities(curves: RunCurves, layers: list[str]) -> dict[str, tuple[int, float, float, float]]:
    """(number, mean, lowest, last) by kind of matrix."""
    points: dict[str, list[tuple[float, float]]] = {}
    for layer in layers:
        points.setdefault(kind_of(layer), []).extend(zip(*curves.series(PREFIX + layer), strict=True))
    return {
        kind: (len(found), sum(y for _, y in found) / len(found), min(y for _, y in found), max(found)[1])
        for kind, found in points.items()
    }


def _refreshes(run: RecordedRun, curves: RunCurves, made: Series) -> Markup:
    """Refreshes made, and those that would have been made at the shortest interval."""
    shares = curves.series("subspace/refreshes_saved_fraction")
    share_at = dict(zip(*shares, strict=True))
    # The fraction is saved / (saved + made).
    all_ = [
        count / (1 - share_at.get(step, 0.0)) if share_at.get(step, 0.0) < 1 else count
        for step, count in zip(*made, strict=True)
    ]
    saved = all_[-1] - made.y[-1]
    lines = [Line("made", made, "a")]
    text = f"{made.y[-1]:,.0f} refreshes were made, and the lazy rule has left out none."
    if saved > 0.5:
        lines.append(Line("without the lazy rule", Series(made.x, all_), "b"))
        text = (
            f"{made.y[-1]:,.0f} refreshes were made, and the lazy rule has left out {saved:,.0f} "
            f"({saved / all_[-1]:.1%}): a matrix whose subspace hardly changes gets a longer interval."
        )
    intervals = run.refresh_intervals()
    if intervals:
        listed = ", ".join(f"{interval:,} updates for {count}" for interval, count in intervals.items())
        text += f" Intervals at the newest checkpoint, by number of matrices: {listed}."
    figure_of_both = curve_figure("refreshes", "Refreshes", lines, "refreshes", text)
    assert figure_of_both is not None
    return figure_of_both
