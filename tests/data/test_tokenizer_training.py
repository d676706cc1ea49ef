"""`--tokenizer train:N`: a BPE of the first documents of a data set, made once and kept under their hash."""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from peft_pretraining.data.sources.documents import Damage, MemorySource
from peft_pretraining.data.sources.mapped_tokens import TokenFiles, TokenMixture
from peft_pretraining.data.sources.registry import open_dataset
from peft_pretraining.data.tokenizer import Added, Tokenizer, keep_trained, kept_tokenizers, load_tokenizer
from peft_pretraining.data.tokenizers import training
from peft_pretraining.data.tokenizers.training import TrainedTokenizer, train_tokenizer
from peft_pretraining.data.train_loader import TrainLoader, build_train_loader, merge_states
from peft_pretraining.errors import UserError
from tests.data.conftest import document
from tests.data.files import write_texts

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
    trained = train(DOCUMENTS)
    assert trained.fingerprint() == "a2e4628f53798d8d-5017df4d3066a553"
    for fingerprint in ("a2e4628f53798d8d", trained.fingerprint()):
        assert trained.resume_as(fingerprint) and tokenizer.resume_as(fingerprint)
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
    (tmp_path / "ids.uint16").write_bytes(b"\1\0" * 1000)
    with pytest.raises(UserError, match=r"--tokenizer train:400: --dataset .*ids\.uint16 holds token ids"):
        load_tokenizer("train:400", str(tmp_path / "ids.uint16"))


def test_too_little_text_for_so_many_pieces(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tokenizer = train(["a b c"], 5000)
    assert tokenizer.vocab_size < 300
    assert f"the text gave {tokenizer.vocab_size} pieces only" in caplog.text


# ---- a run that goes on


def resumed(documents: list[str], kept: Path | None = None) -> TrainedTokenizer:
    """What train:400 gives to a run that may have kept another tokenizer."""
    source = MemorySource("memory", documents)
    return train_tokenizer(source, 400, "train:400", progress=False, kept=[] if kept is None else [kept])


def content_of(tokenizer: Tokenizer, tmp_path: Path) -> bytes:
    tokenizer.save(tmp_path / "content.json")
    return (tmp_path / "content.json").read_bytes()


OTHERS = [document(i).upper() for i in range(200)]


@pytest.mark.parametrize("place", ["run", "cache", "nowhere"])
def test_a_run_goes_on_with_the_tokenizer_that_was_trained_when_it_began(
    cache: Path, tmp_path: Path, place: str
) -> None:
    """Where its documents have changed since."""
    first, folder = train(DOCUMENTS), tmp_path / "run"
    keep_trained(first, folder)
    (kept,) = kept_tokenizers(str(folder), "auto")
    if place != "run":
        shutil.rmtree(folder)
    if place != "cache":
        shutil.rmtree(cache)
    today = resumed(OTHERS, kept)
    before = today.encode(DOCUMENTS)
    if place == "nowhere":
        with pytest.raises(UserError, match=rf"train:400: the run began with another .* nor in {cache}.* FILE"):
            today.resume_as(first.fingerprint())
        assert today.encode(DOCUMENTS) == before and not today.resume_as("")
        return
    assert today.resume_as(first.fingerprint())
    assert today.encode_documents(DOCUMENTS) == first.encode_documents(DOCUMENTS) and before != first.encode(DOCUMENTS)
    assert today.fingerprint() == first.fingerprint() and today.vocab_size == first.vocab_size
    assert content_of(today, tmp_path) == content_of(first, tmp_path)
    found = kept if place == "run" else next(path for path in cache.iterdir() if path.name in today.describe())
    assert today.describe() == f"{first.describe()}; as the run began with it ({found})"
    keep_trained(today, folder)
    assert kept.read_bytes() == content_of(first, tmp_path)


def test_the_tokenizer_of_the_runs_folder_comes_first(tmp_path: Path) -> None:
    """Fingerprints of first versions are of a sentence that two tokenizers may cut in the same way."""
    first = train(DOCUMENTS)
    old, _, pieces = first.fingerprint().partition("-")
    keep_trained(first, tmp_path / "run")
    today = resumed(OTHERS, *kept_tokenizers(str(tmp_path / "run"), "auto"))
    assert today.fingerprint().startswith(old) and not today.fingerprint().endswith(pieces)
    assert today.resume_as(old) and content_of(today, tmp_path) == content_of(first, tmp_path)
    assert first.resume_as(old) and "as the run began with it" not in first.describe()
    assert not Tokenizer.resume_as(resumed(OTHERS), first.fingerprint())


def test_a_kept_tokenizer_can_be_given_by_its_place(tmp_path: Path) -> None:
    first = train(DOCUMENTS)
    keep_trained(first, tmp_path)
    for place in ("tokenizer", "tokenizer/tokenizer.json"):
        assert load_tokenizer(str(tmp_path / place), "c4").resume_as(first.fingerprint())
        assert not load_tokenizer(str(tmp_path / place), "c4").resume_as(train(OTHERS).fingerprint())
    settings = json.loads((tmp_path / "tokenizer" / "tokenizer_config.json").read_text())
    assert settings == {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "<pad>"}
    keep_trained(load_tokenizer(str(tmp_path / "tokenizer"), "c4"), tmp_path / "other")
    keep_trained(None, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--tokenizer train:400: .*file/tokenizer/tokenizer.json cannot be written"):
        keep_trained(first, tmp_path / "file")


def test_where_a_run_may_have_kept_it() -> None:
    name = Path("tokenizer/tokenizer.json")
    assert kept_tokenizers("", "") == []
    assert kept_tokenizers("new", "auto") == kept_tokenizers("new", "") == ["new" / name]
    assert kept_tokenizers("new", "old/step_00000010") == ["old" / name, "old/step_00000010" / name, "new" / name]


def test_a_loader_goes_on_with_the_tokenizer_of_its_state(tmp_path: Path) -> None:
    """A file of the data set was replaced by one of another size between two starts."""
    file = tmp_path / "text" / "a.jsonl"

    def loader() -> TrainLoader:
        source = open_dataset(str(file), "train")
        assert source is not None and not isinstance(source, TokenFiles | TokenMixture)
        tokenizer = train_tokenizer(source, 400, "train:400", progress=False)
        return build_train_loader(
            dataset=str(file), source=source, tokenizer=tokenizer, packing="pad", max_length=32, batch_size=4,
            grad_accum_steps=1, seed=0, data_lanes=4, workers=0,
        )  # fmt: skip

    write_texts(file, DOCUMENTS)
    first = loader()
    first.next_update()
    state = merge_states([first.state_dict()])
    texts = [*DOCUMENTS[:-20], *OTHERS]
    write_texts(file, texts)
    second = loader()
    assert second.tokenizer is not None and second.tokenizer.fingerprint() != state["order"]["tokenizer"]
    second.load_state_dict(state)
    assert "as the run began with it" in "".join(second.describe())
    update = second.next_update()
    assert update is not None and first.tokenizer is not None
    expected = {tuple(ids) for ids in first.tokenizer.encode_documents(texts, 32)}
    (micro_batch,) = update.micro_batches
    rows = {tuple(row[row >= 0].tolist()) for row in micro_batch.labels}
    assert rows and rows <= expected
    assert second.state_dict()["order"]["tokenizer"] == state["order"]["tokenizer"]
