"""Hugging Face's Trainer (transformers 5): a callback, and the factory of its `optimizer_cls_and_kwargs`.

The model is converted before the Trainer is made, since a checkpoint is loaded before the optimizer is created.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from qgalore.config import SubspaceConfig, scaled_too_late
from qgalore.integrations.connection import Connection, connect, unwrapped, without_ddp
from qgalore.layer.export import SaveMethod
from qgalore.layer.linear import LowRankLinear
from qgalore.layer.linear_names import linear_names
from qgalore.optimizer import LowRankAdamW, QGaLoreAdamW8bit
from qgalore.optimizer.param_groups import low_rank_param_groups


class QGaLoreCallback:
    """Attaches an optimizer for the time of `Trainer.train`: `Trainer(..., callbacks=[QGaLoreCallback(optimizer)])`.

    With it go `optimizers=(optimizer, None)` (or a scheduler), or `optimizer_cls_and_kwargs` with `OptimizerFactory`
    and no optimizer here. Accumulation, `max_grad_norm`, the norm in the logs and several ranks are the Trainer's own
    then; `qgalore.integrations.connection` has how. It has every event of `transformers.TrainerCallback`.
    """

    def __init__(
        self,
        optimizer: LowRankAdamW | None = None,
        update_in_backward: bool = False,
        capture_updates: bool = False,
    ) -> None:
        """optimizer: the Trainer's; update_in_backward: as in `LowRankAdamW.attach`, with `max_grad_norm=0`.

        capture_updates: as in `qgalore.integrations.connect`.
        """
        self.optimizer = None if optimizer is None else unwrapped(optimizer)
        self.update_in_backward = update_in_backward
        self.capture_updates = capture_updates
        self._connection: Connection | None = None
        self._own_names: _SavesOwnNames | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        """Refuse what cannot work before anything is trained; raises ValueError."""
        problem = _problem(args, self.update_in_backward)
        if problem:
            raise ValueError(problem)
        without_ddp(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, optimizer: Any, **_: Any) -> None:
        """Attach; the model is on its device now, and a checkpoint is loaded. Raises ValueError, TypeError."""
        trained = unwrapped(optimizer)
        if self.optimizer is not None and trained is not self.optimizer:
            raise ValueError(
                "the Trainer trains with another optimizer than QGaLoreCallback was given: give the same one as "
                "optimizers=(optimizer, None)"
            )
        # The factory may have been told to update in the backward pass.
        self.update_in_backward = self.update_in_backward or trained.update_in_backward
        problem = _problem(args, self.update_in_backward, trained.sums_in_momentum)
        if problem:
            raise ValueError(problem)
        self._connection = connect(
            trained, model, self.update_in_backward, follow_accelerate=True, capture_updates=self.capture_updates
        )
        self._own_names = _SavesOwnNames(model)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Detach."""
        if self._own_names is not None:
            self._own_names.remove()
            self._own_names = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("on_"):
            return _do_nothing
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")


class _SavesOwnNames(SaveMethod):
    """Lets a model's `save_pretrained` write the names and forms of its own state dict until `remove`.

    A Trainer resumes, and finds its best model, by `load_state_dict` of what it has saved: of what transformers writes
    in the "original format" of a family, such as Mixtral's experts or GPT-NeoX's head, it would keep what it has
    (findings/transformers_trainer_resume_loses_experts.sh). `from_pretrained` reads both.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        save = getattr(type(model), "save_pretrained", None)
        takes_it = save is not None and "save_original_format" in inspect.signature(save).parameters
        if takes_it and "save_pretrained" not in vars(model):  # a quantized model's does it already
            model.save_pretrained = self  # type: ignore[assignment]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the class of the model has it."""
        model, save = self.parts()
        return save(model, *args, **{"save_original_format": False} | kwargs)

    def remove(self) -> None:
        """Let the model save as its class does."""
        model = self._model()
        if model is not None and vars(model).get("save_pretrained") is self:
            del model.save_pretrained


class OptimizerFactory:
    """Makes the optimizer of a Trainer and attaches it: `optimizer_cls_and_kwargs=(OptimizerFactory, {...})`.

    The Trainer calls `OptimizerFactory()(model, **kwargs)`; of its own arguments it passes none, so the learning rate
    stands among them; axolotl passes its training arguments, too. No callback is needed, but one refuses early what
    cannot work.
    """

    def __call__(
        self,
        model: nn.Module,
        training_args: Any = None,
        *,
        config: SubspaceConfig,
        optimizer_class: type[LowRankAdamW] = QGaLoreAdamW8bit,
        names: Iterable[str] | None = None,
        update_in_backward: bool = False,
        capture_updates: bool = False,
        **options: Any,
    ) -> LowRankAdamW:
        """The optimizer of a model, attached; config: of the low-rank group, the weights of the layers of `names`.

        names: if none, the layers that are a `LowRankLinear` already, or those of `qgalore.linear_names`. options:
        those of optimizer_class, lr among them, which is that of training_args where these are given. Raises ValueError
        for a model without such layers and for training arguments that cannot work.
        """
        if training_args is not None:
            problem = _problem(training_args, update_in_backward, config.sum_in_momentum)
            if problem:
                raise ValueError(problem)
            options = {"lr": training_args.learning_rate} | options
        if names is None:
            converted = [name for name, module in model.named_modules() if isinstance(module, LowRankLinear)]
            names = converted or linear_names(model)
        optimizer = optimizer_class(low_rank_param_groups(model, names, config), **options)
        without_ddp(model)
        connect(optimizer, model, update_in_backward, follow_accelerate=True, capture_updates=capture_updates)
        return optimizer


def _problem(args: Any, update_in_backward: bool, sums_in_momentum: bool = False) -> str:
    """What of `transformers.TrainingArguments` cannot work, in a sentence; empty where all can."""
    if args.fp16:
        return "fp16=True scales the loss and looks for overflows in .grad, which stays empty: set bf16=True instead"
    for name in ("deepspeed", "fsdp"):
        if getattr(args, name, None):
            return f"{name} shards parameters, which this optimizer does not know: leave it out; ranks are averaged"
    if args.n_gpu > 1:
        return (
            f"one process with {args.n_gpu} GPUs copies the model to each (DataParallel): start a process for each GPU "
            "with torchrun, or let one be visible with CUDA_VISIBLE_DEVICES"
        )
    if update_in_backward and args.max_grad_norm:
        return (
            f"max_grad_norm={args.max_grad_norm} needs all gradients at once, and update_in_backward updates each "
            "weight when its own is there: set max_grad_norm=0, or leave update_in_backward=False"
        )
    if sums_in_momentum and args.max_grad_norm:
        return scaled_too_late(f"max_grad_norm={args.max_grad_norm}", "sum_in_momentum", "set max_grad_norm=0")
    return ""


def _do_nothing(*_: Any, **__: Any) -> None:
    """An event that is of no interest."""
