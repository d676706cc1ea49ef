"""Documents held out by their content: how many, the same ones whatever the files, and never trained on."""

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from peft_pretraining.data.dealing import cut_shards
from peft_pretraining.data.eval_set import build_eval_set
from peft_pretraining.data.held_out import (
    HeldOut,
    HeldOutSource,
    WithoutHeldOut,
    choose,
    held_out_count,
    hold_out,
    open_splits,
)
from peft_pretraining.data.sources.documents import Files, MemorySource
from peft_pretraining.data.tokenizer import Tokenizer
from peft_pretraining.errors import UserError
from tests.data.collect import close, documents_of, global_rows, loaders
from tests.data.conftest import document


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QGALORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def texts_of(source: MemorySource | HeldOutSource | WithoutHeldOut) -> list[str]:
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
    kept, held_out = texts_of(train), texts_of(validation)
    assert held_out and not set(kept) & set(held_out)
    assert len(set(held_out)) == len(held_out)
    assert 80 <= len(documents) - len(kept) <= 100  # copies count: never more than a tenth
    assert set(kept) | set(held_out) == set(documents)


def test_a_text_of_very_many_copies_stays_in_training() -> None:
    documents = ["the same"] * 500 + [document(i) for i in range(500)]
    train, validation = hold_out(MemorySource("memory", documents))
    assert "the same" not in texts_of(validation)
    assert len(texts_of(train)) == 900
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
    assert not set(texts_of(train)) & set(texts_of(validation))


def test_too_few_documents_ask_for_a_file() -> None:
    with pytest.raises(
        UserError, match=r"its 63 documents are too few .*64 at least.*validation\*.*--validation_split"
    ):
        hold_out(MemorySource("few", [document(i) for i in range(63)] + ["", "  "]))
    hold_out(MemorySource("enough", [document(i) for i in range(64)]))


def test_what_was_found_is_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = MemorySource("memory", [document(i) for i in range(300)])
    _, validation = hold_out(source)
    (file,) = cache.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr("peft_pretraining.data.held_out.choose", lambda *_: pytest.fail("looked again"))
        assert texts_of(hold_out(source)[1]) == texts_of(validation)
    file.write_bytes(b"damaged")
    assert texts_of(hold_out(source)[1]) == texts_of(validation)
    hold_out(MemorySource("memory", [document(i) for i in range(301)]))
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_held_out_documents_are_never_trained_on(tokenizer: Tokenizer, world_size: int) -> None:
    train, validation = hold_out(MemorySource("memory", [document(i) for i in range(311)], shards=3))
    held_out = {int(text.split()[1][:-1]) for text in texts_of(validation)}
    ranks = loaders(world_size, tokenizer=tokenizer, source=train)
    read = documents_of(tokenizer, global_rows(ranks, 45))
    close(ranks)
    assert len(held_out) == 31 and set(read) == set(range(311)) - held_out


def test_the_fingerprint_changes_with_what_is_held_out() -> None:
    source = MemorySource("memory", [document(i) for i in range(300)])
    held_out: list[list[str]] = [[], ["a"], ["b"]]
    prints = {WithoutHeldOut(source, (HeldOut("memory", "", texts),)).fingerprint() for texts in held_out}
    assert len({source.fingerprint(), *prints}) == 4
    assert cut_shards(hold_out(source)[0], 4) == (4,)


@dataclass(frozen=True)
class OneFile(MemorySource):
    """In a file of so many bytes, of which the documents are the beginning."""

    size: int = 0

    def file_list(self) -> Files:
        """See `FileSource`."""
        return Files(("data.jsonl",), (self.size,))


@pytest.mark.parametrize(
    ("scanned", "total", "count"),
    [
        (20_000, 20_000, 500),
        (20_000, 700_000, 700),
        (20_000, 50_000_000, 2_000),  # never more than a tenth of what was looked at
        (2_000, 50_000_000, 200),
    ],
)
def test_of_a_large_data_set_as_many_are_held_out_as_for_all_its_documents(
    scanned: int, total: int, count: int
) -> None:
    documents = [f"document {i:05}" for i in range(scanned + 1)]
    assert len(choose(OneFile("one", documents, size=total * len(documents[0])), scanned)) == count
    assert len(choose(MemorySource("no file", documents), scanned)) == min(500, scanned // 10)


def lines(folder: Path, name: str, numbers: range) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps({"text": document(i)}) + "\n" for i in numbers))


@pytest.mark.parametrize("cache_is", ["kept", "gone"])
@pytest.mark.parametrize("mixed", ["", "first of two", "second of two"])
def test_a_run_holds_out_what_it_began_with(
    tmp_path: Path, cache: Path, tokenizer: Tokenizer, cache_is: str, mixed: str
) -> None:
    lines(tmp_path / "a", "0.jsonl", range(400))
    lines(tmp_path / "a", "1.jsonl", range(400, 500))
    lines(tmp_path / "b", "0.jsonl", range(500, 800))
    parts = [f"{tmp_path}/a:0.6", f"{tmp_path}/b:0.4"]
    dataset = ",".join(parts[:: 1 if mixed == "first of two" else -1]) if mixed else str(tmp_path / "a")

    def go_on(updates: int, state: Any = None) -> tuple[set[int], set[int], Any, list[str]]:
        """(numbers that were trained on, that are held out, the state, what was said)."""
        splits = open_splits(dataset)
        (ranks,) = [loaders(1, tokenizer=tokenizer, source=splits.train)]
        eval_set = build_eval_set(
            dataset=dataset, tokenizer=tokenizer, packing="pad", max_length=48, eval_batch_size=64, eval_tokens=0,
            source=splits.validation,
        )  # fmt: skip
        if state is not None:
            ranks[0].load_state_dict(state)
        said = list(ranks[0].notices)
        trained = set(documents_of(tokenizer, global_rows(ranks, updates)))
        held_out = {n for _, batch in eval_set for n in documents_of(tokenizer, [batch.labels])}
        state = json.loads(json.dumps(ranks[0].state_dict()))
        close(ranks)
        return trained, held_out, state, said

    trained, held_out, state, _ = go_on(60)
    assert len(held_out) == (80 if mixed else 50) and not trained & held_out
    lines(tmp_path / "a", "1.jsonl", range(1000, 1300))  # a file is replaced: other documents would be held out now
    if cache_is == "gone":
        shutil.rmtree(cache)
    kept = {n for n in held_out if not 400 <= n < 500} if cache_is == "gone" else held_out
    for _ in range(2):  # also in the run that goes on after this one
        again, still, state, said = go_on(60, state)
        assert still == kept and not again & held_out and again & set(range(1000, 1300))
    trained, held_out, state, said = go_on(1, state)
    assert still == held_out and not any("changed" in sentence for sentence in said)


def test_what_is_said_of_held_out_documents_that_are_gone(cache: Path) -> None:
    before, now = (MemorySource("files", [document(i) for i in numbers]) for numbers in (range(300), range(30, 330)))
    saved = hold_out(before)[0].held_out[0]
    train, validation = hold_out(now)
    shutil.rmtree(cache)
    gone = sum(text in {document(i) for i in range(30)} for text in saved.texts)
    assert train.held_out[0].load_state(saved.state(), now) == [
        "--dataset files: the documents held out stay those that the run began with, of which "
        f"{gone} of 30 are no longer there"
    ]
    assert set(texts_of(validation)) == set(saved.texts) - {document(i) for i in range(30)} and gone
    assert train.held_out[0].load_state(saved.state(), now) == []
    other = MemorySource("files", [document(i) for i in range(400, 700)])
    with pytest.raises(UserError, match=r"none of the documents that were held out .* another --save_dir"):
        hold_out(other)[0].held_out[0].load_state(saved.state(), other)
