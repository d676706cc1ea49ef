"""Q-GaLore and GaLore as ordinary optimizers: AdamW on projected gradients, with updates inside the backward if asked.

A param group with a `rank` is low-rank: its gradients are projected (GaLore, arXiv 2403.03507; Q-GaLore, arXiv
2407.08296); `qgalore.config.SubspaceConfig` has its options. A group without one is plain AdamW.

Alone, such an optimizer reads `.grad` like any other. `attach(model)` lets it take each gradient as soon as the
backward has it: only the projected gradient is kept, also over several micro-batches, and quantized weights, which
autograd cannot give a gradient, train at all.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from qgalore.config import complete_group, ignored_arguments
from qgalore.layer.linear import LowRankLinear
from qgalore.offload.offload import Offload, offload_modules
from qgalore.optimizer.param_groups import check_group, check_rates, check_seed
from qgalore.optimizer.saved_state import in_order, state_for
from qgalore.optimizer.subspace_metrics import subspace_metrics
from qgalore.optimizer.update_cycle import UpdateCycle
from qgalore.sharding.gathering import Gathering
from qgalore.sharding.mesh import ShardMesh
from qgalore.sharding.shards import Shards
from qgalore.sharding.tables import Tables
from qgalore.update.all_reduce import AllReduce
from qgalore.update.hooks import Attachment
from qgalore.update.loss_scale import LossScale
from qgalore.update.ranks import SummingRanks
from qgalore.update.step import Replay
from qgalore.update.step_table import StepTable
from qgalore.update.weight import HOST_STATE, Weight


class LowRankAdamW(Optimizer):
    """AdamW with projected gradients for the param groups that have a `rank`; see `qgalore.config.SubspaceConfig`."""

    state_bits = 32
    """Bits of Adam's states: 32 (float32) or 8 (block-wise)."""
    quant = False
    """Whether projections are quantized where a group does not say."""
    weight_type: type[Weight] = Weight
    """How one parameter is updated."""

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decoupled_weight_decay: bool = True,
        accumulator_dtype: str = "float32",
        norm_growth: float = 0.0,
        second_moment: str = "value",
        cautious_decay: bool = False,
        seed: int = 0,
        **of_other_libraries: Any,
    ) -> None:
        """lr, betas, eps, weight_decay as in `torch.optim.AdamW` (`decoupled_weight_decay=False`: as in Adam).

        accumulator_dtype is that of gradients summed over micro-batches (float32, bfloat16, int8); norm_growth limits
        how much the norm of each gradient may grow from one update to the next, such as 1.01 (0: no limit);
        second_moment is that of matrices at full rank, in groups without a rank: one a "value", or one a "row";
        cautious_decay leaves out the weight decay of values that an update moves away from zero (Chen et al., arXiv
        2510.12402); seed is that of the stochastic rounding. of_other_libraries: arguments of the optimizers of
        galore-torch and q-galore-torch that have no meaning here, such as is_paged: one warning names those that are
        ignored.

        Raises ValueError for a value that makes no sense, here or in a param group, and for a weight that cannot have
        the rank of its group, TypeError for an argument that nobody knows.
        """
        if ignored := ignored_arguments(type(self).__name__, of_other_libraries):
            warnings.warn(ignored, stacklevel=2)
        check_seed(seed)
        self._seed = seed
        self._reset()
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "accumulator_dtype": accumulator_dtype,
            "norm_growth": norm_growth,
            "second_moment": second_moment,
            "cautious_decay": cautious_decay,
            "state_bits": self.state_bits,
        }
        self.check_rates(defaults)
        super().__init__(params, defaults)

    check_rates = staticmethod(check_rates)
    """Raises ValueError for hyperparameters, of a param group or those by default, that make no sense."""

    def _reset(self) -> None:
        """Reset everything that is not in the state dict."""
        self._weights: dict[Tensor, Weight] = {}
        self._step_table = StepTable(0)
        self.cycle = UpdateCycle(self._weights)
        """The update that goes on: its parts are for who runs layers himself, as `qgalore.graphs` does."""
        self._detach: weakref.finalize[..., Any] | None = None
        self._dealt = False
        """Whether states were dealt to ranks, and no whole state has been loaded since."""
        self.states_replaced = 0
        """How often weights have taken up groups and state, and sums anew: CUDA graphs of before are then void."""

    def __getstate__(self) -> dict[str, Any]:
        # A copy is attached to no model.
        self.cycle.check_whole("be copied")
        self._settle()
        return super().__getstate__() | {"_seed": self._seed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_weights" not in self.__dict__:  # a copy, and not `load_state_dict`
            self._reset()
        self._build_weights()
        self.cycle.abandon()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; with the options of a `SubspaceConfig` its weights are under projection."""
        completed = complete_group(param_group, proj_quant=self.quant)
        param_group.clear()  # as in torch, the group is the caller's dict
        param_group.update(completed)
        super().add_param_group(param_group)
        try:
            self.check_rates(param_group)
            check_group(param_group)
        except ValueError:
            self.param_groups.pop()
            raise
        self._build_weights()

    def _build_weights(self) -> None:
        """One object a parameter, numbered in the order of the groups; the low-rank ones also among themselves.

        Objects that exist are kept, since hooks and layers hold them; group, state and number are brought up to date.
        """
        self.states_replaced += 1
        self._settle_subspaces()
        count = sum(len(group["params"]) for group in self.param_groups if "rank" in group)
        index = position = 0
        total = sum(len(group["params"]) for group in self.param_groups)
        if len(self._step_table.updates) != total:
            self._step_table = StepTable(total)
        for group in self.param_groups:
            for param in group["params"]:
                weight = self._weights.get(param) or self._weights.setdefault(
                    param, self.weight_type(param, self._seed)
                )
                weight.bind(group, self.state, self._step_table, index, position, count)
                index, position = index + 1, position + ("rank" in group)
        self.cycle.bind(self.param_groups, self._step_table)

    def weights_of(self, module: nn.Module) -> list[Weight]:
        """The weights among the parameters of a module, in its order."""
        return [self._weights[param] for param in module.parameters() if param in self._weights]

    def low_rank_weights(self) -> Iterator[Weight]:
        """The weights of groups with a rank, in order."""
        return (weight for weight in self._weights.values() if "rank" in weight.param_group)

    def subspace_metrics(self) -> dict[str, float | Tensor]:
        """What the refreshes did: their number, the share that the lazy rule saved, and of the newest the similarity.

        `subspace/similarity/<layer>` and `subspace/failures` are there for weights refreshed since the last call, as
        tensors on the device, so that asking does not wait for it.
        """
        return subspace_metrics(self._weights.values())

    # ---- attached to a model

    def attach(
        self,
        model: nn.Module,
        update_in_backward: bool = False,
        all_reduce: AllReduce | None = None,
        loss_scale: LossScale | None = None,
        replay: Replay | None = None,
        mesh: ShardMesh | None = None,
    ) -> None:
        """Take every gradient as soon as the backward pass has it, and keep of a low-rank one the projection alone.

        With `update_in_backward` each weight is updated there and then, so that its gradient lives only inside the
        backward of its layer; `step` is left with norms and biases, whose gradients take no memory to speak of and
        which are faster updated as one. Over several micro-batches the sums of all gradients exist anyway: updating
        before `step` would save nothing, so it is left to `step`, which knows them all.
        `all_reduce` sums a tensor over the ranks of a data-parallel run (`qgalore.update.all_reduce.AllReduce`): each
        gradient as it comes, so that every rank must use the same parameters in the same order (`summed` tells them),
        or gradients of different weights are added up.
        `loss_scale` is what each loss is multiplied by before its backward pass: gradients are divided by it before
        anything is made of their size. Call its `update_(optimizer.skipped())` after each `step`.
        `replay` makes updates from CUDA graphs (`qgalore.graphs.updates.UpdateGraphs`).
        `mesh`, in the place of all_reduce, deals the weights to the ranks of a data-parallel run: each keeps the
        moments of its own, sums their gradients and updates them for all (`qgalore.sharding.shards`).
        `.grad` stays None. A frozen weight stays as it is until it is freed. Raises ValueError for a weight that the
        optimizer cannot train.
        """
        self.detach()
        self._check_arguments(all_reduce, loss_scale, mesh)
        ranks = None if all_reduce is None else SummingRanks(all_reduce)
        self.cycle.configure(update_in_backward, ranks, loss_scale, replay)
        try:
            attachment = Attachment(model, self._weights, weakref.WeakMethod(self.cycle.gradients_ready))
            self._detach = weakref.finalize(self, attachment.remove)
            self._detach.atexit = False
            for weight in self._weights.values():
                weight.check()  # by its layer, to which it belongs now
        except ValueError:
            self.detach()
            raise
        if mesh is not None:
            self.cycle.ranks = Shards(mesh, sorted(self._weights.values(), key=lambda weight: weight.index))
            self._dealt = True
            self.states_replaced += 1

    def _check_arguments(
        self, all_reduce: AllReduce | None, loss_scale: LossScale | None, mesh: ShardMesh | None
    ) -> None:
        """Raise ValueError for arguments of `attach` that cannot be combined with each other or with a param group."""
        if self._dealt:
            raise ValueError(
                "the optimizer was attached with a mesh, and this rank has the states of its own weights alone: load a "
                "whole model and optimizer, such as a checkpoint's, before it is attached again"
            )
        if mesh is not None and all_reduce is not None:
            raise ValueError("with a mesh gradients are summed by the owner of a weight alone: leave all_reduce out")
        if mesh is not None and self.sums_in_momentum and not mesh.owners_sum:
            raise ValueError(
                "sum_in_momentum adds each micro-batch to a momentum, which on a mesh the owner of a weight alone has: "
                "set owners_sum of the mesh, or leave sum_in_momentum out"
            )
        if loss_scale is not None and self.sums_in_momentum:
            raise ValueError(
                "sum_in_momentum keeps gradients in momenta from one update to the next, and a loss_scale that changes "
                "would change what they are worth: leave one of them out"
            )

    def detach(self) -> None:
        """Undo `attach`, as before another optimizer takes the model: gradients arrive in `.grad` again.

        What a mesh has dealt to ranks stays dealt: a whole state has to be loaded before another `attach`.
        """
        self.cycle.configure()
        if self.offload is not None:
            self.offload.release()
            self.cycle.offload = None
        if self._detach is not None:
            self._detach()

    @property
    def update_in_backward(self) -> bool:
        """As given to `attach`; False before it."""
        return self.cycle.update_in_backward

    @property
    def loss_scale(self) -> LossScale | None:
        """What the loss is multiplied by before its backward pass; None: by nothing."""
        return self.cycle.loss_scale

    @property
    def owners(self) -> dict[Tensor, int]:
        """The rank of the mesh that owns each parameter; empty without a mesh."""
        return {param: weight.owner for param, weight in self._weights.items()} if self._shards is not None else {}

    # ---- weights that are not here

    @property
    def _shards(self) -> Shards | None:
        ranks = self.cycle.ranks
        return ranks if isinstance(ranks, Shards) else None

    def gather_layers(self, layers: Sequence[nn.Module]) -> Gathering:
        """On a rank of a mesh: give up the weights of layers that others own, but while their layer runs."""
        if self._shards is None:
            raise RuntimeError("weights can be gathered from other ranks after attach(model, mesh=...) alone")
        return self._shards.gather_layers([self.weights_of(layer) for layer in layers])

    def gather_tables(self, tables: Iterable[Tensor]) -> Tables:
        """On a rank of a mesh: give up the rows of embeddings and head that others own, but while a pass reads them.

        Of those that are dealt by rows, large float parameters without a rank; small and frozen ones stay. Whoever
        reads one does so within `Tables.whole`, on all ranks at the same time.
        """
        if self._shards is None:
            raise RuntimeError("tables can be gathered from other ranks after attach(model, mesh=...) alone")
        found = dict.fromkeys(self._weights[table] for table in tables if table in self._weights)
        return self._shards.gather_tables(list(found))

    @property
    def gathering(self) -> Gathering | None:
        """What brings the weights of layers here before they run, after `gather_layers`."""
        return None if self._shards is None else self._shards.gathering

    def is_elsewhere(self, param: Tensor) -> bool:
        """Whether this rank does not have a parameter for good."""
        return self._shards is not None and param in self._weights and self._shards.is_elsewhere(self._weights[param])

    def kept_rows(self, param: Tensor) -> tuple[int, Tensor] | None:
        """Of a parameter after `gather_tables` the first row that this rank has, and all that it has (rows, columns).

        None for one of which it has all or nothing.
        """
        weight = self._weights.get(param)
        return None if weight is None or weight.kept_rows is None else (weight.first_row, weight.kept_rows)

    @torch.no_grad()
    def offload_layers(self, layers: Sequence[nn.Module], weights: bool = False, slots: int = 2) -> Offload:
        """Let what the matrices of layers have wait in host memory: optimizer states, and with `weights` codes, too.

        Passes over the layers must then enter and leave them (`qgalore.graphs.eager.EagerStack`); `step` does so
        itself. slots: see `Offload`. Raises RuntimeError on a rank of a mesh and without `attach`, ValueError for
        weights that are not quantized, PageLockError where the system does not lock so much memory.
        """
        if self._detach is None or not self._detach.alive or self._shards is not None:
            raise RuntimeError("layers can be offloaded after attach(model) alone, and not with a mesh")
        found, device = [self.weights_of(layer) for layer in layers], next(iter(self._weights.values())).device
        self.cycle.offload = offload = offload_modules(layers, found, device, weights, slots)
        self.states_replaced += 1
        return offload

    @property
    def offload(self) -> Offload | None:
        """What of layers waits in host memory."""
        return self.cycle.offload

    @property
    def weights_arrive(self) -> bool:
        """Whether the weights of a layer come before it runs: from the ranks that own them, or from the host."""
        return self.gathering is not None or (self.offload is not None and self.offload.hosts_weights)

    # ---- an update

    @property
    def is_last_micro_batch(self) -> bool:
        """Set to False during the backward of all but the last micro-batch of an update."""
        return self.cycle.is_last_micro_batch

    @is_last_micro_batch.setter
    def is_last_micro_batch(self, value: bool) -> None:
        self.cycle.is_last_micro_batch = value

    @property
    def accumulates_by_layer(self) -> bool:
        """Set to True where a layer has the backward passes of all micro-batches before the next layer has its first,
        with `end_layer` after the last of them: what `update_in_backward` updates is then updated there."""
        return self.cycle.accumulates_by_layer

    @accumulates_by_layer.setter
    def accumulates_by_layer(self, value: bool) -> None:
        self.cycle.accumulates_by_layer = value

    @property
    def sums_in_momentum(self) -> bool:
        """Whether any momentum takes the place of a sum of gradients (`SubspaceConfig.sum_in_momentum`).

        An update that has begun must then be made: nothing takes back what its momenta have.
        """
        return self.cycle.sums_in_momentum

    def end_layer(self, parameters: Iterable[Tensor]) -> None:
        """Finalize the gradients of parameters that all micro-batches have reached; see `accumulates_by_layer`.

        No backward pass is under way, so whatever a layer keeps for one may be gone by now. On several ranks one
        gradient after the other is sent, updated with and freed. Sets `is_last_micro_batch`.
        """
        self.cycle.end_layer(parameters)

    def collect(self) -> None:
        """Make the gradients of this update final where they are not, so that `grad_norm` is that of all of them.

        That is the `.grad` of parameters that no hook watches, and what only an early micro-batch has reached. `step`
        and `clip_grad_norm_` begin with it.
        """
        self.cycle.collect()

    def grad_norm(self) -> Tensor:
        """The norm of the whole gradient of this update (projected where it is low-rank), summed over ranks: ()."""
        return self.cycle.grad_norm()

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Let `step` scale all gradients so that `grad_norm` is at most max_norm; returns the norm before, ().

        Raises RuntimeError where the updates are made inside the backward pass.
        """
        return self.cycle.clip_grad_norm_(max_norm)

    def scale_gradients(self, factor: Tensor) -> None:
        """Let the next `step` scale all gradients that it updates with by a factor, (), beside what clips them.

        Raises RuntimeError where momenta have the gradients already.
        """
        self.cycle.scale_gradients(factor)

    def skip_update_if(self, flag: Tensor) -> None:
        """Leave everything as it is in this update where flag, a bool (), is true, as for a loss that is not finite.

        Call it before the backward pass of the last micro-batch, with the same flag on all ranks.
        """
        self.cycle.skip_update_if(flag)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every weight that has a gradient and was not updated inside the backward pass."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.cycle.finish()
        return loss

    def skipped(self) -> Tensor:
        """Whether the last update was skipped because of a gradient or flag that was not finite: a bool, ().

        Weights, moments and bases are then as they were, unless there was a `late_overflow`.
        """
        return self.cycle.skipped()

    def late_overflow(self) -> Tensor:
        """Whether the last update was skipped too late: a bool, ().

        That can be where each weight is updated as soon as its gradient is there, if the gradients of upper layers are
        finite and one further down is not; and with `sum_in_momentum`, if another gradient was added before. The state
        is then of no update: go back to a checkpoint.
        """
        return self.cycle.late_overflow()

    @property
    def summed(self) -> list[Tensor]:
        """The parameters whose gradients of the last update were made final, and summed over the ranks, in that order;
        without those that CUDA graphs have."""
        return self.cycle.summed

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients; warns where the backward pass has made a part of the update and `step` not the rest.

        Raises RuntimeError where momenta have some of an update that goes on.
        """
        self.cycle.check_whole("forget gradients")
        if self.cycle.is_half_made:
            warnings.warn(
                "zero_grad() between backward() and step(): with update_in_backward most weights have been updated by "
                "now, and norms and biases, which step() updates, have not: call step() before zero_grad()",
                stacklevel=2,
            )
        super().zero_grad(set_to_none)
        self.cycle.abandon()

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """As torch's; weights come in the order of the groups, and the keys of a group in that of the alphabet.

        So equal runs write equal files, whichever weights were updated first and however often a state was loaded.
        On a rank of a mesh it has the state of the weights that this rank owns: those of all ranks make the whole.
        Raises RuntimeError where momenta have some gradients of an update that goes on.
        """
        self.cycle.check_whole("be saved")
        self._settle()
        owned = (
            {weight.index for weight in self._weights.values() if weight.owned} if self._shards is not None else None
        )
        return in_order(super().state_dict(), owned)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave: tensors keep their dtypes, counters stay on the CPU.

        Ids are matched by position in the param groups, as torch does, whatever they are. Gradients on their way to
        an update are forgotten. On a rank of a mesh it takes the state of all ranks. Raises ValueError for a state of
        another optimizer or model, or of one rank alone, and keeps what it has.
        """
        if self._shards is not None:
            self._refuse_part(state_dict)
        before = {"param_groups": self.param_groups, "state": self.state}
        # The last hook sees what others made of the dict.
        part_of = self._part_of_state if self._shards is not None else None
        handle = self.register_load_state_dict_pre_hook(
            lambda _, given: state_for(self.param_groups, given, part_of, self._home_of_state)
        )
        if self.offload is not None:
            self.offload.forget()
        try:
            if self._dealt and self._shards is None:
                for weight in self._weights.values():
                    weight.take_back()
            super().load_state_dict(state_dict)
            self._dealt = self._shards is not None
            for weight in self._weights.values():
                if weight.layer is not None or weight.param.is_floating_point():
                    weight.check()
        except ValueError:
            self.__setstate__(before)
            raise
        finally:
            handle.remove()

    def _refuse_part(self, state_dict: dict[str, Any]) -> None:
        """Ranks that went on from their own parts would begin others' states anew, and wait for other messages."""
        ids = [key for group in state_dict["param_groups"] for key in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        given = {param for key, param in zip(ids, params, strict=False) if key in state_dict["state"]}
        elsewhere = {param for param, weight in self._weights.items() if not weight.owned}
        if given and elsewhere and not given & elsewhere:
            raise ValueError(
                "this is the optimizer state of one rank alone, that of the weights which it owns: load the states of "
                "all ranks, joined, as torch.distributed.checkpoint gives them (qgalore.integrations)"
            )

    def _part_of_state(self, param: Tensor, key: str, value: Tensor) -> Tensor | None:
        return self._weights[param].part_of_state(key, value)

    def _home_of_state(self, param: Tensor, key: str, value: Tensor) -> torch.device:
        """Where an entry of the state of a parameter lies between updates."""
        weight = self._weights[param]
        hosted = self.offload is not None and self.offload.is_hosted(weight, value)
        return torch.device("cpu") if key in HOST_STATE or hosted else weight.device

    def _settle(self) -> None:
        """Let the states be those of updates that were made, which the host learns last where the device is a GPU."""
        self._settle_subspaces()
        if self.offload is not None:
            self.offload.settle()

    def _settle_subspaces(self) -> None:
        for weight in self._weights.values():
            weight.subspace.settle()

    @classmethod
    def initial_states(
        cls, groups: Iterable[dict[str, Any]], layers: Iterable[LowRankLinear]
    ) -> dict[Tensor, dict[str, Tensor]]:
        """The states of the weights of param groups before their first update; on the meta device without memory.

        layers: those that hold low-rank weights. No optimizer is made, since PyTorch's imports its compiler: seconds.
        """
        states: dict[Tensor, dict[str, Tensor]] = {}
        holders: dict[Tensor, LowRankLinear] = {layer.weight: layer for layer in layers}
        for group in groups:
            options = complete_group(group, proj_quant=cls.quant)
            options |= {"state_bits": cls.state_bits, "accumulator_dtype": "float32"}
            options |= {"weight_decay": 0.0, "decoupled_weight_decay": True}
            options.setdefault("norm_growth", 0.0)
            for param in group["params"]:
                weight = cls.weight_type(param, 0)
                weight.layer = holders.get(param)
                weight.bind(options, states, StepTable(1), 0, 0, 1)
                weight.init_state()
        return states


class GaLoreAdamW(LowRankAdamW):
    """GaLore with float32 Adam states and float projections."""


class GaLoreAdamW8bit(LowRankAdamW):
    """GaLore with block-wise 8-bit Adam states."""

    state_bits = 8


class QGaLoreAdamW8bit(LowRankAdamW):
    """Q-GaLore: 8-bit Adam states and INT4 projections; the INT8 weights are `qgalore.layer.linear.LowRankLinear`."""

    state_bits = 8
    quant = True
