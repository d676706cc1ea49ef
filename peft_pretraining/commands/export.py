"""Write a checkpoint of run_pretrain.py as a float model that `AutoModelForCausalLM.from_pretrained` loads.

    qgalore export checkpoints/run exported

Quantized matrices become code * scale + zero_point, so the exported model computes what the trained one did. The run's
tokenizer goes along, with the tokens that begin and end a document as in training. The directory is written under a
temporary name and renamed when it is finished.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_pretraining.after_training.exported_tokenizer import special_ids, write_tokenizer
from peft_pretraining.after_training.trained_model import (
    Origin,
    averaged_weights,
    config_of,
    find_checkpoint,
    method_of,
)
from peft_pretraining.after_training.trained_tokenizer import tokenizer_of
from peft_pretraining.checkpoint.store import Checkpoint
from peft_pretraining.commands.corrected_flags import CommandParser
from peft_pretraining.config.flags import parse_name_or_path, parse_path
from peft_pretraining.data.tokenizer import Tokenizer
from peft_pretraining.errors import UserError
from peft_pretraining.methods.merge import merged_entries
from peft_pretraining.models.build import build_on_meta, network_on_meta
from peft_pretraining.models.registry import config_from
from qgalore import WeightFormat, convert_linears
from qgalore.layer.export import float_entries

CODES = ".weight_qdata"
SHARD_BYTES = 4_000_000_000


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = CommandParser(
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
    parser.add_argument(
        "--tokenizer", type=parse_name_or_path, default="", metavar="NAME_OR_PATH",
        help="the tokenizer that the run was trained with, where it is not found (default: what the run has recorded)",
    )  # fmt: skip
    parser.add_argument("--no-tokenizer", action="store_true", help="write the model alone")
    parser.add_argument("--model_config", type=parse_path, help="the model's config.json (default: the one of the run)")
    return parser.parse_args(argv)


def export(
    checkpoint: Path, output: Path, dtype: str, tokenizer: Path | str | None = None, model_config: Path | None = None,
    averaged: bool = False,
) -> list[str]:  # fmt: skip
    """Write the model of `checkpoint` to `output`; if that fails it raises UserError and leaves no files.

    tokenizer: a name or path, "" for that of the run, None for none. averaged: with the mean of its weights that
    --average_last has made, in the place of its last weights. Returns sentences on what was changed.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists already: give a new directory.")
    loaded = find_checkpoint(checkpoint)
    if loaded is None:
        raise UserError(f"{checkpoint} is an exported model already: give a run or one of its checkpoints.")
    config = config_of(loaded, model_config)
    origin = Origin(loaded.path, config, loaded.state, loaded.update_step)
    found = None if tokenizer is None else _tokenizer(origin, str(tokenizer))
    temporary, notes = output.with_name(f".tmp_{output.name}_{os.getpid()}"), []
    try:
        temporary.mkdir(parents=True)
        if found is not None:
            notes = write_tokenizer(found, temporary, origin.vocab_size, origin.longest)
            config |= _ids(found)
            write_generation_config(found, temporary)
        write_config(config, dtype, temporary)
        model = quantized_model(loaded, config, temporary / "config.json")
        tied = bool(config.get("tie_word_embeddings"))
        mean = averaged_weights(loaded) if averaged else {}
        write_weights(float_tensors(loaded, model, getattr(torch, dtype), tied, mean), temporary)
        for file in temporary.glob("*.safetensors"):
            shutil.copymode(temporary / "config.json", file)  # safetensors lets the owner alone read what it writes
        if output.is_dir():
            output.rmdir()
        temporary.rename(output)
    except OSError as error:
        raise UserError(f"{output} could not be written ({error.strerror or error}).") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return notes + _on_merging(loaded, dtype)


def _tokenizer(origin: Origin, given: str) -> Tokenizer:
    try:
        return tokenizer_of(origin, given)
    except UserError as error:
        raise UserError(f"{error} Or --no-tokenizer, to export the model alone.") from error


def _ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    """The ids of special tokens as config.json and generation_config.json have them."""
    return {f"{role}_token_id": i for role, i in special_ids(tokenizer).items()}


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


def float_tensors(
    checkpoint: Checkpoint, model: nn.Module, dtype: torch.dtype, tied: bool, mean: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the state dict of a float model, one tensor at a time, without a tied head.

    It is tied, too, where the checkpoint has one tensor for both: transformers' default is not in each config.json.
    mean: weights by name that take the place of the checkpoint's.
    """
    addresses = set[int]()
    try:
        for name, tensor in _plain_entries(checkpoint, model, dtype):
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


def _plain_entries(checkpoint: Checkpoint, model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
    """The checkpoint's entries with floats in the place of codes, and with factors and adapters as one matrix."""
    if (method := method_of(checkpoint.state)) is not None:
        return merged_entries(checkpoint.model_tensors, method, dtype)
    return float_entries(model, checkpoint.model_tensors, dtype)


def _on_merging(checkpoint: Checkpoint, dtype: str) -> list[str]:
    """A sentence on what becomes of factors and adapters."""
    method = method_of(checkpoint.state)
    if method is None:
        return []
    if not method.has_adapters:
        return [f"the factors of --method {method.method} are multiplied and written as matrices in {dtype}"]
    text = f"the adapters of --method {method.method} are merged into the matrices, which are written in {dtype}"
    if method.method != "qlora":
        return [text]
    return [f"{text}: rounded to {method.qlora_bits} bits again they would lose a small adapter"]


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


def write_generation_config(tokenizer: Tokenizer, folder: Path) -> None:
    """Write generation_config.json: where generation ends, and what pads a batch."""
    (folder / "generation_config.json").write_text(json.dumps(_ids(tokenizer), indent=2) + "\n")


def three_lines(output: Path) -> str:
    """Python that loads an export and generates."""
    folder = json.dumps(str(output), ensure_ascii=False)
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model, tokenizer = (auto.from_pretrained({folder}) for auto in (AutoModelForCausalLM, AutoTokenizer))\n"
        'print(tokenizer.decode(model.generate(**tokenizer("The", return_tensors="pt"), max_new_tokens=50)[0]))'
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns 0, or 2 for a UserError."""
    args = parse_args(argv)
    try:
        if args.tokenizer and args.no_tokenizer:
            raise UserError(f"--tokenizer {args.tokenizer} and --no-tokenizer exclude each other: give one of them.")
        tokenizer = None if args.no_tokenizer else args.tokenizer
        notes = export(args.checkpoint, args.output, args.dtype, tokenizer, args.model_config, args.averaged)
    except UserError as error:
        print(f"qgalore export: {error}", file=sys.stderr)
        return 2
    for note in notes:
        print(note)
    if args.no_tokenizer:
        print(f"{args.output}: load it with transformers.AutoModelForCausalLM.from_pretrained({str(args.output)!r})")
    else:
        print(f"{args.output}: load it and generate with\n\n{three_lines(args.output)}")
    return 0
