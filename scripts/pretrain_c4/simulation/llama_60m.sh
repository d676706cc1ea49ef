#!/usr/bin/env bash
# ../llama_60m.sh with fake quantization (--simulation): weights are stored as floats and rounded to the values that
# INT8 has, so the run shows what quantization does to the perplexity and saves no memory for weights.
exec bash "$(dirname "${BASH_SOURCE[0]}")/../llama_60m.sh" q_galore_simulation "$@"
