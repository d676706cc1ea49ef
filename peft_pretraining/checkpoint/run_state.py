"""Save a run's state in checkpoints, choose the one to resume from, and restore it."""

from __future__ import annotations

import contextlib
import json
import re
import traceback
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from peft_pretraining.averaging import WeightAverage
from peft_pretraining.checkpoint.initial_weights import load_initial_weights
from peft_pretraining.checkpoint.recorded_flags import changed_flags
from peft_pretraining.checkpoint.store import (
    Checkpoint,
    Part,
    Unfinished,
    check_compatible,
    check_model_tensors,
    list_checkpoints,
    load_checkpoint,
    load_newest_checkpoint,
    refusal_of,
    set_aside_later,
)
from peft_pretraining.config.flag_groups import ScheduleArgs
from peft_pretraining.config.run_config import RunArgs
from peft_pretraining.config.shard_checks import ranks_that_share
from peft_pretraining.data.train_loader import TrainLoader, merge_states
from peft_pretraining.errors import UserError
from peft_pretraining.models.config import read_config_json
from peft_pretraining.models.config_source import states_in
from peft_pretraining.models.network import CausalLM
from peft_pretraining.optim.lr_schedule import describe_change
from peft_pretraining.optim.protocol import TrainingOptimizer
from peft_pretraining.runtime.world import World
from qgalore.update.newton_schulz import AUTO

_STOP_MARKER = "STOPPED"
# Values that must be the same for a resumed run to equal an uninterrupted one.
_FIXED = (
    "use_hf_model", "dtype", "optimizer", "total_batch_size", "rank", "mlp_rank", "proj_type", "weight_quant",
    "weight_bits", "weight_group_size", "int8_products", "fp8_products", "fp8_weight_gradients", "fp8_head",
    "simulation", "proj_quant", "proj_bits", "proj_group_size", "subspace", "direction", "newton_schulz",
    "momentum_rank", "momentum_rest_bits", "sum_in_momentum", "full_rank_second_moment", "seed", "method",
    "lora_alpha", "qlora_bits", "model_config_contents",
)  # fmt: skip
_MOMENTUM_BY_BETA1 = ("sgd", "adafactor")
"""Optimizers that keep a first moment where `--beta1` is not 0, and none where it is."""
# Values of newer flags for checkpoints that were saved before these flags existed.
_OLD_VALUES = {
    "int8_products": False, "fp8_products": False, "fp8_weight_gradients": False, "fp8_head": False,
    "direction": "adam", "newton_schulz": "muon", "momentum_rank": 0, "momentum_rest_bits": 4,
    "sum_in_momentum": False, "mlp_rank": 0, "full_rank_second_moment": "value", "method": "full",
    "lora_alpha": 32.0, "qlora_bits": 4,
}  # fmt: skip


def refusal_of_start(args: RunArgs) -> str:
    """Why the checkpoints in a run's folder, or the newest of `--continue_from`, would refuse it; "" if they would not.

    Its state.json alone is read, and not checked.
    """
    source, save_dir = args.checkpoint.continue_from, args.checkpoint.save_dir
    folder = Path(save_dir if source == "auto" else source)
    try:
        if save_dir:
            _refuse_another_run(source, Path(save_dir))
    except UserError as error:
        return str(error)
    if not source or not folder.is_dir():
        no_run = source not in ("", "auto") and not folder.is_dir()
        return f"--continue_from {source}: there is no such folder" if no_run else ""
    for path in states_in(folder):
        with contextlib.suppress(OSError, ValueError):
            state = _OLD_VALUES | json.loads(path.read_text(encoding="utf-8"))
            described = args.to_dict() | {"model_config_contents": read_config_json(args.model.model_config)}
            fixed = _fixed_flags(described, state)
            refusal = refusal_of(path.parent, state, {name: described[name] for name in fixed})
            return refusal or _refusal_of_length(args, path.parent, int(path.parent.name.rpartition("_")[2]))
    return ""


def _refusal_of_length(args: RunArgs, path: Path, update_step: int) -> str:
    if update_step <= args.schedule.num_training_steps:
        return ""
    return (
        f"--num_training_steps {args.schedule.num_training_steps}: {path} is after {update_step} updates already; give "
        "at least that many, or an older checkpoint"
    )


@dataclass
class Position:
    """The state of a run beside weights, optimizer and data loader."""

    update_step: int = 0
    """Updates made."""
    tokens: int = 0
    """Tokens read in them, without padding, over all ranks."""
    skipped_in_a_row: int = 0
    """How many of the latest consecutive updates were skipped."""
    wandb_run_id: str | None = None
    initial_weights: str = ""
    """What `--init_from` named when the run began, in words; "" for random weights."""


class RunCheckpoints:
    """Saves and restores a run."""

    def __init__(
        self,
        args: RunArgs,
        world: World,
        model: CausalLM,
        optimizer: TrainingOptimizer,
        loader: TrainLoader,
        average: WeightAverage,
    ) -> None:
        """Take the objects whose state goes into checkpoints."""
        self.save_dir = Path(args.checkpoint.save_dir)
        self.notices: list[str] = []
        """Sentences for the run's log about what `restore` found."""
        self.changed_flags: list[str] = []
        """What a resumed run's command changes of the flags that its checkpoint has recorded, in words."""
        self._args, self._world = args, world
        self._pending: _Pending | None = None
        self._model, self._optimizer, self._loader, self._average = model, optimizer, loader, average
        self.model_config = read_config_json(args.model.model_config)  # once: a source may be gone later
        """The contents of the model's config.json."""

    def restore(self) -> Position:
        """Load the checkpoint of `--continue_from`, if any, else the weights of `--init_from`, if any.

        Raises UserError if the checkpoint is of another run, or the weights of another model.
        """
        checkpoint = choose_checkpoint(self._args.checkpoint.continue_from, self.save_dir, self._world)
        if checkpoint is None:
            if not self._args.model.init_from:
                return Position()
            return Position(initial_weights=load_initial_weights(self._args.model, self._model, self._world))
        described = self._describe()
        checkpoint = replace(checkpoint, state=_OLD_VALUES | checkpoint.state)
        check_compatible(checkpoint, {name: described[name] for name in _fixed_flags(described, checkpoint.state)})
        check_model_tensors(checkpoint, self._model.state_dict())
        self._model.load_state_dict(checkpoint.model_tensors)
        try:
            self._optimizer.load_state_dict(self._with_todays_options(checkpoint.optimizer_state))
        except ValueError as error:
            raise UserError(
                f"--continue_from {checkpoint.path} has the state of another optimizer: {error}. Give the flags of "
                "that run or another checkpoint."
            ) from error
        self._loader.load_state_dict(checkpoint.state["data"])
        if self._optimizer.loss_scale is not None:
            self._optimizer.loss_scale.load_state_dict(checkpoint.state.get("loss_scale_state", {}))
        self._average.load_state_dict(checkpoint.state.get("average"), checkpoint.update_step, checkpoint.path)
        names = ("tokens", "skipped_in_a_row", "wandb_run_id")
        self.changed_flags = changed_flags(self._args, checkpoint.state)
        position = Position(checkpoint.update_step, **{name: checkpoint.state[name] for name in names})
        position.initial_weights = checkpoint.state.get("initial_weights", "")
        if refusal := _refusal_of_length(self._args, checkpoint.path, position.update_step):
            raise UserError(refusal)
        before = {name: checkpoint.state[name] for name in vars(self._args.schedule) if name in checkpoint.state}
        changed = describe_change(self._args.schedule, ScheduleArgs(**before), position.update_step)
        self.notices += [changed] if changed else []
        take_over(checkpoint, self.save_dir, self._world)
        return position

    def _with_todays_options(self, state: dict[str, Any]) -> dict[str, Any]:
        """An optimizer's state with the rates and options of this command, not those that it was saved with."""
        groups = list(state["param_groups"])
        for number, group in enumerate(self._optimizer.param_groups[: len(groups)]):
            groups[number] = groups[number] | {key: value for key, value in group.items() if key != "params"}
        return state | {"param_groups": groups}

    def save(
        self,
        position: Position,
        data_state: dict[str, Any],
        before: Callable[[], None],
        read_back: bool = False,
        wait: bool = True,
    ) -> Path | None:
        """Write a checkpoint and return its path; data_state is the state of this rank's loader.

        `before` is called on the main rank before anything is written; with `read_back` the checkpoint is read again.
        wait: False to let ranks that share a model train on as soon as all is copied to host memory; the path is then
        that of `finish`, which must come before the next save.
        """
        state = self._describe() | {"data": merge_states(self._world.gather(data_state))}
        state |= {name: value for name, value in asdict(position).items() if name != "update_step"}
        if (scale := self._optimizer.loss_scale) is not None:
            state |= {"loss_scale_state": scale.state_dict()}

        def begin() -> Unfinished:
            before()
            return Unfinished.begin(self.save_dir, position.update_step)

        unfinished, part = self._world.from_main(begin), self._part(state)
        if wait or not self._optimizer.owners:
            written: Future[Part | UserError | None] = Future()
            written.set_result(_write(unfinished, self._world.rank, part))
        else:
            thread = ThreadPoolExecutor(1, "checkpoint")
            written = thread.submit(_write, unfinished, self._world.rank, copy_on_host(part, {}))
            thread.shutdown(wait=False)
        self._pending = _Pending(unfinished, written, read_back)
        return self.finish() if wait or not self._optimizer.owners else None

    def is_written(self) -> bool:
        """Whether all ranks have written a save that is not finished; all ask at the same time."""
        return self._pending is not None and self._world.all_on_host(self._pending.written.done())

    def finish(self) -> Path | None:
        """Wait for what is being written, publish it and return its path; None where there is nothing."""
        if self._pending is None:
            return None
        unfinished, pending, read_back = self._pending
        written = self._world.gather(pending.result())  # where this fails because a rank is lost, `close` is left
        self._pending = None

        def publish() -> Path:
            if failed := [part for part in written if isinstance(part, UserError)]:
                raise failed[0]
            parts = [part for part in written if isinstance(part, Part)]
            path = unfinished.publish(parts, self._args.checkpoint.keep_checkpoints)
            return load_checkpoint(path).path if read_back else path

        try:
            return self._world.from_main(publish)
        finally:
            if self._world.is_main:  # nothing is left but after an error: also a KeyboardInterrupt or a bug
                unfinished.abandon()

    def close(self) -> Path | None:
        """Publish a save that is not finished, if all ranks have written it, else give it up; returns its path.

        Without the other ranks, which may have ended: what they have written they have noted beside it. For them it
        waits up to `_PATIENCE_SECONDS`.
        """
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        wait_for([pending.written])
        if not self._world.is_main:
            return None
        try:
            parts = pending.unfinished.noted_parts(range(self._writers), _PATIENCE_SECONDS)
            if parts is None:
                return None
            return pending.unfinished.publish(parts, self._args.checkpoint.keep_checkpoints)
        finally:
            pending.unfinished.abandon()

    def _part(self, state: dict[str, Any]) -> _PartOfRank | None:
        """What this rank has of a checkpoint; None for a rank that has nothing of its own."""
        rank = self._world.rank
        if rank >= self._writers:
            return None
        model_tensors, optimizer_state = part_of_model(self._model, self._optimizer, rank), self._optimizer.state_dict()
        if rank:
            return model_tensors, {"state": optimizer_state["state"]}, None
        average = self._average.state_dict()
        return model_tensors, optimizer_state, state if average is None else state | {"average": average}

    @property
    def _writers(self) -> int:
        """The first so many ranks write: those of the first machine where they share a model, each of which has a part.

        Other machines have the same parts.
        """
        return ranks_that_share(self._world.world_size) if self._optimizer.owners else 1

    def mark_stop(self, why: str) -> None:
        """Write a file in the run's folder with the reason why it ended early."""
        if self._world.is_main:
            (self.save_dir / _STOP_MARKER).write_text(f"{why}\n")

    def clear_stop_marker(self) -> None:
        """Delete the file of `mark_stop` of an earlier part of the run."""
        if self._world.is_main:
            (self.save_dir / _STOP_MARKER).unlink(missing_ok=True)

    def _describe(self) -> dict[str, Any]:
        return {**self._args.to_dict(), "model_config_contents": self.model_config}


_PartOfRank = tuple[dict[str, Tensor], dict[str, Any], dict[str, Any] | None]
"""(weights, state of the optimizer, the rest on the main rank): the arguments of `Unfinished.write`."""


class _Pending(NamedTuple):
    """A save that is being written."""

    unfinished: Unfinished
    written: Future[Part | UserError | None]
    """What this rank wrote, or why not."""
    read_back: bool


def _write(unfinished: Unfinished, rank: int, part: _PartOfRank | None) -> Part | UserError | None:
    if part is None:
        return None
    try:
        return unfinished.write(rank, *part)
    except UserError as error:  # which all ranks are to learn
        return error
    except Exception as error:  # a bug: the others wait for an answer, whatever it is
        traceback.print_exc()
        return UserError(
            f"{unfinished.target} was not saved: rank {rank} could not write its part ({type(error).__name__}: {error})"
        )


_PATIENCE_SECONDS = 20.0
"""torchrun kills the ranks that are left 30 seconds after it has asked them to end."""


def copy_on_host(tree: Any, copies: dict[tuple[Any, ...], Tensor]) -> Any:
    """A nest of dicts, lists and tuples with all tensors copied to host memory; one that is there twice is one copy."""
    if isinstance(tree, Tensor):
        same = tree.device, tree.data_ptr(), tree.dtype, tuple(tree.shape), tree.stride()
        if same not in copies or not tree.numel():
            copies[same] = tree.detach().to("cpu", copy=True)
        return copies[same]
    if isinstance(tree, dict):
        return {key: copy_on_host(value, copies) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(copy_on_host(value, copies) for value in tree)
    return tree


def part_of_model(model: nn.Module, optimizer: TrainingOptimizer, rank: int) -> dict[str, Tensor]:
    """What rank number `rank` saves of a model's state dict: the weights that it owns, the first rank also the rest.

    Of a weight of which it has some rows these.
    """
    tensors, owners = model.state_dict(), optimizer.owners
    found: dict[str, Tensor] = {}
    params = params_of_entries(model, tensors)
    for name, value in tensors.items():
        kept = optimizer.kept_rows(params[name]) if name in params else None
        if kept is not None:
            found[name] = kept[1]
        elif (owners.get(params[name], 0) if name in params else 0) == rank:
            found[name] = value
    return found


def tensors_here(model: nn.Module, optimizer: TrainingOptimizer) -> dict[str, Tensor]:
    """A model's state dict without what other ranks alone have of it; of rows the name says so."""
    tensors = model.state_dict()
    found: dict[str, Tensor] = {}
    params = params_of_entries(model, tensors)
    for name, value in tensors.items():
        kept = optimizer.kept_rows(params[name]) if name in params else None
        if kept is not None:
            found[f"{name} from row {kept[0]} on"] = kept[1]
        elif name not in params or not optimizer.is_elsewhere(params[name]):
            found[name] = value
    return found


def params_of_entries(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """The parameter that each entry of a model's state dict belongs to, by the entry's name; buffers have none.

    names: of the entries. A second state dict would make a second copy of all codes whose rows are padded.
    """
    params = dict(model.named_parameters(remove_duplicate=False))
    found = {name: params.get(name, params.get(_OF_CODES.sub("", name))) for name in names}
    return {name: param for name, param in found.items() if param is not None}


def _fixed_flags(here: Mapping[str, Any], there: Mapping[str, Any]) -> tuple[str, ...]:
    """What must be the same in a run, `here`, as in its checkpoint, `there`: both by the names of flags."""
    fixed: tuple[str, ...] = _FIXED
    if (there.get("newton_schulz"), here["newton_schulz"]) == (AUTO, "muon"):  # which auto is on some GPUs
        fixed = tuple(name for name in _FIXED if name != "newton_schulz")
    moments = [values.get("optimizer") in _MOMENTUM_BY_BETA1 and bool(values.get("beta1")) for values in (here, there)]
    return fixed if moments[0] == moments[1] else (*fixed, "beta1")


_OF_CODES = re.compile(r"_(qdata|scale|zero_point|format)$")
"""What stands for a quantized weight in a state dict, behind its name."""


def choose_checkpoint(continue_from: str, save_dir: Path, world: World) -> Checkpoint | None:
    """Load the checkpoint of `--continue_from`: a folder, `auto` for the newest valid one in save_dir, or "" for none.

    The main rank checks hashes and prints what it refused. Raises UserError, also where save_dir holds another run.
    """
    world.from_main(lambda: _refuse_another_run(continue_from, save_dir))
    if not continue_from:
        return None

    chosen: list[Checkpoint | None] = []

    def choose() -> Path | None:
        if continue_from == "auto":
            checkpoint, refusals = load_newest_checkpoint(save_dir)
            for refusal in refusals:
                print(refusal, flush=True)
        else:
            checkpoint = load_checkpoint(continue_from)
        chosen.append(checkpoint)
        return None if checkpoint is None else checkpoint.path

    path = world.from_main(choose)
    if world.is_main:
        return chosen[0]
    return None if path is None else load_checkpoint(path, check=False)


def take_over(checkpoint: Checkpoint, save_dir: Path, world: World) -> None:
    """Rename checkpoints later than the one that is resumed, so that `auto` never mixes two histories of a run."""
    if checkpoint.path.resolve().parent == save_dir.resolve():
        world.from_main(lambda: set_aside_later(save_dir, checkpoint.update_step) and None)


def from_newest_checkpoint(args: RunArgs, world: World) -> RunArgs:
    """The arguments with which a run goes back to the newest checkpoint in its folder, else to its start."""
    save_dir = Path(args.checkpoint.save_dir)
    has_one = world.from_main(lambda: bool(list_checkpoints(save_dir)))
    return args.in_folder(save_dir, "auto" if has_one else None)


def _refuse_another_run(continue_from: str, save_dir: Path) -> None:
    if continue_from == "auto" or (continue_from and Path(continue_from).resolve().parent == save_dir.resolve()):
        return
    if list_checkpoints(save_dir):
        raise UserError(
            f"--save_dir {save_dir} holds the checkpoints of another run: give --continue_from auto to go on with it, "
            "or another --save_dir"
        )
