"""--repeat none: every document once and then the end, for any number of ranks, workers and stops."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import run_pretrain
from peft_pretraining.data.batch import IGNORED_LABEL
from peft_pretraining.data.sources.documents import MemorySource, Share
from peft_pretraining.data.sources.mixture import Mixture
from peft_pretraining.data.tokenizer import Tokenizer
from peft_pretraining.data.train_loader import TrainLoader, merge_states
from peft_pretraining.errors import UserError
from tests.data.collect import close, documents_of, global_rows, loaders
from tests.data.conftest import document
from tests.small_run import CONFIG, SmallRun, on_ranks, write_text


def to_the_end(ranks: list[TrainLoader], most: int = 1000) -> list[torch.Tensor]:
    """Global batches until all ranks have ended, as a run asks for them."""
    batches: list[torch.Tensor] = []
    while not all(loader.ended for loader in ranks):
        batches += global_rows(ranks, 1)
        assert len(batches) <= most
    return batches


def full(batches: list[torch.Tensor]) -> torch.Tensor:
    rows = torch.cat(batches)
    return rows[(rows != IGNORED_LABEL).any(dim=1)]


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_every_document_once(tokenizer: Tokenizer, source: MemorySource, world_size: int, workers: int) -> None:
    arguments: dict[str, Any] = {"tokenizer": tokenizer, "source": source, "repeat": "none", "workers": workers}
    ranks = loaders(world_size, grad_accum_steps=1, **arguments)
    batches = to_the_end(ranks)
    close(ranks)
    assert len(batches) == 20  # logical shards of 38 and 39 documents, two rows of each an update
    assert sorted(documents_of(tokenizer, [full(batches)])) == list(range(311))
    endless = loaders(1, tokenizer=tokenizer, source=source)
    assert torch.equal(torch.stack(batches[:19]), torch.stack(global_rows(endless, 19)))
    close(endless)


def test_packed_documents_lose_nothing_but_a_single_id(tokenizer: Tokenizer, source: MemorySource) -> None:
    arguments: dict[str, Any] = {"packing": "pack", "max_length": 16, "repeat": "none"}
    ranks = loaders(2, tokenizer=tokenizer, source=source, **arguments)
    batches = to_the_end(ranks)
    close(ranks)
    ids = sum(len(ids) + 1 for ids in tokenizer.encode(source.documents))
    rows = torch.cat(batches)
    kept = int((rows != IGNORED_LABEL).sum())
    assert ids - 8 <= kept <= ids
    lengths = (rows != IGNORED_LABEL).sum(dim=1).tolist()
    assert 1 not in lengths and sum(0 < length < 16 for length in lengths) <= 8


@pytest.mark.parametrize("packing", ["pad", "pack"])
def test_resume_at_every_update(tokenizer: Tokenizer, source: MemorySource, packing: str) -> None:
    arguments: dict[str, Any] = {"tokenizer": tokenizer, "source": source, "repeat": "none", "packing": packing}
    ranks = loaders(1, **arguments)
    whole = to_the_end(ranks)
    close(ranks)
    batches: list[torch.Tensor] = []
    state, ended, update = None, False, 0
    while not ended:
        ranks = loaders((1, 2, 4)[update % 3], **arguments, workers=update % 2)
        for loader in ranks:
            if state is not None:
                loader.load_state_dict(state)
        batches += global_rows(ranks, 1)
        state = json.loads(json.dumps(merge_states([loader.state_dict() for loader in ranks])))
        ended, update = all(loader.ended for loader in ranks), update + 1
        close(ranks)
    assert torch.equal(torch.stack(whole), torch.stack(batches))
    # After the end there is nothing, and it is known before anything is asked for.
    ranks = loaders(2, **arguments)
    for loader in ranks:
        loader.load_state_dict(state)
    assert all(loader.ended for loader in ranks)
    close(ranks)


def test_an_update_of_few_logical_shards_may_be_empty_before_the_end(tokenizer: Tokenizer) -> None:
    """With fewer sequences an update than logical shards, those of an update may have ended and others not."""
    documents = MemorySource("memory", [document(i) for i in range(19)])
    ranks = loaders(1, 2, tokenizer=tokenizer, source=documents, repeat="none", grad_accum_steps=1)
    batches = to_the_end(ranks)
    close(ranks)
    assert sorted(documents_of(tokenizer, [full(batches)])) == list(range(19))
    targets = [int((batch[:, 1:] != IGNORED_LABEL).sum()) for batch in batches]
    assert targets[-1] > 0


def test_fewer_documents_than_logical_shards(tokenizer: Tokenizer) -> None:
    ranks = loaders(1, tokenizer=tokenizer, source=MemorySource("few", ["one text", "another"]), repeat="none")
    assert len(full(to_the_end(ranks))) == 2
    close(ranks)


def test_repeated_data_never_ends_and_its_second_reading_is_said_once(
    tokenizer: Tokenizer, source: MemorySource
) -> None:
    (loader,) = loaders(1, tokenizer=tokenizer, source=source)
    heard = []
    for update in range(1, 61):
        loader.next_update()
        heard += [(update, text) for text in loader.notices]
        loader.notices.clear()
        if update == 40:
            state = loader.state_dict()
    assert not loader.ended
    assert [update for update, _ in heard] == [20]
    assert "--dataset memory" in heard[0][1] and "a second time" in heard[0][1]
    loader.close()
    (resumed,) = loaders(1, tokenizer=tokenizer, source=source)
    resumed.load_state_dict(state)
    global_rows([resumed], 30)
    assert not resumed.notices
    resumed.close()


KINDS: dict[str, dict[str, Any]] = {"text": {}, "packed": {"packing": "pack", "max_length": 16}, "ids": {}, "mixed": {}}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_says_at_which_update_it_begins_again(
    tokenizer: Tokenizer, source: MemorySource, tmp_path: Path, kind: str
) -> None:
    """And does not say it again after a resume, with whatever number of ranks: the second reading was on another."""
    arguments: dict[str, Any] = {"tokenizer": tokenizer, "source": source, **KINDS[kind]}
    if kind == "ids":
        np.arange(311 * 8, dtype="<u2").tofile(tmp_path / "train.uint16")
        arguments = {"dataset": str(tmp_path), "tokenizer": None, "max_length": 8}
    if kind == "mixed":
        other = MemorySource("other", [document(i) for i in range(1000, 1020)])
        arguments["source"] = Mixture("memory:3,other:1", (Share(source, 3.0), Share(other, 1.0)))
    ranks = loaders(2, **arguments)
    state, heard, seen, first_again = None, [], set(), None
    for update in range(1, 60):
        (rows,) = global_rows(ranks, 1)
        keys = [tuple(row.tolist()) for row in rows]
        if first_again is None and (len(set(keys)) < len(keys) or seen & set(keys)):
            first_again = update
        seen |= set(keys)
        said = {text for loader in ranks for text in loader.notices}
        heard += [(update, text) for text in said - {text for _, text in heard}]
        if heard and state is None:
            state = json.loads(json.dumps(merge_states([loader.state_dict() for loader in ranks])))
    close(ranks)
    assert all("documents are read a second time" in text for _, text in heard)
    name = {"ids": str(tmp_path), "mixed": "other"}.get(kind, "memory")
    assert heard[0][1].startswith(f"--dataset {name}: ")
    # Rows of packed documents are others the second time.
    assert kind == "packed" or heard[0][0] == first_again
    assert len(heard) == (2 if kind == "mixed" else 1)
    for world_size in (1, 4):
        ranks = loaders(world_size, **arguments)
        for loader in ranks:
            loader.load_state_dict(state)
        global_rows(ranks, 30)
        assert not any(f"--dataset {name}: " in text for loader in ranks for text in loader.notices)
        close(ranks)


def test_a_run_says_once_what_the_loader_of_any_rank_notices(tmp_path: Path) -> None:
    """15 windows in 8 logical shards: the last, of rank 1, has one, and is the first to begin again, at update 2."""
    small = SmallRun(tmp_path)
    (small.data / "train.uint16").write_bytes((np.arange(15 * 32) % 60).astype("<u2").tobytes())
    log = tmp_path / "log"
    argv = small.argv("run", {"batch_size": 4, "num_training_steps": 4, "total_batch_size": 8})
    assert on_ranks(2, run_pretrain.main, argv, log=log) == [0, 0]
    said = [line for line in log.read_text().splitlines() if "a second time" in line]
    assert len(said) == 1 and said[0].startswith(f"update 2: --dataset {small.data}: the first of its logical shards")


def test_token_files_end(tmp_path: Path) -> None:
    np.arange(1000, dtype="<u2").tofile(tmp_path / "train.uint16")
    for world_size in (1, 2, 4):
        ranks = loaders(world_size, dataset=str(tmp_path), tokenizer=None, max_length=8, repeat="none")
        rows = full(to_the_end(ranks))
        close(ranks)
        assert sorted(rows[:, 0].tolist()) == list(range(0, 1000, 8))
    ranks = loaders(
        1, dataset=str(tmp_path), tokenizer=None, max_length=400, repeat="none"
    )  # 2 windows in 8 logical shards
    assert len(full(to_the_end(ranks))) == 2
    close(ranks)
    with pytest.raises(UserError, match="too few for --data_lanes 8"):
        loaders(1, dataset=str(tmp_path), tokenizer=None, max_length=1001, repeat="none")


@pytest.mark.parametrize("kind", ["text", "ids"])
def test_a_run_ends_with_its_data(tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str) -> None:
    small = SmallRun(tmp_path)
    flags: dict[str, object] = {"repeat": "none", "num_training_steps": 60, "save_every": 20}
    if kind == "text":  # 300 documents in 8 logical shards, 8 an update
        small.config.write_text(json.dumps(CONFIG | {"vocab_size": 210}))
        flags |= write_text(tmp_path / "text")
    else:  # 300 windows
        (small.data / "train.uint16").write_bytes((np.arange(300 * 32 + 5) % 60).astype("<u2").tobytes())
    whole = small.run("whole", **flags)
    said = "the data has ended after 38 of 60 updates (--repeat none); the learning rate was scheduled for 60"
    assert said in capfd.readouterr().err
    assert len(whole.losses) == 38 and whole.eval_loss > 0
    assert [path.name for path in whole.checkpoints] == ["step_00000000", "step_00000020", "step_00000038"]
    part = tmp_path / "part"
    resumed = small.run(part.name, **flags, continue_from=whole.save_dir / "step_00000020")
    assert resumed.losses == whole.losses[20:]
    again = small.run("whole", **flags, continue_from="auto")
    assert said in capfd.readouterr().err
    assert again.lines == whole.lines and len(again.checkpoints) == 3


def test_two_ranks_end_together(tmp_path: Path) -> None:
    small = SmallRun(tmp_path)
    (small.data / "train.uint16").write_bytes((np.arange(45 * 32) % 60).astype("<u2").tobytes())
    flags: dict[str, object] = {"repeat": "none", "num_training_steps": 60, "total_batch_size": 8}
    one = small.run("one", **flags, batch_size=4)
    assert on_ranks(2, run_pretrain.main, small.argv("two", {**flags, "batch_size": 2})) == [0, 0]
    two = small.result("two")
    assert len(one.losses) == len(two.losses) == 6
    assert two.losses == pytest.approx(one.losses, rel=1e-5)
