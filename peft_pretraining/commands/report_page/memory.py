"""The planned memory of a run by component, beside what was measured."""

from __future__ import annotations

from peft_pretraining.commands.report_page.recorded_run import RecordedRun
from peft_pretraining.errors import UserError
from peft_pretraining.memory.plan import MemoryPlan
from peft_pretraining.reporting.curves import RunCurves
from peft_pretraining.reporting.markup import Markup, table
from peft_pretraining.reporting.page import Section, details, figure, paragraph
from peft_pretraining.reporting.svg import Bar, bar_chart

_MEASURED = {"measured, allocated": "memory/peak_gb", "measured, reserved": "memory/reserved_gb"}
_UNIT = "GB (10⁹ bytes)"


def memory_section(run: RecordedRun, curves: RunCurves) -> Section:
    """The planned memory of a rank by component, and the measured peaks."""
    peaks = {label: max(values) for label, name in _MEASURED.items() if (values := curves.series(name).y)}
    on_gpu = len(peaks) != 1  # on a CPU there is one figure
    try:
        plan = run.memory(on_gpu)
    except (UserError, TypeError, ValueError, LookupError, AttributeError) as error:
        # A checkpoint of another version may have values that no flag has today.
        reason = (
            str(error).rstrip(".") if isinstance(error, UserError) else f"the recorded flags do not fit ({error!r})"
        )
        found = [paragraph(f"The memory is not planned here: {reason}.")]
        if peaks:
            rows = [(label, f"{value:.3f}") for label, value in peaks.items()]
            found.append(table(("peak", _UNIT), rows, "Measured memory of one rank"))
        return Section("memory", "Memory", found)
    text = "Blue: what the plan adds up; of what passes, the largest phase counts. Green: the sum."
    if on_gpu:
        text += " Orange: as measured." if peaks else " Nothing was measured."
        drawn = _figure(plan, peaks, text)
    else:
        text += (
            " This run was on a CPU: what was measured is the resident memory of the whole process with Python, its "
            f"libraries and the data ({size_text(1e9 * sum(peaks.values()))}), and is no check of the plan."
        )
        drawn = _figure(plan, {}, text)
    phases = [(name, f"{size / 1e9:.4g}") for name, size in plan.passing.items()]
    return Section(
        "memory", "Memory", [drawn, details("All phases of an update", table(("phase", _UNIT), phases, "Phases"))]
    )


def _figure(plan: MemoryPlan, peaks: dict[str, float], caption: str) -> Markup:
    largest = max(plan.passing, key=lambda name: plan.passing[name])
    parts: dict[str, float] = {name: size for name, size in (plan.lasting | plan.overhead).items() if size}
    parts[f"passing: {largest}"] = plan.passing[largest]
    bars = [Bar(name, size, size_text(size), "a") for name, size in parts.items()]
    bars.append(Bar("planned peak", plan.peak_bytes, size_text(plan.peak_bytes), "c"))
    bars += [Bar(name, 1e9 * size, size_text(1e9 * size), "b") for name, size in peaks.items()]
    rows = [(bar.label, f"{bar.value / 1e9:.4g}", f"{bar.value / plan.peak_bytes:.1%}") for bar in bars]
    title = "Planned and measured memory of one rank" if peaks else "Planned memory of one rank"
    described = f"Bars: {'; '.join(f'{bar.label} {bar.text}' for bar in bars)}."
    values = table(("component", _UNIT, "of the planned peak"), rows, title)
    return figure(title, bar_chart("memory-plan", title, described, bars), caption, values)


def size_text(size: float) -> str:
    """Bytes in GB or MB (powers of 1000), in three digits."""
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"
