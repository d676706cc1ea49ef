"""`--tokenizer train:N`: a BPE of the first documents of a data set, made once and kept under their hash."""

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from peft_pretraining.data.sources.documents import Damage, MemorySource
from peft_pretraining.data.tokenizer import Added, Tokenizer, load_tokenizer, train_tokenizer
from peft_pretraining.data.tokenizers import training
from peft_pretraining.errors import UserError
from tests.data.conftest import document

DOCUMENTS = [document(i) for i in range(200)]


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache of its own."""
    monkeypatch.setenv("QGALORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def train(documents: list[str], vocab_size: int = 400, shards: int = 1) -> Tokenizer:
    return train_tokenizer(MemorySource("memory", documents, shards), vocab_size, f"train:{vocab_size}", progress=False)


@pytest.mark.parametrize("name", ["train:", "train:10", "train:299", "train:abc", "train:1e4", "train:-400", "train:²"])
def test_numbers_that_are_none(name: str) -> None:
    with pytest.raises(UserError, match=rf"--tokenizer {name}: give the number of pieces.*300 to 1000000.*train:32000"):
        load_tokenizer(name, "c4")


def test_it_reads_the_training_split(c4_dir: Path, cache: Path) -> None:
    tokenizer = load_tokenizer("train:400", str(c4_dir), progress=False)
    assert (tokenizer.vocab_size, tokenizer.pad_token_id, tokenizer.eos_token_id) == (400, 0, 1)
    assert tokenizer.bos_token_id is None
    numbers = range(195)  # of the documents of the training shards
    digest = hashlib.sha256("\0".join(document(i) for i in numbers).encode()).hexdigest()[:16]
    assert [path.name for path in cache.iterdir()] == [f"train-400-{digest}.json"]
    assert "byte-level BPE of 400 ids" in tokenizer.describe()
    assert load_tokenizer("train:400", str(c4_dir), added=Added(eos=False), progress=False).eos_token_id is None


def test_a_source_that_is_given_is_read_instead(c4_dir: Path) -> None:
    """The documents that are held out of training are no part of it."""
    few = MemorySource("few", DOCUMENTS[:50])
    given = load_tokenizer("train:400", str(c4_dir), source=few, progress=False)
    assert given.fingerprint() == train(DOCUMENTS[:50]).fingerprint()
    assert given.fingerprint() != load_tokenizer("train:400", str(c4_dir), progress=False).fingerprint()


def test_it_is_trained_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train(DOCUMENTS)
    (file,) = cache.iterdir()
    content = file.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(training, "train_bpe", None)
        assert train(DOCUMENTS).fingerprint() == first.fingerprint()
    file.write_bytes(content[:100])
    assert train(DOCUMENTS).fingerprint() == first.fingerprint()
    assert file.read_bytes() == content
    train(DOCUMENTS, 401)
    train([*DOCUMENTS, "more"])
    assert len(list(cache.iterdir())) == 3


def test_the_ids_are_frozen(tokenizer: Tokenizer) -> None:
    """Those of the first release, of any train:N and of pydocs: runs that go on depend on them."""
    assert tokenizer.fingerprint() == train(DOCUMENTS).fingerprint() == "a2e4628f53798d8d"
    assert train(DOCUMENTS).encode(["document 7: word3 naïve"]) == [
        [268, 312, 27, 261, 20, 222, 79, 66, 129, 109, 87, 70]
    ]


class Endless(MemorySource):
    """Counts what is read of documents without end, each of which is 1000 characters."""

    count = 0

    def read(self, shard: int, slices: int, part: int, start: int) -> Iterator[str | Damage]:
        while True:
            Endless.count += 1
            yield Damage("here", "broken") if Endless.count % 10 == 0 else f"{Endless.count % 100:<10}" * 100


@pytest.mark.parametrize(("documents", "chars"), [(40, 10**9), (10**9, 40_000)])
def test_it_reads_the_first_documents_alone(monkeypatch: pytest.MonkeyPatch, documents: int, chars: int) -> None:
    monkeypatch.setattr(training, "TRAINING_DOCUMENTS", documents)
    monkeypatch.setattr(training, "TRAINING_CHARS", chars)
    monkeypatch.setattr(Endless, "count", 0)
    with pytest.raises(UserError, match=r"changed while it was read"):  # it counts on, where it should begin again
        train_tokenizer(Endless("endless", []), 300, "train:300", progress=False)
    assert Endless.count <= 2 * 46


def test_no_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--tokenizer train:400: --dataset memory has no text"):
        train(["", ""])
    (tmp_path / "ids.uint16").write_bytes(b"\0\0" * 1000)
    with pytest.raises(UserError, match=r"--tokenizer train:400: --dataset .*ids\.uint16 holds token ids"):
        load_tokenizer("train:400", str(tmp_path / "ids.uint16"))


def test_too_little_text_for_so_many_pieces(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tokenizer = train(["a b c"], 5000)
    assert tokenizer.vocab_size < 300
    assert f"the text gave {tokenizer.vocab_size} pieces only" in caplog.text
