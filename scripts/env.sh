# The Python environment of the project; sourced by quickstart.sh, test.sh and recipe.sh, never run by itself.
#
# Variables that a user may set:
#   PYTHON             interpreter that makes the environment (default: python3, or a newer one beside it)
#   NO_SETUP           1 uses the python that is first in PATH as it is and installs nothing
#   VENV               folder of the environment (default: .venv in the project)
#   TORCH_REQUIREMENT  what pip installs as torch. On Linux the registry's default wheel brings CUDA along, several
#                      gigabytes; for a machine without a GPU, pytorch.org's "Get started" page names the index with
#                      the small CPU wheels: TORCH_REQUIREMENT="torch --index-url URL" bash scripts/quickstart.sh

PROJECT_DIR="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${VENV:-$PROJECT_DIR/.venv}"

fail() {
    echo "error: $*" >&2
    exit 1
}

# Prints the first interpreter that is new enough.
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "Python 3.11 or newer is needed, ${PYTHON:-python3} is $("${PYTHON:-python3}" --version 2>&1 || true):" \
        "install one and name it, as in PYTHON=/path/to/python3.12 bash $0"
}

has_nvidia_gpu() {
    command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1
}

# A container often comes with a torch made for its GPU, which is better than any that pip would bring.
has_cuda_torch() {
    "$1" -c 'import sys, torch
major, minor = (int(part) for part in torch.__version__.split(".")[:2])
sys.exit(not ((major, minor) >= (2, 11) and torch.cuda.is_available()))' >/dev/null 2>&1
}

make_venv() {
    local python options=()
    python="$(find_python)" || exit 1
    has_cuda_torch "$python" && options+=(--system-site-packages)
    echo "== making a virtual environment in $VENV with $("$python" --version)${options:+, reusing its torch}"
    "$python" -m venv --clear ${options[@]+"${options[@]}"} "$VENV" ||
        fail "$python cannot make a virtual environment: install its venv module (python3-venv on Debian and Ubuntu)"
}

install_packages() {
    local extras="$1" requirement
    if has_nvidia_gpu; then requirement="torch>=2.11"; else requirement="torch==2.13.0"; fi
    requirement="${TORCH_REQUIREMENT:-$requirement}"
    if [[ -n "${TORCH_REQUIREMENT:-}" ]] || ! "$VENV/bin/python" -c 'import torch' 2>/dev/null; then
        echo "== installing $requirement (this may take some minutes)"
        # Unquoted: TORCH_REQUIREMENT may hold options of pip.
        # shellcheck disable=SC2086
        "$VENV/bin/python" -m pip install --quiet $requirement || fail "pip could not install $requirement (see above)"
    fi
    echo "== installing the project with its extras [$extras]"
    "$VENV/bin/python" -m pip install --quiet --editable "$PROJECT_DIR[$extras]" ||
        fail "pip could not install the project with [$extras] (see above)"
}

# setup_environment EXTRAS: makes the environment if it is absent, installs what pyproject.toml asks for if that has
# changed since, and puts the environment first in PATH.
setup_environment() {
    local extras="$1" stamp wanted
    if [[ -n "${NO_SETUP:-}" ]]; then return; fi
    stamp="$VENV/.installed-${extras//,/-}"
    "$VENV/bin/python" -c '' 2>/dev/null || make_venv
    wanted="$(cd "$PROJECT_DIR" && cat pyproject.toml scripts/env.sh | cksum) $PROJECT_DIR ${TORCH_REQUIREMENT:-}"
    if [[ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]]; then
        install_packages "$extras"
        echo "$wanted" >"$stamp"
    fi
    use_environment
}

# Puts the environment first in PATH where there is one.
use_environment() {
    if [[ -x "$VENV/bin/python" ]]; then
        export VIRTUAL_ENV="$VENV" PATH="$VENV/bin:$PATH"
    fi
}
