"""Commands beside `pretrain` answer a flag that they do not have with the right one."""

from __future__ import annotations

import importlib

import pytest

from peft_pretraining import commands
from peft_pretraining.commands import corrected_flags

WRONG = {
    "generate RUN --max_new_tokens 5": "--max_new_tokens is no flag of qgalore generate: write --max_tokens 5",
    "generate --model r --Temp=0.3 hi": "RUN stands without a flag, as in qgalore generate r; --Temp is no flag of",
    "generate RUN --top-k 3 text": "write --top_k 3",
    "evaluate --learning_rate": "--learning_rate is no flag of qgalore evaluate: --help lists them all",
    "evaluate RUN --batch-size 8 --datset c4": "write --eval_batch_size 8; --datset is no flag of qgalore evaluate: "
    "did you mean --dataset?",
    "evaluate RUN --data x": "write --dataset x",
    "export RUN --outdir o": "OUTPUT stands without a flag, as in qgalore export CHECKPOINT o",
    "export RUN --ema out": "write --averaged",
    "plot --runs": "RUN stands without a flag, as in qgalore plot RUN",
    "plot RUN --x_axis tokens": "write --by tokens",
    "report RUN --outfile x": "write --output x",
    "tokenize --dataset c4 --out y": "write --output_dir y",
}


def call(line: str) -> int:
    name, *argv = line.split()
    return int(importlib.import_module(f"peft_pretraining.commands.{name}").main(argv))


@pytest.mark.parametrize("name", ["generate", "evaluate", "export", "plot", "report", "tokenize"])
def test_a_command_without_a_word_says_what_is_missing(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", [f"qgalore {name}"])
    with pytest.raises(SystemExit) as left:
        call(name)
    assert left.value.code == 2
    assert "the following arguments are required: " in capsys.readouterr().err


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_flag_is_answered_with_the_right_one(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where something else is missing, which is said when the flag is right."""
    with pytest.raises(SystemExit) as left:
        call(line)
    assert left.value.code == 2
    assert WRONG[line] in capsys.readouterr().err


def test_flags_that_are_right_and_texts_are_no_concern(capsys: pytest.CaptureFixture[str]) -> None:
    """A shortened flag of argparse, a number, what follows --, and any flag beside --help."""
    for line in ("plot nothing --smoo 3", "generate nothing --seed 1 -- --text"):
        call(line)
        assert "no flag" not in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        call("plot --frobnicate --help")
    assert left.value.code == 0


def test_every_name_in_the_tables_is_of_some_command(monkeypatch: pytest.MonkeyPatch) -> None:
    parsers: list[corrected_flags.CommandParser] = []
    monkeypatch.setattr(corrected_flags.CommandParser, "_refuse_unknown", lambda self, _: parsers.append(self))
    for name in set(commands.COMMANDS) - {"pretrain", "plan"}:
        with pytest.raises(SystemExit):
            call(f"{name} --help")
    assert len(parsers) == len(commands.COMMANDS) - 2
    flags = {name.removeprefix("--") for each in parsers for x in each._actions for name in x.option_strings}
    positionals = {x.dest for each in parsers for x in each._actions if not x.option_strings}
    assert corrected_flags._OTHER_NAMES.keys() <= flags and corrected_flags._OF_POSITIONALS.keys() == positionals
