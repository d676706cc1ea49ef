"""A network as building, optimizers and CUDA graphs see it: the base class of every family's."""

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from peft_pretraining.errors import UserError
from peft_pretraining.models.config import NetworkConfig
from peft_pretraining.models.head import CausalLMOutput
from qgalore.config import FLOAT_PRODUCTS


class LayerRunner(Protocol):
    """Runs all layers in training instead of a loop over them, as `qgalore.graphs.runner.LayerGraphs` does."""

    def __call__(self, x: Tensor, *constants: Tensor) -> Tensor:
        """x (B, L, hidden_size) through all layers; constants are further arguments of each, such as rotary tables."""

    def graph_pool(self) -> AbstractContextManager[None]:
        """Within it, what is gone before the backward pass of the layers may take the memory of that pass."""


class Tables(Protocol):
    """Brings embeddings and head where a pass reads them, as `qgalore.sharding.tables.Tables` does."""

    def whole(self, table: Tensor) -> AbstractContextManager[bool]:
        """Within it a table has all its rows; gives whether its memory may be written over when nobody reads it any
        more."""

    def unread(self, table: Tensor) -> AbstractContextManager[None]:
        """Within it a look-up is made for its backward pass alone, and whatever it reads will do."""

    def store(self, table: Tensor, values: Tensor) -> bool:
        """Give a table values (rows, columns); False for a parameter that is none of these."""


class TablesHere:
    """Tables that are always there."""

    def whole(self, table: Tensor) -> AbstractContextManager[bool]:
        """See `Tables`."""
        return nullcontext(False)

    def unread(self, table: Tensor) -> AbstractContextManager[None]:
        """See `Tables`."""
        return nullcontext()

    def store(self, table: Tensor, values: Tensor) -> bool:
        """See `Tables`."""
        return False


class CausalLM(nn.Module):
    """A causal language model.

    A subclass sets `config`, names its decoder matrices and defines `forward`. Of the other methods it overrides those
    of which its `ModelFamily` says so. Parameters have the names of transformers' class of the same model_type, if
    checkpoints shall be exported to it.
    """

    config: NetworkConfig
    layers_name: str = "model.layers"
    """Where its decoder layers are, an nn.ModuleList."""
    matrix_names: tuple[str, ...] = ()
    """The last parts of the names of a layer's matrices: linear layers that are trained in a subspace and may be
    quantized; a bias trains in full rank. --mlp_rank is for those in a module called mlp."""
    padded_outputs: tuple[str, ...] = ()
    """Of these, those whose output only other linear layers and functions of single elements read: it may stay padded
    at the end of each row."""

    table_names: tuple[str, str] = ("", "")
    """The weights of the embeddings and of the head, of which a checkpoint of a model that ties them has one."""
    head_products: int = FLOAT_PRODUCTS
    """What a loss with gradients multiplies, as `WeightFormat.products` has it."""
    ignored_names: tuple[str, ...] = (r"rotary_emb\.inv_freq$",)
    """Patterns of names in other programs' checkpoints of this architecture that are no weights of it."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> CausalLMOutput:
        """input_ids, labels (B, L); without labels the logits, with them the float32 sum of the loss.

        labels are not shifted yet: the target of position i is labels[:, i + 1], and -100 is not a target.
        """
        raise NotImplementedError

    # ---- a forward pass in parts: of a family that says `runs_by_layer`

    def embed(self, input_ids: Tensor) -> Tensor:
        """The input (B, L, hidden_size) of the first decoder layer for input_ids (B, L)."""
        raise NotImplementedError

    def layer_constants(self, length: int) -> tuple[Tensor, ...]:
        """The arguments of each layer beside its input, for sequences of so many tokens, such as rotary tables."""
        raise NotImplementedError

    def head_loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """The float32 sum () of the loss of `forward`, from the output x (B, L, hidden_size) of the last layer."""
        raise NotImplementedError

    # ----

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator, std: float) -> Tensor:
        """The float32 values on the CPU that the parameter of this dotted name starts with.

        As transformers initialises LLaMA: biases zero, norms one, matrices normal with standard deviation `std`.
        """
        if name.endswith(".bias"):
            return torch.zeros(shape)
        return torch.ones(shape) if len(shape) == 1 else torch.empty(shape).normal_(0.0, std, generator=generator)

    @property
    def decoder_layers(self) -> nn.ModuleList:
        """The decoder layers."""
        layers = self.get_submodule(self.layers_name)
        assert isinstance(layers, nn.ModuleList)
        return layers

    def is_decoder_matrix(self, name: str) -> bool:
        """Whether the module of this dotted name is a decoder matrix."""
        return name.startswith(f"{self.layers_name}.") and name.rpartition(".")[2] in self.matrix_names

    def pads_output(self, name: str) -> bool:
        """Whether the output of the decoder matrix of this dotted name may stay padded."""
        return name.rpartition(".")[2] in self.padded_outputs

    def recomputes(self, name: str) -> bool:
        """Whether the decoder matrix of this dotted name reads an activation that is computed again."""
        return False

    def gradient_checkpointing_enable(self, layers: Collection[int] | None = None) -> None:
        """From now on keep the input alone of each layer, or of those with these indices, and compute the rest again.

        To be called before the decoder matrices are converted, which are made for the one or the other.
        """
        raise UserError(f"{type(self).__name__} cannot recompute its layers: leave --activation_checkpointing out")

    def recompute(self, counts: Mapping[str, int]) -> None:
        """From now on compute tensors again in the backward pass: each name of `ACTIVATIONS` in so many first layers.

        To be called before the decoder matrices are converted, too.
        """
        raise UserError(f"{type(self).__name__} cannot recompute single tensors: leave --recompute out")

    def keep_int8_activations(self) -> None:
        """From now on keep the widest activations of each layer in INT8, but for what is recomputed anyway."""
        raise UserError(f"{type(self).__name__} keeps its activations as they are: leave --int8_activations out")

    def multiply_head_in_fp8(self, products: int) -> None:
        """From now on multiply in FP8 where the head's loss has gradients: `head_products`, for `head_output`."""
        raise UserError(
            f"{type(self).__name__} computes its loss otherwise than by `head_output`: leave --fp8_head out"
        )

    def compile_layers(self) -> None:
        """From now on run training through `torch.compile`, one decoder layer at a time; nothing where it cannot."""

    @property
    def compiled_layer(self) -> Callable[..., Tensor] | None:
        """Runs a decoder layer: its arguments are the layer and those of its forward. None before `compile_layers`."""
        return None

    def run_layers_by(self, runner: LayerRunner) -> None:
        """From now on `runner` takes the layers' place in training; only of a network that has a `compiled_layer`."""
        raise NotImplementedError

    @property
    def tables(self) -> Tables:
        """What brings embeddings and head where a pass reads them."""
        return TablesHere()

    def bring_tables_by(self, tables: Tables) -> None:
        """From now on read embeddings and head within `tables.whole` alone; of a family that says `brings_tables`."""
        raise NotImplementedError
