"""Validation: the same batches for any number of ranks, in the order of the files, capped."""

from pathlib import Path
from typing import Any

import pytest
import torch

from peft_pretraining.data.batch import IGNORED_LABEL, MicroBatch
from peft_pretraining.data.eval_set import build_eval_set
from peft_pretraining.data.sources.documents import MemorySource
from peft_pretraining.data.tokenizer import Tokenizer
from peft_pretraining.errors import UserError
from tests.data.collect import close, documents_of, global_rows, loaders


def batches(tokenizer: Tokenizer, world_size: int = 1, **arguments: Any) -> dict[int, MicroBatch]:
    """All batches by number, of all ranks."""
    merged: dict[int, MicroBatch] = {}
    defaults = {"dataset": "test", "packing": "pad", "max_length": 48, "eval_batch_size": 4, "eval_tokens": 0}
    for rank in range(world_size):
        own = list(build_eval_set(tokenizer=tokenizer, rank=rank, world_size=world_size, **(defaults | arguments)))
        assert all(number % world_size == rank for number, _ in own)
        merged.update(own)
    return dict(sorted(merged.items()))


@pytest.mark.parametrize("packing", ["pad", "pack"])
@pytest.mark.parametrize("eval_tokens", [0, 300])
def test_any_number_of_ranks(tokenizer: Tokenizer, c4_dir: Path, packing: str, eval_tokens: int) -> None:
    arguments = {"dataset": str(c4_dir), "packing": packing, "eval_tokens": eval_tokens}
    one = batches(tokenizer, 1, **arguments)
    for world_size in (2, 3, 16):
        several = batches(tokenizer, world_size, **arguments)
        assert list(several) == list(one) == list(range(len(one)))
        assert all(torch.equal(several[k].labels, one[k].labels) for k in one)
    targets = sum(batch.target_tokens for batch in one.values())
    assert targets == sum(int((batch.labels[:, 1:] != IGNORED_LABEL).sum()) for batch in one.values())
    if eval_tokens:
        assert eval_tokens <= targets < eval_tokens + 48


def test_order_labels_and_the_last_batch(tokenizer: Tokenizer, c4_dir: Path) -> None:
    all_batches = list(batches(tokenizer, dataset=str(c4_dir)).values())
    assert documents_of(tokenizer, [batch.labels for batch in all_batches]) == list(range(195, 225))
    assert [len(batch.input_ids) for batch in all_batches] == [4] * 7 + [2]
    for batch in all_batches:
        padding = batch.labels == IGNORED_LABEL
        assert torch.equal(batch.input_ids[~padding], batch.labels[~padding])
        assert (batch.input_ids[padding] == tokenizer.pad_token_id).all()
        assert (padding[:, 1:] >= padding[:, :-1]).all()  # on the right only
        ends = (~padding).sum(dim=1) - 1
        assert (batch.input_ids.gather(1, ends[:, None]) == tokenizer.eos_token_id).all()


def test_a_second_pass_is_the_first_and_reads_nothing(tokenizer: Tokenizer) -> None:
    source = MemorySource("memory", ["one two three", "four five"])
    arguments: dict[str, Any] = {"packing": "pad", "max_length": 16, "eval_batch_size": 2, "eval_tokens": 0}
    eval_set = build_eval_set(dataset="test", tokenizer=tokenizer, source=source, **arguments)
    first = list(eval_set)
    source.documents.clear()
    second = list(eval_set)
    assert torch.equal(first[0][1].labels, second[0][1].labels)


def test_empty_validation(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="validation set is empty"):
        batches(tokenizer, source=MemorySource("memory", [" "]))


def test_long_documents_are_cut(tokenizer: Tokenizer) -> None:
    text = "word " * 500
    (batch,) = batches(tokenizer, source=MemorySource("memory", [text])).values()
    (whole,) = tokenizer.encode([text])
    assert batch.input_ids[0].tolist() == [*whole[:47], tokenizer.eos_token_id]
    packed = batches(tokenizer, source=MemorySource("memory", [text]), packing="pack")
    flat = [i for b in packed.values() for i in b.labels.flatten().tolist() if i != IGNORED_LABEL]
    assert flat == [*whole, tokenizer.eos_token_id]


@pytest.mark.parametrize("packing", ["pad", "pack"])
def test_a_document_without_tokens_is_no_row(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, packing: str
) -> None:
    encode = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, texts: encode(self, [t.replace("\u200b", "") for t in texts]))
    texts = ["\u200b\u200b", "one two three", "\u200b", "four five"]
    expected = batches(tokenizer, source=MemorySource("memory", texts[1::2]), packing=packing)
    found = batches(tokenizer, source=MemorySource("memory", texts), packing=packing)
    assert [batch.labels.tolist() for batch in found.values()] == [batch.labels.tolist() for batch in expected.values()]
    with pytest.raises(UserError, match="validation set is empty"):
        batches(tokenizer, source=MemorySource("memory", texts[::2]), packing=packing)


def test_documents_held_out_are_the_validation_set(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a kind has no validation split, for any number of ranks, and in a mixture for each part."""
    from peft_pretraining.data.sources.local import LocalFiles
    from tests.data.conftest import write_shard

    monkeypatch.setenv("QGALORE_CACHE", str(tmp_path / "cache"))
    whole = LocalFiles.open
    monkeypatch.setattr(LocalFiles, "open", lambda *a: None if a[2] == "validation" else whole(*a))
    for name, first in (("one", 0), ("two", 5000)):
        (tmp_path / name).mkdir()
        write_shard(tmp_path / name / "c4-train.00000-of-00001.json.gz", range(first, first + 100))
    single = batches(tokenizer, dataset=str(tmp_path / "one"))
    assert len(torch.cat([batch.labels for batch in single.values()])) == 10
    several = batches(tokenizer, 2, dataset=str(tmp_path / "one"))
    assert all(torch.equal(several[k].labels, single[k].labels) for k in single)
    held_out = set(documents_of(tokenizer, [batch.labels for batch in single.values()]))
    ranks = loaders(2, dataset=str(tmp_path / "one"), tokenizer=tokenizer)
    assert set(documents_of(tokenizer, global_rows(ranks, 20))) == set(range(100)) - held_out
    close(ranks)
    mixed = batches(tokenizer, dataset=f"{tmp_path}/one:1,{tmp_path}/two:1")
    numbers = documents_of(tokenizer, [batch.labels for batch in mixed.values()])
    assert len(numbers) == 20 and set(numbers[:10]) == held_out and min(numbers[10:]) >= 5000
