"""The data of an evaluation: which documents or ids, as which rows, and how much text they are."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from peft_pretraining.after_training.trained_model import Origin
from peft_pretraining.after_training.trained_tokenizer import tokenizer_of
from peft_pretraining.config.flag_groups import DataArgs
from peft_pretraining.data.batch import IGNORED_LABEL, MicroBatch
from peft_pretraining.data.eval_set import EvalSet, TextCount, build_eval_set
from peft_pretraining.data.held_out import load_held_out_state, open_split, open_splits
from peft_pretraining.data.sources.documents import Source
from peft_pretraining.data.sources.kind import TextKind
from peft_pretraining.data.sources.mapped_tokens import TokenFiles, TokenMixture
from peft_pretraining.data.sources.mixture import Mixture
from peft_pretraining.data.sources.registry import find_kind
from peft_pretraining.data.summary import describe_split
from peft_pretraining.data.tokenizer import Added, Tokenizer
from peft_pretraining.data.waiting import progress
from peft_pretraining.errors import UserError


@dataclass(frozen=True)
class Evaluation:
    """The data and rows of an evaluation."""

    data: DataArgs
    own: bool
    """Whether it is the data of the run."""
    split: str
    """"train", "validation", or "": validation, or all of another data set that has none."""
    max_length: int
    batch_size: int
    eval_tokens: int
    """Target tokens; 0: all."""


@dataclass
class Data:
    """An open validation set, and what is known of its text."""

    eval_set: EvalSet
    described: str
    tokenizer: Tokenizer | None
    """None for token ids whose tokenizer is not known."""
    count: TextCount | None
    """Of text; None for token ids."""
    ids: list[int] = field(default_factory=list)
    """Of token ids: those of all rows."""
    first_bytes: int = 0
    """Of the text of each row's first token, which nothing predicts."""

    def batches(self, total: int | None) -> Iterator[tuple[int, MicroBatch]]:
        """The batches of the set, with a progress bar; what they hold is recorded."""
        with progress(f"evaluating on {self.described}", "tokens", total) as done:
            for number, batch in self.eval_set:
                if self.tokenizer is not None:
                    first = self.tokenizer.decode([[int(row[0])] for row in batch.input_ids])
                    self.first_bytes += sum(len(text.encode("utf-8", "replace")) for text in first)
                    if self.count is None:
                        self.ids += batch.labels[batch.labels != IGNORED_LABEL].tolist()
                yield number, batch
                done(batch.target_tokens)

    @property
    def documents(self) -> int | None:
        """How many documents were evaluated, at least in part; None where that is not known."""
        if self.count is not None:
            return self.count.documents
        return len(self._texts()) if self.tokenizer is not None and self.tokenizer.eos_token_id is not None else None

    @property
    def text_bytes(self) -> int | None:
        """The bytes of the text of the documents in the rows; None where it is not known."""
        if self.count is not None:
            return round(self.count.text_bytes)
        return None if self.tokenizer is None else sum(len(text.encode("utf-8", "replace")) for text in self._texts())

    def _texts(self) -> list[str]:
        assert self.tokenizer is not None
        documents: list[list[int]] = [[]]
        for token in self.ids:
            if token == self.tokenizer.eos_token_id:
                documents.append([])
            elif token != self.tokenizer.bos_token_id:
                documents[-1].append(token)
        return self.tokenizer.decode([ids for ids in documents if ids])


def open_data(trained: Origin, asked: Evaluation, tokenizer: str = "") -> Data:
    """Open the data of an evaluation; tokenizer: a name or path, "" for the model's own. Raises UserError."""
    data = asked.data
    source = _source(trained, asked)
    is_ids = isinstance(source, TokenFiles | TokenMixture)
    found: Tokenizer | None = None
    added = Added(data.add_bos, data.add_eos)
    recorded = Added(trained.flags.get("add_bos"), bool(trained.flags.get("add_eos", True)))
    if is_ids:
        with suppress(UserError):
            found = tokenizer_of(trained, tokenizer)
    else:
        found = tokenizer_of(trained, tokenizer, None if added == recorded else added)
    count = None if is_ids else TextCount()
    eval_set = build_eval_set(
        dataset=data.dataset, tokenizer=None if is_ids else found, packing=data.packing, max_length=asked.max_length,
        eval_batch_size=asked.batch_size, eval_tokens=asked.eval_tokens, damaged_limit=data.damaged_limit,
        options=data.source_options, source=source, count=count,
    )  # fmt: skip
    return Data(eval_set, describe_split(source), found, count)


def _source(trained: Origin, asked: Evaluation) -> Source | TokenFiles | TokenMixture:
    """The documents or ids of an evaluation."""
    dataset, options = asked.data.dataset, asked.data.source_options
    kind = find_kind(dataset)
    if asked.own and asked.split != "train":
        splits = open_splits(dataset, options)
        assert splits.train is not None and splits.validation is not None
        if not isinstance(splits.train, TokenFiles | TokenMixture):
            _restore_held_out(splits.train, trained.flags)
        return splits.validation
    if asked.split or not isinstance(kind, TextKind):
        return open_split(dataset, asked.split or "validation", options)
    splits = kind.open_splits(dataset, options)
    found = splits.validation or splits.train
    assert found is not None
    return found


def _restore_held_out(train: Source, flags: dict[str, Any]) -> None:
    """Hold out the documents that the run held out when it began, if the files have changed since."""
    saved = flags.get("data", {}).get("sources")
    shares = [share.source for share in train.shares] if isinstance(train, Mixture) else [train]
    if isinstance(saved, list) and len(saved) == len(shares):
        for source, state in zip(shares, saved, strict=True):
            for notice in load_held_out_state(source, state):
                print(notice, file=sys.stderr)
