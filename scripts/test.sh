#!/usr/bin/env bash
# The checks and tests of the project, in its own virtual environment; the seconds of each are printed.
#   bash scripts/test.sh          all tests but those marked slow
#   bash scripts/test.sh all      the slow ones, too: whole runs on several ranks, kills
#   bash scripts/test.sh ...      other arguments go to pytest, as in: bash scripts/test.sh -m slow tests/test_golden.py
# Tests run in as many processes as there are cores, or in PYTEST_XDIST_AUTO_NUM_WORKERS (1 GB each).
# All checks run even if one fails; the exit code is 0 only if all passed.
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$PROJECT_DIR" || exit 1
setup_environment dev
# One thread a process: small tensors are fastest so, and test processes do not fight for cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false

if (($# == 0)); then
    set -- -m "not slow"
elif [[ "$1" == all ]]; then
    shift
fi

failed=()
check() {
    local title="$1" start=$SECONDS
    shift
    echo
    echo "== $title: $*"
    "$@" || failed+=("$title")
    echo "== $title took $((SECONDS - start)) s"
}

# Waits for a process that runs beside the tests, prints what it has said, and has its exit code.
finished() {
    local code=0
    wait "$1" || code=$?
    cat "$2"
    return "$code"
}

check "format" ruff format --check .
check "lint" ruff check .
# mypy takes one core, so it runs beside the tests, and says what it has found after them.
types_log="$(mktemp)"
trap 'rm -f "$types_log"' EXIT
mypy >"$types_log" 2>&1 &
types=$!
# Each process takes tests that stand together, as long as there are any, and then some from the end of another's: what
# tests of a file share is made once, and no core is idle at the end.
check "tests" python -m pytest -n logical --dist worksteal "$@"
check "types" finished "$types" "$types_log"

echo
if ((${#failed[@]})); then
    echo "FAILED after $SECONDS s: ${failed[*]}"
    exit 1
fi
echo "All checks passed in $SECONDS s: format, lint, tests, types."
