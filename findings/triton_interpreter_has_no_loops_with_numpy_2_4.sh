#!/usr/bin/env bash
# Triton's interpreter (TRITON_INTERPRET=1) is how kernels are tested on machines without a GPU. In Triton 3.6.0, which
# PyTorch 2.11 comes with, a loop over an argument of the kernel, as every sum over tiles has, ends with a TypeError under
# NumPy 2.4: bounds are arrays of one element, which NumPy took for numbers, with a warning, up to 2.3. Nothing in the
# packages forbids the pair. What works: NumPy 2.3, or Triton 3.9.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
for release in 3.6.0 3.9.0; do
    "$folder/venv/bin/pip" install --quiet --no-deps --target "$folder/triton-$release" "triton==$release"
done
for release in 2.3.5 2.4.6; do
    "$folder/venv/bin/pip" install --quiet --no-deps --target "$folder/numpy-$release" "numpy==$release"
done
cat > "$folder/total.py" <<'PY'
import warnings

import numpy
import torch
import triton
import triton.language as tl

warnings.simplefilter("ignore")


@triton.jit
def total(x, out, count, BLOCK: tl.constexpr):
    found = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        found += tl.load(x + at, mask=at < count, other=0.0)
    tl.store(out, tl.sum(found, axis=0))


out = torch.zeros(1)
try:
    total[(1,)](torch.arange(10.0), out, 10, BLOCK=4)
    seen = f"the sum of 0 to 9 is {out.item():g}"
except Exception as error:
    seen = f"{type(error.__cause__ or error).__name__}: {error.__cause__ or error}"
print(f"triton {triton.__version__}, numpy {numpy.__version__}: {seen}")
PY
cd "$folder"
for pair in "3.6.0 2.3.5" "3.6.0 2.4.6" "3.9.0 2.4.6"; do
    read -r triton numpy <<< "$pair"
    PYTHONPATH="$folder/triton-$triton:$folder/numpy-$numpy" TRITON_INTERPRET=1 "$folder/venv/bin/python" total.py
done | tee seen.txt
grep -q "triton 3.6.0, numpy 2.3.5: the sum of 0 to 9 is 45" seen.txt || { echo "the behaviour has changed: 3.6.0 beside NumPy 2.3"; exit 1; }
grep -q "triton 3.6.0, numpy 2.4.6: TypeError" seen.txt || { echo "the behaviour has changed: 3.6.0 beside NumPy 2.4"; exit 1; }
grep -q "triton 3.9.0, numpy 2.4.6: the sum of 0 to 9 is 45" seen.txt || { echo "the behaviour has changed: 3.9.0"; exit 1; }
echo "as described: loops of Triton 3.6.0 end with a TypeError in its interpreter under NumPy 2.4"
