#!/usr/bin/env bash
# Every check and test of the project, in its own virtual environment. Arguments go to pytest, as in
#   bash scripts/test.sh -m "not slow"
# All checks run even if one fails; the exit code is 0 only if all passed.
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$PROJECT_DIR" || exit 1
setup_environment dev
# One thread a process: small tensors are fastest so, and test processes do not fight for cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false

failed=()
check() {
    local title="$1"
    shift
    echo
    echo "== $title: $*"
    "$@" || failed+=("$title")
}

check "format" ruff format --check .
check "lint" ruff check .
check "types" mypy
check "tests" python -m pytest "$@"

echo
if ((${#failed[@]})); then
    echo "FAILED: ${failed[*]}"
    exit 1
fi
echo "All checks passed: format, lint, types, tests."
