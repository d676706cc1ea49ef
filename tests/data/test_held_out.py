"""Documents held out by their content: how many, the same ones whatever the files, and never trained on."""

import random
from pathlib import Path

import pytest

from peft_pretraining.data.dealing import cut_shards
from peft_pretraining.data.held_out import WithoutHeldOut, choose, held_out_count, hold_out
from peft_pretraining.data.sources.documents import MemorySource
from peft_pretraining.data.tokenizer import Tokenizer
from peft_pretraining.errors import UserError
from tests.data.collect import close, documents_of, global_rows, loaders
from tests.data.conftest import document


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QGALORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def texts_of(source: MemorySource | WithoutHeldOut) -> list[str]:
    return [str(text) for shard in range(source.shards) for text in source.read(shard, 1, 0, 0) if text]


@pytest.mark.parametrize(
    ("documents", "count"),
    [(64, 6), (1_000, 100), (5_000, 500), (100_000, 500), (500_000, 500), (1_000_000, 1_000), (20_000_000, 10_000)],
)
def test_how_many(documents: int, count: int) -> None:
    assert held_out_count(documents) == count


def test_the_same_texts_whatever_the_files() -> None:
    documents = [document(i) for i in range(700)]
    chosen = choose(MemorySource("a", documents), 10_000)
    assert len(chosen) == 70
    assert chosen == [text for text in documents if text in set(chosen)]  # in the order of the files
    for shards in (1, 3, 16):
        shuffled = documents.copy()
        random.Random(shards).shuffle(shuffled)
        assert set(choose(MemorySource("b", shuffled, shards), 10_000)) == set(chosen)


def test_training_and_validation_share_no_text() -> None:
    documents = [document(i % 400) for i in range(1000)]  # up to three copies of each
    train, validation = hold_out(MemorySource("memory", documents, shards=4))
    kept, held_out = texts_of(train), texts_of(validation)  # type: ignore[arg-type]
    assert held_out and not set(kept) & set(held_out)
    assert len(set(held_out)) == len(held_out)
    assert 80 <= len(documents) - len(kept) <= 100  # copies count: never more than a tenth
    assert set(kept) | set(held_out) == set(documents)


def test_a_text_of_very_many_copies_stays_in_training() -> None:
    documents = ["the same"] * 500 + [document(i) for i in range(500)]
    train, validation = hold_out(MemorySource("memory", documents))
    assert "the same" not in texts_of(validation)  # type: ignore[arg-type]
    assert len(texts_of(train)) == 900  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"copies of a few texts.*--validation_split"):
        hold_out(MemorySource("copies", ["the same"] * 500))


def test_memory_is_bounded_and_the_choice_is_still_by_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [document(i) for i in range(3000)]
    first = choose(MemorySource("memory", documents), 10_000)
    monkeypatch.setattr("peft_pretraining.data.held_out._CANDIDATE_CHARS", 4_000)
    small = choose(MemorySource("memory", documents), 10_000)
    assert 0 < len(small) < len(first) and set(small) < set(first)
    assert sum(map(len, small)) <= 4_000
    assert set(choose(MemorySource("memory", documents[::-1], 3), 10_000)) == set(small)


def test_only_the_beginning_of_a_large_data_set_is_looked_at() -> None:
    chosen = choose(MemorySource("memory", [document(i) for i in range(2000)]), 1000)
    assert len(chosen) == 100 and set(chosen) <= {document(i) for i in range(1000)}
    # A copy of a held-out text behind it is not trained on either.
    train, validation = hold_out(MemorySource("m", [document(i % 1000) for i in range(2000)]), scanned=1000)
    assert not set(texts_of(train)) & set(texts_of(validation))  # type: ignore[arg-type]


def test_too_few_documents_ask_for_a_file() -> None:
    with pytest.raises(
        UserError, match=r"its 63 documents are too few .*64 at least.*--validation_split.*validation\*"
    ):
        hold_out(MemorySource("few", [document(i) for i in range(63)] + ["", "  "]))
    hold_out(MemorySource("enough", [document(i) for i in range(64)]))


def test_what_was_found_is_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = MemorySource("memory", [document(i) for i in range(300)])
    _, validation = hold_out(source)
    (file,) = cache.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr("peft_pretraining.data.held_out.choose", lambda *_: pytest.fail("looked again"))
        assert texts_of(hold_out(source)[1]) == texts_of(validation)  # type: ignore[arg-type]
    file.write_bytes(b"damaged")
    assert texts_of(hold_out(source)[1]) == texts_of(validation)  # type: ignore[arg-type]
    hold_out(MemorySource("memory", [document(i) for i in range(301)]))
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_held_out_documents_are_never_trained_on(tokenizer: Tokenizer, world_size: int) -> None:
    train, validation = hold_out(MemorySource("memory", [document(i) for i in range(311)], shards=3))
    held_out = {int(text.split()[1][:-1]) for text in texts_of(validation)}  # type: ignore[arg-type]
    ranks = loaders(world_size, tokenizer=tokenizer, source=train)
    read = documents_of(tokenizer, global_rows(ranks, 45))
    close(ranks)
    assert len(held_out) == 31 and set(read) == set(range(311)) - held_out


def test_the_fingerprint_changes_with_what_is_held_out() -> None:
    source = MemorySource("memory", [document(i) for i in range(300)])
    prints = {source.fingerprint()} | {WithoutHeldOut(source, frozenset(h)).fingerprint() for h in ((), (1,), (2,))}
    assert len(prints) == 4
    assert cut_shards(hold_out(source)[0], 4) == (4,)
