"""Bytes of what waits in host memory for its layer, and of the slots that it has on the device: `--offload`."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from torch import Tensor

from peft_pretraining.build import model_on_meta
from peft_pretraining.memory.planned_run import PlannedRun
from peft_pretraining.models.build import low_rank_names
from peft_pretraining.optim.build import states_on_meta
from peft_pretraining.optim.layer_execution import slots_of
from qgalore.sharding.slots import size_of


class PartBytes(NamedTuple):
    """One kind of tensors that are copied together, such as moments."""

    on_host: int
    """Of all layers, each in whole pages."""
    of_layer: int
    """Of the largest layer."""


class Offloaded(NamedTuple):
    """What a run has on the host; nothing of a part that stays on the device."""

    weights: PartBytes
    bases: PartBytes
    moments: PartBytes
    slots: int
    """Layers that have room on the device at the same time."""

    @property
    def on_host(self) -> int:
        """Bytes of one rank's host memory."""
        return sum(part.on_host for part in self[:3])

    @property
    def in_slots(self) -> int:
        """Bytes of its device."""
        return self.slots * sum(part.of_layer for part in self[:3])


_PAGE = 4096


def offloaded(run: PlannedRun) -> Offloaded:
    """Ask the classes that own them for the tensors of a layer, for each of the subspaces that layers have."""
    args, layers = run.args, run.config.num_hidden_layers
    parts: dict[str, list[tuple[int, int]]] = {"weights": [], "bases": [], "moments": []}
    if args.runtime.offload != "none":
        model = model_on_meta(args, run.config)
        matrices = [model.get_submodule(name) for name in low_rank_names(model)]
        params = {matrix.get_parameter("weight") for matrix in matrices}
        if args.runtime.offload == "weights":
            tensors = [x for matrix in matrices for x in (matrix.get_parameter("weight"), *matrix.buffers())]
            parts["weights"].append((layers, size_of(tensors)))
        for subspace, count in Counter(args.subspace.by_depth(layers)).items():
            found: dict[str, list[Tensor]] = {"bases": [], "moments": []}
            for param, state in states_on_meta(model, args.optimizer, subspace).items():
                for key, tensor in state.items():
                    if param in params and tensor.is_meta and tensor.dim():
                        found["bases" if "_basis" in key else "moments"].append(tensor)
            for name, each in found.items():
                parts[name].append((count, size_of(each)))
    bytes_of = {
        name: PartBytes(
            sum(count * -(-size // _PAGE) * _PAGE for count, size in sizes), max((size for _, size in sizes), default=0)
        )
        for name, sizes in parts.items()
    }
    return Offloaded(**bytes_of, slots=min(slots_of(args), layers))
