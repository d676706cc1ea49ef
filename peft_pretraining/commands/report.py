"""Write one HTML file about a run: curves, memory by component, subspaces, text that it writes, configuration.

    qgalore report RUN [--output report.html]

The file has no scripts and loads nothing, so that it can be sent and opened anywhere. A run that is still going can be
reported, too: the text is that of its newest checkpoint, generated on the CPU, so that the run keeps its GPU.
"""

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from peft_pretraining.commands.corrected_flags import CommandParser
from peft_pretraining.commands.report_page.samples import PROMPTS, SampleOptions, samples_section
from peft_pretraining.config.flags import parse_name_or_path, parse_path, whole_number
from peft_pretraining.errors import UserError
from peft_pretraining.reporting.curves import read_curves


def build(folder: Path, samples: SampleOptions) -> str:
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
        samples_section(folder, samples),
        configuration_section(run),
    ]
    made = f"Made by qgalore report on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC from {folder.resolve()}."
    return page(folder.resolve().name or str(folder), subtitle(run), parts, made)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = CommandParser(
        prog="qgalore report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", type=parse_path, help="folder of a run (its --save_dir)")
    parser.add_argument("--output", type=parse_path, help="the file to write (default: report.html in that folder)")
    parser.add_argument("--no_samples", action="store_true", help="generate no text: of a large model that takes long")
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help=f"what text to continue; may be repeated (default: {PROMPTS})"
    )
    parser.add_argument("--seed", type=whole_number, default=0, help="the same seed gives the same text (default: 0)")
    parser.add_argument(
        "--tokenizer", type=parse_name_or_path, default="", metavar="NAME_OR_PATH", help="where the run's is not found"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda", "auto"), default="cpu", help="where text is generated (default: cpu)"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, or 2 for a UserError."""
    options = parse_args(argv)
    output: Path = options.output or options.run / "report.html"
    try:
        prompts = options.prompt or PROMPTS
        samples = SampleOptions(not options.no_samples, prompts, options.device, options.tokenizer, options.seed)
        text = build(options.run, samples)
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
