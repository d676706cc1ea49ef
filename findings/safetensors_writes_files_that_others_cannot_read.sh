#!/usr/bin/env bash
# save_file of safetensors 0.8 writes a file that its owner alone may read (0600), whatever the umask: 0.7 and before gave
# what the umask gives any new file. What transformers' save_pretrained or a script leaves in a shared folder then cannot
# be loaded by colleagues, while config.json beside it can.
# It is known, and open (issue 782 of safetensors). What works on every release is to give the file the mode of one that
# was written in Python: shutil.copymode.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6
"$folder/venv/bin/pip" install --quiet --no-deps --target "$folder/0.7.0" safetensors==0.7.0
"$folder/venv/bin/pip" install --quiet --no-deps --target "$folder/0.8.0" safetensors==0.8.0
umask 022
write='
import os
import stat

import numpy
import safetensors
from safetensors.numpy import save_file

save_file({"weight": numpy.zeros(2)}, "model.safetensors")
mode = stat.S_IMODE(os.stat("model.safetensors").st_mode)
os.unlink("model.safetensors")
print(f"safetensors {safetensors.__version__}: {mode:o} under a umask of 022")
with open("modes.txt", "a") as file:
    print(mode, file=file)
'
cd "$folder"
for release in 0.7.0 0.8.0; do
    PYTHONPATH="$folder/$release" "$folder/venv/bin/python" -c "$write"
done
"$folder/venv/bin/python" - <<'PY'
before, now = map(int, open("modes.txt"))
assert (before, now) == (0o644, 0o600), f"the behaviour has changed: {before:o} in 0.7.0 and {now:o} in 0.8.0"
print("as described: others may read the file of 0.7.0 and not that of 0.8.0")
PY
