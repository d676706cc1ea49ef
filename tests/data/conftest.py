"""A tokenizer and documents that are small and tell which document a row came from."""

import gzip
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend

from peft_pretraining.data.sources.documents import MemorySource
from peft_pretraining.data.tokenizer import Tokenizer
from peft_pretraining.data.tokenizers.encoders import TokenizersEncoder
from peft_pretraining.data.tokenizers.training import train_bpe

Documents = list[str]


def document(number: int) -> str:
    """Text of a length between 5 and about 25 words that begins with its number."""
    return f"document {number}: " + " ".join(f"word{(number * 7 + i) % 50}" for i in range(3 + number * 5 % 23))


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Byte-level BPE trained on the documents below."""
    backend = Backend.from_str(train_bpe([document(i) for i in range(200)], 400))
    return Tokenizer([TokenizersEncoder(backend)], "test")


@pytest.fixture
def source() -> MemorySource:
    """311 documents in 3 shards: a prime number, so that nothing divides evenly."""
    return MemorySource("memory", [document(i) for i in range(311)], shards=3)


@pytest.fixture
def c4_dir(tmp_path: Path) -> Path:
    """A directory in C4's layout: 6 train shards of 20 to 45 documents, 2 validation shards of 15."""
    folder = tmp_path / "c4" / "en"
    folder.mkdir(parents=True)
    number = 0
    for split, shards in (("train", 6), ("validation", 2)):
        for shard in range(shards):
            count = 15 if split == "validation" else 20 + 5 * shard
            write_shard(folder / f"c4-{split}.{shard:05d}-of-{shards:05d}.json.gz", range(number, number + count))
            number += count
    return folder.parent


def write_shard(path: Path, numbers: range) -> None:
    """A shard with the documents of these numbers, in C4's schema."""
    lines = (
        json.dumps({"text": document(i), "timestamp": "2019-04-25", "url": f"https://example.org/{i}"}) for i in numbers
    )
    path.write_bytes(gzip.compress("".join(line + "\n" for line in lines).encode(), mtime=0))
