#!/usr/bin/env bash
# datasets saves a Dataset without rows by save_to_disk, without a word; load_from_disk of that folder raises IndexError.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet datasets==5.2.0 huggingface_hub==2.4.0 fsspec==2026.9.0 pyarrow==26.0.1
HF_HOME="$folder/home" HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - "$folder/saved" <<'PY' 2>/dev/null
import pathlib
import sys

import datasets

datasets.Dataset.from_dict({"text": []}).save_to_disk(sys.argv[1])
print("datasets", datasets.__version__)
print("saved:", *sorted(path.name for path in pathlib.Path(sys.argv[1]).iterdir()))
try:
    outcome = f"{len(datasets.load_from_disk(sys.argv[1]))} rows"
except IndexError as error:
    outcome = f"IndexError: {error}"
print("loaded:", outcome)
assert outcome == "IndexError: list index out of range", "the behaviour has changed"
print("as described: what was saved cannot be loaded")
PY
