"""Write one HTML file about a run: curves, memory by component, subspaces, text that it writes, configuration.

    qgalore report RUN [--output report.html]

The file has no scripts and loads nothing, so that it can be sent and opened anywhere. A run that is still going can be
reported, too.
"""

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from peft_pretraining.config.flags import parse_path
from peft_pretraining.errors import UserError
from peft_pretraining.reporting.curves import read_curves


def build(folder: Path) -> str:
    """The page about the run in a folder. Raises UserError if that is no run's or has no metrics yet."""
    from peft_pretraining.commands.report_page.configuration import configuration_section
    from peft_pretraining.commands.report_page.curves import curves_section
    from peft_pretraining.commands.report_page.memory import memory_section
    from peft_pretraining.commands.report_page.recorded_run import read_run
    from peft_pretraining.commands.report_page.subspaces import subspaces_section
    from peft_pretraining.commands.report_page.summary import subtitle, summary_section
    from peft_pretraining.reporting.page import page

    curves, run = read_curves(folder), read_run(folder)
    parts = [
        summary_section(run, curves),
        curves_section(curves),
        memory_section(run, curves),
        subspaces_section(run, curves),
        configuration_section(run),
    ]
    made = f"Made by qgalore report on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC from {folder.resolve()}."
    return page(folder.resolve().name or str(folder), subtitle(run), parts, made)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="qgalore report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", type=parse_path, help="folder of a run (its --save_dir)")
    parser.add_argument("--output", type=parse_path, help="the file to write (default: report.html in that folder)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, or 2 for a UserError."""
    options = parse_args(argv)
    output: Path = options.output or options.run / "report.html"
    try:
        text = build(options.run)
        try:
            output.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"--output {output} cannot be written ({error.strerror}): give a file in a folder that is there"
            ) from error
    except UserError as error:
        print(f"qgalore report: {error}", file=sys.stderr)
        return 2
    print(f"wrote {output} ({output.stat().st_size / 1e3:,.0f} kB)")
    return 0
