"""The operations on tensors: each checks its arguments, and the backend that is chosen for them does the rest.

Operations on a group of matrices take a list; for one matrix it is a list of one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qgalore.kernels.arguments import (
    GROUP_LIMIT,
    AdamStep,
    FloatUpdate,
    Fp8Matrix,
    QuantizedMatrix,
    QuantizedUpdate,
    RowNormalization,
    StepNumbers,
    StepScalars,
    fp8_width,
    next_power_of_2,
)
from qgalore.kernels.backend import backend, grouped_by_backend, product_dtype, use_triton
from qgalore.kernels.reference import (
    adam,
    float_update,
    fp8_matmul,
    gradient_check,
    group_quantization,
    int8_matmul,
    low_rank_update,
    newton_schulz,
    newton_schulz_fp8,
    row_adam,
    row_normalization,
)
from qgalore.kernels.reference.adam import PART, scaled
from qgalore.kernels.reference.newton_schulz import odd_polynomials
from qgalore.kernels.reference.rows import at_least_1d, project_back, row_chunks, rows_of, stepped

__all__ = [
    "GROUP_LIMIT", "PART", "AdamStep", "FloatUpdate", "Fp8Matrix", "QuantizedMatrix", "QuantizedUpdate",
    "RowNormalization", "StepNumbers", "StepScalars", "adam_steps", "at_least_1d", "check_gradients_", "dequantize",
    "dequantize_blocks", "fp8_columns", "fp8_joins", "fp8_product", "fp8_rows", "fp8_rows_to_fuse",
    "fp8_turned_weights", "fp8_weight", "fp8_width", "has_fp8", "int8_linear", "int8_linear_backward", "momentum_steps",
    "normalize_rows", "odd_polynomials", "orthogonalize", "orthogonalize_fp8", "product_dtype", "project_back",
    "quantize", "quantize_blocks_", "reads_rows_on_device", "row_adam_steps", "row_chunks", "rows_of", "runs_in_fp8",
    "scaled", "stepped", "update_float_", "update_quantized_", "use_triton",
]  # fmt: skip

_LONGEST_INT8_SUM = (2**31 - 1) // (127 * 128)


def _check_matrix(x: Tensor, name: str) -> None:
    if x.dim() != 2:
        raise ValueError(f"{name} must be a matrix, not of shape {tuple(x.shape)}")


def _check_format(bits: int, group_size: int) -> None:
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, not {bits}")
    if group_size < 1:
        raise ValueError(f"group_size must be positive, not {group_size}")


def quantize(
    x: Tensor, bits: int, group_size: int, row: Tensor | None = None, row_start: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize a float matrix (rows, columns): stored codes, scale, zero point.

    Codes are uint8, (rows, columns) at 8 bits and packed two a byte, (rows, ceil(columns / 2)), at 4; scale and zero
    point are bfloat16, (rows, ceil(columns / group_size)). Nearest without a step row, stochastic with the seed of one:
    x is then rounded as rows row_start: of the matrix that the seed belongs to.
    """
    _check_matrix(x, "x")
    _check_format(bits, group_size)
    return backend(group_quantization.quantize, x.device, group_size)(x, bits, group_size, row, row_start)


def dequantize(matrices: Sequence[QuantizedMatrix], dtype: torch.dtype) -> list[Tensor]:
    """The float matrices (rows, columns) of stored codes, rounded once to `dtype`; on a GPU one launch for many.

    The `out` of a matrix, of any row stride, takes it; where `out` is larger it gets zeros. Rows of qdata may be longer
    than the matrix, as in `update_quantized_`. Raises ValueError for an `out` that is smaller.
    """
    for matrix in matrices:
        _check_matrix(matrix.qdata, "qdata")
        _check_format(matrix.bits, matrix.group_size)
        rows, out = matrix.qdata.shape[0], matrix.out
        if out is not None and (out.shape[0] < rows or out.shape[1] < matrix.columns):
            raise ValueError(f"out of shape {tuple(out.shape)} does not hold a matrix of {rows} x {matrix.columns}")
    runs = grouped_by_backend(group_quantization.dequantize, matrices)
    if len(runs) == 1:
        return runs[0][0](matrices, dtype)
    values: dict[int, Tensor] = {}
    for run, indices in runs:
        values.update(zip(indices, run([matrices[index] for index in indices], dtype), strict=True))
    return [values[index] for index in range(len(matrices))]


def check_gradients_(grads: Sequence[Tensor], squared_norms: Tensor, indices: Sequence[int], skip: Tensor) -> None:
    """Write each ‖grad‖² to its index of squared_norms (n,) float32, and whether one is not finite into skip."""
    backend(gradient_check.check_gradients_, skip.device)(grads, squared_norms, indices, skip)


def adam_steps(steps: Sequence[AdamStep], block_size: int, skip: Tensor | None = None) -> list[Tensor]:
    """One step of Adam for each weight, with the gradient factor * grad: moves the moments in place.

    Returns the directions, each in its dtype. grad float of any shape; exp_avg, exp_avg_sq uint8 like grad with absmax
    tensors (ceil(numel / block_size),) float32, or float32 without; the bias corrections come from the step row. Where
    the flag `skip` is true the moments stay and the directions are undefined. In Triton one launch for those whose
    tensors and rates are of one kind. Raises ValueError for a step without exp_avg_sq.
    """
    if any(step.exp_avg_sq is None for step in steps):
        raise ValueError("a step of Adam needs exp_avg_sq; momentum_steps does without")
    return backend(adam.adam_steps, steps[0].grad.device)(steps, block_size, skip)


def momentum_steps(steps: Sequence[AdamStep], block_size: int, skip: Tensor | None = None) -> list[Tensor]:
    """Move each momentum exp_avg in place towards the gradient factor * grad, with beta = betas[0].

    Returns Nesterov's momenta, once more ahead, each in its dtype. grad float of any shape; exp_avg as in `adam_steps`;
    exp_avg_sq, step row and eps are not read. Where the flag `skip` is true the momentum stays and what is returned is
    undefined.
    """
    return backend(adam.momentum_steps, steps[0].grad.device)(steps, block_size, skip)


def row_adam_steps(steps: Sequence[AdamStep], block_size: int, skip: Tensor | None = None) -> list[Tensor]:
    """`adam_steps` with one second moment a row, the mean over its values, and Nesterov's momentum.

    Adam-mini has such second moments of embeddings and head (Zhang et al., arXiv 2406.16793). grad (rows, columns)
    float; exp_avg as in `adam_steps`; exp_avg_sq (rows,) float32. What a row becomes does not depend on which others it
    is given with. Where the flag `skip` is true the moments stay and the directions are undefined. In Triton two
    launches for those of one kind. Raises ValueError for a grad that is no matrix, or an exp_avg_sq of another shape.
    """
    for step in steps:
        _check_matrix(step.grad, "grad")
        if step.exp_avg_sq is None or step.exp_avg_sq.shape != step.grad.shape[:1]:
            found = None if step.exp_avg_sq is None else tuple(step.exp_avg_sq.shape)
            raise ValueError(f"exp_avg_sq must be {tuple(step.grad.shape[:1])}, one number a row, not {found}")
    return backend(row_adam.row_adam_steps, steps[0].grad.device)(steps, block_size, skip)


def orthogonalize(
    matrices: Sequence[Tensor],
    polynomials: Sequence[tuple[float, float, float]],
    segments: Sequence[int] | None = None,
) -> list[Tensor]:
    """About U Vᵀ of each M = U S Vᵀ by Newton-Schulz iteration; matrices of any shapes with one shorter side.

    Step after step the singular values of M / |M| (Frobenius) go through an odd polynomial a x + b x³ + c x⁵, of which
    `polynomials` are (a, b, c). segments: numbers of steps, each made on Gram matrices alone before M is multiplied;
    then M is divided by the fourth root of Σ σ⁴ instead, and within them bfloat16 is float16. Raises ValueError for
    segments that do not have as many steps as there are polynomials.
    """
    if segments is not None and (sum(segments) != len(polynomials) or min(segments) < 1):
        raise ValueError(f"segments={tuple(segments)} must be positive and sum to {len(polynomials)} polynomials")
    device = matrices[0].device
    # Where no tensor cores take the factors, Triton unrolls a product, for minutes; cuBLAS does not.
    unrolled = device.type == "cuda" and product_dtype(device) == torch.float32
    run = newton_schulz.orthogonalize if unrolled else backend(newton_schulz.orthogonalize, device)
    return run(matrices, polynomials, segments)


def orthogonalize_fp8(
    matrices: Sequence[Tensor], polynomials: Sequence[tuple[float, float, float]], *, schatten_norm: bool = False
) -> list[Tensor]:
    """`orthogonalize` in the plain form, with products of FP8 (e4m3) and exact diagonals.

    schatten_norm: M is divided by its Schatten 4-norm, the fourth root of Σ σ⁴, instead of |M| (Frobenius): that is at
    least the largest singular value, too, and nearer to it, so that small ones begin larger.

    Directions differ from those of `orthogonalize` by 1 to 15 % of their norm, in random signs. GPUs of compute
    capability 8.9 have such products; elsewhere they are made of the same values in float32.
    """
    device = matrices[0].device
    run = newton_schulz_fp8.orthogonalize_fp8
    lacks = device.type == "cuda" and not has_fp8(device)
    return (run if lacks else backend(run, device))(matrices, polynomials, schatten_norm=schatten_norm)


def runs_in_fp8(rows: int, device: torch.device) -> bool:
    """Whether `orthogonalize_fp8` of matrices with so many rows is made of products in FP8 there, and right.

    Not below compute capability 8.9, on AMD or without Triton, nor where a version of Triton compiles it to wrong
    values, which a warning says; that waits for the device, once. While a graph is captured, what has not been compared
    counts as right.
    """
    return has_fp8(device) and backend(newton_schulz_fp8.runs_in_fp8, device)(rows, device)


def has_fp8(device: torch.device) -> bool:
    """Whether a device is a GPU of NVIDIA with products in FP8: of compute capability 8.9 or more."""
    on_nvidia = device.type == "cuda" and torch.version.hip is None
    return on_nvidia and torch.cuda.get_device_capability(device) >= (8, 9)


def normalize_rows(parts: Sequence[RowNormalization], skip: Tensor | None = None) -> list[Tensor]:
    """Each row of scale * N over the root of its second moment, which moves with beta; the whole keeps its size.

    That is (1 / rows Σ N²)^1/2 before as after. Directions N (rows, columns) float; those returned may be written in
    their place. The second moments lag as Adam's, with the bias correction of the step row. Where the flag `skip` is
    true they stay, and the directions are undefined. In Triton two launches for matrices of one dtype and layout.
    """
    return backend(row_normalization.normalize_rows, parts[0].direction.device)(parts, skip)


def update_quantized_(updates: Sequence[QuantizedUpdate], skip: Tensor | None = None) -> None:
    """W <- quantize(decay * W - step_size * leftᵀ N right) in place on the stored codes of each weight.

    direction N is float, (rank or rows, rank or columns); left (rank, rows) and right (rank, columns) are bases or
    None. Step size, decay and seed come from the step row. Products accumulate in float32, and there is one rounding:
    stochastic, or nearest where that is not asked for. Where the flag `skip` is true, or the step size 0 and the decay
    1, nothing changes. Rows of qdata may be longer than the matrix, with zeros at the end, which stay: as kernels read
    to the end of a row, they are fastest where that is a multiple of 16 bytes. In Triton one launch for the weights
    with one basis that are stored alike.
    """
    for run, indices in grouped_by_backend(low_rank_update.update_quantized_, updates):
        run([updates[index] for index in indices], skip)


def update_float_(updates: Sequence[FloatUpdate], skip: Tensor | None = None) -> None:
    """W <- round(decay * W - step_size * leftᵀ N right) in place on each float tensor, float32 inside.

    Step size, decay and seed come from the step row. A weight of 16 bits is rounded stochastically where that is asked
    for, since a nearest rounding loses every update below 1/512 of a bfloat16 weight, 1/4096 of a float16 one; other
    dtypes round to nearest. A vector is a matrix of one row. Where the flag `skip` is true nothing changes. In Triton
    one launch for those of about one width and one dtype without bases.
    """
    matrices = []
    for update in updates:
        weight, direction = update.weight, update.direction
        shape = (weight.shape[0], weight.shape[1:].numel()) if weight.dim() > 1 else (1, weight.numel())
        matrix = weight.view(shape)
        whole = update.left is None and update.right is None
        direction = direction.view(matrix.shape) if whole else direction
        stochastic = update.stochastic and weight.dtype in (torch.bfloat16, torch.float16)
        matrices.append(update._replace(weight=matrix, direction=direction, stochastic=stochastic))
    if matrices:
        backend(float_update.update_float_, matrices[0].weight.device)(matrices, skip)


def reads_rows_on_device(device: torch.device, group_size: int) -> bool:
    """Whether updates of weights in groups of that size read their step rows where they are, as CUDA graphs need it."""
    return backend(low_rank_update.update_quantized_, device, group_size) is not low_rank_update.update_quantized_


def quantize_blocks_(
    codes: Tensor, absmax: Tensor, x: Tensor, signed: bool, block_size: int, skip: Tensor | None = None
) -> None:
    """Write float values x, of any strides, in 8 bits; where the flag `skip` on the device is true nothing changes.

    codes uint8 of the shape of x, contiguous; absmax (ceil(numel / block_size),) float32, the largest magnitude of each
    block of the flattened x. Each value takes the nearest code of bitsandbytes' dynamic map, but an unsigned one above
    zero never becomes zero. Raises ValueError for codes of another shape or an absmax of another length.
    """
    if codes.shape != x.shape or absmax.numel() != -(-x.numel() // block_size):
        raise ValueError(f"codes {tuple(codes.shape)} and {absmax.numel()} blocks do not hold x {tuple(x.shape)}")
    backend(adam.quantize_blocks_, x.device)(codes, absmax, x, signed, block_size, skip)


def dequantize_blocks(
    codes: Tensor, absmax: Tensor, signed: bool, block_size: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The values of `quantize_blocks_`, shaped like codes (contiguous), rounded once to `dtype`."""
    return backend(adam.dequantize_blocks, codes.device)(codes, absmax, signed, block_size, dtype)


def int8_linear(x: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor, width: int) -> Tensor:
    """x Wᵀ (tokens, width) in the dtype of x, multiplied in INT8; zeros beyond the weight's own outputs.

    x float (tokens, in or more), of which only the weight's columns are read: each row is rounded to the nearest of
    255 symmetric steps, |error| <= its largest magnitude / 254. W in 8 bits with one group a row: qdata uint8
    (out, in), scale and zero point (out, 1). Raises ValueError for other shapes.
    """
    _check_matrix(x, "x")
    _check_int8(x, qdata, scale, zero_point, width, backward=False)
    return backend(int8_matmul.int8_linear, x.device, len(x), *qdata.shape)(x, qdata, scale, zero_point, width)


def int8_linear_backward(grad: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor, width: int) -> Tensor:
    """grad W (tokens, width), the gradient of the input of `int8_linear`, in the dtype of grad; zeros beyond in.

    grad float (tokens, out or more). Each of its rows, times the scales of the weight's rows, is rounded to the nearest
    of 255 symmetric steps: not stochastically, so that a backward pass needs no seed. Rounding to nearest is biased for
    one value but not for values that spread over many steps; how a gradient's smallest values fare has to be seen in
    training. Raises ValueError for other shapes.
    """
    _check_matrix(grad, "grad")
    _check_int8(grad, qdata, scale, zero_point, width, backward=True)
    run = backend(int8_matmul.int8_linear_backward, grad.device, len(grad), *qdata.shape)
    return run(grad, qdata, scale, zero_point, width)


def fp8_rows(parts: Sequence[Tensor], columns: Sequence[int], factors: Sequence[Tensor] | None = None) -> Fp8Matrix:
    """The first columns of float matrices (rows, columns or more), side by side, in FP8, with one scale a row.

    factors (columns or more,) float32: that columns are multiplied with before. Each part ends with zeros up to a
    multiple of 16. Of a row whose magnitudes are all below 2^-110 nothing is left; one that is not finite stays so.
    Raises ValueError for a matrix or factor that is narrower.
    """
    for part, count, factor in zip(parts, columns, parts if factors is None else factors, strict=True):
        _check_matrix(part, "x")
        if part.shape[1] < count or factor.shape[-1] < count:
            raise ValueError(f"x {tuple(part.shape)} and its factor do not have {count} columns")
    return backend(fp8_matmul.fp8_rows, parts[0].device, [len(parts[0])], columns)(parts, columns, factors)


def fp8_rows_to_fuse(x: Tensor, columns: int) -> Fp8Matrix:
    """`fp8_rows` of one matrix in operations of PyTorch, of which a compiler makes one kernel with what makes x."""
    return fp8_matmul.fp8_rows([x], [columns], None)


def fp8_joins(columns: Sequence[int]) -> bool:
    """Whether a kernel makes one row of `fp8_rows` of parts with so many columns."""
    return len(columns) <= 3 and max(columns) <= 16384 and len(columns) * next_power_of_2(max(columns)) <= 32768


def fp8_weight(weight: QuantizedMatrix | Tensor) -> Fp8Matrix:
    """A weight W (out, in), quantized or float, in FP8 for x Wᵀ; both sides end with zeros up to a multiple of 16."""
    device, rows, columns = _device_and_shape(weight)
    return backend(fp8_matmul.fp8_weight, device, [rows], [columns])(weight)


def fp8_turned_weights(weights: Sequence[QuantizedMatrix | Tensor]) -> tuple[Fp8Matrix, list[Tensor]]:
    """Weights W (out, in) of one input in FP8 for the sum of all g W: (in, all outs), with the codes of `fp8_weight`.

    The scales of their rows lie along the sum. They come beside it, (out,) each, to be the factors of `fp8_rows` of the
    g, and its own are 1.
    """
    devices, rows, columns = zip(*map(_device_and_shape, weights), strict=True)
    return backend(fp8_matmul.fp8_turned_weights, devices[0], rows, columns[:1])(weights)


def fp8_columns(x: Tensor, columns: int) -> Fp8Matrix:
    """The first columns of a float matrix x (rows, columns or more) in FP8, turned, with one scale a column.

    (columns, rows), with zeros up to a multiple of 16 on both sides; as `fp8_rows` of xᵀ. Raises ValueError for an x
    that is narrower.
    """
    _check_matrix(x, "x")
    if x.shape[1] < columns:
        raise ValueError(f"x {tuple(x.shape)} does not have {columns} columns")
    return backend(fp8_matmul.fp8_columns, x.device, [len(x)], [columns])(x, columns)


def fp8_product(a: Fp8Matrix, b: Fp8Matrix, width: int, dtype: torch.dtype, exact: bool = False) -> Tensor:
    """a bᵀ (rows of a, width), rounded to bfloat16 and then given in dtype; cut, or zeros beyond the rows of b.

    On a GPU by cuBLASLt, in the same order every time, which needs compute capability 8.9; its sums over 32 products
    or more have some 14 bits, those of the reference float32's; exact: float32's every 128 products, for long sums.
    Raises ValueError for factors of another depth.
    """
    if a.codes.shape[1] != b.codes.shape[1]:
        raise ValueError(f"factors {tuple(a.codes.shape)} and {tuple(b.codes.shape)} are not of one depth")
    return backend(fp8_matmul.fp8_product, a.codes.device)(a, b, width, dtype, exact)


def _device_and_shape(weight: QuantizedMatrix | Tensor) -> tuple[torch.device, int, int]:
    """Of a weight the device, rows and columns."""
    if isinstance(weight, Tensor):
        return weight.device, weight.shape[0], weight.shape[1]
    return weight.qdata.device, len(weight.qdata), weight.columns


def _check_int8(x: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor, width: int, backward: bool) -> None:
    _check_matrix(qdata, "qdata")
    read, given = qdata.shape if backward else reversed(qdata.shape)
    if scale.shape != (qdata.shape[0], 1) or zero_point.shape != scale.shape:
        raise ValueError(
            f"scale and zero_point must be {(qdata.shape[0], 1)}, one group a row, not {tuple(scale.shape)}"
        )
    if x.shape[1] < read or width < given:
        raise ValueError(f"{tuple(x.shape)} -> {width} columns do not fit a weight of shape {tuple(qdata.shape)}")
    if read > _LONGEST_INT8_SUM:
        raise ValueError(f"a sum of {read} products in INT8 may overflow: at most {_LONGEST_INT8_SUM}")
