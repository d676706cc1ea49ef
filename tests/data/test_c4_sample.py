"""The real C4 documents and the real T5 tokenizer."""

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from peft_pretraining.data.batch import IGNORED_LABEL
from peft_pretraining.data.dealing import deal_units, even_slices
from peft_pretraining.data.eval_set import build_eval_set
from peft_pretraining.data.sources.registry import open_dataset
from peft_pretraining.data.tokenizer import Tokenizer, load_tokenizer
from peft_pretraining.data.train_loader import merge_states
from tests.data.collect import close, global_rows, loaders


@pytest.fixture(scope="module")
def t5(shared_data: Path) -> Tokenizer:
    return load_tokenizer(str(shared_data / "tokenizers" / "t5"), "c4")


@pytest.fixture(scope="module")
def texts(shared_data: Path) -> list[str]:
    files = sorted((shared_data / "c4-sample" / "en").glob("*train*"))
    return [json.loads(line)["text"] for file in files for line in gzip.open(file)]


def test_t5(t5: Tokenizer) -> None:
    assert (t5.vocab_size, t5.eos_token_id, t5.pad_token_id) == (32000, 1, 0)
    (ids,) = t5.encode(["mind the <extra_id_0> and </s>"])
    assert max(ids) < 32000
    assert 1 not in ids


def test_rows_are_those_of_transformers(shared_data: Path, t5: Tokenizer, texts: list[str]) -> None:
    """The official code's call: tokenizer(text, max_length=..., truncation=True), which ends in </s>."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(str(shared_data / "tokenizers" / "t5"))
    expected = theirs(texts[:400], max_length=256, truncation=True)["input_ids"]
    ours = [[*ids, t5.eos_token_id] for ids in t5.encode_beginnings(texts[:400], 255)]
    assert ours == expected


def test_sentencepiece_gives_the_ids_of_tokenizers(shared_data: Path, t5: Tokenizer, texts: list[str]) -> None:
    """But for a few documents in a thousand, in which two ways to cut a word have equal scores."""
    slow = load_tokenizer(str(shared_data / "tokenizers" / "t5"), "c4", encoder="tokenizers")
    assert (t5.encoder, slow.encoder) == ("sentencepiece", "tokenizers")
    assert slow.fingerprint() == "f808d3a41e804ade", "checkpoints of older versions have this one"
    differing = [
        (text, ids, theirs)
        for text, ids, theirs in zip(texts[:700], t5.encode(texts[:700]), slow.encode(texts[:700]), strict=True)
        if ids != theirs
    ]
    assert len(differing) <= 2
    assert all(t5.decode([ids]) == t5.decode([theirs]) for _, ids, theirs in differing)


def test_every_real_document_is_read_over_a_resume_on_more_ranks(shared_data: Path, t5: Tokenizer) -> None:
    dataset = str(shared_data / "c4-sample")
    arguments = {"tokenizer": t5, "dataset": dataset, "max_length": 64, "data_lanes": 16, "shuffle_buffer": 8}
    ranks = loaders(1, global_batch=128, **arguments)
    batches = global_rows(ranks, 5)
    state = merge_states([loader.state_dict() for loader in ranks])
    close(ranks)
    ranks = loaders(2, global_batch=128, **arguments)
    for loader in ranks:
        loader.load_state_dict(state)
    batches += global_rows(ranks, 7)
    close(ranks)
    rows = torch.cat(batches).tolist()
    source = open_dataset(dataset, "train")
    finished = 0
    for logical_shard, units in enumerate(deal_units([even_slices(source.shards, 16)] * source.shards, 16, seed=3)):
        texts = [str(text) for unit in units for text in source.read(unit.shard, unit.slices, unit.part, 0)]
        expected = [[*ids, t5.eos_token_id] for ids in t5.encode_beginnings(texts, 63)]
        epoch = [[i for i in row if i != IGNORED_LABEL] for row in rows[logical_shard::16][: len(expected)]]
        if len(epoch) == len(expected):
            finished += 1
            assert sorted(epoch) == sorted(expected)
        assert not Counter(map(tuple, epoch)) - Counter(map(tuple, expected))
    assert finished >= 8


def test_validation_tokens(shared_data: Path, t5: Tokenizer) -> None:
    eval_set = build_eval_set(
        dataset=str(shared_data / "c4-sample"), tokenizer=t5, packing="pack", max_length=256, eval_batch_size=16,
        eval_tokens=0,
    )  # fmt: skip
    labels = torch.cat([batch.labels.flatten() for _, batch in eval_set])
    assert int((labels != IGNORED_LABEL).sum()) == pytest.approx(597_450, rel=1e-4)
    assert np.unique(labels.numpy())[-1] < 32000
