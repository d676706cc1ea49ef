"""Pretrain LLaMA with Q-GaLore: the run, told from top to bottom.

    torchrun --standalone --nproc_per_node 1 run_pretrain.py --model_config configs/llama_60m.json --batch_size 256 ...

`--help` lists the flags; `--dry_run` prints what a command would do and how much memory it would take.
"""

from __future__ import annotations

import gc
import itertools
import os
import sys
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NoReturn

import torch

from peft_pretraining.args import RunArgs, parse_args
from peft_pretraining.checkpoint import hold_folder
from peft_pretraining.dataloader import TrainLoader, build_train_loader
from peft_pretraining.distributed import Processes, is_lost_rank, start_processes, world_size_of_launch
from peft_pretraining.errors import UserError
from peft_pretraining.eval_set import EvalSet, build_eval_set
from peft_pretraining.evaluation import evaluate
from peft_pretraining.lr_schedule import lr_multiplier, set_learning_rate
from peft_pretraining.memory_advice import out_of_memory, warning_of_memory
from peft_pretraining.model import CausalLM, build_model, compile_for, parameter_count
from peft_pretraining.optimizers import (
    TrainingOptimizer,
    allows_graphs,
    build_optimizer,
    low_rank_converter,
    replay_layers,
)
from peft_pretraining.run_checkpoints import RunCheckpoints, from_newest_checkpoint
from peft_pretraining.run_metrics import RunMetrics
from peft_pretraining.signals import StopRequest
from peft_pretraining.token_files import is_token_dataset
from peft_pretraining.tokenizer import check_vocabulary, load_tokenizer
from peft_pretraining.update_outcomes import FinishedUpdate, Outcome, UpdateOutcomes, too_many_skipped

STOP_MARKER = "STOPPED"


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
        warning = warning_of_memory(args, processes.device)
        if warning is not None and processes.is_main:
            print(f"warning: {warning}", file=sys.stderr)
        left_out: set[int] = set()
        while (update_step := train(args, processes, stop, left_out)) is not None:
            left_out.add(update_step)
            args = from_newest_checkpoint(args, processes)
            gc.collect()  # a model and its hooks refer to each other
    except torch.OutOfMemoryError as error:
        raise UserError(out_of_memory(args, processes.device)) from error
    finally:
        if not is_lost_rank(sys.exc_info()[1]):  # taking leave would wait for it
            processes.close()


class GoBackError(Exception):
    """The weights are those of no update: the run must go back and leave out the update after `update_step`."""

    def __init__(self, update_step: int) -> None:
        """update_step: how many updates were whole."""
        super().__init__(update_step)
        self.update_step = update_step


def train(args: RunArgs, processes: Processes, stop: StopRequest, left_out: set[int]) -> int | None:
    """Train to the end, or up to an update that was partly made: then its step, for another try that leaves it out."""
    run = Run(args, processes, stop, left_out)
    try:
        run.train()
        return None
    except GoBackError as error:
        run.metrics.say(
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
    if data.dataset != "c4":  # the hub's has text, and would have to be waited for
        processes.from_main(eval_set.check)
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
        args.model.checkpoint_every,
        args.model.int8_activations,
        on_module=low_rank_converter(args.optimizer, args.quantization),
    )
    compile_for(model, args.model.compile, processes.device)
    optimizer = build_optimizer(
        model, args.optimizer, args.quantization, args.subspace, args.runtime.seed, processes.gradient_all_reduce()
    )
    if allows_graphs(args):
        replay_layers(model, optimizer)
    return model, optimizer


class Run:
    """A training run: what it is made of, and its loop."""

    def __init__(self, args: RunArgs, processes: Processes, stop: StopRequest, left_out: set[int]) -> None:
        """Build everything and, where asked, take up a checkpoint; the updates in left_out will change nothing."""
        self.args, self.processes, self.stop, self.left_out = args, processes, stop, left_out
        self.loader, self.eval_set = build_data(args, processes)
        self.model, self.optimizer = build(args, processes)
        check_vocabulary(max(self.loader.vocab_size, self.eval_set.vocab_size), self.model.config.vocab_size)
        self.checkpoints = RunCheckpoints(args, processes, self.model, self.optimizer, self.loader)
        self.position = self.checkpoints.restore()
        self.metrics = RunMetrics(args, processes, self.model, self.position)
        self.outcomes = UpdateOutcomes()
        self.marker = self.checkpoints.save_dir / STOP_MARKER

    @property
    def update_step(self) -> int:
        """Updates made."""
        return self.position.update_step

    def train(self) -> None:
        """All updates, with the evaluations and checkpoints that are due; ends early where a stop is asked for."""
        size, ranks = parameter_count(self.model) / 1e6, self.processes.world_size
        self.metrics.say(f"{size:.1f} M parameters on {ranks} x {self.processes.device}")
        first, total = self.update_step, self.args.schedule.num_training_steps
        if first:
            self.metrics.say(f"{first} of {total} updates are made already")
        for warning in self.args.warnings:
            self.metrics.say(f"warning: {warning}")
        if self.processes.is_main:
            self.marker.unlink(missing_ok=True)
        for self.position.update_step in itertools.count(first):
            last = self.update_step == total
            # Nothing is done twice: a resumed run has the evaluation and the checkpoint it starts from.
            if self.update_step > first:
                self.evaluate_if_due(last)
                if last or is_due(self.update_step, self.args.checkpoint.save_every):
                    self.save(self.loader.state_dict())
            elif first == 0 and self.args.checkpoint.save_every:
                # A run that cannot save, or cannot read what it saved, says so before it has anything to lose.
                self.save(self.loader.state_dict(), read_back=True)
            if last or not self.update():
                return

    def update(self) -> bool:
        """One update; False where a stop was asked for, with everything as it was before the update."""
        data_before = self.loader.state_dict()
        self.metrics.start_update(self.loader.wait_seconds)
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
            input_ids = self.processes.to_device(micro_batch.input_ids)
            labels = self.processes.to_device(micro_batch.labels)
            # Divided by the targets of the whole update, so that how it is split cannot change the gradient.
            micro_loss = self.model(input_ids, labels).loss_sum / target_tokens
            loss += micro_loss.detach()
            if self.optimizer.is_last_micro_batch:
                # The loss of the update is known before the first weight can be touched.
                self.processes.all_reduce(loss)
                broken = ~loss.isfinite()
                self.optimizer.skip_update_if(torch.ones_like(broken) if self.update_step in self.left_out else broken)
            micro_loss.backward()
        if self.args.optimizer.grad_clipping:
            self.optimizer.clip_grad_norm_(self.args.optimizer.grad_clipping)
        self.optimizer.step()
        self.position.tokens += self.processes.sum_on_host(update.tokens)
        done = self.update_step + 1
        # The update before is waited for within the time of this one: a host that runs ahead would seem faster than the
        # device.
        before = self.outcomes.take()
        measured = self.metrics.finish_update(self.loader.wait_seconds, waited_for_device=before is not None)
        metrics: dict[str, float | torch.Tensor] = {"train/loss": loss, "train/tokens": float(self.position.tokens)}
        self.outcomes.put(done, metrics, self.optimizer, measured)
        self.decide(before)
        self.optimizer.zero_grad()
        if is_due(done, self.args.runtime.check_replicas):
            self.processes.check_replicas(self.model.state_dict(), done)
        return True

    def decide(self, finished: FinishedUpdate | None) -> None:
        """Go on after an update whose outcome is known by now, go back, or end the run; logs the update."""
        if finished is None:
            return
        if finished.outcome is Outcome.PARTLY_MADE:
            raise GoBackError(finished.update_step - 1)
        self.metrics.update(finished)
        skipped = finished.outcome is Outcome.SKIPPED
        self.position.skipped_in_a_row = self.position.skipped_in_a_row + 1 if skipped else 0
        if self.position.skipped_in_a_row > self.args.runtime.max_skipped_updates:
            raise UserError(too_many_skipped(self.args, self.position.skipped_in_a_row, finished.update_step))

    def lr_multiplier(self) -> float:
        """The share of the peak learning rate for the next update."""
        schedule = self.args.schedule
        return lr_multiplier(
            self.update_step,
            schedule.scheduler,
            warmup_steps=schedule.warmup_steps,
            total_steps=schedule.num_training_steps,
            min_lr_ratio=schedule.min_lr_ratio,
            restart_cycles=schedule.restart_cycles,
        )

    def evaluate_if_due(self, last: bool) -> None:
        """Evaluate at the interval asked for and at the end."""
        if last or is_due(self.update_step, self.args.evaluation.eval_every):
            self.decide(self.outcomes.take())
            result = evaluate(self.model, self.eval_set, self.processes.device, self.processes.gather)
            self.metrics.evaluation(self.update_step, result)

    def save(self, data_state: dict[str, Any], read_back: bool = False) -> None:
        """Write a checkpoint of the state after `update_step` updates; data_state is this rank's part of the data's."""
        self.decide(self.outcomes.take())
        # That of the next update, whether or not a stop came after it was set.
        set_learning_rate(self.optimizer, self.lr_multiplier())
        path = self.checkpoints.save(self.position, data_state, before=self.metrics.sync, read_back=read_back)
        self.metrics.say(f"saved {path}")

    def end_early(self, data_before: dict[str, Any]) -> None:
        """Save the state before the update that was begun, and leave a marker."""
        self.optimizer.zero_grad()
        self.save(data_before)
        signal_name = next(name for name in self.processes.gather(self.stop.signal_name) if name)
        if self.processes.is_main:
            self.marker.write_text(f"{signal_name} after {self.update_step} updates\n")
        self.metrics.say(f"stopped after {self.update_step} updates; --continue_from auto goes on from here")

    def close(self) -> None:
        """End the loader's threads and close the metrics."""
        self.loader.close()
        self.metrics.close(failed=sys.exc_info()[1] is not None)


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


def leave(code: int) -> NoReturn:
    """End the process; everything of a run is closed by now.

    One of several ranks leaves at once. Threads that libraries have left behind can abort an ordinary end (seen once:
    "terminate called without an active exception"), and torchrun would then take a run that is over for a failed one.
    """
    if world_size_of_launch() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    leave(main())
