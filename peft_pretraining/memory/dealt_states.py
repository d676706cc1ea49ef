"""Bytes of optimizer states on each rank where weights are dealt to ranks: `--shard`."""

from __future__ import annotations

from typing import NamedTuple

from peft_pretraining.build import model_on_meta
from peft_pretraining.config.flag_groups import LIBRARY_OPTIMIZERS
from peft_pretraining.memory.planned_run import PlannedRun
from peft_pretraining.models.build import low_rank_names, matrix_shapes
from peft_pretraining.models.config import is_of_mlp
from peft_pretraining.optim.build import states_on_meta
from qgalore.sharding.deal import Load, cost_of, deal, deals_rows, row_ranges
from qgalore.update.weight import is_of_subspace


class DealtWeight(NamedTuple):
    """A weight of the whole model."""

    load: Load
    is_matrix: bool
    """Whether it is a decoder matrix."""
    states: int
    """Bytes of what its owner alone has: the moments."""
    shape: tuple[int, ...]

    def bytes_of(self, rank: int, owner: int, ranks: int) -> int:
        """Of its states on one of so many ranks."""
        if not deals_rows(self.load, ranks):
            return self.states if rank == owner else 0
        start, stop = row_ranges(self.shape, ranks)[rank]
        return self.states * (stop - start) // self.shape[0]


def dealt_weights(run: PlannedRun) -> list[DealtWeight]:
    """All weights that are trained, in an order of param groups: embeddings, head and norms, then matrices by layer."""
    args, config = run.args, run.config
    model = model_on_meta(args, config)
    in_layer, shapes = set(model.decoder_layers.parameters()), matrix_shapes(model)
    matrices = {model.get_submodule(name).get_parameter("weight"): name for name in low_rank_names(model)}
    low_rank, library = args.optimizer.is_low_rank, args.optimizer.optimizer in LIBRARY_OPTIMIZERS
    rest: list[DealtWeight] = []
    found: list[DealtWeight] = []
    for layer, subspace in enumerate(args.subspace.by_depth(config.num_hidden_layers)):
        states = states_on_meta(model, args.optimizer, subspace)
        for name, param in model.named_parameters():
            if param not in states or (layer and param not in in_layer):
                continue
            path = matrices.get(param)
            shape = tuple(param.shape) if path is None else shapes[path]
            values = gradient = _product(shape)
            options = subspace.config(is_of_mlp(name))
            if path is not None and low_rank and options.sides(shape):
                gradient = _product(options.gradient_shape(shape))
            bytes_of = {key: x.nbytes for key, x in states[param].items() if x.is_meta}
            cost, divisible = values if library else cost_of(values, gradient), path is None and not library
            is_vector = len(shape) < 2
            load = Load(_in_layer(name, layer), values, cost, is_vector, divisible and not is_vector)
            own = sum(size for key, size in bytes_of.items() if not is_of_subspace(key))
            (rest if path is None else found).append(DealtWeight(load, path is not None, own, shape))
    return rest + found


def states_by_rank(run: PlannedRun, ranks: int) -> list[tuple[int, int]]:
    """(bytes of the moments of decoder matrices, of all others) on each of so many ranks."""
    weights, found = dealt_weights(run), [[0, 0] for _ in range(ranks)]
    for weight, owner in zip(weights, deal([weight.load for weight in weights], ranks), strict=True):
        for rank in range(ranks):
            found[rank][not weight.is_matrix] += weight.bytes_of(rank, owner, ranks)
    return [(matrices, others) for matrices, others in found]


def _product(shape: tuple[int, ...]) -> int:
    values = 1
    for size in shape:
        values *= size
    return values


def _in_layer(name: str, layer: int) -> str:
    """The name that a parameter of the first layer has in another one."""
    return name.replace(".0.", f".{layer}.", 1)
