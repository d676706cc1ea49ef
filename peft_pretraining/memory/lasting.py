"""Bytes that last for the whole run: weights, projections, optimizer states and sums of gradients, exactly.

They are asked of the classes that own them: the network and its states are made on PyTorch's meta device, where a
tensor has a size and takes no memory. Layers are alike, so one is made.
"""

from __future__ import annotations

import math
from collections import Counter

import torch
from torch import Tensor, nn

from peft_pretraining.build import model_on_meta
from peft_pretraining.memory.dealt_states import bytes_by_rank, fullest
from peft_pretraining.memory.offloaded import offloaded
from peft_pretraining.memory.planned_run import Matrix, PlannedRun
from peft_pretraining.models.build import low_rank_names
from peft_pretraining.optim.build import states_on_meta
from qgalore.subspace.schedule import first_refresh_spread
from qgalore.update.gradient_sum import zeros
from qgalore.update.weight import is_of_subspace

GRADIENTS, REFRESHES = "gradients", "for refreshes of subspaces (at most)"
GATHERED = "matrices of other ranks, of two layers"
SLOTS = "slots for layers from host memory"
_WEIGHTS = ("decoder weights", "embeddings, head, norms")
_STATES = ("optimizer states, decoder", "optimizer states, embeddings, head, norms")


def lasting_bytes(run: PlannedRun) -> dict[str, int]:
    """What stays on one rank's device between updates, by component."""
    model, args, layers = model_on_meta(run.args, run.config), run.args, run.config.num_hidden_layers
    times = dict.fromkeys(_tensors_of(model.decoder_layers), layers)
    decoder = {tensor for name in low_rank_names(model) for tensor in _tensors_of(model.get_submodule(name))}
    weights = {tensor for tensor in decoder if tensor.dim() > 1}  # without biases, which train in full
    found = dict.fromkeys((*_WEIGHTS, "projections", *_STATES, GRADIENTS, REFRESHES), 0)
    offload, waiting = args.runtime.offload, offloaded(run)
    for tensor in _tensors_of(model):
        if offload == "weights" and tensor in weights:
            continue
        found[_WEIGHTS[tensor not in decoder]] += times.get(tensor, 1) * tensor.nbytes
    for number, (subspace, count) in enumerate(Counter(args.subspace.by_depth(layers)).items()):
        for param, state in states_on_meta(model, args.optimizer, subspace).items():
            for key, tensor in state.items():
                # Counters stay on the CPU, and what is dealt is counted below.
                on_host = offload != "none" and param in weights and tensor.dim() > 0
                if tensor.is_meta and not on_host and (run.shards == 1 or is_of_subspace(key)):
                    kind = "projections" if "basis" in key else _STATES[param not in weights]
                    found[kind] += (count if param in times else number == 0) * tensor.nbytes
    if offload != "none":
        found[SLOTS] = waiting.in_slots
    if not run.args.updates_immediately:
        full = args.method.method == "full"
        trained = [x for x in model.parameters() if (x not in weights if full else x.requires_grad)]
        rest = sum(times.get(x, 1) * sum_bytes(run, x.shape) for x in trained)
        found |= {GRADIENTS: rest + (_sums_of_matrices(run) if full else 0), REFRESHES: _refresh_bytes(run)}
    return found if run.shards == 1 else found | _of_fullest_rank(run, found)


def _of_fullest_rank(run: PlannedRun, found: dict[str, int]) -> dict[str, int]:
    """What `--shard` changes, of the rank with most; `found`: what every rank has."""
    ranks = bytes_by_rank(run, run.shards)
    rank = fullest(ranks)
    changed = dict(zip(_STATES, (rank.matrix_states, rank.other_states), strict=True))
    changed = {name: found[name] + size for name, size in changed.items()}
    if run.args.gathers_layers:
        changed |= {_WEIGHTS[0]: rank.stored, "projections": 0, GATHERED: rank.gathered}
        changed[_WEIGHTS[1]] = found[_WEIGHTS[1]] - sum(each.rows for each in ranks) + rank.rows
    if run.args.owners_sum and not run.args.updates_immediately:
        changed[GRADIENTS] = rank.sums + _residuals(run)
    return changed


def _sums_of_matrices(run: PlannedRun) -> int:
    """Sums of the matrices' gradients; where momenta sum them there is nothing else that does."""
    if run.args.sums_in_momentum:
        return 0
    return sum(sum_bytes(run, x.gradient_shape) for x in _all_matrices(run)) + _residuals(run)


def _residuals(run: PlannedRun) -> int:
    """The full gradients that every rank keeps of the last micro-batch, where what a projection leaves out is used."""
    return sum(run.dtype.itemsize * x.residual for x in _all_matrices(run))


def _all_matrices(run: PlannedRun) -> list[Matrix]:
    by_depth = run.args.subspace.by_depth(run.config.num_hidden_layers)
    return [matrix for subspace in by_depth for matrix in run.matrices_of(subspace)]


def _tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def sum_bytes(run: PlannedRun, shape: tuple[int, ...]) -> int:
    """Bytes of a sum of gradients of this shape."""
    return zeros(torch.Size(shape), run.sum_dtype, torch.device("meta")).nbytes


def _refresh_bytes(run: PlannedRun) -> int:
    """Of all that is summed for the subspaces that are due in one update, at most.

    That is a sketch (rank, side), or by SVD from the second refresh on a full gradient. The first refreshes can meet
    the second ones of a short interval.
    """
    count, gap = run.config.num_hidden_layers * len(run.matrices), run.args.subspace.shortest_interval
    sketches = max(sum(sum_bytes(run, (x.rank, side)) for side in x.sides) for x in run.matrices)
    svd = run.args.subspace.subspace == "svd" and sketches
    later = max(sum_bytes(run, x.shape) for x in run.matrices) if svd else sketches
    return math.ceil(count / first_refresh_spread(count, gap)) * sketches + math.ceil(count / gap) * later
