# What the pretraining scripts share: methods, flags, launching. Sourced by them, never run by itself.
#
#   bash scripts/pretrain_c4/llama_60m.sh [METHOD] [flags of run_pretrain.py]
#
# METHOD (also as a variable of the environment):
#   q_galore             INT8 weights, INT4 projections, 8-bit Adam: the paper's algorithm, --recipe paper (default)
#   q_galore_simulation  the same with fake quantization of the weights
#   q_galore_streaming   q_galore with the streaming subspace instead of SVD
#   q_galore_full_rank   this project's own, --recipe full_rank: better perplexity at the same bytes (docs/quality.md)
#   q_galore_orthogonal  the same with a momentum of 7/16 of the rank, --recipe orthogonal: less memory of sums
#   galore               GaLore with float32 Adam states
#   galore8bit           GaLore with 8-bit Adam
#   adamw, adam8bit      full rank
#
# Other variables that a user may set:
#   NPROC     processes on this machine (default: the recipe's GPUs, or as many as there are)
#   NNODES    machines (default 1); with more, MASTER_ADDR names the first one, and every machine runs the same command
#   MAX_RESTARTS  times that several processes start again after one was lost (default 3)
#   SAVE_DIR  folder of the run (default: checkpoints/<recipe>-<method>); the same command again continues there
#   LAUNCHER  what starts run_pretrain.py instead of torchrun, such as LAUNCHER=python
#
# A script sets, before it calls `pretrain "$@"`:
#   MODEL, GPUS, BATCH_SIZE, UPDATES, LR, RANK, UPDATE_PROJ_GAP, FULL_RANK_METHOD_LR, and EXTRA_FLAGS if it needs any;
#   PER_LAYER=1 where updates happen inside the backward pass.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

METHODS="q_galore q_galore_simulation q_galore_streaming q_galore_full_rank q_galore_orthogonal galore galore8bit adamw adam8bit"
EXTRA_FLAGS=()
PER_LAYER=""

# The recipe of arXiv 2407.08296 that is the same for every size.
COMMON_FLAGS=(
    --dataset c4
    --max_length 256
    --total_batch_size 512
    --dtype bfloat16
    --scheduler cosine
    --min_lr_ratio 0.1
    --beta2 0.95
    --project q-galore-c4
)

# Sets METHOD_FLAGS for METHOD.
choose_method() {
    local suffix="${PER_LAYER:+_per_layer}"
    local low_rank=(
        --lr "$LR" --weight_decay 0 --rank "$RANK" --galore_scale 0.25 --update_proj_gap "$UPDATE_PROJ_GAP"
        --cos_threshold 0.4 --gamma_proj 2 --queue_size 5
    )
    local quantized=(
        --optimizer "q_galore_adamw8bit$suffix"
        --weight_bits 8 --weight_group_size 256
    )
    local q_galore=("${quantized[@]}" --recipe paper "${low_rank[@]}")
    case "$METHOD" in
        q_galore) METHOD_FLAGS=("${q_galore[@]}") ;;
        q_galore_simulation) METHOD_FLAGS=("${q_galore[@]}" --simulation) ;;
        q_galore_streaming) METHOD_FLAGS=("${q_galore[@]}" --subspace streaming) ;;
        q_galore_full_rank)
            METHOD_FLAGS=("${quantized[@]}" --recipe full_rank)
            # One GPU has no room for sums of whole gradients: the momentum is the sum, which nothing can clip.
            if [[ -n "$suffix" ]]; then METHOD_FLAGS+=(--sum_in_momentum) EXTRA_FLAGS+=(--grad_clipping 0); fi
            ;;
        q_galore_orthogonal)
            METHOD_FLAGS=("${quantized[@]}" --recipe orthogonal --lr "$LR")
            # Sums over micro-batches grow with the rank: one GPU has no room for the recipe's.
            if [[ -n "$suffix" ]]; then METHOD_FLAGS+=(--rank "$RANK"); fi
            ;;
        galore)
            [[ -z "$suffix" ]] || fail "METHOD galore keeps float32 states, which this script has no room for: use galore8bit"
            METHOD_FLAGS=(--optimizer galore_adamw "${low_rank[@]}")
            ;;
        galore8bit) METHOD_FLAGS=(--optimizer "galore_adamw8bit$suffix" "${low_rank[@]}") ;;
        adamw | adam8bit) METHOD_FLAGS=(--optimizer "$METHOD" --lr "$FULL_RANK_METHOD_LR" --weight_decay 0) ;;
        *) fail "METHOD is '$METHOD', it must be one of: $METHODS" ;;
    esac
}

# Prints how many processes to start here: the recipe's, but no more than there are GPUs.
count_processes() {
    local available=0
    has_nvidia_gpu && available="$(nvidia-smi -L | wc -l)"
    if ((available < 1)); then available=1; fi
    if ((available < $1)); then
        echo "note: the recipe uses $1 GPUs, this machine has $available: more micro-batches make up for it" >&2
        echo "$available"
    else
        echo "$1"
    fi
}

# pretrain [METHOD] [flags]: starts the run; the flags come last, so they win over the recipe's.
pretrain() {
    METHOD="${METHOD:-q_galore}"
    if [[ $# -gt 0 && "$1" != -* ]]; then
        METHOD="$1"
        shift
    fi
    choose_method
    local name="${RECIPE:-llama_$MODEL}-$METHOD"
    if [[ -z "${NO_SETUP:-}" ]]; then use_environment; fi
    local launcher program=(run_pretrain.py) configs=configs
    if [[ -f "$PROJECT_DIR/run_pretrain.py" ]]; then
        cd "$PROJECT_DIR"
    else # in an installed package, which holds no runs: those go into the current folder
        program=(-m peft_pretraining pretrain)
        configs="$PROJECT_DIR/configs"
    fi
    if [[ -n "${LAUNCHER:-}" ]]; then
        read -ra launcher <<<"$LAUNCHER"
    else
        command -v torchrun >/dev/null ||
            fail "torchrun is not in PATH: activate the environment, or make one with bash scripts/quickstart.sh or" \
                "pip install -e '.[train]'"
        local nodes="${NNODES:-1}"
        NPROC="${NPROC:-$(count_processes $((GPUS / nodes > 0 ? GPUS / nodes : 1)))}"
        launcher=(torchrun --nproc_per_node "$NPROC")
        # After a lost rank all start again and continue from the newest checkpoint.
        if ((NPROC * nodes > 1)); then launcher+=(--max-restarts "${MAX_RESTARTS:-3}"); fi
        if ((nodes > 1)); then
            launcher+=(--nnodes "$nodes" --rdzv_backend c10d --rdzv_id "$name"
                --rdzv_endpoint "${MASTER_ADDR:?names the first machine when NNODES is more than 1}:${MASTER_PORT:-29500}")
        else
            launcher+=(--standalone)
        fi
    fi
    # exec: a signal to this script reaches torchrun, which lets the ranks save.
    exec "${launcher[@]}" "${program[@]}" \
        --model_config "$configs/llama_$MODEL.json" \
        "${COMMON_FLAGS[@]}" \
        --batch_size "$BATCH_SIZE" \
        --num_training_steps "$UPDATES" \
        --warmup_steps "$((UPDATES / 10))" \
        --eval_every 1000 \
        --save_every 1000 \
        --name "$name" \
        --save_dir "${SAVE_DIR:-checkpoints/$name}" \
        --continue_from auto \
        "${METHOD_FLAGS[@]}" \
        ${EXTRA_FLAGS[@]+"${EXTRA_FLAGS[@]}"} \
        "$@"
}
