"""Adam's step with one second moment a row: the kernel against its reference, and rows against what is beside them.

And the update of weights by it in one launch, against the three launches that it takes the place of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module

import pytest
import torch
from torch import Tensor, nn

from qgalore import GaLoreAdamW8bit, kernels
from qgalore.update.directions import ADAM_BY_ROW
from qgalore.update.moments import BLOCK_SIZE
from tests.kernels.comparison import OPERAND_TYPES, agreed, both, each, normal, same, step_row, whole_numbers

BETAS = (0.9, 0.99)
Moments = tuple[Tensor, Tensor | None, Tensor]

# A ragged width of 1B's MLP, one of whole blocks, one as wide as GPT-2's vocabulary, one column, no power of two.
SHAPES = {"ragged": (2, 5461), "blocks": (9, 768), "widest": (1, 50257), "column": (300, 1), "narrow": (70, 24)}


def moments_of(shape: tuple[int, int], bits: int, device: torch.device) -> Moments:
    """A momentum, its absmax at 8 bits, and second moments of rows, as they are after some updates."""
    second = normal(shape[0], seed=9).square().to(device)
    momentum = normal(*shape, seed=8).to(device)
    if bits == 32:
        return momentum, None, second
    codes, absmax = torch.empty_like(momentum, dtype=torch.uint8), second.new_empty(-(-momentum.numel() // BLOCK_SIZE))
    kernels.quantize_blocks_(codes, absmax, momentum, True, BLOCK_SIZE)
    return codes, absmax, second


def step_of(
    grad: Tensor, moments: Moments, factor: float | None = None, dtype: torch.dtype = torch.float32
) -> kernels.AdamStep:
    """A third step, of these moments themselves."""
    momentum, absmax, second = moments
    scale = None if factor is None else torch.tensor(factor, device=grad.device)
    row = step_row(step=3, betas=BETAS, device=grad.device)
    return kernels.AdamStep(grad, momentum, absmax, second, None, row, BETAS, 1e-8, scale, dtype)


def copy_of(moments: Moments) -> Moments:
    momentum, absmax, second = moments
    return momentum.clone(), None if absmax is None else absmax.clone(), second.clone()


def agree(grads: Sequence[Tensor], bits: int, factor: float | None, dtype: torch.dtype, flag: Tensor | None) -> None:
    """Check that both backends give the same momenta to the bit, and the same in all else but for its last bits.

    Where the flag is true, that the moments stay.
    """
    before = [moments_of((len(grad), grad.shape[1]), bits, grad.device) for grad in grads]

    def run() -> tuple[list[Tensor], list[Moments]]:
        moved = [copy_of(each) for each in before]
        steps = [step_of(grad, each, factor, dtype) for grad, each in zip(grads, moved, strict=True)]
        return kernels.row_adam_steps(steps, BLOCK_SIZE, flag), moved

    (expected, moved), (found, moved_too) = both(run)
    for old, one, other in zip(before, moved, moved_too, strict=True):
        of_momentum = slice(0, 2 if bits == 8 else 1)
        assert same(one[of_momentum], other[of_momentum])
        assert torch.allclose(one[2], other[2], rtol=2e-6, atol=0)
        assert torch.equal(other[2], old[2]) == same(other[of_momentum], old[of_momentum]) == bool(flag)
    for grad, one, other in zip(grads, expected, found, strict=True):
        assert other.shape == grad.shape and one.dtype == other.dtype == dtype
        exactness = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
        assert flag or torch.allclose(one.float(), other.float(), rtol=exactness, atol=0)


@each("skip", (None, False, True))
@each("bits", (8, 32))
@each("shape", SHAPES)
def test_a_step(shape: str, bits: int, skip: bool | None, kernel_device: torch.device) -> None:
    flag = None if skip is None else torch.tensor(skip, device=kernel_device)
    agree([normal(*SHAPES[shape]).to(kernel_device)], bits, 0.3, torch.float32, flag)


@each("dtype", (torch.float32, torch.bfloat16))
@each("of_gradient", OPERAND_TYPES)
def test_dtypes_of_gradient_and_direction(
    of_gradient: torch.dtype, dtype: torch.dtype, kernel_device: torch.device
) -> None:
    shapes = [(3, 768), (2, 2063), (40, 1), (70, 24)] + [(5, 20)] * 9
    grads = [normal(*shape, seed=10 + i).to(kernel_device, of_gradient) for i, shape in enumerate(shapes)]
    given = [grad.clone() for grad in grads]
    agree(grads, 8, None, dtype, torch.tensor(False, device=kernel_device))
    assert all(torch.equal(grad, before) for grad, before in zip(grads, given, strict=True)), "a gradient has changed"


@each("columns", (2063, 768, 24))
def test_a_row_is_what_it_is_alone(columns: int, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit: with other rows of its matrix, beside other matrices, and from another address."""
    monkeypatch.setenv("QGALORE_KERNELS", "triton")
    grad, moments = normal(7, columns).to(kernel_device), moments_of((7, columns), 32, kernel_device)
    shifted = torch.empty(4 * columns + 1, device=kernel_device)[1:].view(4, columns).copy_(grad[3:])

    def step(grad: Tensor, rows: slice) -> kernels.AdamStep:
        return step_of(grad, (moments[0][rows].clone(), None, moments[2][rows].clone()))

    whole = step(grad, slice(0, 7))
    other = step_of(normal(5, columns + 16, seed=1).to(kernel_device), moments_of((5, columns + 16), 32, kernel_device))
    parts = [step(grad[3:], slice(3, 7)), step(shifted, slice(3, 7)), step(grad[3:4], slice(3, 4))]
    expected = kernels.row_adam_steps([whole], BLOCK_SIZE)[0][3:]
    found = kernels.row_adam_steps([other, *parts], BLOCK_SIZE)[1:]
    assert whole.exp_avg_sq is not None
    for part, direction in zip(parts, found, strict=True):
        assert torch.equal(direction, expected[: len(direction)])
        assert part.exp_avg_sq is not None
        assert torch.equal(part.exp_avg_sq, whole.exp_avg_sq[3 : 3 + len(direction)])


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are launched from now on, with Triton."""
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("QGALORE_KERNELS", "triton")
    found: list[str] = []
    kernels_of = {"adam": ["momentum"], "row_adam": ["row_adam", "row_adam_update"], "float_update": ["update_float"]}
    for stem, names in kernels_of.items():
        file = import_module(f"qgalore.kernels.triton.{stem}")
        for name in names:
            kernel = getattr(file, f"_{name}_kernel")

            class Counted:
                def __getitem__(self, grid: object, kernel: object = kernel, name: str = name) -> object:
                    found.append(name)
                    return kernel[grid]  # type: ignore[index]

            monkeypatch.setattr(file, f"_{name}_kernel", Counted())
    return found


def test_launches(kernel_device: torch.device, launched: list[str]) -> None:
    """Two for a chunk of rows, or for some small matrices of one kind: the momenta, then all that makes directions."""
    for count in (1, 3):
        grads = [normal(20, 256, seed=i).to(kernel_device) for i in range(count)]
        steps = [step_of(grad, moments_of((20, 256), 8, kernel_device), 0.5) for grad in grads]
        launched.clear()
        kernels.row_adam_steps(steps, BLOCK_SIZE, torch.tensor(False, device=kernel_device))
        assert launched == ["momentum", "row_adam"]


def test_a_direction_takes_the_place_of_its_momentum(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a chunk of an embedding takes four bytes a value, as memory is planned, and the state keeps its momentum."""
    row_adam = pytest.importorskip("qgalore.kernels.triton.row_adam", reason="Triton is not installed")
    monkeypatch.setenv("QGALORE_KERNELS", "triton")
    made: list[Tensor] = []
    moves = row_adam.momentum_steps
    monkeypatch.setattr(row_adam, "momentum_steps", lambda *given: made.extend(moves(*given)) or list(made))
    moments = moments_of((4, 24), 32, kernel_device)
    found = kernels.row_adam_steps([step_of(normal(4, 24).to(kernel_device), moments)], BLOCK_SIZE)
    assert found[0].data_ptr() == made[0].data_ptr() != moments[0].data_ptr()


def test_a_row_of_zeros(kernel_device: torch.device) -> None:
    """A token that no text has had yet stays where it is."""
    grad = normal(3, 40).to(kernel_device)
    grad[1] = 0

    def run() -> Tensor:
        moments = torch.zeros_like(grad), None, torch.zeros(3, device=kernel_device)
        return kernels.row_adam_steps([step_of(grad, moments)], BLOCK_SIZE)[0]

    for found in both(run):
        assert found.isfinite().all() and not found[1].any() and found[0].all()


def test_what_does_not_fit_is_refused() -> None:
    grad, (momentum, _, second) = normal(3, 4), moments_of((3, 4), 32, torch.device("cpu"))
    for wrong in (step_of(grad, (momentum, None, second[:2])), step_of(grad, (momentum, None, second))):
        wrong = wrong if len(wrong.exp_avg_sq) < 3 else wrong._replace(exp_avg_sq=None)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"exp_avg_sq must be \(3,\), one number a row, not (\(2,\)|None)"):
            kernels.row_adam_steps([wrong], BLOCK_SIZE)
    with pytest.raises(ValueError, match=r"grad must be a matrix, not of shape \(3,\)"):
        kernels.row_adam_steps([step_of(second, (second, None, second))], BLOCK_SIZE)


# ---- updates of weights in one launch

UPDATED = {
    "narrow": [(20, 256)], "one tile": [(5, 512)], "ragged tile": [(4, 768), (9, 768)], "tiles": [(1, 4096)],
    "ragged tiles": [(3, 2304), (1, 5120)], "widths": [(3, 256), (4, 512), (2, 768), (2, 1024)] + [(1, 1280)] * 9,
}  # fmt: skip
SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def update_of(
    shape: tuple[int, int], number: int, device: torch.device, dtypes: Sequence[torch.dtype],
    factor: float | None = None, growing: float | None = None, changes: bool = True, row_start: int = 3,
) -> kernels.RowAdamUpdate:  # fmt: skip
    """The third update of a weight, in which some values are negative zeros; dtypes: of weight, gradient, direction."""
    weight, grad = normal(*shape, seed=number), normal(*shape, seed=number + 50) * 2.0 ** (number % 5)
    weight[0, ::3] = -0.0
    step = step_of(grad.to(device, dtypes[1]), moments_of(shape, 8, device), factor, dtypes[2])
    corrections = [1.0 / (1.0 - beta**3) for beta in BETAS]
    rates = (0.01 * (1 + number), 0.9) if changes else (0.0, 1.0)
    row = kernels.StepScalars((1 << 40) + 7 * number, *rates, *corrections, growing).row(device)
    return kernels.RowAdamUpdate(weight.to(device, dtypes[0]), step._replace(row=row), row_start)


def after(updates: Sequence[kernels.RowAdamUpdate], flag: Tensor | None, at_once: bool) -> tuple[Tensor, ...]:
    """Bits of weights, codes, absmax and second moments after the updates of copies; or after the three launches."""
    copies = []
    for weight, step, start in updates:
        moments = copy_of((step.exp_avg, step.exp_avg_absmax, step.exp_avg_sq))  # type: ignore[arg-type]
        kept = dict(zip(("exp_avg", "exp_avg_absmax", "exp_avg_sq"), moments, strict=True))
        copies.append(kernels.RowAdamUpdate(weight.clone(), step._replace(**kept), start))
    if at_once:
        kernels.row_adam_update_(copies, BLOCK_SIZE, flag)
    else:
        directions = kernels.row_adam_steps([copy.step for copy in copies], BLOCK_SIZE, flag)
        applied = zip(copies, directions, strict=True)
        kernels.update_float_(
            [
                kernels.FloatUpdate(each.weight, x, None, None, each.step.row, True, each.row_start)
                for each, x in applied
            ],
            flag,
        )
    return tuple(bits for copy in copies for bits in _bits(copy))


def _bits(update: kernels.RowAdamUpdate) -> Iterator[Tensor]:
    for x in filter(torch.is_tensor, (update.weight, *update.step[1:4])):
        yield x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.itemsize])


def is_one_launch(updates: Sequence[kernels.RowAdamUpdate]) -> bool:
    return all(kernels.fuses_row_adam(update.step, BLOCK_SIZE) for update in updates)


@each("growing", (None, 1.0))
@each("factor", (None, 0.3))
@each("chosen", UPDATED)
def test_an_update_has_the_bits_of_three_launches(
    chosen: str, factor: float | None, growing: float | None, kernel_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("QGALORE_KERNELS", "triton")
    dtypes = (torch.bfloat16, torch.bfloat16, torch.float32)
    updates = [update_of(shape, i, kernel_device, dtypes, factor, growing) for i, shape in enumerate(UPDATED[chosen])]
    assert is_one_launch(updates)
    before, found = tuple(bits for each in updates for bits in _bits(each)), after(updates, None, at_once=True)
    assert all(not torch.equal(old, new) for old, new in zip(before, found, strict=True))
    assert same(found, after(updates, None, at_once=False))


@each("direction", (torch.float32, *SIXTEEN_BITS))
@each("grad", (torch.float32, *SIXTEEN_BITS))
@each("weight", (torch.float32, *SIXTEEN_BITS))
def test_dtypes_of_an_update(
    weight: torch.dtype, grad: torch.dtype, direction: torch.dtype, kernel_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Beside an update of other dtypes, which is another launch, and ones that are three."""
    monkeypatch.setenv("QGALORE_KERNELS", "triton")
    updates = [update_of((3, 768), 0, kernel_device, (weight, grad, direction))]
    assert is_one_launch(updates)
    updates += [update_of((2, 1024), 1, kernel_device, (torch.bfloat16,) * 3, row_start=0)]
    updates += [update_of((4, 700), 2, kernel_device, (weight, grad, direction))]
    assert same(after(updates, None, at_once=True), after(updates, None, at_once=False))


@each("skip", (True, False))
def test_what_an_update_leaves(skip: bool, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """All where it is skipped, and with a learning rate of 0 the weights alone, negative zeros among them."""
    monkeypatch.setenv("QGALORE_KERNELS", "triton")
    dtypes, flag = (torch.bfloat16, torch.bfloat16, torch.float32), torch.tensor(skip, device=kernel_device)
    updates = [update_of((4, 512), i, kernel_device, dtypes, 0.3, changes=i == 1) for i in range(2)]
    before, found = (bits for each in updates for bits in _bits(each)), after(updates, flag, at_once=True)
    kept = [torch.equal(old, new) for old, new in zip(before, found, strict=True)]
    assert kept == ([True] * 8 if skip else [True] + [False] * 7)
    assert same(found, after(updates, flag, at_once=False))


@each("weight", (torch.float32, torch.bfloat16))
@each("columns", (256, 1024))
def test_an_update_is_that_of_the_reference(columns: int, weight: torch.dtype, kernel_device: torch.device) -> None:
    """To the bit, where the sums of squares do not depend on their order: of whole numbers."""
    given = update_of((6, columns), 1, kernel_device, (weight, torch.bfloat16, torch.bfloat16))
    grad = whole_numbers(6, columns, seed=3).to(kernel_device, torch.bfloat16)
    agreed(lambda: after([given._replace(step=given.step._replace(grad=grad))], None, at_once=True))


@each("kind", ("whole blocks", "ragged", "float32 momentum", "turned", "odd address"))
def test_launches_of_an_update(kind: str, kernel_device: torch.device, launched: list[str]) -> None:
    """One, or those of the steps and of the update by directions, with the same bits."""
    given = update_of((20, 250 if kind == "ragged" else 256), 0, kernel_device, (torch.bfloat16,) * 3)
    step = given.step
    if kind == "float32 momentum":
        step = step._replace(exp_avg=normal(20, 256).to(kernel_device), exp_avg_absmax=None)
    elif kind == "turned":
        step = step._replace(grad=step.grad.T.contiguous().T)
    elif kind == "odd address":
        room = step.grad.new_empty(step.grad.numel() + 1)
        step = step._replace(grad=room[1:].view(20, 256).copy_(step.grad))
    updates, whole = [given._replace(step=step)], kind == "whole blocks"
    assert is_one_launch(updates) == whole
    expected = after(updates, None, at_once=False)
    launched.clear()
    assert same(after(updates, None, at_once=True), expected)
    assert launched == (["row_adam_update"] if whole else ["momentum", "row_adam", "update_float"])


@each("l2", (0.0, 0.1))
def test_an_optimizer_updates_an_embedding_at_once(
    l2: float, kernel_device: torch.device, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of its rows, where their gradient is read as it is; in parts of so many rows the weight has the same bits."""
    found, counts = [], []
    for chunk in (1 << 22, 256 * 20):
        for fused in (True, False):
            monkeypatch.setattr(import_module("qgalore.kernels.reference.rows"), "_CHUNK_ELEMENTS", chunk)
            direction = ADAM_BY_ROW if fused else ADAM_BY_ROW._replace(apply=None, without_memory=None)
            monkeypatch.setattr(import_module("qgalore.update.weight"), "ADAM_BY_ROW", direction)
            weight = nn.Parameter(normal(40, 256).to(kernel_device, torch.bfloat16))
            options = {"second_moment": "row", "weight_decay": l2, "decoupled_weight_decay": not l2}
            optimizer = GaLoreAdamW8bit([weight], lr=0.01, **options)  # type: ignore[arg-type]
            launched.clear()
            for step in range(2):
                weight.grad = normal(40, 256, seed=step).to(kernel_device, torch.bfloat16)
                optimizer.step()
            counts.append({name: launched.count(name) for name in launched})
            state = optimizer.state[weight]
            found.append((weight.detach(), state["exp_avg"], state["exp_avg_absmax"], state["exp_avg_sq_row"]))
    assert all(same(found[0], each) for each in found[1:])
    parts, apart = 2 * 2, ("momentum", "row_adam", "update_float")
    assert counts == [
        {"row_adam_update": 2}, dict.fromkeys(apart, 2),
        {"row_adam_update": parts if l2 else 2}, dict.fromkeys(apart, parts),
    ]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@each("dtype", (torch.float32, *SIXTEEN_BITS))
@each("shape", ((32000, 512), (32000, 768), (1000, 4096), (1000, 5120)))
def test_an_update_of_an_embedding_on_a_gpu(
    shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the order of a sum is that of the threads."""
    monkeypatch.setenv("QGALORE_KERNELS", "triton")
    device = torch.device("cuda")
    for of_weight in (torch.bfloat16, torch.float32):
        for factor, growing in ((None, None), (0.3, 1.0)):
            updates = [
                update_of(shape, i, device, (of_weight, dtype, torch.float32), factor, growing) for i in range(2)
            ]
            assert is_one_launch(updates)
            flag = torch.tensor(False, device=device)
            assert same(after(updates, flag, at_once=True), after(updates, flag, at_once=False))


def test_weights_that_do_not_fit_are_refused() -> None:
    given = update_of((4, 256), 0, torch.device("cpu"), (torch.bfloat16,) * 3)
    for weight in (given.weight[:3], given.weight.double(), given.weight.T.contiguous().T):
        with pytest.raises(ValueError, match=r"weight must be contiguous, \(4, 256\) of 16-bit floats or float32, not"):
            kernels.row_adam_update_([given._replace(weight=weight)], BLOCK_SIZE)
    with pytest.raises(ValueError, match=r"exp_avg_sq must be \(4,\), one number a row"):
        kernels.row_adam_update_([given._replace(step=given.step._replace(exp_avg_sq=None))], BLOCK_SIZE)
    kernels.row_adam_update_([], BLOCK_SIZE)
