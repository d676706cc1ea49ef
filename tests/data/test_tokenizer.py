"""The tokenizer by directory, file and training; ids that a text can produce; the pydocs text."""

import gzip
import json
from pathlib import Path

import pytest

from peft_pretraining.data.cache import cache_dir, publish
from peft_pretraining.data.sources import pydocs
from peft_pretraining.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from peft_pretraining.data.tokenizers.training import train_bpe
from peft_pretraining.errors import UserError
from tests.data.conftest import document


def test_check_vocabulary() -> None:
    check_vocabulary(32000, 32000)
    with pytest.raises(UserError, match=r"ids up to 32099.*vocabulary of 32000.*at least 32100"):
        check_vocabulary(32100, 32000)
    with pytest.raises(UserError, match=r"--dataset: its token files have ids up to 32099.*tokenize the text"):
        check_vocabulary(32100, 32000, are_ids=True)


def test_directory_and_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    for place in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(str(place), "c4")
        assert loaded.fingerprint() == tokenizer.fingerprint()
        assert (loaded.eos_token_id, loaded.pad_token_id, loaded.vocab_size) == (1, 0, tokenizer.vocab_size)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<pad>"}}))
    assert load_tokenizer(str(tmp_path), "c4").eos_token_id == 0
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<none>"}))
    with pytest.raises(UserError, match="no end-of-sequence token"):
        load_tokenizer(str(tmp_path), "c4")


def test_bad_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"--tokenizer ~no-such-user/t: there is no user no-such-user"):
        load_tokenizer("~no-such-user/t", "c4")
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"QGALORE_CACHE is ~no-such-user: there is no"):
        patch.setenv("QGALORE_CACHE", "~no-such-user")
        cache_dir()
    with pytest.raises(UserError, match="no such file or directory"):
        load_tokenizer(str(tmp_path / "none"), "c4")
    with pytest.raises(UserError, match=r"tokenizer\.json is missing"):
        load_tokenizer(str(tmp_path), "c4")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"is not a tokenizer\.json"):
        load_tokenizer(str(tmp_path), "c4")


def test_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"--tokenizer t5-base: .*could not be fetched"):
        load_tokenizer("", "c4")


def test_special_tokens_in_a_text_are_text(tokenizer: Tokenizer) -> None:
    (ids,) = tokenizer.encode(["a</s>b<pad>"])
    assert not {tokenizer.eos_token_id, tokenizer.pad_token_id} & set(ids)
    assert tokenizer.decode([ids]) == ["a</s>b<pad>"]


def test_beginnings_are_those_of_the_whole(tokenizer: Tokenizer) -> None:
    texts = ["", "x", "word " * 1000, "w" * 5000, "a.\n\n" * 700, " " * 3000 + "end", document(5) * 40]
    whole = tokenizer.encode(texts)
    for count in (1, 15, 100):
        assert tokenizer.encode_beginnings(texts, count) == [ids[:count] for ids in whole]


def test_training_is_deterministic() -> None:
    texts = [document(i) for i in range(300)]
    assert train_bpe(texts, 350) == train_bpe(texts, 350)


def test_the_first_process_wins(tmp_path: Path) -> None:
    assert publish(tmp_path / "new" / "file", b"first") == b"first"
    assert publish(tmp_path / "new" / "file", b"second") == b"first"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]


@pytest.fixture
def small_pydocs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """pydocs of the standard library's first files, in a cache of its own."""
    monkeypatch.setenv("QGALORE_CACHE", str(tmp_path))
    monkeypatch.setattr(pydocs, "LIMIT_CHARS", 560_000)
    return tmp_path


def test_pydocs(small_pydocs: Path) -> None:
    train, validation = pydocs.pydocs_documents("train"), pydocs.pydocs_documents("validation")
    assert sum(map(len, train)) > 400_000
    assert sum(map(len, validation)) > 10_000
    assert not set(train) & set(validation)
    assert train == pydocs.pydocs_documents("train")
    collected = list(pydocs.collect_up_to(560_000))
    assert [text for _, text in collected if text in set(train)] == train
    (cached,) = small_pydocs.iterdir()
    cached.write_bytes(cached.read_bytes()[:1000])
    assert pydocs.pydocs_documents("validation") == validation
    assert len(json.loads(gzip.decompress(cached.read_bytes()))) == len(train) + len(validation)


def test_the_pydocs_tokenizer_is_made_once(small_pydocs: Path) -> None:
    first = load_tokenizer("", "pydocs")
    files = {path: path.stat().st_mtime_ns for path in small_pydocs.iterdir()}
    second = load_tokenizer("", "pydocs")
    assert first.fingerprint() == second.fingerprint()
    assert {path: path.stat().st_mtime_ns for path in small_pydocs.iterdir()} == files
    assert first.vocab_size <= 8192
    (text,) = second.decode(second.encode(["def naïve(x): return x ** 2  # 北京"]))
    assert text == "def naïve(x): return x ** 2  # 北京"


def test_docstrings_are_read_without_importing(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        '"""Top."""\nraise SystemExit\nclass A:\n    """Class."""\n    def f(self):\n        """Method."""\n'
    )
    assert list(pydocs.read_docstrings(file, "module", set())) == [
        "module\nTop.",
        "module.A\nClass.",
        "module.A.f\nMethod.",
    ]
    file.write_text("def broken(:")
    assert list(pydocs.read_docstrings(file, "module", set())) == []
