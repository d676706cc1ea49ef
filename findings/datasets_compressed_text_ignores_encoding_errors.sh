#!/usr/bin/env bash
# The text builder of datasets takes encoding_errors, as open() does: "replace" reads a file with a byte that is no UTF-8.
# Of the same file compressed with gzip the option is lost on the way, and streaming it raises UnicodeDecodeError.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet datasets==5.2.0 huggingface_hub==2.4.0 fsspec==2026.9.0 pyarrow==26.0.1
HF_HOME="$folder/home" HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - "$folder" <<'PY'
import gzip
import pathlib
import sys

import datasets

folder = pathlib.Path(sys.argv[1])
content = "plain\nna\xefve\nplain again\n".encode("latin-1")
(folder / "lines.txt").write_bytes(content)
(folder / "lines.txt.gz").write_bytes(gzip.compress(content))


def lines(name):
    options = {"split": "train", "streaming": True, "encoding_errors": "replace"}
    try:
        return [row["text"] for row in datasets.load_dataset("text", data_files=str(folder / name), **options)]
    except UnicodeDecodeError as error:
        return f"UnicodeDecodeError: {error.reason}"


plain, compressed = lines("lines.txt"), lines("lines.txt.gz")
print("datasets", datasets.__version__)
print("the file, encoding_errors='replace':   ", plain)
print("the same, compressed:                  ", compressed)
assert plain == ["plain", "na\ufffdve", "plain again"], "the behaviour has changed"
assert compressed == "UnicodeDecodeError: invalid continuation byte", "the behaviour has changed"
print("as described: the option holds for the plain file alone")
PY
