"""Folders, globs and files of users: which files are read for which split, and what is logged."""

import gzip
import json
import logging
import os
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from peft_pretraining.data.sources import local
from peft_pretraining.data.sources.data_files import FileShards, bytes_in_words
from peft_pretraining.data.sources.kind import SourceOptions
from peft_pretraining.data.sources.log_once import log_once
from peft_pretraining.data.sources.registry import open_dataset
from peft_pretraining.data.sources.split_names import named, splits_named
from peft_pretraining.errors import UserError
from tests.data.files import COMPRESS, FORMATS, write_texts

LINE = b'{"text": "a line"}\n'


def texts(name: str, count: int = 5) -> list[str]:
    return [f"{name} {i}" for i in range(count)]


def write(folder: Path, *names: str) -> None:
    """Files whose documents begin with the name of the file."""
    for name in names:
        write_texts(folder / name, texts(name))


def opened(dataset: object, split: str = "train", **options: str) -> FileShards | None:
    return local.KIND.open(str(dataset), split, SourceOptions(**options))  # type: ignore[arg-type]


def files_of(dataset: object, split: str = "train", **options: str) -> list[str] | None:
    """The names that the documents of a split begin with, in order; None if there is no such split."""
    source = opened(dataset, split, **options)
    if source is None:
        return None
    found = [str(item).partition(" ")[0] for shard in range(source.shards) for item in source.read(shard, 1, 0, 0)]
    assert len(found) == 5 * len(set(found))
    return list(dict.fromkeys(found))


def refused(dataset: object, split: str = "train", **options: str) -> str:
    with pytest.raises(UserError) as caught:
        opened(dataset, split, **options)
    assert str(dataset) in str(caught.value)
    return str(caught.value)


# ---- splits


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("c4-train.00000-of-01024.json.gz", {"train"}), ("c4-validation.00000-of-00008.json.gz", {"validation"}),
        ("train.jsonl", {"train"}), ("training_3.txt", {"train"}), ("TRAIN.JSONL", {"train"}),
        ("train00012.parquet", {"train"}), ("en/train/0000.parquet", {"train"}), ("train-clean/a.txt", {"train"}),
        ("pretrain-validation-0.json.gz", {"validation"}), ("pretrain-0.json.gz", set()), ("strained.txt", set()),
        ("valid.txt", {"validation"}), ("my.dev.csv", {"validation"}), ("val_01.arrow", {"validation"}),
        ("validation/train-0.csv", {"train"}), ("train/validation-0.csv", {"validation"}), ("devil.txt", set()),
        ("test.csv", {"test"}), ("evaluation/a.csv", {"test"}), ("test/dev/a.csv", {"validation"}),
        ("latest.txt", set()), ("validation(1).jsonl", {"validation"}), ("train (copy).jsonl", {"train"}),
        ("Copy of dev.csv", {"validation"}), ("[test] a.txt", {"test"}), ("a+val~.txt", {"validation"}),
        ("trainé.txt", set()), ("évaluation.txt", set()), ("invalid.txt", set()),
        ("train-validation-0.json", {"train", "validation"}),
    ],
)  # fmt: skip
def test_the_split_that_a_path_names(path: str, expected: set[str]) -> None:
    assert splits_named(path) == expected


def test_the_splits_are_those_that_datasets_finds(tmp_path: Path) -> None:
    from datasets.data_files import DataFilesDict, get_data_patterns

    layouts = [
        ["train.csv", "test.csv"], ["train_0.csv", "train_1.csv", "valid_0.csv"], ["data/train.csv", "data/dev.csv"],
        ["train/shard_0.csv", "validation/shard_1.csv", "test/shard_2.csv"], ["my-training-1.csv", "my-val-1.csv"],
        ["data/train-00000-of-00002.csv", "data/train-00001-of-00002.csv", "data/validation-00000-of-00001.csv"],
        ["a.csv", "b/c.csv"], ["pretrain-train.csv", "pretrain-validation-0.csv"],
    ]  # fmt: skip
    for number, names in enumerate(layouts):
        folder = tmp_path / str(number)
        write(folder, *names)
        found = DataFilesDict.from_patterns(get_data_patterns(str(folder)), base_path=str(folder))
        for split in ("train", "validation"):
            theirs = sorted(str(Path(path).relative_to(folder)) for path in found.get(split, []))
            assert files_of(folder, split) == (theirs or None)


def test_a_validation_file_is_never_a_training_file(tmp_path: Path) -> None:
    write(tmp_path, "pretrain-0.json.gz", "pretrain-1.json.gz", "pretrain-validation-0.json.gz", "test.json.gz")
    assert files_of(tmp_path) == ["pretrain-0.json.gz", "pretrain-1.json.gz"]
    assert files_of(tmp_path, "validation") == ["pretrain-validation-0.json.gz"]


def test_without_a_validation_file_there_is_no_such_split(tmp_path: Path) -> None:
    write(tmp_path, "b.jsonl", "a.jsonl", "deep/er/c.jsonl", "test/d.jsonl")
    assert files_of(tmp_path) == ["a.jsonl", "b.jsonl", "deep/er/c.jsonl"]
    assert files_of(tmp_path, "validation") is None


def test_unread_test_files_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, "train.csv", "test/a.csv", "my-eval.csv", "dev.csv")
    for _ in range(2):
        assert files_of(tmp_path) == ["train.csv"] and files_of(tmp_path, "validation") == ["dev.csv"]
    assert caplog.text.count("2 files called test, such as my-eval.csv, left unread; --validation_split test") == 1
    caplog.clear()
    assert files_of(tmp_path, "validation", validation_split="test") == ["my-eval.csv", "test/a.csv"]
    assert files_of(tmp_path, train_split="test") == ["my-eval.csv", "test/a.csv"]
    assert not caplog.text


def test_files_without_a_split_are_left_out_where_others_have_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, "train-0.jsonl", "urls.jsonl", "dev.jsonl")
    assert files_of(tmp_path) == ["train-0.jsonl"]
    assert "1 file without a split in the name, such as urls.jsonl, left out (49 % of the text)" in caplog.text
    write(tmp_path / "c4", "c4-train.0.jsonl", "u.jsonl")
    assert files_of(tmp_path / "c4") == ["c4-train.0.jsonl"], "a word among others, but of most of the text"


def test_a_word_in_a_title_leaves_no_larger_text_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "titles", "after_training.txt", "history.txt", "more/poems.txt", "dev.txt")
    assert files_of(tmp_path / "titles") == ["after_training.txt", "history.txt", "more/poems.txt"]
    assert "after_training.txt has the word train in its name, and is read as 2 files without a split" in caplog.text
    assert files_of(tmp_path / "titles", "validation") == ["dev.txt"]
    assert files_of(tmp_path / "titles", train_split="train") == ["after_training.txt"]
    write(tmp_path / "plain", "train.txt", "history.txt", "more/poems.txt")
    assert files_of(tmp_path / "plain") == ["train.txt"]
    assert " % of the text), because 1 file, such as train.txt, is called train" in caplog.text


def test_splits_are_chosen_by_their_names(tmp_path: Path) -> None:
    write(tmp_path, "train-0.csv", "dev/a.csv", "val/b.csv", "test.csv", "poems-00000-of-00001.csv")
    assert files_of(tmp_path, "validation") == ["dev/a.csv", "val/b.csv"]
    assert files_of(tmp_path, "validation", validation_split="dev") == ["dev/a.csv"]
    assert files_of(tmp_path, "validation", validation_split="validation") == ["dev/a.csv", "val/b.csv"]
    assert files_of(tmp_path, train_split="test") == ["test.csv"]
    assert files_of(tmp_path, train_split="poems") == ["poems-00000-of-00001.csv"]
    assert not named("pretrain-validation-0.csv", "train")
    message = refused(tmp_path, train_split="prose")
    assert "--train_split prose: no file of" in message
    assert "Its splits: test (1 file), train (1 file), validation (2 files), without a name (1 file)." in message
    assert "--validation_split eval2" in refused(tmp_path, "validation", validation_split="eval2")
    assert "test.csv is in the validation split and in the training split" in refused(
        tmp_path, train_split="test", validation_split="test"
    )


def test_a_file_in_both_splits_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "name", "train-validation-0.jsonl", "a.jsonl")
    assert "train-validation-0.jsonl is called both train and validation" in refused(tmp_path / "name")
    for folder in ("train", "validation"):
        write_texts(tmp_path / "copy" / folder / "0000.parquet", texts("same"))
    for split in ("train", "validation"):
        message = refused(tmp_path / "copy", split)
        assert "validation/0000.parquet is in the validation split and in the training split, as train/0000" in message
    write_texts(tmp_path / "copy" / "validation" / "0000.parquet", texts("other"))
    assert files_of(tmp_path / "copy") == ["same"]
    write(tmp_path / "only", "validation.csv")
    assert "there is no file to train on. Its splits: validation (1 file)." in refused(tmp_path / "only")


# ---- which files


def test_hidden_files_and_what_describes_data_is_no_data(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, "a.json.gz", "b.json.gz")
    for name in (
        "._a.json.gz", ".ipynb_checkpoints/a-checkpoint.json.gz", "__pycache__/c.json.gz", "README.md",
        "b.json.gz.json", "dataset_infos.json", "tokens.bin", "tokens.bin.json", "config.json",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b'{"dtype": "uint16"}')
    assert files_of(tmp_path) == ["a.json.gz", "b.json.gz"]
    assert files_of(tmp_path / "*") == ["a.json.gz", "b.json.gz"]
    assert files_of(tmp_path / "**") == ["a.json.gz", "b.json.gz"]
    assert not caplog.text


def test_one_rank_of_a_machine_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "a.jsonl", "b.json", "c.json")
    monkeypatch.setenv("LOCAL_RANK", "1")
    opened(tmp_path)
    assert not caplog.text
    log_once.cache_clear()  # as in another process
    monkeypatch.setenv("LOCAL_RANK", "0")
    opened(tmp_path)
    assert "left out" in caplog.text


def test_of_several_formats_that_with_most_bytes_is_taken_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, "a.json", "b.json", "c.json", "validation.parquet")
    write_texts(tmp_path / "huge.jsonl.gz", [*texts("huge.jsonl.gz"), *("" for _ in range(100_000))])
    write_texts(tmp_path / "d.txt", ["x" * 100])
    assert opened(tmp_path).files[0].path.endswith("huge.jsonl.gz")  # type: ignore[union-attr]
    assert files_of(tmp_path, "validation") == ["validation.parquet"]
    assert "for train the 1 file of .jsonl (" in caplog.text and " kB) are read, and 3 files of .json (" in caplog.text
    patterns = ",".join(f"{tmp_path}/**/*{each}" for each in (".json:0.0016", ".jsonl.gz:1", ".txt:0.001"))
    said = f"bytes) and 1 file of .txt (101 bytes) are left out: --dataset '{patterns}' reads all"
    assert said in caplog.text
    assert caplog.text.count("left out") == 1
    assert [bytes_in_words(count) for count in (7, 1234, 3 * 10**9, 5 * 10**16)] == [
        "7 bytes",
        "1.23 kB",
        "3 GB",
        "5e+04 TB",
    ]
    (tmp_path / "even").mkdir()
    for name in ("a.txt", "b.csv", "c.csv"):  # of as many bytes that of more files
        (tmp_path / "even" / name).write_text("text\n1234\n" * (2 if name == "a.txt" else 1))
    assert opened(tmp_path / "even").shards == 2  # type: ignore[union-attr]


def test_empty_and_damaged_files_keep_their_place(tmp_path: Path) -> None:
    write(tmp_path, "b.jsonl", "d.jsonl")
    (tmp_path / "a.jsonl").write_bytes(b"")
    (tmp_path / "c.jsonl").write_bytes(b"")
    source = opened(tmp_path)
    assert source is not None and source.shards == 4
    assert [len(list(source.read(i, 1, 0, 0))) for i in range(4)] == [0, 5, 0, 5]
    for name in ("b.jsonl", "d.jsonl"):
        (tmp_path / name).write_bytes(b"")
    assert "it has no file that can be read: it is empty" in refused(tmp_path)


def test_a_file_beside_its_compressed_copy_is_read_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, "a.jsonl", "a.jsonl.gz", "b.jsonl.xz", "c/a.jsonl")
    assert files_of(tmp_path) == ["a.jsonl", "b.jsonl.xz", "c/a.jsonl"]
    assert "so a.jsonl and not a.jsonl.gz" in caplog.text


@pytest.mark.parametrize("suffix", FORMATS)
def test_an_empty_file_of_any_format_is_nothing(tmp_path: Path, suffix: str) -> None:
    write(tmp_path, f"a{suffix}", f"b{suffix}")
    for content in (b"", b"text\n") if suffix == ".csv" else (b"",):
        (tmp_path / f"b{suffix}").write_bytes(content)
        source = opened(tmp_path)
        assert source is not None and not list(source.read(1, 1, 0, 0))


def test_globs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "x/a.jsonl", "x/b.txt", "y/train/c.jsonl", "y/dev/d.jsonl", "y/z[1].jsonl")
    assert files_of(tmp_path / "x/*.jsonl") == ["x/a.jsonl"]
    assert files_of(tmp_path / "y/*/*.jsonl") == ["y/train/c.jsonl"]
    assert files_of(tmp_path / "y/*/*.jsonl", "validation") == ["y/dev/d.jsonl"]
    assert files_of(tmp_path / "**/[ac].jsonl") == ["y/train/c.jsonl"]
    assert files_of(tmp_path / "y/z[1].jsonl") == ["y/z[1].jsonl"]
    write(tmp_path, "[x]/[12]/a.jsonl", "[x]/[12]/b[1].jsonl", "[x]/1/c.jsonl")
    assert files_of(tmp_path / "[x]/[12]/*.jsonl") == ["[x]/[12]/a.jsonl", "[x]/[12]/b[1].jsonl"]
    assert files_of(tmp_path / "[x]/[1]/*.jsonl") == ["[x]/1/c.jsonl"]
    assert files_of(tmp_path / "[x]/**/[ac].jsonl") == ["[x]/1/c.jsonl", "[x]/[12]/a.jsonl"]
    assert "no file matches this pattern" in refused(tmp_path / "[x]/nothing.jsonl")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files_of("~/x/*.txt") == files_of("~/x/b.txt") == ["x/b.txt"]
    monkeypatch.chdir(tmp_path / "x")
    assert files_of("*.jsonl") == files_of("a.jsonl") == ["x/a.jsonl"]
    assert "no file matches this pattern" in refused(tmp_path / "*.parquet")
    assert f"for the files in them write {tmp_path}/[xy]/**" in refused(tmp_path / "[xy]")
    (tmp_path / "notes.md").touch()
    assert "no file of text matches this pattern" in refused(tmp_path / "*.md")
    assert "there is no such file" in refused(tmp_path / "nothing.jsonl")


def test_links_are_followed_and_end_and_a_file_is_read_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "far", "a.jsonl")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "far")
    (tmp_path / "data" / "b.jsonl").symlink_to(tmp_path / "far" / "a.jsonl")
    (tmp_path / "far" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "broken.jsonl").symlink_to(tmp_path / "nothing")
    write(tmp_path / "far", "c.jsonl", "c2.jsonl")
    os.link(tmp_path / "far" / "c.jsonl", tmp_path / "data" / "hard.jsonl")
    source = opened(tmp_path / "data")
    assert source is not None
    names = [str(Path(file.path).relative_to(tmp_path / "data")) for file in source.files]
    assert names == ["b.jsonl", "hard.jsonl", "link/c2.jsonl"]
    assert "link/a.jsonl and b.jsonl are one file by two names, which is read once, and so are 1 more" in caplog.text
    source = opened(tmp_path / "*" / "*.jsonl")
    assert source is not None and source.shards == 3
    os.link(tmp_path / "far" / "a.jsonl", tmp_path / "data" / "validation.jsonl")
    assert "validation.jsonl of the validation split is a link to b.jsonl of the training" in refused(tmp_path / "data")


def test_one_file(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.parquet", "c.csv.xz", "d.tsv", "validation.txt"):
        write(tmp_path, name) if name != "d.tsv" else (tmp_path / name).write_text(
            "n\ttext\n" + "".join(f"{i}\td.tsv {i}\n" for i in range(5))
        )
        assert local.KIND.recognises(str(tmp_path / name))
        assert files_of(tmp_path / name) == [name]
        assert files_of(tmp_path / name, "validation") is None
    assert "is a single file and has no splits" in refused(tmp_path / "a.jsonl", validation_split="dev")


# ---- C4 as it was


def test_a_c4_folder_keeps_its_fingerprint_and_order(c4_dir: Path) -> None:
    """As runs before have it in their checkpoints: a hash of the names without folders, and the sizes."""
    import hashlib

    for folder in (c4_dir, c4_dir / "en"):
        for split in ("train", "validation"):
            source = opened(folder, split)
            paths = sorted((c4_dir / "en").glob(f"*{split}*.json.gz"))
            sizes = [(path.name, path.stat().st_size) for path in paths]
            assert source is not None and [Path(file.path) for file in source.files] == paths
            assert source.fingerprint() == hashlib.sha256(repr(sizes).encode()).hexdigest()[:16]
    write(c4_dir, "realnewslike/c4-train.00000-of-00001.json.gz")
    assert opened(c4_dir).shards == 6  # type: ignore[union-attr]
    content = (c4_dir / "en/c4-train.00003-of-00006.json.gz").read_bytes()
    (c4_dir / "en/c4-train.00003-of-00006.json.gz").write_bytes(content + b"\0")
    assert opened(c4_dir).fingerprint() != source.fingerprint()  # type: ignore[union-attr]


# ---- columns


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_text_column(tmp_path: Path) -> None:
    def column(*rows: object, **options: str) -> str:
        return opened(jsonl(tmp_path / "a.jsonl", *rows), **options).column  # type: ignore[union-attr]

    def wrong(*rows: object, **options: str) -> str:
        return refused(jsonl(tmp_path / "a.jsonl", *rows), **options)

    assert column({"title": "t", "text": "x"}) == "text"
    assert column({"id": 1, "content": "x"}) == "content"
    assert column({"title": "t", "body": "x"}, text_column="body") == "body"
    assert column({"n": 1, "book": "x" * 300_000}, {"n": 2, "book": "y"}) == "book"
    assert column({"text": None}, {"text": None, "n": 3}) == "text"
    assert "several fields of text, none of them called text: title, body. Choose one with --text_column" in wrong(
        {"title": "t", "body": "x", "n": 1}
    )
    assert "has no field of text. It has: n (int), l (list)." in wrong({"n": 1, "l": ["x"]})
    assert "has no field body (--text_column). It has: text (text)." in wrong({"text": "x"}, text_column="body")
    assert "its field n holds int, not text; text is in title (--text_column)." in wrong(
        {"n": 1, "title": "x"}, text_column="n"
    )
    assert "its field text holds dict, not text" in wrong({"text": {"en": "x"}})


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".csv", ".parquet.gz", ".arrow.xz"])
def test_the_text_column_of_a_table(tmp_path: Path, suffix: str) -> None:
    path = write_texts(tmp_path / f"a{suffix}", texts(f"a{suffix}"), column="content")
    assert files_of(path) == [f"a{suffix}"]
    if "csv" in suffix:  # numbers in the first rows may be followed by text
        assert files_of(path, text_column="content") == [f"a{suffix}"]
        score = opened(path, text_column="score")
        assert score is not None and list(score.read(0, 1, 0, 0))[1] == str(1 / 3)
    else:
        assert "its column score holds double, not text; text is in content" in refused(path, text_column="score")
        assert "It has: n (int64), content (text), score (double)." in refused(path, text_column="body")


# ---- what a file is


HTML = b"<!DOCTYPE html>\n<html><body>Sign in</body></html>\n"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 319\n"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json.gz", LFS, "a Git LFS pointer (get the file itself with: git lfs pull)"),
        ("a.parquet", LFS, "a Git LFS pointer"), ("a.txt", LFS, "a Git LFS pointer"), ("a.csv", LFS, "a Git LFS"),
        ("a.json.gz", b"no gzip at all\n", "plain text, not compressed with gzip"),
        ("a.json.gz", gzip.compress(b"plain text\nof lines\n", mtime=0), "plain text"),
        ("a.json", b"plain text\nof lines\n", "plain text"),
        ("a.json.gz", gzip.compress(b'[{"text": "a"}, {"text": "b"}]\n', mtime=0), "a JSON array, not a JSON object a"),
        ("a.json", b'[\n  {"text": "a"},\n  {"text": "b"}\n]\n', "a JSON array"),
        ("a.json", b'{\n  "data": [\n    {"text": "a"},\n    {"text": "b"}\n  ]\n}\n', "a JSON object over several"),
        ("a.json", json.dumps([{"text": "x" * 100}] * 3000).encode(), "a JSON array"),
        ("a.json", json.dumps({"text": "a", "more": [1]}, indent=1).encode(), "a JSON object over several lines"),
        ("a.jsonl", HTML, "an HTML page"), ("a.parquet", HTML, "an HTML page"), ("a.csv.gz", HTML, "an HTML page"),
        ("a.json", b"PAR1" + bytes(50), "a parquet file"), ("a.arrow", b"PAR1" + bytes(50), "a parquet file"),
        ("a.parquet", LINE, "JSON lines"), ("a.json.gz", LINE, "JSON lines, not compressed with gzip"),
        ("a.jsonl", gzip.compress(LINE, mtime=0), "compressed with gzip, which its name does not end with"),
        ("a.jsonl.zst", gzip.compress(LINE, mtime=0), "compressed with gzip"),
        *(("a.txt", COMPRESS[end](b""), "compressed with ") for end in COMPRESS if end),
        ("a.txt", b"\xff\xfea\0b\0", "text in UTF-16"), ("a.txt", b"PK\x03\x04" + bytes(30), "a zip archive"),
        ("a.csv", b"\x7fELF\0\0\0\0", "binary data"), ("a.txt", random.Random(0).randbytes(10_000), "binary data"),
        ("a.csv", b"t\0e\0x\0t\0\n\0", "binary data"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_what_its_name_says(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert f"{tmp_path / name} is {expected}" in refused(tmp_path / name)
    # So it is among good ones.
    write(tmp_path, *(name.replace("a.", f"{letter}.") for letter in "0z"))
    assert f"{name} is {expected}" in refused(tmp_path)


def test_pages_and_brackets_may_be_text(tmp_path: Path) -> None:
    for content in (
        b"BZh! is a bird\n", b"BZh9 and more\n", b"\x1f\x8b is odd\n", b"\x1f\x8b\x08\xff", b"PAR1 of two\n",
        b"ARROW1 flies\n", b"PARIS\n",
    ):  # fmt: skip
        for name in ("b.txt", "b.csv"):
            (tmp_path / name).write_bytes(content + b"a second line\n")
            assert opened(tmp_path / name) is not None
    for content in (HTML, b"[1] A note\n", b"{braces}\n", LINE, "Ünïcödé\n".encode("latin-1"), b"\xef\xbb\xbfBOM\n"):
        (tmp_path / "a.txt").write_bytes(content)
        assert opened(tmp_path / "a.txt") is not None
    for name in ("n.txt", "n.csv"):
        for nulls in (1, 20):
            (tmp_path / name).write_bytes(b"text\n" + b"one line\n" * 5000 + b"N\0L\n" * nulls)
            source = opened(tmp_path / name)
            assert source is not None and list(source.read(0, 1, 0, 0))[-1] == "N\0L"
    (tmp_path / "n.csv").write_bytes(b"text\nN\0L\n")
    assert opened(tmp_path / "n.csv") is not None
    for lines in (b"oops\n" * 3 + LINE, b'{"text": "cut\n' + LINE, b"[]\n" + LINE, b'{"text": "' + b"x" * 100_000):
        (tmp_path / "a.jsonl").write_bytes(lines + LINE * 5)
        if b"xxx" not in lines:
            assert opened(tmp_path / "a.jsonl") is not None


def test_other_files_and_folders(tmp_path: Path) -> None:
    assert "there is no file of text in this folder (.json, .jsonl, .parquet" in refused(tmp_path)
    for name, content, expected in (
        ("model.pdf", b"%PDF-1.7", "it seems to be a PDF document"), ("a.xyz", LINE, "it seems to be JSON lines"),
        ("train.npy", b"\x93NUMPY\1\0v\0{'descr': '<u2'", "it seems to be a NumPy array (if it holds token ids, write"),
        ("notes.md", b"# Notes\n", "it seems to be plain text"), ("data.zip", b"PK\x03\x04..", "a zip archive"),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        assert local.KIND.recognises(str(tmp_path / name))
        message = refused(tmp_path / name)
        assert "does not end like a file of text (.json" in message and expected in message
    assert not local.KIND.recognises("allenai/c4") and not local.KIND.recognises(str(tmp_path / "nothing"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, "a.jsonl", "b.jsonl")
    (tmp_path / "a.jsonl").chmod(0)
    assert "a.jsonl cannot be read (Permission denied)" in refused(tmp_path / "a.jsonl")
    assert files_of(tmp_path) == ["b.jsonl"]
    assert "1 of 2 files cannot be read and count as damaged places, such as" in caplog.text


def test_unreadable_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The same whoever runs the test."""
    from peft_pretraining.data.sources import builders, file_heads

    write(tmp_path, "a.jsonl", "b.jsonl")

    def open_binary(place: str) -> object:
        if place.endswith("a.jsonl"):
            raise PermissionError(13, "Permission denied", place)
        return Path(place).open("rb")

    for module in (builders, file_heads):
        monkeypatch.setattr(module, "open_binary", open_binary)
    assert "a.jsonl cannot be read (Permission denied)" in refused(tmp_path / "a.jsonl")
    source = opened(tmp_path)
    assert source is not None
    (damage,) = source.read(0, 1, 0, 0)
    assert "Permission denied" in damage.reason and len(list(source.read(1, 1, 0, 0))) == 5  # type: ignore[union-attr]
    assert caplog.record_tuples[0][1] == logging.WARNING
    assert "1 of 2 files cannot be read and count as damaged places, such as" in caplog.text


def test_the_registry_opens_folders_and_globs(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl.zst", "dev.jsonl")
    for dataset in (tmp_path, tmp_path / "*"):
        source = open_dataset(str(dataset), "train")
        assert isinstance(source, FileShards) and _first(source) == "a.jsonl.zst 0"


def _first(source: FileShards) -> object:
    items: Sequence[object] = list(source.read(0, 1, 0, 0))
    return items[0]
