"""Write the token ids of a data set to files, so that repeated runs and benchmarks do not tokenize again.

    qgalore tokenize --dataset c4 --output_dir tokens/ --max_tokens 1B
    qgalore pretrain --dataset tokens/ ...

Writes <output_dir>/train.bin and validation.bin: little-endian uint16 (uint32 for more than 65,536 ids), the documents
in the order of the files, each with bos and eos. Beside each file is a .json with dtype, data set (on the hub: its
commit), tokenizer, vocab_size, the ids that were added to documents (bos_token_id, eos_token_id; null: none),
documents, tokens. If the data set has no validation split, documents are held out of the training split. A tokenizer
that is trained for it (--tokenizer train:N) is saved as <output_dir>/tokenizer/tokenizer.json.
"""

import argparse
import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from peft_pretraining.commands.corrected_flags import CommandParser
from peft_pretraining.config.flag_groups import DataArgs
from peft_pretraining.config.flags import add_flag, convert, parse_count, parse_path, read_specs
from peft_pretraining.data.eval_set import read_documents
from peft_pretraining.data.held_out import open_split
from peft_pretraining.data.order import DamageCount
from peft_pretraining.data.sources.documents import (
    Damage,
    Source,
    SourceWrapper,
    files_of,
    revision_of,
)
from peft_pretraining.data.sources.kind import TextKind
from peft_pretraining.data.sources.mapped_tokens import TokenFiles, TokenMixture
from peft_pretraining.data.sources.registry import find_kind, open_dataset, text_kinds_in_words
from peft_pretraining.data.tokenizer import Added, Tokenizer, keep_trained, load_tokenizer
from peft_pretraining.data.waiting import progress
from peft_pretraining.errors import UserError

DOCUMENTS_PER_BATCH = 512
DATA_FLAGS = (
    "dataset", "tokenizer", "dataset_config", "dataset_revision", "train_split", "validation_split", "text_column",
    "text_unit", "add_bos", "add_eos", "damaged_limit",
)  # fmt: skip
"""The flags of run_pretrain.py for the data and its tokenizer."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        tokenize(*parse_args(argv))
    except (UserError, OSError) as error:
        print(f"qgalore tokenize: {error}", file=sys.stderr)
        return 2
    return 0


def parse_args(argv: Sequence[str] | None) -> tuple[DataArgs, argparse.Namespace]:
    """Parse the flags of the data, as run_pretrain.py does, and those of the script. Raises UserError."""
    parser = CommandParser(
        prog="qgalore tokenize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    specs = [spec for spec in read_specs(DataArgs) if spec.name in DATA_FLAGS]
    for spec in specs:
        own = {"required": True, "help": text_kinds_in_words()} if spec.name == "dataset" else {}
        add_flag(parser, spec, default=argparse.SUPPRESS, **own)
    parser.add_argument(
        "--output_dir", required=True, type=parse_path, help="folder for the token files; made if missing"
    )
    parser.add_argument(
        "--splits", nargs="+", metavar="SPLIT", help="such as train validation (default: all there are)"
    )
    parser.add_argument("--max_tokens", default="0", help="tokens of each split, such as 100M or 1.5B (default 0: all)")
    args = parser.parse_args(argv)
    try:
        given = {spec: vars(args).pop(spec.name) for spec in specs if hasattr(args, spec.name)}
        values = {spec.name: value if spec.is_switch else convert(spec, value) for spec, value in given.items()}
    except ValueError as error:
        raise UserError(f"{error}.") from None
    try:
        args.max_tokens = parse_count(args.max_tokens)
    except ValueError as error:
        raise UserError(f"--max_tokens is {args.max_tokens!r}, it must be {error}.") from None
    return DataArgs(**values), args


def tokenize(data: DataArgs, args: argparse.Namespace) -> None:
    """Write the splits of the flags. Raises UserError."""
    kind, options = find_kind(data.dataset), data.source_options
    if not isinstance(kind, TextKind):
        raise UserError(f"--dataset {data.dataset}: it holds token ids already.")
    for split in args.splits or kind.splits:
        if split not in kind.splits:
            raise UserError(f"--splits {split}: --dataset {data.dataset} has {' and '.join(kind.splits)}")
    # All splits are of one commit, and so are the documents of the tokenizer.
    commit = revision_of(open_dataset(data.dataset, "train", options)) if kind.needs_network else ""
    options = replace(options, revision=commit or options.revision)
    added = Added(data.add_bos, data.add_eos)
    tokenizer = load_tokenizer(data.tokenizer, data.dataset, added=added, options=options)
    print(f"tokenizer {tokenizer.describe()}")
    if lost := kind.lost_as_ids(data.dataset):
        print(f"warning: {lost}")
    keep_trained(tokenizer, args.output_dir)
    origin = {"dataset": data.dataset} | ({"dataset_revision": commit} if commit else {})
    for split in args.splits or kind.splits:
        source = open_split(data.dataset, split, options)
        assert not isinstance(source, TokenFiles | TokenMixture)
        read = Counted(source)
        texts = read_documents(read, DamageCount(data.damaged_limit, "begin again"))
        write_split(texts, read, tokenizer, args.output_dir / f"{split}.bin", args.max_tokens, origin)


@dataclass
class Counted(SourceWrapper):
    """A source that counts how much of it was read."""

    source: Source
    shards_read: int = 0
    text_chars: int = 0

    def read(self, shard: int, slices: int, part: int, start: int) -> Iterator[str | Damage]:
        """See `Source.read`."""
        for item in self.source.read(shard, slices, part, start):
            self.text_chars += len(item) if isinstance(item, str) else 0
            yield item
        self.shards_read += 1

    @property
    def fraction(self) -> float:
        """The share that was read: by the bytes of whole files, or within the first by its text; else by shards."""
        if not (whole := sum(self._sizes)):
            return self.shards_read / self.shards
        return sum(self._sizes[: self.shards_read]) / whole if self.shards_read else min(0.99, self.text_chars / whole)

    @cached_property
    def _sizes(self) -> tuple[int, ...]:
        files = files_of(self.source)
        return files.sizes if files else ()


class Batch(NamedTuple):
    """A batch of documents as ids."""

    documents: list[list[int]]
    fraction: float
    """The share of the source that had been read."""


def encode_ahead(texts: Iterator[str], tokenizer: Tokenizer, read: Counted) -> Iterator[Batch]:
    """Yield the documents of `read` in order, encoded by threads while others are read.

    The tokenizers library spreads a batch over all cores itself, and releases the GIL, as sentencepiece does.
    """
    threads = 1 if tokenizer.encoder == "tokenizers" else os.cpu_count() or 1
    pending: deque[tuple[Future[list[list[int]]], float]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        while batch := list(islice(texts, DOCUMENTS_PER_BATCH)):
            pending.append((pool.submit(tokenizer.encode_documents, batch), read.fraction))
            if len(pending) > threads:
                future, fraction = pending.popleft()
                yield Batch(future.result(), fraction)
        for future, fraction in pending:
            yield Batch(future.result(), fraction)


def write_split(
    texts: Iterator[str], read: Counted, tokenizer: Tokenizer, target: Path, max_tokens: int, origin: dict[str, Any]
) -> None:
    """Write `target` and its sidecar under temporary names and rename them when finished; on failure none is left.

    `texts` are the documents of `read`, and `origin` goes into the sidecar.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    try:
        _write_split(texts, read, tokenizer, target, partial, max_tokens, origin)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _write_split(
    texts: Iterator[str],
    read: Counted,
    tokenizer: Tokenizer,
    target: Path,
    partial: Path,
    max_tokens: int,
    origin: dict[str, Any],
) -> None:
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    documents, tokens, fraction, expected = 0, 0, 0.0, max_tokens or None
    start = time.perf_counter()
    with (
        partial.open("wb") as file,
        progress(f"{target.stem} of {target.parent}", "tokens", max_tokens or None) as done,
    ):
        for batch in encode_ahead(texts, tokenizer, read):
            before = tokens
            for ids in batch.documents:
                file.write(np.array(ids, dtype).tobytes())
                documents += 1
                tokens += len(ids)
                if max_tokens and tokens >= max_tokens:
                    break
            if batch.fraction > fraction:  # estimated from the tokens per byte of the files so far
                fraction, whole = batch.fraction, round(tokens / batch.fraction)
                expected = min(whole, max_tokens or whole)
            done(tokens - before, expected)
            if max_tokens and tokens >= max_tokens:
                break
    if not tokens:
        raise UserError(f"the {target.stem} split has no documents")
    settings = {
        "dtype": "uint16" if dtype.itemsize == 2 else "uint32",
        **origin,
        "tokenizer": tokenizer.name,
        "tokenizer_fingerprint": tokenizer.fingerprint(),
        "vocab_size": tokenizer.vocab_size,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "documents": documents,
        "tokens": tokens,
    }
    # The sidecar first: ids of unknown type would be refused, a sidecar without ids is merely unused.
    target.with_name(target.name + ".json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    partial.replace(target)
    rate = tokens / (time.perf_counter() - start)
    print(f"{target}: {documents:,} documents, {tokens:,} tokens, {rate:,.0f} tokens/s")
