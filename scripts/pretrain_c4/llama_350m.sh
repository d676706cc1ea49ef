#!/usr/bin/env bash
# LLaMA-350M on 6.4B tokens of C4. Paper (arXiv 2407.08296): Q-GaLore 19.79 perplexity at 0.88 GB of weights and states,
# GaLore 18.95 / 1.22, AdamW 18.80 / 2.06.
# The paper's algorithm (--recipe paper); METHOD=q_galore_full_rank is this project's own. More: scripts/recipe.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../recipe.sh"

MODEL=350m
GPUS=4
BATCH_SIZE=128
UPDATES=60000
LR=0.01
RANK=256
UPDATE_PROJ_GAP=200
FULL_RANK_METHOD_LR=0.0005

pretrain "$@"
