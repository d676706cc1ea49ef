"""Loss and perplexity on a validation set, with the same bits on any number of ranks.

perplexity = exp(mean nats per target token), every token weighted alike. The official code averages the means of its
batches, whatever their lengths, and divides by the number of batches plus one; published tables have its figures, so
that formula is reported as well, as perplexity_official.

Each rank evaluates its batches; the loss sum and token count of every batch are gathered, put in the order of the
batches and summed in float64, so that the split over ranks cannot change the result.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from peft_pretraining.errors import UserError
from peft_pretraining.models.head import IGNORE_INDEX

BatchLoss = tuple[int, float, int]  # index in the global order, nats summed over the targets, number of targets
Gather = Callable[[list[BatchLoss]], Sequence[list[BatchLoss]]]


class Batch(Protocol):
    """A micro-batch of the data loader: two (B, L) tensors of token ids on the CPU."""

    @property
    def input_ids(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...


class EvalResult(NamedTuple):
    """The result of an evaluation; `loss` is in nats per token."""

    loss: float
    perplexity: float
    perplexity_official: float
    tokens: int  # target tokens, over all ranks


def _one_rank(rows: list[BatchLoss]) -> list[list[BatchLoss]]:
    return [rows]


def evaluate(
    model: nn.Module,
    eval_set: Iterable[tuple[int, Batch]],
    device: torch.device | str,
    gather: Gather = _one_rank,
    any_rank: Callable[[bool], bool] | None = None,
) -> EvalResult:
    """Evaluate `model` on this rank's (batch index, micro-batch) pairs and combine with the other ranks'.

    `gather` takes this rank's rows and returns every rank's (as torch.distributed.all_gather_object fills its list);
    all ranks must call it. any_rank: where all ranks must make as many forward passes, whether any has its argument
    true; a rank without a batch left then makes passes that do not count. The model's training mode is put back. Raises
    UserError if there is no target token.
    """
    return summarize([row for rows in gather(_batch_losses(model, eval_set, device, any_rank)) for row in rows])


def _batch_losses(
    model: nn.Module,
    eval_set: Iterable[tuple[int, Batch]],
    device: torch.device | str,
    any_rank: Callable[[bool], bool] | None,
) -> list[BatchLoss]:
    was_training = model.training
    model.eval()
    indices: list[int] = []
    counts: list[int] = []
    losses: list[Tensor | float] = []
    try:
        # Not inference mode: its tensors cannot be used with autograd later, and a compiled model would be recompiled.
        with torch.no_grad():
            for index, batch in eval_set:
                if any_rank is not None:
                    any_rank(True)
                indices.append(index)
                counts.append(int((batch.labels[:, 1:] != IGNORE_INDEX).sum()))
                output = model(
                    batch.input_ids.to(device, non_blocking=True), batch.labels.to(device, non_blocking=True)
                )
                loss = output.loss_sum.float()
                # On a CPU there is nothing to wait for, and a tensor that stays would take a place in the hole that an
                # activation leaves, which then holds no other one: 12 MB more with each batch.
                losses.append(loss.item() if loss.device.type == "cpu" else loss)
            while any_rank is not None and any_rank(False):
                model(torch.zeros(1, 2, dtype=torch.int64, device=device))
    finally:
        model.train(was_training)
    # One transfer for all batches: reading each loss would make the device wait for the CPU at every batch.
    values = [float(loss) for loss in losses if not isinstance(loss, Tensor)]
    values += torch.stack(waiting).tolist() if (waiting := [x for x in losses if isinstance(x, Tensor)]) else []
    return list(zip(indices, values, counts, strict=True))


def summarize(rows: Iterable[BatchLoss]) -> EvalResult:
    """Combine the batches of all ranks; a batch without a target is ignored."""
    ordered = [row for row in sorted(rows) if row[2] > 0]
    indices = [index for index, _, _ in ordered]
    if len(set(indices)) != len(indices):
        raise ValueError("two ranks evaluated the same batch")
    if not ordered:
        raise UserError("--dataset: the validation set holds no target token; give a set with longer documents.")
    tokens = sum(count for _, _, count in ordered)
    loss = math.fsum(nats for _, nats, _ in ordered) / tokens
    official = math.fsum(nats / count for _, nats, count in ordered) / (len(ordered) + 1)
    return EvalResult(loss, _exp(loss), _exp(official), tokens)


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
