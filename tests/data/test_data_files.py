"""A file of documents: every format gives the same texts by the same indices, and damage costs only what it hits."""

import errno
import gc
import itertools
import json
import logging
import tempfile
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from datasets import config
from fsspec.implementations.memory import MemoryFileSystem

from peft_pretraining.data.sources import builders, csv_records
from peft_pretraining.data.sources.data_files import DataFile, FileShards, format_of, open_files, read_file
from peft_pretraining.data.sources.documents import Damage
from peft_pretraining.data.sources.file_heads import columns_of
from peft_pretraining.data.sources.kind import SourceOptions
from peft_pretraining.errors import UserError
from peft_pretraining.runtime import process
from tests.data.files import COMPRESS, FORMATS, content_of, write_texts

TEXTS = [f"document {i}: " + " ".join(f"wörd{(i * 7 + j) % 50}" for j in range(i % 23)) for i in range(700)]


def file_of(path: Path) -> DataFile:
    return DataFile(str(path), format_of(path.name), path.stat().st_size)


def read(path: Path, column: str = "text", unit: str = "line", first: int = 0, step: int = 1) -> list[str | Damage]:
    return list(read_file(file_of(path), column, unit, first, step))


def lines(path: Path, *written: bytes) -> Path:
    path.write_bytes(b"\n".join(written) + b"\n")
    return path


def damages(found: list[str | Damage]) -> list[Damage]:
    return [item for item in found if isinstance(item, Damage)]


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_and_compression_gives_the_same_documents(tmp_path: Path, suffix: str, compression: str) -> None:
    path = write_texts(tmp_path / f"data{suffix}{compression}", TEXTS)
    assert read(path) == TEXTS
    for step in (1, 3, 64):
        for first in (0, 1, 255, 256, 257, 500, 699, 700, 5000):
            assert read(path, first=first, step=step) == TEXTS[first::step], (first, step)


def test_a_parquet_file_is_read_from_the_group_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"row {i}" for i in range(5000)]
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"text": texts}), path, row_group_size=500)
    content = bytearray(path.read_bytes())
    offset = pq.ParquetFile(path).metadata.row_group(0).column(0).data_page_offset
    content[offset : offset + 200] = bytes(200)
    for first in (1500, 1501, 2499, 4999, 5000):
        assert read(path, first=first, step=7) == texts[first::7]
    path.write_bytes(content)
    assert damages(read(path)) == read(path), "the first group cannot be read"
    assert read(path, first=1500) == texts[1500:], "and is not read by who does not need it"


def test_types_of_other_columns_and_rows_do_not_matter(tmp_path: Path) -> None:
    """The library guesses types from the first rows and casts the later ones to them, or stops."""
    rows = [{"text": f"a{i}", "id": i if i < 300 else f"x{i}"} for i in range(600)]
    path = lines(tmp_path / "data.jsonl", *(json.dumps(row).encode() for row in rows))
    assert read(path) == [f"a{i}" for i in range(600)]
    path = tmp_path / "data.csv"
    path.write_text("id,text\n" + "".join(f"{i if i < 300 else 'x'},{i}.50\n" for i in range(600)) + "1,\n2,NA\n")
    assert read(path) == [*(f"{i}.50" for i in range(600)), "", "NA"]


def test_a_row_of_csv_may_have_empty_fields_at_its_end_or_line_breaks(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes(
        b'\xef\xbb\xbftext,n\r\nplain,1\r\n"two\r\nlines, and ""quotes""",2\r\nmore,3, ,\r\nless\r\nt\xffail,6\r\n'
    )
    assert read(path) == ["plain", 'two\r\nlines, and "quotes"', "more", "less", "t\ufffdail"]
    path.write_bytes(b'n,text\r1,one\r  \r\r2,"t\rwo"\r3,a 5" disk\r4,"a" b\r5,""\r')  # some text is an empty text
    assert read(path) == ["one", "t\rwo", 'a 5" disk', "a b", ""]


FIELDS = "%d fields where the header has 2: put text with a , in quotes"
CLOSED_LATER = b'7,"never closed\n8,plain\n9,"a whole line"\n10,"and ""more"""\n'


@pytest.mark.parametrize(
    ("rows", "texts", "lost"),
    [
        (b'4,"never closed\n', [None], {4: 5}),
        (b'4,"never closed\n5,five\n6,"closed"\n7,seven\n', [None, "five", "closed", "seven"], {4: 5}),
        (b'4,"one\n5,"two\n6,six\n', [None, None, "six"], {4: 5, 5: 6}),
        (b'4,"a\nb"\n5,"c"\n' + CLOSED_LATER, ["a\nb", "c", None, "plain", "a whole line", 'and "more"'], {6: 8}),
        (b'4,"say "hi"\nto her"\n5,five\n', ['say hi"', "", "five"], {}),
        (b'4,"say "hi", and "more,\n5,five\n', [None, "five"], {4: FIELDS % 4}),
        (b'4,"say "a",\n5,five\n6,"six" and, "seven\n7,seven\n', ['say a"', "five", None, "seven"], {6: FIELDS % 3}),
        (b'4,4,"say "a","one\n5,five\n', [None, "five"], {4: 5}),
    ],
    ids=["last", "alone", "two", "closed_later", "stray", "stray_fields", "stray_spaces", "mended_then_open"],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_quote_that_is_not_closed_costs_its_line(
    tmp_path: Path, rows: bytes, texts: list[str | None], lost: dict[int, int | str], suffix: str
) -> None:
    path = tmp_path / f"data.csv{suffix}"
    path.write_bytes(COMPRESS[suffix](b"n,text\n1,one\n2\n3,three\n" + rows))
    found = read(path)
    assert [item if isinstance(item, str) else None for item in found] == ["one", "", "three", *texts]
    assert damages(found) == [
        Damage(f"{path} row {row}", why if isinstance(why, str) else f"a quote in line {why} is not closed")
        for row, why in lost.items()
    ]
    for first in range(9):
        assert read(path, first=first, step=2) == found[first::2]


def test_an_unclosed_quote_is_given_up_before_the_file_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_records, "LONGEST_RECORD_CHARS", 200)
    rows = ['"never closed,2\n', *(f"row {i}{'x' * (i == 3) * 500},1\n" for i in range(1000))]
    lines = iter(["text,n\n", *rows])
    records = csv_records.read_records(lines, ",")
    assert [next(records), next(records)] == [["text", "n"], csv_records.Unclosed(2, too_long=True)]
    assert lines.__length_hint__() > 980
    assert [",".join(record) + "\n" for record in records if isinstance(record, list)] == rows[1:]


def test_what_follows_an_unclosed_quote_is_kept_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every logical shard keeps it: as strings of short lines it would take many times its size."""
    assert csv_records.LONGEST_RECORD_CHARS <= 1 << 20
    monkeypatch.setattr(csv_records, "LONGEST_RECORD_CHARS", 1 << 16)
    rows = (f"{i % 10}\r" for i in range(35_000))
    records = csv_records.read_records(itertools.chain(["text\r", '"open\r'], rows), ",")
    tracemalloc.start()
    try:
        assert [next(records), str(next(records))] == [
            ["text"], "a quote in line 2 is not closed within 65,536 characters",
        ]  # fmt: skip
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 1 << 17 and peak < 1 << 20
    assert list(records) == [[str(i % 10)] for i in range(35_000)]


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.csv", 'id;text\n1;"a, b"\n2;c, d, e\n', ["a, b", "c, d, e"]),
        ("a.csv", "id\ttext\n1\ta, b\n2\tc\n", ["a, b", "c"]),
        ("a.csv", "id|text|n\n1|a, b|2\n2|c|3\n", ["a, b", "c"]),
        ("a.csv", "id;title, short;text\n" + "1;a;b\n" * 3, ["b"] * 3),
        ("a.csv.gz", "id;text\n1;a;\n2;c\n3;d\n", ["a", "c", "d"]),
        ("a.tsv", "id\ttext\n1\ta;b\n2\tc\n", ["a;b", "c"]),
        ("a.tsv.xz", "id,text\n1,a\tb\n2,c\n", ["a\tb", "c"]),
        ("a.csv", "text\na,\nc; d; e\n1|2\n", ["a", "c; d; e", "1|2"]),
        ("a.csv", "text,id;n\na,1;2\nb;c,1,\n", ["a", "b;c"]),
        ("a.csv", "\ufeffsep=;\r\nid,no;text\r\n1;a, b\r\n2;c, d\r\n", ["a, b", "c, d"]),
        ("a.csv", '"sep=\t"\ntext\ta,b\nc,d\t\n', ["c,d"]),
        ("a.csv.gz", "SEP=|\ntext\n\na;b\n", ["a;b"]),
        ("a.csv", "id;text\n" + '1;"' + "a, b; c\n" * 9000 + '"\n2;d\n', ["a, b; c\n" * 9000, "d"]),
    ],
)
def test_what_stands_between_the_fields_of_csv(tmp_path: Path, name: str, content: str, texts: list[str]) -> None:
    path = tmp_path / name
    path.write_bytes(COMPRESS[path.suffix if path.suffix in COMPRESS else ""](content.encode()))
    assert read(path) == texts
    assert "text" in columns_of(str(path), "csv")


def test_a_damaged_line_stays_one_line(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "data.jsonl",
        b'\xef\xbb\xbf{"text": "first"}\r',
        b'{"text": "cut of',
        b"",
        b'  {"text": "in\xffvalid"}',
        b'{"text": null}',
        b'{"text": ""}',
        b'{"text": "  \\n"}',
        b'{"no_text": 1}',
        b"[]",
        b'{"text": 5}',
        b"\x00\xff",
        b'{"text": "half \\ud83d of a pair"}',
        b"[" * 100_000,
        b'{"text": "last"}',
    )
    found = read(path)
    assert [item if isinstance(item, str) else None for item in found] == [
        "first", None, "", "in\ufffdvalid", "", "", "", None, None, None, None, "half ? of a pair", None, "last",
    ]  # fmt: skip
    assert [damage.where for damage in damages(found)] == [f"{path} line {i}" for i in (2, 8, 9, 10, 11, 13)]
    assert "has no field text" in found[7].reason and "is not a string" in found[9].reason  # type: ignore[union-attr]
    for first in range(14):
        for step in (1, 2, 5):
            assert read(path, first=first, step=step) == found[first::step]


def test_one_long_line_and_a_last_one_without_end(tmp_path: Path) -> None:
    texts = ["x" * 3_000_000, "short", "y" * 200_000]
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join(json.dumps({"text": text}).encode() for text in texts))
    assert read(path) == texts


@pytest.mark.parametrize("compression", [name for name in COMPRESS if name])
@pytest.mark.parametrize("suffix", [".jsonl", ".txt"])
def test_a_file_that_is_cut_off_gives_what_was_before(tmp_path: Path, suffix: str, compression: str) -> None:
    documents = 1500 if compression == ".bz2" else 500
    texts = [f"{i} " + " ".join(str(hash((i, j))) for j in range(60)) for i in range(documents)]
    path = write_texts(tmp_path / f"data{suffix}{compression}", texts)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    (*good, last) = read(path)
    assert good == texts[: len(good)]
    assert isinstance(last, Damage)
    assert "too early" in last.reason and "the rest of the file is lost" in last.reason
    assert last.where == f"{path} after line {len(good)}"
    lost = len(content_of(suffix, texts[len(good) :]))
    # bz2 and zstd compress blocks of 900 and 128 kB.
    assert lost < len(content_of(suffix, texts)) / 3 + (900_000 if compression == ".bz2" else 150_000)
    assert read(path, first=len(good)) == [last], "it is reported at its place"
    assert read(path, first=len(good) + 1) == [], "and once"
    assert read(path, first=0, step=len(good) + 1) == [texts[0]]


def test_a_cut_off_csv_parquet_or_arrow_file_is_one_damage(tmp_path: Path) -> None:
    for suffix in (".csv.gz", ".parquet", ".parquet.gz", ".arrow", ".arrow.gz"):
        path = write_texts(tmp_path / f"data{suffix}", TEXTS)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        (*good, last) = read(path)
        assert good == TEXTS[: len(good)], suffix
        assert isinstance(last, Damage) and "the rest of the file is lost" in last.reason, suffix
        if "arrow" in suffix:
            assert len(good) >= 200, suffix


def test_damage_in_the_middle(tmp_path: Path) -> None:
    path = write_texts(tmp_path / "data.jsonl.gz", [f"{i} {hash(i)}" * 20 for i in range(3000)])
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    found = read(path)
    assert isinstance(found[-1], Damage) and "damaged gzip" in found[-1].reason
    assert len(found) > 300


def test_several_members_and_padding(tmp_path: Path) -> None:
    for suffix in (".gz", ".zst", ".xz", ".bz2"):
        path = tmp_path / f"data.txt{suffix}"
        path.write_bytes(b"".join(COMPRESS[suffix](f"{text}\n".encode()) for text in TEXTS[:30]) + bytes(512))
        assert read(path) == TEXTS[:30]
        path.write_bytes(COMPRESS[suffix](b""))
        assert read(path) == []
    path = tmp_path / "long.txt.zst"  # a window that the library refuses on its own
    parameters = zstandard.ZstdCompressionParameters(window_log=28)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path.write_bytes(stream.compress(b"one\ntwo\n") + stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK) + stream.flush())
    assert read(path) == ["one", "two"]


def test_lines_paragraphs_and_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n\r\n \t\r\nthree \xff\r\n\r\n\r\n\r\nfour\r\n")
    assert read(path) == ["one", "two", "", "", "three \ufffd", "", "", "", "four"]
    assert read(path, unit="paragraph") == ["one\ntwo", "three \ufffd", "four"]
    assert read(path, unit="file") == ["one\r\ntwo\r\n\r\n \t\r\nthree \ufffd\r\n\r\n\r\n\r\nfour"]
    path.write_bytes(b"\n\none\n \n\t\ntwo\n" + b"\n" * 300_000 + b"three\n \nfour")
    assert read(path, unit="paragraph") == ["one", "two", "three", "four"]
    many = [f"{i}\n" + "a line\n" * (i % 40) + "the last" for i in range(3000)]
    path.write_text("\n\n".join(many), encoding="utf-8")
    assert read(path, unit="paragraph") == many
    assert read(path, unit="paragraph", first=1000, step=3) == many[1000::3]


@pytest.mark.parametrize("between", ["\n", " \n", "\t\r\n \n", ""])
def test_paragraphs_are_handed_out_while_a_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, between: str
) -> None:
    """With any blank line between them, and in pieces without one: each logical shard would hold the file."""
    monkeypatch.setattr(builders, "LONGEST_PARAGRAPH_BYTES", 300_000)
    texts = [f"{i:05}\n{'x' * 93}" for i in range(20_000)]
    path = tmp_path / "book.txt"
    path.write_bytes(f"\n{between}".join(texts).encode())
    blocks = iter(list(builders._whole_lines(str(path))))
    paragraphs = next(builders._paragraphs(blocks))
    assert blocks.__length_hint__() >= 5
    if between:
        assert [text.decode() for text in paragraphs] == texts[: len(paragraphs)]
        assert read(path, unit="paragraph") == texts
    else:
        found = read(path, unit="paragraph")
        assert "\n".join(map(str, found)) == "\n".join(texts)
        assert all(300_000 <= len(str(text)) < 600_000 for text in found[:-1])


def test_strings_that_are_no_utf8_and_other_types_of_text(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    bad = pa.array([b"good", b"b\xffad", None, b" "], pa.binary())
    bad = pa.Array.from_buffers(pa.string(), 4, bad.buffers())
    pq.write_table(pa.table({"text": bad}), path)
    assert read(path) == ["good", "b\ufffdad", "", ""]
    for array in (pa.array(["a", None, "b"]).dictionary_encode(), pa.array(["a", None, "b"], pa.large_string())):
        pq.write_table(pa.table({"text": array, "odd": pa.array([1, 2, 3], pa.decimal128(5))}), path)
        assert read(path) == ["a", "", "b"]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".csv"])
def test_a_later_file_without_the_column_is_one_damage(tmp_path: Path, suffix: str) -> None:
    path = write_texts(tmp_path / f"data{suffix}", TEXTS)
    (damage,) = read(path, column="content")
    assert isinstance(damage, Damage) and "content" in damage.reason
    if suffix != ".csv":
        (damage,) = read(path, column="score")
        assert isinstance(damage, Damage) and "holds" in damage.reason and "not text" in damage.reason
        twice(path, "n", "text", "text")
        (damage,) = read(path)
        assert isinstance(damage, Damage) and "it has several columns called text" in damage.reason


def twice(path: Path, *names: str) -> None:
    """A table of one row whose columns are called so, each value its number."""
    table = pa.table([pa.array([str(i)]) for i in range(len(names))], list(names))
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_columns_of_one_name(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"data{suffix}"
    twice(path, "n", "text", "n")
    assert read(path) == ["1"]
    assert open_files("it", (file_of(path),), "", SourceOptions()).column == "text"
    twice(path, "n", "text", "text")
    with pytest.raises(UserError, match=f"data{suffix} has several columns called text: rename all but one"):
        open_files("it", (file_of(path),), "", SourceOptions())
    assert open_files("it", (file_of(path),), "", SourceOptions(text_column="n")).column == "n"


def test_what_is_damaged_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The library's parsers print what they cannot read, beside the count and the sentence that it gets here."""
    for suffix in (".parquet", ".arrow"):
        path = write_texts(tmp_path / f"data{suffix}", TEXTS)
        content = path.read_bytes()
        path.write_bytes(content[:-5])
        assert damages(read(path))
    assert not caplog.records
    logging.getLogger("datasets.builder").warning("what it warns of")
    assert len(caplog.records) == 1


def test_what_a_file_is_instead_is_said_where_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    (damage,) = read(path)
    assert isinstance(damage, Damage) and "it is a Git LFS pointer" in damage.reason
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(b'{"text": "not compressed"}\n')
    (damage,) = read(path)
    assert isinstance(damage, Damage) and "JSON lines, not compressed with gzip" in damage.reason


def test_a_name_with_signs_of_a_pattern_is_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"a{sign}b{suffix}" for sign in ("[1]", "*", "?", "{c} #d", "::c") for suffix in (*FORMATS, ".parquet.gz")]
    for name in (*names, "a::b/c.parquet", "hf::a/[b]/c::d.arrow", "a::b/c::d.csv"):
        assert read(write_texts(tmp_path / name, TEXTS[:5])) == TEXTS[:5], name
    monkeypatch.chdir(tmp_path)
    assert read(Path("a::b/c.parquet")) == read(Path("a::cb.arrow")) == TEXTS[:5]
    gc.collect()
    assert not [path for path in Path(builders._scratch()).iterdir() if path.is_dir() and any(path.iterdir())]


def test_the_shards_are_the_files(tmp_path: Path) -> None:
    paths = [write_texts(tmp_path / f"{i}.jsonl.gz", TEXTS[i * 50 : i * 50 + 50]) for i in range(3)]
    source = FileShards("test", tuple(map(file_of, paths)), "identity")
    assert source.shards == 3
    for slices, part, start in ((1, 0, 0), (3, 2, 4), (7, 6, 100)):
        assert list(source.read(1, slices, part, start)) == TEXTS[50:100][part::slices][start:]
    prints = {source.fingerprint(), FileShards("test", source.files, "identity", "content").fingerprint()}
    text = DataFile("a.txt", "text", 1)
    prints |= {FileShards("test", (text,), "identity", unit=unit).fingerprint() for unit in ("line", "file")}
    assert len(prints) == 3


def test_a_file_of_the_same_size_is_told_by_its_beginning_and_end(tmp_path: Path) -> None:
    contents = [b"", b"x" * 20_000, b"x" * 500_000]
    paths = [tmp_path / f"{i}.txt" for i in range(3)]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    source = FileShards("it", tuple(map(file_of, paths)), "")
    files = source.file_list()
    assert files is not None and files.heads == ()
    heads = files.with_heads().heads
    assert len(set(heads)) == 3 and all(len(head) == 16 for head in heads)
    assert files.with_heads() == files.with_heads() and files.with_heads().identity() == files.identity()
    for number, place in ((1, 0), (1, 19_999), (1, 16_384), (2, 16_383), (2, 483_616)):
        paths[number].write_bytes(contents[number][:place] + b"y" + contents[number][place + 1 :])
        assert [a == b for a, b in zip(heads, files.with_heads().heads, strict=True)] == [i != number for i in range(3)]
        paths[number].write_bytes(contents[number])
    paths[0].unlink()
    assert files.with_heads().heads == ("", *heads[1:])
    remote = FileShards("it", (DataFile("hf://datasets/a/b@c/d.txt", "text", 5),), "").file_list()
    assert remote is not None and remote.with_heads().heads == ()


def test_readers_of_a_compressed_table_share_one_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builders, "_scratch_folders", [])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    path = write_texts(tmp_path / "data.parquet.gz", TEXTS)
    with ThreadPoolExecutor(8) as threads:
        streams = [read_file(file_of(path), first=i, step=8) for i in range(8)]
        assert list(threads.map(next, streams)) == TEXTS[:8]
    (copy,) = Path(builders._scratch()).iterdir()
    write_texts(path, TEXTS[:300:-1])
    assert read(path) == TEXTS[:300:-1], "a copy of what the file was is none"
    for i, stream in enumerate(streams):
        assert copy.exists() and list(stream) == TEXTS[i + 8 :: 8]
    gc.collect()
    assert not copy.exists()


def test_lines_leave_no_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builders, "_scratch_folders", [])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    for suffix in (".txt", ".csv.gz", ".parquet", ".arrow", ".jsonl"):
        stream = read_file(file_of(write_texts(tmp_path / f"data{suffix}", TEXTS)))
        assert next(stream) == TEXTS[0] and not [*(tmp_path / "temporary").iterdir()], suffix


@pytest.mark.parametrize("lost", [False, True])
def test_a_rank_that_leaves_at_once_removes_its_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    def lose() -> None:
        raise RuntimeError("lost")

    def end(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(builders, "_scratch_folders", [])
    monkeypatch.setattr(process, "world_size_of_launch", lambda: 2)
    monkeypatch.setattr(process, "is_lost_rank", lambda error: True)
    monkeypatch.setattr(process.os, "_exit", end)
    stream = read_file(file_of(write_texts(tmp_path / "data.parquet.gz", TEXTS)))
    assert next(stream) == TEXTS[0]
    folder = Path(builders._scratch())
    assert any(folder.iterdir())
    with pytest.raises(SystemExit):
        process.leave(process.exit_code_of(lose if lost else lambda: None, "a program"))
    assert not folder.exists()


def test_files_are_read_in_threads(tmp_path: Path) -> None:
    paths = [write_texts(tmp_path / f"{i}{suffix}", TEXTS) for i in range(3) for suffix in FORMATS]
    with ThreadPoolExecutor(8) as threads:
        assert all(found == TEXTS for found in threads.map(read, paths))


@pytest.mark.parametrize("suffix", [".parquet.gz", ".arrow.zst"])
def test_what_is_decompressed_into_a_file_goes_away(tmp_path: Path, suffix: str) -> None:
    stream = read_file(file_of(write_texts(tmp_path / f"data{suffix}", TEXTS)))
    assert next(stream) == TEXTS[0]
    left = set(Path(builders._scratch()).glob("tmp*"))
    assert left
    stream.close()  # type: ignore[attr-defined]
    del stream
    gc.collect()
    assert not left & set(Path(builders._scratch()).glob("tmp*"))


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_a_file_elsewhere_is_read_by_its_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, compression: str
) -> None:
    local = write_texts(tmp_path / f"data{suffix}{compression}", TEXTS)
    with fsspec.open(f"memory://{tmp_path.name}/{local.name}", "wb") as remote:
        remote.write(local.read_bytes())
    file = DataFile(f"memory://{tmp_path.name}/{local.name}", format_of(local.name), local.stat().st_size)
    assert list(read_file(file)) == TEXTS
    assert list(read_file(file, first=300, step=7)) == TEXTS[300::7]

    def failing(*_: object, **__: object) -> object:
        raise ConnectionResetError("the peer went away")

    monkeypatch.setattr(MemoryFileSystem, "_open", failing)
    monkeypatch.setattr(config, "STREAMING_OPEN_MAX_RETRIES", 1)
    with pytest.raises(ConnectionError):  # not damage
        list(read_file(file))


def test_a_shortage_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_texts(tmp_path / "data.jsonl", TEXTS)

    def open_binary(place: str) -> object:
        raise OSError(errno.EMFILE, "Too many open files", place)

    monkeypatch.setattr(builders, "open_binary", open_binary)
    with pytest.raises(UserError, match=r"--dataset: .*data.jsonl cannot be read now \(Too many open files\)"):
        read(path)
