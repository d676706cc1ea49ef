"""The cross-entropy of a linear layer's outputs, of which never more than one chunk of tokens exists.

The logits of a small LLaMA are the largest tensor of its training step, and their gradient is another. But the gradient
of a token's cross-entropy depends on the logits of that token alone and is linear in the gradient of the sum. So the
forward pass goes over chunks of tokens and finishes each at once:

    L = h Wᵀ            logits, (tokens, vocabulary), in the dtype of h with float32 sums inside the product
    G = softmax(L) - 1[target], zero for an ignored token; it overwrites L. And the loss of each token, float32
    dh = G W,  dW += Gᵀ h

and the backward pass only multiplies dh and dW by the gradient of the sum. The products are those of the ordinary
layer, none is computed twice. Over several chunks dW is summed in float32 and rounded once at the end. Without
gradients only the losses are computed. Nothing waits for the device, and every sum has a fixed order.

In FP8 (`products`) the three are of factors rounded to e4m3 with one scale for each row of the sum, as those of the
layers are (`qgalore.kernels.fp8_product`): both of W are made once a call, those of G and h with their chunk. G is
rounded where it is computed, in units of 1 / 448 for all tokens, since its largest value is near -1 for a target that
was not expected and matters little elsewhere; a probability below 2e-6 adds nothing to dh. dW sums over tokens and has
its scales by columns, so that a rare token keeps its gradient. Without gradients nothing is rounded.

In float16 dW stays in float32 until the gradient of the sum is known. It is a sum over all tokens, whose size no scale
of the loss changes: of a frequent token it may be beyond 65504, of a rare one below 6e-8. dh is of one token.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qgalore import kernels
from qgalore.config import FLOAT_PRODUCTS, FP8_GRADIENTS, FP8_PRODUCTS
from qgalore.kernels import row_chunks, use_triton

CHUNK_BYTES = 256 << 20
"""The logits of a chunk take no more bytes than this (one token's always fit)."""
_TOKEN_MULTIPLE = 128  # whole tiles of a matrix product
_COLUMN_MULTIPLE = 64  # rows of logits start at aligned addresses, whatever the vocabulary


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100, products: int = FLOAT_PRODUCTS,
    spent: bool = False,
) -> Tensor:  # fmt: skip
    """The sum () of the cross-entropy of `hidden @ weight.T` against the targets that are not `ignore_index`.

    hidden (T, H) and weight (vocabulary, H) have one dtype, or get that of an autocast region, as in `F.linear`;
    targets (T,) are int64. The sum is float32, of float64 values float64, and not finite if a logit of a counted token
    is not. With gradients they are computed here already, so call it without where none is wanted.
    products: with gradients `FP8_PRODUCTS` multiplies logits and dh in FP8, `FP8_GRADIENTS` dW, too.
    spent: whether nobody reads the weight after this call, whose memory then becomes that of its gradient.
    Raises ValueError for shapes that do not match; a second backward pass through one result raises RuntimeError.
    """
    if (
        hidden.dim() != 2
        or weight.dim() != 2
        or hidden.shape[1] != weight.shape[1]
        or targets.shape != hidden.shape[:1]
    ):
        raise ValueError(
            "linear_cross_entropy needs hidden (T, H), weight (vocabulary, H) and targets (T,), "
            f"not {tuple(hidden.shape)}, {tuple(weight.shape)} and {tuple(targets.shape)}"
        )
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        # Autocast leaves float64 as it is.
        hidden, weight = (x if x.dtype == torch.float64 else x.to(dtype) for x in (hidden, weight))
        with torch.autocast(device_type, enabled=False):
            return linear_cross_entropy(hidden, weight, targets, ignore_index, products, spent)
    if torch.is_grad_enabled():
        loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, ignore_index, products, spent)
        return loss
    return _loss_and_gradients(_Products(hidden, weight), targets, ignore_index, False, False)[0]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, products: int, spent: bool
    ) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        ctx.dtype, rounds = hidden.dtype, products >= FP8_PRODUCTS and (needs_hidden or needs_weight)
        head = _Fp8Products(hidden, weight, needs_hidden, products) if rounds else _Products(hidden, weight)
        loss, *ctx.gradients = _loss_and_gradients(head, targets, ignore_index, needs_hidden, needs_weight, spent)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_cross_entropy: a second backward pass through the same loss. The first one scaled the "
                "gradients in place and gave them away: compute the loss again"
            )
        # No reference stays here, so that a weight's gradient can become its .grad without a copy.
        gradients, ctx.gradients = ctx.gradients, None
        for gradient in gradients:
            if gradient is not None:
                scale_(gradient, grad_output)
        return (*(None if x is None else x.to(ctx.dtype) for x in gradients), None, None, None, None)


class _Products:
    """The products of a head, some tokens at a time, in the dtype of its factors."""

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        self.hidden, self.weight = hidden, weight
        self.vocabulary = weight.shape[0]
        self.chunks = token_chunks(len(hidden), logits_width(self.vocabulary) * hidden.element_size())
        self._buffer: Tensor | None = None

    def logits(self, start: int, stop: int) -> Tensor:
        """Those of some tokens, (chunk, width): the vocabulary's, and columns without a meaning."""
        if self._buffer is None:
            most = max(stop - start for start, stop in self.chunks)
            self._buffer = self.hidden.new_empty(most, logits_width(self.vocabulary))
            if not self.hidden.is_cuda:
                # Products in bfloat16 on a CPU read it, times zeros: memory may hold NaN.
                self._buffer[:, self.vocabulary :] = 0
        padded = self._buffer[: stop - start]
        torch.mm(self.hidden[start:stop], self.weight.T, out=padded[:, : self.vocabulary])
        return padded

    def gradient_codes(self, start: int, stop: int) -> Tensor | None:
        """Where G of some tokens goes in FP8 as well, (chunk, vocabulary or more); None: nowhere."""
        return None

    def hidden_gradient_(self, out: Tensor, gradient: Tensor, codes: Tensor | None) -> None:
        """out (chunk, H) <- G W."""
        torch.mm(gradient, self.weight, out=out)

    def weight_gradient_(self, out: Tensor, gradient: Tensor, start: int, stop: int, sums: bool) -> None:
        """out (vocabulary, H) <- Gᵀ h, or with what it holds before where it `sums`."""
        if sums:
            _add_product_(out, gradient.T, self.hidden[start:stop])
        else:
            torch.mm(gradient.T, self.hidden[start:stop], out=out)


class _Fp8Products(_Products):
    """The same of factors in FP8, but for dW where that is not asked for."""

    def __init__(self, hidden: Tensor, weight: Tensor, needs_hidden: bool, products: int) -> None:
        super().__init__(hidden, weight)
        self._gradients = products == FP8_GRADIENTS
        self._weight = kernels.fp8_weight(weight)
        self._turned = kernels.fp8_columns(weight, weight.shape[1]) if needs_hidden else None

    def logits(self, start: int, stop: int) -> Tensor:
        """See `_Products`: the result of the product itself, as it has no place to be given."""
        rows = kernels.fp8_rows([self.hidden[start:stop]], [self.hidden.shape[1]])
        return kernels.fp8_product(rows, self._weight, kernels.fp8_width(self.vocabulary), self.hidden.dtype)

    def gradient_codes(self, start: int, stop: int) -> Tensor | None:
        """See `_Products`: written by the kernel that has G in its registers."""
        if self._turned is None:
            return None
        depth = kernels.fp8_width(self.vocabulary)
        return torch.empty(stop - start, depth, dtype=torch.float8_e4m3fn, device=self.hidden.device)

    def hidden_gradient_(self, out: Tensor, gradient: Tensor, codes: Tensor | None) -> None:
        """See `_Products`; of the codes, in units of 1 / 448."""
        assert self._turned is not None and codes is not None
        rows = kernels.Fp8Matrix(codes, self.hidden.new_full((len(codes),), 1 / 448, dtype=torch.float32))
        out.copy_(kernels.fp8_product(rows, self._turned, out.shape[1], out.dtype, exact=True))

    def weight_gradient_(self, out: Tensor, gradient: Tensor, start: int, stop: int, sums: bool) -> None:
        """See `_Products`."""
        if not self._gradients:
            super().weight_gradient_(out, gradient, start, stop, sums)
            return
        size = out.shape[1]
        factors = kernels.fp8_columns(gradient, self.vocabulary), kernels.fp8_columns(self.hidden[start:stop], size)
        product = kernels.fp8_product(*factors, size, self.hidden.dtype, exact=True)[: self.vocabulary]
        if sums:
            out.add_(product)
        else:
            out.copy_(product)


def logits_width(vocabulary: int) -> int:
    """Columns of a buffer of logits."""
    return -(-vocabulary // _COLUMN_MULTIPLE) * _COLUMN_MULTIPLE


def _loss_and_gradients(
    products: _Products, targets: Tensor, ignore_index: int, needs_hidden: bool, needs_weight: bool, spent: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The sum of the losses (), and its gradients like hidden and like weight where they are needed.

    That of a float16 weight is float32. spent: the weight's gradient takes its memory, but in float16.
    """
    hidden, weight, chunks = products.hidden, products.weight, products.chunks
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    losses = hidden.new_empty(tokens, dtype=torch.promote_types(hidden.dtype, torch.float32))  # (T,)
    hidden_grad = hidden.new_empty(hidden.shape) if needs_hidden else None
    weight_grad, half = None, weight.dtype == torch.float16
    alone = len(chunks) == 1 and not half
    if needs_weight:
        # A single chunk needs no sum, and a large head no float32 copy; it reads the weight before it has dW.
        if alone:
            weight_grad = weight.data if spent else weight.new_empty(weight.shape)
        else:
            weight_grad = weight.new_zeros(weight.shape, dtype=losses.dtype)
    for start, stop in chunks:
        padded, codes = products.logits(start, stop), products.gradient_codes(start, stop)  # (chunk, width)
        logits = padded[:, :vocabulary]  # (chunk, vocabulary)
        softmax_gradient_(
            padded, vocabulary, targets[start:stop], ignore_index, losses[start:stop], needs_hidden or needs_weight,
            codes,
        )  # fmt: skip
        if hidden_grad is not None:
            products.hidden_gradient_(hidden_grad[start:stop], logits, codes)
        del codes
        if weight_grad is not None:
            products.weight_gradient_(weight_grad, logits, start, stop, sums=not alone)
        del padded, logits  # before others are made
    if weight_grad is not None and not half and weight_grad.dtype != weight.dtype:
        weight_grad = weight.data.copy_(weight_grad) if spent else weight_grad.to(weight.dtype)
    return losses.sum(), hidden_grad, weight_grad


def token_chunks(tokens: int, token_bytes: int) -> list[tuple[int, int]]:
    """Ranges of tokens of at most CHUNK_BYTES each and as few as that allows, of equal lengths but for one unit.

    The unit is 128 tokens where so many fit into a chunk, else one token; the last range may end inside a unit.
    """
    most = max(1, CHUNK_BYTES // token_bytes)
    unit = _TOKEN_MULTIPLE if most >= _TOKEN_MULTIPLE else 1
    units = -(-tokens // unit)
    count = -(-units // (most // unit))
    edges = [min(tokens, unit * (units * i // count)) for i in range(count + 1)] if count else []
    return list(pairwise(edges))


def training_bytes(
    tokens: int, hidden_size: int, vocabulary: int, dtype: torch.dtype, products: int = FLOAT_PRODUCTS
) -> int:
    """Bytes that `linear_cross_entropy` takes with gradients beside its arguments, which are in dtype.

    hidden made contiguous and its gradient, one chunk of logits, the weight's gradient and over several chunks its
    float32 sum, and of each token its target and its loss. In FP8 also both forms of the weight, and what is rounded of
    a chunk.
    """
    width, itemsize = logits_width(vocabulary), dtype.itemsize
    chunks = token_chunks(tokens, width * itemsize)
    of_sum = 4 if dtype == torch.float16 or (len(chunks) > 1 and itemsize < 4) else 0
    longest = max(stop - start for start, stop in chunks)
    chunk = longest * width * itemsize
    if products >= FP8_PRODUCTS:
        rows, columns = kernels.fp8_width(vocabulary), kernels.fp8_width(hidden_size)
        chunk += 2 * rows * columns + 4 * (rows + columns)
        of_gradient = longest * (rows + 4) + longest * hidden_size * itemsize  # and its product, which is copied
        if products == FP8_GRADIENTS:
            both = (rows + columns) * (kernels.fp8_width(longest) + 4) + 4 * columns
            of_gradient = max(of_gradient, both + rows * hidden_size * itemsize)
        chunk += of_gradient
    return 2 * tokens * hidden_size * itemsize + chunk + vocabulary * hidden_size * (itemsize + of_sum) + 12 * tokens


def softmax_gradient_(
    logits: Tensor, columns: int, targets: Tensor, ignore_index: int, losses: Tensor, write_gradient: bool,
    codes: Tensor | None = None,
) -> None:  # fmt: skip
    """Write the cross-entropy of each row into losses (T,) and, if asked to, its gradient over the logits.

    codes: beside that e4m3(448 gradient) into a float8_e4m3fn (T, columns or more), with zeros at the end.

    logits (T, width) is contiguous, of which the first `columns` count; the rest is padding without a meaning, before
    and after. A row whose target is `ignore_index` has loss and gradient zero; in any other, one value that is not
    finite makes both so. Computed in the dtype of losses; `QGALORE_KERNELS` chooses the implementation.
    """
    if use_triton(logits.device):
        from peft_pretraining.models.ops import softmax_gradient

        softmax_gradient.softmax_gradient_(logits, columns, targets, ignore_index, losses, write_gradient, codes)
        return
    for start, stop in row_chunks(*logits.shape):
        values = logits[start:stop, :columns]
        ignored = targets[start:stop] == ignore_index
        index = targets[start:stop].masked_fill(ignored, 0).unsqueeze(1)  # (rows, 1)
        # 0, or NaN for an infinitely negative logit, which alone would not show in the loss.
        poison = values.amin(1, keepdim=True).to(losses.dtype) * 0
        log_softmax = values.to(losses.dtype).log_softmax(1).add_(poison)
        losses[start:stop] = log_softmax.gather(1, index).squeeze(1).neg_().masked_fill_(ignored, 0)
        if write_gradient:
            gradient = log_softmax.exp_()
            gradient.scatter_(1, index, gradient.gather(1, index) - 1)
            values.copy_(gradient.masked_fill_(ignored.unsqueeze(1), 0))
            if codes is not None:
                padding = (0, codes.shape[1] - columns)
                codes[start:stop] = F.pad(gradient.float().mul_(448.0).clamp_(-448.0, 448.0), padding).to(codes.dtype)


def scale_(values: Tensor, factor: Tensor) -> None:
    """Multiply values in place by a factor () of their dtype or a wider one, which is not rounded before."""
    if use_triton(values.device) and values.is_contiguous():
        from peft_pretraining.models.ops import gradient_scale

        gradient_scale.scale_(values, factor)
        return
    # In as many dimensions; a factor without any would first be rounded to the dtype of the values.
    values.mul_(factor.view([1] * values.dim()))


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total <- total + a b in place; a float32 total of 16-bit matrices without a float32 copy of them."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    elif a.dtype == torch.float16:
        total.addmm_(a.float(), b.float())  # which may be beyond float16
    else:  # the CPU has no product with another dtype than its operands'
        total.add_(a @ b)
