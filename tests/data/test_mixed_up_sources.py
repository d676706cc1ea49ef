"""Files that look like others: what is held out, and which text is read, is that of the file that was given."""

from __future__ import annotations

import json
import os
from pathlib import Path

import datasets
import pytest

from peft_pretraining.data.held_out import open_split
from peft_pretraining.data.sources.documents import Damage, Source, is_text
from peft_pretraining.data.sources.kind import DEFAULT_OPTIONS, SourceOptions
from peft_pretraining.data.sources.mapped_tokens import TokenFiles, TokenMixture
from peft_pretraining.data.sources.mixture import Mixture
from peft_pretraining.data.sources.registry import find_kind
from peft_pretraining.errors import UserError
from tests.data.files import write_texts


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QGALORE_CACHE", str(tmp_path / "cache"))


def opened(dataset: str | Path, split: str = "train", options: SourceOptions = DEFAULT_OPTIONS) -> Source:
    source = open_split(str(dataset), split, options)
    assert not isinstance(source, TokenFiles | TokenMixture)
    return source


def texts(source: Source) -> list[str]:
    items = [item for shard in range(source.shards) for item in source.read(shard, 1, 0, 0)]
    assert not any(isinstance(item, Damage) for item in items)
    return [item for item in items if is_text(item)]


def lines(path: Path, documents: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def numbered(word: str, count: int = 1000) -> list[str]:
    return [f"{word} document {i:04}" for i in range(count)]


@pytest.mark.parametrize("kind", ["files", "saved", "written anew"])
def test_equal_names_and_sizes_are_not_equal_text(tmp_path: Path, kind: str) -> None:
    for word in ("one", "two"):
        place = tmp_path / ("same" if kind == "written anew" else word)
        if kind == "saved":
            datasets.Dataset.from_dict({"text": numbered(word)}).save_to_disk(place)
        else:
            path = lines(place / "data.jsonl", numbered(word))
            os.utime(path, ns=(0, 10**18 + len(word) + (word == "two")))
        train, validation = texts(opened(place)), texts(opened(place, "validation"))
        assert sorted([*train, *validation]) == numbered(word) and len(validation) == 100
    if kind == "saved":
        assert opened(tmp_path / "one").fingerprint() != opened(tmp_path / "two").fingerprint()


def test_a_mixture_trains_on_no_text_that_one_of_its_sources_holds_out(tmp_path: Path) -> None:
    lines(tmp_path / "a" / "data.jsonl", numbered("shared"))
    lines(tmp_path / "b" / "data.jsonl", [*numbered("shared"), *numbered("other")])
    dataset = f"{tmp_path}/a:0.5, {tmp_path}/b:0.5"
    validation = opened(dataset, "validation")
    assert isinstance(validation, Mixture)
    held_out = {text for share in validation.shares for text in texts(share.source)}
    assert len(held_out) > 150 and held_out.isdisjoint(texts(opened(dataset)))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("id,text\n0,a,\n0,a, ,\n", ["a", "a"]),
        ("id,text\n0,a,9\n1,b\n", ["row 1: 3 fields where the header has 2: put text with a , in quotes", "b"]),
        ("id\ttext\n0\ta\n1\tb\t\t9\n", ["a", "row 2: 4 fields where the header has 2: put text with a tab in quotes"]),
        ("text\nHello, world\nb\n", ["row 1: 2 fields where the header has 1: put text with a , in quotes", "b"]),
    ],
    ids=["empty", "two", "tab", "one"],
)
def test_text_of_csv_with_a_delimiter_in_it_is_not_cut(tmp_path: Path, content: str, expected: list[str]) -> None:
    path = tmp_path / "data.csv"
    path.write_text(content)
    source = find_kind(str(path)).open(str(path), "train", DEFAULT_OPTIONS)
    assert source is not None and not isinstance(source, TokenFiles | TokenMixture)
    found = [
        f"{item.where.removeprefix(str(path)).strip()}: {item.reason}" if isinstance(item, Damage) else item
        for item in source.read(0, 1, 0, 0)
    ]
    assert found == expected


def test_what_is_about_a_data_set_is_no_data(tmp_path: Path) -> None:
    lines(tmp_path / "train.jsonl", ["a", "b"])
    lines(tmp_path / "validation.jsonl", ["c"])
    for name in ("README.txt", "LICENSE.txt", "requirements-dev.txt"):
        (tmp_path / name).write_text("not a document\n")
    assert texts(opened(tmp_path)) == ["a", "b"]


def test_names_that_differ_in_capitals_alone_are_two_files(tmp_path: Path) -> None:
    for name in ("Part.jsonl", "part.jsonl"):
        lines(tmp_path / name, [name])
    lines(tmp_path / "validation.jsonl", ["c"])
    assert sorted(texts(opened(tmp_path))) == ["Part.jsonl", "part.jsonl"]


def test_a_validation_file_that_is_a_link_to_a_training_file_is_refused(tmp_path: Path) -> None:
    lines(tmp_path / "train.jsonl", ["a", "b"])
    (tmp_path / "validation.jsonl").symlink_to(tmp_path / "train.jsonl")
    with pytest.raises(UserError, match=r"validation\.jsonl of the validation split is a link to train\.jsonl"):
        opened(tmp_path)


@pytest.mark.parametrize("first", ["", "\n\n"])
def test_a_first_file_that_holds_nothing_costs_nothing(tmp_path: Path, first: str) -> None:
    (tmp_path / "part-0.jsonl").write_text(first)
    lines(tmp_path / "part-1.jsonl", ["a", "b"])
    lines(tmp_path / "validation.jsonl", ["c"])
    assert texts(opened(tmp_path)) == ["a", "b"]


def test_an_empty_name_is_no_folder() -> None:
    with pytest.raises(UserError, match="--dataset is empty: give "):
        find_kind(" ")


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv"])
def test_another_encoding_is_refused_and_a_damaged_byte_is_not(tmp_path: Path, suffix: str) -> None:
    documents = [f"Größe und Straße, Nummer {i}" for i in range(100)]
    lines_of = {
        ".jsonl": [f'{{"text": "{text}"}}' for text in documents],
        ".csv": ["text", *map('"{}"'.format, documents)],
    }
    content = "".join(f"{line}\n" for line in lines_of.get(suffix, documents))
    path = tmp_path / f"own{suffix}"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"text that is not in UTF-8 \(convert it, as with iconv"):
        opened(path)
    path.write_bytes(content.encode().replace("ö".encode(), b"\xf6", 1))
    assert len(texts(opened(path))) == 90


def test_a_column_of_numbers_is_no_text_of_csv(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text("id,score,content\n" + "".join(f"{i},0.5,text {i}\n" for i in range(80)))
    assert texts(opened(path))[0].startswith("text ")
    path.write_text("id,text\n" + "".join(f"{i},{i}\n" for i in range(80)))
    assert len(texts(opened(path))) == 72, "of that name it is text"


def test_what_has_no_effect_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    own = tmp_path / "own"
    lines(own / "a.jsonl", numbered("a", 70))
    (own / "b.txt").write_text("".join(f"{text}\n" for text in numbered("b", 70)))
    opened(own / "a.jsonl", options=SourceOptions(text_unit="file"))
    opened(own / "b.txt", options=SourceOptions(text_column="body"))
    assert "--text_unit file has no effect" in caplog.text and "--text_column body has no effect" in caplog.text
    lines(own / "validation.jsonl", ["c"])
    opened(own / "a.jsonl")
    assert "validation.jsonl beside it is not read: to evaluate on that, give their folder" in caplog.text


def test_what_else_lies_in_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("# Notes\n")
    (tmp_path / "data.tar").write_bytes(b"\0" * 257 + b"ustar")
    with pytest.raises(UserError, match=r"there are files of \.md, \.tar: plain text needs the ending \.txt"):
        opened(tmp_path)
    (tmp_path / "a.jsonl").write_text('[{"text": "a"}]\n')
    with pytest.raises(UserError, match=r"a JSON array, not a JSON object a line \(jq -c '\.\[\]' FILE makes"):
        opened(tmp_path)


@pytest.mark.parametrize("layout", ["compressed", "deeper", "longer"])
def test_validation_that_begins_like_training_text_is_refused(tmp_path: Path, layout: str) -> None:
    place = {"compressed": "validation/x.jsonl.gz", "deeper": "sub/validation.jsonl", "longer": "validation/x.jsonl"}
    write_texts(tmp_path / "train" / "x.jsonl", numbered("same", 30))
    write_texts(tmp_path / place[layout], numbered("same", 31 if layout == "longer" else 30))
    with pytest.raises(UserError, match=r"validation.* begins with the same documents as .*train/x\.jsonl"):
        opened(tmp_path, "validation")
    write_texts(tmp_path / place[layout], ["another first", *numbered("same", 30)])
    opened(tmp_path, "validation")


def test_a_mixture_reads_no_file_by_two_names(tmp_path: Path) -> None:
    lines(tmp_path / "a" / "x.jsonl", numbered("a"))
    with pytest.raises(UserError, match=r"/a and .*/a/\*\.jsonl both read .*x\.jsonl: give each file once"):
        opened(f"{tmp_path}/a:1,{tmp_path}/a/*.jsonl:1")


def test_one_file_of_many_that_is_something_else_is_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for i in range(9):
        write_texts(tmp_path / f"{i}.jsonl.gz", numbered(str(i), 20))
    (tmp_path / "0.jsonl.gz").write_bytes(bytes(range(256)) * 12)
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    source = find_kind(str(tmp_path)).open(str(tmp_path), "train", DEFAULT_OPTIONS)
    assert source is not None and not isinstance(source, TokenFiles | TokenMixture)
    items = [item for shard in range(source.shards) for item in source.read(shard, 1, 0, 0)]
    assert sum(map(is_text, items)) == 160 and any(isinstance(item, Damage) for item in items)
    assert "1 of 9 files cannot be read and count as damaged places, such as" in caplog.text
    assert "gone.jsonl is a link to a file that is not there" in caplog.text
    (tmp_path / "1.jsonl.gz").write_bytes(bytes(range(256)) * 12)
    with pytest.raises(UserError, match=r"0\.jsonl\.gz is binary data"):
        opened(tmp_path)


def test_zero_bytes_in_the_place_of_a_compressed_file_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for i in range(9):
        write_texts(tmp_path / f"{i}.jsonl.gz", numbered(str(i), 20))
    (tmp_path / "3.jsonl.gz").write_bytes(bytes(500))
    assert find_kind(str(tmp_path)).open(str(tmp_path), "train", DEFAULT_OPTIONS) is not None
    assert "3.jsonl.gz (it is nothing but zero bytes, as a crash can leave them)" in caplog.text


def test_a_pattern_without_a_match_says_what_is_there(tmp_path: Path) -> None:
    lines(tmp_path / "x.jsonl", ["a"])
    with pytest.raises(UserError, match=r"no file matches this pattern; .* holds x\.jsonl\."):
        find_kind(f"{tmp_path}/*.json").open(f"{tmp_path}/*.json", "train", DEFAULT_OPTIONS)
