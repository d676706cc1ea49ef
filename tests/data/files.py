"""Writing the same documents into files of every format and compression."""

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

COMPRESS = {
    "": bytes,
    ".gz": lambda content: gzip.compress(content, mtime=0),
    ".zst": zstandard.ZstdCompressor().compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}
FORMATS = (".json", ".jsonl", ".parquet", ".arrow", ".txt", ".csv")


def content_of(suffix: str, texts: Sequence[str], column: str = "text") -> bytes:
    """A file's content: rows with an integer, the text and another number; of .txt the texts alone."""
    file = io.BytesIO()
    numbers = list(range(len(texts)))
    if suffix in (".json", ".jsonl"):
        lines = ({"n": i, column: text, "score": i / 3} for i, text in zip(numbers, texts, strict=True))
        return "".join(json.dumps(line) + "\n" for line in lines).encode()
    if suffix == ".txt":
        return "".join(text + "\n" for text in texts).encode()
    if suffix == ".csv":
        written = io.StringIO()
        writer = csv.writer(written)
        writer.writerows([("n", column, "score"), *((i, text, i / 3) for i, text in zip(numbers, texts, strict=True))])
        return written.getvalue().encode()
    table = pa.table({"n": numbers, column: list(texts), "score": [i / 3 for i in numbers]})
    if suffix == ".parquet":
        pq.write_table(table, file, row_group_size=100)
    else:
        with pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=100)
    return file.getvalue()


def write_texts(path: Path, texts: Sequence[str], column: str = "text") -> Path:
    """A file of the format and compression that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    compression = path.suffix if path.suffix in COMPRESS else ""
    suffix = path.with_suffix("").suffix if compression else path.suffix
    path.write_bytes(COMPRESS[compression](content_of(suffix, texts, column)))
    return path
