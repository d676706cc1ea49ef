"""The global order: each document once an epoch, the same for any number of ranks, workers and stops."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from peft_pretraining.data.batch import IGNORED_LABEL
from peft_pretraining.data.dealing import POOLED, DealtSource, Unit, cut_shards, deal_units, even_slices
from peft_pretraining.data.order import DamageCount, LogicalShardOrder, RowFormat, TextLogicalShard
from peft_pretraining.data.sources.documents import Damage, Files, MemorySource
from peft_pretraining.data.tokenizer import Tokenizer
from peft_pretraining.errors import UserError
from tests.data.collect import close, documents_of, global_rows, loaders, run
from tests.data.conftest import document

DOCUMENTS = 311


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_document_is_read_once_an_epoch(tokenizer: Tokenizer, source: MemorySource, world_size: int) -> None:
    # 311 documents in 8 logical shards: a logical shard of 38 or 39. 38 rounds of 8 are 19 updates of 16.
    batches, _ = run(tokenizer, source, 19, world_size)
    first = Counter(documents_of(tokenizer, batches))
    assert max(first.values()) == 1
    assert len(first) == 304
    batches, _ = run(tokenizer, source, 39, world_size)
    counts = Counter(documents_of(tokenizer, batches))
    assert set(counts) == set(range(DOCUMENTS))
    assert max(counts.values()) <= 3
    # Logical shard by logical shard: each finishes its documents before it begins again.
    rows = documents_of(tokenizer, batches)
    for logical_shard in range(8):
        own = rows[logical_shard::8]
        size = len(set(own))
        assert size in (38, 39)
        assert len(set(own[:size])) == size
        assert set(own[size : 2 * size]) <= set(own[:size])
        assert own[size : size + 8] != own[:8]


@pytest.mark.parametrize("packing", ["pad", "pack"])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (1, 4), (4, 2)])
def test_a_resumed_order_is_the_uninterrupted_one(
    tokenizer: Tokenizer, source: MemorySource, packing: str, before: int, after: int
) -> None:
    whole, _ = run(tokenizer, source, 48, packing=packing)
    state = None
    batches = []
    # Stops in the middle of blocks, of units and of documents, and on both sides of an epoch's end.
    for count, world_size in ((1, before), (6, after), (13, before), (2, after), (26, before)):
        more, state = run(tokenizer, source, count, world_size, state, packing=packing)
        batches += more
    assert torch.equal(torch.stack(whole), torch.stack(batches))


@pytest.mark.parametrize("ranks", [(1, 1), (2, 2), (4, 1), (1, 2), (2, 4)])
def test_every_document_is_read_once_over_a_resume(
    tokenizer: Tokenizer, source: MemorySource, ranks: tuple[int, int]
) -> None:
    """On the same or another number of ranks: none twice, none lost, with full shuffle buffers at the stop."""
    batches, state = run(tokenizer, source, 7, ranks[0])
    more, _ = run(tokenizer, source, 12, ranks[1], state)
    counts = Counter(documents_of(tokenizer, batches + more))
    assert max(counts.values()) == 1 and len(counts) == 304
    last, _ = run(tokenizer, source, 32, ranks[1], state)
    assert set(documents_of(tokenizer, batches + last)) == set(range(DOCUMENTS))


@pytest.mark.parametrize("packing", ["pad", "pack"])
def test_workers_do_not_change_the_order(tokenizer: Tokenizer, source: MemorySource, packing: str) -> None:
    inline, inline_state = run(tokenizer, source, 12, packing=packing, workers=0)
    for workers in (1, 3, 8, 100):
        batches, state = run(tokenizer, source, 12, packing=packing, workers=workers)
        assert torch.equal(torch.stack(inline), torch.stack(batches))
        assert state == inline_state


def test_a_global_batch_that_is_no_multiple_of_the_logical_shards(tokenizer: Tokenizer, source: MemorySource) -> None:
    sixteens, _ = run(tokenizer, source, 9)
    twelves, state = run(tokenizer, source, 6, global_batch=12, world_size=2)
    rest, _ = run(tokenizer, source, 6, global_batch=12, world_size=1, state=state)
    assert torch.equal(torch.cat(sixteens), torch.cat([*twelves, *rest]))


def test_the_seed_decides_the_order(tokenizer: Tokenizer, source: MemorySource) -> None:
    first, _ = run(tokenizer, source, 4, seed=3)
    second, _ = run(tokenizer, source, 4, seed=4)
    assert documents_of(tokenizer, first) != documents_of(tokenizer, second)


def test_the_order_is_frozen(tokenizer: Tokenizer, source: MemorySource) -> None:
    """A change of these numbers changes what a resumed run sees: raise the loader's state format with it."""
    batches, _ = run(tokenizer, source, 1)
    assert documents_of(tokenizer, batches) == [90, 113, 37, 94, 55, 30, 64, 87, 66, 65, 13, 118, 79, 102, 88, 15]


def test_packing_conserves_tokens(tokenizer: Tokenizer, source: MemorySource) -> None:
    batches, _ = run(tokenizer, source, 40, packing="pack", max_length=16)
    rows = torch.cat(batches)
    assert IGNORED_LABEL not in rows
    encoded = {tuple(ids): i for i, ids in enumerate(tokenizer.encode(source.documents))}
    for logical_shard in range(8):
        stream = rows[logical_shard::8].flatten().tolist()
        documents: list[list[int]] = [[]]
        for token in stream:
            if token == tokenizer.eos_token_id:
                documents.append([])
            else:
                documents[-1].append(token)
        # The last one is cut by the end of the last row.
        numbers = [encoded[tuple(ids)] for ids in documents[:-1]]
        assert len(numbers) > 20
        size = len(set(numbers))
        assert len(set(numbers[:size])) == size


def test_prefetched_updates_are_not_in_the_state(tokenizer: Tokenizer, source: MemorySource) -> None:
    (loader,) = loaders(1, tokenizer=tokenizer, source=source)
    begin = loader.state_dict()
    assert begin["sequence"] == 0
    loader.next_update()
    state = loader.state_dict()
    assert state["sequence"] == 16
    assert sum(position["document"] for position in state["lanes"].values()) == 16
    loader.close()


def test_state_size(tokenizer: Tokenizer, source: MemorySource) -> None:
    _, state = run(tokenizer, source, 3, data_lanes=64, shuffle_buffer=64)
    assert len(json.dumps(state)) < 10_000


@pytest.mark.parametrize(
    ("change", "flag"),
    [({"seed": 9}, "--seed"), ({"max_length": 32}, "--max_length"), ({"packing": "pack"}, "--packing"),
     ({"shuffle_buffer": 6}, "--shuffle_buffer"), ({"data_lanes": 16}, "--data_lanes"),
     ({"source": MemorySource("other", [f"text {i}" for i in range(200)])}, "--dataset")],
)  # fmt: skip
def test_resume_with_another_order_is_refused(
    tokenizer: Tokenizer, source: MemorySource, change: dict[str, Any], flag: str
) -> None:
    _, state = run(tokenizer, source, 1)
    with pytest.raises(UserError, match=flag):
        run(tokenizer, change.pop("source", source), 1, state=state, **change)


def test_a_state_of_one_rank_of_two_is_refused(tokenizer: Tokenizer, source: MemorySource) -> None:
    ranks = loaders(2, tokenizer=tokenizer, source=source)
    global_rows(ranks, 1)
    state = ranks[0].state_dict()
    close(ranks)
    with pytest.raises(UserError, match="states of all ranks"):
        run(tokenizer, source, 1, state=state)


def test_ranks_that_do_not_divide_the_logical_shards_are_refused(tokenizer: Tokenizer, source: MemorySource) -> None:
    with pytest.raises(UserError, match="--data_lanes 8 cannot be shared by 3 processes"):
        loaders(3, global_batch=24, tokenizer=tokenizer, source=source)


def test_ranks_that_do_not_divide_what_was_read_are_refused(tokenizer: Tokenizer, source: MemorySource) -> None:
    _, state = run(tokenizer, source, 1, global_batch=2, grad_accum_steps=1)
    with pytest.raises(UserError, match="2 sequences"):
        run(tokenizer, source, 1, world_size=4, global_batch=16, state=state)


def test_fewer_documents_than_logical_shards_are_refused(tokenizer: Tokenizer) -> None:
    few = MemorySource("few", ["one text", "another text"])
    with pytest.raises(UserError, match="--data_lanes"):
        run(tokenizer, few, 1)
    batches, _ = run(tokenizer, few, 1, data_lanes=1)
    assert len(torch.unique(batches[0], dim=0)) == 2


def test_an_empty_dataset_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="no document"):
        run(tokenizer, MemorySource("nothing", ["", "  \n"]), 1, data_lanes=1)


@pytest.mark.parametrize("logical_shards", [1, 2, 7, 64])
@pytest.mark.parametrize("shards", [1, 3, 8, 64, 65, 200, 1024])
def test_units_are_dealt_evenly(shards: int, logical_shards: int) -> None:
    dealt = deal_units([even_slices(shards, logical_shards)] * shards, logical_shards, seed=1)
    units = [unit for logical_shard in dealt for unit in logical_shard]
    assert len(set(units)) == len(units)
    for shard in range(shards):
        parts = [unit for unit in units if unit.shard == shard]
        assert sorted(unit.part for unit in parts) == list(range(parts[0].slices))
    sizes = [len(logical_shard) for logical_shard in dealt]
    assert max(sizes) - min(sizes) <= min(sizes) / 8
    if shards == 1024:
        assert units[0].slices == 1


@dataclass(frozen=True)
class Shards:
    """Items by shard, with file sizes where they are given."""

    items: list[list[str | Damage]]
    sizes: tuple[int, ...] = ()
    name: str = "shards"

    @property
    def shards(self) -> int:
        return len(self.items)

    def read(self, shard: int, slices: int, part: int, start: int) -> Iterator[str | Damage]:
        yield from self.items[shard][part + start * slices :: slices]

    def fingerprint(self) -> str:
        return str(hash(repr((self.items, self.sizes))))

    def file_list(self) -> Files | None:
        return Files(tuple(f"{i}.json" for i in range(self.shards)), self.sizes) if self.sizes else None


def numbered(*counts: int) -> list[list[str | Damage]]:
    """So many documents in each shard, numbered through."""
    begins = [sum(counts[:i]) for i in range(len(counts))]
    return [[document(i) for i in range(begin, begin + count)] for begin, count in zip(begins, counts, strict=True)]


def once(tokenizer: Tokenizer, source: Any, world_size: int = 1, **arguments: Any) -> list[int]:
    """The documents of one epoch, in order."""
    ranks = loaders(world_size, tokenizer=tokenizer, source=source, repeat="none", **arguments)
    batches = []
    while not all(loader.ended for loader in ranks):
        batches += global_rows(ranks, 1)
    damaged = sum(loader.damaged for loader in ranks)
    close(ranks)
    assert damaged == sum(isinstance(item, Damage) for shard in getattr(source, "items", []) for item in shard)
    rows = torch.cat(batches)
    return documents_of(tokenizer, [rows[(rows != IGNORED_LABEL).any(dim=1)]])


DAMAGED: list[str | Damage] = [Damage("file", "cannot be read")]


@pytest.mark.parametrize(
    "items",
    [
        [*numbered(100, 120, 90), []],
        [[], *numbered(150)],
        [*numbered(100, 100), DAMAGED],
        [*numbered(100, 100, 3, 1), [""] * 50, [" \n"], DAMAGED],
        numbered(*[1] * 40),
        [[line for text in numbered(200)[0] for line in (text, "")]],
        [*numbered(200), [""] * 200 + numbered(0, 1)[1]],
        [[*numbered(90)[0], Damage("line 91", "no JSON")], []],
    ],
    ids=["empty", "empty_first", "unreadable", "short", "one_each", "blank_lines", "blank_beginning", "damaged_line"],
)
def test_a_shard_without_documents_costs_its_own_alone(tokenizer: Tokenizer, items: list[list[str | Damage]]) -> None:
    """Each document once an epoch, damage counted once, the same order for any ranks and workers and resumes."""
    source = Shards(items)
    expected = sorted(
        int(item.split()[1][:-1]) for shard in items for item in shard if isinstance(item, str) and item.strip()
    )
    read = once(tokenizer, source)
    assert sorted(read) == expected
    for world_size in (2, 4, 8):
        assert once(tokenizer, source, world_size, workers=world_size % 3, grad_accum_steps=1) == read
    whole, _ = run(tokenizer, source, 12)
    batches, state = [], None
    for update in range(12):
        more, state = run(tokenizer, source, 1, (1, 2, 4)[update % 3], state)
        batches += more
    assert torch.equal(torch.stack(whole), torch.stack(batches))


def test_full_shards_are_cut_as_without_a_look_at_them(source: MemorySource) -> None:
    for logical_shards in (1, 2, 8):
        assert set(cut_shards(source, logical_shards)) == {even_slices(3, logical_shards)}
    assert cut_shards(Shards(numbered(200, 0, 200)), 8) == (4, POOLED, 4)
    many = Shards([[]] * 64)
    assert cut_shards(many, 8) == (1,) * 64  # with many units a logical shard it does no harm, and nothing is read


HOLLOW: list[str | Damage] = ["", " \n"]


@pytest.mark.parametrize("hollow", [[], HOLLOW, DAMAGED], ids=["empty", "blank", "unreadable"])
@pytest.mark.parametrize("full", [200, 1, 0])
def test_a_logical_shard_with_nothing_but_empty_files_costs_no_other_document(
    hollow: list[str | Damage], full: int
) -> None:
    """Of many files most are empty, so that a logical shard gets no other; each document is read once all the same."""
    count, logical_shards = 300, 2
    whole = even_slices(count, logical_shards)
    empty = {unit.shard for unit in deal_units([whole] * count, logical_shards, 3)[1]}
    kept = [shard for shard in range(count) if shard not in empty][:full]
    items = [[document(shard)] * (shard in kept) or hollow for shard in range(count)]
    assert (
        cut_shards(Shards(items), logical_shards, 3) == (whole,) * count
    )  # their sizes are not known: perhaps a network
    source = Shards(items, tuple(100 * (shard in kept) for shard in range(count)))
    dealing = cut_shards(source, logical_shards, 3)
    read = []
    dealt = DealtSource(source, dealing)
    for _ in range(2):
        for logical_shard in deal_units(dealing, logical_shards, 3):
            own = [item for unit in logical_shard for item in dealt.read(unit.shard, unit.slices, unit.part, 0)]
            assert full < logical_shards or any(isinstance(item, str) and item.strip() for item in own)
            read += own
    texts = Counter(item for item in read if isinstance(item, str) and item.strip())
    assert texts == {document(shard): 2 for shard in kept}
    assert sum(isinstance(item, Damage) for item in read) == 2 * (hollow is DAMAGED) * (count - len(kept))


def test_a_look_at_many_files_is_one_at_each_logical_shard() -> None:
    looked: list[int] = []

    class Counting(Shards):
        def read(self, shard: int, slices: int, part: int, start: int) -> Iterator[str | Damage]:
            looked.append(shard)
            return super().read(shard, slices, part, start)

    items = [[] if shard % 3 else [document(shard)] for shard in range(90)]
    source = Counting(items, tuple(10 * len(shard) for shard in items))
    assert cut_shards(source, 4, seed=1) == (1,) * 90
    assert len(looked) == 4 and all(items[shard] for shard in looked)


def test_a_logical_shard_without_a_document_names_what_it_read(tokenizer: Tokenizer) -> None:
    items = [[document(shard)] * (shard != 7) for shard in range(300)]
    unknown = TextLogicalShard(
        DealtSource(Shards(items, (0,) * 300), (1,) * 300), [Unit(7, 1, 0)] * 5, RowFormat(48, "pad", tokenizer),
        LogicalShardOrder(2, 3, 5), DamageCount(0),
    )  # fmt: skip
    with pytest.raises(
        UserError, match=r"for logical shard 2: what it reads, 7.json, 7.json, 7.json and 2 more of 300, holds"
    ):
        unknown.take(1)


def test_files_of_unequal_size_are_cut_in_proportion(tokenizer: Tokenizer) -> None:
    counts = (900, 60, 30, 4)
    source = Shards(numbered(*counts), tuple(100 * count for count in counts))
    cut = cut_shards(source, 4)
    assert cut == (4, 2, 1, POOLED)
    dealt = deal_units(cut, 4, seed=1)
    assert all(sum(unit.shard == 0 for unit in logical_shard) == 1 for logical_shard in dealt)
    read = once(tokenizer, source, data_lanes=4)
    assert sorted(read) == list(range(sum(counts)))
    sizes = [
        sum(-(-counts[unit.shard] // unit.slices) for unit in logical_shard if unit.shard < 4)
        for logical_shard in dealt
    ]
    assert (
        max(sizes) - min(sizes) <= 60
    )  # of about 250; evenly cut, a logical shard would read 4 documents over and over


NOTHING = "\u200b\u200d\ufeff"


@pytest.mark.parametrize("packing", ["pad", "pack"])
def test_documents_without_tokens_are_passed_over(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, packing: str
) -> None:
    encode = Tokenizer.encode
    monkeypatch.setattr(
        Tokenizer, "encode", lambda self, texts: encode(self, [text.replace(NOTHING, "") for text in texts])
    )
    documents = [text for i in range(100) for text in (NOTHING, document(i), NOTHING * 2)]
    mixed = MemorySource("mixed", [NOTHING] * 200 + documents)
    (loader,) = loaders(1, 2, tokenizer=tokenizer, source=mixed, packing=packing, repeat="none", grad_accum_steps=1)
    batches = []
    while not loader.ended:
        batches += global_rows([loader], 1)
    loader.close()
    rows = torch.cat(batches)
    assert not (rows[:, 0] == tokenizer.eos_token_id).any() or packing == "pack"
    assert not ((rows[:, 1:] == tokenizer.eos_token_id) & (rows[:, :-1] == tokenizer.eos_token_id)).any()
    if packing == "pad":
        kept = rows[(rows != IGNORED_LABEL).any(dim=1)]
        assert sorted(documents_of(tokenizer, [kept])) == list(range(100))
    with pytest.raises(UserError, match="there is no document"):
        run(tokenizer, MemorySource("nothing", [NOTHING] * 100), 1, packing=packing, data_lanes=1)


def test_a_replaced_file_is_said_and_another_data_set_refused(tokenizer: Tokenizer) -> None:
    damaged = Shards([*numbered(100, 100), DAMAGED], (1000, 1000, 90))
    before, state = run(tokenizer, damaged, 3)
    good = Shards(numbered(100, 100, 100), (1000, 1000, 1000))
    ranks = loaders(1, tokenizer=tokenizer, source=good, repeat="none")
    ranks[0].load_state_dict(state)
    (said,) = ranks[0].notices
    assert "2.json (90 bytes, now 1000) changed; the run goes on" in said
    rows = torch.cat([*before, *global_rows(ranks, 25)])
    assert ranks[0].ended
    close(ranks)
    counts = Counter(documents_of(tokenizer, [rows[(rows != IGNORED_LABEL).any(dim=1)]]))
    assert all(counts[i] == 1 for i in range(200)) and any(counts[i] for i in range(200, 300))
    for other in (
        Shards(good.items[:2], (1000, 999)),
        Shards(good.items),
        Shards(good.items[::-1], (*good.sizes[:2], 90)),
    ):
        with pytest.raises(UserError, match="--dataset is"):
            run(tokenizer, other, 1, state=state)


def test_the_beginnings_of_files_are_hashed_once_at_a_resume(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Shards(numbered(100, 100), (1000, 1000))
    _, state = run(tokenizer, source, 3)
    hashed, with_heads = list[Files](), Files.with_heads
    monkeypatch.setattr(Files, "with_heads", lambda files: (hashed.append(files), with_heads(files))[1])
    ranks = loaders(1, tokenizer=tokenizer, source=source)
    ranks[0].load_state_dict(state)
    close(ranks)
    assert len(hashed) == 1


def test_a_state_of_an_older_version_is_taken_up_with_its_dealing(tokenizer: Tokenizer, source: MemorySource) -> None:
    whole, _ = run(tokenizer, source, 6)
    _, state = run(tokenizer, source, 3)
    del state["sources"]
    rest, _ = run(tokenizer, source, 3, state=state)
    assert torch.equal(torch.stack(whole[3:]), torch.stack(rest))


def test_files_of_one_document_are_read_once_by_all_logical_shards(tokenizer: Tokenizer) -> None:
    """They are all in the pool: what a logical shard has counted the others need not read again."""
    read = Counter[int]()

    class Counted(Shards):
        def read(self, shard: int, slices: int, part: int, start: int) -> Iterator[str | Damage]:
            read[shard] += 1
            yield from super().read(shard, slices, part, start)

    source = Counted(numbered(*[1] * 60), (100,) * 60)
    assert cut_shards(source, 16) == (POOLED,) * 60
    read.clear()
    ranks = loaders(1, tokenizer=tokenizer, source=source, repeat="none", data_lanes=16, workers=0)
    read.clear()  # what their beginnings were looked at for
    rows = torch.cat(global_rows(ranks, 4))
    close(ranks)
    assert sorted(documents_of(tokenizer, [rows[(rows != IGNORED_LABEL).any(dim=1)]])) == list(range(60))
    # Once to count, in the first logical shard's first block, and once by its own: not 60 files 16 times.
    assert sum(read.values()) <= 3 * 60
