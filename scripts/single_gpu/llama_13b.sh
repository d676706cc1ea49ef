#!/usr/bin/env bash
# LLaMA-13B from scratch on one GPU of 24 GB: this project's own direction keeps one moment, which leaves room for
# micro-batches of 8; 64 of them make a true total batch of 512. Planned: 21.9 GB at the peak.
# The paper has no 13B: rank, rate and number of updates are those of its 7B. On a card with FP8 (RTX 40 and newer, L4,
# H100) add --fp8_products. METHOD=q_galore_streaming, with two moments, fits at --batch_size 2. More: scripts/recipe.sh.
METHOD="${METHOD:-q_galore_orthogonal}"
source "$(dirname "${BASH_SOURCE[0]}")/../recipe.sh"

RECIPE=llama_13b-single_gpu
MODEL=13b
GPUS=1
NPROC=1
BATCH_SIZE=8
UPDATES=150000
LR=0.004
RANK=1024
UPDATE_PROJ_GAP=500
FULL_RANK_METHOD_LR=0.0005
PER_LAYER=1
EXTRA_FLAGS=(--grad_clipping 1.0 --grad_accum_dtype int8 --activation_checkpointing --single_gpu)

pretrain "$@"
