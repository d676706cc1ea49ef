"""Layers of which something waits in host memory, on a CUDA device: the same bits, and the peak that is planned."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from peft_pretraining.config.parse import parse_args
from peft_pretraining.memory.candidate import OF_COMPILER
from peft_pretraining.memory.plan import plan
from peft_pretraining.models.registry import read_config
from qgalore.offload.page_locked import page_locked
from tests.small_run import RECIPE, SmallRun, assert_same_run, flags_of
from tests.test_layer_graphs import CASES as LAYER_CASES
from tests.test_layer_graphs import trained
from tests.test_offload import CASES, QUANTIZED, WAYS, in_each_way

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = {"device": "cuda"}
BFLOAT16 = {"dtype": "bfloat16"}


@pytest.fixture
def small(tmp_path: Path) -> SmallRun:
    """Three layers, for two slots."""
    return SmallRun(tmp_path, layers=3)


@pytest.mark.parametrize(("case", "way"), in_each_way(CASES))
def test_states_that_wait_have_the_bits_of_those_that_stay(small: SmallRun, case: str, way: str) -> None:
    """With CUDA graphs where these allow them."""
    flags = CASES[case] | WAYS[way] | CUDA | {"num_training_steps": 8, "save_every": 4, "eval_every": 3}
    assert_same_run(small.run("stays", **flags), small.run("waits", **flags, offload="states"))


@pytest.mark.parametrize(("case", "way"), in_each_way(QUANTIZED))
def test_weights_that_wait_have_the_bits_of_those_that_stay(small: SmallRun, case: str, way: str) -> None:
    """With CUDA graphs that read the slots of layers."""
    flags = CASES[case] | WAYS[way] | CUDA | {"num_training_steps": 8, "save_every": 4, "eval_every": 3}
    assert_same_run(small.run("stays", **flags), small.run("waits", **flags, offload="weights"))


@pytest.mark.parametrize("what", ["states", "weights"])
@pytest.mark.parametrize("way", WAYS)
def test_a_stopped_run_goes_on_in_another_mode(small: SmallRun, way: str, what: str) -> None:
    flags = flags_of("q_galore_adamw8bit_per_layer") | RECIPE | BFLOAT16 | WAYS[way] | CUDA
    flags |= {"num_training_steps": 8, "eval_every": 4}
    whole = small.run("whole", **flags)
    small.stop("parts", 5, **flags, offload=what)
    parts = small.run("parts", **flags, continue_from="auto")
    assert_same_run(whole, parts)


@pytest.mark.parametrize("what", ["states", "states --cuda_graphs off", "weights"])
def test_nothing_waits_for_the_device_in_a_steady_update(what: str, tmp_path: Path) -> None:
    """From the tenth update on every subspace has had its first refresh, from random numbers of the host."""
    with torch.cuda.stream(torch.cuda.Stream()):
        trained(tmp_path, "cuda", f"{LAYER_CASES['streaming']} --offload {what}", 20, waits_from=14)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {"accumulate_by": "layer", "offload": "states"},
        {"accumulate_by": "layer", "offload": "weights"},
        {"total_batch_size": 8, "offload": "states"},
        {"total_batch_size": 8, "offload": "weights", "activation_checkpointing": True},
    ],
    ids=lambda more: " ".join(map(str, more.values())),
)
def test_the_peak_is_the_planned_one(small: SmallRun, more: dict[str, object]) -> None:
    """1B; what the plan leaves out is small tensors, and what the compiler takes while it times its kernels."""
    flags = flags_of("q_galore_adamw8bit_per_layer") | RECIPE | BFLOAT16 | CUDA | {"weight_group_size": 256}
    flags |= {"model_config": "1b", "batch_size": 8, "total_batch_size": 32, "max_length": 256, "num_training_steps": 6}
    flags |= {"eval_tokens": 2000} | more
    argv = small.argv("run", flags)
    args = parse_args(argv)
    planned = plan(args, read_config(args.model.model_config))
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    others = torch.cuda.memory_allocated()  # what runs in this process before it left behind
    small.run("run", **flags)
    peak = torch.cuda.max_memory_allocated() - others
    print(f"{more}: {peak / 1e9:.3f} GB measured, {planned.peak_bytes / 1e9:.3f} GB planned")
    assert 0.9 * planned.peak_bytes < peak < 1.02 * planned.peak_bytes + OF_COMPILER


def test_locked_memory_is_written_and_read_without_the_host() -> None:
    """Memory that is registered is no other's afterwards, and two buffers may be of odd sizes."""

    class Owner:
        pass

    owner = Owner()
    sizes = [torch.Size((5_000,)), torch.Size((123_457,)), torch.Size((1,))]
    tensors = page_locked(owner, sizes, torch.uint8)
    for tensor in tensors:
        assert tensor.is_pinned()
        there = torch.randint(0, 255, tensor.shape, dtype=torch.uint8, device="cuda")
        tensor.copy_(there, non_blocking=True)
        torch.cuda.synchronize()
        assert torch.equal(tensor, there.cpu())
    del owner
    assert not any(tensor.is_pinned() for tensor in tensors)


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("what", ["states", "weights"])
def test_two_gpus_each_with_its_host(small: SmallRun, what: str) -> None:
    flags = CASES["streaming"] | CUDA | {"batch_size": 2, "total_batch_size": 4, "num_training_steps": 6}
    flags |= {"check_replicas": 1, "eval_every": 3}
    assert_same_run(small.run_on(2, "stays", **flags), small.run_on(2, "waits", **flags, offload=what))
