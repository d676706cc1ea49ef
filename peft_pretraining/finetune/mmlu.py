"""Fine-tune a language model for MMLU, as in Table 3 of Q-GaLore (arXiv 2407.08296), and measure it with 5 examples.

    python -m peft_pretraining.finetune.mmlu --method q_galore

The papers give no data, epochs and rates. Here every method trains on the questions that come with MMLU for that
(Hendrycks et al., arXiv 2009.03300: auxiliary_train of cais/mmlu), for one epoch at one rate, to give the letter of the
answer after the question as lm-eval writes it; the loss is of that letter alone. Embeddings and head are frozen.

The score is the accuracy on MMLU's validation questions, without examples before them. The figure of the tables, on the
test questions with 5 examples, is of lm-eval, where it is installed.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from peft_pretraining.config.flags import Flag
from peft_pretraining.errors import UserError
from peft_pretraining.finetune.data_files import load_split
from peft_pretraining.finetune.flags import MethodArgs, TuningArgs, read_command_line
from peft_pretraining.finetune.glue_metrics import accuracy_of_classes
from peft_pretraining.finetune.methods import DTYPES, Trainee, make_trainee
from peft_pretraining.finetune.pretrained import check_length, load_model, load_tokenizer
from peft_pretraining.finetune.training import (
    TaskData,
    device_of,
    exit_code,
    fine_tune,
    flags_of,
    open_folder,
    save_trained,
    write_row,
)

LETTERS = "ABCD"
COLUMNS = ("question", "subject", "choices", "answer")
IGNORED = -100
"""The label of a token that has no part in the loss."""


@dataclass(frozen=True)
class MmluMethodArgs(MethodArgs):
    """How the pretrained weights are trained."""

    svd_method: Annotated[str, Flag(choices=("full", "randomized"))] = "randomized"
    embeddings: Annotated[str, Flag(choices=("trained", "frozen"))] = "frozen"
    dtype: Annotated[str, Flag(choices=("float32", "bfloat16"))] = "bfloat16"
    activation_checkpointing: bool = True


@dataclass(frozen=True)
class MmluTuningArgs(TuningArgs):
    """The model, the data and the length of the fine-tuning."""

    init_from: Annotated[str, Flag("name_or_path")] = "meta-llama/Meta-Llama-3-8B"
    dataset: Annotated[str, Flag("name_or_path")] = "cais/mmlu"
    lr: Annotated[float, Flag("rate", above=0)] = 2e-5
    epochs: Annotated[float, Flag("passes", above=0)] = 1.0
    warmup: Annotated[float, Flag("share", at_least=0, below=1)] = 0.03
    total_batch_size: Annotated[int, Flag("examples", at_least=1)] = 16
    batch_size: Annotated[int, Flag("examples", at_least=0, auto="as many as an update has")] = 1
    grad_clipping: Annotated[float, Flag("norm", at_least=0)] = 1.0
    save_dir: Annotated[str, Flag("folder", auto="runs/finetune/mmlu-<method>-<seed>")] = ""
    save_every: Annotated[int, Flag("updates", at_least=0, auto="an epoch")] = 500


@dataclass(frozen=True)
class MmluArgs:
    """The measurement at the end."""

    eval_limit: Annotated[int, Flag("questions", at_least=0, auto="all")] = 0
    """Let lm-eval ask the first so many questions of each subject."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return exit_code(lambda: _report(run(argv)), "mmlu")


def _report(row: Mapping[str, Any]) -> None:
    print(f"mmlu by {row['method']}, seed {row['seed']}: validation accuracy {row['score']}")
    if row["mmlu_5shot"] is None:
        flags = row["flags"]
        print(how_to_measure(row["method"], row["model"], Path(flags["save_dir"]) / "model", flags["dtype"]))
    else:
        print(f"MMLU with 5 examples: {row['mmlu_5shot']['mmlu']}")


def run(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Fine-tune as a command line says; returns the row, also of a run that has ended before. Raises UserError."""
    groups = {"measurement": MmluArgs, "method": MmluMethodArgs, "fine-tuning": MmluTuningArgs}
    usage = "mmlu [--method NAME] [flags]"
    mmlu, method, tuning = read_command_line(argv, groups, (__doc__ or "").splitlines()[0], usage).values()
    save_dir = tuning.save_dir or f"runs/finetune/mmlu-{method.method}-{tuning.seed}"
    tuning = dataclasses.replace(tuning, save_dir=save_dir)
    flags, folder = flags_of(mmlu, method, tuning), Path(save_dir)
    if (ended := open_folder(folder, flags)) is not None:
        print(f"{folder} has ended already; give another --save_dir to train again")
        return ended
    device = device_of(tuning.device)

    from transformers import set_seed

    set_seed(tuning.seed)
    tokenizer = load_tokenizer(tuning.init_from, tuning.max_length)
    model = load_model("AutoModelForCausalLM", tuning.init_from, DTYPES[method.dtype], tokenizer)
    model.config.use_cache = False
    check_length(model, tuning.max_length)
    data = read_questions(tuning, tokenizer)
    trainee = make_trainee(model, method, tuning.lr, tuning.seed, device)
    row = {"program": "mmlu", "task": "mmlu", "method": method.method, "seed": tuning.seed}
    row |= {"model": tuning.init_from, **fine_tune(trainee, data, method, tuning), "flags": flags}
    save_trained(trainee, tokenizer, folder / "model")
    row["mmlu_5shot"] = measure(trainee, tokenizer, mmlu.eval_limit, tuning.batch_size or 1)
    write_row(row, folder, Path(tuning.results))
    return row


def read_questions(tuning: TuningArgs, tokenizer: Any) -> TaskData:
    """The questions to train on and to validate with, as token ids. Raises UserError."""
    letters = letter_ids(tokenizer)

    def read(split: str) -> Any:
        found = load_split(tuning.dataset, "all", split, COLUMNS)
        if split != "validation" and tuning.max_examples:
            found = found.select(range(min(tuning.max_examples, len(found))))
        for index, (choices, answer) in enumerate(zip(found["choices"], found["answer"], strict=True)):
            if len(choices) != len(LETTERS) or answer not in range(len(LETTERS)):
                raise UserError(
                    f"--dataset {tuning.dataset}: question {index} of all/{split} has {len(choices)} choices and the "
                    f"answer {answer!r}; there must be 4 choices, and an answer of 0 to 3"
                )
        return found.map(lambda row: encode(row, tokenizer, tuning.max_length), remove_columns=found.column_names)

    pad = tokenizer.pad_token_id
    pad = tokenizer.eos_token_id if pad is None else pad
    return TaskData(
        read("auxiliary_train"),
        {"validation": read("validation")},
        lambda examples: collate(examples, pad or 0),
        lambda found, labels: accuracy_of_classes(found, classes_of(labels, letters)),
        "validation accuracy",
        lambda logits, labels: predicted(logits, labels, letters),
    )


def prompt(row: Mapping[str, Any]) -> str:
    """A question as lm-eval's task mmlu writes it; those of auxiliary_train have no subject."""
    subject = str(row["subject"]).replace("_", " ").strip()
    head = f"The following are multiple choice questions (with answers) about {subject}.\n\n" if subject else ""
    choices = "".join(f"{letter}. {text}\n" for letter, text in zip(LETTERS, row["choices"], strict=True))
    return f"{head}{row['question'].strip()}\n{choices}Answer:"


def encode(row: Mapping[str, Any], tokenizer: Any, max_length: int) -> dict[str, list[int]]:
    """A question with its answer as token ids, and the letter's as the only label; a long one loses its beginning."""
    ids = list(tokenizer(prompt(row))["input_ids"])
    if ids and ids[-1] == tokenizer.eos_token_id:  # of a tokenizer that ends a text
        ids.pop()
    ids = [*ids, letter_ids(tokenizer)[row["answer"]]][-max_length:]
    return {"input_ids": ids, "labels": [IGNORED] * (len(ids) - 1) + ids[-1:]}


def letter_ids(tokenizer: Any) -> list[int]:
    """The id of each letter as it follows "Answer:". Raises UserError for a tokenizer that cannot tell them apart."""
    ids = [tokenizer(f" {letter}", add_special_tokens=False)["input_ids"][-1:] for letter in LETTERS]
    if len({tuple(each) for each in ids}) < len(LETTERS) or not all(ids) or ids[0] == [tokenizer.unk_token_id]:
        raise UserError("--init_from: its tokenizer has no tokens of their own for the letters A, B, C and D")
    return [each[0] for each in ids]


def collate(examples: Sequence[Mapping[str, Any]], pad: int) -> dict[str, Any]:
    """A batch of examples, filled at the end: input_ids, attention_mask and labels, (rows, longest)."""
    longest = max(len(example["input_ids"]) for example in examples)
    batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for example in examples:
        length = len(example["input_ids"])
        rest = longest - length
        batch["input_ids"].append([*example["input_ids"], *[pad] * rest])
        batch["attention_mask"].append([1] * length + [0] * rest)
        batch["labels"].append([*example["labels"], *[IGNORED] * rest])
    return {name: torch.tensor(rows) for name, rows in batch.items()}


def predicted(logits: Any, labels: Tensor, letters: Sequence[int]) -> Tensor:
    """The most probable of the four letters at the place of the answer, as 0 to 3, (rows, 1).

    logits: (rows, length, vocabulary); labels: (rows, length), one of each row not IGNORED.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    before = (labels != IGNORED).int().argmax(-1) - 1  # the token before the answer predicts it
    rows = torch.arange(len(labels), device=labels.device)
    of_letters: Tensor = logits[rows, before][:, list(letters)]
    return of_letters.argmax(-1, keepdim=True)


def classes_of(labels: Any, letters: Sequence[int]) -> list[int]:
    """The right answers, 0 to 3, of labels (rows, length) that are ids."""
    return [letters.index(int(row[row != IGNORED][0])) for row in labels]


def measure(trainee: Trainee, tokenizer: Any, limit: int, batch_size: int) -> dict[str, float] | None:
    """MMLU with 5 examples by lm-eval, in percent: the average as "mmlu" and its groups; None without the package.

    On the first rank alone, as lm-eval has it for a model that is there already.
    """
    if find_spec("lm_eval") is None or int(os.environ.get("RANK", "0")):
        return None
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    trainee.model.eval()
    model = HFLM(pretrained=trainee.model, tokenizer=tokenizer, batch_size=batch_size)
    found = lm_eval.simple_evaluate(model=model, tasks=["mmlu"], num_fewshot=5, limit=limit or None)
    groups = ("mmlu", "mmlu_stem", "mmlu_social_sciences", "mmlu_humanities", "mmlu_other")
    return {name: round(100 * found["results"][name]["acc,none"], 2) for name in groups}


def how_to_measure(method: str, init_from: str, folder: Path, dtype: str) -> str:
    """How to get the figure of the tables without lm-eval here."""
    model = f"pretrained={folder}" if "lora" not in method else f"pretrained={init_from},peft={folder}"
    model += ",load_in_8bit=True" if method == "qlora" else f",dtype={dtype}"
    return (
        "MMLU with 5 examples is measured by lm-eval, which is not installed: pip install lm-eval, then "
        f"lm_eval --model hf --model_args {model} --tasks mmlu --num_fewshot 5"
    )


if __name__ == "__main__":
    sys.exit(main())
