"""What a run's folder says of it beside its metrics: flags, model config, checkpoints, how it stands, its memory."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from peft_pretraining.checkpoint.folder import list_checkpoints, step_of
from peft_pretraining.config.run_config import GROUPS, RunArgs
from peft_pretraining.errors import UserError
from peft_pretraining.memory.plan import MemoryPlan, plan
from peft_pretraining.models.config import ModelConfig
from peft_pretraining.models.registry import config_from

_STOP_MARKER, _COMMANDS, _CONFIG = "STOPPED", "command.txt", "config.json"


@dataclass(frozen=True)
class RecordedRun:
    """A run as its newest readable checkpoint describes it."""

    folder: Path
    checkpoint: Path | None
    """None where the run has none that can be read."""
    state: dict[str, Any]
    """Of that checkpoint, with tensors left out; {} without one."""
    checkpoints: list[int]
    """The updates after which there are checkpoints."""
    stopped: str
    """Why and when the run was stopped; "" where it was not."""
    commands: str = ""
    """A line for each start: the command, and as a comment the time and the versions; "" of older runs."""
    folder_config: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The contents of the folder's config.json; {} where there is none."""

    @cached_property
    def flags(self) -> dict[str, dict[str, Any]]:
        """The flags as resolved, by group; those that are newer than the checkpoint are left out."""
        names = {group: [field.name for field in dataclasses.fields(kind)] for group, kind in GROUPS.items()}
        found = {group: {name: self.state[name] for name in of if name in self.state} for group, of in names.items()}
        return {group: values for group, values in found.items() if values}

    @property
    def model_config(self) -> dict[str, Any]:
        """The contents of its config.json, from the checkpoint or else from the folder; {} where neither has it."""
        kept = self.state.get("model_config_contents")
        return kept if isinstance(kept, dict) else self.folder_config

    @property
    def total_updates(self) -> int | None:
        """How many updates the run is to make; None where that is not known."""
        total = self.state.get("num_training_steps")
        return total if isinstance(total, int) else None

    def args(self) -> RunArgs:
        """The run's arguments, with today's defaults for flags that are newer. Raises UserError without them."""
        if not {"model_config", "batch_size"} <= self.state.keys():
            raise UserError("no checkpoint has recorded the flags of this run")
        groups = {group: kind(**self.flags.get(group, {})) for group, kind in GROUPS.items()}
        batch = groups["batch"]
        ranks = batch.total_batch_size // max(1, batch.batch_size * batch.gradient_accumulation)
        return RunArgs(**groups, world_size=max(1, ranks))

    def shape(self) -> ModelConfig:
        """The shape of its model. Raises UserError where only transformers' class takes the configuration."""
        if not self.model_config:
            raise UserError("no checkpoint has recorded the model's configuration")
        try:
            return config_from(self.model_config, "the model's configuration")
        except UserError as error:
            if self.state.get("use_hf_model"):
                raise UserError("only transformers reads the model's configuration") from error
            raise

    def memory(self, on_gpu: bool) -> MemoryPlan:
        """The planned memory of a rank. Raises UserError where it cannot be planned."""
        args, shape = self.args(), self.shape()
        device = args.runtime.device if on_gpu else "cpu"
        return plan(dataclasses.replace(args, runtime=dataclasses.replace(args.runtime, device=device)), shape)

    def refresh_intervals(self) -> dict[int, int]:
        """How many matrices have which interval between two refreshes now; {} for a run without subspaces."""
        from peft_pretraining.checkpoint.tensor_file import map_file, tensors_in

        files = sorted(self.checkpoint.glob("optimizer*.safetensors")) if self.checkpoint else []
        found: dict[int, int] = {}
        try:
            for name, tensor in (item for path in files for item in tensors_in(map_file(path)).items()):
                if name.endswith("/schedule") and tensor.numel() == 4:
                    interval = int(tensor[0])
                    found[interval] = found.get(interval, 0) + 1
        except (OSError, ValueError, KeyError):
            return {}
        return dict(sorted(found.items()))


def read_run(folder: Path) -> RecordedRun:
    """Read what a run's folder says; nothing of a model is loaded. Raises UserError if the folder cannot be read."""
    paths = list_checkpoints(folder)
    newest, state = None, dict[str, Any]()
    for path in reversed(paths):
        if state := _json_object(path / "state.json"):
            newest = path
            break
    return RecordedRun(
        folder, newest, state, [step_of(path) for path in paths], _text(folder / _STOP_MARKER).strip(),
        _text(folder / _COMMANDS), _json_object(folder / _CONFIG),
    )  # fmt: skip


def _text(path: Path) -> str:
    """The contents of a file; "" where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where it cannot be read."""
    try:
        found = json.loads(_text(path))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
