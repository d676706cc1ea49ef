"""Messages of gradients to other ranks: what is sent, where it lies, and when it is waited for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from peft_pretraining.build import build_training, shape_of
from peft_pretraining.config.parse import parse_args
from peft_pretraining.memory.lasting import GRADIENTS, REFRESHES, lasting_bytes
from peft_pretraining.memory.planned_run import PlannedRun
from qgalore.graphs.eager_layers import EagerLayers
from qgalore.layer.quantization import QuantizedTensor
from qgalore.optimizer import LowRankAdamW
from qgalore.update.all_reduce import Bucket
from tests.small_run import Q_GALORE, SmallRun, flags_of


class Doubling:
    """The sum over two ranks that hold the same; it is there when it has been waited for."""

    def __init__(self) -> None:
        self.sent: list[Tensor] = []
        self.waited = 0

    def __call__(self, message: Tensor) -> Doubling:
        self.sent.append(message)
        return self

    def wait(self) -> None:
        self.waited += 1
        self.sent[-1].mul_(2)


def parts() -> list[list[Tensor]]:
    return [[torch.arange(6.0).view(2, 3), torch.tensor([7.0])], [], [torch.full((2, 2), 3.0).T]]


@pytest.mark.parametrize("size", [None, 11, 12], ids=["no buffer", "a buffer that fits", "a buffer that does not"])
def test_one_bucket_holds_all_parts(size: int | None) -> None:
    buffer, ranks = None if size is None else torch.full((size,), -1.0), Doubling()
    bucket = Bucket(parts(), ranks, buffer)
    assert not ranks.sent, "nothing is sent before start"
    bucket.start()
    assert len(ranks.sent) == 1 and ranks.waited == 0 and ranks.sent[0].numel() == 11
    summed = bucket.summed()
    assert ranks.waited == 1
    assert [[tuple(part.shape) for part in several] for several in summed] == [[(2, 3), (1,)], [], [(2, 2)]]
    for several, given in zip(summed, parts(), strict=True):
        assert all(torch.equal(part, 2 * one) for part, one in zip(several, given, strict=True))
    assert (bucket.buffer is buffer) == (size == 11)
    if size == 12:
        assert buffer is not None and bool((buffer == -1).all())


def test_a_sum_is_waited_for_once_and_may_need_no_waiting() -> None:
    ranks = Doubling()
    bucket = Bucket(parts(), ranks)
    bucket.start()
    first = [part.clone() for of_weight in bucket.summed() for part in of_weight]
    again = [part for of_weight in bucket.summed() for part in of_weight]
    assert ranks.waited == 1 and all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

    def five_times(tensor: Tensor) -> None:
        tensor.mul_(5)

    at_once = Bucket([[torch.ones(3)]], five_times)
    at_once.start()
    assert torch.equal(at_once.summed()[0][0], torch.full((3,), 5.0))


@pytest.mark.parametrize(("dtype", "residual"), [("int8", "none"), ("float32", "none"), ("int8", "fira")])
def test_what_was_sent_of_a_layer_does_not_stay(tmp_path: Path, dtype: str, residual: str) -> None:
    """Between the last backward pass and the step there is what the plan counts, not the messages of all layers.

    7B took 5 GB more than planned on several ranks: the gradient of a norm was a view of its layer's message.
    """
    flags = flags_of("q_galore_adamw8bit_per_layer") | Q_GALORE | {"subspace": "streaming", "grad_accum_dtype": dtype}
    flags |= {"residual": residual, "dtype": "float32" if residual == "none" else "bfloat16"}
    args = parse_args(SmallRun(tmp_path, layers=2).argv("run", flags), 1)
    ranks = Doubling()
    model, optimizer = build_training(args, torch.device("cpu"), ranks, None)
    assert isinstance(optimizer, LowRankAdamW)
    model.run_layers_by(EagerLayers(list(model.decoder_layers), None, optimizer))
    for micro_batch in range(2):
        optimizer.is_last_micro_batch = micro_batch == 1
        ids = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(micro_batch))
        loss = model(ids, ids).loss_sum
        assert loss is not None
        loss.backward()
    weights = optimizer.weights_of(model)
    assert all(weight.gradient.is_final for weight in weights)
    finals = [weight.gradient.final.stored for weight in weights]
    finals += [full for weight in weights if (full := weight.gradient._last_full) is not None]
    parts = [[x.qdata, x.scale, x.zero_point] if isinstance(x, QuantizedTensor) else [x] for x in finals]
    kept = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for each in parts for x in each}
    config = shape_of(args.model)
    assert config is not None
    planned = lasting_bytes(PlannedRun(args, config))
    beside = 0
    if dtype == "float32":  # sums are the messages themselves, with sketches and norms, and norms once more
        norms = sum(4 * weight.shape.numel() for weight in weights if len(weight.shape) == 1)
        beside = planned[REFRESHES] + norms
    assert 0 <= sum(kept.values()) - planned[GRADIENTS] <= beside
    assert {message.dtype for message in ranks.sent} == {torch.bfloat16 if dtype == "int8" else torch.float32}
