"""Whole runs on CUDA devices: the same bits over a resume, NCCL between two, the end when one of them is killed."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.small_run import (
    FULL_RANK,
    INT8_PRODUCTS,
    OPTIMIZERS,
    RECIPE,
    TORCHRUN,
    SmallRun,
    assert_same_run,
    flags_of,
    ranks_of,
    start,
)
from tests.test_data_parallel import SHARES, assert_close, assert_close_weights, wait_for_updates
from tests.test_skipped_updates import Fault, assert_same_training, outcome

PER_LAYER = flags_of("q_galore_adamw8bit_per_layer")
CASES: dict[str, dict[str, object]] = {name: flags_of(name) for name in OPTIMIZERS} | {
    "streaming": PER_LAYER | {"subspace": "streaming", "grad_accum_dtype": "int8"},
    "recipe": PER_LAYER | RECIPE | {"dtype": "bfloat16"},
    "bfloat16": PER_LAYER | {"dtype": "bfloat16"},
    "int8_products": PER_LAYER | INT8_PRODUCTS | {"dtype": "bfloat16"},
    "fp8_products": PER_LAYER | {"fp8_products": True, "dtype": "bfloat16"},
    "fp8_weight_gradients": flags_of("q_galore_adamw8bit_per_layer")
    | RECIPE
    | {"fp8_products": True, "fp8_weight_gradients": True, "dtype": "bfloat16"},
    "fp8_head": PER_LAYER | {"fp8_products": True, "fp8_weight_gradients": True, "fp8_head": True, "dtype": "bfloat16"},
    "checkpointing": PER_LAYER | {"dtype": "bfloat16", "activation_checkpointing": True},
    "clipping": flags_of("galore_adamw8bit") | {"grad_clipping": 0.5},
}
CUDA = {"device": "cuda"}
one_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.fixture
def small(tmp_path: Path) -> SmallRun:
    return SmallRun(tmp_path)


@pytest.mark.gpu
@one_gpu
@pytest.mark.parametrize("case", CASES)
def test_a_stopped_run_goes_on_with_the_same_bits(small: SmallRun, case: str) -> None:
    flags = CASES[case] | CUDA | {"num_training_steps": 10, "eval_every": 4}
    whole = small.run("whole", **flags)
    assert_same_run(whole, small.run("again", **flags))
    small.stop("parts", 5, **flags)
    assert_same_run(whole, small.run("parts", **flags, continue_from="auto"))


@pytest.mark.gpu
@one_gpu
@pytest.mark.parametrize("case", ["adamw", "galore_adamw8bit", "q_galore_adamw8bit_per_layer"])
def test_a_gpu_computes_what_the_cpu_computes(small: SmallRun, case: str) -> None:
    flags = CASES[case] | {"num_training_steps": 4}
    assert_close(small.run("gpu", **flags | CUDA), small.run("cpu", **flags), 1e-2)


@pytest.mark.gpu
@one_gpu
def test_an_update_with_a_late_overflow_is_skipped(small: SmallRun) -> None:
    """As on the CPU: the device alone knows the flag, the host hears of it one update later."""
    flags: dict[str, object] = CUDA | {"batch_size": 8, "num_training_steps": 7, "save_every": 2}
    per_layer = outcome(small, "per_layer", Fault("gradient", (3, 4)), 1, PER_LAYER | flags)
    assert "update 4: a gradient further down" in (small.folder / "per_layer.log").read_text()
    ordinary = outcome(small, "ordinary", Fault("gradient", (3, 4)), 1, flags_of("q_galore_adamw8bit") | flags)
    assert_same_training(per_layer, ordinary)


@pytest.mark.multi_gpu
@two_gpus
@pytest.mark.parametrize("case", CASES)
def test_two_gpus_are_one(small: SmallRun, case: str) -> None:
    """Over NCCL, replicas compared after every update; stopped and resumed on two, with the same bits."""
    flags = CASES[case] | CUDA | {"num_training_steps": 6, "check_replicas": 1, "eval_every": 3, "save_every": 3}
    flags |= {"scheduler": "linear", "min_lr_ratio": 1.0}  # whose rates do not depend on the end
    one, whole = small.run("one", **flags), small.run_on(2, "whole", **flags)
    # A basis depends on the last bits of a gradient where singular values lie close together.
    assert_close(whole, one, 4e-2 if "galore" in str(flags["optimizer"]) else 1e-3)
    small.run_on(2, "parts", **flags | {"num_training_steps": 3})
    parts = small.run_on(2, "parts", **flags | {"continue_from": "auto"})
    assert_same_run(whole, parts)


SHARDED: dict[str, dict[str, object]] = {
    "streaming": PER_LAYER | {"subspace": "streaming", "dtype": "bfloat16"},
    "full_rank": FULL_RANK | {"dtype": "bfloat16"},
    "int8 sums": PER_LAYER | {"subspace": "streaming", "grad_accum_dtype": "int8", "total_batch_size": 16},
}
SHARDED |= {f"{case}, rows": flags for case, flags in SHARDED.items()}
SHARDED["tied, rows"] = SHARDED["streaming"]


@pytest.mark.multi_gpu
@two_gpus
@pytest.mark.parametrize("shard", ["optimizer", "full"])
@pytest.mark.parametrize("case", SHARDED)
def test_weights_dealt_to_two_gpus_are_those_of_replicas(small: SmallRun, case: str, shard: str) -> None:
    """Over NCCL: losses and weights of replicas, up to the order of sums; stopped and resumed with the same bits.

    With rows of embeddings and head, too, where the tables are large enough.
    """
    tables = {"vocab_size": 4099} if case.endswith("rows") else {}
    tables |= {"tie_word_embeddings": case.startswith("tied")}
    small.config.write_text(json.dumps(json.loads(small.config.read_text()) | tables))
    flags = {"batch_size": 4} | SHARDED[case] | CUDA | {"num_training_steps": 6, "save_every": 3, "eval_every": 3}
    flags |= {"scheduler": "linear", "min_lr_ratio": 1.0}  # whose rates do not depend on the end
    replicated, whole = small.run_on(2, "replicated", **flags), small.run_on(2, "whole", **flags, shard=shard)
    assert_close(whole, replicated, 1e-2)
    # Replicas add up in INT8 what each has and then one another's sums, `full` what all have of a micro-batch.
    rounded_otherwise = shard == "full" and "grad_accum_dtype" in SHARDED[case]
    assert_close_weights(whole, replicated, SHARES["q_galore"] if rounded_otherwise else 2e-2)
    small.run_on(2, "parts", **flags | {"num_training_steps": 3}, shard=shard)
    assert_same_run(whole, small.run_on(2, "parts", **flags | {"continue_from": "auto"}, shard=shard))


@pytest.mark.multi_gpu
@two_gpus
@pytest.mark.parametrize("victim", [0, 1])
def test_torchrun_goes_on_after_a_killed_rank(small: SmallRun, victim: int) -> None:
    """The rank that is left may wait for the device, which no signal interrupts: torchrun ends it after 30 s."""
    flags = PER_LAYER | CUDA | {"num_training_steps": 60, "batch_size": 4, "save_every": 10}
    whole = small.run_on(2, "whole", **flags)
    process = start(small.argv("run", flags | {"continue_from": "auto"}), (*TORCHRUN, "--max-restarts", "1"))
    wait_for_updates(small.folder / "run", 14, process)
    begin = time.monotonic()
    os.kill(ranks_of(process)[victim], signal.SIGKILL)
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 0, text
    print(f"rank {victim} killed: all updates were made {time.monotonic() - begin:.1f} s later")
    assert_same_run(whole, small.result("run"))


@pytest.mark.multi_gpu
@two_gpus
def test_a_loss_that_is_not_finite_on_one_gpu_skips_the_update_on_both(small: SmallRun) -> None:
    flags: dict[str, object] = PER_LAYER | CUDA | {"batch_size": 4, "num_training_steps": 5, "check_replicas": 1}
    run = outcome(small, "run", Fault("loss", (2,), rank=1), 2, flags | {"save_every": 1})
    assert [line["train/skipped"] for line in run.train_lines] == [0, 0, 1, 0, 0]
