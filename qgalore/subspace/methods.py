"""Where a weight's gradient is updated: in the whole space, or in a subspace found in one of two ways.

A method says what of each gradient is summed over micro-batches and ranks, makes the gradient of an update of the sums,
and changes the subspace when its schedule says so. One object a weight; what it remembers is in the weight's optimizer
state.

- `Identity`: the whole gradient.
- `Streaming`: projected, and at a refresh a sketch of the full gradient beside it; one step of subspace iteration.
- `Svd`: at a refresh the full gradient instead, of which the SVD is made, as GaLore does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from qgalore.config import SubspaceConfig
from qgalore.layer.quantization import QuantizedTensor, grouped_dequantize
from qgalore.seeding import RANGE_FINDER, START, TEST_MATRIX, Seeds, step_of
from qgalore.subspace import fit
from qgalore.subspace.schedule import RefreshSchedule
from qgalore.subspace.stored_bases import Basis, StoredBases, decode

GRADIENT, FULL = "gradient", "full"
"""Names of sums: the gradient in the subspace, the full one. Those of sketches are the sides, "left" and "right"."""
GROUPED_BASIS_BYTES = 4 << 20
"""Up to this size a basis is multiplied with the input grouped with those of the other weights of that input.

All of 1B's are; at 7B a product takes longer than reading its input, and three bases would take 25 MB.
"""

Read = Callable[[], Tensor]
"""Gives the momentum, like the projected gradient."""
Rotate = Callable[[Tensor, str, Tensor | None], None]
"""rotate(change, side, wanted): multiply the moments on a side by a change of basis (rank, rank), where wanted ()."""


class Identity:
    """The whole gradient: nothing is projected, stored or refreshed."""

    sides: tuple[str, ...] = ()
    dtype = torch.float32
    """Of directions and bases in an update; the weight sets that of its activations."""
    similarity: Tensor | None = None
    """Of the newest bases with those before, (); None when that has been logged."""

    def __init__(self, shape: torch.Size) -> None:
        """shape: that of the weight."""
        self.shape = self.gradient_shape = shape

    @property
    def due(self) -> bool:
        """Whether the update that comes next refreshes the subspace."""
        return False

    @property
    def needs_full_gradient(self) -> bool:
        """Whether that update sums the full gradient instead of the projected one."""
        return False

    @property
    def has_fitted_bases(self) -> bool:
        """Whether `finish` has found bases that `adopt_fitted_bases` is to take."""
        return False

    def init_state(self) -> None:
        """Put what the method keeps into the optimizer state of a weight that has none."""

    def forms_gradient(self, tokens: int) -> bool:
        """Whether the full gradient of so many tokens is formed, and not the projected one from its factors."""
        return True

    def input_basis(self, dtype: torch.dtype) -> Tensor | None:
        """The basis (rank, n) that `project_factors` multiplies the input with; None for one that is large."""
        return None

    def sums(self) -> dict[str, torch.Size]:
        """The shapes of what this update sums, by name."""
        return {GRADIENT: self.gradient_shape}

    def project(self, grad: Tensor, momentum: Read) -> Iterator[tuple[str, Tensor]]:
        """What a micro-batch adds to each sum, of its full gradient (m, n)."""
        yield GRADIENT, grad

    def project_factors(
        self, grad_output: Tensor, input: Tensor, projected: Tensor | None, momentum: Read
    ) -> Iterator[tuple[str, Tensor]]:
        """The same of grad_output (tokens, m) and input (tokens, n), whose product is the full gradient.

        projected: the input times `input_basis`, (tokens, rank), where that has been made.
        """
        return self.project(fit.gradient(grad_output, input, (self.shape[0], self.shape[1])), momentum)

    def finish(self, full: Tensor) -> Tensor:
        """The gradient of an update of the sum `FULL`, where `needs_full_gradient`."""
        raise RuntimeError(f"{type(self).__name__} has no use of a full gradient")

    def adopt_fitted_bases(self, rotate: Rotate, skip: Tensor | None) -> None:
        """Take the bases that `finish` has found, before the step is made in them."""

    def refresh_from_sketches(self, sketches: Mapping[str, Tensor], rotate: Rotate, skip: Tensor | None) -> None:
        """Find new bases from the sketches of an update, by side, after the step."""

    def settle(self) -> None:
        """Let the schedule be that of updates that were made: takes back a refresh of one that was skipped."""

    def refreshed_tensors(self, with_bases: bool = True) -> list[Tensor]:
        """What a refresh writes on the device, for other ranks that have tensors of the same shapes."""
        return []

    def bases(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """The left and the right basis; None for a side that is not projected."""
        return None, None

    def clear(self) -> None:
        """Forget what belongs to the update that goes on."""


class Streaming(Identity):
    """A projection whose basis follows the gradient by one step of subspace iteration a refresh."""

    def __init__(
        self, config: SubspaceConfig, like: Tensor, shape: torch.Size, state: dict[str, Tensor], seeds: Seeds,
        position: int, count: int,
    ) -> None:  # fmt: skip
        """state: of a weight of `shape` (m, n), number `position` of `count` low-rank ones, stored as `like` is."""
        super().__init__(shape)
        self.config, self.sides = config, config.sides(shape)
        self.gradient_shape = torch.Size(config.gradient_shape(shape))
        self.stored = StoredBases(config, shape, state, like.dtype if like.is_floating_point() else torch.float32)
        self.schedule = RefreshSchedule(config, position, count)
        self.schedule.load(state)
        self._device, self._state, self._seeds = like.device, state, seeds
        # In memory of its own: what a refresh allocates may be memory that CUDA graphs write over.
        self._newest_similarity = torch.zeros((), device=like.device)
        self._failed = False
        self._unsettled: tuple[FlagForHost, dict[str, Tensor]] | None = None
        """Whether the newest refresh was skipped, and the schedule before it."""

    @property
    def due(self) -> bool:
        """See `Identity`."""
        self.settle()
        return self.schedule.due(step_of(self._state))

    def init_state(self) -> None:
        """Start from random bases."""
        self._state["failures"] = torch.zeros((), dtype=torch.int64, device=self._device)
        for side in self.sides:
            start = fit.random_basis(
                self.config.dimensions, self._length(side), self._seeds(START, self._length(side)), self._device
            )
            self.stored.write(side, self.stored.encode(start))
        self.schedule.save(self._state)

    def _length(self, side: str) -> int:
        return self.shape[0 if side == "left" else 1]

    # ---- the gradient

    def forms_gradient(self, tokens: int) -> bool:
        """See `Identity`: only where that is cheaper, or the full gradient is needed."""
        side = "right" if "right" in self.sides else "left"
        whole = self.needs_full_gradient or self.config.residual != "none"
        return whole or not fit.projects_directly(tokens, self.shape[0], self.shape[1], self.config.dimensions, side)

    def input_basis(self, dtype: torch.dtype) -> Tensor | None:
        """See `Identity`."""
        large = self.config.dimensions * self.shape[1] * dtype.itemsize > GROUPED_BASIS_BYTES
        return None if large or self.sides != ("right",) else self.stored.read("right", dtype)

    def sums(self) -> dict[str, torch.Size]:
        """See `Identity`."""
        if self.needs_full_gradient:
            return {FULL: self.shape}
        sketches = {side: torch.Size((self.config.dimensions, self._length(side))) for side in self.sides if self.due}
        return {GRADIENT: self.gradient_shape, **sketches}

    def project(self, grad: Tensor, momentum: Read) -> Iterator[tuple[str, Tensor]]:
        """See `Identity`."""
        if self.needs_full_gradient:
            yield FULL, grad
            return
        yield GRADIENT, fit.project(grad, *self.bases(grad.dtype))
        for side in self.sides if self.due else ():
            yield side, self._test_matrix(side, grad.dtype, momentum) @ (grad.T if side == "left" else grad)

    def project_factors(
        self, grad_output: Tensor, input: Tensor, projected: Tensor | None, momentum: Read
    ) -> Iterator[tuple[str, Tensor]]:
        """See `Identity`."""
        shape, dtype = (self.shape[0], self.shape[1]), grad_output.dtype
        if projected is not None:
            yield GRADIENT, fit.gradient(grad_output, projected, (shape[0], projected.shape[1]))
        else:
            yield GRADIENT, fit.project_factors(grad_output, input, shape, *self.bases(dtype))
        for side in self.sides if self.due else ():
            test = self._test_matrix(side, dtype, momentum)
            first, second = (input, grad_output) if side == "left" else (grad_output, input)
            first = first[:, : test.shape[1]] @ test.T
            yield side, fit.gradient(first, second, (len(test), self._length(side)))

    def _test_matrix(self, side: str, dtype: torch.dtype, momentum: Read) -> Tensor:
        """What the gradient is multiplied with to sketch its range: (rank, other side) in dtype.

        The momentum, each row scaled to unit length: an average of recent projected gradients, so the sketch is one
        step of subspace iteration on the gradients' covariance. At first, and where both sides are projected, random.
        """
        if self.schedule.refreshes == 0 or len(self.sides) == 2:
            other = self._length("right" if side == "left" else "left")
            test = fit.random_matrix(
                self.config.dimensions, other, self._seeds(TEST_MATRIX, self._length(side)), self._device
            )
        else:
            test = momentum() if side == "left" else momentum().T
        norms, scaled = test.norm(dim=1, keepdim=True).clamp_min(1e-30), torch.empty_like(test, dtype=dtype)
        return torch.div(test, norms, out=scaled)  # rounded once

    def bases(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """See `Identity`."""
        return self.stored.read("left", dtype), self.stored.read("right", dtype)

    # ---- the refresh

    def refresh_from_sketches(self, sketches: Mapping[str, Tensor], rotate: Rotate, skip: Tensor | None) -> None:
        """See `Identity`. The basis changes where orthonormalising worked and the update was made."""
        for side, sketch in sketches.items():
            basis, worked = fit.orthonormalize(sketch, decode(self.stored.stored(side), self.dtype))
            wanted = worked if skip is None else worked & ~skip
            self._remember(self._change(side, self.stored.encode(basis), rotate, wanted))
            self._state["failures"] += ~worked if skip is None else ~worked & ~skip
        if not sketches:
            return
        if self.schedule.refreshes > 0 or _found_gradient(sketches):
            self._record(skip)
        elif skip is None or not bool(skip):
            self.schedule.put_off(step_of(self._state) - 1)
            self.similarity = None
            self.schedule.save(self._state)

    def _change(self, side: str, encoded: Basis, rotate: Rotate, wanted: Tensor | None) -> Tensor:
        """Store a new basis and rotate the moments into it if asked; returns the similarity with the old one, ().

        Where the flag `wanted` on the device is false, basis and moments stay as they are, to the bit.
        """
        dtype = fit.wide_dtype(self.dtype)  # which is that of the rotated moments
        new, old = decode(encoded, dtype), decode(self.stored.stored(side), dtype)
        change = new @ old.T
        similarity = fit.similarity(new, old, change)
        del new, old
        if self.config.rotates_moments:
            rotate(change, side, wanted)
        self.stored.write(side, encoded, wanted)
        return similarity

    def _remember(self, similarity: Tensor) -> None:
        self.similarity = self._newest_similarity.copy_(similarity)

    def _record(self, skip: Tensor | None) -> None:
        """Count the refresh of the update that has just been counted, until `settle` knows that it was skipped."""
        if skip is not None:
            self._unsettled = FlagForHost(skip), {key: self._state[key] for key in self.schedule.KEYS}
        assert self.similarity is not None
        # Only the lazy rule needs the number on the host, and only an SVD, which waits for the device anyway, is lazy.
        known = float(self.similarity) if self.schedule.lazy and self.schedule.refreshes > 0 else None
        self.schedule.record(step_of(self._state) - 1, None if self._failed else known)
        self.schedule.save(self._state)

    def settle(self) -> None:
        """See `Identity`. A host that is ahead of its device waits for the update before, and not for what follows."""
        if self._unsettled is None:
            return
        (skipped, before), self._unsettled = self._unsettled, None
        if skipped:
            self.schedule.load(before)
            self.schedule.save(self._state)

    def refreshed_tensors(self, with_bases: bool = True) -> list[Tensor]:
        """See `Identity`."""
        self.stored.cached.clear()
        bases = [value for key, value in sorted(self._state.items()) if "_basis" in key and with_bases]
        return [*bases, self._state["failures"], self._newest_similarity]

    def schedule_row(self) -> list[float]:
        """The schedule after an update, for the ranks that have not made the refresh; as long at all times."""
        counters, window = self._state["schedule"].tolist(), self.schedule.window
        padding = [0.0] * (self.config.queue_size - len(window))
        return [float(self.similarity is not None), *counters, float(len(window)), *window, *padding]

    def take_schedule(self, row: list[float], skipped: FlagForHost | None) -> None:
        """Take over `schedule_row` of the rank that has made the refresh, unless the refresh was skipped.

        skipped: the flag as it was when the owner made the refresh; what it became afterwards does not count there.
        """
        found, *counters, length = row[:6]
        before = {key: self._state[key] for key in self.schedule.KEYS}
        self._state["schedule"] = torch.tensor(counters, device="cpu").to(torch.int64)
        self._state["similarities"] = torch.tensor(row[6 : 6 + int(length)], dtype=torch.float64, device="cpu")
        self.schedule.load(self._state)
        if skipped is not None and self.schedule.refreshes > int(before["schedule"][2]):
            self._unsettled = skipped, before
        self.similarity = self._newest_similarity if found else None

    def clear(self) -> None:
        """See `Identity`."""
        self.stored.cached.clear()


class Svd(Streaming):
    """A projection onto the top singular vectors of the full gradient; the first one is found by streaming."""

    _fitted: Mapping[str, Basis] = {}

    @property
    def needs_full_gradient(self) -> bool:
        """See `Identity`."""
        return self.due and self.schedule.refreshes > 0

    @property
    def has_fitted_bases(self) -> bool:
        """See `Identity`."""
        return bool(self._fitted)

    def finish(self, full: Tensor) -> Tensor:
        """See `Identity`: fits the bases, or keeps the old ones where that fails, and projects onto them."""
        fitted: dict[str, Basis] = {}
        self._failed = False
        for side in self.sides:
            seed = self._seeds(RANGE_FINDER) if self.config.svd_method == "randomized" else None
            found, old = fit.fit_svd(full, self.config.dimensions, side, seed), self.stored.stored(side)
            self._failed |= found is None
            fitted[side] = old if found is None else self.stored.encode(fit.with_signs_of(found, decode(old)))
        self._fitted = fitted
        bases = {side: decode(basis) for side, basis in fitted.items()}
        return fit.project(full.float(), bases.get("left"), bases.get("right"))

    def adopt_fitted_bases(self, rotate: Rotate, skip: Tensor | None) -> None:
        """See `Identity`."""
        if self._fitted:
            wanted = None if skip is None else ~skip
            found = [self._change(side, basis, rotate, wanted) for side, basis in self._fitted.items()]
            self._remember(torch.stack(found).mean())
            self._state["failures"] += self._failed if skip is None else ~skip & self._failed
            self._record(skip)

    def clear(self) -> None:
        """See `Identity`."""
        super().clear()
        self._fitted = {}


def grouped_bases(subspaces: Sequence[Identity]) -> list[tuple[Tensor | None, Tensor | None]]:
    """`bases` of several, each in its own dtype: on a GPU one launch for quantized ones that are stored alike."""
    found: list[dict[str, Tensor]] = [{} for _ in subspaces]
    quantized: dict[torch.dtype, list[tuple[int, str, QuantizedTensor]]] = {}
    for index, subspace in enumerate(subspaces):
        if not isinstance(subspace, Streaming):
            continue
        for side in subspace.sides:
            basis = subspace.stored.as_read(side, subspace.dtype)
            if isinstance(basis, QuantizedTensor):
                quantized.setdefault(subspace.dtype, []).append((index, side, basis))
            else:
                found[index][side] = basis
    for dtype, bases in quantized.items():
        values = grouped_dequantize([basis for _, _, basis in bases], dtype)
        for (index, side, _), value in zip(bases, values, strict=True):
            found[index][side] = value
    return [(sides.get("left"), sides.get("right")) for sides in found]


METHODS = {"streaming": Streaming, "svd": Svd}
"""The methods that project, by the option `subspace`."""


def _found_gradient(sketches: Mapping[str, Tensor]) -> bool:
    """Whether the sketches of an update are of a gradient other than zero: it waits for the device.

    Only a first refresh asks, so that the steady step waits for nothing.
    """
    return bool(torch.stack([sketch.any() for sketch in sketches.values()]).all())


class FlagForHost:
    """A flag as it is now on its device, on its way to the host; only who asks for it waits, and for it alone."""

    def __init__(self, flag: Tensor) -> None:
        self._flag = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=flag.is_cuda)
        self._flag.copy_(flag, non_blocking=True)
        self._arrived = torch.cuda.Event() if flag.is_cuda else None
        if self._arrived is not None:
            self._arrived.record(torch.cuda.current_stream(flag.device))

    def __bool__(self) -> bool:
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._flag)
