"""The one door to the arithmetic: checks arguments, chooses an implementation, and is all that the library calls.

`QGALORE_KERNELS` chooses: `reference` is plain PyTorch, on any device; `triton` the Triton kernels (on the CPU only
with `TRITON_INTERPRET=1`, for tests); `auto`, the default, Triton on CUDA where it is installed. Both give the same
bits for everything that is stored.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qgalore.kernels import reference
from qgalore.kernels.arguments import MATRICES_TOGETHER, AdamStep, QuantizedMatrix, QuantizedUpdate, StepScalars
from qgalore.kernels.backend import check_matrix, triton_or_none


def _check_format(bits: int, group_size: int) -> None:
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, not {bits}")
    if group_size < 1:
        raise ValueError(f"group_size must be positive, not {group_size}")


def _check_stored(matrix: QuantizedMatrix) -> None:
    check_matrix(matrix.qdata, "qdata")
    _check_format(matrix.bits, matrix.group_size)
    rows, out = len(matrix.qdata), matrix.out
    if out is not None and (out.shape[0] < rows or out.shape[1] < matrix.columns):
        raise ValueError(f"out of shape {tuple(out.shape)} does not hold a matrix of {rows} x {matrix.columns}")


@contextlib.contextmanager
def _taken_back_if(skip: Tensor | None, *tensors: Tensor | None) -> Iterator[None]:
    """Let the body write to tensors, and take it back on the device where the flag is true."""
    if skip is None:
        yield
        return
    before = [(tensor, tensor.clone()) for tensor in tensors if tensor is not None]
    yield
    for tensor, copy in before:
        tensor.copy_(torch.where(skip, copy, tensor))


def quantize(x: Tensor, bits: int, group_size: int, row: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize a float matrix (rows, columns): stored codes, scale, zero point.

    Codes are uint8, (rows, columns) at 8 bits and packed two a byte, (rows, ceil(columns / 2)), at 4; scale and zero
    point are bfloat16, (rows, ceil(columns / group_size)). Nearest without a step row, stochastic with the seed of one.
    """
    check_matrix(x, "x")
    _check_format(bits, group_size)
    triton = triton_or_none(x.device, "group_quantization")
    if triton is not None and triton.can_handle(group_size):
        return triton.quantize(x, bits, group_size, row)  # type: ignore[no-any-return]
    parts, seed = [], None if row is None else StepScalars.unpack(row).seed
    for start, stop in row_chunks(*x.shape):
        random = _random_bits(stop - start, x.shape[1], seed, start, x.device)
        codes, scale, zero_point = reference.quantize_groups(x[start:stop], bits, group_size, random)
        packed = reference.pack_int4(codes) if bits == 4 else codes
        # PyTorch lays them out as x is, and kernels read rows.
        parts.append(tuple(part.contiguous() for part in (packed, scale, zero_point)))
    return parts[0] if len(parts) == 1 else tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))  # type: ignore[return-value]


def dequantize(
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    columns: int,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """The float matrix (rows, columns) of stored codes, rounded once to `dtype`.

    `out`, of any row stride, takes it; where `out` is larger it gets zeros. Rows of qdata may be longer than the
    matrix, as in `update_quantized_`. Raises ValueError for an `out` that is smaller.
    """
    one = QuantizedMatrix(qdata, scale, zero_point, columns, bits, group_size, out)
    _check_stored(one)
    triton = triton_or_none(qdata.device, "group_quantization")
    if triton is not None and triton.can_handle(group_size):
        return triton.dequantize_several([one], dtype)[0]  # type: ignore[no-any-return]
    codes = reference.unpack_int4(qdata, columns) if bits == 4 else qdata[:, :columns]
    value = reference.dequantize_groups(codes, scale, zero_point, group_size, dtype)
    if out is None:
        return value
    out.zero_()
    out[: qdata.shape[0], :columns] = value
    return out


def dequantize_several(matrices: Sequence[QuantizedMatrix], dtype: torch.dtype) -> list[Tensor]:
    """`dequantize` of several matrices: in Triton one launch for those that are stored alike."""
    for matrix in matrices:
        _check_stored(matrix)
    triton = triton_or_none(matrices[0].qdata.device, "group_quantization") if matrices else None
    if triton is None or not all(triton.can_handle(matrix.group_size) for matrix in matrices):
        return [dequantize(*matrix[:-1], dtype, matrix.out) for matrix in matrices]
    return triton.dequantize_several(matrices, dtype)  # type: ignore[no-any-return]


def check_gradients_(grads: Sequence[Tensor], squared_norms: Tensor, places: Sequence[int], skip: Tensor) -> None:
    """Write each ‖grad‖² to its place in squared_norms (n,) float32, and whether one is not finite into skip."""
    triton = triton_or_none(skip.device, "gradient_check")
    if triton is not None:
        triton.check_gradients_(grads, squared_norms, places, skip)
        return
    for grad, place in zip(grads, places, strict=True):
        squared_norms[place] = torch.linalg.vector_norm(grad, dtype=torch.float32).square()
        skip.logical_or_(~squared_norms[place].isfinite())


def adam_steps(steps: Sequence[AdamStep], block_size: int, skip: Tensor | None = None) -> list[Tensor]:
    """One step of Adam for each weight, with the gradient factor * grad: moves the moments in place.

    Returns the directions, each in its dtype. grad float of any shape; exp_avg, exp_avg_sq uint8 like grad with absmax
    tensors (ceil(numel / block_size),) float32, or float32 without; the bias corrections come from the step row. Where
    the flag `skip` is true the moments stay and the directions are undefined. In Triton one launch for those whose
    tensors and rates are of one kind.
    """
    triton = triton_or_none(steps[0].grad.device, "adam")
    if triton is not None:
        return triton.adam_steps(steps, block_size, skip)  # type: ignore[no-any-return]
    return [_adam_step(step, block_size, skip) for step in steps]


def _adam_step(step: AdamStep, block_size: int, skip: Tensor | None) -> Tensor:
    grad, exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax, row, betas, eps, factor, dtype = step
    grad, corrections = scaled(grad, factor), StepScalars.unpack(row)[3:]
    with _taken_back_if(skip, exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax):
        if exp_avg_absmax is None or exp_avg_sq_absmax is None:
            return reference.adam_direction(grad, exp_avg, exp_avg_sq, corrections, betas, eps).to(dtype)
        first = dequantize_blocks(exp_avg, exp_avg_absmax, True, block_size)
        second = dequantize_blocks(exp_avg_sq, exp_avg_sq_absmax, False, block_size)
        direction = reference.adam_direction(grad, first, second, corrections, betas, eps)
        quantize_blocks_(exp_avg, exp_avg_absmax, first, True, block_size)
        quantize_blocks_(exp_avg_sq, exp_avg_sq_absmax, second, False, block_size)
    return direction.to(dtype)


def momentum_step(
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_absmax: Tensor | None,
    beta: float,
    block_size: int,
    factor: Tensor | None = None,
    skip: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Move a momentum in place towards the gradient factor * grad; returns Nesterov's, once more ahead, in dtype.

    grad float of any shape; exp_avg uint8 like grad with an absmax tensor (ceil(numel / block_size),) float32, or
    float32 without. Where the flag `skip` is true the momentum stays and what is returned is undefined.
    """
    triton = triton_or_none(grad.device, "adam")
    if triton is not None:
        return triton.momentum_step(grad, exp_avg, exp_avg_absmax, beta, block_size, factor, skip, dtype)  # type: ignore[no-any-return]
    grad = scaled(grad, factor)
    with _taken_back_if(skip, exp_avg, exp_avg_absmax):
        if exp_avg_absmax is None:
            return reference.nesterov_momentum(grad, exp_avg, beta).to(dtype)
        momentum = dequantize_blocks(exp_avg, exp_avg_absmax, True, block_size)
        ahead = reference.nesterov_momentum(grad, momentum, beta)
        quantize_blocks_(exp_avg, exp_avg_absmax, momentum, True, block_size)
    return ahead.to(dtype)


def orthogonalize(matrices: Sequence[Tensor], polynomials: Sequence[tuple[float, float, float]]) -> list[Tensor]:
    """About U Vᵀ of each M = U S Vᵀ by Newton-Schulz iteration; matrices of any shapes with one shorter side.

    Step after step the singular values of M / |M| (Frobenius) go through an odd polynomial a x + b x³ + c x⁵, of which
    `polynomials` are (a, b, c).
    """
    triton = triton_or_none(matrices[0].device, "newton_schulz")
    if triton is None:
        return [reference.orthogonalize(matrix, polynomials) for matrix in matrices]
    found: list[Tensor] = []
    while len(found) < len(matrices):
        found += triton.orthogonalize(matrices[len(found) : len(found) + MATRICES_TOGETHER], polynomials)
    return found


def update_quantized_(updates: Sequence[QuantizedUpdate], skip: Tensor | None = None) -> None:
    """W <- quantize(decay * W - step_size * leftᵀ N right) in place on the stored codes of each weight.

    direction N is float, (rank or rows, rank or columns); left (rank, rows) and right (rank, columns) are bases or
    None. Step size, decay and seed come from the step row. Products accumulate in float32, and there is one rounding:
    stochastic, or nearest where that is not asked for. Where the flag `skip` is true, or the step size 0 and the decay
    1, nothing changes. Rows of qdata may be longer than the matrix, with zeros at the end, which stay: as kernels read
    to the end of a row, they are fastest where that is a multiple of 16 bytes. In Triton one launch for the weights
    with one basis that are stored alike.
    """
    one_pass = [update for update in updates if _in_one_pass(update)]
    if one_pass:
        triton_or_none(one_pass[0].qdata.device, "low_rank_update").low_rank_updates_(one_pass, skip)
    for update in updates:
        if not _in_one_pass(update):
            _update_by_rows_(update, skip)


def _in_one_pass(update: QuantizedUpdate) -> bool:
    """Whether a Triton kernel projects back, adds and requantizes."""
    triton = triton_or_none(update.qdata.device, "low_rank_update")
    one_side = (update.left is None) != (update.right is None)
    return triton is not None and one_side and bool(triton.can_handle(update.group_size))


def _update_by_rows_(update: QuantizedUpdate, skip: Tensor | None) -> None:
    """One update in two passes: rows of the direction are projected back, then added and requantized."""
    qdata, scale, zero_point, direction, left, right, columns, bits, group_size, row, stochastic = update
    triton = triton_or_none(qdata.device, "group_quantization")
    if triton is not None and triton.can_handle(group_size):
        whole = left is None and right is None
        for start, stop in [(0, len(qdata))] if whole else row_chunks(len(qdata), columns):
            full = direction if whole else reference.project_back_rows(direction, left, right, start, stop)
            part = (qdata[start:stop], scale[start:stop], zero_point[start:stop])
            triton.update_(*part, full, columns, bits, group_size, row, stochastic, start, skip)
        return
    seed, step_size, decay, *_ = scalars = StepScalars.unpack(row)
    if scalars.changes_nothing:
        return
    for start, stop in row_chunks(len(qdata), columns):
        part = (qdata[start:stop], scale[start:stop], zero_point[start:stop])
        full = reference.project_back_rows(direction, left, right, start, stop)
        with _taken_back_if(skip, *part):
            weight = dequantize(*part, columns, bits, group_size, torch.float32)
            weight.mul_(decay).sub_(full * step_size)
            random = _random_bits(stop - start, columns, seed if stochastic else None, start, weight.device)
            codes, part[1][:], part[2][:] = reference.quantize_groups(weight, bits, group_size, random)
            packed = reference.pack_int4(codes) if bits == 4 else codes
            part[0][:, : packed.shape[1]] = packed


def update_float_(
    weight: Tensor,
    direction: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    row: Tensor,
    stochastic: bool = True,
    row_start: int = 0,
    skip: Tensor | None = None,
) -> None:
    """W <- round(decay * W - step_size * leftᵀ N right) in place on a float tensor, float32 inside.

    Step size, decay and seed come from the step row. A bfloat16 weight is rounded stochastically where that is asked
    for, since a nearest rounding loses every update below 1/512 of the weight; other dtypes round to nearest. A vector
    is a matrix of one row; `row_start` is the number of the first row in the matrix that the seed belongs to. Where the
    flag `skip` is true nothing changes.
    """
    matrix = weight.view(weight.shape[0], -1) if weight.dim() > 1 else weight.view(1, -1)
    direction = direction if left is not None or right is not None else direction.view(matrix.shape)
    stochastic = stochastic and weight.dtype == torch.bfloat16
    triton = triton_or_none(weight.device, "float_update")
    if triton is not None and left is None and right is None:
        triton.update_float_(matrix, direction, row, stochastic, row_start, skip)
        return
    for start, stop in row_chunks(*matrix.shape):
        full, part = reference.project_back_rows(direction, left, right, start, stop), matrix[start:stop]
        if triton is not None:
            triton.update_float_(part, full, row, stochastic, row_start + start, skip)
            continue
        seed, step_size, decay, *_ = StepScalars.unpack(row)
        with _taken_back_if(skip, part):
            value = part.float().mul(decay).sub_(full * step_size)
            if stochastic:
                random = reference.random_bits16(part.shape[0], part.shape[1], seed, row_start + start, weight.device)
                value = reference.round_stochastic_bfloat16(value, random)
            part[:] = value


def reads_rows_on_device(device: torch.device, group_size: int) -> bool:
    """Whether updates of weights in groups of that size read their step rows where they are, as CUDA graphs need it."""
    triton = triton_or_none(device, "group_quantization")
    return triton is not None and bool(triton.can_handle(group_size))


def _random_bits(rows: int, columns: int, seed: int | None, row_start: int, device: torch.device) -> Tensor | None:
    return None if seed is None else reference.random_bits16(rows, columns, seed, row_start, device)


def project_back(direction: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """leftᵀ N right, float32: N itself where both bases are None."""
    rows = direction.shape[0] if left is None else left.shape[1]
    return reference.project_back_rows(direction, left, right, 0, rows)


row_chunks = reference.row_chunks
scaled = reference.scaled


PART = 1 << 20
"""Values that plain PyTorch reads or writes at a time, in whole blocks: what it makes of a part beside it is small."""


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
    triton = triton_or_none(x.device, "adam")
    if triton is not None:
        triton.quantize_blocks_(codes, absmax, x, signed, block_size, skip)
        return
    for part_x, *places in _parts(block_size, x.contiguous(), codes, absmax):
        for place, new in zip(places, reference.quantize_blocks(part_x, signed, block_size), strict=True):
            place.copy_(new if skip is None else torch.where(skip, place, new))


def dequantize_blocks(
    codes: Tensor, absmax: Tensor, signed: bool, block_size: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The values of `quantize_blocks_`, shaped like codes (contiguous), rounded once to `dtype`."""
    triton = triton_or_none(codes.device, "adam")
    if triton is not None:
        return triton.dequantize_blocks(codes, absmax, signed, block_size, dtype)  # type: ignore[no-any-return]
    value = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for part, part_codes, part_absmax in _parts(block_size, value, codes, absmax):
        part.copy_(reference.dequantize_blocks(part_codes, part_absmax, signed, block_size))
    return value


def _parts(block_size: int, value: Tensor, codes: Tensor, absmax: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Flat views of values, their codes and absmax, of some whole blocks each."""
    blocks = max(1, PART // block_size)
    parts = (tensor.view(-1).split(blocks * block_size) for tensor in (value, codes))
    return zip(*parts, absmax.split(blocks), strict=True)


_LONGEST_INT8_SUM = (2**31 - 1) // (127 * 128)


def int8_linear(x: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor, width: int) -> Tensor:
    """x Wᵀ (tokens, width) in the dtype of x, multiplied in INT8; zeros beyond the weight's own outputs.

    x float (tokens, in or more), of which only the weight's columns are read: each row is rounded to the nearest of
    255 symmetric steps, |error| <= its largest magnitude / 254. W in 8 bits with one group a row: qdata uint8
    (out, in), scale and zero point (out, 1). Raises ValueError for other shapes.
    """
    return _int8_linear("int8_linear", x, qdata, scale, zero_point, width, backward=False)


def int8_linear_backward(grad: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor, width: int) -> Tensor:
    """grad W (tokens, width), the gradient of the input of `int8_linear`, in the dtype of grad; zeros beyond in.

    grad float (tokens, out or more). Each of its rows, times the scales of the weight's rows, is rounded to the nearest
    of 255 symmetric steps: not stochastically, so that a backward pass needs no seed. Rounding to nearest is biased for
    one value but not for values that spread over many steps; how a gradient's smallest values fare has to be seen in
    training. Raises ValueError for other shapes.
    """
    return _int8_linear("int8_linear_backward", grad, qdata, scale, zero_point, width, backward=True)


def _int8_linear(
    name: str, x: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor, width: int, backward: bool
) -> Tensor:
    check_matrix(x, "grad" if backward else "x")
    check_matrix(qdata, "qdata")
    read, given = qdata.shape if backward else reversed(qdata.shape)
    if scale.shape != (qdata.shape[0], 1) or zero_point.shape != scale.shape:
        raise ValueError(
            f"scale and zero_point must be {(qdata.shape[0], 1)}, one group a row, not {tuple(scale.shape)}"
        )
    if x.shape[1] < read or width < given:
        raise ValueError(f"{tuple(x.shape)} -> {width} columns do not fit a weight of shape {tuple(qdata.shape)}")
    if read > _LONGEST_INT8_SUM:
        raise ValueError(f"a sum of {read} products in INT8 may overflow: at most {_LONGEST_INT8_SUM}")
    triton = triton_or_none(x.device, "int8_matmul")
    if triton is not None and triton.can_handle(*qdata.shape) and x.shape[0]:
        return getattr(triton, name)(x, qdata, scale, zero_point, width)  # type: ignore[no-any-return]
    value: Tensor = getattr(reference, name)(x[:, :read], qdata, scale, zero_point).to(x.dtype)
    return value if width == given else torch.nn.functional.pad(value, (0, width - given))
