"""Runs in float16: about what float32 makes of them, overflows that are skipped, the same bits after a resume."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from unittest import mock

import pytest
import torch

from peft_pretraining.config.flag_groups import QuantizationArgs
from peft_pretraining.config.parse import parse_args
from peft_pretraining.errors import UserError
from peft_pretraining.runtime.device import (
    emulated_products,
    problem_of_gpu,
    problem_of_products,
    problem_of_steps,
    slow_dtype,
)
from qgalore.update import loss_scale
from tests.golden.record import restored_process
from tests.small_run import Result, SmallRun, assert_same_bits, assert_same_run, flags_of
from tests.test_skipped_updates import Fault, outcome, run_with

FLOAT16: Mapping[str, object] = {"dtype": "float16"}
Q_GALORE = flags_of("q_galore_adamw8bit") | FLOAT16
PER_LAYER = flags_of("q_galore_adamw8bit_per_layer") | FLOAT16


@pytest.fixture
def small(tmp_path: Path) -> SmallRun:
    return SmallRun(tmp_path)


def scales(run: Result) -> list[float]:
    return [line["train/loss_scale"] for line in run.train_lines]


def skipped(run: Result) -> list[float]:
    return [line["train/skipped"] for line in run.train_lines]


@pytest.mark.parametrize("optimizer", ["adamw", "q_galore_adamw8bit_per_layer"])
def test_the_perplexity_is_about_that_of_float32(small: SmallRun, optimizer: str) -> None:
    """The rest of the difference is the rounding of the weights."""
    flags = flags_of(optimizer) | {"num_training_steps": 8}
    found = {}
    for dtype in ("float32", "float16"):
        run = small.run(dtype, **flags | {"dtype": dtype})
        found[dtype] = [line["train/loss"] for line in run.train_lines]
    assert found["float32"][-1] < found["float32"][0] - 0.3, "it learns"
    assert max(abs(a - b) for a, b in zip(*found.values(), strict=True)) < 0.05
    assert all(tensor.dtype != torch.float32 for tensor in run.checkpoint().model_tensors.values())


def test_a_scale_that_is_too_large_is_halved_until_it_is_not(small: SmallRun) -> None:
    """More updates are skipped than --max_skipped_updates allows; those are of another kind."""
    flags = Q_GALORE | {"num_training_steps": 16, "max_skipped_updates": 2}
    with mock.patch.object(loss_scale, "INITIAL", 2.0**28):
        run = small.run("run", **flags)
    first = skipped(run).index(0)
    assert first > 3 and sum(skipped(run)) < 10
    expected = 2.0**28
    for scale, was_skipped in zip(scales(run), skipped(run), strict=True):
        assert scale == expected
        expected /= 2 if was_skipped else 1
    losses = [line["train/loss"] for line in run.train_lines]
    assert losses[-1] < losses[first] - 0.2, "and it trains on"


def test_an_overflow_at_the_lowest_scale_counts(small: SmallRun, capsys: pytest.CaptureFixture[str]) -> None:
    flags = Q_GALORE | {"num_training_steps": 20, "max_skipped_updates": 3}
    fault = Fault("gradient", tuple(range(2, 20)))
    with mock.patch.object(loss_scale, "INITIAL", 4.0), restored_process():
        assert run_with(fault, small.argv("run", flags)) == 2
    assert "--max_skipped_updates 3: 4 updates in a row" in capsys.readouterr().err
    # Two that found the lowest scale, four that did not count as that.
    assert scales(small.result("run")) == [4, 4, 4, 2, 1, 1, 1, 1]


def test_a_resumed_run_has_the_same_bits_and_the_same_scale(small: SmallRun) -> None:
    """With a growth inside the second part that only the count of the first makes due."""
    flags = Q_GALORE | {"num_training_steps": 8, "average_last": 0.5}
    with mock.patch.object(loss_scale, "GROWTH_INTERVAL", 3):
        whole = small.run("whole", **flags)
        small.stop("parts", 5, **flags)
        parts = small.run("parts", **flags | {"continue_from": "auto"})
    assert scales(whole) == [2.0**16] * 3 + [2.0**17] * 3 + [2.0**18] * 2
    assert_same_run(whole, parts)
    assert whole.checkpoint().state["loss_scale_state"] == parts.checkpoint().state["loss_scale_state"]
    assert_same_bits(whole.checkpoint().state["average"], parts.checkpoint().state["average"])


@pytest.mark.slow
def test_an_overflow_on_one_rank_is_one_on_all(small: SmallRun) -> None:
    flags: dict[str, object] = Q_GALORE | {"batch_size": 4, "num_training_steps": 5, "check_replicas": 1}
    run = outcome(small, "run", Fault("gradient", (2,), rank=1), 2, flags)
    assert skipped(run) == [0, 0, 1, 0, 0] and scales(run) == [65536.0] * 3 + [32768.0] * 2


def test_with_a_fixed_scale_a_late_overflow_goes_back_to_a_checkpoint(
    small: SmallRun, capsys: pytest.CaptureFixture[str]
) -> None:
    """Alone in this case updates of float16 are made in the backward pass: as in bfloat16, nothing of one is kept."""
    flags = {"batch_size": 8, "num_training_steps": 5, "save_every": 2, "loss_scale": 512}
    fault = Fault("gradient", (3,))
    found = []
    for name, optimizer in (("ordinary", Q_GALORE), ("per_layer", PER_LAYER)):
        with restored_process():
            assert run_with(fault, small.argv(name, optimizer | flags)) == 0
        found.append(small.result(name))
    ordinary, per_layer = found
    assert "update 4: a gradient further down was not finite" in capsys.readouterr().err
    assert skipped(per_layer) == skipped(ordinary) == [0, 0, 0, 1, 0] and set(scales(per_layer)) == {512}
    assert_same_bits(per_layer.checkpoint().model_tensors, ordinary.checkpoint().model_tensors)
    assert per_layer.checkpoint().state["loss_scale_state"] == {}


def test_another_data_type_has_no_scale(small: SmallRun) -> None:
    run = small.run("run", **flags_of("q_galore_adamw8bit") | {"num_training_steps": 1})
    assert "train/loss_scale" not in run.train_lines[0] and "loss_scale_state" not in run.checkpoint().state


# ---- what is refused

REFUSED = [
    (PER_LAYER | {"batch_size": 8}, "--dtype float16 cannot work with --optimizer q_galore_adamw8bit_per_layer at one"),
    (flags_of("sgd") | FLOAT16, "--dtype float16 cannot work with --optimizer sgd"),
    (flags_of("muon") | FLOAT16, "use adamw or adam8bit, or --dtype float32"),
    (flags_of("adamw") | {"loss_scale": 512}, "--loss_scale 512 is for --dtype float16, and --dtype is float32"),
    (flags_of("adamw") | FLOAT16 | {"loss_scale": 0.5}, "--loss_scale is 0.5, it must be"),
    (flags_of("adamw") | {"device": "mps"}, "--device mps: GPUs of Apple are not supported"),
]


@pytest.mark.parametrize(("flags", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_what_cannot_work_is_refused(small: SmallRun, flags: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_args(small.argv("run", flags))
    assert message in str(caught.value)


@pytest.mark.parametrize("given", ["fp16", "half", "float16"])
def test_names_of_float16(small: SmallRun, given: str) -> None:
    assert parse_args(small.argv("run", flags_of("adamw") | {"dtype": given})).model.dtype == "float16"


@pytest.mark.parametrize(
    ("capability", "dtype", "in_triton", "part"),
    [((7, 5), "bfloat16", True, "give --dtype float16"), ((7, 5), "float16", True, ""), ((8, 0), "bfloat16", True, ""),
     ((6, 1), "float32", True, "set QGALORE_KERNELS=reference"), ((6, 1), "float16", False, "")],
)  # fmt: skip
def test_a_gpu_without_the_data_type_is_named(
    capability: tuple[int, int], dtype: str, in_triton: bool, part: str
) -> None:
    text = problem_of_gpu("Tesla T4", capability, dtype, in_triton)
    assert part in text and bool(text) == bool(part)
    assert not text or ("Tesla T4" in text and ".".join(map(str, capability)) in text)


def test_products_in_int8_need_a_newer_gpu() -> None:
    int8 = QuantizationArgs(int8_products=True)
    assert problem_of_products("Tesla T4", (7, 5), True, int8).startswith("--int8_products: Tesla T4")
    assert not problem_of_products("Tesla T4", (7, 5), False, int8)
    assert not problem_of_products("RTX 3090", (8, 6), True, int8)


def test_products_in_fp8_need_a_newer_gpu_still() -> None:
    fp8 = QuantizationArgs(fp8_products=True)
    text = problem_of_products("NVIDIA A100", (8, 0), True, fp8)
    assert text.startswith("--fp8_products: NVIDIA A100 has compute capability 8.0, and products in FP8 need 8.9")
    assert text.endswith("or give --int8_products") and "int8" not in problem_of_products("T4", (7, 5), True, fp8)
    assert not problem_of_products("NVIDIA A100", (8, 0), False, fp8)
    assert not any(problem_of_products("NVIDIA L4", each, True, fp8) for each in ((8, 9), (9, 0), (12, 0)))


def test_newton_schulz_in_fp8_needs_a_newer_gpu() -> None:
    text = problem_of_steps("NVIDIA A100", (8, 0), "muon_fp8")
    assert text.startswith("--newton_schulz muon_fp8: NVIDIA A100 has compute capability 8.0, and products in FP8 need")
    assert text.endswith("give --newton_schulz muon")
    text = problem_of_steps("NVIDIA A100", (8, 0), "muon4_fp8")
    assert text.startswith("--newton_schulz muon4_fp8: NVIDIA A100") and text.endswith("give --newton_schulz muon")
    assert not problem_of_steps("NVIDIA L4", (8, 9), "muon_fp8") and not problem_of_steps("T4", (7, 5), "polar4")
    said = emulated_products(torch.device("cpu"), QuantizationArgs(), "muon_fp8")
    assert said is not None and said.startswith("--newton_schulz muon_fp8 on a CPU: values are rounded")


@pytest.mark.parametrize(
    ("kernels", "words"),
    [
        ("reference", ["with QGALORE_KERNELS=reference: values are rounded", "leaving QGALORE_KERNELS out is faster"]),
        ("auto", ["without Triton's kernels: values are rounded", "installing triton is faster"]),
        ("triton", []),
    ],
)
def test_a_gpu_without_kernels_is_told_that_fp8_is_emulated(
    kernels: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QGALORE_KERNELS", kernels)
    monkeypatch.setattr("qgalore.kernels.backend._triton_is_installed", lambda: False)
    asked = [(QuantizationArgs(), "muon_fp8"), (QuantizationArgs(fp8_products=True), "auto")]
    for flag, given in zip(("--newton_schulz muon_fp8 ", "--fp8_products "), asked, strict=True):
        said = emulated_products(torch.device("cuda"), *given)
        assert said is None if not words else said is not None and said.startswith(flag)
        assert all(word in str(said) for word in words)
    assert emulated_products(torch.device("cuda"), QuantizationArgs(), "auto") is None, "it takes Muon's there"


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"QGALORE_KERNELS": "tritn"}, "QGALORE_KERNELS='tritn' is unknown: it must be one of auto, reference, triton"),
        ({"QGALORE_KERNELS": "triton"}, "QGALORE_KERNELS=triton on a CPU: Triton's kernels run on a GPU"),
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE=x in the environment is no whole number: start ranks by torchrun"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 in the environment is no number of ranks: start ranks by torchrun"),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "x"},
            "MASTER_PORT=x in the environment is no port, a number below 65536: start ranks by torchrun",
        ),
        ({"WORLD_SIZE": "2"}, "says that there are 2 ranks, and RANK and MASTER_ADDR and MASTER_PORT are not there"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2 in the environment is of no launch with WORLD_SIZE=2"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1 in the environment is no whole number"),
    ],
)
def test_what_the_environment_says_wrong_is_a_sentence(
    variables: dict[str, str],
    sentence: str,
    small: SmallRun,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert small.main("run", **flags_of("q_galore_adamw8bit")) == 2
    said = capsys.readouterr().err
    assert sentence in said and "Traceback" not in said


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compile", ["auto", "off"])
def test_a_gpu_trains_in_float16(small: SmallRun, compile: str) -> None:
    """Compiled and in CUDA graphs the bits are those of a second run, and the losses those of bfloat16 within noise."""
    flags = Q_GALORE | {"device": "cuda", "num_training_steps": 20, "compile": compile}
    with mock.patch.object(loss_scale, "GROWTH_INTERVAL", 4):
        run, again = small.run("run", **flags), small.run("again", **flags)
    assert_same_bits(run.checkpoint().model_tensors, again.checkpoint().model_tensors)
    assert max(scales(run)) > 2.0**16 and scales(run) == scales(again), "graphs read a scale that has moved"
    other = small.run("other", **flags | {"dtype": "bfloat16"})
    losses = [[line["train/loss"] for line in each.train_lines] for each in (run, other)]
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 0.1
    assert run.train_lines[-1]["train/loss"] < run.train_lines[0]["train/loss"] - 0.3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_with_a_fixed_scale_update_in_the_backward_pass(small: SmallRun) -> None:
    """The factor that divides gradients is part of the graphs; without them the bits are the same."""
    flags = PER_LAYER | {"device": "cuda", "batch_size": 8, "num_training_steps": 8, "loss_scale": 1024}
    graphs = small.run("graphs", **flags)
    eager = small.run("eager", **flags | {"cuda_graphs": "off"})
    assert_same_bits(graphs.checkpoint().model_tensors, eager.checkpoint().model_tensors)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_host_reads_nothing_of_the_scale() -> None:
    scale, flag = loss_scale.LossScale("cuda"), torch.zeros((), dtype=torch.bool, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        scale.scaled(torch.ones((), device="cuda"))
        scale.update_(flag)
        scale.can_fall()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_cpu_is_told_that_fp8_is_emulated(small: SmallRun, capsys: pytest.CaptureFixture[str]) -> None:
    flags = flags_of("q_galore_adamw8bit_per_layer") | {"fp8_products": True, "num_training_steps": 2}
    assert small.main("run", **flags) == 0
    told = "warning: --fp8_products on a CPU: values are rounded as a GPU rounds them and then multiplied in float32"
    assert capsys.readouterr().err.count(told) == 1
    assert emulated_products(torch.device("cpu"), QuantizationArgs(), "muon") is None


def test_fp8_of_a_flag_that_changes_nothing_is_not_said_to_be_emulated(
    small: SmallRun, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = flags_of("adamw") | {"newton_schulz": "muon_fp8", "num_training_steps": 1}
    assert small.main("run", **flags) == 0
    said = capsys.readouterr()
    assert "--newton_schulz changes nothing: --optimizer adamw has no subspace" in said.err + said.out
    assert "--newton_schulz muon_fp8" not in said.err


def test_a_cpu_is_told_that_float32_is_faster(small: SmallRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert small.main("run", dtype="bfloat16", num_training_steps=1) == 0
    assert "warning: --dtype bfloat16 on a CPU: float32 is usually several times as fast" in capsys.readouterr().err
    assert slow_dtype(torch.device("cpu"), "float32") is None
    assert slow_dtype(torch.device("cuda"), "bfloat16") is None
