"""Accumulation layer by layer: the bits of accumulation by micro-batches, with the sums of one layer at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.small_run import (
    FULL_RANK,
    INT8_PRODUCTS,
    OPTIMIZERS,
    RECIPE,
    Result,
    SmallRun,
    assert_same_bits,
    flags_of,
)

PER_LAYER = flags_of("q_galore_adamw8bit_per_layer")
CASES: dict[str, dict[str, object]] = {name: flags_of(name) for name in OPTIMIZERS} | {
    "streaming": PER_LAYER | {"subspace": "streaming"},
    "recipe": PER_LAYER | RECIPE,
    "normuon": PER_LAYER | RECIPE | {"direction": "normuon"},
    "int8 sums": PER_LAYER | {"subspace": "streaming", "grad_accum_dtype": "int8"},
    "bfloat16 sums": PER_LAYER | {"grad_accum_dtype": "bfloat16", "dtype": "bfloat16"},
    "products in int8": PER_LAYER | INT8_PRODUCTS,
    "int4": PER_LAYER | {"weight_bits": 4},
    "simulated": PER_LAYER | {"simulation": True},
    "fira, limited": PER_LAYER | {"residual": "fira", "norm_growth": 1.01, "subspace": "streaming"},
    "full rank": {**FULL_RANK},
    "full rank, Adam": FULL_RANK | {"recipe": "paper"},
    "momentum in parts": FULL_RANK | {"momentum_rank": "1/8"},
    "rounding feedback": FULL_RANK | {"rounding_feedback": 1},
    "recipe full_rank": FULL_RANK | {"rank": None, "recipe": "full_rank", "lr": None},
    "clipping": flags_of("q_galore_adamw8bit") | {"grad_clipping": 0.5},
}
TRAINED: dict[str, object] = {"num_training_steps": 6, "batch_size": 2, "eval_every": 2, "save_every": 3}
BY_LAYER: dict[str, object] = {"accumulate_by": "layer"}


@pytest.fixture
def small(tmp_path: Path) -> SmallRun:
    return SmallRun(tmp_path, layers=2)


def assert_same_training(a: Result, b: Result) -> None:
    """Losses, evaluations, weights, states and the place in the data, to the bit."""
    assert [str(line) for line in a.lines] == [str(line) for line in b.lines] and a.train_lines
    for step in (3, 6):
        one, other = a.checkpoint(step), b.checkpoint(step)
        assert_same_bits(one.model_tensors, other.model_tensors, "model")
        assert_same_bits(one.optimizer_state, other.optimizer_state, "optimizer")
        assert_same_bits(one.state["data"], other.state["data"], "data")


@pytest.mark.parametrize("case", CASES)
def test_it_gives_the_bits_of_accumulation_by_micro_batches(small: SmallRun, case: str) -> None:
    """Of four micro-batches, through refreshes, an evaluation between updates and a checkpoint."""
    flags = CASES[case] | TRAINED
    checkpointing = {"activation_checkpointing": True}
    assert_same_training(
        small.run("by_micro_batch", **flags, **checkpointing), small.run("by_layer", **flags, **BY_LAYER)
    )
