"""The command `qgalore`: what is done before, in and after a training run, a module for each.

    qgalore COMMAND ...          or: python -m peft_pretraining COMMAND ...

Each module has `main(argv) -> exit code` and imports what it needs, so that a command loads no other's libraries.
"""

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from peft_pretraining.errors import missing_package
from peft_pretraining.models.config_files import shipped_root
from peft_pretraining.runtime.interrupt import EXIT_CODE, ending_on_interrupt

COMMANDS = {
    "pretrain": "train a model from scratch, or go on from weights that are there",
    "plan": "say what trains in the memory of a card, and how fast",
    "tokenize": "write the token ids of a data set to files",
    "generate": "continue a text with a trained model",
    "evaluate": "say how well a trained model predicts other texts",
    "export": "write a checkpoint as a float model that transformers loads",
    "plot": "draw the metrics of runs, and print what they have come to",
    "report": "write one HTML file about a run",
}
"""What each command does, by its name, which is that of its module."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names with the rest of them; returns its exit code."""
    name, *rest = (sys.argv[1:] if argv is None else list(argv)) or [""]
    if name in ("", "-h", "--help", "help"):
        print(usage(), file=sys.stderr if name == "" else sys.stdout)
        return 2 if name == "" else 0
    if name == "--version":
        from qgalore import __version__

        print(f"qgalore {__version__}")
        return 0
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1)
        advice = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(COMMANDS)}"
        print(f"qgalore: {name} is no command: {advice}", file=sys.stderr)
        return 2
    try:
        with ending_on_interrupt(f"qgalore {name}"):
            module = importlib.import_module(f"{__name__}.{name}")
        code = int(module.main(rest))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return EXIT_CODE
    except BrokenPipeError:
        if name == "pretrain":  # a run that has failed says so
            raise
        # What reads the output has ended, such as head.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        if (advice_to_install := missing_package(error)) is None:
            raise
        print(f"qgalore {name}: {advice_to_install}", file=sys.stderr)
        return 2


def usage() -> str:
    """The commands, a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, text in COMMANDS.items()]
    usage = "usage: qgalore COMMAND ...   (qgalore COMMAND --help has its arguments; qgalore --version)"
    root = shipped_root()
    shipped = [f"models   {root / 'configs'}", f"recipes  bash {root / 'scripts'}/pretrain_c4/llama_60m.sh, and others"]
    return "\n".join([usage, "", *lines, "", *shipped])
