"""Optimizers by name: the one place where the names of `--optimizer` are matched.

Every optimizer that comes out of here has the same few methods (`TrainingOptimizer`), so the training loop has no
branch on its kind. The Adam family is one class of `qgalore`, since it rounds bfloat16 weights stochastically:
torch's AdamW on bfloat16 weights loses every update smaller than 1/512 of a weight. On float32 weights the two agree.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from peft_pretraining.arg_groups import LIBRARY_OPTIMIZERS, OptimizerArgs, QuantizationArgs, SubspaceArgs
from peft_pretraining.args import RunArgs
from peft_pretraining.model import low_rank_names
from peft_pretraining.modeling_llama import LlamaForCausalLM, LlamaMLP
from qgalore import GaLoreAdamW, GaLoreAdamW8bit, LowRankLinear, QGaLoreAdamW8bit, WeightFormat, low_rank_param_groups
from qgalore.kernels import reads_numbers
from qgalore.layer_graphs import LayerGraphs
from qgalore.optimizer import LowRankAdamW
from qgalore.rank_sum import AllReduce

_ADAM_FAMILY = {
    "adam": GaLoreAdamW,
    "adamw": GaLoreAdamW,
    "adam8bit": GaLoreAdamW8bit,
    "galore_adamw": GaLoreAdamW,
    "galore_adamw8bit": GaLoreAdamW8bit,
    "galore_adamw8bit_per_layer": GaLoreAdamW8bit,
    "q_galore_adamw8bit": QGaLoreAdamW8bit,
    "q_galore_adamw8bit_per_layer": QGaLoreAdamW8bit,
}


class TrainingOptimizer(Protocol):
    """What the training loop needs of an optimizer."""

    is_last_micro_batch: bool

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of parameters with their hyperparameters."""

    def grad_norm(self) -> Tensor:
        """Norm of the whole gradient of the update, over all ranks."""

    def clip_grad_norm_(self, max_norm: float) -> None:
        """Scale the gradients so that their norm is at most max_norm."""

    def step(self) -> Any:
        """Update what the backward pass has not updated already; nothing where the gradient is not finite."""

    def skip_update_if(self, flag: Tensor) -> None:
        """Change nothing in this update where flag, a bool on the device that all ranks share, is true."""

    def skipped(self) -> Tensor:
        """Whether the last update was skipped, as a bool on the device."""

    def partly_made(self) -> Tensor:
        """Whether it was skipped too late, after some weights had been updated; as a bool on the device."""

    def zero_grad(self) -> None:
        """Forget the gradients."""

    def state_dict(self) -> dict[str, Any]:
        """The state, as tensors and plain values."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state up again."""

    def subspace_metrics(self) -> dict[str, float | Tensor]:
        """Metrics of the low-rank subspaces, if there are any."""


class LibraryOptimizer:
    """An optimizer of another library: its gradients are summed over the ranks when the last micro-batch is in."""

    def __init__(self, optimizer: torch.optim.Optimizer | OptimizerPair, all_reduce: AllReduce | None) -> None:
        """Watches the parameters of `optimizer` with hooks if there is something to sum."""
        self._optimizer, self._skipped = optimizer, torch.zeros((), dtype=torch.bool)
        self._skip: Tensor | None = None
        self._norm: Tensor | None = None
        self.is_last_micro_batch = True
        self.state_dict, self.load_state_dict = optimizer.state_dict, optimizer.load_state_dict
        if all_reduce is not None:
            for param in self._parameters():
                param.register_post_accumulate_grad_hook(self._sum_hook(all_reduce))

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The library's groups; loading a state replaces them."""
        return self._optimizer.param_groups

    def zero_grad(self) -> None:
        """See `TrainingOptimizer`."""
        self._optimizer.zero_grad()
        self._norm = self._skip = None

    def _parameters(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _sum_hook(self, all_reduce: AllReduce) -> Callable[[Tensor], None]:
        optimizer = weakref.ref(self)  # a hook that held it would keep it, and the weights, forever

        def hook(param: Tensor) -> None:
            owner = optimizer()
            if owner is not None and owner.is_last_micro_batch and param.grad is not None:
                waiting = all_reduce(param.grad)
                if waiting is not None:
                    waiting.wait()

        return hook

    def grad_norm(self) -> Tensor:
        """Norm of the gradient before clipping; read it before `zero_grad`."""
        if self._norm is not None:
            return self._norm
        grads = [param.grad for param in self._parameters() if param.grad is not None]
        return torch.nn.utils.get_total_norm(grads) if grads else torch.zeros(())

    def step(self) -> None:
        """See `TrainingOptimizer`; waits for the device, since these libraries cannot skip on it."""
        self._skipped = ~self.grad_norm().isfinite()
        if self._skip is not None:
            self._skipped = self._skipped | self._skip
        if not self._skipped:
            self._optimizer.step()

    def skip_update_if(self, flag: Tensor) -> None:
        """See `TrainingOptimizer`."""
        self._skip = flag

    def skipped(self) -> Tensor:
        """See `TrainingOptimizer`."""
        return self._skipped

    def partly_made(self) -> Tensor:
        """Never: the whole gradient is known before the update."""
        return torch.zeros_like(self._skipped)

    def clip_grad_norm_(self, max_norm: float) -> None:
        """See `TrainingOptimizer`."""
        self._norm = torch.nn.utils.clip_grad_norm_(self._parameters(), max_norm)

    def subspace_metrics(self) -> dict[str, float | Tensor]:
        """No subspaces."""
        return {}


class OptimizerPair:
    """Two optimizers of other parameters that look like one."""

    def __init__(self, first: torch.optim.Optimizer, second: torch.optim.Optimizer) -> None:
        """Parameters are numbered through in this order."""
        self._both = (first, second)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of both."""
        return [group for optimizer in self._both for group in optimizer.param_groups]

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for optimizer in self._both:
            optimizer.zero_grad()

    def step(self) -> None:
        """An update of all parameters."""
        for optimizer in self._both:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """As of one optimizer."""
        first, second = (optimizer.state_dict() for optimizer in self._both)
        count = sum(len(group["params"]) for group in first["param_groups"])
        state = first["state"] | {count + index: value for index, value in second["state"].items()}
        moved = [group | {"params": [count + index for index in group["params"]]} for group in second["param_groups"]]
        return {"state": state, "param_groups": first["param_groups"] + moved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What `state_dict` gave."""
        groups = list(state_dict["param_groups"])
        for optimizer in self._both:
            own = [groups.pop(0) for _ in optimizer.param_groups]
            ids = {each for group in own for each in group["params"]}
            state = {key: value for key, value in state_dict["state"].items() if key in ids}
            optimizer.load_state_dict({"state": state, "param_groups": own})


def weight_format(quantization: QuantizationArgs) -> WeightFormat:
    """How the decoder's matrices are stored."""
    return WeightFormat(
        bits=quantization.weight_bits if quantization.weight_quant else None,
        group_size=quantization.weight_group_size,
        stochastic_rounding=quantization.stochastic_round or not quantization.weight_quant,
        simulate=quantization.simulation,
        int8_products=quantization.int8_products,
    )


def low_rank_converter(optimizer: OptimizerArgs, quantization: QuantizationArgs) -> Callable[[nn.Module, str], None]:
    """For `build_model`: turns each decoder matrix into its stored form as soon as it exists."""
    format = weight_format(quantization)

    def convert(model: nn.Module, name: str) -> None:
        linear = model.get_submodule(name)
        if optimizer.is_low_rank and isinstance(linear, nn.Linear) and name.startswith("model.layers."):
            parent, _, child = name.rpartition(".")
            layer = LowRankLinear.from_linear(linear, format)
            # Between the three matrices of our own MLP a ragged width stays padded: nothing is copied there.
            layer.pads_output = isinstance(model.get_submodule(parent), LlamaMLP) and child != "down_proj"
            setattr(model.get_submodule(parent), child, layer)

    return convert


def build_optimizer(
    model: nn.Module,
    args: OptimizerArgs,
    quantization: QuantizationArgs,
    subspace: SubspaceArgs,
    seed: int,
    all_reduce: AllReduce | None = None,
) -> TrainingOptimizer:
    """The optimizer of `--optimizer`, attached to the model.

    Two param groups: embeddings, head and norms at the full-rank learning rate; the decoder's matrices. Those of the
    MLP are a third where they have another rank. all_reduce sums a tensor over the ranks in place; None for one rank.
    """
    groups = low_rank_param_groups(model, low_rank_names(model), lr=args.lr, initial_lr=args.lr)
    groups[0] |= {"lr": args.peak_full_rank_lr, "initial_lr": args.peak_full_rank_lr}
    groups[0]["weight_decay"] = args.decay_of_full_rank
    if args.optimizer in LIBRARY_OPTIMIZERS:
        return LibraryOptimizer(_library_optimizer(args, groups), all_reduce)
    if args.is_low_rank:
        groups[1] |= _low_rank_keys(quantization, subspace)
        if subspace.mlp_rank:
            mlp = {param for name, param in model.named_parameters() if ".mlp." in name}
            of_mlp = [param for param in groups[1]["params"] if param in mlp]
            groups[1]["params"] = [param for param in groups[1]["params"] if param not in mlp]
            groups.append(groups[1] | {"params": of_mlp, "rank": subspace.mlp_rank})
    optimizer = _ADAM_FAMILY[args.optimizer](
        groups,
        lr=args.lr,
        betas=(args.adam_beta1, args.beta2),
        eps=args.adam_eps,
        weight_decay=args.weight_decay,
        decoupled_weight_decay=args.optimizer != "adam",
        accumulator_dtype=args.grad_accum_dtype,
        norm_growth=args.norm_growth,
        seed=seed,
    )
    # Between micro-batches all gradients exist anyway, so a clipped run updates after the last one at no memory.
    in_backward = args.per_layer and not args.grad_clipping
    optimizer.attach(model, update_in_backward=in_backward, all_reduce=all_reduce)
    return optimizer


def allows_graphs(args: RunArgs) -> bool:
    """Whether these flags let compiled decoder layers run from CUDA graphs on a GPU with Triton.

    All that changes from step to step must be read from the device: not so for fake quantization, for groups that
    Triton's kernels cannot take, for a gradient that is packed into 8 bits without a sum, and for a residual that waits
    for its update.
    """
    optimizer, quantization = args.optimizer, args.quantization
    waits = not optimizer.per_layer or optimizer.grad_clipping > 0 or args.batch.gradient_accumulation > 1
    fake = quantization.weight_quant and quantization.simulation
    packs = optimizer.per_layer and args.batch.gradient_accumulation == 1 and optimizer.grad_accum_dtype == "int8"
    fits = quantization.weight_group_size % 8 == 0 and not fake and not packs
    fits = fits and not (waits and args.subspace.residual != "none")
    return args.model.cuda_graphs == "auto" and optimizer.is_low_rank and fits


def replay_layers(model: nn.Module, optimizer: TrainingOptimizer) -> None:
    """Let the decoder layers run from CUDA graphs where they are compiled, on a CUDA GPU, and Triton updates them."""
    if not isinstance(model, LlamaForCausalLM) or not isinstance(optimizer, LowRankAdamW):
        return
    run, device = model.model.compiled_layer, next(model.parameters()).device
    matrices = [layer for layer in model.model.layers.modules() if isinstance(layer, LowRankLinear)]
    if run is not None and device.type == "cuda" and all(reads_numbers(device, x.group_size) for x in matrices):
        model.model.run_layers = LayerGraphs(list(model.model.layers), run, optimizer)


def _low_rank_keys(quantization: QuantizationArgs, subspace: SubspaceArgs) -> dict[str, Any]:
    return {
        "rank": subspace.rank,
        "update_proj_gap": subspace.update_proj_gap,
        "scale": subspace.galore_scale,
        "proj_type": subspace.proj_type,
        "quant": quantization.proj_quant,
        "quant_n_bit": quantization.proj_bits,
        "quant_group_size": quantization.proj_group_size,
        "cos_threshold": subspace.cos_threshold,
        "gamma_proj": subspace.gamma_proj,
        "queue_size": subspace.queue_size,
        "subspace": subspace.subspace,
        "svd_method": subspace.svd_method,
        "rotate_moments": subspace.rotates_moments,
        "max_update_proj_gap": subspace.max_update_proj_gap,
        "direction": subspace.direction,
        "residual": subspace.residual,
    }


def _library_optimizer(args: OptimizerArgs, groups: list[dict[str, Any]]) -> torch.optim.Optimizer | OptimizerPair:
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=args.lr, momentum=args.beta1, weight_decay=args.weight_decay)
    if args.optimizer == "muon":
        rest, matrices = groups
        betas, momentum = (args.adam_beta1, args.beta2), args.beta1 or 0.95
        return OptimizerPair(
            torch.optim.AdamW([rest], betas=betas, eps=args.adam_eps, weight_decay=args.weight_decay),
            # Its rates are comparable with Adam's then.
            torch.optim.Muon(
                [matrices], momentum=momentum, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"
            ),
        )
    from transformers.optimization import Adafactor

    # With a learning rate of the run's own, as GaLore's and Q-GaLore's Adafactor baseline has it.
    adafactor: torch.optim.Optimizer = Adafactor(
        groups,
        lr=args.lr,
        beta1=args.beta1 or None,
        weight_decay=args.weight_decay,
        relative_step=False,
        scale_parameter=False,
        warmup_init=False,
    )
    return adafactor
