"""Rows of codes end with zeros where kernels want longer ones: no value, no file and no update may tell."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from peft_pretraining.checkpoint.store import check_model_tensors, load_checkpoint, save_checkpoint
from qgalore import LowRankLinear, QGaLoreAdamW8bit, WeightFormat, convert_linears, quantize
from qgalore.kernels.reference import group_quantization, random_bits
from qgalore.layer.quantization import aligned_row_bytes, grouped_dequantize, row_bytes
from tests.kernels.comparison import step_row

ROWS, COLUMNS = 10, 61
FORMATS = {
    "8": WeightFormat(bits=8, group_size=32),
    "4": WeightFormat(bits=4, group_size=32),
    "int8 products": WeightFormat(bits=8, int8_products=True),
}
every_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(format: WeightFormat, seed: int = 0) -> LowRankLinear:
    return LowRankLinear(normal(ROWS, COLUMNS, seed=seed), None, format)


def unpadded(format: WeightFormat, seed: int = 0) -> LowRankLinear:
    """The same with rows as long as the matrix's, as they were once and as a pickle may have them."""
    module = layer(format, seed)
    module.weight = nn.Parameter(own_codes(module), requires_grad=False)
    return module


def own_codes(module: LowRankLinear) -> Tensor:
    assert module.format.bits is not None
    return module.weight[:, : row_bytes(module.in_features, module.format.bits)].clone()


def ends_with_zeros(module: LowRankLinear) -> bool:
    assert module.format.bits is not None
    stored = aligned_row_bytes(COLUMNS, module.format.bits)
    return (
        module.weight.shape == (ROWS, stored)
        and own_codes(module).shape[1] < stored == 16 * (stored // 16)
        and (module.weight[:, own_codes(module).shape[1] :].count_nonzero() == 0)
    )


def test_rows_are_whole_sixteens_of_bytes() -> None:
    assert [aligned_row_bytes(n, 8) for n in (1, 16, 17, 1376, 5461)] == [16, 16, 32, 1376, 5472]
    assert [aligned_row_bytes(n, 4) for n in (1, 32, 33, 2736, 5461)] == [16, 16, 32, 1376, 2736]
    assert [row_bytes(n, bits) for n, bits in ((5461, 8), (5461, 4), (8, 4))] == [5461, 2731, 4]


@every_format
def test_a_state_dict_has_the_matrix_alone(format: WeightFormat) -> None:
    module = layer(format)
    assert format.bits is not None and ends_with_zeros(module)
    plain = quantize(normal(ROWS, COLUMNS), format.bits, module.group_size)
    state = module.state_dict()
    assert state["weight_qdata"].is_contiguous() and torch.equal(state["weight_qdata"], plain.qdata)
    assert torch.equal(state["weight_scale"], plain.scale)
    assert torch.equal(nn.Sequential(module).state_dict(prefix="model.")["model.0.weight_qdata"], plain.qdata)
    assert torch.equal(module.dequantized_weight(torch.float32), plain.dequantize())


def test_a_weight_that_needs_no_padding_is_itself_in_the_state_dict() -> None:
    module = LowRankLinear(normal(4, 48), None, WeightFormat(bits=8))
    assert module.weight.shape == (4, 48) and module.state_dict()["weight_qdata"].data_ptr() == module.weight.data_ptr()


@every_format
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_without_padding_loads(assign: bool, format: WeightFormat) -> None:
    module, other = nn.Sequential(layer(format)), unpadded(format, seed=1)
    state = {f"0.{key}": tensor.clone() for key, tensor in other.state_dict().items()}
    before = {key: tensor.clone() for key, tensor in state.items()}
    module.load_state_dict(state, assign=assign)
    assert ends_with_zeros(module[0])  # type: ignore[arg-type]
    assert torch.equal(own_codes(module[0]), other.weight)  # type: ignore[arg-type]
    assert torch.equal(module(normal(3, COLUMNS)), other(normal(3, COLUMNS)))
    assert all(torch.equal(state[key], before[key]) for key in before), "the given state dict has changed"
    unpadded(format).load_state_dict(layer(format, seed=1).state_dict())


@every_format
@pytest.mark.parametrize("wrong", [-1, 1, 3, 16])
def test_a_state_dict_of_another_width_is_refused(wrong: int, format: WeightFormat) -> None:
    module = layer(format)
    state = module.state_dict()
    state["weight_qdata"] = torch.ones(ROWS, state["weight_qdata"].shape[1] + wrong, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        module.load_state_dict(state)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        module.load_state_dict(state | {"weight_qdata": module.weight})
    del state["weight_qdata"]
    with pytest.raises(RuntimeError, match=r"Missing key.*weight_qdata"):
        module.load_state_dict(state)


@every_format
def test_copies_and_pickles_keep_the_zeros(format: WeightFormat) -> None:
    module, file = layer(format), io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for twin in (copy.deepcopy(module), torch.load(file, weights_only=False), copy.deepcopy(module).to(torch.float64)):
        assert ends_with_zeros(twin) and torch.equal(own_codes(twin), own_codes(module))


@every_format
def test_updates_are_those_of_the_formula(format: WeightFormat) -> None:
    module = layer(format)
    assert format.bits is not None
    plain = quantize(normal(ROWS, COLUMNS), format.bits, module.group_size)
    codes, scale, zero_point = plain.qdata, plain.scale, plain.zero_point
    basis, random = normal(4, ROWS, seed=1), None
    for seed in range(5):
        direction = normal(4, COLUMNS, seed=seed)
        module.update_(direction, basis, None, step_row(0.01, 0.99, seed))
        unpacked = codes if format.bits == 8 else group_quantization.unpack_int4(codes, COLUMNS)
        weight = group_quantization.dequantize_groups(unpacked, scale, zero_point, module.group_size, torch.float32)
        weight = weight * 0.99 - (basis.T @ direction) * 0.01
        random = random_bits.random_bits16(ROWS, COLUMNS, seed, 0, weight.device)
        codes, scale, zero_point = group_quantization.quantize_groups(weight, format.bits, module.group_size, random)
        codes = codes if format.bits == 8 else group_quantization.pack_int4(codes)
        assert ends_with_zeros(module) and torch.equal(own_codes(module), codes)
        assert module.weight_scale is not None and torch.equal(module.weight_scale, scale)


@every_format
@pytest.mark.parametrize("rank", [4, None])
def test_training_is_that_of_rows_without_padding(rank: int | None, format: WeightFormat) -> None:
    trained = []
    for make in (layer, unpadded):
        module = make(format)
        low_rank = {"rank": rank, "subspace": "streaming", "update_proj_gap": 2} if rank else {}
        optimizer = QGaLoreAdamW8bit([{"params": [module.weight]} | low_rank], lr=1e-2)
        optimizer.attach(module, update_in_backward=True)
        for seed in range(5):
            module(normal(8, COLUMNS, seed=seed)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append(module)
    assert ends_with_zeros(trained[0]) and not torch.equal(own_codes(trained[0]), own_codes(layer(format)))
    for (name, one), other in zip(trained[0].state_dict().items(), trained[1].state_dict().values(), strict=True):
        assert torch.equal(one, other), name


@every_format
def test_a_checkpoint_has_the_matrix_alone(format: WeightFormat, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(COLUMNS, ROWS))
    convert_linears(model, ["0"], format)
    path = save_checkpoint(tmp_path, 1, model.state_dict(), {}, {})
    checkpoint = load_checkpoint(path)
    assert checkpoint.model_tensors["0.weight_qdata"].shape == (ROWS, row_bytes(COLUMNS, format.bits or 0))
    check_model_tensors(checkpoint, model.state_dict())
    again = nn.Sequential(layer(format))
    again[0].bias = nn.Parameter(torch.zeros(ROWS))
    again.load_state_dict(checkpoint.model_tensors)
    assert torch.equal(again(normal(2, COLUMNS)), model(normal(2, COLUMNS)))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_place_that_is_larger_gets_zeros_and_one_that_is_smaller_is_refused(bits: int) -> None:
    stored = quantize(torch.randn(5, 37, generator=torch.Generator().manual_seed(0)), bits, 16).with_aligned_rows()
    place = torch.full((7, 48), 3.0)
    assert stored.dequantize(torch.float32, place) is place
    assert torch.equal(place[:5, :37], stored.dequantize()) and place.count_nonzero() == place[:5, :37].count_nonzero()
    for small in (torch.empty(4, 37), torch.empty(5, 36)):
        with pytest.raises(ValueError, match="does not hold a matrix of 5 x 37"):
            stored.dequantize(torch.float32, small)
        with pytest.raises(ValueError, match="does not hold a matrix of 5 x 37"):
            grouped_dequantize([stored, stored], torch.float32, [(7, 48), tuple(small.shape)])
