"""Rotary positions in Triton: queries and keys in one launch.

One program turns BLOCK heads of tokens; a thread has both values of its pairs, so that a table is read once for both.
All arithmetic is float32 and without fused multiply-adds: the bits are those of the reference in `rotary`.

query, key: (B, L, heads, head_dim), bfloat16 or float32, any strides but for the last, which is 1. cos, sin: float32
    (L, head_dim / 2), contiguous. The results have head beside head, and any distance from token to token.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qgalore.kernels.arguments import ceil_div, next_power_of_2
from qgalore.kernels.triton.tiles import to_float

_BLOCK_VALUES = 4096


@triton.jit
def _rotate_rows(
    x, out, cos, sin, program, rows, batch_stride, token_stride, head_stride, out_stride, LENGTH: tl.constexpr,
    HEADS: tl.constexpr, HALF: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    row = program * BLOCK + tl.arange(0, BLOCK)[:, None]
    token = row // HEADS
    position = token % LENGTH
    start = (token // LENGTH).to(tl.int64) * batch_stride + position * token_stride + (row % HEADS) * head_stride
    lane = tl.arange(0, LANES)[None, :]
    mask = (row < rows) & (lane < HALF)
    first = tl.load(x + start + lane, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x + start + HALF + lane, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(cos + position * HALF + lane, mask=mask, other=0.0)
    s = tl.load(sin + position * HALF + lane, mask=mask, other=0.0)
    if BACK:
        s = -s
    to = out + token.to(tl.int64) * out_stride + (row % HEADS) * (2 * HALF) + lane
    tl.store(to, to_float(first * c - second * s, out.dtype.element_ty), mask=mask)
    tl.store(to + HALF, to_float(second * c + first * s, out.dtype.element_ty), mask=mask)


@triton.jit
def _rotate_kernel(
    query, key, query_out, key_out, cos, sin, query_rows, key_rows, query_batch, query_token, query_head, key_batch,
    key_token, key_head, query_out_token, key_out_token, LENGTH: tl.constexpr, QUERY_HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr, HALF: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    program, of_queries = tl.program_id(0), tl.cdiv(query_rows, BLOCK)
    if program < of_queries:
        _rotate_rows(
            query, query_out, cos, sin, program, query_rows, query_batch, query_token, query_head, query_out_token,
            LENGTH, QUERY_HEADS, HALF, LANES, BLOCK, BACK,
        )  # fmt: skip
    else:
        _rotate_rows(
            key, key_out, cos, sin, program - of_queries, key_rows, key_batch, key_token, key_head, key_out_token,
            LENGTH, KEY_HEADS, HALF, LANES, BLOCK, BACK,
        )  # fmt: skip


def rotate(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, back: bool, query_out: Tensor, key_out: Tensor
) -> None:
    """See `peft_pretraining.models.ops.rotary.rotate`; `back` turns the other way."""
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    _, length, query_heads, head_dim = query.shape
    key_heads, half = key.shape[2], head_dim // 2
    lanes = next_power_of_2(half)
    block = max(1, _BLOCK_VALUES // (2 * lanes))
    query_rows, key_rows = query.numel() // head_dim, key.numel() // head_dim
    _rotate_kernel[(ceil_div(query_rows, block) + ceil_div(key_rows, block),)](
        query, key, query_out, key_out, cos.contiguous(), sin.contiguous(), query_rows, key_rows, *query.stride()[:3],
        *key.stride()[:3], query_out.stride(1), key_out.stride(1), LENGTH=length, QUERY_HEADS=query_heads,
        KEY_HEADS=key_heads, HALF=half, LANES=lanes, BLOCK=block, BACK=back, enable_fp_fusion=False, num_warps=4,
    )  # fmt: skip
