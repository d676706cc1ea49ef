"""Pretrain LLaMA with Q-GaLore: the run, told from top to bottom.

    torchrun --standalone --nproc_per_node 1 run_pretrain.py --model_config configs/llama_60m.json --batch_size 256 ...

`--help` lists the flags; `--dry_run` prints what a command would do and how much memory it would take.
"""

from __future__ import annotations

import gc
import itertools
import math
import os
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from peft_pretraining.args import RunArgs, parse_args
from peft_pretraining.checkpoint import (
    check_compatible,
    check_model_tensors,
    hold_folder,
    load_checkpoint,
    save_checkpoint,
)
from peft_pretraining.dataloader import TrainLoader, build_train_loader, merge_states
from peft_pretraining.deferred_metrics import DeferredMetrics
from peft_pretraining.distributed import Processes, is_lost_rank, start_processes, world_size_of_launch
from peft_pretraining.errors import UserError
from peft_pretraining.eval_set import EvalSet, build_eval_set
from peft_pretraining.evaluation import evaluate
from peft_pretraining.lr_schedule import lr_multiplier, set_learning_rate
from peft_pretraining.metrics import MetricsLogger
from peft_pretraining.model import CausalLM, build_model, parameter_count
from peft_pretraining.model_config import read_config_json
from peft_pretraining.optimizers import TrainingOptimizer, build_optimizer, low_rank_converter
from peft_pretraining.resume import choose_checkpoint, from_newest_checkpoint, take_over
from peft_pretraining.signals import StopRequest
from peft_pretraining.throughput import (
    ThroughputMeter,
    matmul_parameters,
    memory_metrics,
    peak_flops,
    train_flops_per_token,
)
from peft_pretraining.token_files import is_token_dataset
from peft_pretraining.tokenizer import check_vocabulary, load_tokenizer

STOP_MARKER = "STOPPED"
PARTLY_MADE = "train/partly_made"
# What must be the same for a resumed run to equal an uninterrupted one.
FIXED_BY_CHECKPOINT = (
    "use_hf_model", "dtype", "optimizer", "total_batch_size", "rank", "proj_type", "weight_quant", "weight_bits",
    "weight_group_size", "simulation", "proj_quant", "proj_bits", "proj_group_size", "subspace", "seed",
)  # fmt: skip


def run(argv: Sequence[str] | None) -> None:
    """One run of training; raises UserError for what the user can put right."""
    args = parse_args(argv, world_size_of_launch())
    if args.runtime.dry_run:
        from peft_pretraining.dry_run import describe

        if int(os.environ.get("RANK", "0")) == 0:
            print(describe(args))
        return
    stop = StopRequest()
    processes = start_processes(args.runtime.device, stop)
    try:
        make_reproducible()
        args = args.in_folder(processes.from_main(lambda: args.save_dir(datetime.now())))
        held: list[object] = []  # until the process ends
        processes.from_main(lambda: held.append(hold_folder(args.checkpoint.save_dir)))
        left_out: set[int] = set()
        while (update_step := train(args, processes, stop, left_out)) is not None:
            left_out.add(update_step)
            args = from_newest_checkpoint(args, processes)
            gc.collect()  # a model and its hooks refer to each other
    finally:
        if not is_lost_rank(sys.exc_info()[1]):  # taking leave would wait for it
            processes.close()


class PartlyMadeUpdateError(Exception):
    """The gradient of an update was found not to be finite when some weights had been updated already."""

    def __init__(self, update_step: int) -> None:
        super().__init__(update_step)
        self.update_step = update_step


def train(args: RunArgs, processes: Processes, stop: StopRequest, left_out: set[int]) -> int | None:
    """Train to the end, or up to an update that was partly made: then its step, for another try that leaves it out."""
    run = Run(args, processes, stop, left_out)
    try:
        run.train()
        return None
    except PartlyMadeUpdateError as error:
        run.logger.say(
            f"update {error.update_step + 1}: a gradient further down was not finite after weights above it had been "
            "updated; going back to the newest checkpoint to leave that update out"
        )
        return error.update_step
    finally:
        run.close()


def make_reproducible() -> None:
    """Same seed, same bits: only deterministic kernels, and no global generator in use anywhere."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # A debugging aid that costs a pass over every new buffer.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def build_data(args: RunArgs, processes: Processes) -> tuple[TrainLoader, EvalSet]:
    """The training loader and the validation set of `--dataset` for this rank."""
    data, batch = args.data, args.batch
    tokenizer = None
    if not is_token_dataset(data.dataset):
        # The main rank first: it trains or downloads what the others then find in the cache.
        processes.from_main(lambda: load_tokenizer(data.tokenizer, data.dataset) and None)
        tokenizer = load_tokenizer(data.tokenizer, data.dataset)
    common: dict[str, Any] = {"rank": processes.rank, "world_size": processes.world_size}
    common |= {"dataset": data.dataset, "tokenizer": tokenizer, "packing": data.packing, "max_length": batch.max_length}
    common["damaged_limit"] = data.damaged_limit
    loader = build_train_loader(
        **common, batch_size=batch.batch_size, grad_accum_steps=batch.gradient_accumulation,
        seed=args.runtime.seed, data_lanes=data.data_lanes, shuffle_buffer=data.shuffle_buffer, workers=data.workers,
    )  # fmt: skip
    evaluation = args.evaluation
    eval_set = build_eval_set(**common, eval_batch_size=evaluation.eval_batch_size, eval_tokens=evaluation.eval_tokens)
    return loader, eval_set


def build(args: RunArgs, processes: Processes) -> tuple[CausalLM, TrainingOptimizer]:
    """The model on this rank's device, its decoder matrices stored as asked, and its optimizer."""
    model = build_model(
        args.model.model_config,
        args.model.use_hf_model,
        getattr(torch, args.model.dtype),
        processes.device,
        args.runtime.seed,
        args.model.activation_checkpointing,
        on_module=low_rank_converter(args.optimizer, args.quantization),
    )
    optimizer = build_optimizer(
        model, args.optimizer, args.quantization, args.subspace, args.runtime.seed, processes.gradient_all_reduce()
    )
    return model, optimizer


class Run:
    """A training run: what it is made of, and its loop."""

    def __init__(self, args: RunArgs, processes: Processes, stop: StopRequest, left_out: set[int]) -> None:
        """Build everything and, where asked, take up a checkpoint; the updates in left_out will change nothing."""
        self.args, self.processes, self.stop, self.left_out = args, processes, stop, left_out
        self.save_dir = Path(args.checkpoint.save_dir)
        self.loader, self.eval_set = build_data(args, processes)
        self.model, self.optimizer = build(args, processes)
        check_vocabulary(max(self.loader.vocab_size, self.eval_set.vocab_size), self.model.config.vocab_size)
        self.update_step = self.tokens = self.skipped_in_a_row = 0
        run_id = self.resume()
        self.logger = MetricsLogger(
            self.save_dir, args.to_dict(), rank=processes.rank, wandb_mode=args.logging.resolved_wandb_mode,
            project=args.logging.project, name=args.logging.name, tags=args.logging.tag_list, run_id=run_id,
            total_updates=args.schedule.num_training_steps, start_update=self.update_step,
        )  # fmt: skip
        self.logger.truncate_after(self.update_step)
        config = self.model.config
        flops = train_flops_per_token(
            matmul_parameters(self.model), config.num_hidden_layers, config.hidden_size, args.batch.max_length
        )
        peak = peak_flops(torch.cuda.get_device_name()) if processes.device.type == "cuda" else None
        self.meter = ThroughputMeter(flops, peak and peak * processes.world_size)
        self.deferred = DeferredMetrics()

    # ---- resume and save

    def resume(self) -> str | None:
        """Take up the checkpoint of `--continue_from`, if there is one; returns the wandb id of its run."""
        checkpoint = choose_checkpoint(self.args.checkpoint.continue_from, self.save_dir, self.processes)
        if checkpoint is None:
            return None
        state = self.checkpoint_state()
        check_compatible(checkpoint, {name: state[name] for name in (*FIXED_BY_CHECKPOINT, "model_config_contents")})
        check_model_tensors(checkpoint, self.model.state_dict())
        self.model.load_state_dict(checkpoint.model_tensors)
        given = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(checkpoint.optimizer_state)
        for group, values in zip(self.optimizer.param_groups, given, strict=True):
            group.update(values)  # this command's learning rates hold, not those of the checkpoint
        self.loader.load_state_dict(checkpoint.state["data"])
        self.update_step, self.tokens = checkpoint.update_step, checkpoint.state["tokens"]
        self.skipped_in_a_row = checkpoint.state["skipped_in_a_row"]
        if self.update_step > self.args.schedule.num_training_steps:
            raise UserError(
                f"--num_training_steps {self.args.schedule.num_training_steps}: {checkpoint.path} is after "
                f"{self.update_step} updates already; give at least that many, or an older checkpoint"
            )
        take_over(checkpoint, self.save_dir, self.processes)
        run_id: str | None = checkpoint.state["wandb_run_id"]
        return run_id

    def checkpoint_state(self) -> dict[str, Any]:
        """What a checkpoint records of the run beside weights and optimizer state, but for where it stands."""
        return {**self.args.to_dict(), "model_config_contents": read_config_json(self.args.model.model_config)}

    def save(self, data_state: dict[str, Any], read_back: bool = False) -> None:
        """Write a checkpoint of the state after `update_step` updates; data_state is this rank's part of the data's."""
        self.flush_metrics()
        # That of the next update, whether or not a stop came after it was set.
        set_learning_rate(self.optimizer, self.lr_multiplier())
        state = self.checkpoint_state()
        state |= {"data": merge_states(self.processes.gather(data_state))}
        state |= {"tokens": self.tokens, "skipped_in_a_row": self.skipped_in_a_row}
        state |= {"wandb_run_id": self.logger.run_id}

        def write() -> Path:
            self.logger.sync()
            model_tensors, optimizer_state = self.model.state_dict(), self.optimizer.state_dict()
            keep = self.args.checkpoint.keep_checkpoints
            path = save_checkpoint(self.save_dir, self.update_step, model_tensors, optimizer_state, state, keep)
            return load_checkpoint(path).path if read_back else path

        self.logger.say(f"saved {self.processes.from_main(write)}")

    # ---- the loop

    def train(self) -> None:
        """All updates, with the evaluations and checkpoints that are due; ends early where a stop is asked for."""
        args = self.args
        parameters = parameter_count(self.model)
        self.logger.say(f"{parameters / 1e6:.1f} M parameters on {self.processes.world_size} x {self.processes.device}")
        for warning in args.warnings:
            self.logger.say(f"warning: {warning}")
        first, total = self.update_step, self.args.schedule.num_training_steps
        if self.processes.is_main:
            (self.save_dir / STOP_MARKER).unlink(missing_ok=True)
        for self.update_step in itertools.count(first):
            last = self.update_step == total
            # Nothing is done twice: a resumed run has the evaluation and the checkpoint it starts from.
            if self.update_step > first:
                self.evaluate_if_due(last)
                if last or is_due(self.update_step, args.checkpoint.save_every):
                    self.save(self.loader.state_dict())
            elif first == 0 and args.checkpoint.save_every:
                # A run that cannot save, or cannot read what it saved, says so before it has anything to lose.
                self.save(self.loader.state_dict(), read_back=True)
            if last or not self.update():
                break

    def close(self) -> None:
        """End the loader's threads, close the metrics."""
        self.loader.close()
        self.logger.close(failed=sys.exc_info()[0] is not None)

    def update(self) -> bool:
        """One update; False where a stop was asked for, with everything as it was before the update."""
        args, data_before = self.args, self.loader.state_dict()
        self.meter.start_update()
        waited = self.loader.wait_seconds
        update = self.loader.next_update(give_up=lambda: self.stop.requested)
        if not self.processes.all_on_host(update is not None):
            self.end_early(data_before)
            return False
        assert update is not None
        target_tokens = self.processes.sum_on_host(update.target_tokens)
        set_learning_rate(self.optimizer, self.lr_multiplier())
        loss = torch.zeros((), device=self.processes.device)
        for micro_step, micro_batch in enumerate(update.micro_batches, start=1):
            if not self.processes.all_on_host(not self.stop.requested):
                self.end_early(data_before)
                return False
            self.optimizer.is_last_micro_batch = micro_step == len(update.micro_batches)
            input_ids = micro_batch.input_ids.to(self.processes.device, non_blocking=True)
            labels = micro_batch.labels.to(self.processes.device, non_blocking=True)
            # Divided by the targets of the whole update, so that how it is split cannot change the gradient.
            micro_loss = self.model(input_ids, labels).loss_sum / target_tokens
            loss += micro_loss.detach()
            if self.optimizer.is_last_micro_batch:
                # The loss of the update is known before the first weight can be touched.
                self.processes.all_reduce(loss)
                broken = ~loss.isfinite()
                self.optimizer.skip_update_if(torch.ones_like(broken) if self.update_step in self.left_out else broken)
            micro_loss.backward()
        if args.optimizer.grad_clipping:
            self.optimizer.clip_grad_norm_(args.optimizer.grad_clipping)
        self.optimizer.step()
        metrics = {"train/grad_norm": self.optimizer.grad_norm(), "train/skipped": self.optimizer.skipped()}
        metrics |= {PARTLY_MADE: self.optimizer.partly_made()}
        self.optimizer.zero_grad()
        self.tokens += self.processes.sum_on_host(update.tokens)
        self.meter.finish_update(args.tokens_per_update, self.loader.wait_seconds - waited)
        self.log_update({"train/loss": loss, "train/tokens": float(self.tokens), **metrics})
        if is_due(self.update_step + 1, args.runtime.check_replicas):
            self.processes.check_replicas(self.model.state_dict(), self.update_step + 1)
        return True

    def lr_multiplier(self) -> float:
        """The share of the peak learning rate for this update."""
        schedule = self.args.schedule
        return lr_multiplier(
            self.update_step,
            schedule.scheduler,
            warmup_steps=schedule.warmup_steps,
            total_steps=schedule.num_training_steps,
            min_lr_ratio=schedule.min_lr_ratio,
            restart_cycles=schedule.restart_cycles,
        )

    def end_early(self, data_before: dict[str, Any]) -> None:
        """Save the state before the update that was begun, and leave a marker."""
        self.optimizer.zero_grad()
        self.flush_metrics()
        self.save(data_before)
        signal_name = next(name for name in self.processes.gather(self.stop.signal_name) if name)
        if self.processes.is_main:
            (self.save_dir / STOP_MARKER).write_text(f"{signal_name} after {self.update_step} updates\n")
        self.logger.say(f"stopped after {self.update_step} updates; --continue_from auto goes on from here")

    # ---- what a person sees

    def log_update(self, metrics: dict[str, Any]) -> None:
        """Hand in the metrics of this update, and write those of the one before, whose values are there by now."""
        done = self.update_step + 1
        low_rank, full_rank = self.optimizer.param_groups[1], self.optimizer.param_groups[0]
        metrics |= {"train/lr": low_rank["lr"], "train/full_rank_lr": full_rank["lr"]}
        metrics |= self.optimizer.subspace_metrics() | self.meter.report() | memory_metrics(self.processes.device)
        self.write_metrics(self.deferred.exchange(done, metrics))

    def flush_metrics(self) -> None:
        """Write the metrics that are still pending."""
        self.write_metrics(self.deferred.take())

    def write_metrics(self, pending: tuple[int, dict[str, float]] | None) -> None:
        """Log metrics that are complete, with the perplexity of the training loss."""
        if pending is None:
            return
        update_step, metrics = pending
        if metrics.pop(PARTLY_MADE):
            raise PartlyMadeUpdateError(update_step - 1)
        if update_step % self.args.logging.log_every == 0:
            self.logger.log(update_step, metrics | {"train/perplexity": math.exp(min(metrics["train/loss"], 700.0))})
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if metrics["train/skipped"] else 0
        limit = self.args.runtime.max_skipped_updates
        if self.skipped_in_a_row > limit:
            raise UserError(
                f"--max_skipped_updates {limit}: {self.skipped_in_a_row} updates in a row had a loss or gradient that "
                f"is not finite, up to update {update_step}. The newest checkpoint in {self.save_dir} is from before "
                "them: resume from it with a lower --lr, with --grad_clipping 1.0 or with --dtype float32"
            )

    def evaluate_if_due(self, last: bool) -> None:
        """Evaluate at the interval asked for and at the end."""
        evaluation = self.args.evaluation
        if not (last or is_due(self.update_step, evaluation.eval_every)):
            return
        self.flush_metrics()
        result = evaluate(self.model, self.eval_set, self.processes.device, self.processes.gather)
        self.logger.log(self.update_step, {f"eval/{name}": float(value) for name, value in result._asdict().items()})
        self.logger.say(f"update {self.update_step}: perplexity {result.perplexity:.3f} on {result.tokens} tokens")


def is_due(update_step: int, interval: int) -> bool:
    """Whether something done every `interval` updates (0: never) is due after `update_step` of them."""
    return interval > 0 and update_step > 0 and update_step % interval == 0


def main(argv: Sequence[str] | None = None) -> int:
    """The program: 0 if it ran or stopped in good order, 1 if a rank was lost, 2 for what the user can mend."""
    try:
        run(argv)
    except UserError as error:
        print(f"run_pretrain.py: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        print(f"run_pretrain.py: another rank has ended or cannot be reached ({error})", file=sys.stderr, flush=True)
        os._exit(1)  # an ordinary end would wait for what the device still expects of that rank
    return 0


if __name__ == "__main__":
    sys.exit(main())
