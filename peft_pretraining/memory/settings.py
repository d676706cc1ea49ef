"""What decides the memory of a run."""

from dataclasses import dataclass, field

from qgalore.config import SubspaceConfig, WeightFormat

Shape = tuple[int, ...]


@dataclass(frozen=True)
class MemorySettings:
    """What besides the model's shape decides the memory; names and meanings are the flags'."""

    batch_size: int
    """Sequences a micro-batch of this rank."""
    max_length: int
    """Tokens a sequence."""
    ranks: int = 1
    """Processes that sum their gradients."""
    dtype_bytes: int = 2
    """Bytes a float weight or activation: 2 for bfloat16, 4 for float32."""
    cuda: bool = False
    """The run is on a CUDA GPU, whose libraries take workspaces."""
    compiled: bool = False
    """torch.compile runs the decoder layers."""
    cuda_graphs: bool = False
    """CUDA graphs replay the compiled layers; activations then stay, and a backward pass writes over none of them."""
    grad_accum_steps: int = 1
    """Micro-batches an update."""
    grad_accum_dtype: str = "float32"
    """float32, bfloat16 or int8: sums of gradients between micro-batches."""
    per_layer: bool = False
    """Updates inside the backward pass."""
    activation_checkpointing: bool = False
    """Keep one activation a layer and recompute the others."""
    checkpoint_every: int = 1
    """With checkpointing: only in every so many layers, the first of all included."""
    int8_activations: bool = False
    """Layers that are not recomputed round gate and up of the MLP to INT8; compiled ones keep the codes."""
    subspace: SubspaceConfig | None = None
    """That of the decoder matrices; None trains them in full."""
    mlp_rank: int = 0
    """The rank of matrices with a side of `mlp_width`, the MLP's; 0 for that of `subspace`."""
    mlp_width: int = 0
    weight: WeightFormat = field(default_factory=WeightFormat)
    """How a decoder weight is stored."""
    state_bits: int = 32
    """8 (block-wise), 16 or 32 bits a value of an optimizer state."""
    states: int = 2
    """Optimizer states of the weights' size: 2 for Adam, 1 for momentum, 0 for none."""
    decoder_states: int = 2
    """The same of the decoder matrices."""
    factored: bool = False
    """Adafactor: of a matrix one value a row and one a column instead."""

    def rank_of(self, shape: Shape) -> int:
        """Of the subspace of a decoder matrix."""
        assert self.subspace is not None
        return self.mlp_rank if self.mlp_rank and self.mlp_width in shape else self.subspace.rank

    @property
    def svd(self) -> bool:
        """Whether subspaces come from the full gradient of one matrix at a time, not from a sketch (streaming)."""
        return self.subspace is not None and self.subspace.subspace == "svd"

    @property
    def residual(self) -> bool:
        """Whether the last micro-batch's full gradient of a matrix is kept until its update."""
        return self.subspace is not None and self.subspace.residual != "none"

    @property
    def basis_bits(self) -> int | None:
        """Bits of a stored basis; None where it is float."""
        return None if self.subspace is None else self.subspace.basis_bits

    @property
    def gradients_live_in_backward(self) -> bool:
        """Whether each gradient is used up inside the backward pass of its layer."""
        return self.per_layer and self.grad_accum_steps == 1
