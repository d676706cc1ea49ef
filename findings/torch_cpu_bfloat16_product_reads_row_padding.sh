#!/usr/bin/env bash
# A view of the first columns of a wider bfloat16 matrix, such as logits in rows that are padded to a multiple of 64,
# multiplied on a CPU: where 32 does not divide the number of columns, the product is not that of the view. What lies in
# the padding behind the last column takes part with the weight zero, so that NaN there, for example of memory that was
# never written, makes values of the result NaN. A contiguous copy gives the right result, float32 does, and a
# number of columns that 32 divides does. Seen on a processor with AVX-512; others may take another path.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.4
"$folder/venv/bin/python" - <<'PY'
import torch

print("torch", torch.__version__, "|", torch.backends.cpu.get_cpu_capability())
torch.manual_seed(0)


def product(columns: int, dtype: torch.dtype, copy: bool) -> torch.Tensor:
    padded = torch.full((64, 128), float("nan"), dtype=dtype)
    view = padded[:, :columns]
    view.copy_(torch.randn(64, columns))
    return (view.contiguous() if copy else view) @ torch.ones(columns, 32, dtype=dtype)


found = {}
for columns in (96, 97, 100):
    for dtype in (torch.float32, torch.bfloat16):
        for copy in (True, False):
            result = product(columns, dtype, copy)
            found[columns, dtype, copy] = int(result.isnan().sum())
            kind = "copy" if copy else "view"
            print(f"{columns} columns, {dtype}, {kind}: {found[columns, dtype, copy]} of {result.numel()} NaN")
if "AVX512" not in torch.backends.cpu.get_cpu_capability():
    print("this processor has no AVX-512, where it was seen: nothing to compare")
    raise SystemExit(0)
wrong = {key for key, count in found.items() if count}
assert wrong == {(97, torch.bfloat16, False), (100, torch.bfloat16, False)}, "the behaviour has changed"
print("as described: only the bfloat16 views of 97 and 100 columns have NaN in their product")
PY
