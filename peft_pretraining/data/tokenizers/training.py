"""Train a byte-level BPE on the first documents of a data set, for `--tokenizer train:32000` and for pydocs.

Ids: pad 0, eos 1, the 256 bytes, then the merges. The documents are those of the first shards in order, up to
`TRAINING_CHARS` characters or `TRAINING_DOCUMENTS`. They are read twice, once for a hash of their content, which is the
key in the cache, and once for training, and are never all in memory. The same documents give the same file.
"""

import hashlib
import json
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path

from peft_pretraining.data.cache import cache_dir, publish, replace_file
from peft_pretraining.data.sources.documents import Damage, Source
from peft_pretraining.data.tokenizers.documents import AS_USUAL, Added, Tokenizer
from peft_pretraining.data.tokenizers.encoders import TokenizersEncoder
from peft_pretraining.data.waiting import progress
from peft_pretraining.errors import UserError

TRAINING_CHARS = 100_000_000
TRAINING_DOCUMENTS = 1_000_000
LEAST_VOCAB, MOST_VOCAB = 300, 1_000_000
_SPECIAL = {"eos_token": "</s>", "pad_token": "<pad>"}

_logger = logging.getLogger(__name__)


def parse_training(name: str) -> int | None:
    """The vocabulary size of a name such as "train:32000"; None for other names. Raises UserError."""
    word, colon, number = name.partition(":")
    if word != "train" or not colon:
        return None
    if number.isascii() and number.isdecimal() and LEAST_VOCAB <= int(number) <= MOST_VOCAB:
        return int(number)
    raise UserError(
        f"--tokenizer {name}: give the number of pieces to train, from {LEAST_VOCAB} to {MOST_VOCAB}, such as "
        "train:32000."
    )


class TrainedTokenizer(Tokenizer):
    """A tokenizer that was trained on a data set."""

    def __init__(self, content: str, name: str, added: Added, kept: Sequence[Path], cached: str) -> None:
        """`content`: its tokenizer.json. A resumed run may have started with another one: `kept` are files of that run,
        `cached` is a pattern of files in the cache, among which it is searched. Raises UserError.
        """
        super().__init__([_encoder(content)], name, _SPECIAL, added)
        self._content, self._added, self._kept, self._cached = content, added, kept, cached
        self._taken_up: Path | None = None

    def fingerprint(self) -> str:
        """See `Tokenizer.fingerprint`; with a hash of its pieces, which old checkpoints lack."""
        return f"{super().fingerprint()}-{self._hash_of_pieces()}"

    def resume_as(self, fingerprint: str) -> bool:
        """Become the tokenizer that the run started with; see `Tokenizer.resume_as`. Raises UserError if it is gone."""
        if not fingerprint:  # the run was on token ids
            return False
        # The run's folder first: a fingerprint of old checkpoints may fit several tokenizers.
        if self._adopt(self._kept, fingerprint) or super().resume_as(fingerprint):
            return True
        if self._adopt(sorted(cache_dir().glob(self._cached)), fingerprint):
            return True
        raise UserError(
            f"--tokenizer {self.name}: the run began with another tokenizer than its documents give now, or with other "
            f"--add_bos and --add_eos, and it is neither in the run's folder nor in {cache_dir()} with those. Go on "
            "with the data and flags that the run began with, or give its tokenizer.json: --tokenizer FILE."
        )

    def describe(self) -> str:
        """See `Tokenizer.describe`; with the file if it was not trained on the current documents."""
        text = super().describe()
        return text if self._taken_up is None else f"{text}; as the run began with it ({self._taken_up})"

    def keep(self, path: Path) -> None:
        """Write tokenizer.json to `path`, and tokenizer_config.json with its special tokens beside it."""
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **_SPECIAL}
        for file, content in (
            (path.with_name("tokenizer_config.json"), json.dumps(settings, indent=2) + "\n"),
            (path, self._content),
        ):
            replace_file(file, content.encode())

    def _adopt(self, files: Iterable[Path], fingerprint: str) -> bool:
        """Become the first tokenizer in `files` with this fingerprint; returns whether there is one."""
        for path in files:
            with suppress(Exception):  # the library raises bare Exception for a file that is no tokenizer
                content = path.read_text(encoding="utf-8")
                other = Tokenizer([_encoder(content)], self.name, _SPECIAL, self._added)
                if other.resume_as(fingerprint):
                    if content != self._content:  # in place, since other objects refer to this one
                        vars(self).update(vars(other), _content=content, _taken_up=path)
                    return True
        return False


def train_tokenizer(
    source: Source,
    vocab_size: int,
    name: str,
    added: Added = AS_USUAL,
    progress: bool = True,
    kept: Sequence[Path] = (),
) -> TrainedTokenizer:
    """Train a tokenizer of `vocab_size` pieces on `source`, or load it from the cache. Raises UserError without text.

    `name` is for the cache and the log; `kept`: files of a run that may be resumed (`TrainedTokenizer`).
    """
    hashed = _Texts(source, "reading the text of the tokenizer", progress)
    for _ in hashed:
        pass
    if not hashed.chars:
        raise UserError(f"--tokenizer {name}: --dataset {source.name} has no text to train it on.")
    cached = f"{name.partition(':')[0]}-{vocab_size}-"
    path = cache_dir() / f"{cached}{hashed.digest()}.json"
    if path.is_file():
        try:
            return TrainedTokenizer(path.read_text(encoding="utf-8"), name, added, kept, f"{cached}*.json")
        except UserError:
            raise
        except Exception:  # the library raises bare Exception; a damaged cache file is written again
            path.unlink(missing_ok=True)
    trained = _Texts(source, "training the tokenizer", progress, hashed.chars)
    content = train_bpe(trained, vocab_size, progress)
    if trained.digest() != hashed.digest():
        raise UserError(f"--tokenizer {name}: --dataset {source.name} changed while it was read; start again.")
    content = publish(path, content.encode()).decode()
    tokenizer = TrainedTokenizer(content, name, added, kept, f"{cached}*.json")
    if tokenizer.vocab_size < vocab_size:
        _logger.warning(
            "--tokenizer %s: the text gave %d pieces only; more text gives more.", name, tokenizer.vocab_size
        )
    return tokenizer


def _encoder(content: str) -> TokenizersEncoder:
    from tokenizers import Tokenizer as Backend

    return TokenizersEncoder(Backend.from_str(content))


def train_bpe(texts: Iterable[str], vocab_size: int, progress: bool = False) -> str:
    """Train a byte-level BPE (pad 0, eos 1); returns its tokenizer.json. The same texts give the same file."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=progress and sys.stderr.isatty(),
    )
    backend.train_from_iterator(iter(texts), trainer)
    return str(backend.to_str())


class _Texts:
    """Iterates once over the training documents, with a progress bar; computes their hash and number of characters."""

    def __init__(self, source: Source, what: str, progress: bool, total: int = 0) -> None:
        self.chars = 0
        self._source, self._what, self._progress, self._total = source, what, progress, total
        self._hash = hashlib.sha256()

    def __iter__(self) -> Iterator[str]:
        with progress(self._what, "chars", self._total or None) if self._progress else nullcontext(_nothing) as done:
            for number, text in enumerate(self._documents()):
                if number >= TRAINING_DOCUMENTS or self.chars >= TRAINING_CHARS:
                    return
                self._hash.update(b"\0" * (number > 0) + text.encode("utf-8", "replace"))
                self.chars += len(text)
                done(len(text))
                yield text

    def digest(self) -> str:
        """The hash of the texts that were read so far."""
        return self._hash.hexdigest()[:16]

    def _documents(self) -> Iterator[str]:
        for shard in range(self._source.shards):
            for item in self._source.read(shard, 1, 0, 0):
                if not isinstance(item, Damage):
                    yield item


def _nothing(count: int) -> None:
    """Do nothing, instead of moving a progress bar."""
