"""`--memory_budget`: what it chooses fits, is the fastest that does, and is a command that could have been given."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import time
from functools import cache
from pathlib import Path

import pytest
import torch

from peft_pretraining.checkpoint.manifest import MANIFEST
from peft_pretraining.config.flags import format_size, parse_size
from peft_pretraining.config.parse import parse_args
from peft_pretraining.config.run_config import RunArgs
from peft_pretraining.errors import UserError
from peft_pretraining.memory.budget import parse_within_budget, within_card
from peft_pretraining.memory.candidate import OF_COMPILER, UNPLANNED_SHARE, Candidate
from peft_pretraining.memory.candidates import IN_PARTS, Candidates
from peft_pretraining.memory.card_memory import check_card, default_budget, memory_of_card
from peft_pretraining.memory.choice import AS_FAST, WORTH_A_RANK, WORTH_ROUNDING, choose
from peft_pretraining.memory.passing import PassingBytes
from peft_pretraining.memory.plan import plan
from peft_pretraining.memory.planned_run import PlannedRun
from peft_pretraining.models.activations import ACTIVATIONS
from peft_pretraining.models.registry import read_config
from peft_pretraining.speed.cards import CARDS
from tests.small_run import SmallRun

ROOT = Path(__file__).resolve().parent.parent
QUANTIZED = "--optimizer q_galore_adamw8bit_per_layer --weight_quant --stochastic_round --proj_quant"
RUNS = {
    "paper": f"{QUANTIZED} --recipe paper --subspace streaming --update_proj_gap 200 --total_batch_size 24",
    "default": f"{QUANTIZED} --total_batch_size 16",
    "full rank": f"{QUANTIZED.replace(' --proj_quant', '')} --rank full --total_batch_size 8",
    "adamw": "--optimizer adamw --total_batch_size 12",
    "one layer in two": "--optimizer galore_adamw --batch_size 8 --activation_checkpointing --checkpoint_every 2",
    "three layers": "--optimizer galore_adamw --batch_size 8 --activation_checkpointing --checkpoint_layers 3",
    "all layers": f"{QUANTIZED} --total_batch_size 8 --activation_checkpointing",
}
PAIRS = [("9m", run) for run in RUNS] + [("1b", "default")]


def argv(model: str, flags: str) -> list[str]:
    config = str(ROOT / "configs" / f"llama_{model}.json")
    return ["--model_config", config, "--dataset", "pydocs", "--device", "cuda", *flags.split()]


@cache
def candidates(model: str, run: str) -> Candidates:
    return Candidates([*argv(model, RUNS[run]), "--memory_budget", "1GB"])


def fitting(found: Candidates, budget: int) -> list[Candidate]:
    return [each for each in itertools.chain(*found.steps) if each.needs <= budget]


def of_lower_ranks(found: Candidates) -> list[list[Candidate]]:
    return [list(itertools.chain(*chains)) for chains in found.lower_chains]


@pytest.mark.parametrize(("model", "run"), PAIRS)
def test_what_is_chosen_fits_and_nothing_that_fits_is_faster(model: str, run: str) -> None:
    found, card = candidates(model, run), CARDS["h100"]
    every = sorted({each.needs for each in itertools.chain(*found.steps)})
    for budget in {every[0], every[len(every) // 3], every[2 * len(every) // 3], every[-1]}:
        chosen = choose(found, budget, card)
        assert chosen is not None and chosen.peak < budget
        # The plan of the command with these flags is the one that was asked.
        args = parse_args([*argv(model, RUNS[run]), *chosen.flags])
        assert plan(args, read_config(args.model.model_config)).peak_bytes == chosen.peak
        plain = [each for each in fitting(found, budget) if each in found.steps[0]]
        fastest = min(each.seconds(card) for each in plain or fitting(found, budget))
        assert chosen.seconds(card) <= AS_FAST * fastest
    assert choose(found, found.smallest.needs - 1, card) is None


@pytest.mark.parametrize("budget", ["6GB", "24GB"])
def test_7b_with_three_ranks_by_depth_on_four_cards_is_planned_in_seconds(budget: str) -> None:
    flags = f"{QUANTIZED} --rank 128,256,512 --total_batch_size 512 --dry_run --nproc 4 --memory_budget {budget}"
    start = time.process_time()
    args = parse_within_budget(argv("7b", flags))
    assert time.process_time() - start < 5, "seconds of one core"
    assert args.world_size == 4


@pytest.mark.parametrize(("length", "model"), [(64, "1b"), (1024, "1b"), (256, "7b")])
def test_tensors_are_computed_again_in_the_order_of_the_time_that_a_byte_saves(length: int, model: str) -> None:
    """In a chain each step spares bytes for at least as much time a byte as the steps before, and time only grows."""
    found = Candidates(
        [*argv(model, f"{RUNS['paper']} --batch_size 8 --max_length {length}"), "--memory_budget", "1GB"]
    )
    card = CARDS["h100"]
    for chain in found.chains[0]:
        in_part = [each for each in chain if not each.args.model.activation_checkpointing]
        kept = [PassingBytes(PlannedRun(each.args, each.config)).kept for each in in_part]
        seconds = [each.seconds(card) for each in in_part]
        prices = [
            (later - earlier) / (before - after)
            for (earlier, later), (before, after) in zip(
                itertools.pairwise(seconds), itertools.pairwise(kept), strict=True
            )
        ]
        rounds = "--int8_activations" in chain[0].flags  # of which a layer less is rounded, too
        assert all(price > 0 for price in prices)
        assert rounds or all(later > 0.98 * earlier for earlier, later in itertools.pairwise(prices))
        used = {name for each in in_part for name, count in each.args.model.recomputed_tensors(4).items() if count}
        assert used == {*ACTIVATIONS}


def test_more_memory_is_slower_only_by_what_rounding_less_may_cost() -> None:
    found, card = candidates("1b", "default"), CARDS["4090"]
    chosen = [choose(found, budget * 10**9, card) for budget in (2, 3, 4, 6, 8, 12, 16)]
    seconds = [each.seconds(card) for each in chosen if each and "--rank" not in each.flags]
    assert len(seconds) > 4 and seconds[-1] < 0.9 * seconds[0]
    assert all(later <= AS_FAST * WORTH_ROUNDING * earlier for earlier, later in itertools.pairwise(seconds))


def test_the_choice_is_a_command_and_a_note() -> None:
    flags = f"{RUNS['paper']} --rank 512"
    args = parse_within_budget([*argv("1b", flags), "--memory_budget", "4GB"])
    note = args.notes[-1]
    assert note.startswith("--memory_budget 4GB chooses --batch_size ") and "tokens/s counted for H100" in note
    chosen = note.removeprefix("--memory_budget 4GB chooses ").partition(":")[0]
    given = [*argv("1b", flags), "--memory_budget", "4GB"]
    assert args.command == tuple(given), "what the user has typed"
    with_chosen = parse_args([*given, *chosen.split()])
    assert dataclasses.replace(args, notes=(), command=()) == dataclasses.replace(with_chosen, command=())
    peak = plan(args, read_config(args.model.model_config)).peak_bytes
    assert f": {peak / 1e9:.2f} GB planned at the peak, " in note and peak < 4e9


def fields(args: RunArgs, *names: str) -> list[object]:
    values = args.to_dict()
    return [values[name] for name in names]


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        ("--batch_size 2 --total_batch_size 8", {"batch_size": 2}),
        ("--gradient_accumulation 4 --total_batch_size 8", {"batch_size": 2}),
        ("--total_batch_size 8 --activation_checkpointing --checkpoint_every 2", {"checkpoint_every": 2}),
        ("--total_batch_size 8 --activation_checkpointing --checkpoint_layers 3", {"checkpoint_layers": 3}),
        ("--total_batch_size 8 --recompute mlp:2", {"recompute": "mlp:2", "activation_checkpointing": False}),
        ("--total_batch_size 8 --grad_accum_dtype bfloat16", {"grad_accum_dtype": "bfloat16"}),
        ("--total_batch_size 8 --int8_activations", {"int8_activations": True}),
        ("--total_batch_size 8 --rank 32", {"rank": 32}),
    ],
)
def test_what_the_user_gives_stays(flags: str, kept: dict[str, object]) -> None:
    found = Candidates([*argv("9m", f"{QUANTIZED} {flags}"), "--memory_budget", "1GB"])
    every = [each for step in (*found.steps, *of_lower_ranks(found)) for each in step]
    assert len(every) > 1
    for each in every:
        assert fields(each.args, *kept) == list(kept.values())
        assert not {f"--{name}" for name in kept} & set(each.flags) or "--gradient_accumulation" in flags
        assert each.args.batch.total_batch_size == 8


UNASKED = "--optimizer q_galore_adamw8bit_per_layer --batch_size 1 --total_batch_size 8"
"""With sums over micro-batches, which are smaller in a subspace."""


def test_a_full_rank_that_nobody_asks_for_gives_way_to_a_subspace(tmp_path: Path) -> None:
    """Where it does not fit, nor with a momentum in parts; a flag or the checkpoint of a run that goes on keeps it."""
    flags, card = f"{UNASKED} --accumulate_by micro_batch", CARDS["h100"]
    found = Candidates([*argv("1b", flags), "--memory_budget", "1GB"])
    assert found.in_parts is not None
    own = found.own_smallest.needs
    full, in_parts = choose(found, own, card), choose(found, own - 1, card)
    assert full is not None and "--recipe" not in full.flags and full.args.subspace.rank == "full"
    assert in_parts is not None and in_parts.flags[:4] == IN_PARTS and in_parts.args.subspace.rank == "full"
    assert parse_args([*argv("1b", flags), *in_parts.flags]).subspace.momentum_rest_bits == 4
    least = found.in_parts.own_smallest.needs
    assert least < own
    below = choose(found, least - 1, card)
    assert below is not None and below.flags[:2] == ("--recipe", "orthogonal") and below.needs < least
    args = parse_args([*argv("1b", flags), *below.flags])
    assert (args.subspace.rank, args.subspace.direction) == (896, "orthogonal") and not found.lower_chains
    assert plan(args, read_config(args.model.model_config)).peak_bytes == below.peak
    assert found.smallest.needs < below.needs, "of a smaller rank"
    assert choose(found, found.smallest.needs - 1, card) is None
    for asked in ("--recipe full_rank", "--rank full"):
        given = Candidates([*argv("1b", f"{flags} {asked}"), "--memory_budget", "1GB"])
        assert choose(given, own, card) is not None and choose(given, own - 1, card) is None
    (tmp_path / MANIFEST).touch()
    for recipe, falls_back in (("full_rank", False), ("orthogonal", True)):
        (tmp_path / "state.json").write_text(json.dumps({"recipe": recipe}))
        goes_on = Candidates([*argv("1b", f"{flags} --continue_from {tmp_path}"), "--memory_budget", "1GB"])
        assert goes_on.in_subspace is goes_on.in_parts is None
        again = choose(goes_on, least - 1, card)
        assert (again is not None and again.needs == below.needs) == falls_back


def test_ranks_share_before_a_rank_is_made_smaller(capsys: pytest.CaptureFixture[str]) -> None:
    """Replicas, shards; the same with a momentum in parts, of the recipe orthogonal; and only then smaller ranks."""
    card = CARDS["h100"]
    flags = argv("1b", f"{UNASKED.replace('total_batch_size 8', 'total_batch_size 16')} --accumulate_by micro_batch")
    replicas = Candidates([*flags, "--memory_budget", "1GB"], 2)
    sharded = Candidates([*flags, "--memory_budget", "1GB", "--shard", "full"], 2)
    assert replicas.in_subspace and sharded.in_parts and sharded.in_subspace

    def least(found: Candidates) -> int:
        return min(each.needs for step in found.steps for each in step)

    def within(budget: int, *more: str) -> RunArgs:
        args = parse_within_budget([*flags, *more, "--memory_budget", f"{budget // 10**6}MB"], 2, card)
        assert plan(args, read_config(args.model.model_config)).peak_bytes <= budget
        return args

    assert least(replicas.in_subspace) > least(sharded), "a subspace saves less here than sharing does"
    full = within(least(sharded) + 10**6)
    assert (full.runtime.shard, full.subspace.rank, full.subspace.momentum_rank) == ("full", "full", 0)
    in_parts = within(least(sharded) - 10**6)
    assert (in_parts.runtime.shard, in_parts.subspace.rank) == ("full", "full") and in_parts.subspace.momentum_rank
    in_subspace = within(least(sharded.in_parts) - 10**6)
    assert (in_subspace.runtime.shard, in_subspace.optimizer.recipe) == ("full", "orthogonal")
    assert in_subspace.subspace.rank == 896
    orthogonal = ("--recipe", "orthogonal")
    states = Candidates([*flags, *orthogonal, "--memory_budget", "1GB", "--shard", "optimizer"], 2)
    asked = within(least(states) - 10**6, *orthogonal)
    assert (asked.runtime.shard, asked.subspace.rank) == ("optimizer", 896)
    assert asked.runtime.shard_sums == "owner", "sums of all matrices on every rank would not fit"
    smallest = min(replicas.smallest.needs, sharded.smallest.needs)
    with pytest.raises(UserError, match=r"is too small: the least that works is ([\d.]+)GB, with") as raised:
        parse_within_budget([*flags, "--memory_budget", "100MB"], 2, card)
    told = float(re.findall(r"works is ([\d.]+)GB", str(raised.value))[0])
    assert told * 1e9 <= smallest + 2 * 10**7


def test_without_a_budget_the_card_decides_on_the_full_rank() -> None:
    flags = argv("1b", f"{UNASKED}")
    candidates_ = Candidates(flags)
    unrounded = [each for each in candidates_.steps[0] if "--int8_activations" not in each.flags]
    least = min(each.needs for each in unrounded)
    assert within_card(flags, 1, "run_pretrain.py", least, CARDS["h100"]).subspace.rank == "full"
    args = within_card(flags, 1, "run_pretrain.py", least - 1, CARDS["h100"])
    assert args.subspace.rank == "full" and "--momentum_rank 1/16" in args.notes[-1]
    assert candidates_.in_parts is not None
    least = min(each.needs for each in candidates_.in_parts.steps[0] if "--int8_activations" not in each.flags)
    args = within_card(flags, 1, "run_pretrain.py", least - 1, CARDS["h100"])
    assert args.subspace.rank == 896 and "--recipe orthogonal" in args.notes[-1]


def test_a_smaller_rank_only_where_nothing_else_fits() -> None:
    flags = argv("1b", f"{RUNS['default']} --accumulate_by micro_batch")
    found, card = Candidates([*flags, "--memory_budget", "1GB"]), CARDS["h100"]
    least = min(each.needs for each in itertools.chain(*found.steps))
    at_least, below = choose(found, least, card), choose(found, least - 1, card)
    assert at_least is not None and "--rank" not in at_least.flags and at_least.args.subspace.rank == 896
    assert below is not None and below.flags[-2:] == ("--rank", str(below.args.subspace.rank))
    # Of larger ranks none fits, but with so small micro-batches that it takes twice as long.
    larger = [step for step in of_lower_ranks(found) if step[0].args.subspace.rank > below.args.subspace.rank]
    for each in itertools.chain(*larger):
        assert each.needs >= least or each.seconds(card) > WORTH_A_RANK * below.seconds(card)


FULL_RANK = QUANTIZED.replace(" --proj_quant", "") + " --rank full --total_batch_size 64"


def test_sums_of_one_layer_at_a_time_where_nothing_else_fits_at_this_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    found, card = Candidates([*argv("1b", FULL_RANK), "--memory_budget", "1GB"]), CARDS["h100"]
    others = min(each.needs for each in itertools.chain(*found.steps))
    above, below = choose(found, others, card), choose(found, others - 1, card)
    assert above is not None and "--accumulate_by" not in above.flags
    assert below is not None and below.flags[-2:] == ("--accumulate_by", "layer") and below.needs < others
    args = parse_within_budget([*argv("1b", FULL_RANK), "--memory_budget", format_size(others - 10**6)], 1, card)
    host = plan(args, read_config("1b")).host
    assert args.by_layer and args.notes[-1].endswith(
        f"as nothing else fits with this rank, and {host / 1e9:.2f} GB of hidden states a rank in host memory, whose "
        "copies are not counted as time"
    )
    # What is given stays, and a host without the memory has no such choice.
    for flag in ("--accumulate_by micro_batch", "--grad_clipping 1", "--recompute mlp"):
        given = Candidates([*argv("1b", f"{FULL_RANK} {flag}"), "--memory_budget", "1GB"])
        assert not given.chains_by_layer
    monkeypatch.setattr("peft_pretraining.memory.candidates.free_host_bytes", lambda: host - 1)
    small_host = Candidates([*argv("1b", FULL_RANK), "--memory_budget", "1GB"])
    assert not small_host.chains_by_layer and choose(small_host, others - 1, card) is None


def test_clipping_inside_the_backward_pass_needs_a_sum() -> None:
    found = Candidates([*argv("9m", f"{RUNS['default']} --grad_clipping 1"), "--memory_budget", "1GB"])
    assert {each.args.batch.batch_size for each in found.steps[0]} == {8, 4, 2, 1}


def test_a_total_batch_may_be_written_in_any_notation() -> None:
    plain, other = (
        parse_within_budget([*argv("9m", f"{QUANTIZED} --total_batch_size {total}"), "--memory_budget", "1GB"])
        for total in ("16", "1.6e1")
    )
    assert plain.batch == other.batch and plain.batch.total_batch_size == 16


def test_ranks_share_the_total_batch() -> None:
    args = parse_within_budget([*argv("9m", RUNS["paper"]), "--memory_budget", "1GB"], world_size=4)
    assert args.batch.batch_size * args.batch.gradient_accumulation * 4 == 24


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--total_batch_size 8 --memory_budget 1MB",
            r"--memory_budget 1MB is too small: the least that works is \d+MB",
        ),
        (
            "--memory_budget 24GB",
            "--memory_budget chooses --batch_size where the sequences of an update are given: give",
        ),
        ("--batch_size 8 --memory_budget 24", "--memory_budget is '24', it must be a size with its unit, such as 24GB"),
        ("--total_batch_size 8 --memory_budget 0GB", "--memory_budget is '0GB', it must be a size with its unit"),
        ("--total_batch_size x --memory_budget 1GB", "--total_batch_size is 'x', it must be a whole number"),
        ("--total_batch_size 8 --memory_budget", "--memory_budget has no value"),
        ("--total_batch_size 8 --gradient_accumulation 3 --memory_budget 1GB", "give --gradient_accumulation 8"),
    ],
)
def test_what_cannot_work_is_a_sentence(flags: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_within_budget(argv("9m", f"{QUANTIZED} {flags}"))


def test_the_least_that_works_works() -> None:
    with pytest.raises(UserError, match="too small") as refused:
        parse_within_budget([*argv("9m", RUNS["adamw"]), "--memory_budget", "1MB"])
    least = str(refused.value).partition("works is ")[2].partition(",")[0]
    chosen = parse_within_budget([*argv("9m", RUNS["adamw"]), "--memory_budget", least])
    assert chosen.notes[-1].split(" chooses ")[1].partition(":")[0] in str(refused.value)


def test_the_least_of_a_small_model_is_told_to_the_tenth_of_a_megabyte(tmp_path: Path) -> None:
    """It is below ten of them; a tenth less is refused again."""
    small = SmallRun(tmp_path)
    flags: dict[str, object] = {"batch_size": None, "save_dir": None}
    with pytest.raises(UserError, match="too small") as refused:
        parse_within_budget(small.argv("run", flags | {"memory_budget": "0.3MB"}))
    least = float(str(refused.value).partition("works is ")[2].partition("MB")[0])
    assert 0.3 < least < 10
    parse_within_budget(small.argv("run", flags | {"memory_budget": f"{least}MB"}))
    with pytest.raises(UserError, match=f"works is {least}MB"):
        parse_within_budget(small.argv("run", flags | {"memory_budget": f"{least - 0.1:.1f}MB"}))


def test_a_model_that_only_transformers_reads_has_no_budget(tmp_path: Path) -> None:
    config, raw = tmp_path / "config.json", json.loads((ROOT / "configs" / "llama_9m.json").read_text())
    config.write_text(json.dumps(raw | {"mlp_bias": True}))
    flags = f"--model_config {config} --use_hf_model --batch_size 1 --optimizer adamw --memory_budget 1GB"
    with pytest.raises(UserError, match="whose memory is not planned"):
        parse_within_budget(flags.split())


def test_a_model_that_is_not_planned_is_left_to_its_flags(tmp_path: Path) -> None:
    config, raw = tmp_path / "config.json", json.loads((ROOT / "configs" / "llama_9m.json").read_text())
    config.write_text(json.dumps(raw | {"mlp_bias": True}))
    flags = f"--model_config {config} --use_hf_model --optimizer adamw --dataset pydocs --total_batch_size 4".split()
    with pytest.raises(UserError, match="--batch_size is missing"):
        within(flags, 10**9)
    assert within([*flags, "--batch_size", "2"], 1) == parse_args([*flags, "--batch_size", "2"])


def test_a_budget_beyond_the_card_is_refused() -> None:
    check_card(80 * 10**9, 85_000_000_000, "NVIDIA H100")
    with pytest.raises(
        UserError, match=r"96GB is more than the 85.2 GB of this machine's NVIDIA H100: give at most 85GB"
    ):
        check_card(96 * 10**9, 85_200_000_000, "NVIDIA H100")


@pytest.mark.parametrize("flags", ["--memory_budget 200MB --total_batch_size 16", "--batch_size 4"])
def test_an_old_run_that_goes_on_is_planned_as_it_was(flags: str, tmp_path: Path) -> None:
    """Its checkpoint is from before its optimizer's name meant quantized weights: float ones fit in another way."""
    command = argv("9m", f"--optimizer q_galore_adamw8bit_per_layer --continue_from {tmp_path} {flags}")
    new = parse_within_budget(command)
    of_old = {"weight_quant": False, "stochastic_round": False, "proj_quant": False, "recipe": "orthogonal"}
    (tmp_path / MANIFEST).touch()
    (tmp_path / "state.json").write_text(json.dumps(of_old))
    old = parse_within_budget(command)
    assert (new.quantization.weight_quant, old.quantization.weight_quant) == (True, False)
    config = read_config("9m")
    assert plan(old, config).peak_bytes < 200e6
    denied = parse_within_budget([*command, "--no-weight_quant", "--no-proj_quant"])
    assert (old.model, old.batch, old.subspace) == (denied.model, denied.batch, denied.subspace)
    if "budget" in flags:
        assert old.model != new.model, "another choice"


def test_without_a_budget_nothing_changes_where_the_run_fits() -> None:
    flags = argv("9m", f"{QUANTIZED} --batch_size 4")
    assert parse_within_budget(flags, card=CARDS["h100"]) == parse_args(flags)
    assert within(flags, 8 * 10**9) == parse_args(flags)


def within(flags: list[str], budget: int, world_size: int = 1) -> RunArgs:
    return within_card(flags, world_size, "run_pretrain.py", budget, CARDS["h100"])


@pytest.mark.parametrize("given", ["", "--int8_activations", "--activation_checkpointing --checkpoint_layers 1"])
def test_without_a_budget_layers_are_computed_again_as_far_as_the_card_needs_it(given: str) -> None:
    flags = argv("1b", f"{RUNS['paper']} --batch_size 24 --rank 512 {given}")
    plain = parse_args(flags)
    peak = plan(plain, read_config(plain.model.model_config)).peak_bytes
    args = within(flags, peak)  # and one per cent of it is not to be had
    if "checkpoint_layers" in given:
        assert args == plain, "what the user gives stays, and a warning tells"
        return
    assert args.model.recompute == "attention" and args.model.int8_activations == plain.model.int8_activations
    assert args.batch == plain.batch and args.subspace == plain.subspace and args.command == tuple(flags)
    chosen = "--recompute attention"  # of all layers, which is as fast to one per cent as of a few
    assert args.notes[-1].startswith(f"within the {peak / 1e9:.2f} GB that this card has for it: {chosen}, with ")
    assert Candidate((), plain, read_config("1b"), {}).needs > peak
    # What cannot be made to fit is left alone.
    assert within(flags, 10**9) == plain


def test_without_a_micro_batch_the_card_chooses_it() -> None:
    flags = argv("1b", RUNS["paper"])
    args = within(flags, 20 * 10**9)
    assert args.batch.total_batch_size == 24 and args.batch.batch_size > 1 and not args.model.int8_activations
    assert (
        args.optimizer.grad_accum_dtype == "float32"
        and args.subspace == parse_args([*flags, "--batch_size", "24"]).subspace
    )
    assert within(flags, 20 * 10**9, world_size=2).batch.gradient_accumulation >= 1
    with pytest.raises(
        UserError, match=r"what this card has free, 1\.00 GB, with no --batch_size given is too small: the"
    ):
        within(flags, 10**9)
    with pytest.raises(UserError, match="--batch_size is missing"):
        within(argv("1b", QUANTIZED), 20 * 10**9)


def test_the_default_budget_is_the_same_on_a_card_of_its_own() -> None:
    total, context = 85_520_809_984, 600 << 20
    own = default_budget(total - context, total)
    assert own == default_budget(total, total) == default_budget(0, total, world_size=2) and 0.9 * total < own
    used = default_budget(total - 10 * 10**9, total)
    assert used < total - 10 * 10**9 and used < own


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_this_machine_has_a_default_budget() -> None:
    found = memory_of_card(1)
    assert found is not None and 0 < found[0] < torch.cuda.get_device_properties(0).total_memory


def test_a_run_says_what_it_chose_and_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = SmallRun(tmp_path)
    assert small.main("run", memory_budget="1GB", batch_size=None, dry_run=True) == 0
    printed = capsys.readouterr().out
    planned = re.search(r"--memory_budget 1GB chooses --batch_size 8: ([\d.]+) MB planned", printed)
    assert planned and 0.5 < float(planned[1]) < 100 and "--gradient_accumulation 1\n" in printed
    assert small.main("run", memory_budget="1GB", batch_size=None, num_training_steps=1) == 0
    assert "--memory_budget 1GB chooses --batch_size 8: " in capsys.readouterr().err


def test_sizes_read_back() -> None:
    for text, nbytes in {
        "24GB": 24 * 10**9,
        "22.5GiB": 24_159_191_040,
        "800MB": 8 * 10**8,
        "1.5 tb": 1_500_000_000_000,
        "8.3MB": 8_300_000,
        "4.1MB": 4_100_000,
    }.items():
        assert parse_size(text) == nbytes
    for nbytes in (24 * 10**9, 22_500_000_000, 8 * 10**8, 1_234_000_000):
        assert parse_size(format_size(nbytes)) == nbytes


def test_states_then_weights_are_dealt_to_ranks_before_a_rank_is_made_smaller() -> None:
    flags = f"{QUANTIZED} --recipe paper --subspace streaming --rank 512 --batch_size 8 --dry_run --nproc 4"
    chosen = {}
    for budget in ("6GB", "4GB", "3GB", "2GB"):
        args = parse_within_budget([*argv("1b", flags), "--memory_budget", budget], card=CARDS["h100"])
        assert plan(args, read_config(args.model.model_config)).peak_bytes <= parse_size(budget)
        chosen[budget] = args.runtime.shard, args.subspace.rank
    assert [shard for shard, _ in chosen.values()] == ["none", "none", "optimizer", "full"]
    assert {rank for _, rank in chosen.values()} == {512}
    one = parse_within_budget([*argv("1b", flags), "--memory_budget", "3.3GB", "--shard", "none"], card=CARDS["h100"])
    assert one.runtime.shard == "none", "which was given"


def test_a_compiler_that_does_not_run_takes_nothing_of_a_budget() -> None:
    """What is kept free for it is more than a small run without it takes in all."""
    flags = ["--batch_size", "1", "--total_batch_size", "8", "--recompute", "mlp", "--memory_budget", "1GB"]
    for compiles, free in (("off", 0), ("on", OF_COMPILER)):
        found = Candidates([*argv("60m", "--optimizer adamw"), *flags, "--compile", compiles])
        for each in found.steps[0]:
            assert each.needs == each.peak + int(each.peak * UNPLANNED_SHARE) + free
