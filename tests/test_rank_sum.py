"""Messages of gradients to other ranks: what is sent, where it lies, and when it is waited for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qgalore.update.all_reduce import Bucket


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
