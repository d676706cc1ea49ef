"""Optimizers of other projects for `benchmarks/compare.py`, brought onto today's bitsandbytes when they are imported.

    pip install bitsandbytes galore-torch apollo-torch q-galore-torch torchao liger-kernel

Nothing of their code is in this repository (apollo-torch's licence, CC-BY-NC, would not allow it). What is adapted, for
galore-torch 1.0, apollo-torch 1.0.3 and q-galore-torch 1.0 on bitsandbytes 0.49 and 0.50:

- GaLore's and Q-GaLore's 8-bit classes pass `percentile_clipping=100, block_wise=True` to bitsandbytes by position. In
  0.50 these places are `max_unorm` and `skip_zeros`: nothing fails, but updates would be limited and zeros skipped.
  `on_todays_bitsandbytes` switches both off again.
- Q-GaLore's update reads `percentile_clipping` and `block_wise` from its config, where 0.50 has them no more, and calls
  two functions of bitsandbytes without the arguments `beta3` and `alpha` that now stand in the middle.
- q-galore-torch on PyPI has the optimizer alone. The INT8 linear layer that feeds it is only in its repository;
  `Int8Linear` is one that keeps to what the optimizer reads, with the optimizer's own quantization.
- apollo-torch's AdamW needs nothing, nor do torchao's 8-bit AdamW and its float8 training, 0.18, and Liger 0.8.5, whose
  kernels need a GPU.

All of them refresh their projection at the first update and, with the gap given here, never again: the warm-up has the
SVDs, the timed updates have none.
"""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_pretraining.models.build import low_rank_names

NEVER_AGAIN = 10**9  # updates between two refreshes
GROUP_SIZE = 256


def adam8bit(model: nn.Module, rank: int, **adam: Any) -> torch.optim.Optimizer:
    """bitsandbytes' Adam with 8-bit states for all parameters."""
    import bitsandbytes

    return bitsandbytes.optim.Adam8bit(model.parameters(), **adam)


def adamw8bit_torchao(model: nn.Module, rank: int, **adam: Any) -> torch.optim.Optimizer:
    """torchao's AdamW with 8-bit states for all parameters, bfloat16 weights rounded stochastically."""
    from torchao.optim import AdamW8bit

    return AdamW8bit(model.parameters(), weight_decay=0.0, bf16_stochastic_round=True, **adam)


def in_float8(recipe: str) -> Callable[..., torch.optim.Optimizer]:
    """torch's fused AdamW for a model whose decoder matrices torchao multiplies in float8, all three products.

    recipe: of `torchao.float8.Float8LinearConfig`: tensorwise, rowwise, rowwise_with_gw_hp.
    """

    def make(model: nn.Module, rank: int, **adam: Any) -> torch.optim.Optimizer:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        chosen = set(low_rank_names(model))
        config = Float8LinearConfig.from_recipe_name(recipe)
        convert_to_float8_training(model, config=config, module_filter_fn=lambda module, name: name in chosen)
        return torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True, **adam)

    return make


def apply_liger() -> None:
    """Let transformers' LLaMA use Liger's kernels for norms, rotation and SwiGLU from now on; its loss is apart."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(cross_entropy=False, fused_linear_cross_entropy=False)


def liger_loss(model: Any, ignore_index: int) -> Callable[[Tensor], Tensor]:
    """The mean cross-entropy of token ids (B, L) by Liger's fused loss, which makes no logits as a whole."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss, network = LigerFusedLinearCrossEntropyLoss(ignore_index=ignore_index), model._network[0]

    def loss_of(input_ids: Tensor) -> Tensor:
        hidden = network.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        targets = F.pad(input_ids[:, 1:], (0, 1), value=ignore_index)
        found: Tensor = loss(network.get_output_embeddings().weight, hidden.flatten(0, 1), targets.flatten())
        return found

    return loss_of


def galore(model: nn.Module, rank: int, **adam: Any) -> torch.optim.Optimizer:
    """galore-torch's GaLoreAdamW8bit."""
    from galore_torch import GaLoreAdamW8bit

    groups = param_groups(model, rank=rank, update_proj_gap=NEVER_AGAIN, scale=0.25, proj_type="std")
    return on_todays_bitsandbytes(GaLoreAdamW8bit)(groups, weight_decay=0.0, **adam)


def apollo(model: nn.Module, rank: int, **adam: Any) -> torch.optim.Optimizer:
    """apollo-torch's APOLLOAdamW as APOLLO, not APOLLO-Mini: random projections, one factor a channel."""
    from apollo_torch import APOLLOAdamW

    kind = {"proj": "random", "proj_type": "std", "scale_type": "channel", "scale": 1.0}
    return APOLLOAdamW(param_groups(model, rank=rank, update_proj_gap=NEVER_AGAIN, **kind), **adam)


def q_galore(model: nn.Module, rank: int, **adam: Any) -> torch.optim.Optimizer:
    """q-galore-torch's QGaLoreAdamW8bit for a model whose matrices `convert_to_int8` has converted."""
    return q_galore_class()(param_groups(model, **_q_galore_keys(rank)), weight_decay=0.0, **adam)


class QGaLorePerLayer:
    """q-galore-torch's optimizer, one a matrix, run inside the backward pass.

    As in the project's per-layer mode nothing else trains: embeddings, head and norms get gradients that no one uses.
    Every micro-batch is an update.
    """

    def __init__(self, model: nn.Module, rank: int, **adam: Any) -> None:
        """Register a hook on each matrix that `convert_to_int8` has converted."""
        optimizer_class = q_galore_class()
        self._optimizers: dict[nn.Parameter, torch.optim.Optimizer] = {}
        for weight in matrices(model):
            group = {"params": [weight]} | _q_galore_keys(rank)
            self._optimizers[weight] = optimizer_class([group], weight_decay=0.0, **adam)
            weight.after_grad = self._update

    def _update(self, weight: nn.Parameter) -> None:
        self._optimizers[weight].step()
        self._optimizers[weight].zero_grad()

    def step(self) -> None:
        """Do nothing: the updates were made in the backward pass."""

    def zero_grad(self) -> None:
        """Do nothing, as `step`."""


def _q_galore_keys(rank: int) -> dict[str, Any]:
    quantization = {"quant": True, "quant_n_bit": 4, "quant_group_size": GROUP_SIZE}
    lazy = {"cos_threshold": 0.4, "gamma_proj": 2, "queue_size": 5}
    return {"rank": rank, "update_proj_gap": NEVER_AGAIN, "scale": 0.25, "proj_type": "std"} | quantization | lazy


def matrices(model: nn.Module) -> list[nn.Parameter]:
    """The weights of the decoder's linear layers."""
    return [model.get_submodule(name).weight for name in low_rank_names(model)]


def param_groups(model: nn.Module, **low_rank_keys: Any) -> list[dict[str, Any]]:
    """Embeddings, head and norms; the decoder's matrices with the keys that make them low-rank."""
    low_rank = matrices(model)
    known = {id(weight) for weight in low_rank}
    others = [param for param in model.parameters() if id(param) not in known]
    return [{"params": others}, {"params": low_rank} | low_rank_keys]


def on_todays_bitsandbytes(optimizer_class: type) -> Any:
    """A subclass whose options in bitsandbytes are the ones that its author set."""

    class Adapted(optimizer_class):
        def __init__(self, *args: Any, **keywords: Any) -> None:
            super().__init__(*args, **keywords)
            self.args.max_unorm, self.args.skip_zeros = 0.0, False

        def get_config(self, *args: Any) -> dict[str, Any]:
            return {"percentile_clipping": 100, "block_wise": True} | super().get_config(*args)

    return Adapted


def q_galore_class() -> Any:
    """q-galore-torch's optimizer class, calling today's functions of bitsandbytes."""
    import bitsandbytes.functional
    from q_galore_torch import q_galore_adamw8bit

    names = ("optimizer_update_32bit", "optimizer_update_8bit_blockwise")
    adapted = {name: _without_beta3_and_alpha(getattr(bitsandbytes.functional, name)) for name in names}
    q_galore_adamw8bit.F = SimpleNamespace(**adapted)
    return on_todays_bitsandbytes(q_galore_adamw8bit.AdamW8bit)


def _without_beta3_and_alpha(update: Callable[..., None]) -> Callable[..., None]:
    index = list(inspect.signature(update).parameters).index("beta3")

    def call(*args: Any, **keywords: Any) -> None:
        update(*args[:index], 0.0, 0.0, *args[index:], **keywords)

    return call


class Int8Linear(nn.Module):
    """A linear layer over INT8 codes whose gradient lies where QGaLoreAdamW8bit looks for it.

    The optimizer reads `scales`, `zeros`, `group_size`, `stochastic_round` and `float_grad` of the weight itself, which
    cannot have a gradient of its own, being an integer.
    """

    def __init__(self, linear: nn.Linear) -> None:
        """Quantize the weight of a layer without bias."""
        super().__init__()
        from q_galore_torch import QGaLoreAdamW8bit

        # These two methods of the class use nothing of an instance.
        self._dequantize = QGaLoreAdamW8bit._dequantize
        codes, scales, zeros = QGaLoreAdamW8bit._quantize(None, linear.weight.data, q_group_size=GROUP_SIZE)
        self.weight = nn.Parameter(codes, requires_grad=False)  # (out_features, in_features) uint8
        self.weight.scales, self.weight.zeros, self.weight.group_size = scales, zeros, GROUP_SIZE
        self.weight.stochastic_round, self.weight.float_grad, self.weight.after_grad = True, None, None

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight as floats."""
        weight = self.weight
        return self._dequantize(None, weight.data, dtype, weight.group_size, weight.scales, weight.zeros)

    def forward(self, x: Tensor) -> Tensor:
        return _Int8Product.apply(x, self)


class _Int8Product(torch.autograd.Function):
    """x times a dequantized weight, which is dequantized again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Int8Linear) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        return F.linear(x, layer.dequantize(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,), weight = ctx.saved_tensors, ctx.layer.weight
        grad_x = grad @ ctx.layer.dequantize(x.dtype)
        weight_grad = grad.flatten(0, -2).t() @ x.flatten(0, -2)
        if weight.float_grad is None:
            weight.float_grad = weight_grad
        else:
            weight.float_grad += weight_grad
        if weight.after_grad is not None:
            weight.after_grad(weight)
        return grad_x, None


def convert_to_int8(model: nn.Module, name: str) -> None:
    """Convert a decoder matrix to INT8; a callback for `build_model`."""
    linear = model.get_submodule(name)
    if isinstance(linear, nn.Linear) and name.startswith("model.layers."):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Int8Linear(linear))


def versions(*names: str) -> str:
    """The versions of installed packages, for a row of results."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
