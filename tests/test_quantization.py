"""The value type of group quantization: shapes, bytes, dtypes."""

import dataclasses

import pytest
import torch

from qgalore import QuantizedTensor, quantize


def matrix(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("bits", "row_bytes"), [(8, 1376), (4, 688)])
def test_int4_takes_half_a_byte(bits: int, row_bytes: int) -> None:
    quantized = quantize(matrix(10, 1376), bits)
    assert quantized.qdata.dtype == torch.uint8 and quantized.qdata.shape == (10, row_bytes)
    groups = 6  # 5 of 256 and one of 96
    assert quantized.scale.shape == quantized.zero_point.shape == (10, groups)
    assert quantized.scale.dtype == quantized.zero_point.dtype == torch.bfloat16
    assert quantized.nbytes == 10 * (row_bytes + groups * 2 * 2)
    assert quantized.shape == (10, 1376)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("columns", [1, 5, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dequantized_matrix_has_the_shape_and_dtype_asked_for(dtype: torch.dtype, columns: int, bits: int) -> None:
    x = matrix(3, columns)
    quantized = quantize(x, bits)
    value = quantized.dequantize(dtype)
    assert value.shape == x.shape and value.dtype == dtype
    assert torch.equal(value, quantized.dequantize().to(dtype)), "rounded once"


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group_size", [1, 7, 64, 1000])
def test_any_group_size_bounds_the_error(group_size: int, bits: int) -> None:
    x = matrix(4, 100)
    quantized = quantize(x, bits, group_size)
    assert quantized.scale.shape == (4, -(-100 // group_size))
    step = quantized.scale.float().repeat_interleave(group_size, dim=1)[:, :100]
    assert ((quantized.dequantize() - x).abs() <= step * 0.5001 + 1e-6).all()


def test_smaller_groups_are_more_exact() -> None:
    x = matrix(16, 1024)
    errors = [float((quantize(x, 4, size).dequantize() - x).norm()) for size in (32, 256, 1024)]
    assert errors[0] < errors[1] < errors[2]


def test_a_bfloat16_matrix_is_quantized_as_its_values() -> None:
    x = matrix(4, 300).bfloat16()
    assert torch.equal(quantize(x).qdata, quantize(x.float()).qdata)


def test_a_quantized_tensor_is_a_value() -> None:
    quantized = quantize(matrix(2, 4))
    assert isinstance(quantized, QuantizedTensor)
    with pytest.raises(dataclasses.FrozenInstanceError):
        quantized.bits = 4  # type: ignore[misc]
