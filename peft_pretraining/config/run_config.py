"""The resolved arguments of a run: plain values, in a frozen dataclass for each group of flags."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from peft_pretraining.config.flag_groups import (
    BatchArgs,
    CheckpointArgs,
    DataArgs,
    EvaluationArgs,
    LoggingArgs,
    MethodArgs,
    ModelArgs,
    OptimizerArgs,
    QuantizationArgs,
    RuntimeArgs,
    ScheduleArgs,
    SubspaceArgs,
)
from peft_pretraining.models.config_source import model_name

GROUPS: Mapping[str, type] = {
    "model": ModelArgs,
    "data": DataArgs,
    "batch": BatchArgs,
    "optimizer": OptimizerArgs,
    "method": MethodArgs,
    "quantization": QuantizationArgs,
    "subspace": SubspaceArgs,
    "schedule": ScheduleArgs,
    "evaluation": EvaluationArgs,
    "checkpoint": CheckpointArgs,
    "logging": LoggingArgs,
    "runtime": RuntimeArgs,
}


@dataclass(frozen=True)
class RunArgs:
    """All arguments of a run, resolved: no value depends on another flag any more."""

    model: ModelArgs
    data: DataArgs
    batch: BatchArgs
    optimizer: OptimizerArgs
    method: MethodArgs
    quantization: QuantizationArgs
    subspace: SubspaceArgs
    schedule: ScheduleArgs
    evaluation: EvaluationArgs
    checkpoint: CheckpointArgs
    logging: LoggingArgs
    runtime: RuntimeArgs
    world_size: int = 1
    command: tuple[str, ...] = field(default=(), compare=False)
    """The command line, word by word."""
    left_to_name: tuple[str, ...] = field(default=(), compare=False)
    """Flags that the command line does not give and the optimizer's name decides, unless a checkpoint does."""
    warnings: tuple[str, ...] = ()
    """Sentences about values that work but are probably not intended."""
    notes: tuple[str, ...] = ()
    """Sentences about how values were chosen."""

    @property
    def tokens_per_update(self) -> int:
        """Positions in the total batch of one update, padding included."""
        return self.batch.total_batch_size * self.batch.max_length

    @property
    def newton_schulz(self) -> str:
        """The method that orthogonalises momenta; the default where the flag changes nothing, without a subspace."""
        return self.subspace.newton_schulz if self.optimizer.is_low_rank else SubspaceArgs().newton_schulz

    @property
    def by_layer(self) -> bool:
        """Whether each layer has all micro-batches of an update before the next layer has its first."""
        return self.batch.accumulate_by == "layer"

    @property
    def updates_immediately(self) -> bool:
        """Whether each weight is updated as soon as its gradient is final, while the backward pass goes on.

        Over several micro-batches the sums of all gradients exist until the last one and nothing would be won, unless
        they are of one layer at a time.
        """
        return self.optimizer.per_layer and (self.batch.gradient_accumulation == 1 or self.by_layer)

    @property
    def kept_activations(self) -> ModelArgs:
        """The options of the model with those that say what is kept of activations as they take effect."""
        if not self.by_layer:
            return self.model
        # A layer is computed again just before its backward pass, which is alone with what it has kept.
        return dataclasses.replace(
            self.model,
            activation_checkpointing=False,
            checkpoint_every=1,
            checkpoint_layers=0,
            recompute="",
            int8_activations=False,
        )

    @property
    def sums_in_momentum(self) -> bool:
        """Whether the gradients of the decoder matrices are summed in their momenta."""
        return self.optimizer.is_low_rank and self.subspace.sum_in_momentum

    @property
    def gathers_layers(self) -> bool:
        """Whether a layer's weights lie with the ranks that own them, and are gathered before it runs."""
        return self.runtime.shard == "full" and self.world_size > 1

    @property
    def owners_sum(self) -> bool:
        """Whether each micro-batch's gradients are sent to the ranks that own the weights, which alone have sums."""
        runtime = self.runtime
        if runtime.shard == "none" or self.world_size == 1 or self.by_layer:
            return False
        if self.gathers_layers:
            return True
        if runtime.shard_sums == "auto":
            return self.sums_in_momentum
        return runtime.shard_sums == "owner" and (self.batch.gradient_accumulation > 1 or self.sums_in_momentum)

    @property
    def tokens_sent_at_once(self) -> int:
        """Positions at most whose gradients a rank has summed when it sends the sum."""
        micro_batches = 1 if self.owners_sum else self.batch.gradient_accumulation
        return micro_batches * self.batch.batch_size * self.batch.max_length

    def save_dir(self, now: datetime) -> Path:
        """The run's folder: `--save_dir`, else that of the checkpoint to resume from, else a new one named by `now`.

        With several ranks, call it on rank 0 alone, since their clocks differ.
        """
        if self.checkpoint.save_dir:
            return Path(self.checkpoint.save_dir)
        if self.checkpoint.continue_from:
            source = Path(self.checkpoint.continue_from)
            return source.parent if source.name.startswith("step_") else source
        name = model_name(self.model.model_config)
        return Path("checkpoints") / f"{name}-{self.optimizer.optimizer}-{now:%Y%m%d-%H%M%S}"

    def in_folder(self, save_dir: Path, continue_from: str | None = None) -> RunArgs:
        """A copy with the run's folder set, and with another `--continue_from` if one is given."""
        source = self.checkpoint.continue_from if continue_from is None else continue_from
        checkpoint = dataclasses.replace(self.checkpoint, save_dir=str(save_dir), continue_from=source)
        return dataclasses.replace(self, checkpoint=checkpoint)

    def to_dict(self) -> dict[str, Any]:
        """The resolved values, by flag name."""
        return {name: value for group in GROUPS for name, value in dataclasses.asdict(getattr(self, group)).items()}
