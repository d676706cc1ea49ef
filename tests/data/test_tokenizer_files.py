"""Tokenizers of every kind by folder, file and hub: the tokens they add, the library that encodes, and errors."""

import json
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from peft_pretraining.data.tokenizer import Added, Tokenizer, load_tokenizer
from peft_pretraining.errors import UserError
from tests.data.small_tokenizers import AWKWARD, TEXTS, byte_level, write_model, write_unigram_json


def load(place: Path, bos: bool | None = None, eos: bool = True, encoder: str = "auto") -> Tokenizer:
    return load_tokenizer(str(place), "c4", added=Added(bos, eos), encoder=encoder)


@pytest.fixture(scope="module")
def t5_kind(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with spiece.model and its tokenizer.json, as T5's."""
    folder = tmp_path_factory.mktemp("t5-kind")
    model = write_model(folder, "unigram", "spiece.model")
    write_unigram_json(model, folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def llama_kind(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokenizer.model alone, as LLaMA's."""
    return write_model(tmp_path_factory.mktemp("llama-kind"), "bpe", "tokenizer.model").parent


# ---- two encoders of one vocabulary


def test_sentencepiece_gives_the_ids_of_tokenizers(t5_kind: Path) -> None:
    fast, slow = load(t5_kind), load(t5_kind, encoder="tokenizers")
    assert (fast.encoder, slow.encoder) == ("sentencepiece", "tokenizers")
    for texts in (TEXTS, AWKWARD):
        assert fast.encode(texts) == slow.encode(texts)
    assert (fast.vocab_size, fast.eos_token_id, fast.pad_token_id) == (slow.vocab_size, 1, 0)
    assert fast.bos_token_id is slow.bos_token_id is None
    assert max(map(max, filter(None, fast.encode(TEXTS)))) < fast.vocab_size


def test_no_special_id_comes_out_of_a_text(t5_kind: Path, llama_kind: Path) -> None:
    text = "a </s> b<pad>c <extra_id_0> d <s> e"
    for tokenizer in (load(t5_kind), load(t5_kind, encoder="tokenizers"), load(llama_kind)):
        (ids,) = tokenizer.encode([text])
        assert ids and max(ids) < tokenizer.vocab_size
        assert not {tokenizer.eos_token_id, tokenizer.bos_token_id, 1} & set(ids)
    (document,) = load(llama_kind).encode_documents([text])
    assert (document[0], document[-1], document[1:-1]) == (1, 2, load(llama_kind).encode([text])[0])


def test_a_run_goes_on_with_the_encoder_of_its_checkpoint(t5_kind: Path) -> None:
    fast, slow = load(t5_kind), load(t5_kind, encoder="tokenizers")
    assert fast.fingerprint() != slow.fingerprint()
    resumed = load(t5_kind)
    assert resumed.resume_as(slow.fingerprint())
    assert (resumed.encoder, resumed.fingerprint()) == ("tokenizers", slow.fingerprint())
    assert resumed.resume_as(fast.fingerprint())
    assert (resumed.encoder, resumed.fingerprint()) == ("sentencepiece", fast.fingerprint())
    assert not resumed.resume_as(load(t5_kind, eos=False).fingerprint())
    assert resumed.encoder == "sentencepiece"


def test_a_model_of_other_scores_or_pieces_is_not_used(t5_kind: Path, tmp_path: Path) -> None:
    shutil.copy(t5_kind / "spiece.model", tmp_path)
    write_unigram_json(t5_kind / "spiece.model", tmp_path / "tokenizer.json", scores=0.5)
    assert load(tmp_path).encoder == "tokenizers"
    with pytest.raises(UserError, match=r"spiece\.model gives other ids than tokenizer\.json"):
        load(tmp_path, encoder="sentencepiece")
    other = write_model(tmp_path / "other", "unigram", "other.model", vocab_size=200)
    write_unigram_json(other, tmp_path / "tokenizer.json")
    assert load(tmp_path).encoder == "tokenizers"
    (tmp_path / "spiece.model").write_bytes(b"damaged")
    assert load(tmp_path).encoder == "tokenizers"
    with pytest.raises(UserError, match=r"spiece\.model is not a sentencepiece model"):
        load(tmp_path, encoder="sentencepiece")
    (tmp_path / "spiece.model").unlink()
    with pytest.raises(UserError, match=r"asked for, but it has no sentencepiece \.model"):
        load(tmp_path, encoder="sentencepiece")


def test_without_the_package_sentencepiece(t5_kind: Path, llama_kind: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    assert load(t5_kind).encoder == "tokenizers"
    with pytest.raises(UserError, match=r"tokenizer\.model needs the package sentencepiece: pip install"):
        load(llama_kind)


@pytest.mark.parametrize("encoder", ["sentencepiece", "tokenizers"])
def test_several_threads_get_what_one_gets(t5_kind: Path, encoder: str) -> None:
    tokenizer = load(t5_kind, encoder=encoder)
    expected = tokenizer.encode_documents(TEXTS)
    with ThreadPoolExecutor(4) as threads:
        for ids in threads.map(tokenizer.encode_documents, [list(TEXTS)] * 12):
            assert ids == expected


def test_beginnings_by_sentencepiece(t5_kind: Path, llama_kind: Path) -> None:
    for tokenizer in (load(t5_kind), load(llama_kind)):
        whole = tokenizer.encode(AWKWARD)
        for count in (1, 15, 100):
            assert tokenizer.encode_beginnings(AWKWARD, count) == [ids[:count] for ids in whole]


# ---- what is added


def test_documents_of_llamas_kind_begin_and_end(llama_kind: Path) -> None:
    tokenizer = load(llama_kind)
    (bare,) = tokenizer.encode([TEXTS[0]])
    assert tokenizer.decode([bare]) == [TEXTS[0]]
    assert tokenizer.encode_documents([TEXTS[0]]) == [[1, *bare, 2]]
    assert tokenizer.encode_documents([TEXTS[0]], 8) == [[1, *bare[:6], 2]]
    assert tokenizer.encode_documents([TEXTS[0]], len(bare) + 2) == [[1, *bare, 2]]
    assert load(llama_kind, bos=False).encode_documents([TEXTS[0]]) == [[*bare, 2]]
    assert load(llama_kind, eos=False).encode_documents([TEXTS[0]], 8) == [[1, *bare[:7]]]
    assert load(llama_kind, bos=False, eos=False).encode_documents([TEXTS[0]]) == [bare]
    assert tokenizer.encode_documents(["", TEXTS[0], ""]) == [[], [1, *bare, 2], []]
    with pytest.raises(UserError, match=r"--max_length 2 has no room .* at least 3"):
        tokenizer.encode_documents([TEXTS[0]], 2)
    assert load(llama_kind / "tokenizer.model").fingerprint() == tokenizer.fingerprint()
    fingerprints = {load(llama_kind, bos, eos).fingerprint() for bos in (True, False) for eos in (True, False)}
    assert len(fingerprints) == 4


def test_bos_as_the_tokenizer_says(tmp_path: Path) -> None:
    file, settings = tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json"
    byte_level(["<pad>", "</s>", "<|begin|>"], begins_with="<|begin|>").save(str(file))
    assert load(tmp_path).bos_token_id == load(file).bos_token_id == 2
    settings.write_text(json.dumps({"add_bos_token": False, "bos_token": "<|begin|>"}))
    assert load(tmp_path).bos_token_id is None
    assert load(tmp_path, bos=True).bos_token_id == 2
    byte_level(["<pad>", "</s>", "<|begin|>"]).save(str(file))
    assert load(tmp_path).bos_token_id is None
    settings.write_text(json.dumps({"add_bos_token": True, "bos_token": {"content": "<|begin|>"}}))
    assert load(tmp_path).bos_token_id == 2
    assert load(tmp_path, bos=False).bos_token_id is None
    settings.unlink()
    assert load(tmp_path).bos_token_id is None
    with pytest.raises(UserError, match=r"--add_bos: .* no token that begins a document"):
        load(tmp_path, bos=True)


def test_no_end_of_sequence_token(tmp_path: Path) -> None:
    byte_level(["<|begin|>"]).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"no end-of-sequence token .*eos_token in tokenizer_config.json.*--no-add_eos"):
        load(tmp_path)
    tokenizer = load(tmp_path, eos=False)
    assert tokenizer.eos_token_id is None
    assert tokenizer.encode_documents(["a b"]) == tokenizer.encode(["a b"])
    assert 0 <= tokenizer.pad_token_id < tokenizer.vocab_size


def test_gpt2s_pair_of_files(tmp_path: Path) -> None:
    backend = byte_level(["<|endoftext|>"])
    (tmp_path / "whole").mkdir()
    backend.save(str(tmp_path / "whole" / "tokenizer.json"))
    (tmp_path / "pair").mkdir()
    backend.model.save(str(tmp_path / "pair"))
    assert {path.name for path in (tmp_path / "pair").iterdir()} == {"vocab.json", "merges.txt"}
    whole = load(tmp_path / "whole")
    for place in (tmp_path / "pair", tmp_path / "pair" / "vocab.json"):
        pair = load(place)
        assert pair.encode(TEXTS) == whole.encode(TEXTS)
        assert pair.fingerprint() == whole.fingerprint()
        assert (pair.eos_token_id, pair.bos_token_id) == (0, None)
        assert 0 not in pair.encode(["a<|endoftext|>b"])[0]
    (tmp_path / "pair" / "merges.txt").write_text("#version: 0.2\nqqq zzz\n")
    with pytest.raises(UserError, match=r"vocab\.json with .*merges\.txt is not the vocabulary of a byte-level BPE"):
        load(tmp_path / "pair")


def test_a_line_says_what_it_is(t5_kind: Path, llama_kind: Path) -> None:
    assert load(t5_kind).describe() == (
        f"{t5_kind}: unigram of {load(t5_kind).vocab_size} ids, encoded by sentencepiece; </s> ends each document"
    )
    assert (
        load(llama_kind)
        .describe()
        .endswith("encoded by sentencepiece; <s> begins each document and </s> ends each document")
    )
    assert load(llama_kind, bos=False, eos=False).describe().endswith("; nothing is added to documents")


# ---- bad places


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.model", b"", r"a\.model is not a sentencepiece model \(it is empty\)"),
        ("a.model", b"hello\n" * 9, r"a\.model is not a sentencepiece model"),
        ("a.model", b"IQ== 0\nIg== 1\n", r"a list of ranks of tiktoken.*tokenizer\.json of the same tokenizer"),
        ("a.model", b"version https://git-lfs.github.com/spec/v1\n", r"pointer of Git LFS"),
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\n", r"pointer of Git LFS"),
        ("tokenizer.json", b"", r"is not a tokenizer\.json.*it is empty"),
        ("tokenizer.json", b"<!doctype html>", r"it is a web page"),
        ("tokenizer.json", b"\xff\xfe", r"is not a tokenizer\.json"),
    ],
)
def test_files_that_are_none(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    for place in (tmp_path / name, tmp_path):
        with pytest.raises(UserError, match=says):
            load(place)


def test_folders_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("a\n")
    with pytest.raises(UserError, match=r"tokenizer\.json is missing.*it holds vocab\.txt.*fast tokenizer"):
        load(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json is missing"):
        load(tmp_path)
    for missing in (tmp_path / "tokenizer.json", tmp_path / "no.model", "no.model", "./none"):
        with pytest.raises(UserError, match="no such file or directory"):
            load_tokenizer(str(missing), "c4")
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(UserError, match=r"tokenizer_config\.json is not a JSON object"):
        load(tmp_path)


def test_the_home_folder(llama_kind: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(llama_kind.parent))
    name = f"~/{llama_kind.name}"
    assert load_tokenizer(name, "c4").vocab_size == load_tokenizer(f"{name}/tokenizer.model", "c4").vocab_size > 256


# ---- the hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Path | None, type[Exception]], None]:
    """Makes a folder the repository org/name; what it has not raises the given error."""
    import huggingface_hub

    def serve(folder: Path | None, error: type[Exception]) -> None:
        def download(name: str, file: str, **_: Any) -> str:
            if folder is None or not (folder / file).is_file():
                raise error.__new__(error)
            (tmp_path / "hub").mkdir(exist_ok=True)
            return shutil.copy(folder / file, tmp_path / "hub" / file)

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)

    return serve


def test_what_the_hub_has(hub: Any, t5_kind: Path, llama_kind: Path, tmp_path: Path) -> None:
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError

    hub(t5_kind, EntryNotFoundError)
    assert load_tokenizer("org/name", "c4").fingerprint() == load(t5_kind).fingerprint()
    shutil.rmtree(tmp_path / "hub")
    hub(llama_kind, EntryNotFoundError)
    assert load_tokenizer("org/name", "c4").fingerprint() == load(llama_kind).fingerprint()
    shutil.rmtree(tmp_path / "hub")
    (tmp_path / "pair").mkdir()
    byte_level(["<|endoftext|>"]).model.save(str(tmp_path / "pair"))
    hub(tmp_path / "pair", EntryNotFoundError)
    assert load_tokenizer("org/name", "c4").fingerprint() == load(tmp_path / "pair").fingerprint()
    hub(None, EntryNotFoundError)
    with pytest.raises(UserError, match=r"--tokenizer org/name: on the hub it has no tokenizer\.json"):
        load_tokenizer("org/name", "c4")
    hub(None, GatedRepoError)
    with pytest.raises(UserError, match=r"--tokenizer org/name: it is gated.*hf auth login"):
        load_tokenizer("org/name", "c4")


def test_what_serves_for_speed_may_be_missing_without_a_network(hub: Any, t5_kind: Path, tmp_path: Path) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    (tmp_path / "cached").mkdir()
    shutil.copy(t5_kind / "tokenizer.json", tmp_path / "cached")
    hub(tmp_path / "cached", LocalEntryNotFoundError)
    assert load_tokenizer("org/name", "c4").encoder == "tokenizers"
    hub(None, LocalEntryNotFoundError)
    with pytest.raises(UserError, match=r"--tokenizer org/name: .*could not be fetched"):
        load_tokenizer("org/name", "c4")
