"""The warning of a direction that takes much of each update, with speeds counted for a card."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from peft_pretraining.config.parse import parse_args
from peft_pretraining.models.registry import read_config
from peft_pretraining.speed.cards import CARDS
from peft_pretraining.speed.direction_price import warning_of_direction
from peft_pretraining.speed.run_speed import counted_tokens_per_second
from tests.small_run import SmallRun, flags_of

OURS = "--optimizer q_galore_adamw8bit_per_layer --batch_size 16"


def warned(model: str, flags: str) -> str:
    args = parse_args(["--model_config", model, "--dataset", "pydocs", "--device", "cuda", *flags.split()])
    return warning_of_direction(args, read_config(args.model.model_config), CARDS["h100"]) or ""


def test_a_large_model_that_is_updated_every_micro_batch_is_told_both_speeds() -> None:
    text = warned("7b", f"{OURS} --recipe orthogonal --activation_checkpointing")
    assert text.startswith("an update every micro-batch of 4,096 tokens orthogonalises all momenta: ")
    now, then = (int(found.replace(",", "")) for found in re.findall(r"([\d,]+) (?:tokens/s|with 32)", text))
    assert 6_000 < now < 0.8 * then < 10_000 and "--grad_accum_dtype int8, or --recipe paper" in text
    # Following the advice ends the warning, and gives the speed that it told.
    given = f"{OURS} --recipe orthogonal --activation_checkpointing --total_batch_size 512 --grad_accum_dtype int8"
    assert not warned("7b", given) and not warned("7b", f"{OURS} --recipe paper")
    args = parse_args(["--model_config", "7b", "--dataset", "pydocs", *given.split()])
    assert round(counted_tokens_per_second(args, read_config("7b"), CARDS["h100"])) == then


def test_at_full_rank_sums_may_be_in_the_momentum() -> None:
    assert "with --sum_in_momentum, which" in warned("7b", f"{OURS} --rank full")
    assert "every 2 micro-batches" in warned("7b", f"{OURS} --rank full --gradient_accumulation 2")


@pytest.mark.parametrize(
    ("flags", "advised"),
    [
        ("--rank full", ["--sum_in_momentum", "--recipe paper"]),
        ("--rank full --direction normuon", ["--sum_in_momentum", "--direction adam"]),
        ("--rank full,1024", ["--grad_accum_dtype int8", "--recipe paper"]),
        ("--rank full --mlp_rank 1024", ["--grad_accum_dtype int8", "--recipe paper"]),
        ("--momentum_rank 1/16", ["--grad_accum_dtype int8"]),
        ("--rounding_feedback 0.5 --direction orthogonal", ["--grad_accum_dtype int8"]),
        ("--dtype float16 --loss_scale 1024", ["--grad_accum_dtype int8", "--recipe paper"]),
        ("--norm_growth 1.01", ["--grad_accum_dtype int8", "--recipe paper"]),
        ("--newton_schulz muon4_fp8", ["--sum_in_momentum"]),
    ],
)
def test_what_is_advised_may_be_added(flags: str, advised: list[str]) -> None:
    text = warned("7b", f"{OURS} {flags}")
    found = re.findall("--(?:sum_in_momentum|grad_accum_dtype int8|recipe paper|direction adam)", text)
    assert found == advised
    for advice in found:
        more = "" if advice in ("--recipe paper", "--direction adam") else " --total_batch_size 512"
        assert not warned("7b", f"{OURS} {flags} {advice}{more}")


def test_sums_of_one_layer_need_no_advice() -> None:
    text = warned("7b", f"{OURS} --gradient_accumulation 2 --accumulate_by layer")
    assert "a larger --total_batch_size, or --recipe paper" in text


@pytest.mark.parametrize(
    "flags", ["--batch_size 256", "--batch_size 256 --rank full", "--batch_size 256 --recipe paper"]
)
def test_small_models_are_not_warned(flags: str) -> None:
    assert not warned("60m", f"--optimizer q_galore_adamw8bit_per_layer {flags}")


def test_others_have_no_such_direction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not warned("7b", "--optimizer adamw --batch_size 1")
    small = SmallRun(tmp_path)
    flags = flags_of("q_galore_adamw8bit_per_layer") | {"device": "auto"}
    assert small.main("run", dry_run=True, **flags) == 0
    printed = capsys.readouterr().out
    assert "orthogonalises" not in printed and re.search(r"speed: [\d,]+ tokens/s counted for H[12]00", printed)
