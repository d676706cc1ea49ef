#!/usr/bin/env bash
# pytest-xdist sends tests of one xdist_group to one worker by writing the group behind the id of each test, into an
# attribute that pytest 9.2 no longer reads. With --dist loadgroup groups are then ignored, without a warning: what was to
# run in one process, a fixture that takes minutes or a device that only one may use, runs in several.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pytest==9.2.0 pytest-xdist==3.8.0
mkdir "$folder/tests"
cat >"$folder/tests/test_group.py" <<'PY'
import os
import pathlib
import time

import pytest


@pytest.mark.xdist_group("one")
@pytest.mark.parametrize("number", range(20))
def test_of_one_group(number):
    time.sleep(0.05)
    with (pathlib.Path(__file__).parent / "workers").open("a") as file:
        file.write(os.environ["PYTEST_XDIST_WORKER"] + "\n")
PY
(cd "$folder/tests" && "$folder/venv/bin/python" -m pytest -q -n 2 --dist loadgroup -p no:cacheprovider . | tail -n 1)
"$folder/venv/bin/python" - "$folder/tests/workers" <<'PY'
import importlib.metadata
import pathlib
import sys

workers = sorted(set(pathlib.Path(sys.argv[1]).read_text().split()))
for package in ("pytest", "pytest-xdist"):
    print(package, importlib.metadata.version(package))
print("workers that ran the 20 tests of one group:", *workers)
assert workers == ["gw0", "gw1"], "the behaviour has changed"
print("as described: the group was spread over two workers")
PY
