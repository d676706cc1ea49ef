"""The page of the format of checkpoints, from the files that small runs leave."""

from __future__ import annotations

import contextlib
import io
import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from docs.make.markdown import sections, table
from peft_pretraining.config.flags import read_specs
from peft_pretraining.config.run_config import GROUPS

_INTRODUCTION = """# The format of checkpoints

A run's folder (`--save_dir`) holds:

| name | contents |
| --- | --- |
| `step_00002000/` | the checkpoint after 2,000 updates |
| `metrics.jsonl` | [metrics](metrics.md), a line a call |
| `config.json` | the model, as transformers and `--model_config` read it |
| `command.txt` | a line for each start of the run: its command, with date, ranks and versions as a comment |
| `tokenizer/` | the tokenizer, where `--tokenizer train:N` has trained one |
| `STOPPED` | why the run ended early, after a signal; removed when it goes on |
| `.lock` | locked by the process that trains there |
| `abandoned_0_step_00003000/` | a later checkpoint than the one from which the run was resumed |

Safetensors and JSON alone: nothing is read by pickle, and a folder with a pickle in it is refused. A checkpoint
is written under another name, flushed to the disk and renamed, so it is there whole or not at all.
`--keep_checkpoints` prunes old ones. The format has the version {version}; an older program refuses a newer
one, and newer programs read older ones.

Everything below is listed from checkpoints that two small runs wrote: one with the paper's recipe and the
streaming subspace, one with `--recipe full_rank`."""
_FILES = {
    "manifest.json": "written last: format, version, update_step, size and SHA-256 of each other file and of itself",
    "model.safetensors": "the model's state dict",
    "optimizer.safetensors": "the tensors of the optimizer's state dict, named by their path in it",
    "optimizer.json": 'the rest of that state dict, with `{"$tensor": name}` in the place of a tensor',
    "state.json": "flags, the place in the data, counters: see below",
    "state.safetensors": "tensors of the state, such as the mean of `--average_last`; only where there are any",
}
_MODEL = {
    "weight": "a float weight",
    "weight_qdata": "codes of a quantized matrix, INT8 as unsigned bytes; INT4 has two in a byte",
    "weight_scale": "of each group in a row: value = code x scale + zero point",
    "weight_zero_point": "of each group in a row, a value and not a code",
    "weight_format": "bits and group size",
}
_OPTIMIZER = {
    "step": "updates that this weight has had",
    "exp_avg": "first moment: 8-bit codes in blocks of 256, or float32 below 4,096 values",
    "exp_avg_absmax": "of each block its largest magnitude",
    "exp_avg_sq": "second moment, in the same way",
    "exp_avg_sq_absmax": "of each block its largest value",
    "exp_avg_sq_row": "second moment of each row (`--full_rank_second_moment row`, `--direction normuon`)",
    "left_basis": "projection of the left side, as codes; two INT4 codes in a byte",
    "left_basis_scale": "of each group its scale",
    "left_basis_zero_point": "of each group its zero point",
    "right_basis": "projection of the right side",
    "right_basis_scale": "of each group its scale",
    "right_basis_zero_point": "of each group its zero point",
    "schedule": "of the lazy rule: interval, next refresh, refreshes made, refreshes saved",
    "similarities": "of the latest refreshes, for the lazy rule",
    "failures": "refreshes that kept the old basis",
}
_STATE = {
    "model_config_contents": "the model's config.json",
    "data": "the place in the data: epoch and window of each logical shard, and a fingerprint of each source",
    "tokens": "tokens read so far, padding left out",
    "skipped_in_a_row": "how many of the latest updates were skipped",
    "wandb_run_id": "wandb's id of the run",
    "initial_weights": "what `--init_from` named when the run began",
}


def page() -> str:
    """The text of the page. Raises KeyError for a file, tensor or key that has no description here."""
    files: set[str] = set()
    tensors: dict[str, dict[str, tuple[str, str]]] = {"model": {}, "optimizer": {}}
    state: dict[str, Any] = {}
    version = ""
    for folder in _checkpoints():
        files |= set(folder)
        for kind, found in tensors.items():
            for name, (dtype, shape) in folder[f"{kind}.safetensors"].items():
                found.setdefault(re.split(r"[./]", name)[-1], (dtype, f"`{name}` {shape}"))
        state |= folder["state.json"]
        version = str(folder["manifest.json"]["version"])
    flags = {spec.name for group in GROUPS.values() for spec in read_specs(group)}
    others = [name for name in state if name not in flags]
    return sections(
        _INTRODUCTION.replace("{version}", version),
        "## Files of a checkpoint",
        table(["file", "contents"], [[f"`{name}`", _FILES[name]] for name in sorted(files | {"state.safetensors"})]),
        "## `model.safetensors`",
        "By the last part of a name, with one example each. A model in float has `weight` alone, as transformers does.",
        _tensors(tensors["model"], _MODEL),
        "## `optimizer.safetensors`",
        "`state/<number of the parameter>/<name>`, with one example each.",
        _tensors(tensors["optimizer"], _OPTIMIZER),
        "## `state.json`",
        "All [flags](flags.md) of the run, with values that were worked out, and beside them:",
        table(["key", "contents"], [[f"`{name}`", _STATE[name]] for name in others]),
    )  # fmt: skip


def _tensors(found: Mapping[str, tuple[str, str]], meanings: Mapping[str, str]) -> str:
    rows = [[f"`{name}`", dtype, example, meanings[name]] for name, (dtype, example) in sorted(found.items())]
    return table(["name", "type", "example", "contents"], rows)


def _checkpoints() -> list[dict[str, Any]]:
    """Of the checkpoint of each small run: by file name, (type, shape) of its tensors or the contents of its JSON."""
    from safetensors import safe_open

    from tests.small_run import SmallRun, flags_of

    paper = flags_of("q_galore_adamw8bit_per_layer") | {"subspace": "streaming", "batch_size": 8}
    full = {
        "optimizer": "q_galore_adamw8bit_per_layer",
        "recipe": "full_rank",
        "weight_group_size": 48,
        "batch_size": 8,
    }
    found = []
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        small = SmallRun(Path(folder))
        for name, flags in (("paper", paper), ("full_rank", full)):
            (path,) = small.run(name, **(flags | {"num_training_steps": 2})).checkpoints
            files: dict[str, Any] = {}
            for file in sorted(path.iterdir()):
                if file.suffix == ".json":
                    files[file.name] = json.loads(file.read_text(encoding="utf-8"))
                    continue
                with safe_open(file, "pt") as tensors:
                    parts = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118
                    files[file.name] = {
                        key: (part.get_dtype(), " x ".join(map(str, part.get_shape())) or "scalar")
                        for key, part in parts.items()
                    }
            found.append(files)
    return found
