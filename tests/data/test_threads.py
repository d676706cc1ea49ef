"""The loader's threads: errors come out, memory is bounded, no thread outlives its loader or holds up the exit."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from peft_pretraining.data.sources.documents import Damage, MemorySource
from peft_pretraining.data.tokenizer import Tokenizer
from peft_pretraining.data.train_loader import PREFETCHED_UPDATES
from peft_pretraining.errors import UserError
from tests.data.collect import close, loaders


class CountingSource(MemorySource):
    """Counts what is read, and fails at a document if told to."""

    read_count = 0
    fail_after = 10**9

    def read(self, shard: int, slices: int, part: int, start: int) -> Iterator[str | Damage]:
        for text in super().read(shard, slices, part, start):
            CountingSource.read_count += 1
            if CountingSource.read_count > self.fail_after:
                raise UserError("the disk is gone")
            yield text


@pytest.fixture
def counting(source: MemorySource) -> CountingSource:
    CountingSource.read_count = 0
    return CountingSource("counting", source.documents, 3)


def test_prefetching_is_bounded(tokenizer: Tokenizer, counting: CountingSource) -> None:
    (loader,) = loaders(1, tokenizer=tokenizer, source=counting, shuffle_buffer=1)
    CountingSource.read_count = 0  # the beginnings of the shards were looked at
    loader.next_update()
    time.sleep(0.5)
    # The updates ahead, and in each of 8 logical shards up to one document more for the block.
    assert CountingSource.read_count <= 16 * (PREFETCHED_UPDATES + 1) + 8
    assert loader.wait_seconds > 0
    waited = loader.wait_seconds
    loader.next_update()
    assert loader.wait_seconds - waited < 0.25
    close([loader])


def test_an_error_in_a_thread_comes_out_and_comes_out_again(tokenizer: Tokenizer, counting: CountingSource) -> None:
    (loader,) = loaders(1, tokenizer=tokenizer, source=counting)
    object.__setattr__(counting, "fail_after", CountingSource.read_count + 100)
    with pytest.raises(UserError, match="the disk is gone"):
        for _ in range(20):
            loader.next_update()
    with pytest.raises(UserError, match="the disk is gone"):
        loader.next_update()
    close([loader])


def test_close_ends_the_threads(tokenizer: Tokenizer, source: MemorySource) -> None:
    before = threading.active_count()
    (loader,) = loaders(1, tokenizer=tokenizer, source=source, workers=4)
    loader.next_update()
    assert threading.active_count() == before + 4
    loader.close()
    loader.close()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="the loader is closed"):
        for _ in range(PREFETCHED_UPDATES + 2):
            loader.next_update()


def test_loading_after_reading_is_a_mistake(tokenizer: Tokenizer, source: MemorySource) -> None:
    (loader,) = loaders(1, tokenizer=tokenizer, source=source)
    loader.next_update()
    with pytest.raises(RuntimeError, match="before the first"):
        loader.load_state_dict(loader.state_dict())
    loader.close()


@pytest.mark.parametrize("ending", ["pass", "raise SystemExit(0)"])
def test_a_program_that_forgets_to_close_ends_at_once(
    root: Path, c4_dir: Path, tokenizer: Tokenizer, ending: str
) -> None:
    tokenizer.save(c4_dir / "tokenizer.json")
    program = f"""
from peft_pretraining.data.train_loader import build_train_loader
from peft_pretraining.data.tokenizer import load_tokenizer
loader = build_train_loader(dataset={str(c4_dir)!r}, tokenizer=load_tokenizer({str(c4_dir)!r}, "c4"), packing="pack",
    max_length=64, batch_size=64, grad_accum_steps=1, seed=0, data_lanes=8, workers=4)
loader.next_update()
print("read", flush=True)
{ending}
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "read\n", "")
