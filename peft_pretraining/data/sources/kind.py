"""The base classes of kinds of data sets.

To add a kind, add one file to this folder with an object `KIND` of a subclass of `TextKind` or `TokenKind`. The
registry finds it there: `--dataset` then reads it, and its help and error messages list it. No other code needs to know
its name. An example, plain text files with a document in each line:

    class Lines(TextKind):
        in_words = "a .txt file with a document a line"
        default_tokenizer = OwnBPE("lines", vocab_size=8192)  # else t5-base of the hub

        def recognises(self, dataset: str) -> bool:
            return dataset.endswith(".txt") and Path(dataset).is_file()

        def open(self, dataset: str, split: str, options: SourceOptions) -> Source:
            lines = Path(dataset).read_text(encoding="utf-8").split("\\n")
            held_out = lines[::100]  # no document may be in both splits
            chosen = held_out if split == "validation" else [line for line in lines if line not in set(held_out)]
            return MemorySource(dataset, chosen)

    KIND = Lines()

These files are imported to check a command line, before torch is: import slow modules inside `open`.
"""

import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

from peft_pretraining.data.sources.documents import Source
from peft_pretraining.data.sources.mapped_tokens import TokenFiles, TokenMixture
from peft_pretraining.data.sources.retry import RetryPolicy


@dataclass(frozen=True)
class SourceOptions:
    """Options for reading a data set; a kind ignores those that do not apply to it."""

    config: str = ""
    """Configuration of a data set on the hub, such as sample-10BT; "": its only one, or its default."""
    revision: str = ""
    """Commit, branch or tag of a data set on the hub; "": the newest."""
    train_split: str = ""
    """The data set's own name of its training split; "": train."""
    validation_split: str = ""
    """The data set's own name of its validation split; "": validation, or another usual name (valid, dev, val)."""
    text_column: str = ""
    """Column or field that holds the text; "": text, or the only one that holds strings."""
    text_unit: str = "line"
    """The unit of a plain-text file that is a document: "line", "paragraph" (up to an empty line) or "file"."""
    endpoint: str | None = None
    """Address of the hub; None: that of HF_ENDPOINT."""
    retry: RetryPolicy | None = None
    """How long to retry after a network fault; None: about a quarter of an hour."""
    stop: threading.Event | None = None
    """Set by the reader, to end a pause between two tries at once."""


DEFAULT_OPTIONS = SourceOptions()


class Splits(NamedTuple):
    """The open splits of a data set; None for one that it lacks."""

    train: Source | TokenFiles | TokenMixture | None
    validation: Source | TokenFiles | TokenMixture | None


@dataclass(frozen=True)
class OwnBPE:
    """A byte-level BPE that is trained once on the first training documents of a data set, and cached under their hash.

    It is trained like that of --tokenizer train:N (`data.tokenizers.training`).
    """

    name: str
    """For the file in the cache and for error texts."""
    vocab_size: int


class DatasetKind(ABC):
    """A kind of `--dataset`."""

    name: str = ""
    """The value of `--dataset` that means it, such as c4; empty for a kind that is recognized by its files."""
    in_words: str
    """A phrase for the help of `--dataset` and for error texts, such as "a folder in C4's layout"."""
    precedence: int = 0
    """The order in which kinds are asked whether they recognize a file or folder (equal ones: by the names of their
    modules). 0: it recognizes its own files only. More: it also takes what other kinds leave, to report what is wrong
    with it."""
    splits: tuple[str, ...] = ("train", "validation")
    """The splits that can be opened; a run needs these two."""
    needs_network: bool = False
    """Whether reading uses a network, and may wait for minutes where that fails."""

    def recognises(self, dataset: str) -> bool:
        """Whether the value of `--dataset` is of this kind; not called if it is the `name` of a kind."""
        return False

    def of(self, dataset: str) -> "DatasetKind":
        """The kind of this data set, which for a mixture depends on its parts. Raises UserError."""
        return self

    @abstractmethod
    def open(self, dataset: str, split: str, options: SourceOptions) -> Source | TokenFiles | TokenMixture | None:
        """Open one of `splits`, which share no document. Raises UserError, which names `--dataset`."""

    def open_splits(self, dataset: str, options: SourceOptions) -> Splits:
        """Open both splits, without holding documents out (`held_out.open_splits` does that). Raises UserError."""
        train, validation = (self.open(dataset, s, options) if s in self.splits else None for s in Splits._fields)
        return Splits(train, validation)


class TextKind(DatasetKind):
    """A kind of data sets of text."""

    default_tokenizer: str | OwnBPE = "t5-base"
    """The tokenizer without --tokenizer: its name on the hub, or how one is trained."""

    def lost_as_ids(self, dataset: str) -> str:
        """A sentence on what a data set says that files of its token ids cannot; "" where that is nothing."""
        return ""

    @abstractmethod
    def open(self, dataset: str, split: str, options: SourceOptions) -> Source | None:
        """See `DatasetKind.open`. None for a missing validation split, for which documents of train are held out."""


class TokenKind(DatasetKind):
    """A kind of data sets of token ids, which need no tokenizer."""

    @abstractmethod
    def open(self, dataset: str, split: str, options: SourceOptions) -> TokenFiles | TokenMixture:
        """See `DatasetKind.open`."""
