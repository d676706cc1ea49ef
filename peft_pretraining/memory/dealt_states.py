"""Bytes of weights and optimizer states on each rank where they are dealt to ranks: `--shard`."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from peft_pretraining.build import model_on_meta, shape_of
from peft_pretraining.config.flag_groups import LIBRARY_OPTIMIZERS
from peft_pretraining.config.run_config import RunArgs
from peft_pretraining.memory.planned_run import PlannedRun
from peft_pretraining.models.build import matrix_shapes
from peft_pretraining.models.config import is_of_mlp
from peft_pretraining.models.network import CausalLM
from peft_pretraining.optim.build import states_on_meta
from qgalore.sharding.deal import Load, cost_of, deal, deals_rows, row_ranges
from qgalore.sharding.mesh import ShardMesh
from qgalore.update.gradient_sum import zeros
from qgalore.update.weight import is_of_subspace


class DealtWeight(NamedTuple):
    """A weight of the whole model, in bytes; the layer is None for what is in none."""

    load: Load
    shape: tuple[int, ...]
    layer: int | None
    is_matrix: bool
    """Whether it is a decoder matrix."""
    states: int
    """The moments."""
    stored: int
    """The weight, and the bases of its subspace."""
    sums: int
    """The sum of its gradients over micro-batches."""

    def bytes_of(self, size: int, rank: int, owner: int, ranks: int) -> int:
        """Of `size`, that of the whole, what one of so many ranks has."""
        if not deals_rows(self.load, ranks):
            return size if rank == owner else 0
        start, stop = row_ranges(self.shape, ranks)[rank]
        return size * (stop - start) // self.shape[0]


class RankBytes(NamedTuple):
    """What a rank has of that which is dealt."""

    matrix_states: int
    other_states: int
    stored: int = 0
    """Matrices of the decoder and the bases of their subspaces, with `--shard full`."""
    gathered: int = 0
    """Room for those that other ranks own, of two layers."""
    rows: int = 0
    """Of embeddings and head, with `--shard full`."""
    sums: int = 0
    """Of gradients, where the owner of a weight alone has one."""

    @property
    def states(self) -> int:
        """Of optimizer states."""
        return self.matrix_states + self.other_states


def dealt_weights(run: PlannedRun) -> list[DealtWeight]:
    """All weights that are trained, in an order of param groups: embeddings, head and norms, then matrices by layer."""
    args, config = run.args, run.config
    model = model_on_meta(args, config)
    in_layer = set(model.decoder_layers.parameters())
    shapes = matrix_shapes(model) if args.method.method == "full" else {}  # factors are parameters as others are
    matrices = {model.get_submodule(name).get_parameter("weight"): name for name in shapes}
    low_rank, library = args.optimizer.is_low_rank, args.optimizer.optimizer in LIBRARY_OPTIMIZERS
    rest: list[DealtWeight] = []
    found: list[DealtWeight] = []
    subspaces = args.subspace.by_depth(config.num_hidden_layers)
    of_subspace = {each: states_on_meta(model, args.optimizer, each) for each in dict.fromkeys(subspaces)}
    for layer, subspace in enumerate(subspaces):
        states = of_subspace[subspace]
        for name, param in model.named_parameters():
            if param not in states or (layer and param not in in_layer):
                continue
            path = matrices.get(param)
            shape = gradient = tuple(param.shape) if path is None else shapes[path]
            if path is not None and low_rank:  # another optimizer may have options that it does not read
                options = subspace.config(is_of_mlp(name))
                gradient = options.gradient_shape(shape) if options.sides(shape) else gradient
            sizes = [(key, x.nbytes) for key, x in states[param].items() if x.is_meta]
            own = sum(size for key, size in sizes if not is_of_subspace(key))
            stored = _stored(model, path, param) + sum(size for key, size in sizes if "_basis" in key)
            sums = zeros(torch.Size(gradient), run.sum_dtype, torch.device("meta")).nbytes
            values, is_vector = math.prod(shape), len(shape) < 2
            cost, number = cost_of(values, math.prod(gradient)), layer if param in in_layer else None
            divisible = number is None and not library and not is_vector
            load = Load(_in_layer(name, layer), values, values if library else cost, is_vector, divisible)
            is_summed = not run.args.updates_immediately and not (path is not None and args.sums_in_momentum)
            weight = DealtWeight(load, shape, number, path is not None, own, stored, sums if is_summed else 0)
            (rest if path is None else found).append(weight)
    return rest + found


def _stored(model: CausalLM, path: str | None, param: Tensor) -> int:
    """Bytes of a weight with its scales."""
    module: nn.Module | None = None if path is None else model.get_submodule(path)
    scales = [] if module is None else list(module.buffers(recurse=False))
    return param.nbytes + sum(buffer.nbytes for buffer in scales)


def _in_layer(name: str, layer: int) -> str:
    """The name that a parameter of the first layer has in another one."""
    return name.replace(".0.", f".{layer}.", 1)


def owners_by_name(args: RunArgs, ranks: int) -> dict[str, int]:
    """The rank that owns each parameter of a run's model, by its name; empty for a model that only transformers knows.

    It is known before the model is built, so that no rank ever has more than its part.
    """
    if (config := shape_of(args.model)) is None:
        return {}
    weights = dealt_weights(PlannedRun(args, config))
    loads = [weight.load for weight in weights]
    return {load.name: owner for load, owner in zip(loads, deal(loads, ranks), strict=True)}


def looked_up_by_name(args: RunArgs) -> dict[str, int]:
    """`ShardMesh.looked_up` of a run: of embeddings, by name, the tokens of what a rank sends; none of a tied head."""
    config = shape_of(args.model)
    if config is None or config.tie_word_embeddings:
        return {}
    modules = model_on_meta(args, config).named_modules()
    return {f"{name}.weight": args.tokens_sent_at_once for name, each in modules if isinstance(each, nn.Embedding)}


def prepare_mesh(mesh: ShardMesh, args: RunArgs) -> None:
    """Tell a mesh what is known of a run before its model is built."""
    mesh.owners, mesh.owners_sum = owners_by_name(args, mesh.size), args.owners_sum
    mesh.looked_up = looked_up_by_name(args)


def bytes_by_rank(run: PlannedRun, ranks: int) -> list[RankBytes]:
    """What each of so many ranks has."""
    weights = dealt_weights(run)
    owners = deal([weight.load for weight in weights], ranks)
    return [_of_rank(run, list(zip(weights, owners, strict=True)), rank, ranks) for rank in range(ranks)]


def _of_rank(run: PlannedRun, dealt: list[tuple[DealtWeight, int]], rank: int, ranks: int) -> RankBytes:
    def total(field: str, matrices: tuple[bool, ...]) -> int:
        chosen = [(weight, owner) for weight, owner in dealt if weight.is_matrix in matrices]
        return sum(weight.bytes_of(getattr(weight, field), rank, owner, ranks) for weight, owner in chosen)

    states = total("states", (True,)), total("states", (False,))
    sums = total("sums", (True, False)) if run.args.owners_sum else 0
    if run.args.runtime.shard != "full":
        return RankBytes(*states, sums=sums)
    elsewhere = [0] * run.config.num_hidden_layers
    for weight, owner in dealt:
        if weight.is_matrix and weight.layer is not None and owner != rank:
            elsewhere[weight.layer] += weight.stored
    tables = [weight for weight, _ in dealt if is_table(run, weight)]
    rows = sum(weight.bytes_of(weight.stored, rank, rank, ranks) for weight in tables)
    return RankBytes(*states, total("stored", (True,)), 2 * max(elsewhere), rows, sums)


def is_table(run: PlannedRun, weight: DealtWeight) -> bool:
    """Whether a weight is of embeddings and head, of which a rank has its rows alone between passes."""
    return run.gathers_tables and not weight.is_matrix and deals_rows(weight.load, run.shards)


def fullest(ranks: list[RankBytes]) -> RankBytes:
    """The rank with most bytes."""
    return max(ranks, key=sum)
