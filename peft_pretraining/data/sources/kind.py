"""What a kind of data set says about itself, so that nothing else has to know it by name.

To add a kind, add one file to this folder with an object `KIND` of a subclass of `TextKind` or `TokenKind`. The
registry finds it there: `--dataset` then reads it, and its help and error messages list it. A kind of plain text files,
a document a line:

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

These files are read before torch is loaded, to check a command line: what takes long to import is imported inside
`open`.
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
    """How a data set is read, beside its name. A kind ignores what it has no use for."""

    config: str = ""
    """Configuration of a data set on the hub, such as sample-10BT; "": its only one, or its default."""
    revision: str = ""
    """Commit, branch or tag of a data set on the hub; "": the newest."""
    train_split: str = ""
    """The data set's own name of the split that is trained on; "": train."""
    validation_split: str = ""
    """The same of the one that is evaluated on; "": validation, or what people call it (valid, dev, val)."""
    text_column: str = ""
    """Column or field that holds the text; "": text, or the only one that holds strings."""
    text_unit: str = "line"
    """What a document of a plain-text file is: "line", "paragraph" (up to an empty line) or "file"."""
    endpoint: str | None = None
    """Address of the hub; None: that of HF_ENDPOINT."""
    retry: RetryPolicy | None = None
    """How long to go on after a network fault; None: about a quarter of an hour."""
    stop: threading.Event | None = None
    """Set by whoever reads, to end a pause between two tries at once."""


DEFAULT_OPTIONS = SourceOptions()


class Splits(NamedTuple):
    """What a data set is opened as."""

    train: Source | TokenFiles | TokenMixture | None
    validation: Source | TokenFiles | TokenMixture | None
    """None: it has no such split."""


@dataclass(frozen=True)
class OwnBPE:
    """A byte-level BPE that is trained once on the first training documents of a data set, and cached under their hash.

    As --tokenizer train:N trains one (`data.tokenizers.training`): the documents are read twice, never held together.
    """

    name: str
    """For the cache's file and for messages."""
    vocab_size: int


class DatasetKind(ABC):
    """A kind of `--dataset`."""

    name: str = ""
    """What `--dataset` calls it, such as c4; empty for a kind that is recognised by its files."""
    in_words: str
    """In a list of all kinds, in the help of `--dataset` and in messages, such as "a folder in C4's layout"."""
    precedence: int = 0
    """Kinds are asked in this order whether they recognise a file or folder, those of equal precedence by the names of
    their modules. 0: it recognises its own files only. More: it also takes what others leave, to say what is wrong
    with it."""
    splits: tuple[str, ...] = ("train", "validation")
    """What can be opened; a run needs these two."""
    needs_network: bool = False
    """Reading may have to wait for a network, for minutes where it fails."""

    def recognises(self, dataset: str) -> bool:
        """Whether `--dataset` has given something of this kind; its name is looked at before anybody is asked."""
        return False

    def of(self, dataset: str) -> "DatasetKind":
        """The kind that this very data set is of: a mixture is of that of its parts. Raises UserError."""
        return self

    @abstractmethod
    def open(self, dataset: str, split: str, options: SourceOptions) -> Source | TokenFiles | TokenMixture | None:
        """What is in one of `splits`, which share no document. Raises UserError, which names `--dataset`."""

    def open_splits(self, dataset: str, options: SourceOptions) -> Splits:
        """Both of them, before documents are held out (`held_out.open_splits`). Raises UserError."""
        train, validation = (self.open(dataset, s, options) if s in self.splits else None for s in Splits._fields)
        return Splits(train, validation)


class TextKind(DatasetKind):
    """A kind that holds text."""

    default_tokenizer: str | OwnBPE = "t5-base"
    """Where no --tokenizer is given: its name on the hub, or how one is trained."""

    @abstractmethod
    def open(self, dataset: str, split: str, options: SourceOptions) -> Source | None:
        """See `DatasetKind.open`. None for "validation": there is none, and documents of "train" are held out."""


class TokenKind(DatasetKind):
    """A kind that holds token ids, and needs no tokenizer."""

    @abstractmethod
    def open(self, dataset: str, split: str, options: SourceOptions) -> TokenFiles | TokenMixture:
        """See `DatasetKind.open`."""
