"""Write a checkpoint of run_pretrain.py as a float model that `AutoModelForCausalLM.from_pretrained` loads.

    qgalore export checkpoints/run/step_00010000 exported --tokenizer path/to/tokenizer

Quantized matrices become code * scale + zero_point, so the exported model computes what the trained one did. The
directory is written under a temporary name and renamed when it is finished.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_pretraining.checkpoint.folder import list_checkpoints
from peft_pretraining.checkpoint.store import Checkpoint, load_checkpoint, with_todays_names
from peft_pretraining.config.flags import parse_path
from peft_pretraining.errors import UserError
from peft_pretraining.models.build import build_on_meta, network_on_meta
from peft_pretraining.models.config import read_config_json
from peft_pretraining.models.registry import config_from
from qgalore import WeightFormat, convert_linears
from qgalore.layer.export import float_entries

CODES = ".weight_qdata"
SHARD_BYTES = 4_000_000_000
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="qgalore export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checkpoint", type=parse_path, help="a step_... directory that run_pretrain.py wrote, or a run: its newest"
    )
    parser.add_argument("output", type=parse_path, help="directory to write; must not exist or be empty")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="type of the weights")
    parser.add_argument(
        "--averaged", action="store_true", help="write the mean of the weights that --average_last has made"
    )
    parser.add_argument("--tokenizer", type=parse_path, help="folder or tokenizer.json to copy into the export")
    parser.add_argument("--model_config", type=parse_path, help="the model's config.json (default: the one of the run)")
    return parser.parse_args(argv)


def export(
    checkpoint: Path, output: Path, dtype: str, tokenizer: Path | None = None, model_config: Path | None = None,
    averaged: bool = False,
) -> None:  # fmt: skip
    """Write the model of `checkpoint` to `output`; if that fails it raises UserError and leaves no files.

    averaged: with the mean of its weights that --average_last has made, in the place of its last weights.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists already: give a new directory.")
    loaded = load_checkpoint(next(reversed(list_checkpoints(checkpoint)), checkpoint), asked_by="checkpoint")
    loaded = replace(loaded, model_tensors=with_todays_names(loaded.model_tensors))
    config = run_config(loaded, model_config)
    temporary = output.with_name(f".tmp_{output.name}_{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        write_config(config, dtype, temporary)
        model = quantized_model(loaded, config, temporary / "config.json")
        tied = bool(config.get("tie_word_embeddings"))
        mean = averaged_weights(loaded) if averaged else {}
        write_weights(float_tensors(loaded, model, getattr(torch, dtype), tied, mean), temporary)
        if tokenizer is not None:
            write_tokenizer(tokenizer, config, temporary)
        if output.is_dir():
            output.rmdir()
        temporary.rename(output)
    except OSError as error:
        raise UserError(f"{output} could not be written ({error.strerror or error}).") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def run_config(checkpoint: Checkpoint, given: Path | None) -> dict[str, Any]:
    """The model's config.json: the given one, the one in the checkpoint, or the run's file."""
    kept = checkpoint.state.get("model_config_contents")
    if given is None and isinstance(kept, dict):
        return dict(kept)
    path = given or Path(str(checkpoint.state.get("model_config", "")))
    if not path.is_file():
        raise UserError(
            f"{checkpoint.path} names the model config {path}, which is not here: give it as --model_config."
        )
    return read_config_json(path)


def quantized_model(checkpoint: Checkpoint, config: dict[str, Any], config_path: Path) -> nn.Module:
    """The model of a checkpoint without memory, with its quantized layers; config_path has `config`.

    Raises UserError where the checkpoint is of another model.
    """
    names = [name.removesuffix(CODES) for name in checkpoint.model_tensors if name.endswith(CODES)]
    if not names:
        return nn.Module()
    state = checkpoint.state
    bits, group_size, int8_products = (state.get(f) for f in ("weight_bits", "weight_group_size", "int8_products"))
    if bits not in (4, 8) or not isinstance(group_size, int):
        raise UserError(f"{checkpoint.path}: {names[0]} is quantized, but its bits or group size are not there.")
    if state.get("use_hf_model"):
        model = build_on_meta(config_path, use_hf_model=True)
    else:
        model = network_on_meta(config_from(config, "the model config"))
    try:
        convert_linears(model, names, WeightFormat(bits, group_size, int8_products=bool(int8_products)))
    except (AttributeError, TypeError) as error:
        raise UserError(f"{checkpoint.path} does not fit the model config: {error}.") from error
    return model


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


def float_tensors(
    checkpoint: Checkpoint, model: nn.Module, dtype: torch.dtype, tied: bool, mean: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the state dict of a float model, one tensor at a time, without a tied head.

    It is tied, too, where the checkpoint has one tensor for both: transformers' default is not in each config.json.
    mean: weights by name that take the place of the checkpoint's.
    """
    addresses = set[int]()
    try:
        for name, tensor in float_entries(model, checkpoint.model_tensors, dtype):
            stored = checkpoint.model_tensors.get(name)
            again = stored is not None and stored.data_ptr() in addresses
            if again or (tied and name == "lm_head.weight"):
                continue
            if stored is not None:
                addresses.add(stored.data_ptr())
            value = mean.get(name, tensor)
            yield name, value.to(dtype) if value.is_floating_point() else value
    except ValueError as error:
        raise UserError(f"{checkpoint.path}: {error}.") from error


def write_weights(tensors: Iterator[tuple[str, Tensor]], folder: Path) -> None:
    """Write safetensors in shards with an index, or one file if all fits."""
    from safetensors.torch import save_file

    shards: list[Path] = []
    shard_of: dict[str, int] = {}
    pending: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        nonlocal size
        shards.append(folder / f"part-{len(shards)}.safetensors")
        save_file(pending, shards[-1], metadata={"format": "pt"})
        shard_of.update(dict.fromkeys(pending, len(shards) - 1))
        pending.clear()
        size = 0

    for name, tensor in tensors:
        bytes_ = tensor.numel() * tensor.element_size()
        if pending and size + bytes_ > SHARD_BYTES:
            flush()
        pending[name] = tensor.contiguous()
        size += bytes_
        total += bytes_
    flush()
    if len(shards) == 1:
        shards[0].rename(folder / "model.safetensors")
        return
    names = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    for shard, file_name in zip(shards, names, strict=True):
        shard.rename(folder / file_name)
    index = {"metadata": {"total_size": total}, "weight_map": {name: names[shard] for name, shard in shard_of.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_config(config: dict[str, Any], dtype: str, folder: Path) -> None:
    """Write config.json with the dtype of the written weights."""
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(config | {"dtype": dtype}, indent=2) + "\n")


def write_tokenizer(source: Path, config: dict[str, Any], folder: Path) -> None:
    """Copy a tokenizer's files; a lone tokenizer.json gets the settings that transformers needs beside it."""
    if source.is_dir():
        found = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
        if not found:
            raise UserError(f"--tokenizer {source}: no tokenizer.json or the like in that folder.")
        for file in found:
            shutil.copyfile(file, folder / file.name)
        return
    if not source.is_file():
        raise UserError(
            f"--tokenizer {source}: no such file or folder; give a tokenizer.json or the folder that has one."
        )
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(source))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise UserError(f"--tokenizer {source}: not a tokenizer.json ({error}).") from error
    for role in ("eos_token", "pad_token", "bos_token"):
        token = config.get(f"{role}_id")
        if isinstance(token, int) and token < len(tokenizer):
            setattr(tokenizer, role, tokenizer.convert_ids_to_tokens(token))
    tokenizer.save_pretrained(folder)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns 0, or 2 for a UserError."""
    args = parse_args(argv)
    try:
        export(args.checkpoint, args.output, args.dtype, args.tokenizer, args.model_config, args.averaged)
    except UserError as error:
        print(f"qgalore export: {error}", file=sys.stderr)
        return 2
    print(f"{args.output}: load it with transformers.AutoModelForCausalLM.from_pretrained({str(args.output)!r})")
    return 0
