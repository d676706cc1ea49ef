#!/usr/bin/env bash
# LLaMA-7B from scratch on one GPU of 16 GB: each weight is updated inside the backward pass, activations are
# recomputed, and 32 micro-batches of 16 make a true total batch of 512. The official README states 15.26 GB for
# Q-GaLore and 22.02 GB for 8-bit GaLore.
# The paper's algorithm (--recipe paper); METHOD=q_galore_full_rank is this project's own. More: scripts/recipe.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../recipe.sh"

RECIPE=llama_7b-single_gpu
MODEL=7b
GPUS=1
NPROC=1
BATCH_SIZE=16
UPDATES=150000
LR=0.004
RANK=1024
UPDATE_PROJ_GAP=500
FULL_RANK_METHOD_LR=0.0005
PER_LAYER=1
EXTRA_FLAGS=(--grad_clipping 1.0 --grad_accum_dtype int8 --activation_checkpointing --single_gpu)

pretrain "$@"
