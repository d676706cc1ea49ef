"""The description of a run's data in its first lines."""

from pathlib import Path

import datasets
import pytest

from peft_pretraining.data.held_out import open_splits
from peft_pretraining.data.sources.documents import MemorySource
from peft_pretraining.data.sources.kind import DEFAULT_OPTIONS, Splits
from peft_pretraining.data.summary import describe_data, describe_losses
from peft_pretraining.data.tokenizer import Tokenizer, load_tokenizer
from tests.data.conftest import document
from tests.data.files import write_texts
from tests.data.small_tokenizers import write_model, write_unigram_json


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QGALORE_CACHE", str(tmp_path / "cache"))


def lines_of(dataset: str, tokenizer: Tokenizer, packing: str = "pack") -> list[str]:
    return describe_data(open_splits(dataset, DEFAULT_OPTIONS), tokenizer, packing, 32)


def test_files_and_splits(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = [document(i) for i in range(400)]
    folder = tmp_path / "own"
    folder.mkdir()
    write_texts(folder / "a.jsonl.gz", texts[:200], column="body")
    write_texts(folder / "b.jsonl.gz", texts[200:], column="body")
    train, validation = lines_of(str(folder), tokenizer)
    assert train.startswith(f"training on {folder}: 2 files (.jsonl.gz, ") and "kB), field body" in train
    assert train.endswith(", without the documents held out")
    assert validation == "validation on 40 documents of it, held out by a hash of their content"
    write_texts(folder / "validation.jsonl", texts[:3], column="body")
    train, validation = lines_of(str(folder), tokenizer)
    assert validation.startswith(f"validation on {folder}: 1 file (.jsonl, ")
    assert "held out" not in train


def test_shares_and_other_kinds(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.txt").write_text("".join(f"{document(i)}\n" for i in range(90)))
    datasets.Dataset.from_dict({"text": [document(i) for i in range(90, 180)]}).save_to_disk(tmp_path / "saved")
    mixture = f"{tmp_path}/books:3,{tmp_path}/saved:1"
    train, validation = lines_of(mixture, tokenizer)
    assert f"{tmp_path}/books: 1 file (.txt, " in train and "a document a line" in train
    assert f"(75.0% of the rows); {tmp_path}/saved: 90 rows as save_to_disk wrote them" in train and train.endswith(
        "(25.0% of the rows)"
    )
    assert validation.startswith("validation on 9 documents of it, held out") and validation.count("% of the rows") == 2


def test_what_rows_and_tokenizer_lose(tokenizer: Tokenizer) -> None:
    texts = [document(0)] * 9 + ["word1 word2 " * 40_000]
    cut, _ = describe_losses([(texts, 1)], tokenizer, "pad", 32)  # nine are short: see below
    assert "cut at 32 tokens (--packing pad): of the first documents about 100% of the text is" in cut
    assert "--packing pack" in cut
    little, _ = describe_losses([(texts, 0.1), (texts[:9], 0.9)], tokenizer, "pad", 32)
    assert "about 10% of the text" in little
    assert describe_losses([(texts, 1)], tokenizer, "pack", 32) == []
    assert not [text for text in describe_losses([(texts[:9], 1)], tokenizer, "pad", 64) if "cut" in text]
    assert describe_losses([([], 1)], tokenizer, "pad", 64) == []
    behind_blank_lines = Splits(MemorySource("m", [*[""] * 200, *texts]), None)
    assert describe_data(behind_blank_lines, tokenizer, "pad", 32)[2] == cut
    whole = Splits(MemorySource("m", texts), MemorySource("m", texts[:2]))
    assert describe_data(whole, tokenizer, "pad", 32)[2] == cut


def test_padding_of_short_documents_is_said(tokenizer: Tokenizer) -> None:
    """A document takes a quarter of its row, with the token of its end."""
    short = document(0)
    tokens = len(tokenizer.encode([short])[0]) + 1
    length = 4 * tokens
    (line,) = describe_losses([([short] * 9, 1)], tokenizer, "pad", length)
    assert f"padded to {length} tokens (--packing pad): of the first documents about 75% of the positions" in line
    assert "--packing pack has none" in line
    (mixed,) = describe_losses([([short] * 9, 0.6), ([short * 40], 0.4)], tokenizer, "pad", length)[1:]
    assert "about 45% of the positions" in mixed
    assert describe_losses([([short] * 9, 1)], tokenizer, "pack", length) == []
    assert describe_losses([([short] * 9, 1)], tokenizer, "pad", tokens * 3 // 2) == []


def test_unknown_text_is_a_warning(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> None:
    known, unknown = tokenizer.encode(["word1", "word2"])
    monkeypatch.setattr(tokenizer, "unk_token_id", unknown[-1])
    (warning,) = describe_losses([(["word2", *["word1"] * 9], 1)], tokenizer, "pack", 32)
    share = 1 / (len(unknown) + 9 * len(known)) * unknown.count(unknown[-1])
    if unknown[-1] in known:
        pytest.fail("the test needs two words with different ends")
    assert warning.startswith(f"warning: {share:.1%} of the tokens of the first documents are unknown")
    assert "--tokenizer train:32000" in warning
    assert describe_losses([(["word1"], 1)], tokenizer, "pack", 32) == []


@pytest.mark.parametrize("files", [("tokenizer.json",), ("spiece.model",)])
def test_the_unknown_piece_is_found_in_a_tokenizers_files(tmp_path: Path, files: tuple[str, ...]) -> None:
    model = write_model(tmp_path, "unigram", "spiece.model")
    write_unigram_json(model, tmp_path / "tokenizer.json")
    for other in {"tokenizer.json", "spiece.model"} - set(files):
        (tmp_path / other).unlink()
    read = load_tokenizer(str(tmp_path), "c4")
    assert read.unk_token_id == 2 and read.unk_token_id in read.encode(["北京"])[0]
    (warning,) = describe_losses([(["北京 ☃"], 1)], read, "pack", 32)
    assert "are unknown to the tokenizer" in warning
