#!/usr/bin/env bash
# From nothing to a trained model in a few minutes, on a CPU or a GPU: sets up the environment, trains LLaMA-9M with
# Q-GaLore by its default recipe (INT8 weights, an 8-bit momentum of full rank, per-layer updates) on Python's own
# documentation, evaluates, saves, draws the curves, and shows a text of the model. Arguments are flags of
# run_pretrain.py and win over those below.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$PROJECT_DIR"

MODEL=9m
UPDATES=150
BATCH_SIZE=8   # sequences an update
MAX_LENGTH=128 # tokens a sequence
# Most CPUs compute float32 faster than bfloat16.
if has_nvidia_gpu; then DTYPE=bfloat16; else DTYPE=float32; fi
SAVE_DIR="${SAVE_DIR:-runs/quickstart-$(date +%Y%m%d-%H%M%S)}"

# What this script itself must know of the arguments: where the run goes, and whether it is one.
previous=""
dry_run=""
for argument in "$@"; do
    if [[ "$previous" == --save_dir ]]; then SAVE_DIR="$argument"; fi
    if [[ "$argument" == --save_dir=* ]]; then SAVE_DIR="${argument#--save_dir=}"; fi
    if [[ "$argument" == --dry_run ]]; then dry_run=1; fi
    previous="$argument"
done

setup_environment train,plot

# glibc gives large tensors back to the kernel at once and gets them anew, page by page: a tenth of the time.
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-33554432}"
export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-8589934592}" MALLOC_TOP_PAD_="${MALLOC_TOP_PAD_:-134217728}"

echo "== training LLaMA-9M, a few minutes on two CPU cores"
start_seconds=$SECONDS
${LAUNCHER:-torchrun --standalone --nproc_per_node "${NPROC:-1}"} run_pretrain.py \
    --model_config "configs/llama_$MODEL.json" \
    --dataset pydocs --packing pack --dtype "$DTYPE" \
    --batch_size "$BATCH_SIZE" --total_batch_size "$BATCH_SIZE" --max_length "$MAX_LENGTH" \
    --optimizer q_galore_adamw8bit_per_layer \
    --num_training_steps "$UPDATES" --warmup_steps "$((UPDATES / 10))" \
    --eval_every "$((UPDATES / 2))" --eval_tokens 50K --save_every "$((UPDATES / 2))" \
    --name quickstart --wandb_mode off \
    --save_dir "$SAVE_DIR" \
    "$@"

if [[ -n "$dry_run" ]]; then exit 0; fi
python -m scripts.plot_run "$SAVE_DIR"
echo "== text from the trained model"
python -m peft_pretraining generate "$SAVE_DIR" "The function returns" --max_tokens 40 || true # the run is done all the same

cat <<TEXT

== done in $((SECONDS - start_seconds)) seconds. In $SAVE_DIR:
     step_*/        checkpoints: safetensors and JSON
     metrics.jsonl  every metric of every update
     config.json    the model's shape; command.txt: the commands of this run
     curves.png     loss and learning rate
== next
     bash scripts/quickstart.sh --recipe paper --lr 0.01 --rank 32 --galore_scale 0.25    the paper's algorithm
     bash scripts/quickstart.sh --num_training_steps 1500    ten times as long
     source .venv/bin/activate; python run_pretrain.py --help    every flag
     qgalore generate $SAVE_DIR "A class"    more text; docs/guide/after_training.md has more
     bash scripts/pretrain_c4/llama_60m.sh                   the paper's 60M recipe on C4, one GPU
     bash scripts/single_gpu/llama_7b.sh                     7B on one GPU of 16 GB
TEXT
