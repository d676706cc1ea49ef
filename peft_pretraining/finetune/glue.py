"""Fine-tune a classifier on a task of GLUE, as in Table 4 of Q-GaLore (arXiv 2407.08296).

    python -m peft_pretraining.finetune.glue --task rte --method q_galore

Rates, batches and epochs are those of GaLore (arXiv 2403.03507, appendix D.2) for rank 8, for every method. The score
is the last epoch's on the validation set, Matthews' correlation for cola, Pearson's for stsb, F1 for mrpc, the mean of
the accuracies on both sets for mnli, accuracy otherwise; the best epoch's stands beside it.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from peft_pretraining.config.flags import Flag
from peft_pretraining.errors import UserError
from peft_pretraining.finetune import glue_metrics
from peft_pretraining.finetune.data_files import load_split
from peft_pretraining.finetune.flags import MethodArgs, TuningArgs, read_command_line
from peft_pretraining.finetune.methods import DTYPES, make_trainee
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


@dataclass(frozen=True)
class Task:
    """A task of GLUE, as the hub's nyu-mll/glue has it."""

    columns: tuple[str, ...]
    """Of the sentence, or of both."""
    lr: float
    metric: str = "accuracy"
    """A function of `glue_metrics`."""
    classes: int = 2
    """1: a number is predicted."""
    batch: int = 16
    validation: tuple[str, ...] = ("validation",)


TASKS: Mapping[str, Task] = {
    "cola": Task(("sentence",), 1e-5, "matthews", batch=32),
    "stsb": Task(("sentence1", "sentence2"), 3e-5, "pearson", classes=1),
    "mrpc": Task(("sentence1", "sentence2"), 2e-5, "f1"),
    "rte": Task(("sentence1", "sentence2"), 2e-5),
    "sst2": Task(("sentence",), 2e-5),
    "mnli": Task(
        ("premise", "hypothesis"), 1e-5, classes=3, validation=("validation_matched", "validation_mismatched")
    ),
    "qnli": Task(("question", "sentence"), 1e-5),
    "qqp": Task(("question1", "question2"), 2e-5),
}
"""By the names of their configurations."""


@dataclass(frozen=True)
class GlueArgs:
    """The task."""

    task: Annotated[str, Flag(choices=tuple(TASKS))] = dataclasses.field()
    """Its name on the hub."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return exit_code(lambda: _report(run(argv)), "glue")


def _report(row: Mapping[str, Any]) -> None:
    print(f"{row['task']} by {row['method']}, seed {row['seed']}: {row['metric']} {row['score']}")


def run(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Fine-tune as a command line says; returns the row, also of a run that has ended before. Raises UserError."""
    groups = {"task": GlueArgs, "method": MethodArgs, "fine-tuning": TuningArgs}
    usage = "glue --task NAME [--method NAME] [flags]"
    glue, method, tuning = read_command_line(argv, groups, (__doc__ or "").splitlines()[0], usage).values()
    task = TASKS[glue.task]
    tuning = dataclasses.replace(
        tuning,
        lr=tuning.lr or task.lr,
        total_batch_size=tuning.total_batch_size or task.batch,
        save_dir=tuning.save_dir or f"runs/finetune/{glue.task}-{method.method}-{tuning.seed}",
    )
    flags = flags_of(glue, method, tuning)
    folder = Path(tuning.save_dir)
    if (ended := open_folder(folder, flags)) is not None:
        print(f"{folder} has ended already; give another --save_dir to train again")
        return ended
    device = device_of(tuning.device)

    from transformers import set_seed

    set_seed(tuning.seed)
    tokenizer = load_tokenizer(tuning.init_from, tuning.max_length)
    head = "AutoModelForSequenceClassification"
    model = load_model(head, tuning.init_from, DTYPES[method.dtype], tokenizer, num_labels=task.classes)
    check_length(model, tuning.max_length)
    data = read_task(glue.task, tuning, tokenizer)
    trainee = make_trainee(model, method, tuning.lr, tuning.seed, device)
    row = {"program": "glue", "task": glue.task, "method": method.method, "seed": tuning.seed}
    row |= {"model": tuning.init_from, **fine_tune(trainee, data, method, tuning), "flags": flags}
    save_trained(trainee, tokenizer, folder / "model")
    write_row(row, folder, Path(tuning.results))
    return row


def read_task(name: str, tuning: TuningArgs, tokenizer: Any) -> TaskData:
    """The splits of a task as token ids. Raises UserError."""
    from transformers import DataCollatorWithPadding

    task = TASKS[name]

    def encode(examples: Mapping[str, Any]) -> dict[str, Any]:
        texts = (examples[column] for column in task.columns)
        encoded = tokenizer(*texts, truncation=True, max_length=tuning.max_length)
        return {**encoded, "labels": examples["label"]}

    def read(split: str) -> Any:
        found = load_split(tuning.dataset, name, split, [*task.columns, "label"])
        _check_labels(found["label"], task, f"--dataset {tuning.dataset}: {name}/{split}")
        return found.map(encode, batched=True, remove_columns=found.column_names)

    train = read("train")
    if tuning.max_examples:
        train = train.select(range(min(tuning.max_examples, len(train))))
    score: Callable[[Any, Any], float] = getattr(glue_metrics, task.metric)
    evaluated = {split: read(split) for split in task.validation}
    return TaskData(train, evaluated, DataCollatorWithPadding(tokenizer), score, task.metric)


def _check_labels(labels: Any, task: Task, where: str) -> None:
    """Raise UserError for a label that is no class of the task, as those of a test set that are held back (-1)."""
    for index, label in enumerate(labels):
        right = isinstance(label, float | int) if task.classes == 1 else label in range(task.classes)
        if not right:
            kinds = "a number" if task.classes == 1 else f"one of 0 to {task.classes - 1}"
            raise UserError(f"{where} has the label {label!r} at example {index}, and it must be {kinds}")


if __name__ == "__main__":
    sys.exit(main())
