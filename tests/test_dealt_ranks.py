"""`--rank auto`: what it deals, at which bytes, and by which measured rule."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.rows import ROOT
from peft_pretraining.config import dealt_ranks as dealing
from peft_pretraining.config.dealt_ranks import HELD_BY_ATTENTION, HELD_BY_MLP, dealt_ranks, nuclear_share
from peft_pretraining.config.parse import parse_args
from peft_pretraining.config.run_config import RunArgs
from peft_pretraining.errors import UserError
from peft_pretraining.memory.lasting import lasting_bytes
from peft_pretraining.memory.planned_run import PlannedRun
from peft_pretraining.memory.shipped_runs import ShippedRun
from peft_pretraining.models.registry import read_config
from tests.small_run import SmallRun, assert_same_run, flags_of

Q_GALORE = "--optimizer q_galore_adamw8bit_per_layer"


def parse(flags: str, model: str = "60m") -> RunArgs:
    return parse_args(f"--model_config {model} --batch_size 8 {flags}".split())


@pytest.mark.parametrize(
    ("flags", "rank", "mlp_rank", "of"),
    [
        (f"{Q_GALORE} --rank auto", 248, 208, 224),
        (f"{Q_GALORE} --rank auto:128", 176, 96, 128),
        (f"{Q_GALORE} --rank auto:64", 112, 32, 64),
        (f"{Q_GALORE} --rank auto:512", 512, 512, 512),
        (f"{Q_GALORE} --rank auto:1", 1, 1, 1),
        (f"{Q_GALORE} --recipe paper --rank auto", 184, 96, 128),
        ("--optimizer galore_adamw --rank auto:128", 184, 96, 128),
        ("--optimizer galore_adamw --rank auto:128 --proj_type full", 136, 120, 128),
    ],
)
def test_ranks_are_dealt_to_attention_and_mlp(flags: str, rank: int, mlp_rank: int, of: int) -> None:
    """Plain numbers from the start, and a sentence in the first lines of a run."""
    args = parse(flags)
    assert (args.subspace.rank, args.subspace.mlp_rank) == (rank, mlp_rank)
    word = flags.split("--rank ")[1].split()[0]
    dealt = f"--rank {rank} for the attention, --mlp_rank {mlp_rank} for the MLP"
    assert f"--rank {word} deals the bytes of rank {of}: {dealt}" in args.notes
    assert args.subspace.proj_quant == ("q_galore" in flags)
    # What a checkpoint records, and a run that goes on compares.
    assert args.to_dict() == parse(f"{flags} --rank {rank} --mlp_rank {mlp_rank}").to_dict()


@pytest.mark.parametrize("flags", [Q_GALORE, f"{Q_GALORE} --recipe paper", "--optimizer galore_adamw --recipe paper"])
@pytest.mark.parametrize("rank", [64, 128, 224])
def test_they_take_the_bytes_of_one_rank(flags: str, rank: int) -> None:
    """By the plan, which asks the states themselves: no more, and less by at most a step of eight."""

    def state_bytes(text: str) -> int:
        args = parse(f"{flags} --rank {text}")
        return sum(lasting_bytes(PlannedRun(args, read_config("60m"))).values())

    dealt, plain, more = state_bytes(f"auto:{rank}"), state_bytes(f"{rank}"), state_bytes(f"{rank + 8}")
    assert plain - (more - plain) < dealt <= plain + (more - plain) // 50  # whose groups are rounded up


def test_no_other_pair_holds_more_of_the_nuclear_norms() -> None:
    parts, prices, rank = [[(48, 48)] * 4, [(128, 48)] * 3], [4 * 72.0, 3 * 152.0], 12
    budget = rank * sum(prices)

    def together(attention: int, mlp: int) -> float:
        return 4 * nuclear_share(HELD_BY_ATTENTION, attention / 48) + 3 * nuclear_share(HELD_BY_MLP, mlp / 48)

    pairs = itertools.product(range(1, 49), range(1, 49))
    allowed = [pair for pair in pairs if pair[0] * prices[0] + pair[1] * prices[1] <= budget]
    best = dealt_ranks(parts, prices, rank)
    assert best in allowed and together(*best) == max(together(*pair) for pair in allowed)
    assert best[0] > rank > best[1]


def test_the_rule_is_that_of_its_rows() -> None:
    with (ROOT / "benchmarks" / "results" / "spectrum.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["commit"] == "2843f12"]
    shares = {"1/16": 1 / 16, "1/8": 1 / 8, "1/4": 1 / 4, "7/16": 7 / 16, "3/4": 3 / 4}
    for fit, kind in ((HELD_BY_ATTENTION, ".self_attn."), (HELD_BY_MLP, ".mlp.")):
        own = [row for row in rows if kind in row["matrix"]]
        assert len(own) >= 48
        for key, share in shares.items():
            mean = sum(float(row[f"nuclear {key}"]) for row in own) / len(own)
            assert nuclear_share(fit, share) == pytest.approx(mean, abs=0.011)
        assert nuclear_share(fit, 0.0) == 0.0 and nuclear_share(fit, 1.0) == 1.0


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            f"{Q_GALORE} --rank auto --mlp_rank 64",
            "--mlp_rank 64 is a part of what --rank auto deals: leave it out, or",
        ),
        (f"{Q_GALORE} --rank auto:600", "--rank is 600, but self_attn.q_proj of 60m is 512 x 512: give at most 512"),
        (f"{Q_GALORE} --rank auto --momentum_rank 16", "stores the momentum of a full rank in parts, and --rank 224"),
    ],
)
def test_what_cannot_be_dealt_is_refused(flags: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(flags)
    assert says in str(caught.value)


def test_a_recipe_of_full_rank_has_no_number_to_deal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dealing, "with_recipe", lambda given: {**given, "rank": "full"})
    with pytest.raises(
        UserError, match=r"--rank auto deals the bytes of a number of dimensions, .* the rank is full: "
    ):
        parse(f"{Q_GALORE} --rank auto")
    assert parse(f"{Q_GALORE} --rank auto:128").subspace.mlp_rank == 96


def test_shapes_that_only_transformers_knows_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "gpt2", "n_embd": 64}))
    with pytest.raises(UserError, match=r"--rank auto needs the shapes of the matrices, and only transformers' own"):
        parse(f"{Q_GALORE} --rank auto --use_hf_model", str(path))
    assert parse(f"{Q_GALORE} --rank auto --use_hf_model").subspace.mlp_rank == 208


def test_an_optimizer_of_full_rank_has_none() -> None:
    args = parse("--optimizer adamw --rank auto")
    assert args.subspace.mlp_rank == 0 and args.notes == ()
    assert any(text.startswith("--rank changes nothing") for text in args.warnings)


def test_a_planner_deals_the_rank_of_the_paper() -> None:
    fits = ShippedRun("1b", ["--rank", "auto"])
    assert {each.args.subspace.ranks()[0] for each in fits.candidates.steps[0]} == {776}
    assert {each.args.subspace.mlp_rank for each in fits.candidates.steps[0]} == {360}


@pytest.mark.slow
def test_a_run_goes_on_with_what_was_dealt(tmp_path: Path) -> None:
    small = SmallRun(tmp_path)
    flags: dict[str, Any] = flags_of("q_galore_adamw8bit_per_layer") | {"num_training_steps": 4, "rank": "auto:8"}
    whole = small.run("whole", **flags)
    stopped = small.stop("parts", 2, **flags).checkpoint()
    assert (stopped.state["rank"], stopped.state["mlp_rank"]) == (12, 5)
    assert_same_run(whole, small.run("parts", **flags, continue_from="auto"))
