"""The methods of `--newton_schulz`: their polynomials, the form that is chosen for a shape, and the error of both."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import models
from benchmarks.polar_polynomials import (
    LOWEST,
    STEADY,
    best_polynomial,
    best_steps,
    deviations,
    steady_polynomial,
    steady_steps,
    synthetic,
)
from qgalore import GaLoreAdamW, kernels
from qgalore.config import SubspaceConfig
from qgalore.kernels.reference import newton_schulz_fp8
from qgalore.kernels.reference.newton_schulz_fp8 import FACTOR, FIRST_GRAM, GRAM, LARGEST
from qgalore.update.directions import DIRECTIONS, direction_of, orthogonal_directions
from qgalore.update.newton_schulz import METHODS, method_of, multiply_adds, segments_of


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- polynomials


@pytest.mark.parametrize(("low", "high"), [(0.003, 1.0), (0.2, 1.8), (0.9, 1.1), (0.999999, 1.000001)])
def test_the_best_polynomial_is_as_far_from_1_at_four_points(low: float, high: float) -> None:
    """What Chebyshev's theorem asks of the best one of three coefficients: the largest distance, with signs in turn."""
    a, b, c = best_polynomial(low, high)
    x = torch.linspace(low, high, 20001, dtype=torch.float64)
    distance = a * x + b * x**3 + c * x**5 - 1
    largest = float(distance.abs().max())
    inside = distance[1:-1]
    turns = torch.nonzero((inside - distance[:-2]) * (distance[2:] - inside) < 0).flatten() + 1
    points = [0, *turns.tolist(), len(x) - 1]
    if low < 0.99:  # nearer than that, the distance is below what float64 tells apart
        expected = torch.tensor([-1.0, 1.0, -1.0, 1.0], dtype=torch.float64) * largest
        torch.testing.assert_close(distance[points], expected, rtol=1e-6, atol=1e-9)
    assert largest < 1 and (low < 0.9 or largest < 1e-3)


@pytest.mark.parametrize("name", LOWEST)
def test_polynomials_are_those_of_the_exchange(name: str) -> None:
    found = METHODS[name].polynomials
    expected = best_steps(LOWEST[name], len(found))
    assert [[round(value, 4) for value in step] for step in expected] == [list(step) for step in found]


@pytest.mark.parametrize(("error", "least"), [(0.0, 0.1), (0.0387, 0.02), (0.01, 0.3), (0.05, 0.6)])
def test_a_steady_polynomial_stays_in_its_bounds(error: float, least: float) -> None:
    """With terms that are off by that share, and not with a larger one; and where it need not, a is larger."""
    a, b, c = steady_polynomial(error, least)
    x = torch.linspace(0, 1, 20001, dtype=torch.float64)
    for share in (error, -error, 0.0):
        values = a * x + (1 - share) * b * x**3 + (1 + share) * c * x**5
        top = int(values[:15000].argmax())
        assert float(values.max()) < 1 + 1e-9 and float(values[top:].min()) > least - 1e-9
    beyond = a * x + (1 - error - 0.01) * b * x**3 + (1 + error + 0.01) * c * x**5
    assert float(beyond.max()) > 1.001
    assert (
        steady_polynomial(error + 0.005, least)[0] < a - 0.01 and steady_polynomial(error, least + 0.05)[0] < a - 0.01
    )


@pytest.mark.parametrize("name", STEADY)
def test_steady_polynomials_are_those_of_the_exchange(name: str) -> None:
    expected = steady_steps(STEADY[name])
    assert [[round(value, 4) for value in step] for step in expected] == [list(x) for x in METHODS[name].polynomials]


@pytest.mark.parametrize(
    ("name", "worst", "mean"),
    [("muon", 0.32, 0.18), ("polar5", 0.008, 0.005), ("polar4", 0.22, 0.16), ("muon4_fp8", 0.32, 0.18)],
)
def test_how_near_to_1_singular_values_come(name: str, worst: float, mean: float) -> None:
    """Three laws whose least value is above the bound that the polynomials are made for."""
    spectra = synthetic(64, 172)
    for law in ("normal", "1 / sqrt(k)", "1 / k"):
        found = deviations(spectra[law], name)
        assert found[0] < worst and found[1] < mean, law


# ---- the form


@pytest.mark.parametrize("segments", [(1, 1, 1, 1, 1), (2, 3), (1, 4), (5,), (2, 2)])
def test_multiply_adds_are_those_of_the_reference(segments: tuple[int, ...]) -> None:
    polynomials = METHODS["muon"].polynomials[: sum(segments)]
    with FlopCounterMode(display=False) as counter:
        kernels.orthogonalize([torch.ones(24, 40)], polynomials, segments)
    assert counter.get_total_flops() == 2 * multiply_adds((40, 24), segments, symmetric=False)


def test_the_cheaper_form_is_chosen() -> None:
    """Counted in products of two (4096, 4096) matrices for 7B's: five plain steps, with their symmetry, in segments."""
    square, wide, unit = (4096, 4096), (4096, 11008), 4096.0**3
    assert segments_of(square, 5) == (1, 1, 1, 1, 1), "costs the same, and is more accurate"
    assert segments_of(wide, 5) == segments_of(wide[::-1], 5) == (2, 3)
    assert segments_of(wide, 4) == (2, 2)
    assert [multiply_adds(square, (1,) * 5, symmetric) / unit for symmetric in (False, True)] == [15, 10]
    plain = [multiply_adds(wide, (1,) * 5, symmetric) / unit for symmetric in (False, True)]
    assert plain == [31.875, 22.65625] and multiply_adds(wide, (2, 3)) / unit == 15.0625
    for model, forms in {"350m": {(1,) * 5}, "1b": {(1,) * 5, (2, 3)}, "7b": {(1,) * 5, (2, 3)}}.items():
        shapes = models.config(model).matrix_shapes().values()
        assert {segments_of(shape, 5) for shape in shapes} == forms, "a layer of small matrices is one group"


SHAPES = [(48, 130), (130, 48), (48, 48)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "segments"), [("polar5", (2, 3)), ("polar4", (2, 2))])
def test_segments_agree_with_the_plain_form_in_float32(
    shape: tuple[int, int], name: str, segments: tuple[int, ...]
) -> None:
    """To 5e-5: both round to 6e-8 in each product, and the steps multiply small singular values by 300 to 550."""
    matrix, polynomials = normal(*shape) * 1e-6, METHODS[name].polynomials
    plain, found = (kernels.orthogonalize([matrix], polynomials, form)[0] for form in ((1,) * sum(segments), segments))
    assert (plain - found).norm() < 5e-5 * plain.norm()


@pytest.mark.parametrize(("law", "today"), [("normal", 0.017), ("1 / k", 0.02)])
def test_errors_of_both_forms_in_bfloat16(law: str, today: float) -> None:
    """Against float64, of the Frobenius norm; bfloat16 without segments, as `muon` has it, has `today`.

    Values within segments are float16: the plain form has a third of that, and segments less, too.
    """
    matrix = synthetic(64, 172)[law].bfloat16()
    errors = {}
    for name, forms in (("muon", (None,)), ("polar5", ((1,) * 5, (2, 3))), ("polar4", ((1,) * 4, (2, 2)))):
        polynomials = METHODS[name].polynomials
        for form in forms:
            exact = kernels.orthogonalize([matrix.double()], polynomials, form and (1,) * len(polynomials))[0]
            found = kernels.orthogonalize([matrix], polynomials, form)[0]
            assert found.dtype == torch.bfloat16
            errors[name, form] = float((found.double() - exact).norm() / exact.norm())
    assert today / 2 < errors.pop(("muon", None)) < today
    for (name, form), error in errors.items():
        assert 0.0005 < error < (0.005 if form == (1,) * len(form) else 0.012), (name, form)


def test_without_a_new_gram_matrix_float16_is_not_enough() -> None:
    """Why there are two segments: five steps on one Gram matrix amplify what it has lost."""
    matrix, polynomials = synthetic()["1 / k"].bfloat16(), METHODS["polar5"].polynomials
    exact = kernels.orthogonalize([matrix.double()], polynomials, (1,) * 5)[0]
    found = kernels.orthogonalize([matrix], polynomials, (5,))[0]
    assert (found.double() - exact).norm() > 0.05 * exact.norm()


@pytest.mark.parametrize("segments", [(1, 1, 1, 1), (2, 2)])
def test_the_size_of_a_momentum_does_not_matter(segments: tuple[int, ...]) -> None:
    """Powers of two change no bit, and a momentum of zeros has a direction of zeros."""
    matrix, polynomials = normal(24, 40).bfloat16(), METHODS["polar4"].polynomials
    expected = kernels.orthogonalize([matrix], polynomials, segments)[0]
    for power in (-50, -20, 40):
        assert torch.equal(kernels.orthogonalize([matrix * 2.0**power], polynomials, segments)[0], expected)
    for tiny in (torch.zeros(24, 40), normal(24, 40) * 1e-30):
        assert not kernels.orthogonalize([tiny.bfloat16()], polynomials, segments)[0].any()
    spike = torch.zeros(24, 40)
    spike[3, 5] = 7.0
    found = kernels.orthogonalize([spike.bfloat16()], polynomials, segments)[0].float()
    assert 0.78 < found[3, 5] < 1.22 and found.norm() < 1.23


# ---- in FP8


def rank_one(kind: str) -> Tensor:
    """A matrix of rank one, of which values may be alike and round alike, and a tenth of noise."""
    left = {"ones": torch.ones(256), "every seventh row": (torch.arange(256) % 7 == 0).float(), "normal": normal(256)}
    matrix = torch.outer(left[kind], normal(688, seed=1) if kind == "normal" else torch.ones(688))
    return matrix / matrix.norm() + 0.1 * normal(256, 688, seed=2) / (256 * 688) ** 0.5


FP8_MATRICES = {
    **{law: matrix.float() for law, matrix in synthetic().items()},
    **{f"rank one: {kind}": rank_one(kind) for kind in ("ones", "every seventh row", "normal")},
}


IN_FP8 = [name for name, method in METHODS.items() if method.fp8]


def made_in_fp8(matrix: Tensor, name: str) -> Tensor:
    method = METHODS[name]
    return kernels.orthogonalize_fp8([matrix], method.polynomials, schatten_norm=method.schatten_norm)[0]


def made_exactly(matrix: Tensor, name: str) -> Tensor:
    """In float64, by the norm of the method."""
    polynomials = METHODS[name].polynomials
    form = (1,) * len(polynomials) if METHODS[name].schatten_norm else None
    return kernels.orthogonalize([matrix.double()], polynomials, form)[0]


@pytest.mark.parametrize("name", IN_FP8)
@pytest.mark.parametrize("law", FP8_MATRICES)
def test_products_in_fp8_change_a_direction_by_a_seventh_at_most(law: str, name: str) -> None:
    """Of its norm, and hardly its size; where rows are alike, most of the Gram matrix is outside of its diagonal.

    By the Schatten norm more, where small singular values grow more, and errors of X in FP8 with them.
    """
    matrix = FP8_MATRICES[law].bfloat16()
    exact, most = made_exactly(matrix, name), 0.15 if METHODS[name].schatten_norm else 0.125
    for given in (matrix, matrix.T):
        found = made_in_fp8(given, name).double()
        found = found if given is matrix else found.T
        assert (found - exact).norm() < most * exact.norm()
        assert float((found * exact).sum() / exact.square().sum()) == pytest.approx(1.0, abs=0.01)
        assert float(torch.linalg.matrix_norm(found, 2)) < 1.25


@pytest.mark.parametrize("name", IN_FP8)
def test_what_is_rounded_is_within_the_range_of_fp8(name: str) -> None:
    """Values beside the diagonal of a symmetric matrix are at most half of the span of its eigenvalues."""
    largest = 1.0
    for step, (a, b, c) in enumerate(METHODS[name].polynomials):
        x = torch.linspace(0, 1.05 * largest, 1001)  # with 5 % for rounding
        even = b * x**2 + c * x**4
        assert float(x.max() ** 2) / 2 * (GRAM if step else FIRST_GRAM) < LARGEST
        assert float(even.max() - even.min()) / 2 * FACTOR < LARGEST
        largest = float((a * x + even * x)[x <= largest].max())


@pytest.mark.parametrize("name", IN_FP8)
@pytest.mark.parametrize("law", [*FP8_MATRICES, "one of a floor", "nothing"])
def test_what_was_rounded_was_within_the_range_of_fp8(law: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each product of each step; and by the Schatten norm the first Gram matrix that is squared has a norm of 1.

    So it is as large where the largest singular value has 6 % of |M|² and the others are equal.
    """
    floor = torch.linalg.qr(normal(688, 256))[0].T + torch.outer(torch.ones(256), normal(688)) * 4 / (256 * 688) ** 0.5
    matrix = (FP8_MATRICES | {"one of a floor": floor, "nothing": torch.zeros(40, 50)})[law].bfloat16()
    rounded: list[tuple[Tensor, float]] = []
    scaled: list[tuple[Tensor, Tensor, Tensor]] = []
    in_fp8, of_norm_1 = newton_schulz_fp8.in_fp8, newton_schulz_fp8._of_norm_1
    monkeypatch.setattr(newton_schulz_fp8, "in_fp8", lambda x, scale: rounded.append((x, scale)) or in_fp8(x, scale))
    monkeypatch.setattr(
        newton_schulz_fp8, "_of_norm_1", lambda *given: (scaled.append(of_norm_1(*given)), scaled[-1])[1]
    )
    found = made_in_fp8(matrix, name)
    assert len(rounded) == 3 * len(METHODS[name].polynomials) and found.isfinite().all()
    assert all(x.isfinite().all() and float(x.abs().max()) * scale < LARGEST for x, scale in rounded)
    assert len(scaled) == METHODS[name].schatten_norm
    for diagonal, rest, size in scaled:
        assert rest is rounded[1][0] and size.isfinite() and size > 0.99
        whole = float(rest.square().sum() + diagonal.square().sum())
        assert whole == pytest.approx(0.0 if law == "nothing" else 1.0, abs=5e-3)


def test_the_schatten_norm_brings_small_singular_values_nearer_to_1() -> None:
    """By the mean of what they become; of a momentum of rank one nothing changes, but for what X in FP8 has of |X|."""
    polynomials = METHODS["muon4_fp8"].polynomials
    for law, matrix in FP8_MATRICES.items():
        u, _, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        by_norm, by_schatten = (
            kernels.orthogonalize_fp8([matrix.bfloat16()], polynomials, schatten_norm=schatten_norm)[0].double()
            for schatten_norm in (False, True)
        )
        cosines = [float((x * (u @ vh)).sum() / x.norm() / len(u) ** 0.5) for x in (by_norm, by_schatten)]
        if law == "1 to 0.001, equal ratios":
            assert cosines[0] < 0.88 and cosines[1] > 0.91
        elif law.startswith("rank one"):
            assert cosines[1] == pytest.approx(cosines[0], abs=2e-3), law
        else:
            assert cosines[1] > cosines[0] - 3e-3, law


@pytest.mark.parametrize("name", IN_FP8)
def test_rows_that_round_alike_stay_in_bounds(name: str) -> None:
    """Of rank one but for a share; how they round depends on their number: an octave of it is tried.

    With 3 % of noise alone, four steps take the singular value of one of 48 numbers of rows to 0.16.
    """
    for rows in range(96, 192, 4):
        matrix = torch.ones(rows, rows + 40) / (rows * (rows + 40)) ** 0.5
        for noise, least in ((0.03, 0.1), (0.1, 0.5)):
            given = matrix + noise * normal(rows, rows + 40, seed=rows) / (rows * (rows + 40)) ** 0.5
            found = made_in_fp8(given.bfloat16(), name)
            assert float(torch.linalg.matrix_norm(found.float(), 2)) < 1.3, (rows, noise)
            assert float((found.float() * matrix).sum()) > least, (rows, noise)


@pytest.mark.parametrize(("why", "worst"), [("diagonals in FP8", 0.3), ("steep polynomials", 100.0)])
def test_what_fp8_needs(why: str, worst: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Diagonals apart, and polynomials that are flat where the largest singular values are: without, terms that cancel
    lose more than what remains of them."""
    matrix, method = FP8_MATRICES["rank one: every seventh row"], METHODS["polar4"]
    if why == "diagonals in FP8":
        matrix, method = synthetic(128, 344)["1 / sqrt(k)"].float(), METHODS["muon"]
        whole = lambda matrix: (torch.zeros(len(matrix)), matrix)  # noqa: E731
        monkeypatch.setattr("qgalore.kernels.reference.newton_schulz_fp8._without_diagonal", whole)
    (exact,) = kernels.orthogonalize([matrix], method.polynomials)
    (found,) = kernels.orthogonalize_fp8([matrix], method.polynomials)
    assert (found - exact).norm() > worst * exact.norm()


@pytest.mark.parametrize("name", IN_FP8)
def test_the_size_of_a_momentum_does_not_matter_in_fp8(name: str) -> None:
    matrix = normal(24, 40)
    expected = made_in_fp8(matrix, name)
    for power in (-50, -20, 40):
        assert torch.equal(made_in_fp8(matrix * 2.0**power, name), expected)
    for tiny in (torch.zeros(24, 40), matrix * 1e-30):
        assert not made_in_fp8(tiny, name).any()
    spike = torch.zeros(24, 40)
    spike[3, 5] = 7.0
    found = made_in_fp8(spike, name)
    assert 0.65 < found[3, 5] < 1.25 and found.norm() < 1.26


def test_segments_must_have_the_steps() -> None:
    for segments in ((2, 2), (5, 0), (2, 4)):
        with pytest.raises(ValueError, match=r"segments=\(.*\) must be positive and sum to 5 polynomials"):
            kernels.orthogonalize([torch.ones(4, 8)], METHODS["muon"].polynomials, segments)


# ---- the option


@pytest.mark.parametrize("direction", ["orthogonal", "normuon"])
@pytest.mark.parametrize("name", METHODS)
def test_an_update_is_made_by_the_method(name: str, direction: str) -> None:
    weights = [nn.Parameter(normal(*shape)) for shape in SHAPES]
    group = {"params": weights, "rank": "full", "direction": direction, "newton_schulz": name, "galore_scale": 1.0}
    optimizer = GaLoreAdamW([group], lr=1.0, weight_decay=0.0)
    before = [weight.detach().clone() for weight in weights]
    for index, weight in enumerate(weights):
        weight.grad = normal(*weight.shape, seed=index + 1)
    momenta = [0.19 * weight.grad for weight in weights if weight.grad is not None]
    optimizer.step()
    for weight, old, momentum in zip(weights, before, momenta, strict=True):
        (expected,) = orthogonal_directions([momentum], name)
        if direction == "normuon":
            rows = expected.square().mean(dim=1, keepdim=True).sqrt()
            size = expected.square().mean().sqrt()
            expected = expected / rows * size
        if METHODS[name].fp8:  # another last bit of the momentum may round a value the other way
            assert (old - weight.detach() - expected).norm() < 0.03 * expected.norm()
        else:
            torch.testing.assert_close(old - weight.detach(), expected, rtol=2e-3, atol=1e-4)
        assert 0.13 < float(expected.square().mean().sqrt()) < 0.25


def test_auto_takes_fp8_where_matrices_gain_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 768 rows on, where the device has it: which a CPU has not."""
    assert not kernels.runs_in_fp8(4096, torch.device("cpu"))
    momenta = [normal(48, 130), normal(768, 800), normal(900, 768), normal(767, 800)]
    assert_equal(orthogonal_directions(list(momenta), "auto"), orthogonal_directions(list(momenta), "muon"))
    asked: list[tuple[int, torch.device]] = []
    monkeypatch.setattr(kernels, "runs_in_fp8", lambda rows, device: asked.append((rows, device)) or rows < 4096)
    found, fp8 = orthogonal_directions(list(momenta), "auto"), orthogonal_directions(list(momenta), "muon4_fp8")
    plain = orthogonal_directions(list(momenta), "muon")
    assert_equal(found, [plain[0], fp8[1], fp8[2], plain[3]])
    assert not torch.equal(fp8[1], plain[1]) and asked == [(768, torch.device("cpu"))] * 2
    assert method_of("auto", 4096, lambda rows: rows < 4096) is METHODS["muon"], "where Triton compiles it wrongly"


@pytest.mark.parametrize(
    ("capability", "hip", "kernels_of", "runs"),
    [((9, 0), None, "triton", True), ((8, 9), None, "triton", True), ((8, 6), None, "triton", False),
     ((9, 0), None, "reference", False), ((9, 4), "6.4", "triton", False)],
)  # fmt: skip
def test_which_gpus_run_in_fp8(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], hip: str | None, kernels_of: str, runs: bool
) -> None:
    """Of NVIDIA from 8.9 on, with Triton: AMD's numbers are others, and its format of FP8 is another."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    reference = SimpleNamespace(runs_in_fp8=lambda rows, device: False)
    triton = SimpleNamespace(runs_in_fp8=lambda rows, device: True)
    chosen = {"reference": reference, "triton": triton}[kernels_of]
    monkeypatch.setattr(kernels.api, "backend", lambda function, device: getattr(chosen, function.__name__))
    assert kernels.runs_in_fp8(768, torch.device("cuda", 0)) is runs


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_auto_on_a_gpu() -> None:
    device = torch.device("cuda")
    momenta = [normal(*shape).to(device, torch.bfloat16) for shape in ((768, 2048), (1024, 800), (512, 1376))]
    found, plain, fp8 = (orthogonal_directions(list(momenta), name) for name in ("auto", "muon", "muon4_fp8"))
    assert kernels.runs_in_fp8(768, device) == kernels.has_fp8(device) == (not torch.equal(plain[0], found[0]))
    assert_equal(found, [*(fp8 if kernels.has_fp8(device) else plain)[:2], plain[2]])


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))


def test_what_a_direction_is_does_not_depend_on_its_neighbours() -> None:
    """Wide and square momenta are made in different forms; their order stays."""
    momenta = [normal(48, width, seed=width) for width in (48, 130, 48, 300)]
    together = orthogonal_directions(list(momenta), "polar4")
    for momentum, found in zip(momenta, together, strict=True):
        assert torch.equal(orthogonal_directions([momentum], "polar4")[0], found)


def test_weights_are_batched_by_the_method() -> None:
    assert direction_of("orthogonal", "muon") is DIRECTIONS["orthogonal"]
    assert direction_of("orthogonal", "polar5") == direction_of("orthogonal", "polar5")
    assert direction_of("adam", "auto") is DIRECTIONS["adam"], "which orthogonalises nothing"
    assert len({direction_of(name, method) for name in ("orthogonal", "normuon") for method in METHODS}) == 10


@pytest.mark.parametrize("rank", ["full", 8])
def test_adam_has_nothing_to_orthogonalise(rank: int | str) -> None:
    with pytest.raises(ValueError, match="newton_schulz='polar5' orthogonalises a momentum, and direction='adam' has"):
        SubspaceConfig(rank=rank, newton_schulz="polar5")
    assert SubspaceConfig(rank=rank, direction="normuon", newton_schulz="polar5").newton_schulz == "polar5"
    assert SubspaceConfig(rank=rank, newton_schulz="auto").newton_schulz == "auto", "which asks for nothing"
