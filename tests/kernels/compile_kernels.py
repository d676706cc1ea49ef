"""Compile every Triton kernel as the door launches it, for a compute capability whose GPU need not be there.

    python tests/kernels/compile_kernels.py 86

prints a JSON object. "shared": the most bytes of shared memory that each kernel takes, by its name. "sums": the layouts
of what the kernels of `check_gradients_` and of Newton-Schulz add up, which decide the order of sums. "indices": how
many kernels it takes for norms at different indices. "dequantized": how many dequantize the weights and the bases of
layers, by their widths. "bytes": the instructions of each kernel that move a single byte of a quantized weight whose
rows are of 5461 values, in 8 and in 4 bits. "fp8": those that move less than four bytes in kernels that round factors
with such rows. "int8": the instruction that multiplies in INT8, for many rows and for few. "spills": the most bytes
for which kernels with tensor descriptors have no registers, on the card on which they run. Nothing is
launched, so tensors are on the CPU and results are whatever memory held. Factors of products in FP8 are for cards that
have it.

For an H100 every variant of a kernel is compiled to the end. For another card those are whose instructions are read,
and the first of each kernel; the rest end at LLVM's IR, made and not optimized. All that a card decides for a variant
is known by then: its shared memory, and that its layouts can be lowered. Which sums have one layout is asked of an H100
alone: kernels that add up have no products, so nothing of their layouts depends on the card, which is checked.

    python tests/kernels/compile_kernels.py 75 float16

prints "shared" alone, of a card without bfloat16, where activations are float16. What runs there without Triton is left
out: Newton-Schulz, whose momenta are float32, and products in INT8.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "0"
os.environ["QGALORE_KERNELS"] = "triton"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend, get_ptxas, llvm
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import peft_pretraining.models.ops.rotary  # noqa: F401 - whose operator it calls
from peft_pretraining.models.ops.linear_cross_entropy import scale_, softmax_gradient_
from qgalore import LowRankLinear, WeightFormat, kernels
from qgalore.kernels.triton import matrix_groups
from qgalore.layer.layout import padded_width
from qgalore.layer.quantization import aligned_row_bytes

TAKEN: dict[str, int] = {}
MADE: set[str] = set()
CODE: dict[str, str] = {}
SUMS: dict[str, set[str]] = {}
DESCRIBED: list[tuple[str, str]] = []
_SUMMING = (
    "_partial_sums_kernel", "_finish_kernel", "_row_adam_kernel", "_row_squares_kernel", "_scale_rows_kernel",
    "_trace_kernel", "_square_sums_kernel", "_norm_kernel", "_inverse_norm_kernel", "_fp8_gram_sums_kernel",
    "_fp8_scale_gram_kernel",
)  # fmt: skip


class CardThatIsNotThere:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        """The card to compile for."""
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The only one."""
        return 0


def compile_only(capability: int) -> None:
    """From now on launches compile, and note in `TAKEN` what the kernel takes."""
    run = JITFunction.run

    def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        TAKEN[self.__name__] = max(TAKEN.get(self.__name__, 0), kernel.metadata.shared)
        MADE.add(kernel.hash)
        CODE[self.__name__] = kernel.asm["ptx"]
        if "cp.async.bulk.tensor" in kernel.asm["ptx"]:
            DESCRIBED.append((self.__name__, kernel.asm["ptx"]))
        if self.__name__ in _SUMMING:
            code, name = kernel.asm["ttgir"], self.__name__ + (" of columns" if kwargs.get("TALL") else "")
            assert "_dot" not in code and "tt.dot" not in code, f"layouts of {name} depend on the card"
            if name == "_row_adam_kernel" and args[0][0].shape[1] % 16:
                name += " of ragged rows"
            layouts = re.findall(r'"tt.reduce"\((?:.*\n)*?.*\}\) : \(tensor<[^,>]*, (#[^>]*>?)>', code)
            named = dict(re.findall(r"^(#\w+) = (#ttg.*)", code, re.MULTILINE))
            SUMS.setdefault(name, set()).add(" then ".join(_spelt(layout, named) for layout in layouts))
        return kernel

    driver.set_active(CardThatIsNotThere(capability))
    JITFunction.run = compiled


def _nothing(*_: Any, **__: Any) -> None:
    """What is left out."""


def end_at_llvm() -> None:
    """From now on nothing is compiled to the end but the first variant of a kernel."""
    compile_one, add_stages, version = JITFunction._do_compile, CUDABackend.add_stages, CUDABackend.hash
    whole = True

    def one_compiled(self: Any, *args: Any) -> Any:
        nonlocal whole
        whole = self.__name__ not in TAKEN
        return compile_one(self, *args)

    def stages_added(self: Any, stages: dict[str, Any], *args: Any) -> None:
        add_stages(self, stages, *args)
        if whole:
            return
        lower = stages["llir"]

        def lowered(source: Any, metadata: dict[str, Any]) -> str:
            metadata["name"] = "not whole"
            with mock.patch.multiple(llvm, optimize_module=_nothing, link_extern_libs=_nothing):
                return str(lower(source, metadata))

        stages |= {"llir": lowered, "ptx": lambda *_: "", "cubin": lambda *_: b""}

    JITFunction._do_compile, CUDABackend.add_stages = one_compiled, stages_added
    # Triton keeps what it compiles; nothing that is launched may be taken from there without its instructions.
    CUDABackend.hash = lambda self: version(self) + ("" if whole else " up to LLVM's IR")


def _spelt(layout: str, named: dict[str, str]) -> str:
    """A layout with those that it refers to by name."""
    return re.sub(r"#\w+(?=[,}>]|$)", lambda name: named.get(name[0], name[0]), layout)


def launch_row_adam(skip: torch.Tensor, row: torch.Tensor, dtype: torch.dtype, all_neighbours: bool) -> None:
    """Rows of 7B's embeddings and of a ragged width, alone, beside others of both kinds, and from any address.

    With momenta and directions of every kind, which do not decide the order in which a row is added up.
    """
    for columns in (4096, 5461):
        alone, beside = [[(64, columns)], [(1, columns)]], [(67, columns), (5, 11008), (61, 2731), (64, columns)]
        for shapes in [*alone, beside] if all_neighbours else [beside]:
            for first, factor, bits, to in ((0, None, 8, dtype), (1, torch.ones(()), 32, torch.float32)):
                steps = []
                for m, n in shapes:
                    grad = torch.zeros(m * n + first, dtype=dtype)[first:].view(m, n)
                    momentum = torch.zeros(m, n, dtype=torch.uint8 if bits == 8 else torch.float32)
                    absmax = torch.zeros(-(-m * n // 256)) if bits == 8 else None
                    moments = (momentum, absmax, torch.zeros(m), None)
                    steps.append(kernels.AdamStep(grad, *moments, row, (0.9, 0.99), 1e-8, factor, to))
                kernels.row_adam_steps(steps, 256, skip if first else None)


def launch_sums(row: torch.Tensor, dtype: torch.dtype) -> None:
    """What adds up numbers of a matrix, alone and with neighbours that are shorter by no round number."""
    for shapes in ([(1024, 2736)], [(1024, 2736), (1024, 2731)], [(1024, 2736), (1021, 2731), (5, 7), (1024, 2736)]):
        for turned in (False, True):
            directions = [torch.zeros(m, 2816, dtype=dtype)[:, :n] for m, n in shapes]
            directions = [x.T for x in directions] if turned else directions
            rows = [kernels.RowNormalization(x, 0.2, torch.zeros(len(x)), row, 0.99, 1e-8) for x in directions]
            kernels.normalize_rows(rows)
        for segments in (None, (2, 3)):
            matrices = [torch.zeros(1024, n, dtype=dtype) for _, n in shapes]
            kernels.orthogonalize(matrices, [(1.0, 1.0, 1.0)] * 5, segments)


def launch_groups(skip: torch.Tensor, row: torch.Tensor, half: torch.dtype) -> None:
    """The updates of as many weights as one launch takes: of a layer of 350M and one more, with ragged ones of 60M."""
    layer, ragged = [(1024, 1024)] * 5 + [(2736, 1024)] * 2 + [(1024, 2736)], [(512, 1376), (1376, 512)]
    for shapes, rank, dtype in ((layer, 256, half), (ragged, 112, torch.float32)):
        updates, steps = [], []
        for m, n in shapes:
            stored = kernels.quantize(torch.zeros(m, n), 8, 256)
            left = torch.zeros(rank, m, dtype=dtype) if m < n else None
            right = torch.zeros(rank, n, dtype=dtype) if m >= n else None
            grad = torch.zeros((m, rank) if m >= n else (rank, n), dtype=dtype)
            updates.append(kernels.QuantizedUpdate(*stored, grad, left, right, n, 8, 256, row))
            moments = torch.zeros(grad.shape, dtype=torch.uint8), torch.zeros(-(-grad.numel() // 256))
            steps.append(kernels.AdamStep(grad, *moments, *moments, row, (0.9, 0.99), 1e-8, dtype=dtype))
        kernels.update_quantized_(updates, skip)
        kernels.adam_steps(steps, 256, skip)


def launch_fp8(half: torch.dtype) -> None:
    """Newton-Schulz in FP8, and the factors of products with 7B's weights and its head, and with a ragged one of 1B."""
    for rows in (768, 1024, 2048, 4096):
        matrices = [torch.zeros(rows, 11008, dtype=half), torch.zeros(rows, rows, dtype=half)]
        for schatten_norm in (False, True):
            kernels.orthogonalize_fp8(matrices, [(1.0, 1.0, 1.0)] * 2, schatten_norm=schatten_norm)
    for columns in ((4096,), (11008,), (5461,), (4096,) * 3, (11008,) * 2, (32000,), (50257,)):
        for factors in (None, [torch.ones(each) for each in columns]):
            kernels.fp8_rows([torch.zeros(16, each, dtype=half) for each in columns], columns, factors)
    kernels.fp8_columns(torch.zeros(256, 11008, dtype=half), 11008)
    for rows, width in ((11008, 4096), (2048, 5461)):
        for bits in (8, 4):
            codes = torch.zeros(rows, aligned_row_bytes(width, bits), dtype=torch.uint8)
            scale, zero_point = torch.zeros(2, rows, -(-width // 256), dtype=torch.bfloat16)
            weight = kernels.QuantizedMatrix(codes, scale, zero_point, width, bits, 256)
            kernels.fp8_weight(weight)
            for count in (1, 3):
                kernels.fp8_turned_weights([weight] * count)


def launch_descriptors(half: torch.dtype) -> None:
    """Newton-Schulz of whole tiles, by each entry of the tables."""
    steps = [(1.0, 1.0, 1.0)] * 2
    with mock.patch.object(matrix_groups, "takes_descriptors", lambda dtype, device: True):
        for rows in (768, 1024, 2048, 4096):
            matrices = [torch.zeros(rows, 11008, dtype=half)]
            for schatten_norm in (False, True):
                kernels.orthogonalize_fp8(matrices, steps, schatten_norm=schatten_norm)
            kernels.orthogonalize(matrices, steps)
        kernels.orthogonalize(matrices, [(1.0, 1.0, 1.0)] * 5, (2, 3))


def spills() -> dict[str, int]:
    """The most bytes that a kernel with descriptors stores for want of registers, by its name, as ptxas says."""
    found: dict[str, int] = {}
    for name, code in dict.fromkeys(DESCRIBED):
        card = re.search(r"\.target (\w+)", code)
        assert card is not None
        command = [get_ptxas(90).path, "-v", "--gpu-name", card[1], "-o", os.devnull, "/dev/stdin"]
        said = subprocess.run(command, input=code, capture_output=True, text=True, check=True).stderr
        stored = [int(size) for size in re.findall(r"(\d+) bytes spill stores", said)]
        found[name] = max(found.get(name, 0), *stored)
    return found


def launch_head(half: torch.dtype) -> None:
    """The loss of 7B's head, whose gradient is in FP8, too."""
    logits, targets = torch.zeros(4, 32000, dtype=half), torch.zeros(4, dtype=torch.int64)
    codes = torch.zeros(4, 32000, dtype=torch.float8_e4m3fn)
    softmax_gradient_(logits, 32000, targets, -100, torch.zeros(4), True, codes)


def launch_all(half: torch.dtype, orthogonalizes: bool, sums: bool = False) -> None:
    """Each kernel in the shapes and dtypes that take most: those of 7B in groups of 256, and in float32.

    half: of activations; orthogonalizes: also the kernels of Newton-Schulz; sums: all that may be added up otherwise.
    """
    tokens, width, hidden, rank = 256, 4096, 11008, 1024

    def zeros(*shape: int, dtype: torch.dtype = half) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    skip, factor = torch.zeros((), dtype=torch.bool), torch.ones(())
    row = kernels.StepScalars(5, 0.1, 1.0).row()
    for bits, dtype, side in ((8, half, "left"), (8, torch.float32, "right"), (4, half, "right"), (4, half, "")):
        stored = kernels.quantize(zeros(width, width), bits, 256, row)
        kernels.dequantize([kernels.QuantizedMatrix(*stored, width, bits, 256)], half)
        wide, tall = zeros(rank, width, dtype=dtype), zeros(width, rank, dtype=dtype)
        direction = {"left": wide, "right": tall, "": zeros(width, width)}[side]
        bases = (wide if side == "left" else None, wide if side == "right" else None)
        kernels.update_quantized_([kernels.QuantizedUpdate(*stored, direction, *bases, width, bits, 256, row)], skip)
    launch_groups(skip, row, half)
    launch_row_adam(skip, row, half, sums)
    if sums:
        launch_sums(row, half)
    kernels.quantize(zeros(16, hidden), 8, 13824, row)  # a group a row
    for shapes in ([(width, width)], [(width,)] * 7 + [(hidden,), (1,)], [(2, width)] * 2):
        floats = [kernels.FloatUpdate(zeros(*shape), zeros(*shape), None, None, row) for shape in shapes]
        kernels.update_float_(floats, skip)
    for grads in ([zeros(rank, width)] * 7 + [zeros(width)] * 2, [zeros(3)], [zeros(16)], [zeros(hidden, width)]):
        kernels.check_gradients_(grads, torch.zeros(9), range(len(grads)), skip)
    for dtype in (torch.uint8, torch.float32):
        moments = [zeros(rank, width, dtype=dtype) for _ in range(2)]
        absmax = [zeros(rank * width // 256, dtype=torch.float32) if dtype == torch.uint8 else None for _ in range(2)]
        grad = zeros(rank, width)
        both = (moments[0], absmax[0], moments[1], absmax[1])
        steps = [kernels.AdamStep(grad, *both, row, (0.9, 0.99), 1e-8, factor, half)]
        kernels.adam_steps(steps, 256, skip)
        kernels.momentum_steps(steps, 256, skip)
        if absmax[0] is not None:
            for signed in (True, False):
                value = kernels.dequantize_blocks(moments[0], absmax[0], signed, 256, half)
                kernels.quantize_blocks_(moments[0], absmax[0], value, signed, 256, skip)
    for rank in (224, 1024, 1792, 4096) if orthogonalizes else ():
        for segments in (None, (2, 3)):
            kernels.orthogonalize([zeros(rank, width), zeros(hidden, rank)], [(1.0, 1.0, 1.0)] * 5, segments)
    orthogonal = zeros(width, hidden, dtype=half if orthogonalizes else torch.float32)
    for direction in (orthogonal, orthogonal.T):
        second = zeros(len(direction), dtype=torch.float32)
        kernels.normalize_rows([kernels.RowNormalization(direction, 0.2, second, row, 0.99, 1e-8)], skip)
    heads, tables = zeros(1, tokens, 32, 128), (zeros(tokens, 64, dtype=torch.float32),) * 2
    for back in (False, True):
        torch.ops.peft_pretraining.rotate(heads, heads, *tables, back)
    logits, targets = zeros(4, 32000), torch.zeros(4, dtype=torch.int64)
    softmax_gradient_(logits, 32000, targets, -100, zeros(4, dtype=torch.float32), True)
    scale_(logits, factor)


def int8_instructions() -> dict[str, list[str]]:
    """What multiplies in INT8 with 7B's weights, by the rows of activations, and that loads do not wait for it."""
    width, hidden, found = 4096, 11008, {}
    weight = (torch.zeros(hidden, width, dtype=torch.uint8), *torch.zeros(2, hidden, 1, dtype=torch.bfloat16))
    for rows in (256, 16):
        kinds = set()
        for product, read, given in (
            (kernels.int8_linear, width, hidden), (kernels.int8_linear_backward, hidden, width),
        ):  # fmt: skip
            product(torch.zeros(rows, read, dtype=torch.bfloat16), *weight, given)
            code = CODE["_int8_matmul_kernel"]
            assert "cp.async" in code, "loads wait for products"
            products = re.findall(r"\S*mma(?:_async)?\.sync\S*", code)
            kinds |= {name.split(".")[0] if ".s32.s8.s8" in name else name for name in products}
        found[str(rows)] = sorted(kinds)
    return found


def kernels_of_indices() -> int:
    """How many kernels check the gradients of layers whose norms have indices of their own."""
    MADE.clear()
    for start in (0, 1, 5, 9, 16):
        kernels.check_gradients_(
            [torch.zeros(64, 64)] * 9, torch.zeros(32), range(start, start + 9), torch.zeros((), dtype=torch.bool)
        )
    return len(MADE)


def kernels_of_layers() -> dict[str, int]:
    """How many kernels dequantize the seven weights and the seven bases of two layers, by the shape of a model."""
    found = {}
    for width, hidden, rank in ((512, 1376, 128), (1024, 2736, 448), (1024, 2730, 256)):
        MADE.clear()
        shapes = [(width, width)] * 4 + [(hidden, width)] * 2 + [(width, hidden)]
        for _ in range(2):
            for bits, stored in ((8, shapes), (4, [(rank, min(shape)) for shape in shapes])):
                matrices = []
                for m, n in stored:
                    rows, columns = padded_width(m), padded_width(n)
                    out = torch.empty(rows, columns, dtype=torch.bfloat16) if bits == 8 else None
                    codes, scales = torch.zeros(m, aligned_row_bytes(n, bits)), torch.zeros(m, -(-n // 256)).bfloat16()
                    codes = codes.byte()
                    matrices.append(kernels.QuantizedMatrix(codes, scales, scales, n, bits, 256, out))
                kernels.dequantize(matrices, torch.bfloat16)
        found[f"{width} x {hidden}"] = len(MADE)
    return found


def single_bytes() -> dict[str, list[int]]:
    """Loads and stores of a byte in the kernels that read or write the codes of 1B's down_proj, in 8 and in 4 bits."""
    rank, (m, n), moved = 512, (2048, 5461), re.compile(r"\b(?:ld|st)\.global\S*\.[bus]8\b")
    direction, left = torch.zeros(rank, n, dtype=torch.bfloat16), torch.zeros(rank, m, dtype=torch.bfloat16)
    found: dict[str, list[int]] = {}
    for bits in (8, 4):
        layer = LowRankLinear(torch.zeros(m, n), None, WeightFormat(bits))
        CODE.clear()
        layer.padded_weight(torch.bfloat16)
        layer.update_(direction, left, None, kernels.StepScalars(5, 0.1, 1.0).row())
        layer.update_(torch.zeros(m, n), None, None, kernels.StepScalars(5, 0.1, 1.0).row())
        for name, code in CODE.items():
            found.setdefault(name, []).append(len(moved.findall(code)))
    return found


def narrow_fp8() -> dict[str, int]:
    """Loads and stores of a byte or two in kernels that round factors with 1B's MLP, as a layer stores them."""
    tokens, (m, n) = 64, (2048, 5461)
    x = torch.zeros(tokens, padded_width(n), dtype=torch.bfloat16)
    made = torch.zeros(m, aligned_row_bytes(n, 8), dtype=torch.uint8), *torch.zeros(2, m, 22, dtype=torch.bfloat16)
    weight = kernels.QuantizedMatrix(*made, n, 8, 256)
    CODE.clear()
    kernels.fp8_rows([x, x], [n, n], [torch.ones(kernels.fp8_width(n))] * 2)
    kernels.fp8_columns(x, n)
    kernels.fp8_weight(weight)
    kernels.fp8_turned_weights([weight, weight])
    found = {}
    for name, code in CODE.items():
        narrow = "8" if "weight" in name else "8|16"  # scales of groups have two bytes
        found[name] = len(re.findall(rf"\bld\.global\S*\.b(?:{narrow})\b|\bst\.global\S*\.b(?:8|16)\b", code))
    return found


if __name__ == "__main__":
    capability = int(sys.argv[1])
    compile_only(capability)
    if sys.argv[2:] == ["float16"]:
        launch_all(torch.float16, orthogonalizes=False)
        print(json.dumps({"shared": TAKEN}))
        sys.exit()
    read = {"int8": int8_instructions(), "bytes": single_bytes(), "fp8": narrow_fp8() if capability >= 89 else {}}
    if capability != 90:
        end_at_llvm()
    launch_all(torch.bfloat16, orthogonalizes=True, sums=capability == 90)
    if capability >= 89:
        launch_fp8(torch.bfloat16)
        launch_head(torch.bfloat16)
    if capability == 90:
        launch_descriptors(torch.bfloat16)
    sums = {name: sorted(layouts) for name, layouts in SUMS.items()}
    found = {"shared": TAKEN, "sums": sums, "indices": kernels_of_indices(), "dequantized": kernels_of_layers()}
    print(json.dumps(found | read | {"spills": spills()}))
