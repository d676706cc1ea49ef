"""Adapt optimizers of other libraries to the training loop's protocol."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from peft_pretraining.config.flag_groups import OptimizerArgs
from qgalore.sharding.deal import Load, deal
from qgalore.sharding.mesh import ShardMesh
from qgalore.update.all_reduce import AllReduce
from qgalore.update.loss_scale import LossScale


class LibraryOptimizer:
    """An optimizer of another library whose gradients are summed over the ranks in the last micro-batch's backward."""

    sums_in_momentum = False
    """See `TrainingOptimizer`."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer | OptimizerPair,
        all_reduce: AllReduce | None,
        mesh: ShardMesh | None = None,
    ) -> None:
        """Register hooks on the parameters of `optimizer` if there is more than one rank.

        mesh: the ranks to which the parameters are dealt, instead of all_reduce; each updates its own.
        """
        self._optimizer, self._skipped = optimizer, torch.zeros((), dtype=torch.bool)
        self._skip: Tensor | None = None
        self._norm: Tensor | None = None
        self._all_reduce = all_reduce
        self.is_last_micro_batch, self.accumulates_by_layer = True, False
        self.loss_scale: LossScale | None = None  # float16 is refused
        self.summed: list[Tensor] = []
        """See `TrainingOptimizer`."""
        self.state_dict = optimizer.state_dict
        self._mesh, self._owners = mesh, dict[Tensor, int]()
        if mesh is not None:
            trained = [param for param in self._parameters() if param.requires_grad]
            loads = [
                Load(str(index), param.numel(), param.numel(), param.dim() < 2) for index, param in enumerate(trained)
            ]
            self._owners = dict(zip(trained, deal(loads, mesh.size), strict=True))
        if mesh is not None or all_reduce is not None:
            for param in self._owners or self._parameters():
                param.register_post_accumulate_grad_hook(self._sum_hook())

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The library's groups; loading a state replaces them."""
        return self._optimizer.param_groups

    @property
    def state(self) -> Mapping[Tensor, dict[str, Any]]:
        """See `TrainingOptimizer`."""
        return self._optimizer.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the result of `state_dict`; tensors keep their dtypes.

        PyTorch makes them those of the parameters: float32 moments of bfloat16 parameters would be rounded.
        """
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        if self._mesh is not None:
            owned = {number for number, param in zip(numbers, self._parameters(), strict=True) if self._owns(param)}
            state_dict = state_dict | {"state": {key: x for key, x in state_dict["state"].items() if key in owned}}
        self._optimizer.load_state_dict(state_dict)
        states = self._optimizer.state
        for number, param in zip(numbers, self._parameters(), strict=True):
            own = states.get(param, {})
            for key, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor) and own[key].dtype != value.dtype:
                    own[key] = value.to(own[key].device, copy=True)

    def zero_grad(self) -> None:
        """See `TrainingOptimizer`."""
        self._optimizer.zero_grad()
        self._norm = self._skip = None
        self.summed = []

    def _parameters(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _sum_hook(self) -> Callable[[Tensor], None]:
        optimizer = weakref.ref(self)  # a strong reference in a hook would keep the optimizer alive with the weights

        def hook(param: Tensor) -> None:
            owner = optimizer()
            if owner is not None and owner.is_last_micro_batch:
                owner._sum_over_ranks(param)

        return hook

    @property
    def owners(self) -> Mapping[Tensor, int]:
        """See `TrainingOptimizer`."""
        return self._owners

    def is_elsewhere(self, param: Tensor) -> bool:
        """See `TrainingOptimizer`: never."""
        return False

    def kept_rows(self, param: Tensor) -> tuple[int, Tensor] | None:
        """See `TrainingOptimizer`: none."""
        return None

    def _owns(self, param: Tensor) -> bool:
        """Whether this rank updates a parameter."""
        return self._mesh is None or self._owners.get(param) == self._mesh.rank

    def _shared_norm(self, mesh: ShardMesh) -> Tensor:
        """The norm of all gradients, of which each rank has some."""
        norms = [
            torch.zeros((), device=param.device)
            if param.grad is None
            else torch.linalg.vector_norm(param.grad).to(torch.float32)
            for param in self._owners
        ]
        shared = torch.stack(norms)
        mesh.sum(shared)
        norm: Tensor = torch.linalg.vector_norm(shared)
        return norm

    def grad_norm(self) -> Tensor:
        """Norm of the gradient before clipping; read it before `zero_grad`."""
        if self._norm is not None:
            return self._norm
        if self._mesh is not None:
            self._norm = self._shared_norm(self._mesh)
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
        if self._mesh is not None:
            works = [self._mesh.broadcast(param.data, owner) for param, owner in self._owners.items()]
            for work in works:
                work.wait()

    def skip_update_if(self, flag: Tensor) -> None:
        """See `TrainingOptimizer`; one flag that is true is enough."""
        self._skip = flag if self._skip is None else self._skip | flag

    def skipped(self) -> Tensor:
        """See `TrainingOptimizer`."""
        return self._skipped

    def late_overflow(self) -> Tensor:
        """Always False: the whole gradient is known before the update."""
        return torch.zeros_like(self._skipped)

    def clip_grad_norm_(self, max_norm: float) -> None:
        """See `TrainingOptimizer`."""
        self._norm = self.grad_norm()
        torch.nn.utils.clip_grads_with_norm_(self._parameters(), max_norm, self._norm)

    def subspace_metrics(self) -> dict[str, float | Tensor]:
        """Empty: there are no subspaces."""
        return {}

    def _sum_over_ranks(self, param: Tensor) -> None:
        """Sum a gradient: on a mesh for its owner, and others forget theirs."""
        if param.grad is None:
            return
        self.summed.append(param)
        if self._mesh is not None and param in self._owners:
            self._mesh.reduce(param.grad, self._owners[param]).wait()
            if self._owns(param):
                self._mesh.sum_over_replicas(param.grad)
            else:
                param.grad = None  # for which the library then makes no state, and no step
        elif self._all_reduce is not None and (waiting := self._all_reduce(param.grad)) is not None:
            waiting.wait()

    def end_layer(self, parameters: Iterable[Tensor]) -> None:
        """See `TrainingOptimizer`: here gradients are summed over the ranks, and `step` updates."""
        self.is_last_micro_batch = True
        for param in parameters:
            self._sum_over_ranks(param)


class OptimizerPair:
    """Two optimizers of different parameters with the interface of one."""

    def __init__(self, first: torch.optim.Optimizer, second: torch.optim.Optimizer) -> None:
        """In the state dict the parameters of `second` are numbered after those of `first`."""
        self._both = (first, second)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of both optimizers."""
        return [group for optimizer in self._both for group in optimizer.param_groups]

    @property
    def state(self) -> Mapping[Tensor, dict[str, Any]]:
        """The state of every parameter."""
        return {param: state for optimizer in self._both for param, state in optimizer.state.items()}

    def zero_grad(self) -> None:
        """Clear the gradients."""
        for optimizer in self._both:
            optimizer.zero_grad()

    def step(self) -> None:
        """Update all parameters."""
        for optimizer in self._both:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """The state of both in the format of one optimizer."""
        first, second = (optimizer.state_dict() for optimizer in self._both)
        count = sum(len(group["params"]) for group in first["param_groups"])
        state = first["state"] | {count + index: value for index, value in second["state"].items()}
        moved = [group | {"params": [count + index for index in group["params"]]} for group in second["param_groups"]]
        return {"state": state, "param_groups": first["param_groups"] + moved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the result of `state_dict`."""
        groups = list(state_dict["param_groups"])
        for optimizer in self._both:
            own = [groups.pop(0) for _ in optimizer.param_groups]
            ids = {each for group in own for each in group["params"]}
            state = {key: value for key, value in state_dict["state"].items() if key in ids}
            optimizer.load_state_dict({"state": state, "param_groups": own})


def library_optimizer(args: OptimizerArgs, groups: list[dict[str, Any]]) -> torch.optim.Optimizer | OptimizerPair:
    """Build the optimizer of `--optimizer` for these param groups: sgd, muon or adafactor."""
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=args.lr, momentum=args.beta1, weight_decay=args.weight_decay)
    if args.optimizer == "muon":
        rest, matrices = groups
        betas, momentum = (args.adam_beta1, args.beta2), args.beta1 or 0.95
        return OptimizerPair(
            torch.optim.AdamW([rest], betas=betas, eps=args.adam_eps, weight_decay=args.weight_decay),
            # With this its learning rates are comparable with Adam's.
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


def library_state(args: OptimizerArgs, param: Tensor, is_matrix: bool) -> dict[str, Tensor]:
    """The tensors that `library_optimizer` keeps of a parameter, as zeros on its device; is_matrix: of the decoder.

    Written down, since making one imports PyTorch's compiler, or transformers: seconds for the memory plan.
    """
    whole, momentum, dtype = param.shape, args.beta1 > 0, param.dtype
    if args.optimizer == "sgd":
        shapes = {"momentum_buffer": whole} if momentum else {}
    elif args.optimizer == "muon":
        shapes = {"momentum_buffer": whole} if is_matrix else {"exp_avg": whole, "exp_avg_sq": whole}
    else:
        factors = {"exp_avg_sq_row": whole[:-1], "exp_avg_sq_col": whole[:-2] + whole[-1:]}
        shapes = {"RMS": torch.Size()} | (factors if len(whole) > 1 else {"exp_avg_sq": whole})
        shapes |= {"exp_avg": whole} if momentum else {}
        dtype = torch.float32
    return {name: torch.zeros(shape, dtype=dtype, device=param.device) for name, shape in shapes.items()}
