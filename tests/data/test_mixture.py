"""Several sources with weights: their shares, the same order for any ranks, and what cannot be mixed."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peft_pretraining.data.batch import IGNORED_LABEL
from peft_pretraining.data.eval_set import build_eval_set
from peft_pretraining.data.mixed_order import MixedLogicalShard
from peft_pretraining.data.sources.documents import MemorySource, Share
from peft_pretraining.data.sources.kind import TextKind, TokenKind
from peft_pretraining.data.sources.local import LocalFiles
from peft_pretraining.data.sources.mixture import Mixture, split_mixture
from peft_pretraining.data.sources.registry import find_kind
from peft_pretraining.data.tokenizer import Tokenizer
from peft_pretraining.errors import UserError
from tests.data.collect import close, documents_of, global_rows, loaders, run
from tests.data.conftest import document


@pytest.fixture
def mixture() -> Mixture:
    """300 documents with three quarters of the rows, and 60 from number 1000 on with a quarter."""
    large = MemorySource("large", [document(i) for i in range(300)], shards=3)
    small = MemorySource("small", [document(i) for i in range(1000, 1060)])
    return Mixture("large:3,small:1", (Share(large, 3.0), Share(small, 1.0)))


def test_shares_are_exact(tokenizer: Tokenizer, mixture: Mixture) -> None:
    batches, _ = run(tokenizer, mixture, 40)
    rows = documents_of(tokenizer, batches)
    for logical_shard in range(8):
        for begin in range(0, 80, 20):
            small = sum(number >= 1000 for number in rows[logical_shard::8][begin : begin + 20])
            assert 3 <= small <= 7  # 5 of 20, but for the ends of the stretch
    assert abs(sum(number >= 1000 for number in rows) / len(rows) - 0.25) < 0.01


def test_each_source_is_read_once_an_epoch(tokenizer: Tokenizer, mixture: Mixture) -> None:
    batches, _ = run(tokenizer, mixture, 23)
    counts = Counter(documents_of(tokenizer, batches))
    assert max(count for number, count in counts.items() if number < 1000) == 1
    assert {number for number in counts if number >= 1000} == set(range(1000, 1060))


@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize("workers", [0, 3])
def test_any_ranks_and_workers(tokenizer: Tokenizer, mixture: Mixture, world_size: int, workers: int) -> None:
    one, state = run(tokenizer, mixture, 12, workers=1)
    other, other_state = run(tokenizer, mixture, 12, world_size, workers=workers, grad_accum_steps=1)
    assert torch.equal(torch.stack(one), torch.stack(other))
    assert state == other_state


@pytest.mark.parametrize("packing", ["pad", "pack"])
def test_resume_at_every_update(tokenizer: Tokenizer, mixture: Mixture, packing: str) -> None:
    whole, _ = run(tokenizer, mixture, 12, packing=packing, workers=0)
    batches, state = [], None
    for update in range(12):
        more, state = run(tokenizer, mixture, 1, (1, 2, 4)[update % 3], state, packing=packing, workers=update % 2)
        batches += more
    assert torch.equal(torch.stack(whole), torch.stack(batches))


def test_a_source_that_ended_is_no_longer_chosen(tokenizer: Tokenizer, mixture: Mixture) -> None:
    """No document twice and none lost with --repeat none, though the shares of both end at different times."""
    ranks = loaders(2, tokenizer=tokenizer, source=mixture, repeat="none")
    batches = global_rows(ranks, 40)
    assert all(loader.ended for loader in ranks)
    close(ranks)
    rows = torch.cat(batches)
    full = rows[(rows != IGNORED_LABEL).any(dim=1)]
    assert sorted(documents_of(tokenizer, [full])) == [*range(300), *range(1000, 1060)]


def test_a_second_reading_names_its_source(tokenizer: Tokenizer, mixture: Mixture) -> None:
    (loader,) = loaders(1, tokenizer=tokenizer, source=mixture)
    global_rows([loader], 23)
    close([loader])
    assert len(loader.notices) == 1 and loader.notices[0].startswith("--dataset small: ")


def test_each_source_has_its_share_of_the_evaluation(tokenizer: Tokenizer, mixture: Mixture) -> None:
    arguments: dict[str, Any] = {"dataset": "m", "tokenizer": tokenizer, "packing": "pad", "max_length": 48}
    eval_set = build_eval_set(**arguments, eval_batch_size=4, eval_tokens=1000, source=mixture)
    rows = [row for _, batch in eval_set for row in batch.labels]
    numbers = documents_of(tokenizer, [torch.stack(rows)])
    targets = [int((row != IGNORED_LABEL).sum()) - 1 for row in rows]
    small = sum(count for number, count in zip(numbers, targets, strict=True) if number >= 1000)
    assert 1000 <= sum(targets) < 1048 and 200 < small <= 250 + 48
    whole = build_eval_set(**arguments, eval_batch_size=4, eval_tokens=0, source=mixture)
    assert sum(len(batch.labels) for _, batch in whole) == 360


def test_weights_are_part_of_the_order(tokenizer: Tokenizer, mixture: Mixture) -> None:
    _, state = run(tokenizer, mixture, 1)
    other = Mixture("other", (mixture.shares[0], Share(mixture.shares[1].source, 2.0)))
    with pytest.raises(UserError, match="--dataset is"):
        run(tokenizer, other, 1, state=state)


def test_a_mixture_is_recognised_by_its_weights(tmp_path: Path) -> None:
    (tmp_path / "a,b:0.5").touch()
    (tmp_path / "x,y").mkdir()
    assert split_mixture("c4:0.7,pydocs:0.3") == [("c4", 0.7), ("pydocs", 0.3)]
    assert split_mixture(f"{tmp_path}/x,y:2,pydocs:1e-1") == [(f"{tmp_path}/x,y", 2.0), ("pydocs", 0.1)]
    assert isinstance(find_kind("c4:7,pydocs:3"), TextKind) and find_kind("c4:7,pydocs:3").needs_network
    assert not find_kind("pydocs:3").needs_network
    assert isinstance(find_kind(f"{tmp_path}/a,b:0.5"), LocalFiles)  # a file that exists is no mixture


@pytest.mark.parametrize(
    ("dataset", "message"),
    [("c4,pydocs:1", "c4 has no weight"), ("c4:1,pydocs", "pydocs has no weight"), ("c4:1,", "empty part has no"),
     ("c4:x,pydocs:1", "c4:x has no weight"), ("c4:0,pydocs:1", "the weight 0 of c4 is not a positive number"),
     ("c4:-1,pydocs:1", "the weight -1 of c4"), ("c4:nan,pydocs:1", "the weight nan of c4"),
     ("c4:inf,pydocs:1", "the weight inf of c4"), (":1,c4:1", "names no source"),
     ("c4:1,c4:2", "names c4 twice.*sum of its weights"), ("c4:1,./nowhere:1", "--dataset ./nowhere is neither")],
)  # fmt: skip
def test_what_is_no_mixture_is_refused(dataset: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_kind(dataset)


def test_token_ids_mix_with_token_ids_only(tmp_path: Path) -> None:
    for name, first in (("a", 0), ("b", 5000)):
        (tmp_path / name).mkdir()
        for split, count in (("train", 2000), ("validation", 100)):
            np.arange(first, first + count, dtype="<u2").tofile(tmp_path / name / f"{split}.uint16")
    with pytest.raises(UserError, match=r"/a holds token ids and pydocs holds text, which cannot be mixed"):
        find_kind(f"{tmp_path}/a:1,pydocs:1")
    with pytest.raises(UserError, match="which are the same, twice"):
        find_kind(f"{tmp_path}/a:1,{tmp_path}/b/../a:1")
    dataset = f"{tmp_path}/a:3,{tmp_path}/b:1"
    assert isinstance(find_kind(dataset), TokenKind)
    arguments: dict[str, Any] = {"dataset": dataset, "tokenizer": None, "max_length": 8}
    ranks = loaders(1, **arguments)
    one = torch.cat(global_rows(ranks, 20))
    close(ranks)
    assert (one.diff(dim=1) == 1).all() and int((one[:, 0] >= 5000).sum()) == pytest.approx(80, abs=4)
    ranks = loaders(4, **arguments)
    assert torch.equal(torch.cat(global_rows(ranks, 20)), one)
    close(ranks)
    ranks = loaders(1, **arguments, repeat="none")
    rows = torch.cat(global_rows(ranks, 35))
    assert ranks[0].ended
    assert len({int(row[0]) for row in rows if row[0] != IGNORED_LABEL}) == 500
    close(ranks)


def test_a_share_of_a_third() -> None:
    class Endless:
        ended = False

        def __init__(self, number: int) -> None:
            self.number = number

        def take(self, rows: int) -> Any:
            return np.full((rows, 2), self.number, np.int32), np.full(rows, 2)

        def state(self) -> dict[str, int]:
            return {}

    logical_shard = MixedLogicalShard([Endless(i) for i in range(3)], [1.0, 1.0, 1.0], index=5, seed=7)
    rows, _ = logical_shard.take(3000)
    assert all(abs(int((rows[:, 0] == i).sum()) - 1000) <= 3 for i in range(3))
