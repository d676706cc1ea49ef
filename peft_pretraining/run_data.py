"""The data of a run: what this rank trains on and what it is evaluated on."""

from __future__ import annotations

from typing import Any

from peft_pretraining.args import RunArgs
from peft_pretraining.dataloader import TrainLoader, build_train_loader
from peft_pretraining.distributed import Processes
from peft_pretraining.eval_set import EvalSet, build_eval_set
from peft_pretraining.token_files import is_token_dataset
from peft_pretraining.tokenizer import load_tokenizer


def build_data(args: RunArgs, processes: Processes) -> tuple[TrainLoader, EvalSet]:
    """The training loader and the validation set of `--dataset` for this rank."""
    data, batch = args.data, args.batch
    tokenizer = None
    if not is_token_dataset(data.dataset):
        # The main rank first: it trains or downloads what the others then find in the cache.
        processes.from_main(lambda: load_tokenizer(data.tokenizer, data.dataset) and None)
        tokenizer = load_tokenizer(data.tokenizer, data.dataset)
    common: dict[str, Any] = {"rank": processes.rank, "world_size": processes.world_size}
    common |= {"dataset": data.dataset, "tokenizer": tokenizer, "packing": data.packing, "max_length": batch.max_length}
    common["damaged_limit"] = data.damaged_limit
    loader = build_train_loader(
        **common, batch_size=batch.batch_size, grad_accum_steps=batch.gradient_accumulation,
        seed=args.runtime.seed, data_lanes=data.data_lanes, shuffle_buffer=data.shuffle_buffer, workers=data.workers,
    )  # fmt: skip
    evaluation = args.evaluation
    eval_set = build_eval_set(**common, eval_batch_size=evaluation.eval_batch_size, eval_tokens=evaluation.eval_tokens)
    if data.dataset != "c4":  # the hub's has text, and would have to be waited for
        processes.from_main(eval_set.check)
    return loader, eval_set
