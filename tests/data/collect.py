"""Collect the rows and documents of loaders."""

import json
from collections.abc import Sequence
from typing import Any

import torch

from peft_pretraining.data.batch import IGNORED_LABEL, Update
from peft_pretraining.data.tokenizer import Tokenizer
from peft_pretraining.data.train_loader import TrainLoader, build_train_loader, merge_states

EOS = 1


def loaders(world_size: int, global_batch: int = 16, **arguments: Any) -> list[TrainLoader]:
    """One loader for each rank, of batches that add up to `global_batch` sequences in two micro-batches each."""
    defaults: dict[str, Any] = {
        "dataset": "test",
        "packing": "pad",
        "max_length": 48,
        "seed": 3,
        "data_lanes": 8,
        "shuffle_buffer": 5,
        "workers": 2,
        "grad_accum_steps": 2,
    }
    arguments = defaults | arguments
    batch_size = global_batch // world_size // arguments["grad_accum_steps"]
    assert batch_size * world_size * arguments["grad_accum_steps"] == global_batch
    return [
        build_train_loader(rank=rank, world_size=world_size, batch_size=batch_size, **arguments)
        for rank in range(world_size)
    ]


def rows_of(update: Update) -> torch.Tensor:
    """(sequences, max_length) ids, IGNORED_LABEL in the place of padding, in the order of the micro-batches."""
    return torch.cat([micro_batch.labels for micro_batch in update.micro_batches])


def global_rows(ranks: Sequence[TrainLoader], updates: int) -> list[torch.Tensor]:
    """The global batch of each update: the ranks' sequences in turn."""
    batches = []
    for _ in range(updates):
        parts = torch.stack([rows_of(loader.next_update()) for loader in ranks], dim=1)
        batches.append(parts.reshape(-1, parts.shape[-1]))
    return batches


def documents_of(tokenizer: Tokenizer, rows: Sequence[torch.Tensor]) -> list[int]:
    """The numbers of the documents of padded rows, in order."""
    ids = [[i for i in row.tolist() if i not in (IGNORED_LABEL, EOS)] for batch in rows for row in batch]
    texts = tokenizer.decode(ids)
    return [int(text.removeprefix("document ").partition(":")[0]) for text in texts]


def close(ranks: Sequence[TrainLoader]) -> None:
    """Close them all."""
    for loader in ranks:
        loader.close()


def run(
    tokenizer: Tokenizer, source: Any, updates: int, world_size: int = 1, state: Any = None, **arguments: Any
) -> Any:
    """(global batches, merged state after them as it comes back from JSON)."""
    ranks = loaders(world_size, tokenizer=tokenizer, source=source, **arguments)
    for loader in ranks:
        if state is not None:
            loader.load_state_dict(state)
    batches = global_rows(ranks, updates)
    merged = json.loads(json.dumps(merge_states([loader.state_dict() for loader in ranks])))
    close(ranks)
    return batches, merged
