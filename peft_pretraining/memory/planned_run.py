"""What decides the memory of a run, asked of its flags and of the model's configuration."""

from __future__ import annotations

import math
from functools import lru_cache
from importlib.util import find_spec

import torch

from peft_pretraining.build import compiles_layers
from peft_pretraining.config.checks import needs_own_adam8bit
from peft_pretraining.config.flag_groups import LIBRARY_OPTIMIZERS, SubspaceArgs
from peft_pretraining.config.run_config import RunArgs
from peft_pretraining.models.config import ModelConfig, is_of_mlp
from peft_pretraining.models.registry import family_of
from peft_pretraining.optim.layer_execution import Execution, execution_of
from qgalore.config import SubspaceConfig
from qgalore.sharding.deal import Load, deals_rows


class Matrix:
    """A decoder matrix (m, n) as its updates see it: sizes are numbers of values."""

    def __init__(self, shape: tuple[int, int], subspace: SubspaceConfig | None) -> None:
        """subspace: None where the matrix is trained in full, and nothing is projected."""
        names = subspace.sides(shape) if subspace else ()
        self.shape, self.sides = shape, tuple(shape[0 if name == "left" else 1] for name in names)
        self.rank = subspace.dimensions if subspace and names else 0
        self.gradient_shape = subspace.gradient_shape(shape) if subspace else shape
        self.size, self.gradient = math.prod(shape), math.prod(self.gradient_shape)
        self.bases = self.rank * sum(self.sides)
        self.residual = self.size if subspace and subspace.residual != "none" else 0
        """Of the full gradient that is kept beside the projected one until the update."""


class PlannedRun:
    """A run of which the memory is planned: on a CUDA GPU, unless `--device cpu` is given."""

    def __init__(self, args: RunArgs, config: ModelConfig) -> None:
        """config: that of `--model_config`."""
        self.args, self.config = args, config
        self.tokens = args.batch.batch_size * args.batch.max_length  # of a micro-batch
        self.dtype: torch.dtype = getattr(torch, args.model.dtype)
        self.cuda = args.runtime.device != "cpu"
        self.compiled = compiles_layers(args.model, pays=self.cuda) and _family_compiles(config)
        execution = execution_of(args, can_replay=self.compiled and self.cuda)
        self.graphs = execution is Execution.FROM_GRAPHS
        """Whether CUDA graphs run the layers."""
        self.updates_whole_layers = execution is not Execution.IN_NETWORK
        """Whether the matrices of a layer are updated together where they are in the backward pass."""
        optimizer, alone = args.optimizer, args.batch.gradient_accumulation == 1
        # A gradient that comes alone keeps its dtype, unless its sum is to be INT8.
        keeps = optimizer.optimizer in LIBRARY_OPTIMIZERS or (alone and optimizer.grad_accum_dtype != "int8")
        self.sum_dtype: torch.dtype = self.dtype if keeps else getattr(torch, optimizer.grad_accum_dtype)
        self.shards = args.world_size if args.runtime.shard != "none" else 1
        """Ranks to which optimizer states are dealt; 1 where each has all."""
        table = Load("", config.vocab_size * config.hidden_size, cost=0.0, divisible=True)
        is_dealt = self.shards > 1 and optimizer.optimizer not in LIBRARY_OPTIMIZERS
        self.deals_tables = is_dealt and deals_rows(table, self.shards)
        """Whether a rank has the moments of some rows of embeddings and head."""
        self.gathers_tables = self.deals_tables and args.gathers_layers and _family_brings_tables(config)
        """Whether a rank has its rows alone of embeddings and head, but for the moments in which a pass reads them."""
        rank = args.subspace.rank
        self.rank_of_factors = rank if args.method.method != "full" and isinstance(rank, int) else 0
        """Of the factors or adapters of each matrix; 0 without."""
        self.dropped_values, self.dropout_masks = self._dropout() if args.method.lora_dropout else (0, 0)
        """What dropout before adapters keeps of a token in a layer: values of their inputs, and bytes of masks."""
        self.by_bitsandbytes = optimizer.by_bitsandbytes or self._chooses_bitsandbytes()
        """Whether bitsandbytes makes the updates."""
        self.matrices = self.matrices_of(args.subspace)
        """The matrices of one layer; where ranks differ by depth, of a layer with the largest."""

    def _chooses_bitsandbytes(self) -> bool:
        """Whether --adam8bit_backend auto would be that on a GPU of this machine's environment."""
        auto = (self.args.optimizer.optimizer, self.args.optimizer.adam8bit_backend) == ("adam8bit", "auto")
        return auto and self.cuda and not needs_own_adam8bit(self.args) and find_spec("bitsandbytes") is not None

    def _dropout(self) -> tuple[int, int]:
        inputs = {name: shape[1] for name, shape in self.config.matrix_shapes().items()}
        # A compiled layer computes masks again in its backward pass, but those of what it computes from a norm.
        of_norms = [size for name, size in inputs.items() if not name.endswith(("o_proj", "down_proj"))]
        return sum(inputs.values()), sum(of_norms) if self.compiled else 0

    def matrices_of(self, subspace: SubspaceArgs) -> tuple[Matrix, ...]:
        """Those of one layer with these options."""
        return _matrices(subspace if self.args.optimizer.is_low_rank else None, self.config)


# A planner asks for hundreds of runs of one model, which differ in other flags.


@lru_cache(maxsize=256)
def _matrices(args: SubspaceArgs | None, config: ModelConfig) -> tuple[Matrix, ...]:
    subspace, of_mlp = (args.config(), args.config(of_mlp=True)) if args else (None, None)
    shapes = config.matrix_shapes().items()
    return tuple(Matrix(shape, of_mlp if is_of_mlp(name) else subspace) for name, shape in shapes)


@lru_cache(maxsize=256)
def _family_brings_tables(config: ModelConfig) -> bool:
    return family_of(config).brings_tables


@lru_cache(maxsize=256)
def _family_compiles(config: ModelConfig) -> bool:
    return family_of(config).compiles_layers
