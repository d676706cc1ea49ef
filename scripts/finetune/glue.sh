#!/usr/bin/env bash
# RoBERTa-base on a task of GLUE (cola, stsb, mrpc, rte, sst2, mnli, qnli, qqp), as in Table 4 of arXiv 2407.08296.
#   bash scripts/finetune/glue.sh TASK [METHOD] [flags]
# More: scripts/finetune/start.sh and docs/guide/finetuning.md.
source "$(dirname "${BASH_SOURCE[0]}")/start.sh"

[[ $# -gt 0 && "$1" != -* ]] || fail "give a task of GLUE first, as in: bash $0 rte q_galore"
task="$1"
shift
start glue --task "$task" -- "$@"
