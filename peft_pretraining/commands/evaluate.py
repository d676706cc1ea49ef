"""Compute the loss and perplexity of a trained model on a data set.

    qgalore evaluate checkpoints/run
    qgalore evaluate checkpoints/run --dataset other.jsonl --eval_tokens 1M
    qgalore evaluate exported --dataset c4 --max_length 256

RUN is a run's folder (its newest checkpoint), one of its checkpoints, or an exported model. Flags that are not given
are those of the run, so that without any the run's own last evaluation is repeated, to the bit on the same device. If a
data set has no validation split, the documents that the run has held out of its own are evaluated, and another data set
as a whole.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

import torch

from peft_pretraining.after_training.evaluated_data import Data, Evaluation, open_data
from peft_pretraining.after_training.trained_model import DEVICES, DTYPES, Origin, TrainedModel, open_trained
from peft_pretraining.commands.corrected_flags import CommandParser
from peft_pretraining.config.flag_groups import DataArgs, EvaluationArgs
from peft_pretraining.config.flags import add_flag, convert, parse_count, parse_path, read_specs
from peft_pretraining.data.tokenizer import check_vocabulary
from peft_pretraining.errors import UserError
from peft_pretraining.evaluation import EvalResult
from peft_pretraining.evaluation import evaluate as evaluate_model
from peft_pretraining.runtime.process import make_reproducible

DATA_FLAGS = (
    "dataset", "tokenizer", "dataset_config", "dataset_revision", "train_split", "validation_split", "text_column",
    "text_unit", "add_bos", "add_eos", "packing", "damaged_limit",
)  # fmt: skip
"""The flags of a run for the data and its tokenizer."""
_OF_THE_DATA_SET = (
    "dataset_config", "dataset_revision", "train_split", "validation_split", "text_column", "text_unit"
)  # fmt: skip
"""Those that say nothing about another data set."""
_MAX_LENGTH, _BATCH_SIZE = 256, 8


def evaluate_trained(trained: TrainedModel, asked: Evaluation, tokenizer: str = "") -> dict[str, Any]:
    """Evaluate a model; returns the results by name, and what they are of. Raises UserError.

    `loss` is in nats a token; `perplexity` is its exponential, and `perplexity_official` the official code's formula
    (see `evaluation`). `bits_per_byte`: the bits of all predicted tokens, by the bytes of the text that they are.
    """
    if trained.longest is not None and asked.max_length > trained.longest:
        raise UserError(
            f"--max_length is {asked.max_length}, but {trained.path} takes {trained.longest} tokens: give at most that."
        )
    data = open_data(trained, asked, tokenizer)
    check_vocabulary(data.eval_set.vocab_size, trained.vocab_size, are_ids=data.count is None)
    result = evaluate_model(trained.model, data.batches(asked.eval_tokens or None), trained.device)
    return {
        "model": trained.describe(),
        "data": data.described,
        "rows": f"of up to {asked.max_length} tokens, {asked.data.packing}, {asked.batch_size} in a batch",
        "tokenizer": "" if data.tokenizer is None else data.tokenizer.describe(),
        **result._asdict(),
        "bits_per_byte": _bits_per_byte(result, data),
        "documents": data.documents,
        "text_bytes": data.text_bytes,
    }


def _bits_per_byte(result: EvalResult, data: Data) -> float | None:
    text_bytes = data.text_bytes
    predicted = 0 if text_bytes is None else text_bytes - data.first_bytes
    return result.loss * result.tokens / math.log(2) / predicted if predicted > 0 else None


# ---- the command


def parse_args(argv: Sequence[str] | None) -> tuple[dict[str, Any], argparse.Namespace]:
    """Parse the command line: (given flags of the data, the others). Raises UserError."""
    parser = CommandParser(
        prog="qgalore evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("run", type=parse_path, metavar="RUN", help="a run, one of its checkpoints, or an export")
    specs = [spec for spec in read_specs(DataArgs) if spec.name in DATA_FLAGS]
    for spec in specs:
        add_flag(parser, spec, default=argparse.SUPPRESS, help=f"{spec.help} (default: as the run)".replace("%", "%%"))
    parser.add_argument(
        "--split", choices=("validation", "train"),
        help="the part of the data set (default: validation, or all of another data set that has none)",
    )  # fmt: skip
    parser.add_argument(
        "--eval_tokens", "--max_tokens", metavar="TOKENS",
        help="tokens to evaluate on, such as 500K; 0: all (default: as the run; 10M for an export)",
    )  # fmt: skip
    parser.add_argument("--max_length", metavar="TOKENS", help="length of a row (default: as the run; else 256)")
    parser.add_argument("--eval_batch_size", metavar="ROWS", help="rows in a batch (default: as the run; else 8)")
    parser.add_argument("--averaged", action="store_true", help="the mean of the weights that --average_last has made")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="auto: a CUDA GPU if there is one")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (default: as they are)")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    args, problems = parser.parse_args(argv), list[str]()
    given: dict[str, Any] = {}
    for spec in specs:
        if hasattr(args, spec.name):
            value = vars(args).pop(spec.name)
            try:
                given[spec.name] = value if spec.is_switch else convert(spec, value)
            except ValueError as error:
                problems.append(str(error))
    for name, least in (("eval_tokens", 0), ("max_length", 2), ("eval_batch_size", 1)):
        problems += _count(args, name, least)
    if problems:
        raise UserError(f"{'; '.join(problems)}.")
    return given, args


def _count(args: argparse.Namespace, name: str, least: int) -> list[str]:
    """Replace the text of a flag by its number; returns a sentence if that is none."""
    text = getattr(args, name)
    if text is None:
        return []
    try:
        setattr(args, name, parse_count(text))
    except ValueError as error:
        return [f"--{name} is {text!r}, it must be {error}"]
    return [] if getattr(args, name) >= least else [f"--{name} is {text}, it must be at least {least}"]


def asked_of(origin: Origin, given: dict[str, Any], args: argparse.Namespace) -> Evaluation:
    """The evaluation that a command line asks for: what it does not say is as in the run. Raises UserError."""
    flags = origin.flags
    names = {each.name for each in dataclasses.fields(DataArgs)}
    data = DataArgs(**{name: value for name, value in flags.items() if name in names})
    own = bool(flags.get("dataset")) and given.get("dataset", data.dataset) == data.dataset
    if own and not data.dataset_revision:  # a run takes the newest commit of its start
        data = dataclasses.replace(
            data, dataset_revision=flags.get("data", {}).get("order", {}).get("dataset_revision", "")
        )
    if not own:
        if "dataset" not in given:
            raise UserError(f"{origin.path} has recorded no data: give --dataset.")
        defaults = DataArgs()
        data = dataclasses.replace(data, **{name: getattr(defaults, name) for name in _OF_THE_DATA_SET})
    longest = _MAX_LENGTH if origin.longest is None else min(_MAX_LENGTH, origin.longest)
    eval_tokens = (
        flags.get("eval_tokens", EvaluationArgs().eval_tokens) if args.eval_tokens is None else args.eval_tokens
    )
    return Evaluation(
        data=dataclasses.replace(data, **given), own=own, split=args.split or "",
        max_length=args.max_length or origin.trained_length or longest,
        batch_size=args.eval_batch_size or flags.get("eval_batch_size") or _BATCH_SIZE,
        eval_tokens=int(eval_tokens),
    )  # fmt: skip


def in_words(results: dict[str, Any]) -> str:
    """The results as lines of a text."""
    bits, documents, text_bytes = (results[name] for name in ("bits_per_byte", "documents", "text_bytes"))
    lines = [
        results["model"],
        f"on {results['data']}; rows {results['rows']}",
        f"tokenizer {results['tokenizer']}" if results["tokenizer"] else "",
        f"perplexity           {results['perplexity']:.4f}   exp of the loss: each token counts alike",
        f"perplexity_official  {results['perplexity_official']:.4f}   the official code's: exp of the "
        "sum of the batches' means, divided by their number plus one",
        f"loss                 {results['loss']:.5f}   nats a token",
        f"bits a byte          {'not known: give --tokenizer' if bits is None else f'{bits:.5f}'}",
        f"tokens               {results['tokens']:,}",
        "" if documents is None else f"documents            {documents:,}",
        "" if text_bytes is None else f"text                 {text_bytes:,} bytes of UTF-8",
    ]  # fmt: skip
    return "\n".join(line for line in lines if line)


def run(argv: Sequence[str] | None) -> None:
    """Evaluate as the command line asks, and print the results. Raises UserError."""
    given, args = parse_args(argv)
    make_reproducible()
    trained = open_trained(args.run, args.device, args.dtype, args.averaged)
    results = evaluate_trained(trained, asked_of(trained, given, args), given.get("tokenizer", ""))
    print(json.dumps(results) if args.json else in_words(results))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        run(argv)
    except (UserError, OSError) as error:
        print(f"qgalore evaluate: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        print(
            "qgalore evaluate: it does not fit the GPU: give a smaller --eval_batch_size, or --device cpu",
            file=sys.stderr,
        )
        return 2
    return 0
