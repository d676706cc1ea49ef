"""Damaged lines and files are counted and skipped up to a limit, and named past it."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from peft_pretraining.data.eval_set import build_eval_set
from peft_pretraining.data.sources import compression
from peft_pretraining.data.sources.documents import Damage
from peft_pretraining.data.sources.registry import open_dataset
from peft_pretraining.data.tokenizer import Tokenizer
from peft_pretraining.errors import UserError
from tests.data.collect import close, documents_of, global_rows, loaders
from tests.data.conftest import document
from tests.small_run import environment

FIRST = "en/c4-train.00000-of-00006.json.gz"  # documents 0 to 19
LAST = "en/c4-train.00005-of-00006.json.gz"  # documents 150 to 194


def epoch(tokenizer: Tokenizer, folder: Path, limit: int = 100) -> tuple[set[int], int]:
    """(documents that were read in more than one epoch, damages)."""
    ranks = loaders(1, tokenizer=tokenizer, dataset=str(folder), damaged_limit=limit, data_lanes=2)
    try:
        numbers = set(documents_of(tokenizer, global_rows(ranks, 40)))
        return numbers, ranks[0].damaged
    finally:
        close(ranks)


def test_an_undamaged_directory(tokenizer: Tokenizer, c4_dir: Path) -> None:
    assert epoch(tokenizer, c4_dir, limit=0) == (set(range(195)), 0)
    assert epoch(tokenizer, c4_dir / "en", limit=0) == (set(range(195)), 0)


def test_damaged_lines(tokenizer: Tokenizer, c4_dir: Path) -> None:
    lines = [json.dumps({"text": document(i)}) for i in range(20)]
    lines[3] = '{"text": "cut of'
    lines[7] = '{"no_text": 1}'
    lines[8] = "[]"
    lines[9] = '{"text": 5}'
    lines[19] = "\x00\xff"
    (c4_dir / FIRST).write_bytes(gzip.compress("\n".join(lines).encode("latin-1")))
    assert epoch(tokenizer, c4_dir) == (set(range(195)) - {3, 7, 8, 9, 19}, 5)
    with pytest.raises(
        UserError, match=r"more than 4 damaged places.*c4-train.00000-of-00006.json.gz.*Replace the damaged files"
    ):
        epoch(tokenizer, c4_dir, limit=4)


def test_nothing_is_no_damage(tokenizer: Tokenizer, c4_dir: Path) -> None:
    lines = [json.dumps({"text": document(i)}) for i in range(20)]
    lines[3:9] = ["", " ", '{"text": null}', '{"text": ""}', '{"text": " \\n"}', "\r"]
    (c4_dir / FIRST).write_bytes(gzip.compress("\n".join(lines).encode()))
    assert epoch(tokenizer, c4_dir, limit=0) == (set(range(195)) - set(range(3, 9)), 0)


def test_a_file_that_is_something_else_is_named(tokenizer: Tokenizer, c4_dir: Path) -> None:
    (c4_dir / LAST).write_bytes(b"no gzip at all")
    with pytest.raises(UserError, match=r"c4-train.00005-of-00006.json.gz is plain text, not compressed with gzip"):
        epoch(tokenizer, c4_dir)


def test_a_truncated_file_is_one_damage(tokenizer: Tokenizer, c4_dir: Path) -> None:
    whole = (c4_dir / LAST).read_bytes()
    (c4_dir / LAST).write_bytes(whole[: len(whole) * 2 // 3])
    numbers, damaged = epoch(tokenizer, c4_dir)
    assert damaged == 1
    lost = set(range(195)) - numbers
    assert lost == set(range(min(lost), 195))
    assert 150 < min(lost) < 195


@pytest.mark.parametrize("content", [gzip.compress(b"", mtime=0)[:5], b"\x1f\x8b" + bytes(100)])
def test_a_file_that_cannot_be_decompressed_is_one_damage(tokenizer: Tokenizer, c4_dir: Path, content: bytes) -> None:
    (c4_dir / LAST).write_bytes(content)
    assert epoch(tokenizer, c4_dir) == (set(range(150)), 1)


def test_an_empty_file_and_several_members(tokenizer: Tokenizer, c4_dir: Path) -> None:
    """Concatenated gzip files are a gzip file, and zeros may fill up its end."""
    (c4_dir / LAST).write_bytes(b"")
    parts = [gzip.compress(json.dumps({"text": document(i)}).encode() + b"\n") for i in range(20)]
    (c4_dir / FIRST).write_bytes(b"".join(parts) + bytes(512))
    assert epoch(tokenizer, c4_dir, limit=0) == (set(range(150)), 0)


def test_a_flipped_byte(tokenizer: Tokenizer, c4_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compression, "_PIECE_BYTES", 32)
    content = bytearray((c4_dir / LAST).read_bytes())
    content[-6] ^= 1  # in the checksum
    (c4_dir / LAST).write_bytes(content)
    numbers, damaged = epoch(tokenizer, c4_dir)
    assert damaged == 1
    assert numbers >= set(range(185))


def test_damage_is_counted_once_over_a_resume(tokenizer: Tokenizer, c4_dir: Path) -> None:
    whole = (c4_dir / LAST).read_bytes()
    (c4_dir / LAST).write_bytes(whole[: len(whole) * 2 // 3])
    (c4_dir / FIRST).write_bytes(gzip.compress(b"oops\n" * 3 + json.dumps({"text": document(3)}).encode()))
    state = None
    for updates in (3, 5, 30):
        ranks = loaders(1, tokenizer=tokenizer, dataset=str(c4_dir), data_lanes=2)
        if state:
            ranks[0].load_state_dict(state)
        global_rows(ranks, updates)
        state = ranks[0].state_dict()
        damaged = ranks[0].damaged
        close(ranks)
    assert damaged == 4


def test_a_part_begins_where_it_is_told(c4_dir: Path) -> None:
    source = open_dataset(str(c4_dir), "train")
    documents = list(source.read(5, 1, 0, 0))
    assert documents == [document(i) for i in range(150, 195)]
    for slices in (1, 2, 7):
        for part in range(slices):
            for start in (0, 1, 5, 100):
                assert list(source.read(5, slices, part, start)) == documents[part::slices][start:]


def test_validation_stops_at_the_limit(tokenizer: Tokenizer, c4_dir: Path) -> None:
    line = json.dumps({"text": document(3)}).encode()
    (c4_dir / "en/c4-validation.00000-of-00002.json.gz").write_bytes(gzip.compress(b"x\n" * 6 + line))
    arguments = {"dataset": str(c4_dir), "tokenizer": tokenizer, "packing": "pad", "max_length": 32, "eval_tokens": 0}
    assert len(list(build_eval_set(**arguments, eval_batch_size=5, damaged_limit=6))) == 4
    with pytest.raises(UserError, match="more than 5 damaged"):
        list(build_eval_set(**arguments, eval_batch_size=5, damaged_limit=5))


def test_half_a_surrogate_pair_is_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "c4-train.00000-of-00001.json.gz").write_bytes(gzip.compress(b'{"text": "half \\ud83d of a pair"}\n'))
    (text,) = open_dataset(str(tmp_path), "train").read(0, 1, 0, 0)
    assert not isinstance(text, Damage)
    assert tokenizer.decode(tokenizer.encode([text])) == ["half ? of a pair"]


def test_missing_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--dataset /no/such/place is neither c4 nor pydocs nor a file or folder"):
        open_dataset("/no/such/place", "train")
    with pytest.raises(UserError, match=r"there is no file of text in this folder"):
        open_dataset(str(tmp_path), "validation")


def test_a_package_that_is_missing_is_no_damage(c4_dir: Path) -> None:
    """As where torch and transformers alone are installed: no file is skipped for it."""
    program = f"""
import sys
sys.modules["datasets"] = None
from peft_pretraining.data.sources.registry import open_dataset
from peft_pretraining.runtime.process import exit_code_of
sys.exit(exit_code_of(lambda: next(open_dataset({str(c4_dir)!r}, "train").read(0, 1, 0, 0)), "run_pretrain.py"))
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    sentence = "needs the package datasets, which is not installed: pip install 'qgalore[train]'"
    assert done.stderr.splitlines()[-1] == f"run_pretrain.py: {sentence}"
