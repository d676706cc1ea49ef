"""The arithmetic of Q-GaLore in plain PyTorch: what every kernel must equal, and the path of machines without Triton.

Group quantization. A matrix is cut along each row into groups of `group_size` values; the last group of a row may be
shorter and no group straddles rows. A group stores codes 0 .. 2^bits - 1, a scale and a zero point, the value of
code 0:

    value = code * scale + zero_point

Scale and zero point are bfloat16, rounded before the codes are computed: the zero point down and the scale up, so that
the codes cover the group and nothing is clamped. Since a code has at most 8 significant
bits and so has the scale, `code * scale` is exact in float32: a fused multiply-add gives the same bits as a product
followed by a sum, and a kernel can be held to `torch.equal`.

Stochastic rounding takes 16 random bits a value from Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy
as 1, 2, 3", SC 2011: seven rounds are the fewest that pass BigCrush) with key = seed and counter = (column // 8, row,
0, 0): one call serves eight neighbours. A value between two codes goes to floor(position + (bits + 1/2) / 2^16).

Products in INT8 take weights with one group a row, and quantize each row of activations as they come: symmetrically to
-127 .. 127, with the scale absmax / 127. Integers are multiplied and summed exactly, whatever the order, and float32
turns the sums into values in one fixed order of operations.

Block-wise 8-bit Adam follows Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_SMALLEST_NORMAL = 2.0**-126
_BFLOAT16_MAX = 3.3895313892515355e38
_HALF_ULP = 2.0**-24
_CHUNK_ELEMENTS = 1 << 22
_SMALLEST_ROW = 2.0**-118  # 127 over a smaller number, or a smaller number over 127, may leave float32
_EXACT_DEPTH = 1024  # so many products of -127 .. 127 and -128 .. 127 add up to at most 2^24


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int, rounds: int = 7
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words a counter, as int64 in [0, 2^32), by Philox4x32 with the 64-bit key `seed`."""
    c0, c1, c2, c3 = counter
    key0, key1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(rounds):
        # The 64-bit products wrap as signed integers; their bits are those of the unsigned products.
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK32) ^ c1 ^ key0,
            product1 & _MASK32,
            ((product0 >> 32) & _MASK32) ^ c3 ^ key1,
            product0 & _MASK32,
        )
        key0, key1 = (key0 + 0x9E3779B9) & _MASK32, (key1 + 0xBB67AE85) & _MASK32
    return c0, c1, c2, c3


def random_bits16(rows: int, columns: int, seed: int, row_start: int, device: torch.device) -> Tensor:
    """Random integers in [0, 2^16) for the elements of a matrix, from position and seed: (rows, columns) int32.

    `row_start` is the number of the first row in the matrix that the seed belongs to.

    Element (i, j) takes half-word j % 8 of the Philox call with counter (j // 8, row_start + i, 0, 0), low ones first.
    """
    calls = (columns + 7) // 8
    c0 = torch.arange(calls, device=device, dtype=torch.int64).expand(rows, calls)
    c1 = torch.arange(row_start, row_start + rows, device=device, dtype=torch.int64)[:, None].expand(rows, calls)
    zero = torch.zeros((), device=device, dtype=torch.int64).expand(rows, calls)
    words = torch.stack(philox((c0, c1, zero, zero), seed), dim=-1)  # (rows, calls, 4)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1)  # (rows, calls, 4, 2)
    return halves.reshape(rows, calls * 8)[:, :columns].to(torch.int32)


def _round_down_to_bfloat16(x: Tensor) -> Tensor:
    bits = x.contiguous().view(torch.int32)
    bits = torch.where(bits < 0, bits + 0xFFFF, bits) & -0x10000
    return bits.view(torch.float32).clamp(-_BFLOAT16_MAX, _BFLOAT16_MAX)


def _round_up_to_bfloat16(x: Tensor) -> Tensor:
    """The same for x >= 0, upwards."""
    return ((x.contiguous().view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)


def _group_bounds(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """The smallest and largest value of each group: (rows, groups) twice."""
    rows, columns = x.shape
    whole = columns // group_size * group_size
    low, high = x[:, :whole].reshape(rows, -1, group_size).aminmax(dim=2) if whole else (x[:, :0], x[:, :0])
    if whole < columns:
        tail_low, tail_high = x[:, whole:].aminmax(dim=1, keepdim=True)
        low, high = torch.cat((low, tail_low), dim=1), torch.cat((high, tail_high), dim=1)
    return low, high


def _spread(per_group: Tensor, columns: int, group_size: int) -> Tensor:
    """(rows, groups) -> (rows, columns): each group's value at its columns."""
    return per_group.float().repeat_interleave(group_size, dim=1)[:, :columns]


def quantize_groups(x: Tensor, bits: int, group_size: int, random: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (rows, columns) uint8 (one a byte), scale and zero point (rows, groups) bfloat16 of the float matrix x.

    Nearest rounding without random bits: |value - x| <= scale / 2. Stochastic with 16 of them for each value, as
    `random_bits16` gives them: the expected value is x, |value - x| < scale.
    """
    x = x.float()
    columns = x.shape[1]
    levels = (1 << bits) - 1
    low, high = _group_bounds(x, group_size)
    zero_point = _round_down_to_bfloat16(low)
    # Halved, so that the range of a group up to 3.4e38 does not overflow; a wider one dequantizes to infinity.
    exact = (high * 0.5 - zero_point * 0.5) * (2.0 / levels)
    # Less by what float32 cannot tell: else the rounding of a dequantized end would widen the group at every update.
    slack = torch.maximum(high.abs(), zero_point.abs()) * (_HALF_ULP / levels) + exact * (4 * _HALF_ULP)
    scale = _round_up_to_bfloat16((exact - slack).clamp_min(0.0))
    scale = torch.where(exact > 0, scale.clamp_min(_SMALLEST_NORMAL), 0.0)
    # One division a group instead of one a value; of a scale of at least 2^-126 the inverse is finite.
    inverse = _spread(1.0 / torch.where(scale > 0, scale, 1.0), columns, group_size)
    position = (x - _spread(zero_point, columns, group_size)) * inverse
    # Everything is one higher than the code: of 1 to 2 a kernel makes a random float from its bits.
    above = position.add_(1.5 if random is None else (random.float() + 0.5) * 2.0**-16 + 1.0)
    return above.clamp_(max=levels + 1).sub_(1).to(torch.uint8), scale.bfloat16(), zero_point.bfloat16()


def dequantize_groups(codes: Tensor, scale: Tensor, zero_point: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """code * scale + zero_point in float32, rounded once to `dtype`: (rows, columns)."""
    columns = codes.shape[1]
    value = codes.float().mul_(_spread(scale, columns, group_size)).add_(_spread(zero_point, columns, group_size))
    return value.to(dtype)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (rows, columns) int8 in -127 .. 127 and a scale (rows,) float32 of the float32 matrix x: x ~ scale * code.

    To the nearest code, ties to even: |scale * code - x| <= scale / 2. A row whose magnitudes are all below 2^-118
    counts as zeros, with scale 0; of a row that is not finite the scale is not finite either.
    """
    absmax = x.abs().amax(dim=1)
    # A tensor of 127, since PyTorch divides a number by a tensor in two steps.
    inverse = torch.where(absmax >= _SMALLEST_ROW, torch.full_like(absmax, 127.0) / absmax, 0.0)
    codes = (x * inverse[:, None]).nan_to_num_(0.0).round_().to(torch.int8)
    return codes, torch.where(absmax < _SMALLEST_ROW, 0.0, absmax * (1.0 / 127.0))


def int8_product(a: Tensor, b: Tensor) -> Tensor:
    """a b in int32, exact, of int8 matrices a (m, k) in -127 .. 127 and b (k, n), k at most 132,104."""
    product = torch.zeros(a.shape[0], b.shape[1], dtype=torch.int32, device=a.device)
    for start in range(0, a.shape[1], _EXACT_DEPTH):
        part = slice(start, start + _EXACT_DEPTH)
        # Whole numbers of at most 2^24 at every step: exact in float32, for which there are fast products.
        with torch.autocast(a.device.type, enabled=False):
            product += (a[:, part].float() @ b[part].float()).to(torch.int32)
    return product


def _signed_codes(codes: Tensor, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """k int8, s and o (rows,) float32 with value = s k + o, of uint8 codes with one group a row."""
    s = scale[:, 0].float()
    return (codes ^ 128).view(torch.int8), s, zero_point[:, 0].float() + 128.0 * s


def int8_linear(x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """x Wᵀ (tokens, out) in float32, of x (tokens, in) rounded by `quantize_rows`; W one group a row.

    With q, a the codes and scale of a row of x: a (s (q kᵀ) + o Σ q), exact but for the roundings of float32.
    """
    k, s, o = _signed_codes(codes, scale, zero_point)
    q, a = quantize_rows(x.float())
    total = q.sum(dim=1, dtype=torch.int32).float()[:, None]
    return (int8_product(q, k.T).float().mul_(s).add_(total * o)).mul_(a[:, None])


def int8_linear_backward(grad: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """grad W (tokens, in) in float32, of grad s rounded by `quantize_rows`, grad (tokens, out).

    The scales of the weight's rows lie along the sum, so they are part of what is quantized: with h, b the codes and
    scale of a row of grad s: b (h k) + Σ grad o. The second sum is one of float32 numbers.
    """
    k, s, o = _signed_codes(codes, scale, zero_point)
    grad = grad.float()
    h, b = quantize_rows(grad * s)
    return int8_product(h, k).float().mul_(b[:, None]).add_((grad * o).sum(dim=1, keepdim=True))


def pack_int4(codes: Tensor) -> Tensor:
    """(rows, columns) uint8 of 0..15 -> (rows, ceil(columns / 2)): even columns in the low half of a byte."""
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_int4(packed: Tensor, columns: int) -> Tensor:
    """The inverse of `pack_int4` for a matrix of `columns` columns."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).reshape(packed.shape[0], -1)[:, :columns]


def round_stochastic_bfloat16(x: Tensor, random: Tensor) -> Tensor:
    """float32 x rounded to bfloat16 up or down, by 16 random bits a value, so that the expected value is x."""
    bits = x.contiguous().view(torch.int32)
    rounded = ((bits + random) & -0x10000).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).bfloat16()


@functools.lru_cache(maxsize=8)
def dynamic_map(signed: bool, device: torch.device) -> Tensor:
    """The 256 values of dynamic tree quantization, ascending, in [-1, 1] or [0, 1]: (256,) float32.

    With e leading zeros the decimal exponent is -e and the bits left hold a linear fraction over (0.1, 1]
    (arXiv 2110.02861, section 1.2; an unsigned map spends the sign bit on the fraction).
    """
    values = [0.0, 1.0]
    exponent_bits, fraction_bits = 7, 0 if signed else 1
    for exponent in range(exponent_bits):
        count = 2 ** (exponent + fraction_bits)
        edges = torch.linspace(0.1, 1.0, count + 1, dtype=torch.float32)
        means = ((edges[:-1] + edges[1:]) / 2.0) * 10.0 ** (exponent - exponent_bits + 1)
        values += means.tolist()
        if signed:
            values += (-means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@functools.lru_cache(maxsize=8)
def _map_midpoints(signed: bool, device: torch.device) -> Tensor:
    values = dynamic_map(signed, device)
    return (values[:-1] + values[1:]) / 2


def quantize_blocks(x: Tensor, signed: bool, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes like x in uint8 and the largest magnitude of each block of the flattened x, (blocks,) float32.

    The nearest code of `dynamic_map`, but an unsigned value above zero never becomes zero.
    """
    flat = x.reshape(-1).float()
    blocks = -(-flat.numel() // block_size)
    padded = torch.nn.functional.pad(flat, (0, blocks * block_size - flat.numel())).view(blocks, block_size)
    absmax = padded.abs().amax(dim=1)
    # The reciprocal of the smallest numbers is infinite: such a block counts as zero.
    inverse = torch.where(absmax >= _SMALLEST_NORMAL, 1.0 / absmax, 0.0)
    scaled = padded * inverse[:, None]
    codes = torch.bucketize(scaled, _map_midpoints(signed, x.device), out_int32=True)
    if not signed:
        # A second moment that became zero would make the next direction m / sqrt((1 - beta2) g^2), without bound.
        codes = torch.maximum(codes, (scaled > 0).to(torch.int32))
    codes = codes.to(torch.uint8)
    return codes.view(-1)[: flat.numel()].view(x.shape), absmax


def dequantize_blocks(codes: Tensor, absmax: Tensor, signed: bool, block_size: int) -> Tensor:
    """The float32 values of `quantize_blocks`, shaped like codes."""
    # Eight bytes a value at the most: moments are read while much else is in memory.
    value = dynamic_map(signed, codes.device).index_select(0, codes.reshape(-1).int())
    whole = value.numel() // block_size
    value[: whole * block_size].view(whole, block_size).mul_(absmax[:whole, None])
    if whole < absmax.numel():
        value[whole * block_size :].mul_(absmax[whole])
    return value.view(codes.shape)


def scaled(grad: Tensor, factor: Tensor | None) -> Tensor:
    """factor * grad in float32; None stands for 1."""
    return grad.float() if factor is None else grad.float() * factor


def adam_direction(
    grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int, betas: tuple[float, float], eps: float
) -> Tensor:
    """N = m_hat / (sqrt(v_hat) + eps) after moving the float32 moments m, v in place towards grad (Kingma & Ba).

    Each product and sum is rounded by itself (no fused multiply-add), so that a kernel can give the same bits.
    """
    beta1, beta2 = betas
    exp_avg.mul_(beta1).add_(grad * (1.0 - beta1))
    exp_avg_sq.mul_(beta2).add_((grad * grad).mul_(1.0 - beta2))
    denominator = (exp_avg_sq * (1.0 / (1.0 - beta2**step))).sqrt_().add_(eps)
    return (exp_avg * (1.0 / (1.0 - beta1**step))).div_(denominator)


def nesterov_momentum(grad: Tensor, exp_avg: Tensor, beta: float) -> Tensor:
    """beta m + (1 - beta) g after moving the float32 momentum m so in place; rounded as in `adam_direction`."""
    step = grad * (1.0 - beta)
    exp_avg.mul_(beta).add_(step)
    return (exp_avg * beta).add_(step)


def orthogonalize(matrix: Tensor, polynomials: Sequence[tuple[float, float, float]]) -> Tensor:
    """Odd polynomials a x + b x³ + c x⁵ of the singular values of matrix / |matrix|, in its dtype."""
    tall = matrix.shape[0] > matrix.shape[1]
    x: Tensor = matrix.T if tall else matrix
    x = x / x.norm().clamp_min(1e-30)
    for first, third, fifth in polynomials:
        gram = x @ x.T
        even = torch.addmm(gram, gram, gram, beta=third, alpha=fifth)
        x = torch.addmm(x, even, x, beta=first)
    return x.T if tall else x


def project_back_rows(direction: Tensor, left: Tensor | None, right: Tensor | None, start: int, stop: int) -> Tensor:
    """Rows start:stop of leftᵀ N right, the full-size direction, float32; None stands for the identity."""
    if left is None:
        rows = direction[start:stop]
        return rows.float() if right is None else _product(rows, right)
    rows = _product(left[:, start:stop].T, direction)
    return rows if right is None else _product(rows, right)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b summed in float32 and left so: of two bfloat16 matrices on a GPU's tensor cores, with the same products."""
    if a.is_cuda and a.dtype == b.dtype == torch.bfloat16:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def row_chunks(rows: int, columns: int) -> list[tuple[int, int]]:
    """Row ranges of about 4 M elements, so that no float32 copy of a whole large matrix is made."""
    size = max(1, _CHUNK_ELEMENTS // max(1, columns))
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]
