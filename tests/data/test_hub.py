"""Streaming from the hub goes on after every network fault, with the documents of a quiet run."""

import hashlib
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from peft_pretraining.data import hub_file_system
from peft_pretraining.data.eval_set import build_eval_set
from peft_pretraining.data.sources import hub
from peft_pretraining.data.sources.data_files import DataFile, FileShards
from peft_pretraining.data.sources.hub import HubSource
from peft_pretraining.data.sources.kind import SourceOptions
from peft_pretraining.data.sources.registry import open_dataset
from peft_pretraining.data.sources.retry import Reading, RetryPolicy
from peft_pretraining.data.tokenizer import Tokenizer
from peft_pretraining.errors import UserError
from tests.data.collect import close, documents_of, global_rows, loaders
from tests.data.conftest import write_shard
from tests.data.hub_server import HubServer

QUICK = RetryPolicy(attempts=8, first_pause_seconds=0.01, longest_pause_seconds=0.05, timeout_seconds=0.3)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of the test take several requests each."""
    monkeypatch.setattr(hub_file_system, "BLOCK_BYTES", 500)
    monkeypatch.setattr(hub_file_system, "LONGEST_RANGE_BYTES", 500)


@pytest.fixture
def server(c4_dir: Path) -> Iterator[HubServer]:
    served = HubServer(c4_dir)
    yield served
    served.close()


def remote(server: HubServer, folder: Path, split: str = "train", retry: RetryPolicy = QUICK) -> HubSource:
    """The shards of a folder in C4's layout, by way of the hub."""
    hub_file_system.serve_pinned_files()
    address = f"hf://datasets/{hub.C4_REPOSITORY}@{hub.C4_REVISION}/en"
    paths = sorted(folder.glob(f"en/*{split}*"))
    files = tuple(DataFile(f"{address}/{path.name}", "json", path.stat().st_size) for path in paths)
    reading = Reading("c4", retry, endpoint=server.endpoint)
    return HubSource(reading, hub.C4_REPOSITORY, hub.C4_REVISION, FileShards("c4", files, "test"))


ONE_KIND = [
    [], ["refuse"] * 3, ["stall"] * 2, ["cut"] * 3, ["500", "502", "503", "504"], ["429"] * 3, ["garbage"], ["moved"],
    ["short"] * 3, ["whole"] * 3,
]  # fmt: skip
ALL_KINDS = ["", "cut", "503", "", "refuse", "", "garbage", "stall", "429", "moved", "500", "short", "cut", "whole"] * 3


@pytest.mark.parametrize("faults", [*(pytest.param(each, marks=pytest.mark.slow) for each in ONE_KIND), ALL_KINDS])
def test_faults_do_not_change_the_bits(
    tokenizer: Tokenizer, c4_dir: Path, server: HubServer, faults: list[str]
) -> None:
    local = loaders(1, tokenizer=tokenizer, dataset=str(c4_dir))
    expected = global_rows(local, 15)
    server.faults = list(faults)
    patient = replace(QUICK, attempts=len(faults) + 1)  # threads share the faults, and one may get them all
    ranks = loaders(1, tokenizer=tokenizer, source=remote(server, c4_dir, retry=patient))
    assert torch.equal(torch.stack(global_rows(ranks, 15)), torch.stack(expected))
    assert not server.faults
    close([*local, *ranks])


def test_faults_in_a_resumed_validation(tokenizer: Tokenizer, c4_dir: Path, server: HubServer) -> None:
    def rows(source: HubSource) -> torch.Tensor:
        batches = build_eval_set(dataset="c4", tokenizer=tokenizer, packing="pad", max_length=48, eval_batch_size=5,
                                 eval_tokens=0, source=source)  # fmt: skip
        return torch.cat([batch.labels for _, batch in batches])

    quiet = rows(remote(server, c4_dir, "validation"))
    server.faults = ["cut", "500", "", "stall"]
    assert torch.equal(rows(remote(server, c4_dir, "validation")), quiet)
    assert documents_of(tokenizer, [quiet]) == list(range(195, 225))


def test_the_layout_of_c4_on_the_hub(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The names and the address that --dataset c4 asks for."""
    folder = tmp_path / "hub" / "en"
    folder.mkdir(parents=True)
    for shard in range(8):
        write_shard(folder / f"c4-validation.{shard:05d}-of-00008.json.gz", range(shard * 3, shard * 3 + 3))
    server = HubServer(folder.parent)
    eval_set = build_eval_set(
        dataset="c4", tokenizer=tokenizer, packing="pad", max_length=48, eval_batch_size=5, eval_tokens=0,
        options=SourceOptions(endpoint=server.endpoint, retry=QUICK),
    )  # fmt: skip
    assert documents_of(tokenizer, [batch.labels for _, batch in eval_set]) == list(range(24))
    server.close()
    assert all(path.startswith(f"/datasets/allenai/c4/resolve/{hub.C4_REVISION}/en/") for path in server.paths)
    source = open_dataset("c4", "train")
    assert isinstance(source, HubSource)
    assert source.source.files[17].path.endswith(f"@{hub.C4_REVISION}/en/c4-train.00017-of-01024.json.gz")
    assert source.shards == 1024


def test_a_run_on_c4_goes_on_from_an_older_checkpoint() -> None:
    """The fingerprint that its checkpoints hold."""
    for split, shards in (("train", 1024), ("validation", 8)):
        source = open_dataset("c4", split)
        assert isinstance(source, HubSource) and source.shards == shards
        identity = f"allenai/c4@1588ec454efa1a09f29cd18ddd04fe05fc8653a2/{split}"
        assert source.fingerprint() == hashlib.sha256(identity.encode()).hexdigest()[:16]
        assert source.revision == hub.C4_REVISION


def test_a_hub_that_stays_away_is_an_error_with_a_sentence(
    tokenizer: Tokenizer, c4_dir: Path, server: HubServer
) -> None:
    server.faults = ["503"] * 1000
    with pytest.raises(UserError, match=r"could not be read after 8 tries \(HTTP status 503\)"):
        loaders(1, tokenizer=tokenizer, source=remote(server, c4_dir))  # which looks at the beginnings of few files


def test_nobody_listens(tokenizer: Tokenizer, c4_dir: Path, server: HubServer) -> None:
    server.close()
    with pytest.raises(UserError, match=r"cannot be reached.*Check the network.*--dataset pydocs needs no download"):
        loaders(1, tokenizer=tokenizer, source=remote(server, c4_dir))


@pytest.mark.parametrize("status", ["401", "403", "404"])
def test_a_final_answer_is_not_asked_again(tokenizer: Tokenizer, c4_dir: Path, server: HubServer, status: str) -> None:
    server.faults = [status]
    source = remote(server, c4_dir)
    with pytest.raises(UserError, match=f"HTTP status {status}"):
        next(source.read(0, 1, 0, 0))
    assert server.requests == 1


def test_closing_ends_a_long_pause(tokenizer: Tokenizer, c4_dir: Path, server: HubServer) -> None:
    from peft_pretraining.data.train_loader import build_train_loader

    server.faults = ["503"] * 1000
    loader = build_train_loader(
        dataset="c4", tokenizer=tokenizer, packing="pad", max_length=32, batch_size=1, grad_accum_steps=1, seed=0,
        options=SourceOptions(endpoint=server.endpoint, retry=RetryPolicy(first_pause_seconds=60)),
    )  # fmt: skip
    loader.start()
    time.sleep(0.2)
    start = time.monotonic()
    loader.close()
    assert time.monotonic() - start < 3
    assert server.requests >= 1


def test_pauses_grow_with_jitter_and_obey_the_server() -> None:
    policy = RetryPolicy(first_pause_seconds=1, longest_pause_seconds=60)
    for attempt in range(12):
        whole = min(60.0, 2.0**attempt)
        assert whole / 2 <= policy.pause_seconds(attempt, None) <= whole
    assert policy.pause_seconds(0, "30") >= 30
    assert policy.pause_seconds(0, "999999") <= 120
