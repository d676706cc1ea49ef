"""The runs, kinds of faults and moments of `benchmarks/chaos.py`, and the random decks of faults."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tests.small_run import flags_of

EVENTS = ("call", "return")
SCHEDULE: dict[str, object] = {
    "num_training_steps": 14,
    "save_every": 3,
    "eval_every": 5,
    "keep_checkpoints": 2,
    "continue_from": "auto",
    "workers": 2,
    "packing": "pack",
    "check_replicas": 7,
}


class Setting(NamedTuple):
    """A run in which faults are made."""

    name: str
    ranks: int
    flags: Mapping[str, object]
    from_hub: str = ""
    """The format of the data on the hub, json or parquet; "": a local folder."""


PER_LAYER = flags_of("q_galore_adamw8bit_per_layer")
STREAMING = flags_of("q_galore_adamw8bit") | {"subspace": "streaming", "grad_accum_dtype": "int8"}
SETTINGS = (
    Setting("q_galore_per_layer", 1, PER_LAYER | {"batch_size": 8}),
    Setting("q_galore_streaming", 1, STREAMING | {"batch_size": 4}, from_hub="json"),
    Setting("galore8bit", 1, flags_of("galore_adamw8bit") | {"batch_size": 2}, from_hub="parquet"),
    Setting("q_galore_per_layer", 2, PER_LAYER | {"batch_size": 4}),
    Setting("q_galore_streaming", 2, STREAMING | {"batch_size": 2}, from_hub="json"),
    Setting("galore8bit", 2, flags_of("galore_adamw8bit") | {"batch_size": 2}, from_hub="parquet"),
)
SHARDED = (
    Setting("q_galore_shard_optimizer", 2, PER_LAYER | {"batch_size": 4, "shard": "optimizer"}),
    Setting("q_galore_shard_full", 2, STREAMING | {"batch_size": 2, "shard": "full"}),
)
"""Runs of `--sharded`, whose ranks write a checkpoint together."""

# (file, function, largest number of the call) by what the program is doing then.
MOMENTS: Mapping[str, Sequence[tuple[str, str, int]]] = {
    "kill inside an update": [
        ("update/step.py", "finalize_gradients", 60),
        ("update/step.py", "update_weights", 60),
        ("update/step.py", "_apply", 40),
        ("update/step.py", "_update_plain", 40),
        ("update/weight.py", "prepare_step", 60),
        ("update/weight.py", "rotate_moments", 20),
        ("subspace/methods.py", "refresh_from_sketches", 60),
        ("update/weight.py", "accumulate", 90),
        ("qgalore/optimizer/adamw.py", "step", 12),
    ],
    "kill inside a save": [
        # Of each file of the first saves: before it is opened, when it is open, when it is written, when it is synced.
        ("checkpoint/store.py", "_synced_file", 24),
        ("checkpoint/store.py", "_write_parts", 5),
        ("checkpoint/store.py", "publish", 5),
        ("checkpoint/tensor_file.py", "write", 60),
        ("checkpoint/folder.py", "put_in_place", 3),
        ("checkpoint/folder.py", "sync_directory", 6),
        ("checkpoint/folder.py", "remove_leftovers", 3),
        ("checkpoint/manifest.py", "write_manifest", 3),
        ("reporting/jsonl.py", "sync", 3),
    ],
    "kill while pruning": [
        ("checkpoint/folder.py", "prune", 3),
        ("shutil.py", "rmtree", 6),
        ("shutil.py", "_rmtree_safe_fd", 6),
    ],
    "kill while reading data": [
        ("data/order.py", "take", 60),
        ("data/train_loader.py", "next_update", 10),
        ("data/train_loader.py", "_fill", 30),
        ("sources/data_files.py", "read", 90),
    ],
    "kill while starting or resuming": [
        ("checkpoint/run_state.py", "choose_checkpoint", 1),
        ("checkpoint/store.py", "load_newest_checkpoint", 1),
        ("checkpoint/run_state.py", "take_over", 1),
        ("reporting/jsonl.py", "truncate_after", 2),
        ("data/train_loader.py", "load_state_dict", 1),
        ("qgalore/optimizer/adamw.py", "load_state_dict", 1),
        ("peft_pretraining/build.py", "build_model", 1),
    ],
    "kill while evaluating or logging": [
        ("peft_pretraining/evaluation.py", "evaluate", 2),
        ("reporting/jsonl.py", "_append", 9),
    ],
}
BY_THE_CLOCK, ONE_RANK, RESTART = "kill by the clock", "kill of one rank", "kill of one rank, torchrun restarts"
FULL_DISK, FLIPPED, CUT = "full disk", "flipped byte in a checkpoint", "cut file in a checkpoint"
LOST = "lost file of a checkpoint"
NETWORK = "network"
"""The table adds the format of the data on the hub."""
STOPPED = "SIGTERM, SIGINT or SIGUSR1"
KILLS = (*MOMENTS, BY_THE_CLOCK, ONE_RANK, RESTART)
FAULTS = (FULL_DISK, FLIPPED, CUT, LOST, STOPPED)
SEVERAL_RANKS_ONLY = (ONE_RANK, RESTART)
SAVE, PRUNE = "kill inside a save", "kill while pruning"
FILES = ("manifest.json", "model.safetensors", "optimizer.json", "optimizer.safetensors", "state.json")
NETWORK_FAULTS = ("refuse", "stall", "cut", "500", "503", "429", "garbage", "short", "whole")


class Fault(NamedTuple):
    """A fault that is made in a run."""

    kind: str
    where: str = ""
    """A moment of chaos_inside, or a file of the newest checkpoint; "": a random one."""


def deal(kills: int, faults: int, ranks: int, rng: random.Random) -> list[Fault]:
    """A shuffled deck of this many kills and other faults, each kind about equally often, at random places."""
    kinds = [kind for kind in KILLS if ranks > 1 or kind not in SEVERAL_RANKS_ONLY]
    deck = [kinds[i % len(kinds)] for i in range(kills)] + [FAULTS[i % len(FAULTS)] for i in range(faults)]
    rng.shuffle(deck)
    return [Fault(kind) for kind in deck]


def every_place() -> list[Fault]:
    """A deck with a kill before and after every step of a save, and a flipped byte and a cut in every file."""
    # A context manager: called and left before a file is written, and again when it is, to sync it.
    steps = [f"checkpoint/store.py:_synced_file:{event}:{n}" for n in range(1, 2 * len(FILES) + 1) for event in EVENTS]
    names = ("remove_leftovers", "put_in_place", "sync_directory", "prune")
    steps += [f"checkpoint/folder.py:{name}:{event}:1" for name in names for event in EVENTS]
    return [Fault(SAVE, step) for step in steps] + [Fault(kind, file) for kind in (FLIPPED, CUT) for file in FILES]
