#!/usr/bin/env bash
# LLaMA-60M on 1.1B tokens of C4. Paper (arXiv 2407.08296): Q-GaLore 34.88 perplexity at 0.18 GB of weights and states,
# GaLore 34.88 / 0.24, AdamW 34.06 / 0.36.
# The paper's algorithm (--recipe paper); METHOD=q_galore_full_rank is this project's own. More: scripts/recipe.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../recipe.sh"

MODEL=60m
GPUS=1
BATCH_SIZE=256
UPDATES=10000
LR=0.015
RANK=128
UPDATE_PROJ_GAP=200
FULL_RANK_METHOD_LR=0.001

pretrain "$@"
