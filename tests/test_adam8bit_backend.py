"""`--adam8bit_backend`: bitsandbytes' kernels do the same updates as its own optimizer, with the rules of ours."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_pretraining.checkpoint.manifest import MANIFEST
from peft_pretraining.checkpoint.recorded_flags import changed_flags
from peft_pretraining.config.parse import parse_args
from peft_pretraining.errors import UserError
from peft_pretraining.memory.plan import plan
from peft_pretraining.memory.planned_run import PlannedRun
from peft_pretraining.methods.default_stream import in_default_stream
from peft_pretraining.models.registry import read_config
from peft_pretraining.optim import adam8bit_backend
from peft_pretraining.optim.adam8bit_backend import backend_of, rounds_zeros_up, with_backend
from peft_pretraining.optim.bitsandbytes_adam import BitsandbytesAdamW8bit
from qgalore import GaLoreAdamW8bit
from qgalore.kernels.reference import rows
from tests.small_run import SmallRun, assert_same_bits, assert_same_run, flags_of

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
OURS = flags_of("adam8bit")
BITSANDBYTES = OURS | {"adam8bit_backend": "bitsandbytes"}
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
ADAM: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}


@pytest.fixture
def small(tmp_path: Path) -> SmallRun:
    return SmallRun(tmp_path)


def weights(dtype: torch.dtype) -> list[nn.Parameter]:
    """One of whole blocks, one of a ragged one, and one with moments in float32."""
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((40, 256), (37, 131), (64,))]


def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [
        {"params": params[:1], "lr": 3e-2, "weight_decay": 0.0},
        {"params": params[1:], "weight_decay": 0.1},
    ]


def gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param) * 1e-2


def trained(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: int = 5) -> list[Tensor]:
    for step in range(steps):
        gradients(params, step)
        optimizer.step()
        optimizer.zero_grad()
    return [param.detach().clone() for param in params]


# ---- the arithmetic


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_are_those_of_bitsandbytes_own_optimizer(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, with a learning rate and a weight decay of each param group, and for some rows at a time."""
    monkeypatch.setattr(rows, "_CHUNK_ELEMENTS", 3 * 256)
    params, theirs = weights(dtype), weights(dtype)
    expected = trained(bitsandbytes.optim.AdamW8bit(groups(theirs), **ADAM), theirs)
    assert_same_bits(trained(BitsandbytesAdamW8bit(groups(params), **ADAM), params), expected)
    assert all((after != before).any() for after, before in zip(expected, weights(dtype), strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_computes_the_same_as_that_optimizer_and_never_waits(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, params = [[nn.Parameter(x.data.cuda()) for x in weights(dtype)] for _ in range(2)]
    # A run before this test may have left its own stream, and theirs waits for the default one alone.
    with in_default_stream(CUDA):
        expected = trained(bitsandbytes.optim.AdamW8bit(groups(theirs), **ADAM), theirs)
    optimizer = BitsandbytesAdamW8bit(groups(params), **ADAM)
    assert_same_bits(trained(optimizer, params), expected)
    gradients(params, 7)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("waits for the device"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.skip_update_if(torch.ones((), dtype=torch.bool, device="cuda"))
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_bits([param.detach() for param in params], expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_another_stream_than_the_default_one_gives_the_same_bits() -> None:
    """In which a run trains: gradients that come late are waited for, and so is the update."""
    params, others = [[nn.Parameter(x.data.cuda()) for x in weights(torch.bfloat16)] for _ in range(2)]
    expected = trained(BitsandbytesAdamW8bit(groups(params), **ADAM), params)
    busy = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        optimizer = BitsandbytesAdamW8bit(groups(others), **ADAM)
        for _ in range(40):
            busy = busy @ busy / busy.norm()
        found = trained(optimizer, others)
    torch.cuda.synchronize()
    assert_same_bits(found, expected)


def test_the_default_stream_and_the_current_one_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes' updates take no stream."""
    order: list[str] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            order.append(f"{self.name} waits for {other.name}")

    current, default = Stream("current"), Stream("default")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: default)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext(order.append(f"in {stream.name}")))
    with in_default_stream(CUDA):
        order.append("update")
    assert order == ["default waits for current", "in default", "update", "current waits for default"]
    current = default
    with in_default_stream(CUDA):
        assert len(order) == 4


def test_updates_are_near_those_of_our_kernels() -> None:
    params, ours = weights(torch.float32), weights(torch.float32)
    found = trained(BitsandbytesAdamW8bit(groups(params), **ADAM), params)
    expected = trained(GaLoreAdamW8bit(groups(ours), **ADAM), ours)
    for one, other, start in zip(found, expected, weights(torch.float32), strict=True):
        assert (one - other).norm() < 0.02 * (other - start).norm()


def test_a_state_of_one_backend_is_a_state_of_the_other() -> None:
    """To the bit in both directions, and training goes on with it."""
    for first, second in ((GaLoreAdamW8bit, BitsandbytesAdamW8bit), (BitsandbytesAdamW8bit, GaLoreAdamW8bit)):
        params = weights(torch.float32)
        before = first(groups(params), **ADAM)
        trained(before, params)
        after = second(groups(params), **ADAM)
        after.load_state_dict(before.state_dict())
        assert_same_bits(after.state_dict(), before.state_dict())
        # The next step of both from there: but for the rounding of sums the weights move alike.
        moved = [param.detach().clone() for param in params]
        trained(after, params, 1)
        for param, value in zip(params, moved, strict=True):
            param.data, value.data = value.data, param.data
        trained(before, params, 1)
        assert all(torch.allclose(x, y, rtol=1e-5, atol=1e-7) for x, y in zip(params, moved, strict=True))


@pytest.mark.parametrize("on_device", [False, True])
def test_an_update_that_is_not_finite_changes_nothing(on_device: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the host looks at the flag, as on a CPU, or the device does; and a factor of clipping is used."""
    if on_device:
        monkeypatch.setattr("qgalore.update.finite_checks.UpdateChecks.skip_for_kernels", lambda checks: checks.skip)
    params = weights(torch.bfloat16)
    optimizer = BitsandbytesAdamW8bit(groups(params), **ADAM)
    trained(optimizer, params)
    before = [param.detach().clone() for param in params]
    moments = {key: value.clone() for state in optimizer.state.values() for key, value in state.items()}
    gradients(params, 9)
    assert params[1].grad is not None
    params[1].grad[3, 4] = torch.inf
    optimizer.step()
    assert optimizer.skipped()
    assert_same_bits([param.detach() for param in params], before)
    found = {key: value for state in optimizer.state.values() for key, value in state.items()}
    assert_same_bits(found | {"step": moments["step"]}, moments)
    assert int(found["step"]) == int(moments["step"]) + 1, "as with our kernels"
    optimizer.zero_grad()
    trained(optimizer, params, 1)
    assert not optimizer.skipped()
    assert all((param != value).any() for param, value in zip(params, before, strict=True))


def test_what_bitsandbytes_lacks_is_refused() -> None:
    params = weights(torch.float32)
    with pytest.raises(ValueError, match="does not have: use GaLoreAdamW8bit"):
        trained(BitsandbytesAdamW8bit(groups(params), cautious_decay=True, **ADAM), params, 1)


# ---- runs


def test_6_updates_and_6_more_are_12(small: SmallRun) -> None:
    flags = BITSANDBYTES | {"num_training_steps": 12, "dtype": "bfloat16", "weight_decay": 0.1, "full_rank_lr": 2e-2}
    whole = small.run("whole", **flags)
    stopped = small.stop("parts", 6, **flags)
    # A command that leaves the backend open goes on with that of the checkpoint.
    resumed = small.run("parts", **flags | {"adam8bit_backend": None}, continue_from=stopped.checkpoints[-1])
    assert_same_run(whole, resumed)
    assert whole.checkpoint().state["adam8bit_backend"] == "bitsandbytes"


def test_clipping_skips_and_rates_mean_the_same(small: SmallRun) -> None:
    """Micro-batches of one sequence, two learning rates, decay of the decoder alone: the losses are near ours."""
    flags: dict[str, object] = {"grad_clipping": 0.3, "full_rank_lr": 3e-2, "weight_decay": 0.2, "batch_size": 2}
    flags |= {"full_rank_weight_decay": 0.0, "lr": 3e-3}
    ours, found = small.run("ours", **OURS | flags), small.run("found", **BITSANDBYTES | flags)
    first = [run.train_lines[0]["train/grad_norm"] for run in (ours, found)]
    assert first[0] == first[1] > 0.3
    assert ours.losses[-1] < ours.losses[0] - 0.3
    assert found.losses == pytest.approx(ours.losses, rel=5e-3) and found.losses != ours.losses


def test_a_run_goes_on_with_the_other_backend_and_says_so(small: SmallRun, capsys: pytest.CaptureFixture[str]) -> None:
    small.run("run", **OURS, save_every=4)
    small.run("run", **BITSANDBYTES | {"num_training_steps": 10}, continue_from="auto")
    printed = capsys.readouterr().err
    assert "--adam8bit_backend own -> bitsandbytes" in printed
    assert "adam8bit by bitsandbytes" in printed
    assert "weights without a gradient move" in printed
    recorded = small.result("run").checkpoint()
    assert recorded.update_step == 10 and recorded.state["adam8bit_backend"] == "bitsandbytes"


# ---- the choice


def run_args(*flags: str) -> Any:
    return parse_args(["--model_config", "9m", "--batch_size", "4", "--dataset", "pydocs", *flags])


def test_auto_is_bitsandbytes_on_a_gpu_where_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    adam8bit = ("--optimizer", "adam8bit")
    monkeypatch.setattr(adam8bit_backend, "why_not", lambda device: "")
    assert backend_of(run_args(*adam8bit), CUDA) == "bitsandbytes"
    assert backend_of(run_args(*adam8bit), CPU) == "own"
    assert backend_of(run_args(*adam8bit, "--adam8bit_backend", "own"), CUDA) == "own"
    assert backend_of(run_args(*adam8bit, "--adam8bit_backend", "bitsandbytes"), CPU) == "bitsandbytes"
    for flags in (["--cautious_decay"], ["--full_rank_second_moment", "row"], ["--dtype", "float16"]):
        assert backend_of(run_args(*adam8bit, *flags), CUDA) == "own"
    assert backend_of(run_args("--optimizer", "adamw"), CUDA) == "auto"
    monkeypatch.setattr(adam8bit_backend, "why_not", lambda device: "has no library for CUDA 13.0")
    assert backend_of(run_args(*adam8bit), CUDA) == "own"
    with pytest.raises(UserError, match=r"bitsandbytes has no library for CUDA 13\.0; give --adam8bit_backend own"):
        backend_of(run_args(*adam8bit, "--adam8bit_backend", "bitsandbytes"), CUDA)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a build of bitsandbytes without CUDA")
def test_a_build_for_the_cpu_does_not_count_as_one_for_a_gpu() -> None:
    assert backend_of(run_args("--optimizer", "adam8bit"), CUDA) == "own"


@pytest.mark.parametrize("flags", ["--cautious_decay", "--full_rank_second_moment row", "--dtype float16"])
def test_flags_that_bitsandbytes_lacks_are_refused(flags: str) -> None:
    with pytest.raises(UserError, match=f"^{flags} cannot work with --adam8bit_backend bitsandbytes.* or leave"):
        run_args("--optimizer", "adam8bit", "--adam8bit_backend", "bitsandbytes", *flags.split())


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_pretraining.config.checks.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed: pip install 'qgalore\[train\]'"):
        run_args("--optimizer", "adam8bit", "--adam8bit_backend", "bitsandbytes")


def test_a_resumed_run_keeps_its_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that is older than the flag is of our kernels; without the package the way on is named."""
    command = ("--optimizer", "adam8bit", "--continue_from", str(tmp_path))

    def kept(*flags: str, **recorded: object) -> str:
        (tmp_path / MANIFEST).touch()
        (tmp_path / "state.json").write_text(json.dumps({"optimizer": "adam8bit"} | recorded))
        return str(run_args(*command, *flags).optimizer.adam8bit_backend)

    assert (kept(), kept(adam8bit_backend="bitsandbytes")) == ("own", "bitsandbytes")
    assert kept("--adam8bit_backend", "own", adam8bit_backend="bitsandbytes") == "own"
    assert kept("--adam8bit_backend", "auto", adam8bit_backend="bitsandbytes") == "auto"
    assert kept(optimizer="adamw") == "auto", "which is refused later"
    old = changed_flags(run_args(*command, "--adam8bit_backend", "bitsandbytes"), {"optimizer": "adam8bit"})
    assert "--adam8bit_backend own -> bitsandbytes" in old
    monkeypatch.setattr("peft_pretraining.config.checks.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"give --adam8bit_backend own, .* as in the checkpoint"):
        kept(adam8bit_backend="bitsandbytes")


@pytest.mark.slow
def test_two_ranks_train_as_one(small: SmallRun) -> None:
    flags = BITSANDBYTES | {"check_replicas": 2}
    one, two = small.run("one", **flags), small.run_on(2, "two", **flags)
    assert two.losses == pytest.approx(one.losses, rel=1e-4)


def test_the_flag_beside_another_optimizer_is_idle() -> None:
    args = run_args("--optimizer", "adamw", "--adam8bit_backend", "bitsandbytes")
    assert [text for text in args.warnings if text.startswith("--adam8bit_backend changes nothing")]
    assert rounds_zeros_up(args, CPU) is None


def test_the_plan_counts_both() -> None:
    """What lasts is the same; passing are the copies by which an update is undone on the device."""
    args, config = run_args("--optimizer", "adam8bit"), read_config("9m")
    plans = {backend: plan(with_backend(args, backend), config) for backend in ("own", "bitsandbytes", "auto")}
    assert plans["own"].lasting == plans["bitsandbytes"].lasting
    assert plans["auto"] == plans["bitsandbytes"]
    update = {backend: each.passing["update of the largest weight"] for backend, each in plans.items()}
    rows = min(1 << 22, config.vocab_size * config.hidden_size)
    assert (update["own"], update["bitsandbytes"]) == (4 * rows, (2 + 1 + 1) * rows)
    on_cpu = PlannedRun(run_args("--optimizer", "adam8bit", "--device", "cpu"), config)
    assert not on_cpu.by_bitsandbytes
