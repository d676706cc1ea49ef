"""The flags that both fine-tuning programs share, their defaults those of arXiv 2407.08296 and of GaLore's GLUE recipe.

Names are those of `run_pretrain.py` where it has the same thing: `batch_size` is a micro-batch of a rank.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from peft_pretraining.config.flags import Flag, build_parser, parse_flags
from peft_pretraining.errors import UserError

METHODS: Mapping[str, str] = {
    "full": "all weights by AdamW",
    "lora": "adapters by AdamW beside frozen float weights (peft)",
    "galore": "all weights by GaLore, in float",
    "qlora": "adapters by AdamW beside weights that bitsandbytes holds in 8 bits",
    "q_galore": "all weights by Q-GaLore, the linear layers of the blocks in INT8",
}
"""What each trains."""


@dataclass(frozen=True)
class MethodArgs:
    """How the pretrained weights are trained."""

    method: Annotated[str, Flag(choices=tuple(METHODS))] = "q_galore"
    """full, lora, galore, qlora (frozen weights in 8 bits, by bitsandbytes) or q_galore."""
    rank: Annotated[int, Flag("dimensions", at_least=1)] = 8
    """Of the adapters, and of the subspaces of galore and q_galore."""
    galore_scale: Annotated[float, Flag("factor", above=0)] = 2.0
    """Multiplier of the updates of low-rank matrices (alpha in GaLore's paper); for galore and q_galore."""
    update_proj_gap: Annotated[int, Flag("updates", at_least=1)] = 500
    """Interval between two refreshes of a subspace; for galore and q_galore."""
    svd_method: Annotated[str, Flag(choices=("full", "randomized"))] = "full"
    """How subspaces are found: by a full SVD as in the paper, or by a randomized one, in less time and memory."""
    lora_alpha: Annotated[float, Flag("factor", above=0)] = 32.0
    """Adapters are multiplied by lora_alpha / rank; for lora and qlora."""
    lora_dropout: Annotated[float, Flag("probability", at_least=0, below=1)] = 0.05
    """Of the input of the adapters; for lora and qlora."""
    embeddings: Annotated[str, Flag(choices=("trained", "frozen"))] = "trained"
    """Whether full, galore and q_galore train the embeddings, and the head of a language model; a new classifier is
    trained by every method, and lora and qlora train no embeddings."""
    dtype: Annotated[str, Flag(choices=("float32", "bfloat16"))] = "float32"
    """Of the weights that stay float. On a GPU float32 is multiplied in bfloat16 (autocast). bfloat16 takes the bytes
    that the paper counts; AdamW of the method full rounds to nearest there, and small updates are lost."""
    activation_checkpointing: bool = False
    """Recompute the activations of each block in the backward pass, which takes less memory and more time."""


@dataclass(frozen=True)
class TuningArgs:
    """The model, the data and the length of the fine-tuning."""

    init_from: Annotated[str, Flag("name_or_path")] = "FacebookAI/roberta-base"
    """The pretrained model with its tokenizer: a folder, or a name on the hub."""
    dataset: Annotated[str, Flag("name_or_path")] = "nyu-mll/glue"
    """A name on the hub, or a folder of the same layout: a folder for each configuration with files such as
    train-00000-of-00001.parquet or validation.jsonl."""
    lr: Annotated[float, Flag("rate", at_least=0, auto="by task")] = 0.0
    """Peak learning rate, the same for every method."""
    epochs: Annotated[float, Flag("passes", above=0)] = 30.0
    """Passes over the training examples."""
    num_training_steps: Annotated[int, Flag("updates", at_least=0, auto="by epochs")] = 0
    """Stop after so many updates, whatever the epochs."""
    warmup: Annotated[float, Flag("share", at_least=0, below=1)] = 0.0
    """Share of the updates in which the learning rate rises; after that it falls linearly to 0."""
    total_batch_size: Annotated[int, Flag("examples", at_least=0, auto="by task")] = 0
    """Examples of an update, over all ranks and micro-batches."""
    batch_size: Annotated[int, Flag("examples", at_least=0, auto="as many as an update has")] = 0
    """Examples of a micro-batch on a rank."""
    max_length: Annotated[int, Flag("tokens", at_least=8)] = 512
    """Longer examples are cut."""
    max_examples: Annotated[int, Flag("examples", at_least=0, auto="all")] = 0
    """Train on the first so many examples alone."""
    grad_clipping: Annotated[float, Flag("norm", at_least=0)] = 0.0
    """Norm that gradients are clipped to; 0: not clipped."""
    seed: Annotated[int, Flag("number", at_least=0)] = 0
    """Of the classifier or the adapters, of dropout, the order of the examples and stochastic rounding."""
    device: Annotated[str, Flag(choices=("auto", "cpu", "cuda"))] = "auto"
    """auto: a CUDA GPU if there is one."""
    save_dir: Annotated[str, Flag("folder", auto="runs/finetune/<task>-<method>-<seed>")] = ""
    """Folder of the checkpoints, one after each epoch; the same command again continues from the newest one."""
    save_every: Annotated[int, Flag("updates", at_least=0, auto="an epoch")] = 0
    """Interval between two checkpoints."""
    results: Annotated[str, Flag("file")] = "runs/finetune/results.jsonl"
    """File that a line of JSON about each run is appended to."""


def read_command_line(
    argv: Sequence[str] | None, groups: Mapping[str, type], description: str, usage: str
) -> dict[str, Any]:
    """The groups of a command line (default: this program's) by their titles, each as its dataclass.

    Raises UserError that lists every problem; `--help` prints the flags and leaves the program.
    """
    parser = build_parser(groups, description, usage)
    parsed = parse_flags(parser, groups, sys.argv[1:] if argv is None else argv)
    if parsed.problems:
        raise UserError("; ".join(parsed.problems))
    found = {}
    for title, group in groups.items():
        fields = [field.name for field in dataclasses.fields(group)]
        found[title] = group(**{name: parsed.values[name] for name in fields if name in parsed.values})
    return found
