#!/usr/bin/env bash
# LLaMA-3-8B for MMLU, measured with 5 examples, as in Table 3 of arXiv 2407.08296; --init_from names another model.
#   bash scripts/finetune/mmlu.sh [METHOD] [flags]
# More: scripts/finetune/start.sh and docs/guide/finetuning.md.
source "$(dirname "${BASH_SOURCE[0]}")/start.sh"

start mmlu -- "$@"
