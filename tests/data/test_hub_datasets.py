"""Data sets of the hub by name: their files, errors, and network faults."""

import bz2
import gzip
import json
import lzma
import random
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from peft_pretraining.data import hub_file_system, hub_repository
from peft_pretraining.data.sources import registry
from peft_pretraining.data.sources.hub import Hub, HubSource
from peft_pretraining.data.sources.kind import SourceOptions
from peft_pretraining.data.sources.retry import RetryPolicy
from peft_pretraining.data.tokenizer import Tokenizer
from peft_pretraining.data.train_loader import TrainLoader, build_train_loader
from peft_pretraining.errors import UserError
from tests.data.conftest import document, write_shard
from tests.data.hub_server import FAULTS, DatasetHub, HubRepository, point_at

QUICK = RetryPolicy(attempts=8, first_pause_seconds=0.01, longest_pause_seconds=0.05, timeout_seconds=0.5)
OPTIONS = SourceOptions(retry=QUICK)
CARD = """---
configs:
- config_name: english
  data_files:
  - split: train
    path: english/train*
  - split: dev
    path: english/dev*
- config_name: german
  data_files: german/*
---
"""


def texts(numbers: range) -> list[str]:
    """Documents that cannot be compressed much."""
    return [f"document {number}: {random.Random(number).randbytes(400).hex()}" for number in numbers]


def json_lines(path: Path, numbers: range, field: str = "text") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({field: text, "id": i}) for i, text in enumerate(texts(numbers))]
    content = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def parquet(path: Path, numbers: range, field: str = "text") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"id": list(numbers), field: texts(numbers)}
    pq.write_table(pa.table(columns), path, row_group_size=20, compression="none", use_dictionary=False)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DatasetHub]:
    """Data sets of several kinds; nothing else can be reached."""
    root = tmp_path / "repositories"
    for shard in range(3):
        numbers = range(40 * shard, 40 * shard + 40)
        json_lines(root / "lines" / "data" / f"train-{shard:05d}-of-00003.json.gz", numbers)
        parquet(root / "columns" / "data" / f"train-{shard:05d}-of-00003.parquet", numbers)
    json_lines(root / "lines" / "data" / "validation-00000-of-00001.json.gz", range(120, 135))
    json_lines(root / "old" / "train.jsonl", range(9))
    for config, split in (("english", "train"), ("english", "dev"), ("german", "train")):
        json_lines(root / "configs" / config / f"{split}.jsonl", range(len(config), 20), field="body")
    (root / "configs" / "README.md").write_text(CARD)
    (root / "script").mkdir()
    (root / "script" / "script.py").write_text("class Script: ...\n")
    parquet(root / "converted" / "default" / "train" / "0000.parquet", range(30))
    for config in ("a", "b"):
        parquet(root / "converted_twice" / config / "train" / "0000.parquet", range(len(root.parts), 30))
    (root / "pictures").mkdir()
    (root / "pictures" / "train.png").write_bytes(b"\x89PNG")
    (root / "nothing").mkdir()
    (root / "nothing" / "notes.xyz").write_text("nothing\n")
    card = "---\ndataset_info:\n  features:\n  - name: id\n    dtype: int64\n  - name: body\n    dtype: string\n---\n"
    parquet(root / "carded" / "data" / "train-00000-of-00001.parquet", range(10), field="body")
    (root / "carded" / "README.md").write_text(card)
    branch = hub_repository.PARQUET_BRANCH
    repositories = {f"org/{path.name}": HubRepository(path) for path in root.iterdir()}
    repositories["org/lines"].revisions = {"v1": root / "old"}
    repositories["org/script"].revisions = {branch: root / "converted"}
    repositories["org/two"] = HubRepository(root / "script", {branch: root / "converted_twice"})
    repositories["org/gated"] = HubRepository(root / "lines", gated=True)
    repositories["org/private"] = HubRepository(root / "lines", hidden=True)
    served = DatasetHub(repositories, renamed={"lines": "org/lines"})
    point_at(served, tmp_path / "cache", monkeypatch)
    monkeypatch.chdir(tmp_path)
    yield served
    served.close()


def opened(dataset: str, split: str = "train", options: SourceOptions = OPTIONS) -> HubSource:
    source = registry.open_dataset(dataset, split, options)
    assert isinstance(source, HubSource)
    return source


def small_ranges(monkeypatch: pytest.MonkeyPatch, dataset: str) -> None:
    """Files take about ten requests each."""
    count = 8000 if dataset == "org/columns" else 2000
    monkeypatch.setattr(hub_file_system, "BLOCK_BYTES", count)
    monkeypatch.setattr(hub_file_system, "LONGEST_RANGE_BYTES", count + 500)


def documents(source: HubSource, start: int = 0) -> list[object]:
    return [text for shard in range(source.shards) for text in source.read(shard, 1, 0, start)]


# ---- what a name means


def test_a_data_set_is_found_by_its_name(hub: DatasetHub) -> None:
    train, validation = opened("org/lines"), opened("org/lines", "validation")
    assert documents(train) == texts(range(120))
    assert documents(validation) == texts(range(120, 135))
    assert (train.shards, validation.shards, train.name, train.repository) == (3, 1, "org/lines", "org/lines")
    assert documents(opened("org/columns")) == texts(range(120))
    assert registry.open_dataset("org/columns", "validation", OPTIONS) is None
    assert documents(opened("org/carded")) == texts(range(10)), "the only column of text"


def test_a_server_at_the_port_of_an_earlier_one_is_another_hub(
    hub: DatasetHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ports are given out again within a process: what the last server's data sets were must not be kept."""
    assert documents(opened("org/lines")) == texts(range(120))
    hub.close()
    json_lines(tmp_path / "later" / "train.jsonl", range(7))
    later = DatasetHub({"org/lines": HubRepository(tmp_path / "later")}, port=hub.server.server_port)
    with closing(later):
        point_at(later, tmp_path / "later_cache", monkeypatch)
        assert documents(opened("org/lines")) == texts(range(7))


@pytest.mark.parametrize("kind", ["txt", "csv", "arrow", "jsonl", "txt.gz", "jsonl.xz", "csv.bz2"])
def test_every_format_is_read_from_the_hub(hub: DatasetHub, tmp_path: Path, kind: str) -> None:
    expected = texts(range(30))
    table = pa.table({"id": list(range(30)), "text": expected})
    path = tmp_path / "repositories" / "other" / f"train.{kind}"
    path.parent.mkdir()
    if kind == "arrow":
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    else:
        lines = {
            "txt": expected,
            "csv": ["id,text", *(f'{i},"{text}"' for i, text in enumerate(expected))],
            "jsonl": [json.dumps({"text": text}) for text in expected],
        }
        form, _, compression = kind.partition(".")
        content = "".join(f"{line}\n" for line in lines[form]).encode()
        pack = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress}.get(compression, bytes)
        path.write_bytes(pack(content))
    hub.repositories["org/other"] = HubRepository(path.parent)
    source = opened("org/other")
    hub.faults = ["cut", "503"]
    assert documents(source) == expected
    assert hub.made == ["cut", "503"]


def test_an_old_name_means_the_data_set_of_today(hub: DatasetHub) -> None:
    source = opened("lines")
    assert (source.name, source.repository) == ("lines", "org/lines")
    assert documents(source) == texts(range(120))
    assert source.fingerprint() == opened("org/lines").fingerprint()


def test_a_configuration_names_its_files_and_splits(hub: DatasetHub) -> None:
    options = replace(OPTIONS, config="english", text_column="body")
    assert documents(opened("org/configs", options=options)) == texts(range(7, 20))
    assert documents(opened("org/configs", "validation", options)) == texts(range(7, 20)), "dev is what it is called"
    german = replace(options, config="german")
    assert documents(opened("org/configs", options=german)) == texts(range(6, 20))
    assert registry.open_dataset("org/configs", "validation", german) is None
    swapped = replace(options, train_split="dev", validation_split="train")
    assert opened("org/configs", options=swapped).fingerprint() != opened("org/configs", options=options).fingerprint()


def test_a_revision_is_kept_and_can_be_asked_for(hub: DatasetHub) -> None:
    newest, old = opened("org/lines"), opened("org/lines", options=replace(OPTIONS, revision="v1"))
    assert documents(old) == texts(range(9))
    assert newest.revision != old.revision and newest.fingerprint() != old.fingerprint()
    again = opened("org/lines", options=replace(OPTIONS, revision=newest.revision))
    assert (again.revision, again.fingerprint()) == (newest.revision, newest.fingerprint())
    assert all(f"@{newest.revision}/" in file.path for file in newest.source.files)


def test_the_parquet_branch_takes_the_place_of_a_script(hub: DatasetHub) -> None:
    source = opened("org/script", options=replace(OPTIONS, revision=hub_repository.PARQUET_BRANCH))
    assert documents(source) == texts(range(30))
    again = opened("org/script", options=replace(OPTIONS, revision=source.revision))
    assert again.fingerprint() == source.fingerprint()


def test_what_could_be_a_name_is_looked_for_on_the_hub_last_and_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("wikitext", "allenai/c4", "HuggingFaceFW/fineweb-edu", "a.b/c_d-1"):
        assert isinstance(registry.find_kind(name), Hub), name
    for path in ("./missing", "/abs/missing", "a/b/c", "org/", "~/text", "a b", "-x", "a--b/c", "org/.hidden"):
        with pytest.raises(UserError, match=r"is neither .* nor a file or folder that exists"):
            registry.find_kind(path)
    for path in ("data/train.jsonl", "text.txt.gz", "data/*.parquet"):
        assert not isinstance(registry.find_kind(path), Hub), path
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert not isinstance(registry.find_kind("org/name"), Hub)
    program = """
import socket, sys
def refuse(*arguments): raise AssertionError("a socket")
socket.socket = socket.create_connection = socket.getaddrinfo = refuse
from peft_pretraining.data.sources.registry import find_kind
find_kind("org/name_of_a_data_set"), find_kind("c4")
assert not {"datasets", "huggingface_hub", "fsspec", "pyarrow"} & sys.modules.keys()
"""
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", program], cwd=root, check=True)


# ---- what is wrong


@pytest.mark.parametrize(("dataset", "changes", "sentences"), [
    ("org/missing", {}, ["there is no file or folder of this name", "has no data set org/missing", "hf auth login"]),
    ("missing", {}, ["ORGANISATION/NAME"]),
    ("org/private", {}, ["that you may read", "for a private data set, log in with `hf auth login`"]),
    ("org/gated", {}, ["is gated: accept its terms at http://127", "/datasets/org/gated and log in with `hf auth"]),
    ("org/script", {}, ["a script of its own (script.py)", "--dataset_revision refs/convert/parquet"]),
    ("org/two", {"revision": "refs/convert/parquet"}, ["has several configurations: --dataset_config can be a or b."]),
    ("org/configs", {}, ["has several configurations: --dataset_config can be english or german."]),
    ("org/configs", {"config": "french"}, ["no configuration french: --dataset_config can be english or german."]),
    ("org/lines", {"config": "english"}, ["has no configuration english: --dataset_config can be default."]),
    ("org/lines", {"revision": "v2"}, ["has no revision v2: --dataset_revision can be main or v1, or a commit."]),
    ("org/lines", {"train_split": "test"}, ["has no split test: --train_split can be train or validation."]),
    ("org/lines", {"validation_split": "dev"}, ["no split dev: --validation_split can be train or validation."]),
    ("org/lines", {"validation_split": "train"}, ["the splits train and train both have the file"]),
    ("org/lines", {"text_column": "body"}, ["body", "text", "--text_column"]),
    ("org/carded", {"text_column": "id"}, ["column id", "holds int64 and not text: --text_column can be body."]),
    ("org/carded", {"text_column": "x"}, ["has no column x: --text_column can be body."]),
    ("org/pictures", {}, ["imagefolder files", "json, text, csv, parquet or arrow"]),
    ("org/nothing", {}, ["holds no files that are read as text"]),
])  # fmt: skip
def test_each_thing_that_can_be_wrong_is_a_sentence(
    hub: DatasetHub, dataset: str, changes: dict[str, str], sentences: Sequence[str]
) -> None:
    with pytest.raises(UserError) as caught:
        opened(dataset, options=replace(OPTIONS, **changes))  # type: ignore[arg-type]
    for sentence in [f"--dataset {dataset}: ", *sentences]:
        assert sentence in str(caught.value)


def test_without_a_network_another_data_set_is_suggested(hub: DatasetHub) -> None:
    hub.close()
    begin = time.monotonic()
    with pytest.raises(UserError, match=r"cannot be reached \(ConnectError.*--dataset pydocs needs no download"):
        opened("org/lines", options=replace(OPTIONS, retry=replace(QUICK, attempts=1000)))
    assert time.monotonic() - begin < 5


def test_offline_mode_is_said(hub: DatasetHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        opened("org/lines")


# ---- faults


@pytest.mark.parametrize("dataset", ["org/lines", pytest.param("org/columns", marks=pytest.mark.slow)])
@pytest.mark.parametrize("fault", FAULTS)
def test_no_fault_changes_the_documents(
    hub: DatasetHub, monkeypatch: pytest.MonkeyPatch, dataset: str, fault: str
) -> None:
    small_ranges(monkeypatch, dataset)
    source = opened(dataset)
    hub.only = "/resolve/"
    # Of the stalls each costs the time limit.
    hub.faults = [fault, "", ""] * (2 if fault == "stall" else 5)
    assert documents(source) == texts(range(120))
    assert not hub.faults and len(hub.made) >= 2


@pytest.mark.parametrize("dataset", ["org/lines", "org/columns"])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_many_faults_in_many_threads(hub: DatasetHub, monkeypatch: pytest.MonkeyPatch, dataset: str, seed: int) -> None:
    small_ranges(monkeypatch, dataset)
    rng = random.Random(seed)
    hub.faults = [rng.choice(["", "", "cut", "500", "503", "429", "garbage", "short", "refuse"]) for _ in range(60)]
    source = opened(dataset, options=replace(OPTIONS, retry=replace(QUICK, attempts=30)))

    def logical_shard(number: int) -> list[object]:
        shard, part = divmod(number, 2)
        return list(source.read(shard, 2, part, 0))

    with ThreadPoolExecutor(6) as pool:
        logical_shards = list(pool.map(logical_shard, range(6)))
    for number, found in enumerate(logical_shards):
        shard, part = divmod(number, 2)
        assert found == texts(range(40 * shard + part, 40 * shard + 40, 2))
    assert len(hub.made) > 20


@pytest.mark.parametrize("fault", [*(fault for fault in FAULTS if fault not in ("garbage", "short", "whole"))])
def test_faults_while_a_name_is_resolved_change_nothing(hub: DatasetHub, fault: str) -> None:
    """A fault on the way to the card, or to what may not be there, is not "not there"."""
    (hub.repositories["org/lines"].folder / ".huggingface.yaml").write_text(
        "configs:\n- config_name: only\n  data_files:\n  - split: train\n    path: data/train-00001*\n"
    )
    hub.faults = [fault, ""] * (2 if fault == "stall" else 12)
    source = opened("org/lines")
    assert documents(source) == texts(range(40, 80))
    assert len(hub.made) > 1


def test_reading_goes_on_in_the_middle(hub: DatasetHub) -> None:
    for dataset in ("org/lines", "org/columns"):
        source = opened(dataset)
        hub.faults = ["cut", "", "503", "refuse"]
        assert list(source.read(1, 1, 0, 33)) == texts(range(73, 80))
        assert list(source.read(2, 4, 3, 5)) == texts(range(103, 120, 4))


def test_a_hub_that_stays_away_ends_the_run_in_a_sentence(hub: DatasetHub) -> None:
    """And is no damage of a file: else its documents would be passed over."""
    for dataset in ("org/lines", "org/columns"):
        source = opened(dataset)
        hub.faults = ["503"] * 1000
        with pytest.raises(UserError, match=rf"--dataset {dataset}: .* after 8 tries \(HTTP status 503\)"):
            list(source.read(0, 1, 0, 0))
        hub.faults = []


@pytest.mark.parametrize("status", ["401", "403", "404", "410", "451"])
def test_a_final_answer_is_not_asked_again(hub: DatasetHub, status: str) -> None:
    source = opened("org/lines")
    hub.faults, before = [status], hub.requests
    with pytest.raises(UserError, match=f"HTTP status {status}"):
        list(source.read(0, 1, 0, 0))
    assert hub.requests == before + 1


def test_a_pause_ends_at_once(hub: DatasetHub) -> None:
    """Also one that the server has asked for, and one while the name is resolved."""
    for dataset in ("org/lines", "org/columns"):
        stop = threading.Event()
        options = replace(OPTIONS, retry=RetryPolicy(), stop=stop)
        source = opened(dataset, options=options)
        hub.faults, hub.retry_after = ["503"] * 1000, "3600"
        threading.Timer(0.3, stop.set).start()
        begin = time.monotonic()
        with pytest.raises(UserError):
            list(source.read(0, 1, 0, 0))
        with pytest.raises(UserError):
            opened("org/configs", options=replace(options, config="german"))
        assert time.monotonic() - begin < 3
        hub.faults = []


# ---- cost


def test_nothing_is_downloaded_whole(hub: DatasetHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    big = tmp_path / "repositories" / "big"
    numbers = range(8000)
    parquet(big / "data" / "train-00000-of-00001.parquet", numbers)
    json_lines(big / "lines" / "train.jsonl", numbers)
    (big / "README.md").write_text(
        "---\nconfigs:\n- config_name: columns\n  data_files: data/*\n"
        "- config_name: lines\n  data_files: lines/*\n---\n"
    )
    hub.repositories["org/big"] = HubRepository(big)
    monkeypatch.setattr(hub_file_system, "BLOCK_BYTES", 1 << 16)
    for config in ("columns", "lines"):
        source = opened("org/big", options=replace(OPTIONS, config=config))
        size = source.source.files[0].size
        assert size > 6_000_000
        hub.bytes_sent = 0
        first = [text for text, _ in zip(source.read(0, 1, 0, 0), range(20), strict=False)]
        assert first == texts(range(20))
        assert hub.bytes_sent < size / 4, config
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size > 100_000]


@pytest.mark.parametrize("dataset", ["lines.jsonl", "columns.parquet"])
def test_memory_does_not_grow_with_a_file(
    hub: DatasetHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: str
) -> None:
    kind = dataset.partition(".")[2]
    path = tmp_path / "repositories" / "big" / f"train.{kind}"
    (parquet if kind == "parquet" else json_lines)(path, range(8000))
    hub.repositories["org/big"] = HubRepository(path.parent)
    monkeypatch.setattr(hub_file_system, "BLOCK_BYTES", 1 << 16)
    source = opened("org/big")
    tracemalloc.start()
    try:
        count = sum(1 for _ in source.read(0, 1, 0, 0))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 8000 and peak < source.source.files[0].size / 2


def test_each_byte_is_sent_once(hub: DatasetHub) -> None:
    """A file that is read from its beginning to its end, in blocks."""
    source = opened("org/lines")
    hub.bytes_sent, before = 0, hub.requests
    documents(source)
    assert hub.bytes_sent == sum(file.size for file in source.source.files)
    assert hub.requests - before == source.shards


def test_a_file_of_one_shard_is_as_it_was(hub: DatasetHub, tmp_path: Path) -> None:
    """Any byte of a file, forwards and backwards, is what lies there."""
    import fsspec

    path = hub.repositories["org/lines"].folder / "data" / "blob.json"
    path.write_bytes(random.Random(1).randbytes(100_000))
    hub_file_system.serve_pinned_files()
    commit = hub.repositories["org/lines"].refs()["main"][0]
    options = {"endpoint": hub.endpoint}
    with fsspec.open(f"hf://datasets/org/lines@{commit}/data/blob.json", "rb", block_size=777, **options) as file:
        assert file.read() == path.read_bytes()
        for start, count in ((99_990, 100), (0, 1), (50_000, 20_000), (3, 0), (200_000, 5)):
            file.seek(start)
            assert file.read(count) == path.read_bytes()[start : start + count]
        assert file.seek(-7, 2) == 99_993 and file.read() == path.read_bytes()[-7:]
    path.write_bytes(b"")
    with fsspec.open(f"hf://datasets/org/lines@{commit}/data/blob.json", "rb", **options) as file:
        assert file.seek(0, 2) == 0 and file.read() == b""


def test_a_shard_in_the_layout_of_c4(hub: DatasetHub, tmp_path: Path) -> None:
    """--dataset c4 with another configuration is looked up like any other."""
    folder = tmp_path / "repositories" / "c4" / "realnewslike"
    folder.mkdir(parents=True)
    write_shard(folder / "c4-train.00000-of-00001.json.gz", range(5))
    hub.repositories["allenai/c4"] = HubRepository(folder.parent, {"b": folder.parent})
    source = opened("c4", options=replace(OPTIONS, revision="b", config="default"))
    assert documents(source) == [document(i) for i in range(5)]
    assert (source.name, source.repository) == ("c4", "allenai/c4")


def test_the_commit_is_said_and_kept_for_a_run_that_goes_on(hub: DatasetHub, tokenizer: Tokenizer) -> None:
    def build(revision: str = "") -> TrainLoader:
        return build_train_loader(
            dataset="org/lines", tokenizer=tokenizer, packing="pad", max_length=32, batch_size=2, grad_accum_steps=1,
            seed=0, data_lanes=4, workers=0, options=replace(OPTIONS, revision=revision),
        )  # fmt: skip

    loader = build()
    commit = opened("org/lines").revision
    state = loader.state_dict()
    assert state["order"]["dataset_revision"] == commit and commit in loader.describe()[0]
    build(commit).load_state_dict(state)
    state["order"]["dataset_revision"] = "f" * 40
    with pytest.raises(UserError, match=f"--dataset_revision is '{commit}' but was '{'f' * 40}'"):
        loader.load_state_dict(state)
