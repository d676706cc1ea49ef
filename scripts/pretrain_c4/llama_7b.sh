#!/usr/bin/env bash
# LLaMA-7B on C4, on 64 GPUs (NNODES=8 MASTER_ADDR=... on every machine). Paper (arXiv 2407.08296) after 40,000 of the
# 150,000 updates: Q-GaLore 18.83 perplexity at 15 GB, 8-bit GaLore 17.94 / 18, 8-bit Adam 18.09 / 26.
# The paper's algorithm (--recipe paper); METHOD=q_galore_full_rank is this project's own. More: scripts/recipe.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../recipe.sh"

MODEL=7b
GPUS=64
BATCH_SIZE=8
UPDATES=150000
LR=0.004
RANK=1024
UPDATE_PROJ_GAP=500
FULL_RANK_METHOD_LR=0.0005
EXTRA_FLAGS=(--grad_clipping 1.0)

pretrain "$@"
