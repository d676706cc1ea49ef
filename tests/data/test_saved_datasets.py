"""Folders that `save_to_disk` wrote: rows by index, splits, and errors."""

from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, Features, Value, utils

from peft_pretraining.data.sources import saved
from peft_pretraining.data.sources.documents import Damage
from peft_pretraining.data.sources.kind import SourceOptions
from peft_pretraining.data.sources.registry import find_kind, open_dataset
from peft_pretraining.errors import UserError


def data(name: str, count: int = 1000) -> Dataset:
    return Dataset.from_dict({"n": list(range(count)), "text": [f"{name} {i}" for i in range(count)]})


def opened(folder: Path, split: str = "train", **options: str) -> saved.SavedRows | None:
    return saved.KIND.open(str(folder), split, SourceOptions(**options))  # type: ignore[arg-type]


def documents(folder: Path, split: str = "train", **options: str) -> list[str | Damage]:
    source = opened(folder, split, **options)
    assert source is not None
    return [item for shard in range(source.shards) for item in source.read(shard, 1, 0, 0)]


def refused(folder: Path, split: str = "train", **options: str) -> str:
    with pytest.raises(UserError) as caught:
        opened(folder, split, **options)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_one_data_set(tmp_path: Path) -> None:
    data("row").save_to_disk(tmp_path / "data", num_shards=3)
    assert find_kind(str(tmp_path / "data")) is saved.KIND
    assert documents(tmp_path / "data") == [f"row {i}" for i in range(1000)]
    assert opened(tmp_path / "data", "validation") is None
    source = opened(tmp_path / "data")
    assert source is not None and source.shards == 3
    assert [count for _, _, count in source.files] == [334, 333, 333]
    rows = [f"row {i}" for i in range(334, 667)]
    for step in (1, 2, 7, 300):
        for first in (0, 1, 255, 256, 332, 333, 1000):
            assert list(source.read(1, step, 0, 0))[: first or None] == rows[::step][: first or None]
            assert list(source.read(1, step, step - 1, first)) == rows[step - 1 :: step][first:]


def test_files_are_opened_without_the_bars_of_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden: list[bool] = []
    load = Dataset.load_from_disk

    def seen(folder: str) -> Dataset:
        hidden.append(utils.are_progress_bars_disabled())
        return load(folder)

    monkeypatch.setattr(Dataset, "load_from_disk", seen)
    data("row", 40).save_to_disk(tmp_path / "data", num_shards=4)
    assert len(documents(tmp_path / "data")) == 40
    assert hidden == [True] and not utils.are_progress_bars_disabled()


def test_splits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "data"
    DatasetDict({"train": data("train", 30), "test": data("test", 5), "dev": data("dev", 7)}).save_to_disk(folder)
    assert documents(folder) == [f"train {i}" for i in range(30)]
    assert documents(folder, "validation") == [f"dev {i}" for i in range(7)]
    assert caplog.text.count("its split test is left unread; --validation_split test evaluates on it") == 1
    assert documents(folder, "validation", validation_split="test") == [f"test {i}" for i in range(5)]
    assert documents(folder, train_split="test") == [f"test {i}" for i in range(5)]
    assert "--train_split poems: " in refused(folder, train_split="poems")
    assert "has no such split. It has train, test, dev." in refused(folder, "validation", validation_split="val")
    assert "are the same: dev" in refused(folder, train_split="dev")
    DatasetDict({"train": data("train")}).save_to_disk(tmp_path / "train")
    assert opened(tmp_path / "train", "validation") is None
    DatasetDict({"test": data("test")}).save_to_disk(tmp_path / "test")
    assert "has no such split. It has test." in refused(tmp_path / "test")
    data("row").save_to_disk(tmp_path / "one")
    assert "is a single data set without splits" in refused(tmp_path / "one", train_split="train")


def test_a_selection_and_what_is_nothing(tmp_path: Path) -> None:
    data("row").select(range(999, 0, -3)).save_to_disk(tmp_path / "selected", num_shards=2)
    assert documents(tmp_path / "selected") == [f"row {i}" for i in range(999, 0, -3)]
    texts = ["a", None, "", " \n", "b"]
    for kind in ("string", "large_string"):
        features = Features({"content": Value(kind)})
        Dataset.from_dict({"content": texts}, features=features).save_to_disk(tmp_path / kind)
        assert documents(tmp_path / kind) == ["a", "", "", "", "b"]


def test_the_fingerprint_changes_with_the_data_and_the_column(tmp_path: Path) -> None:
    prints = []
    for number, (shards, count) in enumerate(((1, 50), (2, 50), (2, 51))):
        data("row", count).add_column("more", ["x"] * count).save_to_disk(tmp_path / str(number), num_shards=shards)
        for column in ("text", "more"):
            source = open_dataset(str(tmp_path / str(number)), "train", SourceOptions(text_column=column))
            prints.append(source.fingerprint())
    assert len(set(prints)) == 6


def test_what_can_be_wrong(tmp_path: Path) -> None:
    Dataset.from_dict({"n": [1], "a": ["x"], "b": ["y"]}).save_to_disk(tmp_path / "columns")
    assert "several columns of text, none of them called text: a, b." in refused(tmp_path / "columns")
    assert "its column n holds int64, not text; text is in a, b" in refused(tmp_path / "columns", text_column="n")
    assert "has no column c (--text_column). It has: n (int64), a (text), b (text)." in refused(
        tmp_path / "columns", text_column="c"
    )
    data("row", 0).save_to_disk(tmp_path / "empty")
    assert "has no rows" in refused(tmp_path / "empty")
    data("row").save_to_disk(tmp_path / "damaged")
    (arrow,) = (tmp_path / "damaged").glob("*.arrow")
    content = arrow.read_bytes()
    arrow.write_bytes(content[:100])
    assert "cannot be read as a saved data set" in refused(tmp_path / "damaged")
    arrow.unlink()
    assert "cannot be read as a saved data set" in refused(tmp_path / "damaged")
    arrow.write_bytes(content)
    (tmp_path / "damaged" / "state.json").write_text("{")
    assert "state.json is not as save_to_disk writes it" in refused(tmp_path / "damaged")
