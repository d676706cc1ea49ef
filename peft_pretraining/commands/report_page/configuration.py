"""The configuration of a run: flags as resolved, the model's config.json, versions."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from typing import Any

from peft_pretraining.commands.report_page.recorded_run import RecordedRun
from peft_pretraining.config.run_config import GROUPS
from peft_pretraining.errors import UserError
from peft_pretraining.reporting.markup import Markup, element, table
from peft_pretraining.reporting.page import Section, details, paragraph, preformatted

_PACKAGES = ("torch", "triton", "transformers", "tokenizers", "sentencepiece", "datasets", "safetensors", "qgalore")


def configuration_section(run: RecordedRun) -> Section:
    """The command, the flags as resolved, the model's config.json, the versions."""
    parts: list[Markup] = []
    if run.commands:
        text = "A line for each start, with the time and the versions of what it ran with."
        parts += [element("h3", "Commands"), paragraph(text), preformatted(run.commands.rstrip())]
    if not run.flags:
        parts.append(paragraph("No checkpoint has recorded the flags of this run (--save_every)."))
    else:
        parts.append(paragraph("Flags as the run has resolved them; those that are not at their default are bold."))
    for group, values in run.flags.items():
        rows = [_flag_row(group, name, value) for name, value in values.items()]
        parts.append(details(group, table(("flag", "value"), rows, f"Flags: {group}", numbers=False)))
    if run.model_config:
        rows = [(name, _shown(value)) for name, value in run.model_config.items()]
        parts.append(
            details(
                "config.json of the model", table(("key", "value"), rows, "config.json of the model", numbers=False)
            )
        )
        try:
            shape = run.shape()
            parts.append(paragraph(
                f"The model has {shape.parameter_count() / 1e6:,.1f} M parameters: {shape.num_hidden_layers} layers, "
                f"width {shape.hidden_size}, {shape.vocab_size:,} tokens in its vocabulary."
            ))  # fmt: skip
        except UserError:
            pass
    if run.checkpoints:
        steps = ", ".join(f"{step:,}" for step in run.checkpoints)
        parts.append(paragraph(f"Checkpoints after these numbers of updates: {steps}."))
    parts.append(table(("where this page was made", "version"), versions(), "Versions", numbers=False))
    return Section("configuration", "Configuration", parts)


def _flag_row(group: str, name: str, value: Any) -> tuple[Markup | str, str]:
    fields = {field.name: field for field in dataclasses.fields(GROUPS[group])}
    changed = fields[name].default is dataclasses.MISSING or fields[name].default != value
    return element("b", f"--{name}") if changed else f"--{name}", _shown(value)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None or value == "" else str(value)


def versions() -> list[tuple[str, str]]:
    """Of Python, the system and the packages that a run uses, as they are here."""
    found = [("Python", platform.python_version()), ("system", f"{platform.system()} {platform.machine()}")]
    for name in _PACKAGES:
        try:
            found.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            found.append((name, "not installed"))
    return found
