"""Recipes: their values for flags that are not given, and the command lines that they do not change."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace as Namespace

import pytest
import torch

import qgalore.recipes
from peft_pretraining.config.flag_groups import OptimizerArgs, SubspaceArgs
from peft_pretraining.config.flags import read_specs
from peft_pretraining.config.parse import parse_args
from peft_pretraining.config.run_config import RunArgs
from peft_pretraining.dry_run import describe
from peft_pretraining.errors import UserError
from peft_pretraining.reporting.reporter import RunMetrics
from peft_pretraining.run_summary import summary_lines
from tests.small_run import ROOT

Q_GALORE = "--optimizer q_galore_adamw8bit"


def parse(flags: str, model: str = "60m") -> RunArgs:
    model_config = str(ROOT / f"configs/llama_{model}.json")
    return parse_args(["--model_config", model_config, "--dataset", "pydocs", "--batch_size", "4", *flags.split()])


def chosen(args: RunArgs) -> dict[str, object]:
    """What a recipe has a say in."""
    values = args.to_dict()
    names = ("recipe", "lr", "full_rank_lr", "galore_scale", "norm_growth", "rank", "subspace", "update_proj_gap")
    return {name: values[name] for name in (*names, "direction")}


MULTIPLE = 2 * math.sqrt(800 / 10_000)
"""The rate of embeddings, head and norms over that of the matrices in the 10,000 updates that are the default."""
ORTHOGONAL: dict[str, object] = {
    "recipe": "orthogonal",
    "lr": 0.01,
    "full_rank_lr": 0.01 * MULTIPLE,
    "galore_scale": 0.5,
    "norm_growth": 1.01,
    "rank": 224,
    "subspace": "streaming",
    "update_proj_gap": 200,
    "direction": "orthogonal",
}
STREAMING: dict[str, object] = {"subspace": "streaming", "update_proj_gap": 200}
FULL_RANK = ORTHOGONAL | {
    "recipe": "full_rank",
    "full_rank_lr": 0.005 * math.sqrt(3200 / 10_000),
    "norm_growth": 0.0,
    "rank": "full",
    "direction": "normuon",
    # Which have no meaning without projections.
    "subspace": "svd",
    "update_proj_gap": 50,
}
OFFICIAL = {
    "recipe": "paper",
    "lr": 1e-4,
    "full_rank_lr": None,
    "galore_scale": 1.0,
    "norm_growth": 0.0,
    "rank": 128,
    "subspace": "svd",
    "update_proj_gap": 50,
    "direction": "adam",
}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (Q_GALORE, FULL_RANK),
        (f"{Q_GALORE}_per_layer", FULL_RANK),
        (f"{Q_GALORE} --rank full", FULL_RANK),
        (f"{Q_GALORE} --recipe orthogonal", ORTHOGONAL),
        (f"{Q_GALORE} --rank 224", ORTHOGONAL),
        (f"{Q_GALORE} --rank full --mlp_rank 64", ORTHOGONAL | {"rank": "full"}),
        (f"{Q_GALORE} --update_proj_gap 200", ORTHOGONAL),
        (f"{Q_GALORE} --proj_quant", ORTHOGONAL),
        (f"{Q_GALORE} --direction adam", ORTHOGONAL | {"direction": "adam"}),
        (f"{Q_GALORE} --rank full --galore_scale 0.5", FULL_RANK),
        ("--optimizer galore_adamw8bit --recipe orthogonal", ORTHOGONAL),
        ("--optimizer galore_adamw8bit", OFFICIAL),
        (f"{Q_GALORE} --recipe full_rank", FULL_RANK),
        (f"{Q_GALORE} --recipe full_rank --galore_scale 0.25", FULL_RANK | {"galore_scale": 0.25}),
        (f"{Q_GALORE} --recipe full_rank --rank 64", FULL_RANK | {"rank": 64, **STREAMING}),
        ("--optimizer galore_adamw8bit_per_layer --recipe full_rank", FULL_RANK),
        ("--optimizer adamw --recipe full_rank", OFFICIAL | {"recipe": "full_rank"}),
        (f"{Q_GALORE} --recipe paper", OFFICIAL),
        (f"{Q_GALORE} --cos_threshold 0.4", OFFICIAL),
        (f"{Q_GALORE} --galore_scale 0.25", OFFICIAL | {"galore_scale": 0.25}),
        (f"{Q_GALORE} --galore_scale 0.25 --recipe orthogonal", ORTHOGONAL | {"galore_scale": 0.25}),
        (f"{Q_GALORE} --gamma_proj 2 --queue_size 5", OFFICIAL),
        (f"{Q_GALORE} --svd_method full", OFFICIAL),
        (f"{Q_GALORE} --max_update_proj_gap 400", OFFICIAL),
        (f"{Q_GALORE} --proj_type full", OFFICIAL),
        (f"{Q_GALORE} --proj_type std", ORTHOGONAL),
        ("--optimizer adamw", OFFICIAL),
        ("--optimizer adamw --recipe orthogonal", OFFICIAL | {"recipe": "orthogonal"}),
    ],
)
def test_the_recipe_of_a_command_line(flags: str, expected: dict[str, object]) -> None:
    assert chosen(parse(flags)) == expected


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (f"{Q_GALORE} --galore_scale 1.0", "recipe paper, because of --galore_scale 1.0: .* add --recipe orthogonal"),
        (f"{Q_GALORE} --queue_size 5 --gamma_proj 2", "because of --gamma_proj 2.0 and --queue_size 5: "),
        (f"{Q_GALORE} --proj_type full --cos_threshold 0.4", "leave --proj_type full out and add --recipe orthogonal"),
        (f"{Q_GALORE} --svd_method randomized", "leave --svd_method randomized out and add --recipe orthogonal"),
        (f"{Q_GALORE} --galore_scale 1.0 --recipe paper", ""),
        (f"{Q_GALORE} --galore_scale 1.0 --recipe orthogonal", ""),
        (
            f"{Q_GALORE} --lr 0.01 --rank 64 --proj_type left",
            "recipe orthogonal, because of --proj_type left and --rank",
        ),
        (
            f"{Q_GALORE} --residual none",
            "because of --residual none: flags left out have its values, --recipe paper has",
        ),
        (f"{Q_GALORE} --rank full --galore_scale 0.5", ""),
        ("--optimizer galore_adamw8bit --galore_scale 0.25", ""),
    ],
)
def test_a_recipe_that_another_flag_chooses_is_said(flags: str, says: str) -> None:
    """In --dry_run and in a run's first lines; the advice works."""
    args = parse(flags)
    (note,) = args.notes or ("",)
    assert re.search(says, note) if says else not note
    assert describe(args).startswith(note) and args.warnings == ()
    said: list[str] = []
    metrics = object.__new__(RunMetrics)
    vars(metrics).update(_args=args, _parameters=None, _first=0, _initial_weights="")
    vars(metrics).update(_world=Namespace(world_size=1, is_main=True), _device=torch.device("cpu"))
    metrics.log = said.append
    metrics.announce()
    assert said == [*summary_lines(args, "1 x cpu"), *([note] if says else [])]
    if says:
        assert args.optimizer.recipe == ("orthogonal" if "orthogonal, because" in note else "paper")
        advised = re.sub(r"--proj_type full|--svd_method randomized", "", flags)
        assert parse(f"{advised} --recipe orthogonal").notes == ()


@pytest.mark.parametrize(
    ("trained_by", "flags", "recipe", "direction"),
    [
        ({}, "", "paper", "adam"),
        ({}, "--rank full", "paper", "adam"),
        ({}, "--rank 64 --subspace streaming", "paper", "adam"),
        ({}, "--recipe full_rank", "full_rank", "normuon"),
        ({}, "--direction normuon", "full_rank", "normuon"),
        ({}, "--sum_in_momentum", "full_rank", "normuon"),
        ({"optimizer": "adamw", "direction": "adam"}, "", "paper", "adam"),
        ({"optimizer": "adamw", "direction": "normuon"}, "", "paper", "adam"),
        ({"optimizer": "muon", "direction": "adam"}, "", "full_rank", "normuon"),
        ({"optimizer": "q_galore_adamw8bit", "direction": "normuon"}, "", "full_rank", "normuon"),
        ({"optimizer": "q_galore_adamw8bit", "direction": "orthogonal"}, "--rank 64", "orthogonal", "orthogonal"),
        ({"optimizer": "q_galore_adamw8bit", "direction": "adam"}, "", "paper", "adam"),
    ],
)
def test_weights_that_adam_has_trained_keep_its_direction(
    tmp_path: Path, trained_by: dict[str, str], flags: str, recipe: str, direction: str
) -> None:
    config = (ROOT / "configs/llama_60m.json").read_text(encoding="utf-8")
    (tmp_path / "config.json").write_text(config, encoding="utf-8")
    if trained_by:
        state = trained_by | {"model_config_contents": json.loads(config)}
        (tmp_path / "state.json").write_text(json.dumps(state), encoding="utf-8")
        (tmp_path / "manifest.json").write_text("{}", encoding="utf-8")
    command = f"{Q_GALORE} --init_from {tmp_path} --dataset pydocs --batch_size 4 {flags}"
    args = parse_args(command.split())
    assert (args.optimizer.recipe, args.subspace.direction) == (recipe, direction)
    told = [note for note in args.notes if note.startswith("recipe paper, because of --init_from")]
    assert len(told) == (direction == "adam")
    assert not told or "--recipe full_rank" in told[0]


@pytest.mark.parametrize("scheduler", ["constant", "wsd"])
def test_what_a_longer_run_would_change_is_said_with_the_flags_that_keep_it(scheduler: str) -> None:
    """The recipe follows the length of the run; with the flags of the note a run of any length has the same values."""
    short = parse(f"{Q_GALORE} --scheduler {scheduler} --num_training_steps 5000")
    (note,) = short.notes
    flags = note.removeprefix("recipe full_rank derives ").partition(" from the length")[0]
    assert re.findall(r"--(\w+)", flags) == ["full_rank_lr", "weight_decay", "full_rank_weight_decay"]
    longer = parse(f"{Q_GALORE} --scheduler {scheduler} --num_training_steps 20000 {flags}")
    assert longer.optimizer == short.optimizer and longer.notes == ()
    assert parse(f"{Q_GALORE} --scheduler {scheduler} --num_training_steps 20000").optimizer != short.optimizer
    assert parse(f"{Q_GALORE} --scheduler {scheduler} --recipe paper").notes == ()
    assert parse(f"--optimizer adamw --scheduler {scheduler} --recipe orthogonal").notes == ()


@pytest.mark.parametrize(
    ("updates", "measured"),
    [
        (800, "--lr 1e-2 --full_rank_lr 4e-2 --weight_decay 0.4 --full_rank_weight_decay 0"),
        (3200, "--lr 1e-2 --full_rank_lr 5e-3 --weight_decay 0.25 --full_rank_weight_decay 1.0"),
    ],
)
def test_full_rank_is_what_was_measured(updates: int, measured: str) -> None:
    """The rows of docs/quality.md with 60M, and what lies between and beyond is between and beyond."""
    run = f"{Q_GALORE}_per_layer --total_batch_size 256 --max_length 256 --num_training_steps {updates}"
    args = parse(f"{run} --recipe full_rank")
    flags = f"--rank full --direction normuon --newton_schulz auto --full_rank_second_moment row {measured}"
    other = parse(f"{run} --recipe orthogonal --norm_growth 0 {flags}")
    assert dataclasses.replace(args.optimizer, recipe="orthogonal") == other.optimizer
    assert parse(run).optimizer == args.optimizer, "the default"
    assert args.subspace == other.subspace and args.quantization == other.quantization


def test_the_rule_by_length_has_no_step() -> None:
    rule = qgalore.recipes.FULL_RANK.by_length
    assert rule is not None
    updates = range(1, 20_000)
    for values in (
        [rule.full_rank_multiple(each) for each in updates],
        [rule.decay_of_matrices(each, 65_536) for each in updates],
        [-rule.full_rank_decay(each) for each in updates],
    ):
        assert values == sorted(values, reverse=True)
        assert max(before - after for before, after in pairwise(values)) < 0.008
    assert [rule.full_rank_decay(each) for each in (1, 20_000)] == [0, 2]


def test_official_defaults_are_those_of_the_flags() -> None:
    defaults = dataclasses.asdict(OptimizerArgs()) | dataclasses.asdict(SubspaceArgs())
    assert {name: defaults[name] for name in OFFICIAL} == OFFICIAL | {"recipe": ""}


def test_what_is_given_wins_over_the_recipe() -> None:
    given = "--recipe orthogonal --lr 0.003 --galore_scale 0.25 --rank 64 --direction adam --update_proj_gap 200"
    given += " --norm_growth 0"
    expected = {"lr": 0.003, "full_rank_lr": 0.003 * MULTIPLE, "galore_scale": 0.25, "rank": 64, "direction": "adam"}
    expected |= {"update_proj_gap": 200, "norm_growth": 0.0}
    assert chosen(parse(f"{Q_GALORE} {given}")) == ORTHOGONAL | expected
    assert parse(f"{Q_GALORE} --full_rank_lr 0.001").optimizer.full_rank_lr == 0.001


def test_the_official_command_for_7b_runs_the_papers_algorithm() -> None:
    """That of the official README, with what it leaves out."""
    flags = "--lr 0.004 --galore_scale 0.25 --rank 1024 --update_proj_gap 500 --total_batch_size 512 --weight_decay 0"
    flags += " --activation_checkpointing --num_training_steps 150000 --warmup_steps 15000 --grad_clipping 1.0"
    flags += " --dtype bfloat16 --eval_every 1000 --single_gpu --proj_quant --weight_quant --stochastic_round"
    expected = {"lr": 0.004, "galore_scale": 0.25, "rank": 1024, "update_proj_gap": 500}
    assert chosen(parse(f"--optimizer q_galore_adamw8bit_per_layer {flags}", "7b")) == OFFICIAL | expected


@pytest.mark.parametrize(("model", "rank"), [("9m", 56), ("130m", 336), ("350m", 448), ("1b", 896), ("7b", 1792)])
def test_the_rank_follows_the_width(model: str, rank: int) -> None:
    assert parse(f"{Q_GALORE} --recipe orthogonal", model).subspace.rank == rank


def test_the_rank_fits_the_narrowest_matrix(tmp_path: Path) -> None:
    """Of keys and values that several queries share."""
    config = json.loads((ROOT / "configs/llama_60m.json").read_text()) | {"num_key_value_heads": 2}
    path = tmp_path / "grouped.json"
    path.write_text(json.dumps(config))
    flags = f"{Q_GALORE} --recipe orthogonal --dataset pydocs --batch_size 4"
    args = parse_args(["--model_config", str(path), *flags.split()])
    assert args.subspace.rank == 128


def test_the_help_has_the_values_of_the_recipe() -> None:
    (spec,) = (spec for spec in read_specs(OptimizerArgs) if spec.name == "recipe")
    for name, value in ORTHOGONAL.items():
        if name not in ("recipe", "rank", "full_rank_lr"):
            assert f"--{name} {value}" in spec.help
    assert "--rank 7/16" in spec.help and "--weight_decay" in spec.help


@pytest.mark.parametrize(
    ("flags", "matrices", "rest"),
    [
        ("--num_training_steps 800", 4e-3, 0),
        ("--num_training_steps 800 --recipe orthogonal", 2.5e-3, 5e-3),
        ("--num_training_steps 800 --recipe orthogonal --total_batch_size 1024", 2.5e-3, 5e-3),
        ("--num_training_steps 800 --recipe orthogonal --total_batch_size 64", 6.25e-4, 1.25e-3),
        ("--num_training_steps 3200", 2.5e-3, 5e-3),
        ("--num_training_steps 32000", 2.5e-4, 5e-4),
        ("--num_training_steps 32000 --lr 0.002 --full_rank_lr 0.03", 2.5e-4, 5e-4),
        ("--max_train_tokens 2097152000", 2.5e-4, 5e-4),
        ("--num_training_steps 800 --recipe orthogonal --full_rank_weight_decay 0", 2.5e-3, 0),
        ("--num_training_steps 800 --recipe orthogonal --full_rank_lr 0", 2.5e-3, 0),
        ("--num_training_steps 800 --weight_decay 0", 0, 0),
        ("--num_training_steps 3200 --weight_decay 0.1", 1e-3, 5e-4),
        ("--num_training_steps 3200 --recipe orthogonal --weight_decay 0.1", 1e-3, 1e-3),
        ("--num_training_steps 800 --recipe paper", 0, 0),
        ("--num_training_steps 800 --optimizer adamw --recipe orthogonal", 0, 0),
    ],
)
def test_weights_decay_by_the_length_of_the_run_and_of_an_update(flags: str, matrices: float, rest: float) -> None:
    """What a weight loses in an update at the peak of its learning rate."""
    optimizer = parse(f"--total_batch_size 256 --max_length 256 {Q_GALORE} {flags}").optimizer
    assert optimizer.lr * optimizer.weight_decay == pytest.approx(matrices)
    assert optimizer.peak_full_rank_lr * optimizer.decay_of_full_rank == pytest.approx(rest)


@pytest.mark.parametrize(
    ("flags", "rate"),
    [
        ("--num_training_steps 300", 0.04),
        ("--num_training_steps 800", 0.04),
        ("--num_training_steps 3200", 0.005),
        ("--num_training_steps 80000", 0.001),
        ("--max_train_tokens 209715200", 0.005),
        ("--num_training_steps 3200 --lr 0.004", 0.002),
        ("--num_training_steps 300 --recipe orthogonal", 0.02),
        ("--num_training_steps 800 --recipe orthogonal", 0.02),
        ("--num_training_steps 3200 --recipe orthogonal", 0.01),
        ("--num_training_steps 80000 --recipe orthogonal", 0.002),
        ("--num_training_steps 3200 --recipe orthogonal --lr 0.004", 0.004),
        ("--num_training_steps 3200 --full_rank_lr 0.03", 0.03),
        ("--num_training_steps 800 --weight_decay 0", 0.04),
        ("--num_training_steps 800 --recipe paper --lr 0.01", 0.01),
        ("--num_training_steps 800 --optimizer adamw --recipe orthogonal --lr 0.01", 0.01),
    ],
)
def test_embeddings_head_and_norms_learn_faster_in_short_runs(flags: str, rate: float) -> None:
    optimizer = parse(f"--total_batch_size 256 --max_length 256 {Q_GALORE} {flags}").optimizer
    assert optimizer.peak_full_rank_lr == pytest.approx(rate)


def test_a_recipe_that_does_not_exist() -> None:
    expected = "--recipe is 'papers', it must be one of paper, orthogonal, full_rank (did you mean paper?)"
    with pytest.raises(UserError, match=re.escape(expected)):
        parse(f"{Q_GALORE} --recipe papers")


def test_the_bytes_of_the_paper() -> None:
    """Projections and states of the recipe take no more than those of the paper's rank, a quarter of the width."""
    from peft_pretraining.memory.plan import plan
    from peft_pretraining.models.llama.config import LlamaConfig

    def states(flags: str, model: str) -> int:
        quantized = "--weight_quant --stochastic_round --proj_quant"
        args = parse(f"{Q_GALORE}_per_layer {quantized} {flags}", model)
        lasting = plan(args, LlamaConfig.from_json(args.model.model_config)).lasting
        return sum(size for name, size in lasting.items() if name in ("projections", "optimizer states, decoder"))

    for model, rank in (("60m", 128), ("130m", 192), ("350m", 256), ("1b", 512), ("7b", 1024)):
        assert 0.9 < states("", model) / states(f"--recipe paper --rank {rank}", model) <= 1.0
