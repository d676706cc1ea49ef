"""Fine-tuning by the five methods of Q-GaLore's tables, without the hub: quality, and peaks of memory.

    python -m benchmarks.bench_finetune --part quality --tokens DIR --pretrained runs/bench_roberta
    python -m benchmarks.bench_finetune --part peaks --models roberta_base,llama_7b

quality: a model of RoBERTa's shape (8 layers, width 512) is pretrained as a masked language model on the token ids of
DIR, for some minutes, and kept in the folder of `--pretrained`. Then each method fine-tunes it to say whether text B
follows text A: in half of the pairs B comes from elsewhere, in half of those from the same document. Train pairs are of
DIR's train tokens; of the validation tokens the first quarter makes the pairs that choose a method's rate, the same
rates for each, with the first of the seeds; the rest makes the test pairs, and all seeds run at the chosen rate. A run
that is in the CSV already is not repeated, so the command can be stopped and started again.

peaks: some updates of a model of random bfloat16 weights, micro-batch 1 of 512 tokens, a process for each: RoBERTa-base
as in `scripts/finetune/glue.sh`, LLaMA-7B as in `mmlu.sh` (embeddings and head frozen, blocks recomputed). full at 7B
is counted and not run, as are all with --updates 0.

DIR holds train and validation token ids, `train*.uint16` and `validation*.uint16`, or the same with .xz: little-endian,
a document ends with the id of `--eos`. Rows go to `benchmarks/results/finetune.csv`; one that fails, such as for a
package that is missing, is a row with its error, and the others go on. Of several processes, each with its `--methods`
and a CSV of its own, several can use one GPU at a time: only their seconds suffer. Peaks are in GB (10^9 bytes); bytes
by count are of weights and optimizer states.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import json
import lzma
import math
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.compare import Row, in_own_process
from benchmarks.rows import ROOT, append_row, commit
from peft_pretraining.errors import UserError
from peft_pretraining.finetune.flags import METHODS, MethodArgs, TuningArgs
from peft_pretraining.finetune.glue_metrics import accuracy
from peft_pretraining.finetune.methods import Trainee, make_trainee
from peft_pretraining.finetune.mmlu import IGNORED, MmluMethodArgs
from peft_pretraining.finetune.training import TaskData, device_of, fine_tune, versions
from peft_pretraining.reporting.throughput import GIGABYTE

PARTS = ("quality", "peaks")
COLUMNS = (
    *("part", "model", "method", "seed", "lr", "dev_accuracy", "test_accuracy", "peak_gb", "reserved_gb", "counted_gb"),
    *("weight_bytes", "state_bytes", "trained_values", "rank", "galore_scale", "update_proj_gap", "svd_method"),
    *("embeddings", "dtype", "activation_checkpointing", "updates", "examples", "total_batch_size", "micro_batch"),
    *("length", "seconds", "pretrain_updates", "pretrain_loss", "tiny", "libraries", "device", "torch", "commit"),
    *("note", "error"),
)
OF_A_RUN = (
    *("part", "model", "method", "seed", "lr", "updates", "examples", "rank", "svd_method", "embeddings", "dtype"),
    *("pretrain_updates", "tiny"),
)
"""Columns that tell whether a run is in the CSV."""
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8}
BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
SEVEN = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
PEAKS: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "roberta_base": ("roberta", "AutoModelForSequenceClassification", {**BASE, "vocab_size": 50_265}),
    "llama_7b": ("llama", "AutoModelForCausalLM", {**SEVEN, "vocab_size": 32_000, "use_cache": False}),
}
"""The type, the head and the configuration of the models whose peaks are measured."""
HALF = 62
"""Tokens of each of the two texts: with four special tokens a pair has 128."""
MASKED = 0.15


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns 0 if all was measured, failures included, and 2 for a UserError."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = build_parser().parse_args(argv)
    try:
        check(args)
        if args.one:
            print(json.dumps(measure_peak(args.one, args.models, args)))
            return 0
        rows = quality(args) if args.part == "quality" else peaks(args, argv)
    except UserError as error:
        print(f"bench_finetune: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Parse the flags."""
    parser = argparse.ArgumentParser(prog="bench_finetune", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", choices=PARTS, default="quality", help="what to measure")
    parser.add_argument("--methods", default=",".join(METHODS), help=f"of {', '.join(METHODS)}, separated by commas")
    parser.add_argument("--models", default=",".join(PEAKS), help=f"peaks: of {', '.join(PEAKS)}")
    parser.add_argument("--tokens", help="quality: folder of the token ids")
    parser.add_argument("--vocab_size", type=int, default=32_000, help="quality: ids in those files")
    parser.add_argument("--eos", type=int, default=1, help="quality: the id that ends a document")
    parser.add_argument("--pretrained", help="quality: folder of the pretrained model, which is made where it is empty")
    parser.add_argument("--pretrain_updates", type=int, default=6000, help="quality: of 256 rows of 128 tokens")
    parser.add_argument("--examples", type=int, default=12_800, help="quality: pairs to train on")
    parser.add_argument("--evaluated", type=int, default=12_000, help="quality: test pairs, at most; a third for rates")
    parser.add_argument("--epochs", type=float, default=3.0, help="quality: passes over them")
    parser.add_argument("--batch", type=int, default=32, help="quality: pairs of an update")
    parser.add_argument("--rates", default="2e-5,6e-5,2e-4,6e-4", help="quality: learning rates, for each method alike")
    parser.add_argument("--seeds", default="0,1,2", help="quality: the first chooses the rate")
    parser.add_argument("--minutes", type=float, default=0.0, help="quality: begin no run after so many (0: no limit)")
    parser.add_argument(
        "--updates", type=int, default=40, help="peaks: 32 refresh all subspaces of 7B; 0: count bytes alone"
    )
    parser.add_argument("--length", type=int, default=512, help="peaks: tokens of the sequence")
    parser.add_argument("--rank", type=int, default=8, help="of adapters and subspaces")
    parser.add_argument("--svd_method", choices=("full", "randomized"), help="default: that of glue.sh and mmlu.sh")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: float32 in quality, bfloat16 in peaks"
    )
    parser.add_argument("--embeddings", choices=("trained", "frozen"), help="default: that of glue.sh and mmlu.sh")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--tiny", action="store_true", help="two small layers, for a test")
    parser.add_argument("--timeout", type=float, default=540.0, help="peaks: seconds that a measurement may take")
    parser.add_argument("--results", default=str(ROOT / "benchmarks/results/finetune.csv"), help="CSV to append to")
    parser.add_argument("--note", default="", help="what to remember of the circumstances")
    parser.add_argument("--one", metavar="METHOD", help="peaks: measure it in this process, and print its row as JSON")
    return parser


def check(args: argparse.Namespace) -> None:
    """Raise UserError for values that cannot work."""
    lists = [("--methods", [args.one] if args.one else args.methods.split(","), METHODS)]
    lists.append(("--models", args.models.split(","), PEAKS))
    for flag, names, known in lists:
        for name in names:
            if name not in known:
                raise UserError(f"{flag} {name}: there is none of this name; there are {', '.join(known)}")
    for flag, kind in (("rates", float), ("seeds", int)):
        try:
            [kind(text) for text in getattr(args, flag).split(",")]
        except ValueError:
            raise UserError(f"--{flag} {getattr(args, flag)}: give numbers, separated by commas") from None
    for flag in ("pretrain_updates", "examples", "evaluated", "batch", "updates", "rank"):
        least = 0 if flag == "updates" else 1
        if getattr(args, flag) < least:
            raise UserError(f"--{flag} {getattr(args, flag)}: it must be at least {least}")
    if args.length < 8 or args.length > 512:
        raise UserError(f"--length {args.length}: it must be 8 to 512")
    if args.part == "quality" and not (args.tokens and args.pretrained):
        raise UserError("--part quality needs --tokens DIR, the token ids, and --pretrained DIR for the model")
    device_of(args.device)


# ---- the text, and pairs of it


def read_ids(folder: Path, split: str) -> NDArray[np.uint16]:
    """The token ids of a split, in one array. Raises UserError."""
    files = [path for end in (".uint16", ".uint16.xz") for path in sorted(folder.glob(f"{split}*{end}"))]
    if not files:
        raise UserError(f"--tokens {folder}: there is no {split}*.uint16, nor one that ends in .uint16.xz")
    path = files[0]
    data = path.read_bytes()
    return np.frombuffer(lzma.decompress(data) if path.suffix == ".xz" else data, "<u2")


class Texts:
    """The documents of a split, each cut into pieces of `HALF` tokens; the rest of a document is left out."""

    def __init__(self, ids: NDArray[np.uint16], eos: int) -> None:
        """ids: (tokens,). Raises UserError where no document has two pieces."""
        ends = np.flatnonzero(ids == eos)
        starts = np.concatenate([[0], ends + 1])
        lengths = np.concatenate([ends, [len(ids)]]) - starts
        counts = lengths // HALF
        self.document = np.repeat(np.arange(len(counts)), counts)  # (pieces,)
        within = np.arange(len(self.document)) - np.repeat(np.cumsum(counts) - counts, counts)
        first = np.repeat(starts, counts) + within * HALF
        self.pieces = ids[first[:, None] + np.arange(HALF)]  # (pieces, HALF)
        self.followed = np.flatnonzero(self.document[:-1] == self.document[1:])
        """Pieces that have a next one."""
        self.begin = np.cumsum(counts) - counts
        self.counts = counts
        if not len(self.followed):
            raise UserError(f"--tokens: no document has {2 * HALF} tokens; are its ids separated by --eos {eos}?")

    def split(self, share: float) -> tuple[NDArray[Any], NDArray[Any]]:
        """The pieces with a next one, those of the first documents and those of the rest."""
        edge = self.document[self.followed[int(share * len(self.followed))]]
        return self.followed[self.document[self.followed] < edge], self.followed[self.document[self.followed] >= edge]

    def pairs(self, first: NDArray[Any], count: int, seed: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """At most `count` pairs of pieces (pairs, 2, HALF), and whether the second follows the first (pairs,).

        first: pieces to begin with, of which each is taken once.
        """
        generator = np.random.default_rng(seed)
        first = generator.permutation(first)[:count]
        follows = generator.random(len(first)) < 0.5
        near = generator.random(len(first)) < 0.5
        inside = self.begin[self.document[first]] + generator.integers(self.counts[self.document[first]])
        # Of a document of two pieces no other one is near.
        usable = (inside != first + 1) & (inside != first)
        other = np.where(near & usable, inside, generator.choice(len(self.pieces), len(first)))
        other = np.where(other == first + 1, (first + 3) % len(self.pieces), other)
        second = np.where(follows, first + 1, other)
        return np.stack([self.pieces[first], self.pieces[second]], axis=1), follows.astype(np.int64)


class Vocabulary:
    """Ids of the text, and after them those of RoBERTa's special tokens."""

    def __init__(self, text: int) -> None:
        self.text = text
        self.begin, self.pad, self.end, self.mask = range(text, text + 4)
        self.size = -(-(text + 4) // 64) * 64

    def rows(self, pairs: NDArray[Any]) -> Tensor:
        """Pairs (pairs, 2, HALF) as RoBERTa has them, `<s> A </s></s> B </s>`: (pairs, 2 * HALF + 4)."""
        edge = [np.full((len(pairs), 1), id_) for id_ in (self.begin, self.end)]
        rows = np.concatenate([edge[0], pairs[:, 0], edge[1], edge[1], pairs[:, 1], edge[1]], axis=1)
        return torch.from_numpy(rows.astype(np.int64))


class Examples(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows of token ids with their labels."""

    def __init__(self, ids: Tensor, labels: Tensor) -> None:
        self.ids, self.labels = ids, labels

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


# ---- pretraining


def pretrain(folder: Path, texts: Texts, vocabulary: Vocabulary, args: argparse.Namespace) -> dict[str, Any]:
    """Pretrain a masked language model into a folder, or take the one that is there; what is known of it."""
    import transformers

    told = folder / "pretraining.json"
    if told.is_file():
        found: dict[str, Any] = json.loads(told.read_text(encoding="utf-8"))
        return found
    device = device_of(args.device)
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=vocabulary.size,
        bos_token_id=vocabulary.begin,
        pad_token_id=vocabulary.pad,
        eos_token_id=vocabulary.end,
        max_position_embeddings=vocabulary.pad + 1 + 2 * HALF + 4,  # RoBERTa counts positions from the padding id up
        type_vocab_size=1,
        **(TINY if args.tiny else SMALL),
    )
    model = transformers.RobertaForMaskedLM(config).to(device)
    batch = 8 if args.tiny else 256
    start = time.perf_counter()
    loss = math.nan
    for number, loss in enumerate(pretraining_losses(model, texts, vocabulary, batch, args.pretrain_updates), 1):
        if number % 200 == 0:
            print(f"pretraining: update {number}, loss {float(loss):.3f}", file=sys.stderr, flush=True)
    seconds = time.perf_counter() - start
    model.save_pretrained(folder)
    found = {"updates": args.pretrain_updates, "loss": round(float(loss), 4), "seconds": round(seconds, 1)}
    told.write_text(json.dumps(found | {"commit": commit()}) + "\n", encoding="utf-8")
    return found


def pretraining_losses(
    model: Any, texts: Texts, vocabulary: Vocabulary, batch: int, updates: int, lr: float = 5e-4
) -> Iterator[Tensor]:
    """Train a masked language model on pairs that follow each other; the loss of each update, as BERT has it.

    Of the tokens 15 % are predicted: 80 % of those masked, 10 % replaced by others, 10 % left.
    """
    device = model.device
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    warmup = max(1, updates // 16)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda update: min((update + 1) / warmup, (updates - update) / max(1, updates - warmup))
    )
    generator = torch.Generator(device).manual_seed(0)
    order = np.random.default_rng(0)
    model.train()
    for _ in range(updates):
        first = order.choice(texts.followed, batch)
        ids = vocabulary.rows(np.stack([texts.pieces[first], texts.pieces[first + 1]], axis=1)).to(device)
        draw = torch.rand(ids.shape, generator=generator, device=device)
        predicted = (draw < MASKED) & (ids < vocabulary.text)
        other = torch.randint(vocabulary.text, ids.shape, generator=generator, device=device)
        seen = torch.where(predicted & (draw < 0.8 * MASKED), vocabulary.mask, ids)
        seen = torch.where(predicted & (draw >= 0.9 * MASKED), other, seen)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            states = model.roberta(seen).last_hidden_state[predicted]  # (predicted, width)
            loss = nn.functional.cross_entropy(model.lm_head(states).float(), ids[predicted])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield loss.detach()


# ---- quality


def quality(args: argparse.Namespace) -> list[Row]:
    """Pretrain where that is not done, fine-tune by each method and rate, and the best rate with all seeds."""
    start, folder = time.monotonic(), Path(args.pretrained)
    vocabulary = Vocabulary(args.vocab_size)
    train, validation = (Texts(read_ids(Path(args.tokens), split), args.eos) for split in ("train", "validation"))
    if int(max(train.pieces.max(), validation.pieces.max())) >= args.vocab_size:
        raise UserError(f"--vocab_size {args.vocab_size}: the token ids go up to {train.pieces.max()}; give more")
    pretraining = pretrain(folder, train, vocabulary, args)
    dev, test = validation.split(0.25)

    def examples(texts: Texts, first: NDArray[Any], count: int) -> Examples:
        pairs, labels = texts.pairs(first, count, seed=1)
        return Examples(vocabulary.rows(pairs), torch.from_numpy(labels))

    sets = {"dev": examples(validation, dev, args.evaluated // 3), "test": examples(validation, test, args.evaluated)}
    data = task_data(examples(train, train.followed, args.examples), sets)
    seeds, rates = [int(text) for text in args.seeds.split(",")], [float(text) for text in args.rates.split(",")]
    rows: list[Row] = []

    def run(method: str, lr: float, seed: int) -> Row:
        row = empty_row(method, args) | {"part": "quality", "model": "roberta_tiny" if args.tiny else "roberta_8x512"}
        row |= {"seed": seed, "lr": lr, "updates": math.ceil(args.epochs * math.ceil(len(data.train) / args.batch))}
        row |= {"pretrain_updates": pretraining["updates"], "pretrain_loss": pretraining["loss"]}
        row |= {"examples": len(data.train), **columns_of(settings(MethodArgs(method=method), args))}
        if (former := already_there(Path(args.results), row)) is None:
            if args.minutes and time.monotonic() - start > 60 * args.minutes:
                raise TimeoutError
            row = measured(row, lambda: tune(row, data, folder, args))
            append_row(Path(args.results), row)
            print(json.dumps({name: value for name, value in row.items() if value != ""}), flush=True)
        rows.append(row if former is None else former)
        return rows[-1]

    with contextlib.suppress(TimeoutError):
        for method in args.methods.split(","):
            tried = [run(method, lr, seeds[0]) for lr in rates]
            good = [row for row in tried if not row["error"]]
            if good:
                best = max(good, key=lambda row: float(str(row["dev_accuracy"])))
                for seed in seeds[1:]:
                    run(method, float(str(best["lr"])), seed)
    return rows


def task_data(train: Examples, evaluated: Mapping[str, Examples]) -> TaskData:
    """Examples as a Trainer takes them."""
    from transformers import default_data_collator

    return TaskData(train, evaluated, default_data_collator, accuracy, "accuracy")


def tune(row: Row, data: TaskData, pretrained: Path, args: argparse.Namespace) -> Row:
    """One fine-tuning of the pretrained model, as a row."""
    import transformers

    seed, lr = int(str(row["seed"])), float(str(row["lr"]))
    method = settings(MethodArgs(method=str(row["method"])), args)
    transformers.set_seed(seed)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(pretrained, num_labels=2)
    model = model.to(getattr(torch, method.dtype))
    trainee = make_trainee(model, method, lr, seed, device_of(args.device))
    with tempfile.TemporaryDirectory() as folder:
        tuning = TuningArgs(
            lr=lr, epochs=args.epochs, total_batch_size=args.batch, seed=seed, device=args.device, save_dir=folder
        )
        found = fine_tune(trainee, data, method, tuning, saves=False)
    scores = {"dev_accuracy": found["scores"]["dev"], "test_accuracy": found["scores"]["test"]}
    sizes = {"total_batch_size": args.batch, "micro_batch": args.batch, "length": data.train.ids.shape[1]}
    return {**columns_of_run(found), **scores, **sizes}


def already_there(results: Path, row: Row) -> Row | None:
    """The row of the same run in the CSV, one without an error; None where there is none."""
    if not results.is_file():
        return None
    with results.open(newline="", encoding="utf-8") as file:
        for former in csv.DictReader(file):
            if not former["error"] and all(former[name] == str(row[name]) for name in OF_A_RUN):
                return dict(former)
    return None


# ---- peaks


def peaks(args: argparse.Namespace, argv: Sequence[str]) -> list[Row]:
    """Measure each method and model in a process of its own."""
    rows = []
    for model in args.models.split(","):
        for method in args.methods.split(","):
            row = in_own_process(method, model, argv, args.timeout, "bench_finetune", COLUMNS) | {"part": "peaks"}
            append_row(Path(args.results), row)
            print(json.dumps({name: value for name, value in row.items() if value != ""}), flush=True)
            rows.append(row)
    return rows


def measure_peak(method: str, model: str, args: argparse.Namespace) -> Row:
    """The row of some updates of a model of random weights, in this process."""
    row = empty_row(method, args) | {"part": "peaks", "model": model, "seed": 0, "lr": 1e-5, "updates": args.updates}
    return measured(row, lambda: peak_of(method, model, args))


def peak_of(method: str, name: str, args: argparse.Namespace) -> Row:
    """Some updates of a model of random weights; full of a 7B model is counted alone."""
    import transformers

    language = name.startswith("llama")
    group = MmluMethodArgs(method=method) if language else MethodArgs(method=method)
    chosen = settings(replace(group, dtype="bfloat16"), args)
    kind, head, shape = PEAKS[name]
    shape = {**shape, **(TINY | {"vocab_size": 256} if args.tiny else {})}
    shape |= {"max_position_embeddings": args.length + (0 if language else 2)}
    config = transformers.AutoConfig.for_model(kind, **shape)
    counted = args.updates == 0 or (method == "full" and language)
    device, dtype = device_of(args.device), getattr(torch, chosen.dtype)
    torch.manual_seed(0)
    with torch.device("meta" if counted and method == "full" else device):
        model = getattr(transformers, head).from_config(config, dtype=dtype)
    with contextlib.redirect_stdout(sys.stderr):
        trainee = make_trainee(model, chosen, 1e-5, 0, model.device)
        if counted:
            return {**columns_of(chosen), **counts(trainee), "updates": 0, "length": args.length}
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(10, config.vocab_size, (args.updates, args.length), generator=generator)
        labels = torch.cat([torch.full_like(ids[:, 1:], IGNORED), ids[:, -1:]], dim=1) if language else ids[:, 0] % 2
        examples = Examples(ids, labels)
        data = task_data(examples, {"dev": Examples(ids[:1], labels[:1])})
        data = replace(data, score=lambda *_: 0.0, predict=lambda logits, labels: labels)
        with tempfile.TemporaryDirectory() as folder:
            tuning = TuningArgs(
                lr=1e-5, epochs=1, total_batch_size=1, device=args.device, max_length=args.length, save_dir=folder
            )
            found = fine_tune(trainee, data, chosen, tuning, saves=False)
    sizes = {"examples": args.updates, "total_batch_size": 1, "micro_batch": 1, "length": args.length}
    return {**columns_of(chosen), **columns_of_run(found), **sizes}


# ---- rows


def settings(group: MethodArgs, args: argparse.Namespace) -> MethodArgs:
    """The flags of a method, with those of this program that are given."""
    given = {name: getattr(args, name) for name in ("svd_method", "dtype", "embeddings") if getattr(args, name)}
    return replace(group, rank=args.rank, **given)


def empty_row(method: str, args: argparse.Namespace) -> Row:
    """What a row has before anything is measured."""
    given = {"method": method, "tiny": args.tiny, "torch": torch.__version__, "commit": commit(), "note": args.note}
    return dict.fromkeys(COLUMNS, "") | given


def measured(row: Row, measure: Any) -> Row:
    """A row with what was measured; an exception becomes its `error`."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        return row | measure()
    except Exception as error:  # whatever another project's code raises
        traceback.print_exc()
        return row | {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def columns_of(method: MethodArgs) -> Row:
    """The columns of a method's flags."""
    names = ("rank", "galore_scale", "update_proj_gap", "svd_method", "embeddings", "dtype", "activation_checkpointing")
    return {name: getattr(method, name) for name in names}


def counts(trainee: Trainee) -> Row:
    """Bytes by count."""
    weights, states = trainee.weight_bytes(), trainee.state_bytes()
    found: Row = {"weight_bytes": weights, "state_bytes": states, "trained_values": trainee.trained_values()}
    return found | {"counted_gb": round((weights + states) / GIGABYTE, 3)}


def columns_of_run(found: Mapping[str, Any]) -> Row:
    """The columns of what `fine_tune` gives."""
    names = ("peak_gb", "reserved_gb", "counted_gb", "weight_bytes", "state_bytes", "trained_values", "updates")
    libraries = ", ".join(f"{name} {number}" for name, number in versions().items() if name != "torch")
    return {name: found[name] for name in (*names, "seconds", "device")} | {"libraries": libraries}


def table(rows: Sequence[Row]) -> str:
    """Format the rows as a Markdown table: of quality the test accuracy at the best rate, over the seeds."""
    head = ["model", "method", "rate", "dev", "test (seeds)", "- full", "GB by count", "peak GB", "seconds"]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    means: dict[str, float] = {}
    for model, method in dict.fromkeys((str(row["model"]), str(row["method"])) for row in rows):
        own = [row for row in rows if (row["model"], row["method"]) == (model, method)]
        good = [row for row in own if not row["error"]]
        if not good:
            lines.append(f"| {model} | {method} | {str(own[0]['error']).replace('|', '/')[:120]} |" + " |" * 6)
            continue
        best = max(good, key=lambda row: float(str(row["dev_accuracy"] or 0)))
        seeds = {str(row["seed"]): float(str(row["test_accuracy"])) for row in good if row["lr"] == best["lr"] != ""
                 and row["test_accuracy"] != ""}  # fmt: skip
        cells = [model, method, best["lr"], best["dev_accuracy"], "", "", best["counted_gb"], best["peak_gb"]]
        if seeds:
            means[method] = sum(seeds.values()) / len(seeds)
            cells[4] = f"{means[method]:.2f} ({', '.join(f'{value:.2f}' for value in seeds.values())})"
            cells[5] = f"{means[method] - means['full']:+.2f}" if "full" in means else ""
        lines.append("| " + " | ".join(map(str, [*cells, best["seconds"]])) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
