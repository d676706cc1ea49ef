# What the fine-tuning scripts share: the method and the launching. Sourced by them, never run by itself.
#
#   bash scripts/finetune/glue.sh TASK [METHOD] [flags]      bash scripts/finetune/mmlu.sh [METHOD] [flags]
#
# METHOD (also as a variable of the environment): full, lora, galore, qlora, q_galore (default).
#
# Other variables that a user may set:
#   NPROC     processes on this machine, one for each GPU (default 1)
#   LAUNCHER  what starts the program instead of python or torchrun

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../env.sh"

# start PROGRAM [its own flags] -- [METHOD] [flags]: the flags come last, so they win.
start() {
    local program="$1" own=() launcher=(python)
    shift
    while [[ "$1" != -- ]]; do
        own+=("$1")
        shift
    done
    shift
    METHOD="${METHOD:-q_galore}"
    if [[ $# -gt 0 && "$1" != -* ]]; then
        METHOD="$1"
        shift
    fi
    if [[ -z "${NO_SETUP:-}" ]]; then use_environment; fi
    # In an installed package, which holds no runs, they go into the current folder.
    if [[ -f "$PROJECT_DIR/run_pretrain.py" ]]; then cd "$PROJECT_DIR"; fi
    if [[ -n "${LAUNCHER:-}" ]]; then
        read -ra launcher <<<"$LAUNCHER"
    elif ((${NPROC:-1} > 1)); then
        launcher=(torchrun --standalone --nproc_per_node "$NPROC")
    fi
    # exec: a signal to this script reaches the program.
    exec "${launcher[@]}" -m "peft_pretraining.finetune.$program" ${own[@]+"${own[@]}"} --method "$METHOD" "$@"
}
