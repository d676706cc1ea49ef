"""What a person sees of a run: the metrics of its updates, and an end where too many of them are skipped.

The metrics of an update are read while the next one is computed, so that nobody waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from peft_pretraining.args import RunArgs
from peft_pretraining.deferred_metrics import DeferredMetrics
from peft_pretraining.distributed import Processes
from peft_pretraining.errors import UserError
from peft_pretraining.evaluation import EvalResult
from peft_pretraining.metrics import MetricsLogger
from peft_pretraining.model import CausalLM
from peft_pretraining.optimizers import TrainingOptimizer
from peft_pretraining.run_checkpoints import Position
from peft_pretraining.throughput import (
    ThroughputMeter,
    matmul_parameters,
    memory_metrics,
    peak_flops,
    train_flops_per_token,
)

_PARTLY_MADE = "train/partly_made"


class PartlyMadeUpdateError(Exception):
    """The gradient of an update was found not to be finite when some weights had been updated already."""

    def __init__(self, update_step: int) -> None:
        """update_step: how many updates were whole."""
        super().__init__(update_step)
        self.update_step = update_step


class RunMetrics:
    """Collects and writes the metrics of a run; keeps `position.skipped_in_a_row`."""

    def __init__(self, args: RunArgs, processes: Processes, model: CausalLM, position: Position) -> None:
        """Opens the run's metrics and drops what was written after `position`."""
        self._args, self._processes, self._position = args, processes, position
        self._logger = MetricsLogger(
            Path(args.checkpoint.save_dir), args.to_dict(), rank=processes.rank,
            wandb_mode=args.logging.resolved_wandb_mode, project=args.logging.project, name=args.logging.name,
            tags=args.logging.tag_list, run_id=position.wandb_run_id, total_updates=args.schedule.num_training_steps,
            start_update=position.update_step,
        )  # fmt: skip
        self._logger.truncate_after(position.update_step)
        position.wandb_run_id = self._logger.run_id
        config = model.config
        flops = train_flops_per_token(
            matmul_parameters(model), config.num_hidden_layers, config.hidden_size, args.batch.max_length
        )
        peak = peak_flops(torch.cuda.get_device_name()) if processes.device.type == "cuda" else None
        self._meter = ThroughputMeter(flops, peak and peak * processes.world_size)
        self._deferred = DeferredMetrics()
        self._waited = 0.0
        self.say, self.sync = self._logger.say, self._logger.sync

    def start_update(self, wait_seconds: float) -> None:
        """Begin to time an update; wait_seconds is how long this rank has waited for data so far."""
        self._waited = wait_seconds
        self._meter.start_update()

    def finish_update(
        self, update_step: int, metrics: Mapping[str, float | Tensor], optimizer: TrainingOptimizer, wait_seconds: float
    ) -> None:
        """Hand in the metrics of update number `update_step`, and write those of the one before.

        To be called after `optimizer.step()`.
        """
        # Waiting for the update before belongs to the time of this one, or a host that runs ahead would seem faster
        # than the device.
        before = self._deferred.take()
        self._meter.finish_update(self._args.tokens_per_update, wait_seconds - self._waited)
        full_rank, low_rank, *_ = optimizer.param_groups
        rates = {"train/lr": low_rank["lr"], "train/full_rank_lr": full_rank["lr"]}
        outcome = {
            "train/grad_norm": optimizer.grad_norm(),
            "train/skipped": optimizer.skipped(),
            _PARTLY_MADE: optimizer.partly_made(),
        }
        speed, device = self._meter.report(), self._processes.device
        if before is None and device.type == "cuda":
            speed = {}  # of an update that waits for none before it the host knows no more than when it was launched
        measured = speed | memory_metrics(device)
        self._deferred.put(update_step, {**metrics, **rates, **outcome, **optimizer.subspace_metrics(), **measured})
        self._write(before)

    def flush(self) -> None:
        """Write the metrics that are still pending."""
        self._write(self._deferred.take())

    def evaluation(self, update_step: int, result: EvalResult) -> None:
        """Write the result of an evaluation."""
        self._logger.log(update_step, {f"eval/{name}": float(value) for name, value in result._asdict().items()})
        self.say(f"update {update_step}: perplexity {result.perplexity:.3f} on {result.tokens} tokens")

    def close(self, failed: bool) -> None:
        """Close the files and wandb's run."""
        self._logger.close(failed)

    def _write(self, pending: tuple[int, dict[str, float]] | None) -> None:
        if pending is None:
            return
        update_step, metrics = pending
        if metrics.pop(_PARTLY_MADE):
            raise PartlyMadeUpdateError(update_step - 1)
        if update_step % self._args.logging.log_every == 0:
            perplexity = math.exp(min(metrics["train/loss"], 700.0))
            self._logger.log(update_step, metrics | {"train/perplexity": perplexity})
        position, limit = self._position, self._args.runtime.max_skipped_updates
        position.skipped_in_a_row = position.skipped_in_a_row + 1 if metrics["train/skipped"] else 0
        if position.skipped_in_a_row > limit:
            raise UserError(
                f"--max_skipped_updates {limit}: {position.skipped_in_a_row} updates in a row had a loss or gradient "
                f"that is not finite, up to update {update_step}. The newest checkpoint in "
                f"{self._args.checkpoint.save_dir} is from before them: resume from it with a lower --lr, with "
                "--grad_clipping 1.0 or with --dtype float32"
            )
