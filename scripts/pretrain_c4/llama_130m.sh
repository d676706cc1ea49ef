#!/usr/bin/env bash
# LLaMA-130M on 2.2B tokens of C4. Paper (arXiv 2407.08296): Q-GaLore 25.53 perplexity at 0.39 GB of weights and states,
# GaLore 25.36 / 0.52, AdamW 25.08 / 0.76.
# The paper's algorithm (--recipe paper); METHOD=q_galore_full_rank is this project's own. More: scripts/recipe.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../recipe.sh"

MODEL=130m
GPUS=1
BATCH_SIZE=256
UPDATES=20000
LR=0.015
RANK=256
UPDATE_PROJ_GAP=200
FULL_RANK_METHOD_LR=0.001

pretrain "$@"
