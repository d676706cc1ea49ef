"""Report a run: the metrics of its updates and evaluations, its speed and memory. Nothing here affects the run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from peft_pretraining.checkpoint.run_state import Position
from peft_pretraining.config.run_config import RunArgs
from peft_pretraining.evaluation import EvalResult
from peft_pretraining.models.build import parameter_count
from peft_pretraining.models.network import CausalLM
from peft_pretraining.reporting.jsonl import MetricsLogger
from peft_pretraining.reporting.throughput import (
    ThroughputMeter,
    matmul_parameters,
    memory_metrics,
    peak_flops,
    train_flops_per_token,
)
from peft_pretraining.run_summary import summary_lines
from peft_pretraining.runtime.update_outcomes import FinishedUpdate
from peft_pretraining.runtime.world import World


class RunMetrics:
    """Measures and writes the metrics of a run."""

    def __init__(self, args: RunArgs, world: World, model: CausalLM, position: Position) -> None:
        """Open the run's metrics without what was written after `position`."""
        self._args, self._world, self._device = args, world, world.device
        self._parameters, self._first = parameter_count(model), position.update_step
        self._initial_weights = position.initial_weights
        # With --init_from there is an evaluation before the first update, which a run that begins there makes again.
        begins = bool(args.model.init_from) and not position.update_step
        self._logger = MetricsLogger(
            Path(args.checkpoint.save_dir), args.to_dict(), rank=world.rank,
            wandb_mode=args.logging.resolved_wandb_mode, project=args.logging.project, name=args.logging.name,
            tags=args.logging.tag_list, run_id=position.wandb_run_id, tensorboard=args.logging.tensorboard,
            total_updates=args.schedule.num_training_steps, start_update=-1 if begins else position.update_step,
        )  # fmt: skip
        position.wandb_run_id = self._logger.run_id
        config = model.config
        flops = train_flops_per_token(
            matmul_parameters(model), config.num_hidden_layers, config.hidden_size, args.batch.max_length
        )
        peak = peak_flops(torch.cuda.get_device_name()) if world.device.type == "cuda" else None
        self._meter = ThroughputMeter(flops, peak and peak * world.world_size)
        self._waited = 0.0
        self.log, self.sync = self._logger.log, self._logger.sync

    def announce(self, data: Sequence[str] = (), changed_flags: Sequence[str] = ()) -> None:
        """Log what the run is (lines on its data are given), where it goes on from, and the warnings.

        changed_flags: in words, those that have changed since the checkpoint that it goes on from.
        """
        if not self._world.is_main:
            return
        card = f" ({torch.cuda.get_device_name(self._device)})" if self._device.type == "cuda" else ""
        device = f"{self._world.world_size} x {self._device.type}{card}"
        lines = summary_lines(self._args, device, data, self._parameters)
        for line in (*lines, *self._args.notes, *self._origin()):
            self.log(line)
        if self._first:
            self.log(f"{self._first} of {self._args.schedule.num_training_steps} updates are made already")
        if changed_flags:
            self.log(f"changed since the checkpoint: {', '.join(changed_flags)}")
        for warning in self._args.warnings:
            self.log(f"warning: {warning}")

    def _origin(self) -> list[str]:
        """A line on the weights that the run began with, if they were not random or are not those of --init_from."""
        given, began = self._args.model.init_from, self._initial_weights
        if began:
            return [f"the run began with the weights of {began}" if self._first else f"weights of {began}"]
        return [f"--init_from {given} is not read: the run goes on, and began with random weights"] if given else []

    def start_update(self, wait_seconds: float) -> None:
        """Start to time an update; wait_seconds is how long this rank has waited for data so far."""
        self._waited = wait_seconds
        self._meter.start_update()

    def finish_update(self, wait_seconds: float, waited_for_device: bool) -> dict[str, float]:
        """Stop timing; returns the speed of the update that `start_update` began, and the peak memory so far.

        waited_for_device: whether the host has waited for the previous update. If not, it may run ahead of a GPU, so
        that only the launches were timed, and no speed is returned.
        """
        self._meter.finish_update(self._args.tokens_per_update, wait_seconds - self._waited)
        speed = self._meter.report()
        if not waited_for_device and self._device.type == "cuda":
            speed = {}
        return speed | memory_metrics(self._device)

    def update(self, finished: FinishedUpdate) -> None:
        """Write the metrics of an update, if it is one of those to be logged."""
        if finished.update_step % self._args.logging.log_every == 0:
            perplexity = math.exp(min(finished.metrics["train/loss"], 700.0))
            self._logger.log_metrics(finished.update_step, {**finished.metrics, "train/perplexity": perplexity})

    def evaluation(self, update_step: int, result: EvalResult, others: Mapping[str, EvalResult] = {}) -> None:
        """Write the result of an evaluation, with those of the model in other forms by their names."""
        results = {"eval": result, **{f"eval_{form}": other for form, other in others.items()}}
        self._logger.log_metrics(
            update_step,
            {
                f"{kind}/{name}": float(value)
                for kind, each in results.items()
                for name, value in each._asdict().items()
            },
        )
        text = "".join(f", {form.replace('_', ' ')} {other.perplexity:.3f}" for form, other in others.items())
        self.log(f"update {update_step}: perplexity {result.perplexity:.3f}{text} on {result.tokens} tokens")

    def close(self, failed: bool) -> None:
        """Close the files and wandb's run."""
        self._logger.close(failed)
