"""Weights are dealt to ranks so that bytes and time balance: at every shipped model, on paper."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from peft_pretraining.build import build_model, converter_of, shape_of
from peft_pretraining.config.parse import parse_args
from peft_pretraining.memory.dealt_states import bytes_by_rank, dealt_weights, fullest, owners_by_name
from peft_pretraining.memory.plan import plan
from peft_pretraining.memory.planned_run import PlannedRun
from qgalore.sharding.deal import Load, deal, deals_rows, layer_of, row_ranges

CONFIGS = sorted((Path(__file__).resolve().parent.parent / "configs").glob("*.json"))
RANKS = (2, 3, 4, 8, 16, 32, 64)


def planned(config: Path, flags: str = "") -> PlannedRun:
    argv = f"--model_config {config} --batch_size 1 --dataset pydocs --optimizer q_galore_adamw8bit_per_layer {flags}"
    args = parse_args(argv.split())
    shape = shape_of(args.model)
    assert shape is not None
    return PlannedRun(args, shape)


def test_the_name_of_a_layer() -> None:
    assert layer_of("model.layers.12.mlp.up_proj.weight") == "model.layers.12"
    assert layer_of("lm_head.weight") == "lm_head.weight"


def test_norms_go_along_with_a_matrix_of_their_layer() -> None:
    loads = [
        Load("layers.0.a.weight", 400, 4.0), Load("layers.0.norm.weight", 10, 1e-3, True),
        Load("layers.1.a.weight", 400, 4.0), Load("layers.1.norm.weight", 10, 1e-3, True),
        Load("norm.weight", 10, 1e-3, True),
    ]  # fmt: skip
    assert deal(loads, 2) == [0, 0, 1, 1, 0]
    assert deal(loads, 1) == [0] * 5


@pytest.mark.parametrize("columns", [64, 100, 512, 1000, 4096])
@pytest.mark.parametrize("ranks", RANKS)
def test_rows_of_all_ranks_are_all_rows_in_whole_blocks(columns: int, ranks: int) -> None:
    """So an 8-bit state of some rows is a part of that of all."""
    ranges = row_ranges((32_003, columns), ranks)
    assert ranges[0][0] == 0 and ranges[-1][1] == 32_003
    assert all(one[1] == other[0] for one, other in itertools.pairwise(ranges))
    assert all(start * columns % 256 == 0 and stop > start for start, stop in ranges)
    sizes = [stop - start for start, stop in ranges]
    assert max(sizes) - min(sizes) <= 2 * 64 + 3


@pytest.mark.parametrize("method", ["low_rank", "lora", "qlora"])
def test_factors_are_dealt_and_what_is_beside_them(method: str) -> None:
    """Those of low_rank by the names that they have in a run, where adapters have names of their own."""
    flags = f"--model_config 9m --batch_size 1 --dataset pydocs --optimizer adamw --method {method} --rank 8"
    args = parse_args(f"{flags} --compile off".split())
    model = build_model(args.model, torch.device("cpu"), 0, on_module=converter_of(args))
    trained = {name for name, param in model.named_parameters() if param.requires_grad}
    factors = {name for name in trained if "_proj" in name}
    owners = owners_by_name(args, 2)
    assert owners.keys() >= (trained if method == "low_rank" else trained - factors)
    assert len(owners) == len(trained) and len(factors) == 14 * len(model.decoder_layers)
    assert set(owners.values()) == {0, 1}


@pytest.mark.parametrize("flags", ["--recipe paper", "--rank full"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_bytes_and_time_balance(config: Path, flags: str) -> None:
    """The fullest rank has a twentieth above the mean, and where weights are few not more than one weight above it."""
    shape = json.loads(config.read_text())
    keys = shape["hidden_size"] * shape.get("num_key_value_heads", shape["num_attention_heads"])
    rank = min(shape["hidden_size"] // 4, keys // shape["num_attention_heads"])
    weights = dealt_weights(planned(config, flags + (f" --rank {rank}" if "paper" in flags else "")))
    loads = [weight.load for weight in weights]
    large = [weight for weight in weights if not weight.load.is_vector]
    for ranks in RANKS:
        owners = deal(loads, ranks)
        assert owners == deal(loads, ranks) and set(owners) <= set(range(ranks))
        for what in ("states", "values"):
            of_ranks = [0.0] * ranks
            for weight, owner in zip(weights, owners, strict=True):
                by_rows = deals_rows(weight.load, ranks)
                for rank in range(ranks):
                    own = weight.load.values * ((1 / ranks) if by_rows else rank == owner)
                    of_ranks[rank] += weight.bytes_of(weight.states, rank, owner, ranks) if what == "states" else own
            mean = sum(of_ranks) / ranks
            whole = [x for x in large if not deals_rows(x.load, ranks)]
            largest = max((x.states if what == "states" else x.load.values for x in whole), default=0.0)
            assert max(of_ranks) <= max(1.05 * mean, mean + largest), (ranks, what)
            if len(whole) >= 16 * ranks:
                assert max(of_ranks) <= 1.03 * mean, (ranks, what)


@pytest.mark.parametrize("flags", ["--recipe paper --rank 128", "--rank full"])
def test_states_of_all_ranks_are_those_of_one(flags: str) -> None:
    run = planned(CONFIGS[0].parent / "llama_130m.json", flags)
    alone, shared = bytes_by_rank(run, 1)[0], bytes_by_rank(run, 4)
    sums = [sum(each.matrix_states for each in shared), sum(each.other_states for each in shared)]
    assert sums == pytest.approx([alone.matrix_states, alone.other_states], abs=4 * len(run.matrices))
    lasting = plan(run.args, run.config).lasting
    failures = 0 if "full" in flags else 8 * 7 * 12  # counters of every rank
    assert alone.matrix_states + failures == lasting["optimizer states, decoder"]
    assert alone.other_states == lasting["optimizer states, embeddings, head, norms"]


def test_the_plan_is_of_the_fullest_rank() -> None:
    config = CONFIGS[0].parent / "llama_1b.json"

    def peak(flags: str) -> int:
        run = planned(config, f"--dry_run --recipe paper {flags}")
        return plan(run.args, run.config).weights_and_states_bytes

    alone, dealt, full = peak(""), peak("--nproc 8 --shard optimizer"), peak("--nproc 8 --shard full")
    run = planned(config, "--dry_run --recipe paper --nproc 8 --shard optimizer")
    one, most = bytes_by_rank(run, 1)[0].states, fullest(bytes_by_rank(run, 8)).states
    assert alone - dealt == one - most > 0.8 * one
    assert peak("--nproc 8") == alone
    text = plan(run.args, run.config).table()
    assert text.startswith("Planned memory of the fullest of 8 ranks (--shard optimizer: optimizer states of ")
    run = planned(config, "--dry_run --recipe paper --nproc 8 --shard full")
    lasting = plan(run.args, run.config).lasting
    matrices = 24 * (4 * 2048**2 + 3 * 2048 * 5461)
    assert 0.125 * matrices < lasting["decoder weights"] < 0.15 * matrices and full < 0.45 * dealt
    assert lasting["matrices of other ranks, of two layers"] < 2.2 * matrices / 24
