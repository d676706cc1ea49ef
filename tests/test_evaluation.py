"""Perplexity: worked out by hand on batches of unequal length, and the same on any number of ranks."""

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

from peft_pretraining.errors import UserError
from peft_pretraining.evaluation import BatchLoss, EvalResult, evaluate, summarize
from peft_pretraining.models.head import CausalLMOutput, head_output
from tests.small_run import ROOT


class MicroBatch(NamedTuple):
    input_ids: torch.Tensor
    labels: torch.Tensor


class Bigram(nn.Module):
    """Four tokens; after token i the next one has the probabilities of row i, whatever came before."""

    rows = ((0.5, 0.25, 0.125, 0.125), (0.25, 0.25, 0.25, 0.25), (0.125, 0.125, 0.25, 0.5), (0.1, 0.2, 0.3, 0.4))

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.tensor(self.rows).log())
        self.head = nn.Linear(4, 4, bias=False)
        self.head.weight.data.copy_(torch.eye(4))
        self.modes: list[tuple[bool, bool]] = []

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> CausalLMOutput:
        self.modes.append((self.training, torch.is_grad_enabled()))
        return head_output(self.table[input_ids], self.head, labels)


def batches() -> list[tuple[int, MicroBatch]]:
    long = torch.tensor([[0, 0, 1, 2, 3]])  # targets: 0->0 1/2, 0->1 1/4, 1->2 1/4, 2->3 1/2
    short = torch.tensor([[3, 3]])  # 3->3 0.4
    ragged = torch.tensor([[2, 0, 0], [1, 1, 1]])  # 2->0 1/8, then padding; 1->1 1/4 twice
    ragged_labels = torch.tensor([[2, 0, -100], [1, 1, 1]])
    return [(0, MicroBatch(long, long)), (1, MicroBatch(short, short)), (2, MicroBatch(ragged, ragged_labels))]


# In nats: the long batch has 6 ln 2 over 4 targets, the short one -ln 0.4 over 1, the ragged one 7 ln 2 over 3.
LOSS = (13 * math.log(2) - math.log(0.4)) / 8
OFFICIAL = math.exp((6 * math.log(2) / 4 - math.log(0.4) + 7 * math.log(2) / 3) / (3 + 1))


def test_equals_the_value_by_hand() -> None:
    result = evaluate(Bigram(), batches(), "cpu")
    assert result.tokens == 8
    assert result.loss == pytest.approx(LOSS, rel=1e-6)
    assert result.perplexity == pytest.approx((2**13 / 0.4) ** (1 / 8), rel=1e-6)
    assert result.perplexity_official == pytest.approx(OFFICIAL, rel=1e-6)
    assert abs(result.perplexity - result.perplexity_official) > 0.5


def test_any_number_of_ranks_gives_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 4, (3, length), generator=generator) for length in (9, 2, 5, 31, 7, 4, 13)]
    every = [(k, MicroBatch(x, x)) for k, x in enumerate(ids)]

    def on_ranks(world_size: int) -> EvalResult:
        parts: list[list[BatchLoss]] = []

        def keep(rows: list[BatchLoss]) -> list[list[BatchLoss]]:
            parts.append(rows)
            return parts

        for rank in range(world_size):
            last = evaluate(Bigram(), [pair for pair in every if pair[0] % world_size == rank], "cpu", keep)
        return last

    one = on_ranks(1)
    assert all(on_ranks(world_size) == one for world_size in (2, 3, 4, 7))


def test_a_rank_without_batches_takes_part() -> None:
    rows: list[list[BatchLoss]] = [[(0, 2.0, 4)]]

    def gather(own: list[BatchLoss]) -> list[list[BatchLoss]]:
        assert own == []
        return [*rows, own]

    assert evaluate(Bigram(), [], "cpu", gather).loss == 0.5


def test_mode_and_gradients() -> None:
    model = Bigram()
    for training in (True, False):
        model.train(training)
        evaluate(model, batches(), "cpu")
        assert model.training is training
    assert model.modes == [(False, False)] * 6


def test_mode_is_restored_after_a_failure() -> None:
    def broken() -> Iterator[tuple[int, MicroBatch]]:
        yield batches()[0]
        raise OSError("the disk went away")

    model = Bigram().train()
    with pytest.raises(OSError, match="went away"):
        evaluate(model, broken(), "cpu")
    assert model.training


def test_batches_without_targets_count_for_nothing() -> None:
    empty = MicroBatch(torch.tensor([[1, 0]]), torch.tensor([[1, -100]]))
    assert evaluate(Bigram(), [*batches(), (3, empty)], "cpu") == evaluate(Bigram(), batches(), "cpu")
    with pytest.raises(UserError, match="no target token"):
        evaluate(Bigram(), [(0, empty)], "cpu")


def test_extreme_losses() -> None:
    assert summarize([(0, 1e6, 1)]).perplexity == math.inf
    assert math.isnan(summarize([(0, math.nan, 1)]).loss)
    with pytest.raises(ValueError, match="same batch"):
        summarize([(0, 1.0, 1), (0, 2.0, 1)])


GROWTH = """
import torch
from peft_pretraining.build import build_model
from peft_pretraining.config.flag_groups import ModelArgs
from peft_pretraining.data.batch import MicroBatch
from peft_pretraining.evaluation import evaluate
from peft_pretraining.runtime.process import make_reproducible

make_reproducible()
model = build_model(ModelArgs("9m"))
ids = torch.randint(32000, (2, 256))
found = []

def batches():
    for number in range(45):
        found.append(int(open("/proc/self/statm").read().split()[1]) * 4096)
        yield number, MicroBatch(ids.clone(), ids.clone(), 510, 512)

evaluate(model, batches(), "cpu")
print(found[-1] - found[5])
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="it reads /proc, as Linux has it")
def test_memory_does_not_grow_with_the_batches() -> None:
    """A loss that stayed between the activations of two batches cost 12 MB each on a CPU: 13 GB in all.

    That is 470 MB here; without it the allocator has taken up to 84 beside other work.
    """
    done = subprocess.run([sys.executable, "-c", GROWTH], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200e6
