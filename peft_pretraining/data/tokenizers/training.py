"""A byte-level BPE that is trained on the first documents of a data set: `--tokenizer train:32000`, and that of pydocs.

Ids: pad 0, eos 1, the 256 bytes, then the merges. The documents are those of the first shards in their own order, up
to `TRAINING_CHARS` characters or `TRAINING_DOCUMENTS`; they are read twice, once for the hash of their content, under
which the file is kept in the cache, and once for training, and are never held in memory together. The same documents
give the same file.
"""

import hashlib
import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext

from peft_pretraining.data.cache import cache_dir, publish
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
    """The number of pieces that "train:32000" asks for; None if the name asks for no training. Raises UserError."""
    word, colon, number = name.partition(":")
    if word != "train" or not colon:
        return None
    if number.isascii() and number.isdecimal() and LEAST_VOCAB <= int(number) <= MOST_VOCAB:
        return int(number)
    raise UserError(
        f"--tokenizer {name}: give the number of pieces to train, from {LEAST_VOCAB} to {MOST_VOCAB}, such as "
        "train:32000."
    )


def train_tokenizer(
    source: Source,
    vocab_size: int,
    name: str,
    added: Added = AS_USUAL,
    progress: bool = True,
) -> Tokenizer:
    """Of `vocab_size` pieces, trained on `source` unless the cache has it. `name` is for the cache and for people.

    Raises UserError if there are no documents.
    """
    from tokenizers import Tokenizer as Backend

    hashed = _Texts(source, "reading the text of the tokenizer", progress)
    for _ in hashed:
        pass
    if not hashed.chars:
        raise UserError(f"--tokenizer {name}: --dataset {source.name} has no text to train it on.")
    path = cache_dir() / f"{name.partition(':')[0]}-{vocab_size}-{hashed.digest()}.json"
    if path.is_file():
        try:
            return Tokenizer([TokenizersEncoder(Backend.from_file(str(path)))], name, _SPECIAL, added)
        except Exception:  # the library raises bare Exception; a damaged cache file is made again
            path.unlink(missing_ok=True)
    trained = _Texts(source, "training the tokenizer", progress, hashed.chars)
    content = train_bpe(trained, vocab_size, progress)
    if trained.digest() != hashed.digest():
        raise UserError(f"--tokenizer {name}: --dataset {source.name} changed while it was read; start again.")
    kept = publish(path, content.encode()).decode()
    tokenizer = Tokenizer([TokenizersEncoder(Backend.from_str(kept))], name, _SPECIAL, added)
    if tokenizer.vocab_size < vocab_size:
        _logger.warning(
            "--tokenizer %s: the text gave %d pieces only; more text gives more.", name, tokenizer.vocab_size
        )
    return tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int, progress: bool = False) -> str:
    """tokenizer.json of a byte-level BPE; pad 0, eos 1. The same texts give the same file."""
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
    """The documents that a tokenizer is trained on, once, with a bar, their hash and their number of characters."""

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
        """Of the texts that were read so far."""
        return self._hash.hexdigest()[:16]

    def _documents(self) -> Iterator[str]:
        for shard in range(self._source.shards):
            for item in self._source.read(shard, 1, 0, 0):
                if not isinstance(item, Damage):
                    yield item


def _nothing(count: int) -> None:
    """In the place of a bar."""
