"""Pretrain LLaMA with Q-GaLore: a training run from start to end.

    torchrun --standalone --nproc_per_node 1 run_pretrain.py --model_config configs/llama_60m.json --batch_size 256 ...

The installed command `qgalore pretrain` is the same program.
`--help` lists the flags; `--dry_run` prints what a command would do and how much memory it would take.
"""

from __future__ import annotations

import gc
import itertools
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before what takes seconds to load
    from peft_pretraining.runtime.interrupt import end_on_interrupt

    end_on_interrupt("run_pretrain.py")

import torch

from peft_pretraining.accumulation.layer_by_layer import LayerByLayer
from peft_pretraining.averaging import WeightAverage
from peft_pretraining.build import build_data, build_training, shape_of
from peft_pretraining.checkpoint.folder import FolderLock, lock_folder
from peft_pretraining.checkpoint.run_state import (
    RunCheckpoints,
    from_newest_checkpoint,
    refusal_of_start,
    tensors_here,
)
from peft_pretraining.config.run_config import RunArgs
from peft_pretraining.data.batch import Update
from peft_pretraining.data.tokenizer import check_vocabulary, keep_trained
from peft_pretraining.errors import UserError
from peft_pretraining.evaluation import EvalResult, evaluate
from peft_pretraining.memory.advice import out_of_memory, warning_of_memory
from peft_pretraining.memory.agreement import agree_on_flags
from peft_pretraining.memory.budget import parse_within_budget
from peft_pretraining.memory.card_memory import card_here
from peft_pretraining.memory.dealt_states import prepare_mesh
from peft_pretraining.memory.fp8_gain import warning_of_fp8_gain
from peft_pretraining.memory.fp8_gradients import warning_of_fp8_gradients
from peft_pretraining.memory.host import missing_host_memory, not_locked
from peft_pretraining.methods.dropout import begin_pass, dropouts_of
from peft_pretraining.methods.restarts import AdapterRestarts
from peft_pretraining.optim.adam8bit_backend import backend_of, rounds_zeros_up, with_backend
from peft_pretraining.optim.lr_schedule import restarts_of, scheduled_multiplier, set_learning_rate
from peft_pretraining.reporting.reporter import RunMetrics
from peft_pretraining.reporting.run_files import write_run_files
from peft_pretraining.runtime.alike_steps import with_steps_of_all
from peft_pretraining.runtime.device import check_device, emulated_products, slow_dtype
from peft_pretraining.runtime.process import exit_code_of, leave, make_reproducible
from peft_pretraining.runtime.rendezvous import check_launch, world_size_of_launch
from peft_pretraining.runtime.signals import StopRequest
from peft_pretraining.runtime.trained_alike import check_trained_alike, names_of, numbers_to_sum
from peft_pretraining.runtime.update_outcomes import (
    FinishedUpdate,
    Outcome,
    RollbackError,
    UpdateOutcomes,
    too_many_skipped,
)
from peft_pretraining.runtime.world import World, is_lost_rank, start_world
from peft_pretraining.speed.direction_price import warning_of_direction
from qgalore.offload.page_locked import PageLockError

PROGRAM = "run_pretrain.py"


def run(argv: Sequence[str] | None, program: str = PROGRAM) -> None:
    """Run a training run from its command line; raises UserError for what the user can fix.

    program: the command that the usage names.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = parse_within_budget(argv, world_size_of_launch(), program=program)
    if args.runtime.dry_run:
        from peft_pretraining.dry_run import print_description

        return print_description(args, refusal_of_start(args))
    check_launch()
    stop = StopRequest()
    world = start_world(args.runtime.device, stop)
    locks: list[FolderLock] = []  # of the main rank; kept until the run ends
    try:
        args = agree_on_flags(args, world)
        make_reproducible(args.model.dtype)
        check_device(world.device, args.model.dtype, args.quantization, args.newton_schulz)
        args = with_steps_of_all(args, world)
        args = with_backend(args, world.from_main(lambda: backend_of(args, world.device)))
        if missing := next(filter(None, world.gather(missing_host_memory(args))), None):
            raise UserError(missing)
        args = args.in_folder(world.from_main(lambda: args.save_dir(datetime.now())))
        world.from_main(lambda: locks.append(lock_folder(args.checkpoint.save_dir)))
        device, config = world.device, shape_of(args.model)
        counted = (warning_of_direction, warning_of_fp8_gain) if device.type == "cuda" else ()
        warnings = (
            warning_of_memory(args, device), slow_dtype(device, args.model.dtype), rounds_zeros_up(args, device),
            emulated_products(device, args.quantization, args.newton_schulz),
            warning_of_fp8_gradients(args, config), *(warning_of(args, config, card_here()) for warning_of in counted),
        )  # fmt: skip
        for warning in filter(None, warnings if world.is_main else ()):
            print(f"warning: {warning}", file=sys.stderr)
        skip_steps: set[int] = set()
        while (update_step := train(args, world, stop, skip_steps)) is not None:
            skip_steps.add(update_step)
            args = from_newest_checkpoint(args, world)
            gc.collect()  # a model and its hooks are a reference cycle
    except torch.OutOfMemoryError as error:
        raise UserError(out_of_memory(args, world.device)) from error
    except PageLockError as error:
        raise UserError(not_locked(args, error)) from error
    finally:
        for lock in locks:  # a run that was refused has left nothing else
            lock.remove_unused()
            lock.release()
        if not is_lost_rank(sys.exc_info()[1]):  # closing the process group would wait for that rank
            world.close()


def train(args: RunArgs, world: World, stop: StopRequest, skip_steps: set[int]) -> int | None:
    """Train to the end, or to an update that was partly applied; returns its step, for another try that skips it."""
    run = Run(args, world, stop, skip_steps)
    try:
        run.train()
        return None
    except RollbackError as error:
        run.finish_save()  # the newest checkpoint, to which the run goes back
        run.metrics.log(str(error))
        return error.update_step
    finally:
        run.close()


class Run:
    """A training run: its parts and its loop."""

    def __init__(self, args: RunArgs, world: World, stop: StopRequest, skip_steps: set[int]) -> None:
        """Build all parts and load the checkpoint, if any; updates whose index is in skip_steps change nothing."""
        self.args, self.world, self.stop, self.skip_steps = args, world, stop, skip_steps
        mesh = world.shard_mesh(args.runtime.shard)
        if mesh is not None:
            prepare_mesh(mesh, args)
        self.loader, self.eval_set = build_data(args, world)
        all_reduce = world.gradient_all_reduce() if mesh is None else None
        self.model, self.optimizer = build_training(args, world.device, all_reduce, mesh)
        self.average = WeightAverage(args, world, self.model)
        self.by_layer = LayerByLayer(self.model, self.optimizer) if args.by_layer else None
        self.restarts, self.dropouts = AdapterRestarts(args, self.model, self.optimizer), dropouts_of(self.model)
        self.checkpoints = RunCheckpoints(args, world, self.model, self.optimizer, self.loader, self.average)
        self.position = self.checkpoints.restore()
        ids, are_ids = max(self.loader.vocab_size, self.eval_set.vocab_size), self.loader.tokenizer is None
        check_vocabulary(ids, self.model.config.vocab_size, are_ids)
        world.from_main(lambda: keep_trained(self.loader.tokenizer, Path(args.checkpoint.save_dir)))
        if not skip_steps:  # else it is the same start once more
            world.from_main(lambda: write_run_files(args, self.checkpoints.model_config, self.update_step))
        self.metrics = RunMetrics(args, world, self.model, self.position)
        self.outcomes = UpdateOutcomes()
        self.noticed: set[str] = set()
        self.names: dict[torch.Tensor, str] = {param: name for name, param in self.model.named_parameters()}

    @property
    def update_step(self) -> int:
        """The number of finished updates."""
        return self.position.update_step

    def train(self) -> None:
        """Make all updates, with the evaluations and checkpoints that are due; returns early on a stop request."""
        data = [*self.loader.describe(), *self.checkpoints.notices]
        self.metrics.announce(data, self.checkpoints.changed_flags)
        first, total = self.update_step, self.args.schedule.num_training_steps
        self.checkpoints.clear_stop_marker()
        for self.position.update_step in itertools.count(first):
            last = self.update_step == total or self.data_has_ended()
            # A resumed run has the evaluation and the checkpoint of its first step already.
            if self.update_step > first:
                self.evaluate_if_due(last)
                of_end = last and self.args.checkpoint.save_last
                if of_end or is_due(self.update_step, self.args.checkpoint.save_every):
                    self.save(self.loader.state_dict(), wait=last)
            elif first == 0:
                if self.args.model.init_from:  # what training has to improve on
                    self.metrics.evaluation(0, self.evaluate())
                if self.args.checkpoint.save_every:
                    # A run that cannot save, or cannot read what it saved, fails before it has anything to lose.
                    self.save(self.loader.state_dict(), read_back=True)
            if last or not self.update():
                return

    def data_has_ended(self) -> bool:
        """Whether no rank has a further document (--repeat none); logs it."""
        if self.args.data.repeat == "each" or not self.world.all_on_host(self.loader.ended):
            return False
        total = self.args.schedule.num_training_steps
        self.metrics.log(
            f"the data has ended after {self.update_step} of {total} updates (--repeat none); the learning rate was "
            f"scheduled for {total}"
        )
        return True

    def update(self) -> bool:
        """Make one update; returns False on a stop request, after saving the state before the update."""
        data_before = self.loader.state_dict()
        self.metrics.start_update(self.loader.wait_seconds)
        received = self.next_update()
        if received is None:
            self.end_early(data_before)
            return False
        update, target_tokens = received
        self.set_learning_rate()
        if self.update_step in self.skip_steps:  # before momenta have any of its gradients; `check_loss` leaves it so
            self.optimizer.skip_update_if(torch.ones((), dtype=torch.bool, device=self.world.device))
        accumulate = self.accumulate if self.by_layer is None else self.accumulate_by_layer
        loss = accumulate(update, target_tokens)
        if loss is None:
            self.end_early(data_before)
            return False
        if self.args.optimizer.grad_clipping:
            self.optimizer.clip_grad_norm_(self.args.optimizer.grad_clipping)
        self.optimizer.step()
        summed = names_of(self.optimizer.summed, self.names) if self.world.world_size > 1 else []
        done = self.update_step + 1
        numbers = [update.tokens, len(self.loader.notices), *numbers_to_sum(summed)]
        tokens, news, *alike = self.world.sums_on_host(numbers)
        check_trained_alike(self.world, summed, alike, done)
        self.position.tokens += tokens
        self.average.after_update(done)
        if self.restarts.after_update(done):
            self.metrics.log(f"update {done}: adapters are merged into their matrices and begin anew")
        # Wait for the previous update within the timing of this one: else only the host's launches would be timed.
        previous = self.outcomes.take()
        measured = self.metrics.finish_update(self.loader.wait_seconds, waited_for_device=previous is not None)
        metrics: dict[str, float | torch.Tensor] = {"train/loss": loss, "train/tokens": float(self.position.tokens)}
        self.outcomes.put(done, metrics, self.optimizer, measured)
        if self.optimizer.loss_scale is not None:
            self.optimizer.loss_scale.update_(self.optimizer.skipped())
        self.decide(previous)
        self.optimizer.zero_grad()
        if news:
            self.log_notices(done)
        if is_due(done, self.args.runtime.check_replicas):
            self.world.check_replicas(tensors_here(self.model, self.optimizer), done)
        if self.checkpoints.is_written():
            self.finish_save()
        return True

    def accumulate(self, update: Update, target_tokens: int) -> torch.Tensor | None:
        """Make the passes of one micro-batch after the other; returns the update's loss (), None on a stop request."""
        loss = torch.zeros((), device=self.world.device)
        for micro_step, micro_batch in enumerate(update.micro_batches, start=1):
            # Momenta that have gradients of an update cannot be taken back: it is then made to its end.
            may_stop = micro_step == 1 or not self.optimizer.sums_in_momentum
            if may_stop and not self.world.all_on_host(not self.stop.requested):
                return None
            self.optimizer.is_last_micro_batch = micro_step == len(update.micro_batches)
            begin_pass(self.dropouts, self.update_step, micro_step, self.world.rank)
            input_ids = self.world.to_device(micro_batch.input_ids)
            labels = self.world.to_device(micro_batch.labels)
            # Divided by the targets of the whole update, so that its split into micro-batches changes no gradient.
            micro_loss = self.model(input_ids, labels).loss_sum / target_tokens
            loss += micro_loss.detach()
            if self.optimizer.is_last_micro_batch:
                self.check_loss(loss)
            scale = self.optimizer.loss_scale
            (micro_loss if scale is None else scale.scaled(micro_loss)).backward()
        return loss

    def accumulate_by_layer(self, update: Update, target_tokens: int) -> torch.Tensor | None:
        """The same with the passes of all micro-batches in one layer after the other; stops before the first update."""
        assert self.by_layer is not None
        batches = [(self.world.to_device(x.input_ids), self.world.to_device(x.labels)) for x in update.micro_batches]

        def begin(micro_step: int) -> None:
            begin_pass(self.dropouts, self.update_step, micro_step, self.world.rank)

        goes_on = self.by_layer.forward(batches, begin, lambda: self.world.all_on_host(not self.stop.requested))
        return self.by_layer.backward(target_tokens, self.check_loss) if goes_on else None

    def check_loss(self, loss: torch.Tensor) -> None:
        """Sum the loss () of the whole update over the ranks, and let the update be skipped if it is not finite.

        Before the last backward pass, which may update weights.
        """
        self.world.all_reduce(loss)
        self.optimizer.skip_update_if(~loss.isfinite())

    def log_notices(self, done: int) -> None:
        """Log what the loader of any rank has noticed about the data, each sentence once in a run."""
        for text in itertools.chain(*self.world.gather(list(self.loader.notices))):
            if text not in self.noticed:
                self.metrics.log(f"update {done}: {text}")
                self.noticed.add(text)
        self.loader.notices.clear()

    def next_update(self) -> tuple[Update, int] | None:
        """(this rank's part of the next update, number of target tokens over all ranks); None on a stop request."""
        while True:
            update = self.loader.next_update(give_up=lambda: self.stop.requested)
            mine = [0, 0] if update is None else [1, update.target_tokens]
            received, target_tokens = self.world.sums_on_host(mine)
            if update is None or received < self.world.world_size:
                return None
            # Near the end of data that is not repeated all rows of an update may come from exhausted logical shards.
            if target_tokens:
                return update, target_tokens

    def decide(self, finished: FinishedUpdate | None) -> None:
        """Log an update whose outcome is known by now; raises RollbackError or UserError if the run cannot go on."""
        if finished is None:
            return
        if finished.outcome is Outcome.LATE_OVERFLOW:
            raise RollbackError(finished.update_step - 1)
        self.metrics.update(finished)
        if finished.outcome is Outcome.SCALE_TOO_LARGE:
            return  # as often as the loss scale needs it
        skipped = finished.outcome is Outcome.SKIPPED
        self.position.skipped_in_a_row = self.position.skipped_in_a_row + 1 if skipped else 0
        if self.position.skipped_in_a_row > self.args.runtime.max_skipped_updates:
            raise UserError(too_many_skipped(self.args, self.position.skipped_in_a_row, finished.update_step))

    def evaluate_if_due(self, last: bool) -> None:
        """Evaluate after every `eval_every` updates and after the last one."""
        if last or is_due(self.update_step, self.args.evaluation.eval_every):
            self.decide(self.outcomes.take())
            result, averaged = self.evaluate(), {}
            for form in self.average.forms if last else []:
                with self.average.in_model(form):
                    averaged[form] = self.evaluate()
            self.metrics.evaluation(self.update_step, result, averaged)

    def evaluate(self) -> EvalResult:
        """Evaluate the model as it is now."""
        alike = self.world.any_on_host if self.args.gathers_layers else None
        return evaluate(self.model, self.eval_set, self.world.device, self.world.gather, alike)

    def save(self, data_state: dict[str, Any], read_back: bool = False, wait: bool = True) -> None:
        """Write a checkpoint of the state after `update_step` updates; data_state is of this rank's loader.

        read_back: also read it again, to test that it can be loaded. wait: until it is there.
        """
        self.finish_save()
        self.decide(self.outcomes.take())
        # A checkpoint has the learning rate of the next update, whether or not a stop came after it was set.
        self.set_learning_rate()
        path = self.checkpoints.save(self.position, data_state, self.metrics.sync, read_back, wait)
        if path is not None:
            self.metrics.log(f"saved {path}")

    def finish_save(self) -> None:
        """Wait for a checkpoint that is being written, if one is."""
        if (path := self.checkpoints.finish()) is not None:
            self.metrics.log(f"saved {path}")

    def set_learning_rate(self) -> None:
        """Set the learning rate of the next update."""
        multiplier = scheduled_multiplier(self.args.schedule, self.update_step, restarts_of(self.args.method))
        set_learning_rate(self.optimizer, multiplier)

    def end_early(self, data_before: dict[str, Any]) -> None:
        """Save the state before the unfinished update, and write a marker file."""
        self.optimizer.zero_grad()
        self.save(data_before)
        signal_name = next(name for name in self.world.gather(self.stop.signal_name) if name)
        self.checkpoints.mark_stop(f"{signal_name} after {self.update_step} updates")
        self.metrics.log(f"stopped after {self.update_step} updates; --continue_from auto goes on from here")

    def close(self) -> None:
        """Stop the threads and close the metrics."""
        self.loader.close()
        if (path := self.checkpoints.close()) is not None:
            self.metrics.log(f"saved {path}")
        self.average.close()
        self.metrics.close(failed=sys.exc_info()[1] is not None)


def is_due(update_step: int, interval: int) -> bool:
    """Whether something done every `interval` updates (0: never) is due after update `update_step`."""
    return interval > 0 and update_step > 0 and update_step % interval == 0


def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Run the program; returns its exit code. Messages name the command `program`."""
    return exit_code_of(lambda: run(argv, program), program)


if __name__ == "__main__":
    leave(main())
