"""The validation set: the same rows in the same batches for any number of ranks, seeds and workers.

Documents are read in the order of the files, unshuffled, as rows in the training format; rows are cut into batches of
`eval_batch_size`, and batch k belongs to rank k mod W. The set ends with the row in which `eval_tokens` target tokens
(those that perplexity divides by) are reached, or where the data ends; the last batch may be smaller, and the last row
of packed data shorter. The first pass tokenizes, later ones reuse this rank's rows in memory (20 to 40 MB for 10 M
tokens).

In a mixture each source contributes its share of `eval_tokens`, or all it has, so that perplexity weighs the sources as
training does; without a limit each contributes all it has.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peft_pretraining.data.batch import MicroBatch, make_micro_batch
from peft_pretraining.data.held_out import open_split
from peft_pretraining.data.order import DamageCount, RowFormat
from peft_pretraining.data.sources.documents import Damage, Share, Source, is_text
from peft_pretraining.data.sources.kind import DEFAULT_OPTIONS, SourceOptions
from peft_pretraining.data.sources.mapped_tokens import TokenFiles, TokenMixture
from peft_pretraining.data.sources.mixture import Mixture
from peft_pretraining.data.tokenizer import Tokenizer
from peft_pretraining.errors import UserError

# The tokenizer distributes a batch of texts over all cores.
_DOCUMENTS_PER_ENCODING = 256

Row = NDArray[Any]  # (length,) ids of any integer type


class TextCount:
    """Counts the documents in the rows of a validation set, and the bytes of their text as UTF-8.

    Of a document that a row cuts off, the text counts up to where its ids end: by its characters but white space, which
    tokenizers change. Of one that goes on in the next row, as many bytes count as it has ids in the row.
    """

    def __init__(self) -> None:
        self.documents = 0
        self.text_bytes = 0.0
        self._waiting: deque[tuple[int, float]] = deque()  # (ids, bytes) of what is in no row yet

    def begin(self) -> None:
        """Begin another source: what is in no row so far will be in none."""
        self._waiting.clear()

    def put(self, text: str, ids: Sequence[int], row_format: RowFormat) -> None:
        """Take a document whose ids come next."""
        if row_format.packing == "pad" and len(ids) == row_format.max_length:
            text = _beginning(text, row_format.tokenizer.decode([list(ids)])[0])
        self._waiting.append((len(ids), len(text.encode("utf-8", "replace"))))
        self.documents += 1

    def take(self, ids: int) -> None:
        """Count the next `ids` ids, which are a row."""
        while ids:
            left, text_bytes = self._waiting.popleft()
            share = min(ids, left)
            self.text_bytes += text_bytes * share / left
            ids -= share
            if share < left:
                self._waiting.appendleft((left - share, text_bytes * (left - share) / left))


def _beginning(text: str, decoded: str) -> str:
    """The beginning of `text` that has as many characters beside white space as `decoded`."""
    count = sum(not character.isspace() for character in decoded)
    for position, character in enumerate(text):
        if not character.isspace():
            if not count:
                return text[:position]
            count -= 1
    return text


class EvalSet:
    """An iterable of (index of the batch in the whole set, micro-batch), for the batches of this rank in order."""

    def __init__(
        self,
        rows: Callable[[], Iterator[Row]],
        *,
        name: str,
        max_length: int,
        batch_size: int,
        eval_tokens: int,
        vocab_size: int = 0,
        tokenizer: Tokenizer | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """`eval_tokens` 0 uses the whole set; `name` is for error texts."""
        self._ids, self._tokenizer = vocab_size, tokenizer
        self._source, self._name, self._eval_tokens = rows, name, eval_tokens
        self._max_length, self._batch_size = max_length, batch_size
        self._rank, self._world_size = rank, world_size
        self._batches: dict[int, list[Row]] | None = None

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that can occur."""
        return self._ids if self._tokenizer is None else self._tokenizer.vocab_size

    def __iter__(self) -> Iterator[tuple[int, MicroBatch]]:
        """Iterate over this rank's batches; raises UserError if there is no row or the data cannot be read."""
        if self._batches is None:
            self._batches = self._read()
        for number, rows in self._batches.items():
            pad = 0 if self._tokenizer is None else self._tokenizer.pad_token_id
            padded = np.full((len(rows), self._max_length), pad, np.int32)
            for i, row in enumerate(rows):
                padded[i, : len(row)] = row
            yield number, make_micro_batch(padded, np.array([len(row) for row in rows], np.int64))

    def check(self) -> None:
        """Read up to the first row with a target; raises UserError as iterating would."""
        if not any(len(row) > 1 for row in self._source()):
            raise self._empty()

    def _read(self) -> dict[int, list[Row]]:
        batches: dict[int, list[Row]] = {}
        targets = count = 0
        for count, row in enumerate(self._source(), 1):
            number = (count - 1) // self._batch_size
            if number % self._world_size == self._rank:
                batches.setdefault(number, []).append(row)
            targets += len(row) - 1
            if self._eval_tokens and targets >= self._eval_tokens:
                break
        if not targets:
            raise self._empty()
        return batches

    def _empty(self) -> UserError:
        return UserError(f"--dataset {self._name}: its validation set is empty: no text of two tokens or more.")


def build_eval_set(
    *,
    dataset: str,
    tokenizer: Tokenizer | None,
    packing: str,
    max_length: int,
    eval_batch_size: int,
    eval_tokens: int,
    rank: int = 0,
    world_size: int = 1,
    damaged_limit: int = 100,
    options: SourceOptions = DEFAULT_OPTIONS,
    source: Source | TokenFiles | TokenMixture | None = None,
    count: TextCount | None = None,
) -> EvalSet:
    """Build one rank's validation set of --dataset; see `train_loader.build_train_loader`. Raises UserError.

    count: counts the text in the rows when they are read, of all ranks; of token ids nothing is counted.
    """
    opened = source or open_split(dataset, "validation", options)
    common: dict[str, Any] = {"name": dataset, "max_length": max_length, "batch_size": eval_batch_size}
    common |= {"eval_tokens": eval_tokens, "rank": rank, "world_size": world_size}
    if isinstance(opened, TokenFiles | TokenMixture):
        sets = opened.shares if isinstance(opened, TokenMixture) else ((opened, 1.0),)
        for files, _ in sets:
            files.check_beginnings()
        token_parts = [(partial(_token_rows, files, max_length, opened.vocab_size()), weight) for files, weight in sets]
        return EvalSet(lambda: _in_turn(token_parts, eval_tokens), vocab_size=opened.vocab_size(), **common)
    if tokenizer is None:
        raise ValueError(f"--dataset {dataset} holds text and needs a tokenizer")
    row_format = RowFormat(max_length, packing, tokenizer)
    shares = opened.shares if isinstance(opened, Mixture) else (Share(opened),)

    def rows() -> Iterator[Row]:
        damage = DamageCount(damaged_limit)
        parts = [(partial(_text_rows, s.source, row_format, damage, count), s.weight) for s in shares]
        return _in_turn(parts, eval_tokens)

    return EvalSet(rows, tokenizer=tokenizer, **common)


def _in_turn(parts: Sequence[tuple[Callable[[], Iterator[Row]], float]], eval_tokens: int) -> Iterator[Row]:
    """Yield the rows of one part after the other, of each up to its share of the target tokens."""
    total = sum(weight for _, weight in parts)
    for rows, weight in parts:
        limit, targets = math.ceil(eval_tokens * weight / total), 0
        for row in rows():
            yield row
            targets += len(row) - 1
            if eval_tokens and targets >= limit:
                break


def read_documents(source: Source, damage: DamageCount) -> Iterator[str]:
    """Yield all texts of a source in its own order; damage is counted in `damage`."""
    for shard in range(source.shards):
        for item in source.read(shard, 1, 0, 0):
            if isinstance(item, Damage):
                damage.add(item)
            elif is_text(item):
                yield item


def _text_rows(
    source: Source, row_format: RowFormat, damage: DamageCount, count: TextCount | None = None
) -> Iterator[Row]:
    length = row_format.max_length
    texts = read_documents(source, damage)
    rest: list[int] = []
    if count is not None:
        count.begin()

    def row(ids: list[int]) -> Row:
        if count is not None:
            count.take(len(ids))
        return np.array(ids, np.int32)

    while batch := list(islice(texts, _DOCUMENTS_PER_ENCODING)):
        for text, ids in zip(batch, row_format.documents(batch), strict=True):
            if ids and count is not None:
                count.put(text, ids, row_format)
            if row_format.packing == "pad":
                if ids:
                    yield row(ids)
                continue
            rest.extend(ids)
            while len(rest) >= length:
                yield row(rest[:length])
                del rest[:length]
    if len(rest) > 1:
        yield row(rest)


def _token_rows(files: TokenFiles, max_length: int, vocab_size: int) -> Iterator[Row]:
    for file in files.files:
        for start in range(0, len(file.ids), max_length):
            if len(row := file.ids[start : start + max_length]) > 1:
                if int(row.max()) >= vocab_size:
                    file.check_ids(vocab_size)  # raises with the index of the id
                yield row
