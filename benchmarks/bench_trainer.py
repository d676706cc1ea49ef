"""Speed and memory of training under Hugging Face's Trainer: its own AdamW and bitsandbytes' 8-bit one, and ours.

    python -m benchmarks.bench_trainer
    python -m benchmarks.bench_trainer --models roberta_base --methods adamw_torch_fused,q_galore --micro_batch 32

Models have the shapes of Qwen2-0.5B (causal) and RoBERTa-base (a classifier of two classes), random bfloat16 weights,
and random tokens; nothing is recomputed in the backward pass. Methods:

- adamw_torch_fused, adamw_bnb_8bit: the Trainer's own of these names;
- q_galore: `qgalore.optimizer_for` with a rank of a quarter of the width, INT8 weights and its defaults, under a
  `QGaLoreCallback`: updates after the backward pass, clipped as the Trainer does (`max_grad_norm=1`);
- q_galore_in_backward: the same with updates inside the backward pass, and no clipping.

A measurement is one `Trainer.train()` in a process of its own, without logs and checkpoints, all else at the Trainer's
defaults. Some updates warm up (compilation of kernels, first subspaces: N low-rank matrices have their first refreshes
in the first max(8, N / 7) updates, 18 for the Qwen2 and 11 for the RoBERTa; after that each has one in 200, and
`refreshes` counts those of the timed updates). `tokens_per_second` is of the timed updates in a row, between two waits
for the device. Peaks are in GB (10^9 bytes): of the timed updates, and with `run_` of the whole training.
`state_bytes` are of the tensors that the optimizer keeps, each storage once; `counted_state_bytes` are what
`qgalore.summary` counts, or two moments of AdamW. `between_updates_gb` is what is allocated after an update.

`device_waits` counts how often one more update waited for the device, with the lines of code in `waits_at`. The Trainer
itself does so for each batch, which it copies to the device, and after each backward pass, to look at the loss; the
device is then idle until the host has launched more. With `--no_waits` it does neither, whatever the method
(`logging_nan_inf_filter=False`, `accelerator_config={"non_blocking": True}`).

Ratios are to adamw_torch_fused of the same model in the same invocation, of memory those of the `run_` peaks. Rows go
to `benchmarks/results/trainer.csv`, a table is printed last. One that fails is a row with its error, and the others go
on. With `--together N` so many processes get ready at once; each has the device to itself while it trains.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import math
import platform
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.compare import Row, add_process_flags, compare, in_own_process, turn, wait_for
from benchmarks.rows import ROOT, commit
from peft_pretraining.errors import UserError
from peft_pretraining.reporting.throughput import GIGABYTE, memory_metrics
from qgalore import optimizer_for, summary
from qgalore.integrations import QGaLoreCallback
from qgalore.optimizer import LowRankAdamW


@dataclass(frozen=True)
class Shape:
    """A model to train: a configuration of transformers and how much of it an update trains."""

    model_type: str
    head: str
    """The class of transformers that makes the model of the configuration."""
    options: Mapping[str, Any]
    tiny: Mapping[str, Any]
    """Options instead for a test on a CPU."""
    micro_batch: int
    """Sequences of an update."""


_TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS: Mapping[str, Shape] = {
    "qwen2_0.5b": Shape(
        model_type="qwen2",
        head="AutoModelForCausalLM",
        options={
            "vocab_size": 151_936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "use_cache": False,
        },
        tiny={**_TINY, "num_key_value_heads": 1, "vocab_size": 256},
        micro_batch=32,
    ),
    "roberta_base": Shape(
        model_type="roberta",
        head="AutoModelForSequenceClassification",
        options={
            "vocab_size": 50_265,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 514,  # 512 tokens; two positions are for padding
            "num_labels": 2,
        },
        tiny={**_TINY, "vocab_size": 256},
        micro_batch=128,
    ),
}
BASELINE = "adamw_torch_fused"
METHODS = (BASELINE, "adamw_bnb_8bit", "q_galore", "q_galore_in_backward")
TOKENS = 10
"""Token ids are drawn from here up: those below are special ones, such as padding."""
COLUMNS = (
    *("model", "method", "tokens_per_second", "speed_ratio", "update_ms", "state_bytes", "counted_state_bytes"),
    *("state_ratio", "run_peak_gb", "memory_ratio", "run_reserved_gb", "reserved_ratio", "peak_gb", "reserved_gb"),
    *("between_updates_gb", "weight_bytes", "low_rank_matrices", "rank", "micro_batch", "length", "warmup_updates"),
    *("updates", "refreshes", "warmup_seconds", "mean_loss", "device_waits", "waits_at", "max_grad_norm", "no_waits"),
    *("compiled", "captured", "tiny", "libraries", "device", "torch", "commit", "note", "error"),
)
RATIOS = {"speed_ratio": "tokens_per_second", "memory_ratio": "run_peak_gb", "reserved_ratio": "run_reserved_gb"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns 0 if all was measured, failures included, and 2 for a UserError."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = build_parser().parse_args(argv)
    try:
        models, methods = check_names(args)
    except UserError as error:
        print(f"bench_trainer: {error}", file=sys.stderr)
        return 2
    if args.one:
        row = measure(args.one, models[0], args)
        print(json.dumps(row))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        turns = ["--turn", args.turn or f"{folder}/turn"]

        def measure_one(method: str, model: str) -> Row:
            return in_own_process(method, model, [*argv, *turns], args.timeout, "bench_trainer", COLUMNS)

        rows = compare(models, methods, Path(args.results), measure_one, args.together, BASELINE, RATIOS)
    print(table(rows))
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Parse the flags."""
    parser = argparse.ArgumentParser(prog="bench_trainer", description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help=f"of {', '.join(MODELS)}, separated by commas")
    parser.add_argument("--methods", default=",".join(METHODS), help=f"of {', '.join(METHODS)}")
    parser.add_argument("--micro_batch", type=int, help="sequences of an update (default: by model)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--warmup", type=int, default=20, help="updates before the timed ones")
    parser.add_argument("--updates", type=int, default=30, help="timed updates")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--tiny", action="store_true", help="two small layers, for a test")
    parser.add_argument("--compile", action="store_true", help="let the Trainer compile the model (torch_compile)")
    parser.add_argument("--capture", action="store_true", help="let q_galore methods update from CUDA graphs")
    parser.add_argument("--no_waits", action="store_true", help="let the Trainer itself not wait for the device")
    parser.add_argument("--results", default=str(ROOT / "benchmarks/results/trainer.csv"), help="CSV to append to")
    parser.add_argument("--note", default="", help="what to remember of the circumstances")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and tokens")
    add_process_flags(parser, timeout=300.0)
    return parser


def check_names(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The models and methods of the flags; raises UserError for values that cannot work."""
    models, methods = args.models.split(","), ([args.one] if args.one else args.methods.split(","))
    for flag, names, known in (("--models", models, MODELS), ("--methods", methods, METHODS)):
        for name in names:
            if name not in known:
                raise UserError(f"{flag} {name}: there is none of this name; there are {', '.join(known)}")
    if args.one and len(models) > 1:
        raise UserError(f"--models {args.models}: with --one give a single model")
    for flag in ("micro_batch", "length", "warmup", "updates", "together"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise UserError(f"--{flag} {value}: it must be at least 1")
    return models, methods


def table(rows: Sequence[Row]) -> str:
    """Format the rows as a Markdown table."""
    head = ["model", "method", "tokens/s", "x AdamW", "ms", "state MB", "of the count", "peak GB", "x AdamW"]
    head += ["reserved GB", "x AdamW", "waits", "warm-up s"]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for row in rows:
        cells = [f"{row['model']} {row['micro_batch']} x {row['length']}", row["method"]]
        if row["error"]:
            cells += [str(row["error"]).replace("|", "/")[:120]]
        else:
            cells += [f"{row['tokens_per_second']:,}", row.get("speed_ratio", ""), row["update_ms"]]
            cells += [round(row["state_bytes"] / 1e6, 1), row["state_ratio"]]  # type: ignore[operator]
            cells += [row["run_peak_gb"], row["memory_ratio"], row["run_reserved_gb"], row["reserved_ratio"]]
            cells += [row["device_waits"], row["warmup_seconds"]]
        lines.append("| " + " | ".join(map(str, cells)) + " |" + " |" * (len(head) - len(cells)))
    return "\n".join(lines)


# ---- one measurement


def measure(method: str, model: str, args: argparse.Namespace) -> Row:
    """Measure one row in this process, without its ratios; an exception becomes its `error`."""
    use_cuda = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda", 0) if use_cuda else torch.device("cpu")
    row: Row = dict.fromkeys(COLUMNS, "") | {
        "model": model,
        "method": method,
        "micro_batch": args.micro_batch or (2 if args.tiny else MODELS[model].micro_batch),
        "length": args.length,
        "warmup_updates": args.warmup,
        "updates": args.updates,
        "max_grad_norm": max_grad_norm(method),
        "no_waits": args.no_waits,
        "compiled": args.compile,
        "captured": args.capture and method.startswith("q_galore"),
        "tiny": args.tiny,
        "torch": torch.__version__,
        "commit": commit(),
        "note": args.note,
    }
    try:
        return row | trained(method, model, int(str(row["micro_batch"])), device, args)
    except Exception as error:  # whatever another project's code raises
        traceback.print_exc()
        return row | {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def trained(method: str, name: str, micro_batch: int, device: torch.device, args: argparse.Namespace) -> Row:
    """Train, and return what was measured."""
    from transformers import Trainer

    torch.manual_seed(args.seed)
    model = build_model(MODELS[name], args).to(device)
    clock = Clock(device, args.warmup, args.updates, args.turn)
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {
            "args": training_arguments(method, folder, micro_batch, device, args),
            "train_dataset": RandomRows(model, MODELS[name], clock.last * micro_batch, args),
            "callbacks": [clock],
        }
        if method.startswith("q_galore"):
            with contextlib.redirect_stdout(sys.stderr):  # it prints what it chose
                optimizer = optimizer_for(model, rank=rank_of(model), weight_bits=8)
            options["optimizers"] = (optimizer, None)
            options["callbacks"].append(QGaLoreCallback(optimizer, method == "q_galore_in_backward", args.capture))
        trainer = Trainer(model, **options)
        with contextlib.ExitStack() as stack, contextlib.redirect_stdout(sys.stderr):
            clock.turns = stack
            result = trainer.train()
    if not math.isfinite(result.training_loss):
        raise RuntimeError(f"the mean loss was {result.training_loss}")
    return clock.row(micro_batch * args.length) | {
        "mean_loss": round(result.training_loss, 4),
        "weight_bytes": unique_bytes([*model.parameters(), *model.buffers()]),
        "rank": rank_of(model) if method.startswith("q_galore") else "",
        "libraries": libraries(method),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        **state_columns(model, clock.optimizer),
    }


def build_model(shape: Shape, args: argparse.Namespace) -> nn.Module:
    """A model with random bfloat16 weights, on the CPU."""
    import transformers

    options = {**shape.options, **(shape.tiny if args.tiny else {})}
    if args.length > options.get("max_position_embeddings", math.inf) - 2:
        raise UserError(f"--length {args.length}: the model has positions for 512 tokens")
    config = transformers.AutoConfig.for_model(shape.model_type, **options)
    model: nn.Module = getattr(transformers, shape.head).from_config(config, dtype=torch.bfloat16)
    return model


def rank_of(model: nn.Module) -> int:
    """A quarter of the width."""
    width: int = model.config.hidden_size  # type: ignore[union-attr, assignment]
    return width // 4


def max_grad_norm(method: str) -> float:
    """What the Trainer clips to: its default, and nothing where updates are made inside the backward pass."""
    return 0.0 if method == "q_galore_in_backward" else 1.0


def training_arguments(
    method: str, folder: str, micro_batch: int, device: torch.device, args: argparse.Namespace
) -> Any:
    """The `TrainingArguments` of a method; ours brings its own optimizer."""
    from transformers import TrainingArguments

    return TrainingArguments(
        folder,
        per_device_train_batch_size=micro_batch,
        max_steps=args.warmup + args.updates + 1,
        optim=BASELINE if method.startswith("q_galore") else method,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        max_grad_norm=max_grad_norm(method),
        logging_nan_inf_filter=not args.no_waits,
        accelerator_config={"non_blocking": args.no_waits},
        torch_compile=args.compile,
        use_cpu=device.type == "cpu",
        seed=args.seed,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


class RandomRows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Sequences of random tokens, with themselves or a random class as labels."""

    def __init__(self, model: nn.Module, shape: Shape, count: int, args: argparse.Namespace) -> None:
        generator = torch.Generator().manual_seed(args.seed)
        config: Any = model.config
        self.tokens = torch.randint(TOKENS, config.vocab_size, (count, args.length), generator=generator)
        classes = torch.randint(config.num_labels, (count,), generator=generator)
        self.labels = self.tokens if shape.head == "AutoModelForCausalLM" else classes

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.labels[index]}


# ---- what is read while the Trainer trains


class Clock:
    """A callback of the Trainer that times updates, reads memory, and lets one process at a time use the device."""

    def __init__(self, device: torch.device, warmup: int, updates: int, lock: str | None) -> None:
        self.turns = contextlib.ExitStack()
        """Holds the turn; closed when the training has ended, also by an exception."""
        self.last = warmup + updates + 1
        """Updates in all: after the timed ones there is one in which waits for the device are counted."""
        self.optimizer: Any = None
        self._device, self._lock = device, lock
        self._timed_from, self._timed_to = warmup, warmup + updates
        self._begin = self._start = self._end = 0.0
        self._before: dict[str, float] = {}
        self._after: dict[str, float] = {}
        self._between = 0.0
        self._refreshes = 0.0
        self._waits: list[str] = []
        self._last_update: contextlib.AbstractContextManager[None] = contextlib.nullcontext()

    def on_train_begin(self, *_: Any, optimizer: Any, **__: Any) -> None:
        """Wait for the turn on the device, and find the optimizer itself inside of accelerate's."""
        self.turns.enter_context(turn(self._lock, alone=True))
        self._begin = time.perf_counter()
        while not isinstance(optimizer, LowRankAdamW) and hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        self.optimizer = optimizer

    def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Before an update; the last one is that in which waits are counted."""
        if state.global_step == self._timed_to:
            self._last_update = waits(self._device, self._waits)
            self._last_update.__enter__()

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """After an update."""
        done = state.global_step
        if done == self.last:
            self._last_update.__exit__(None, None, None)
        elif done in (self._timed_from, self._timed_to):
            wait_for(self._device)
            now, on_gpu = time.perf_counter(), self._device.type == "cuda"
            if done == self._timed_to:
                self._end, self._after = now, memory_metrics(self._device)
                self._between = torch.cuda.memory_allocated(self._device) / GIGABYTE if on_gpu else 0.0
                self._refreshes = refreshes(self.optimizer) - self._refreshes
                return
            self._before, self._refreshes = memory_metrics(self._device), refreshes(self.optimizer)
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(self._device)
            self._start = time.perf_counter()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Leave the device to others, with the memory that is free in this process."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        self.turns.close()

    def row(self, tokens: int) -> Row:
        """What was measured, by column; tokens: of an update."""
        seconds = (self._end - self._start) / (self._timed_to - self._timed_from)
        on_gpu = self._device.type == "cuda"
        row: Row = {
            "tokens_per_second": round(tokens / seconds),
            "update_ms": round(1e3 * seconds, 2),
            "warmup_seconds": round(self._start - self._begin, 2),
            "refreshes": round(self._refreshes),
            "between_updates_gb": round(self._between, 3) if on_gpu else "",
            "device_waits": len(self._waits) if on_gpu else "",
            "waits_at": "; ".join(f"{at} {n}x" for at, n in collections.Counter(self._waits).most_common(8)),
        }
        for column, key in (("peak_gb", "memory/peak_gb"), ("reserved_gb", "memory/reserved_gb")):
            if key in self._after:
                highest = max(self._before[key], self._after[key])
                row |= {column: round(self._after[key], 3), f"run_{column}": round(highest, 3)}
        return row

    def __getattr__(self, name: str) -> Any:
        if name.startswith("on_"):  # any other event
            return lambda *_, **__: None
        raise AttributeError(name)


@contextlib.contextmanager
def waits(device: torch.device, found: list[str]) -> Iterator[None]:
    """Add to `found` the line of Python code, as file:line, of each wait for a GPU until the end of the context."""
    if device.type != "cuda":
        yield
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    told = [each for each in caught if "called a synchronizing" in str(each.message)]
    found += [f"{Path(each.filename).name}:{each.lineno}" for each in told]


def refreshes(optimizer: Any) -> float:
    """The refreshes of subspaces so far."""
    metrics = optimizer.subspace_metrics() if isinstance(optimizer, LowRankAdamW) else {}
    return float(metrics.get("subspace/refreshes", 0.0))


def state_columns(model: nn.Module, optimizer: Any) -> Row:
    """Bytes of the states that an optimizer keeps, those that were counted on, and the matrices that are low-rank."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    row: Row = {"state_bytes": unique_bytes(tensors_in(list(optimizer.state.values())))}
    if isinstance(optimizer, LowRankAdamW):
        counted = summary(model, optimizer)
        row |= {"counted_state_bytes": counted.state_bytes, "low_rank_matrices": counted.low_rank_matrices}
    elif isinstance(optimizer, torch.optim.AdamW):
        row |= {"counted_state_bytes": sum(2 * param.nbytes for param in params)}
    if "counted_state_bytes" in row:
        row["state_ratio"] = round(row["state_bytes"] / row["counted_state_bytes"], 4)  # type: ignore[operator]
    return row


def tensors_in(found: Any) -> Iterator[Tensor]:
    """All tensors in nested dictionaries, lists and tuples."""
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, Mapping):
        yield from tensors_in(list(found.values()))
    elif isinstance(found, list | tuple):
        for each in found:
            yield from tensors_in(each)


def unique_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of tensors, each counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def libraries(method: str) -> str:
    """The packages that take part, with their versions."""
    names = ["transformers", "accelerate", *(["bitsandbytes"] if "bnb" in method else [])]
    found = []
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


if __name__ == "__main__":
    sys.exit(main())
