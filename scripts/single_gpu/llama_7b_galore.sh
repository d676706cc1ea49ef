#!/usr/bin/env bash
# The GaLore counterpart of llama_7b.sh: bfloat16 weights, 8-bit states, updates inside the backward pass, on one GPU
# of 24 GB (the official README states 22.02 GB).
METHOD=galore8bit exec bash "$(dirname "${BASH_SOURCE[0]}")/llama_7b.sh" "$@"
