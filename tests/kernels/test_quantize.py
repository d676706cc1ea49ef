"""Group quantization: error bounds, groups inside rows, packing, stability, and unbiased stochastic rounding."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qgalore import kernels
from qgalore.kernels.reference import group_quantization, random_bits, rows
from tests.kernels.comparison import dequantize, update_float_, update_quantized_
from tests.kernels.comparison import quantize as quantized

GROUP = 256
COLUMNS = (1, 255, 256, 257, 1376, 5461)


def uniform(rows: int, columns: int, low: float, high: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(rows, columns, generator=generator, dtype=torch.float64) * (high - low) + low).float()


def with_outliers(rows: int, columns: int) -> Tensor:
    x = uniform(rows, columns, -1e-3, 1e-3)
    x[:, columns // 2] = 50.0
    return x


MATRICES: dict[str, Callable[[int, int], Tensor]] = {
    "zero": lambda r, c: torch.zeros(r, c),
    "constant": lambda r, c: torch.full((r, c), 0.0137),
    "negative constant": lambda r, c: torch.full((r, c), -123.4),
    "around zero": lambda r, c: uniform(r, c, -0.06, 0.05),
    "positive": lambda r, c: uniform(r, c, 0.01, 0.02),
    "negative": lambda r, c: uniform(r, c, -7.0, -6.5),
    "huge": lambda r, c: uniform(r, c, -1e38, 1e38),
    "huge, both signs": lambda r, c: uniform(r, c, -1.6e38, 1.6e38),
    "huge and one-signed": lambda r, c: uniform(r, c, 0.9e38, 1e38),
    "tiny": lambda r, c: uniform(r, c, -1e-38, 1e-38),
    "narrow": lambda r, c: uniform(r, c, 1.0, 1.00001),
    "narrow and negative": lambda r, c: uniform(r, c, -3.000002, -3.0),
    "narrow, off the bfloat16 grid": lambda r, c: uniform(r, c, 1.0030, 1.0031),
    "outliers": with_outliers,
}


def quantize(x: Tensor, bits: int, seed: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Dequantized values in float64, scale and zero point spread over the elements."""
    qdata, scale, zero_point = quantized(x, bits, GROUP, seed)
    value = dequantize(qdata, scale, zero_point, x.shape[1], bits, GROUP, torch.float32)
    spread = [t.double().repeat_interleave(GROUP, dim=1)[:, : x.shape[1]] for t in (scale, zero_point)]
    return value.double(), spread[0], spread[1]


@pytest.mark.parametrize("seed", [None, 7], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", MATRICES)
def test_error_is_within_its_bound(kind: str, bits: int, seed: int | None, device: torch.device) -> None:
    for columns in COLUMNS:
        x = MATRICES[kind](2, columns).to(device)
        value, scale, _ = quantize(x, bits, seed)
        bound = scale * (0.5 if seed is None else 1.0)
        # The position in the group has 24 bits; so has the value, and what it cannot tell apart is not asked of the
        # scale; below them lie the smallest subnormals.
        rounding = scale * 2.0**-14 + x.double().abs() * 1.25 * 2.0**-22 + 2.0**-140
        assert value.isfinite().all(), columns
        assert ((value - x.double()).abs() <= bound + rounding).all(), columns


@pytest.mark.parametrize("bits", [8, 4])
def test_scale_is_no_larger_than_the_group_needs(bits: int, device: torch.device) -> None:
    x = uniform(5, 1376, -0.06, 0.05).to(device)
    _, scale, zero_point = quantize(x, bits)
    low, high = x[:, :GROUP].double().aminmax(dim=1)
    needed = (high - low) / (2**bits - 1)
    # The zero point is rounded down and the scale up to bfloat16: 2^-7 of each at most.
    slack = low.abs() * 2.0**-7 / (2**bits - 1)
    assert (scale[:, 0] <= (needed + slack) * (1 + 2.0**-7)).all()
    assert (zero_point[:, 0] <= low).all()


@pytest.mark.parametrize("seed", [None, 3], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("bits", [8, 4])
def test_groups_never_straddle_rows(bits: int, seed: int | None, device: torch.device) -> None:
    x = uniform(4, 1376, -1.0, 1.0).to(device)
    changed = x.clone()
    changed[2] = 40.0 * x[1] - 3.0
    others = [0, 1, 3]
    for before, after in zip(quantized(x, bits, GROUP, seed), quantized(changed, bits, GROUP, seed), strict=True):
        assert torch.equal(before[others], after[others])
        assert not torch.equal(before[2], after[2])


def test_a_group_depends_on_its_own_columns_alone(device: torch.device) -> None:
    x = uniform(2, 700, -1.0, 1.0).to(device)
    changed = x.clone()
    changed[:, 600] = 9.0  # in the ragged last group, columns 512 to 699
    codes, scale, zero_point = kernels.quantize(x, 8, GROUP)
    new_codes, new_scale, new_zero_point = kernels.quantize(changed, 8, GROUP)
    assert torch.equal(codes[:, :512], new_codes[:, :512])
    assert torch.equal(scale[:, :2], new_scale[:, :2]) and torch.equal(zero_point[:, :2], new_zero_point[:, :2])
    assert not torch.equal(scale[:, 2], new_scale[:, 2])


def test_values_far_from_zero_do_not_collapse(device: torch.device) -> None:
    x = torch.linspace(0.01, 0.02, 256, device=device)[None]
    value, scale, _ = quantize(x, 8)
    assert value.unique().numel() > 230
    assert (value - x.double()).abs().max() < 0.01 / 255
    assert scale.max() < 1.05 * 0.01 / 255


@pytest.mark.parametrize("low", [5.0, -6.0, 1000.0, -2.5e-4])
def test_zero_point_is_not_clamped(low: float, device: torch.device) -> None:
    x = torch.linspace(low, low + abs(low) / 8, 256, device=device)[None]
    _, _, zero_point = quantize(x, 8)
    assert low - abs(low) * 2.0**-7 <= float(zero_point[0, 0]) <= low


@pytest.mark.parametrize("columns", [1, 2, 3, 8, 255, 5461])
def test_pack_then_unpack_is_the_identity(columns: int, device: torch.device) -> None:
    codes = torch.randint(0, 16, (5, columns), dtype=torch.uint8, device=device)
    packed = group_quantization.pack_int4(codes)
    assert packed.dtype == torch.uint8 and packed.shape == (5, (columns + 1) // 2)
    assert torch.equal(group_quantization.unpack_int4(packed, columns), codes)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", MATRICES)
def test_requantizing_does_not_drift(kind: str, bits: int, device: torch.device) -> None:
    x = MATRICES[kind](2, 600).to(device)
    first, first_scale, _ = quantize(x, bits)
    value, scale = first, first_scale
    for _ in range(50):
        value, scale, _ = quantize(value.float(), bits)
    assert (scale <= first_scale).all()
    assert ((value - first).abs() <= first_scale).all()


# ---- stochastic rounding


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("fraction", [0.005, 0.1, 0.5, 0.9])
def test_stochastic_rounding_is_unbiased(fraction: float, bits: int, device: torch.device) -> None:
    levels = 2**bits - 1
    x = torch.full((256, GROUP), levels // 3 + fraction, device=device)
    x[:, 0], x[:, 1] = 0.0, levels  # so that a step is 1
    value, scale, _ = quantize(x, bits, seed=1)
    assert (scale == 1).all()
    mean = float((value - x)[:, 2:].mean())
    deviation = (fraction * (1 - fraction) / (256 * 254)) ** 0.5
    assert abs(mean) < 4 * deviation + 2.0**-16  # the 16 bits of a random number
    assert value[:, 2:].unique().numel() == 2


def test_same_seed_same_bits_and_other_seed_other_bits(device: torch.device) -> None:
    x = uniform(8, 300, -1.0, 1.0).to(device)
    first, again, other = (quantized(x, 8, GROUP, seed)[0] for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    # 64 bits count, not the low 32 alone.
    assert not torch.equal(first, quantized(x, 8, GROUP, 5 + (1 << 32))[0])
    torch.manual_seed(123)
    assert torch.equal(first, quantized(x, 8, GROUP, 5)[0])


def stored(rows: int, columns: int, bits: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    return kernels.quantize(uniform(rows, columns, -1.0, 1.0).to(device), bits, GROUP)


@pytest.mark.parametrize("bits", [8, 4])
def test_update_in_chunks_of_rows_equals_the_whole(
    bits: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, direction = uniform(4, 37, -1.0, 1.0, 1).to(device), uniform(4, 301, -1.0, 1.0, 2).to(device)
    results = []
    for elements in (1 << 22, 301 * 5):
        monkeypatch.setattr(rows, "_CHUNK_ELEMENTS", elements)
        weight = stored(37, 301, bits, device)
        update_quantized_(*weight, direction, left, None, 301, bits, GROUP, 0.01, 0.999, 11)
        results.append(weight)
    assert all(torch.equal(whole, chunked) for whole, chunked in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float_update_in_parts_equals_the_whole(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, direction = uniform(20, 33, -1.0, 1.0).to(device, dtype), uniform(20, 33, -1.0, 1.0, 1).to(device)
    whole, chunked, parts = start.clone(), start.clone(), start.clone()
    update_float_(whole, direction, None, None, 1e-3, 1.0, 9)
    for part in (slice(0, 7), slice(7, 20)):
        update_float_(parts[part], direction[part], None, None, 1e-3, 1.0, 9, part.start)
    monkeypatch.setattr(rows, "_CHUNK_ELEMENTS", 33 * 3)
    update_float_(chunked, direction, None, None, 1e-3, 1.0, 9)
    assert not torch.equal(whole, start)
    assert torch.equal(whole, parts) and torch.equal(whole, chunked)


def moved(size: float, updates: int, seeded: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """What many equal updates of `size` steps do to INT8 weights, in shares of what they should.

    Returns the shares of all values (128, 512) and of the two ends of each group (128, 2, 2), smallest value first.
    """
    codes = torch.randn(128, 2, GROUP, generator=torch.Generator().manual_seed(3)) * 40 + 128
    codes = codes.round().clamp(1, 254)
    codes[..., 0], codes[..., 1] = 0, 255
    qdata, scale, zero_point = kernels.quantize(((codes - 128) * 2.0**-12).view(128, 512).to(device), 8, GROUP)
    before = dequantize(qdata, scale, zero_point, 512, 8, GROUP, torch.float32)
    direction = torch.full((128, 512), -(2.0**-12), device=device)
    for update in range(updates):
        seed = update if seeded else None
        update_quantized_(
            qdata, scale, zero_point, direction, None, None, 512, 8, GROUP, size, 1.0, seed
        )  # fmt: skip
    after = dequantize(qdata, scale, zero_point, 512, 8, GROUP, torch.float32)
    shares = (after - before) / (2.0**-12 * size * updates)
    return shares, shares.view(128, 2, GROUP)[..., :2]


@pytest.mark.parametrize("sign", [1, -1])
def test_small_updates_add_up_under_stochastic_rounding(sign: int, device: torch.device) -> None:
    shares, _ = moved(sign * 0.02, 100, True, device)
    # A share of one value deviates by 1.4 where its group's grid moves along, the mean of 65,536 by 0.006.
    assert 0.98 < float(shares.mean()) < 1.02


def test_tiny_updates_add_up_inside_a_group(device: torch.device) -> None:
    x = torch.full((256, GROUP), 100.0, device=device)
    x[:, 0], x[:, 1] = 0.0, 255.0  # ends that stay where they are keep the grid, so the noise is small
    direction = -torch.ones_like(x)
    direction[:, :2] = 0.0
    weight = kernels.quantize(x, 8, GROUP)
    nearest = tuple(t.clone() for t in weight)
    for update in range(200):
        update_quantized_(*weight, direction, None, None, GROUP, 8, GROUP, 0.005, 1.0, update)
        if update < 20:
            update_quantized_(*nearest, direction, None, None, GROUP, 8, GROUP, 0.005, 1.0, None)
    value = dequantize(*weight, GROUP, 8, GROUP, torch.float32)
    assert 0.99 < float((value - x)[:, 2:].mean()) / (200 * 0.005) < 1.01
    assert torch.equal(dequantize(*nearest, GROUP, 8, GROUP, torch.float32), x)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_ends_of_a_group_move_like_the_rest(sign: int, device: torch.device) -> None:
    _, shares = moved(sign * 0.012, 150, True, device)
    smallest, largest = shares.mean(dim=(0, 1)).tolist()
    # The mean of 256 walks of 150 steps, each with a deviation of up to half a grid step, over 1.8 grid steps.
    assert 0.4 < smallest < 1.6 and 0.4 < largest < 1.6


# A number and the distance to the next larger one. Those of float16 stay the same from 2^-14 downwards.
STEPS = [
    (torch.bfloat16, 1.0, 2.0**-7), (torch.float16, 1.0, 2.0**-10), (torch.float16, -2.0**-13, 2.0**-24),
    (torch.float16, 5 * 2.0**-24, 2.0**-24),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "start", "step"), STEPS)
@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.5, 0.97])
def test_updates_in_16_bits_are_unbiased(
    fraction: float, dtype: torch.dtype, start: float, step: float, device: torch.device
) -> None:
    weight = torch.full((256, 256), start, dtype=dtype, device=device)
    update_float_(weight, -torch.ones(256, 256, device=device), None, None, fraction * step, 1.0, seed=4)
    mean = float((weight.double() - start).mean()) / step
    deviation = (fraction * (1 - fraction) / 65536) ** 0.5
    # 13 random bits make what is lost of a float16, 16 of a bfloat16.
    assert abs(mean - fraction) < 4 * deviation + 2.0**-13
    nearest = torch.full((256, 256), start, dtype=dtype, device=device)
    update_float_(nearest, -torch.ones(256, 256, device=device), None, None, 0.01 * step, 1.0, seed=None)
    assert (nearest == start).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_16_bits_keeps_what_is_exact_or_not_finite(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.tensor([[0.0, -0.0, 1.0, -3.5, 3e-7, 6e4, float("inf"), float("-inf"), float("nan")]], device=device)
    x = x.to(dtype).float()
    for bits in (0, 1, 0xFFFF):
        random = torch.full(x.shape, bits, dtype=torch.int32, device=device)
        rounded = random_bits.round_stochastic(x, random, dtype)
        assert rounded.dtype == dtype and torch.equal(rounded.float().nan_to_num(7.0), x.nan_to_num(7.0))
        assert torch.equal(rounded.signbit()[:, :-1], x.signbit()[:, :-1])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("sides", ["left", "right", "both", "none"])
def test_update_is_the_formula_rounded_once(sides: str, bits: int, device: torch.device) -> None:
    rows, columns, rank = 12, 300, 4
    left = uniform(rank, rows, -1.0, 1.0, 1).to(device) if sides in ("left", "both") else None
    right = uniform(rank, columns, -1.0, 1.0, 2).to(device) if sides in ("right", "both") else None
    shape = (rank if left is not None else rows, rank if right is not None else columns)
    direction = uniform(*shape, -1.0, 1.0, 3).to(device)
    full = direction.double()
    full = full if left is None else left.double().T @ full
    full = full if right is None else full @ right.double()
    weight = stored(rows, columns, bits, device)
    before = dequantize(*weight, columns, bits, GROUP, torch.float32).double()
    update_quantized_(*weight, direction, left, right, columns, bits, GROUP, 0.02, 0.9, None)
    after = dequantize(*weight, columns, bits, GROUP, torch.float32).double()
    step = weight[1].double().repeat_interleave(GROUP, dim=1)[:, :columns]
    assert ((after - (0.9 * before - 0.02 * full)).abs() <= step * 0.501 + 1e-6).all()
    assert torch.allclose(kernels.project_back(direction, left, right).double(), full, atol=1e-5)
    value = before.float()
    update_float_(value, direction, left, right, 0.02, 0.9, None)
    assert torch.allclose(value.double(), 0.9 * before - 0.02 * full, atol=1e-6)


# ---- the door


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="bits must be 4 or 8, not 3"):
        kernels.quantize(torch.zeros(2, 2), 3, GROUP)
    with pytest.raises(ValueError, match="group_size must be positive, not 0"):
        kernels.quantize(torch.zeros(2, 2), 8, 0)
    with pytest.raises(ValueError, match=r"must be a matrix, not of shape \(5,\)"):
        kernels.quantize(torch.zeros(5), 8, GROUP)


def test_an_unknown_choice_of_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QGALORE_KERNELS", "fastest")
    with pytest.raises(ValueError, match="'fastest' is unknown: it must be one of auto, reference, triton"):
        kernels.use_triton(torch.device("cpu"))
