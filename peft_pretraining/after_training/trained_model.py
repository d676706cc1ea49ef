"""Open a trained model: a run (its newest checkpoint), one of its checkpoints, or an export in Hugging Face format.

A run's model is the network that was trained, quantized weights as codes, so that an evaluation of it gives the bits
that the run's own would. An export, or any causal model that `save_pretrained` wrote, is transformers' class.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_pretraining.checkpoint.folder import list_checkpoints
from peft_pretraining.checkpoint.manifest import MANIFEST
from peft_pretraining.checkpoint.store import Checkpoint, load_checkpoint, load_newest_checkpoint, with_todays_names
from peft_pretraining.checkpoint.weight_files import find_weight_files, in_folder, read_headers
from peft_pretraining.config.flag_groups import MethodArgs, OptimizerArgs, QuantizationArgs
from peft_pretraining.errors import UserError
from peft_pretraining.methods.convert import matrix_converter
from peft_pretraining.methods.merge import merged_entries
from peft_pretraining.models.build import build_on_meta, network_on_meta
from peft_pretraining.models.config import read_config_json
from peft_pretraining.models.head import IGNORE_INDEX, CausalLMOutput, shifted
from peft_pretraining.models.init import OnModule, materialize
from peft_pretraining.models.network import CausalLM
from peft_pretraining.models.registry import config_from
from peft_pretraining.optim.build import low_rank_converter
from qgalore.layer.export import float_entries

Group = TypeVar("Group")

_CODES = ".weight_qdata"
_DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DTYPES = tuple(_DTYPES)
"""The values of --dtype; auto: that of the weights."""
DEVICES = ("auto", "cpu", "cuda")
"""The values of --device; auto: a CUDA GPU if there is one."""


@dataclass(frozen=True)
class Origin:
    """Where trained weights are from, and what is known of them."""

    path: Path
    """Of the checkpoint, or of the export."""
    config: dict[str, Any]
    """The contents of the model's config.json."""
    flags: dict[str, Any]
    """The run's flags by name, and what else its checkpoint keeps; {} for an export."""
    update_step: int | None
    """The number of updates after which it is; None for an export."""

    @property
    def run(self) -> Path | None:
        """The folder of the run; None for an export."""
        return None if self.update_step is None else self.path.absolute().parent

    @property
    def longest(self) -> int | None:
        """The length of the longest sequence that the model takes, in tokens; None without a limit."""
        length = self.config.get("max_position_embeddings")
        return length if isinstance(length, int) else None

    @property
    def trained_length(self) -> int | None:
        """The length of the sequences that the run has trained on, in tokens; None where that is not known."""
        length = self.flags.get("max_length")
        return length if isinstance(length, int) else None

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table."""
        return int(self.config["vocab_size"])

    def describe(self) -> str:
        """A phrase for the first line of a command."""
        if self.update_step is None:
            return f"{self.path}, an export"
        return f"{self.path}, after {self.update_step:,} updates"


@dataclass(frozen=True)
class TrainedModel(Origin):
    """A trained model on its device, in eval mode."""

    model: nn.Module
    """Called with input_ids and labels (B, L), it gives a `CausalLMOutput`: see `CausalLM.forward`."""
    device: torch.device
    dtype: torch.dtype
    """Of float weights and activations."""

    def in_transformers(self, device: torch.device | None = None) -> Any:
        """The model as transformers' class with float weights, in eval mode; for generation.

        device: None for that of the model. A run's weights are dequantized where they are, beside the codes: a model
        that is opened on the CPU takes a GPU the memory of its floats alone. Raises UserError where transformers has no
        class for it.
        """
        if isinstance(self.model, TransformersModel):
            return self.model.network.to(device or self.device)
        state = dict(float_entries(self.model, self.model.state_dict(), self.dtype))
        if (method := method_of(self.flags)) is not None:
            state = dict(merged_entries(state, method, self.dtype))
        return network_from(self.config, state, self.dtype, str(self.path)).to(device or self.device)


class TransformersModel(nn.Module):
    """A causal model of transformers with the call signature and the loss of `CausalLM`."""

    def __init__(self, network: Any) -> None:
        """network: a PreTrainedModel."""
        super().__init__()
        self.network = network

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> CausalLMOutput:
        """See `CausalLM.forward`."""
        logits: Tensor = self.network(input_ids=input_ids, use_cache=False).logits  # (B, L, vocab_size)
        if labels is None:
            return CausalLMOutput(logits, None)
        targets = shifted(labels).flatten()
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")
        return CausalLMOutput(None, loss)


# ---- open


def open_trained(path: Path, device: str = "auto", dtype: str = "auto", averaged: bool = False) -> TrainedModel:
    """Open a run, a checkpoint of one, or an export. Raises UserError.

    device: one of `DEVICES`; dtype: one of `DTYPES`, of the float weights; averaged: the mean of the weights that
    --average_last has made in the place of the last ones, as floats.
    """
    chosen = choose_device(device)
    if (checkpoint := find_checkpoint(path)) is not None:
        return _open_checkpoint(checkpoint, chosen, _DTYPES[dtype], averaged)
    if averaged:
        raise UserError(f"--averaged: {path} is an export, which has one set of weights: leave --averaged out.")
    return _open_export(path, chosen, _DTYPES[dtype])


def choose_device(device: str) -> torch.device:
    """The device of `--device`. Raises UserError where it is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is visible to PyTorch; use --device cpu, or auto.")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def find_checkpoint(path: Path) -> Checkpoint | None:
    """Load a checkpoint, or the newest valid one of a run; None for an export. Raises UserError for anything else."""
    if path.is_dir() and ((path / MANIFEST).is_file() or path.name.startswith("step_")):
        return _with_todays_names(load_checkpoint(path, asked_by="checkpoint"))
    if list_checkpoints(path):
        newest, refusals = load_newest_checkpoint(path)
        if newest is None:
            raise UserError(f"{path}: none of its checkpoints can be read: {' '.join(refusals)}")
        return _with_todays_names(newest)
    if (path / "config.json").is_file() and _weight_files(path):
        return None
    raise UserError(f"{path}: {_what_it_is(path)}. Give a run's folder, a step_... folder in it, or an exported model.")


def flags_in(checkpoint: Checkpoint, group: type[Group]) -> Group:
    """The values of a group of flags that a run has recorded, and today's defaults for those that it has not."""
    quantized = any(name.endswith(_CODES) for name in checkpoint.model_tensors)
    given = {"optimizer": "q_galore_adamw8bit" if quantized else "adam", "weight_quant": quantized} | checkpoint.state
    fields = dataclasses.fields(group)  # type: ignore[arg-type]
    return group(**{field.name: given[field.name] for field in fields if field.name in given})


def config_of(checkpoint: Checkpoint, given: Path | None = None) -> dict[str, Any]:
    """The model's config.json: the given one, the one in the checkpoint, or the run's file. Raises UserError."""
    kept = checkpoint.state.get("model_config_contents")
    if given is None and isinstance(kept, dict):
        return dict(kept)
    path = given or Path(str(checkpoint.state.get("model_config", "")))
    if not path.is_file():
        raise UserError(
            f"{checkpoint.path} names the model config {path}, which is not here: give it as --model_config."
        )
    return read_config_json(path)


def method_of(flags: Mapping[str, Any]) -> MethodArgs | None:
    """A run's recorded flags of `--method`; None for full, and for runs from before there was another."""
    if flags.get("method", "full") == "full":
        return None
    names = [field.name for field in dataclasses.fields(MethodArgs)]
    return MethodArgs(**{name: flags[name] for name in names if name in flags})


def averaged_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The mean of a run's last weights by name; raises UserError where the checkpoint has none."""
    average = checkpoint.state.get("average")
    if not average:
        raise UserError(f"--averaged: {checkpoint.path} has no averaged weights: its run had no --average_last.")
    if not average["count"]:
        raise UserError(
            f"--averaged: {checkpoint.path} is after {checkpoint.update_step} updates, and averaging begins after "
            f"{average['window'][0]}: take a later checkpoint, or leave --averaged out."
        )
    return dict(average["mean"])


def _with_todays_names(checkpoint: Checkpoint) -> Checkpoint:
    return replace(checkpoint, model_tensors=with_todays_names(checkpoint.model_tensors))


def _what_it_is(path: Path) -> str:
    if not path.exists():
        return "there is no such folder"
    if not path.is_dir():
        return "it is a file"
    if (path / "metrics.jsonl").is_file():
        return "this run has no checkpoint yet"
    if (path / "config.json").is_file():
        return "it has a config.json and no weights in safetensors"
    return "it holds no checkpoint and no config.json"


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


# ---- of a run


def _open_checkpoint(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype | None, averaged: bool
) -> TrainedModel:
    config = config_of(checkpoint)
    own: torch.dtype = getattr(torch, str(checkpoint.state.get("dtype", "bfloat16")))
    tensors: Mapping[str, Tensor] = checkpoint.model_tensors
    convert = low_rank_converter(flags_in(checkpoint, OptimizerArgs), flags_in(checkpoint, QuantizationArgs))
    if (method := method_of(checkpoint.state)) is not None:
        convert = matrix_converter(method, checkpoint.state["rank"], 0, f"the model config of {checkpoint.path}")
    network = _network_on_meta(checkpoint, config)
    if averaged:
        mean = averaged_weights(checkpoint)
        tensors = {name: value for name, value in tensors.items() if name in network.state_dict()} | mean
    model = _filled(network, tensors, device, dtype or own, None if averaged else convert, str(checkpoint.path))
    return TrainedModel(
        checkpoint.path, config, checkpoint.state, checkpoint.update_step, model, device, dtype or own
    )  # fmt: skip


def _network_on_meta(checkpoint: Checkpoint, config: dict[str, Any]) -> CausalLM:
    if not checkpoint.state.get("use_hf_model"):
        return network_on_meta(config_from(config, f"the model config of {checkpoint.path}"))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.json")
        file.write_text(json.dumps(config), encoding="utf-8")
        return build_on_meta(file, use_hf_model=True)


def _filled(
    model: CausalLM, tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype,
    convert: OnModule | None, source: str,
) -> CausalLM:  # fmt: skip
    """The model with memory, converted layer by layer, and with these values."""
    model.initial_value = _zeros  # type: ignore[method-assign]  # drawn ones would take a minute of a large model
    materialize(model, device, dtype, seed=0, on_module=convert)
    del model.initial_value
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{source} does not fit the model config and flags that it names: {reason}") from error
    return model.eval()


def _zeros(name: str, shape: torch.Size, generator: torch.Generator, std: float) -> Tensor:
    return torch.zeros(shape)


# ---- in Hugging Face format


def _open_export(path: Path, device: torch.device, dtype: torch.dtype | None) -> TrainedModel:
    config = read_config_json(path / "config.json")
    transformers = _transformers(str(path))
    try:
        network = transformers.AutoModelForCausalLM.from_pretrained(
            str(path), dtype=dtype or "auto", local_files_only=True
        )
    except Exception as error:  # transformers raises whatever it meets
        _check_files(path)  # it does not say which file it is
        raise UserError(f"{path}: transformers cannot load it: {' '.join(str(error).split())[:300]}") from error
    network = network.to(device).eval()
    return TrainedModel(path, config, {}, None, TransformersModel(network).eval(), device, network.dtype)


def _check_files(path: Path) -> None:
    """Raise UserError that names the file of weights which is cut off or no such file."""
    try:
        read_headers(find_weight_files(partial(in_folder, path)))
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: {error}.") from error


def network_from(config: Mapping[str, Any], state: dict[str, Tensor], dtype: torch.dtype, source: str) -> Any:
    """transformers' model of a config.json with the weights of a state dict, in eval mode. Raises UserError."""
    transformers = _transformers(source)
    try:
        parsed = transformers.AutoConfig.for_model(**{"model_type": "llama"} | dict(config))
        with torch.device("meta"):
            kind = type(transformers.AutoModelForCausalLM.from_config(parsed))
        return kind.from_pretrained(None, config=parsed, state_dict=state, dtype=dtype).eval()
    except Exception as error:  # transformers raises whatever it meets
        raise UserError(f"{source}: transformers cannot load it: {' '.join(str(error).split())[:300]}") from error


def _transformers(source: str) -> Any:
    """The library without its progress bars. Raises UserError where it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"{source}: this needs the package transformers: pip install transformers.") from error
    transformers.utils.logging.disable_progress_bar()
    return transformers
