"""One fine-tuning by transformers' Trainer, which goes on where it was stopped, and the row that it comes to."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from peft_pretraining.errors import UserError
from peft_pretraining.finetune.flags import MethodArgs, TuningArgs
from peft_pretraining.finetune.methods import Trainee
from peft_pretraining.reporting.throughput import GIGABYTE, memory_metrics
from peft_pretraining.runtime.process import exit_code_of
from qgalore import float_state_dict

RESULT = "result.json"
"""In the folder of a run: its row, when it has ended."""
SETTINGS = "settings.json"
"""In the folder of a run: its flags."""
_OF_A_PLACE = {"save_dir", "results", "device"}
"""Flags that may differ when a run goes on."""
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "peft", "bitsandbytes", "qgalore")


@dataclass(frozen=True)
class TaskData:
    """What a Trainer trains on, and how it measures."""

    train: Any
    """Examples by index, each a dictionary of lists that `collate` takes."""
    evaluated: Mapping[str, Any]
    """Sets of examples by name; a score is the mean over the sets."""
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    score: Callable[[Any, Any], float]
    """Of predictions and labels of a set, as arrays."""
    metric: str
    """What the score is, in words."""
    predict: Callable[[Any, Any], Any] | None = None
    """Makes predictions of logits and labels, batch by batch; None: the logits."""


def device_of(name: str) -> torch.device:
    """The device of --device on this rank. Raises UserError for a GPU that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA GPU; give --device cpu, or auto")
    on_gpu = name != "cpu" and torch.cuda.is_available()
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")


def open_folder(folder: Path, flags: Mapping[str, Any]) -> dict[str, Any] | None:
    """Make the folder of a run; the row of one that has ended there already, with the same flags.

    Raises UserError where a run with other flags has begun there.
    """
    flags = {name: value for name, value in flags.items() if name not in _OF_A_PLACE}
    path = folder / SETTINGS
    if int(os.environ.get("RANK", "0")):
        pass  # the first rank looks, and ends all
    elif path.is_file():
        former = _read(path)
        if former is None:
            raise UserError(f"--save_dir {folder}: its {SETTINGS} is damaged; remove the folder, or give another one")
        for name in sorted(former.keys() | flags.keys()):
            if former.get(name) != flags.get(name):
                raise UserError(
                    f"--save_dir {folder}: the fine-tuning there has --{name} {former.get(name)}, and here it is "
                    f"{flags.get(name)}; give the same flags to go on, or another --save_dir"
                )
    elif folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"--save_dir {folder}: the folder holds something else; give a new or an empty one")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(flags, indent=1) + "\n", encoding="utf-8")
    return _read(folder / RESULT)


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON file; None where it is not there, or its writing was interrupted."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found


def fine_tune(
    trainee: Trainee, data: TaskData, method: MethodArgs, tuning: TuningArgs, saves: bool = True
) -> dict[str, Any]:
    """Train a model, from the newest checkpoint of `tuning.save_dir` where there is one, and measure it.

    saves: whether checkpoints are written.

    Returns scores, peak memory, bytes by count, seconds and versions. `lr`, `total_batch_size` and `save_dir` of tuning
    are given. Raises UserError for a micro-batch that does not divide the batch, and for several GPUs in one process.
    """
    from transformers import Trainer

    folder = Path(tuning.save_dir)
    device = device_of(tuning.device)
    trainer = Trainer(
        trainee.model,
        _arguments(method, tuning, len(data.train), device, saves),
        data_collator=data.collate,
        train_dataset=data.train,
        eval_dataset=dict(data.evaluated),
        optimizers=(trainee.optimizer, None),
        callbacks=trainee.callbacks,
        preprocess_logits_for_metrics=data.predict,
        compute_metrics=lambda found: {"score": data.score(_first(found.predictions), found.label_ids)},
    )
    checkpoint = newest_checkpoint(folder)
    if checkpoint is not None:
        print(f"continues from {checkpoint}", flush=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    seconds, memory = time.perf_counter() - start, memory_metrics(device)
    if trainer.state.global_step not in scores_by_update(trainer.state.log_history, data.evaluated):
        trainer.evaluate()  # it was stopped between its last checkpoint and its measurement
    scores = scores_by_update(trainer.state.log_history, data.evaluated)
    last = scores[trainer.state.global_step]
    return {
        "metric": data.metric,
        "score": _mean(last),
        "best_score": max(map(_mean, scores.values())),
        "scores": last,
        "peak_gb": round(memory["memory/peak_gb"], 3),
        "reserved_gb": round(memory.get("memory/reserved_gb", 0.0), 3),
        "weight_bytes": trainee.weight_bytes(),
        "state_bytes": trainee.state_bytes(),
        "counted_gb": round((trainee.weight_bytes() + trainee.state_bytes()) / GIGABYTE, 3),
        "trained_values": trainee.trained_values(),
        "updates": trainer.state.global_step,
        "resumed_at": 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2]),
        "seconds": round(seconds, 3),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "versions": versions(),
    }


def write_row(row: Mapping[str, Any], folder: Path, results: Path) -> None:
    """Append a row to a file of JSON lines, and keep it in the folder of its run; on the first rank alone."""
    if int(os.environ.get("RANK", "0")):
        return
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    (folder / RESULT).write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")


def save_trained(trainee: Trainee, tokenizer: Any, folder: Path) -> None:
    """Write what was trained, with its tokenizer, as transformers and peft load it: floats, or adapters alone."""
    if int(os.environ.get("RANK", "0")):
        return
    model: Any = trainee.model
    floats = {} if trainee.optimizer is None else {"state_dict": float_state_dict(model)}
    model.save_pretrained(folder, **floats)
    tokenizer.save_pretrained(folder)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a Trainer that is whole: its state is what is written last."""
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def scores_by_update(history: list[dict[str, Any]], sets: Iterable[str]) -> dict[int, dict[str, float]]:
    """The score of each evaluated set, by the updates after which all of them were evaluated."""
    names = list(sets)
    found: dict[int, dict[str, float]] = {}
    for line in history:
        for name in names:
            if (key := f"eval_{name}_score") in line:
                found.setdefault(line["step"], {})[name] = round(line[key], 3)
    return {step: scores for step, scores in found.items() if len(scores) == len(names)}


def _mean(scores: Mapping[str, float]) -> float:
    return round(sum(scores.values()) / len(scores), 3)


def versions() -> dict[str, str]:
    """The versions of the packages that take part, as far as they are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = torch.__version__ if name == "torch" else version(name)
        except PackageNotFoundError:
            continue
    return found


def updates_of(tuning: TuningArgs, examples: int) -> int:
    """Updates of a run: those of its flag, or those of its epochs."""
    return tuning.num_training_steps or math.ceil(tuning.epochs * math.ceil(examples / tuning.total_batch_size))


def _arguments(method: MethodArgs, tuning: TuningArgs, examples: int, device: torch.device, saves: bool) -> Any:
    """The `TrainingArguments` of a run. Raises UserError."""
    from transformers import TrainingArguments

    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    micro_batch = tuning.batch_size or max(1, tuning.total_batch_size // ranks)
    if tuning.total_batch_size % (micro_batch * ranks):
        raise UserError(
            f"--batch_size {micro_batch}: --total_batch_size {tuning.total_batch_size} is not a multiple of it times "
            f"the {ranks} rank{'s' * (ranks > 1)}; give a divisor of {tuning.total_batch_size // ranks}"
        )
    recompute: dict[str, Any] = {}
    if method.activation_checkpointing:
        recompute = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    args = TrainingArguments(
        tuning.save_dir,
        per_device_train_batch_size=micro_batch,
        per_device_eval_batch_size=micro_batch,
        gradient_accumulation_steps=tuning.total_batch_size // (micro_batch * ranks),
        num_train_epochs=tuning.epochs,
        max_steps=tuning.num_training_steps or -1,
        learning_rate=tuning.lr,
        weight_decay=0.0,
        optim="adamw_torch",
        lr_scheduler_type="linear",
        warmup_steps=int(tuning.warmup * updates_of(tuning, examples)),
        max_grad_norm=tuning.grad_clipping,
        bf16=device.type == "cuda" and method.dtype == "float32",
        **recompute,
        eval_strategy="epoch",
        save_strategy="no" if not saves else "steps" if tuning.save_every else "epoch",
        save_steps=tuning.save_every or 500,
        save_total_limit=2,
        logging_steps=50,
        seed=tuning.seed,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        label_names=["labels"],
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=not sys.stderr.isatty(),
    )
    if args.n_gpu > 1:
        raise UserError(
            f"one process sees {args.n_gpu} GPUs: start one for each with torchrun (NPROC={args.n_gpu} of the scripts),"
            " or let one be visible with CUDA_VISIBLE_DEVICES=0"
        )
    return args


def flags_of(*groups: Any) -> dict[str, Any]:
    """The values of flags by name."""
    return {name: value for group in groups for name, value in dataclasses.asdict(group).items()}


def _first(predictions: Any) -> Any:
    """The logits, where a model gives more beside them."""
    return predictions[0] if isinstance(predictions, tuple) else predictions


def exit_code(program: Callable[[], None], name: str) -> int:
    """`exit_code_of`, to which a file that cannot be read or written is a UserError, too."""

    def run() -> None:
        try:
            program()
        except OSError as error:
            raise UserError(str(error)) from error

    return exit_code_of(run, name)
