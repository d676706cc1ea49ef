"""What decides the memory of a run."""

from dataclasses import dataclass

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
    rank: int | None = None
    """Dimension of the subspace of the decoder matrices; None trains them in full."""
    mlp_rank: int = 0
    """That of matrices with a side of `mlp_width`, the MLP's; 0 for the same."""
    mlp_width: int = 0
    proj_type: str = "std"
    """std, reverse_std, left, right or full."""
    proj_bits: int | None = None
    """8 or 4: bits of a projection; None keeps it float."""
    proj_group_size: int = 256
    """Values of a basis vector that share a scale."""
    update_proj_gap: int = 200
    """Updates between two refreshes of a subspace, over which those of all matrices are spread."""
    svd: bool = True
    """Subspaces come from the full gradient of one matrix at a time; False: from a sketch (streaming)."""
    weight_bits: int | None = None
    """8 or 4: bits of a decoder weight; None keeps it float (as --simulation does)."""
    weight_group_size: int = 256
    """Weights of a row that share a scale."""
    int8_products: bool = False
    """Products with 8-bit weights in INT8: activations are rounded for each, and a whole row shares its scale."""
    state_bits: int = 32
    """8 (block-wise), 16 or 32 bits a value of an optimizer state."""
    states: int = 2
    """Optimizer states of the weights' size: 2 for Adam, 1 for momentum, 0 for none."""
    decoder_states: int = 2
    """The same of the decoder matrices."""
    residual: bool = False
    """The last micro-batch's full gradient of a matrix is kept until its update."""
    factored: bool = False
    """Adafactor: of a matrix one value a row and one a column instead."""

    def rank_of(self, shape: Shape) -> int:
        """Of the subspace of a decoder matrix."""
        assert self.rank is not None
        return self.mlp_rank if self.mlp_rank and self.mlp_width in shape else self.rank

    @property
    def gradients_live_in_backward(self) -> bool:
        """Whether each gradient is used up inside the backward pass of its layer."""
        return self.per_layer and self.grad_accum_steps == 1
