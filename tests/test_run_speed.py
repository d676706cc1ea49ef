"""Counted speeds beside measured ones, the cards' figures, and the table of measured speeds beside the rows."""

from __future__ import annotations

import csv
import shlex
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from peft_pretraining.config.parse import parse_args
from peft_pretraining.config.run_config import RunArgs
from peft_pretraining.errors import UserError
from peft_pretraining.memory.candidate import Candidate
from peft_pretraining.memory.choice import WORTH_ROUNDING
from peft_pretraining.models.registry import read_config
from peft_pretraining.speed.cards import CARDS, Card, card_of_size, find_card
from peft_pretraining.speed.measured_speeds import MEASURED_SPEEDS, SOURCE, MeasuredSpeed
from peft_pretraining.speed.passes import Pass, product_in_fp8, seconds
from peft_pretraining.speed.run_speed import (
    MOST_OF_PUBLISHED,
    SHARE_OF_FLOOR,
    counted_seconds,
    counted_tokens_per_second,
    setting_of,
)
from peft_pretraining.speed.update_passes import adamw, all_passes, q_galore
from qgalore.config import FLOAT_PRODUCTS, FP8_PRODUCTS

ROOT = Path(__file__).resolve().parent.parent
NAMES = {card.device: name for name, card in CARDS.items() if card.device}
QUANTIZED = "--optimizer q_galore_adamw8bit_per_layer --weight_quant --stochastic_round --proj_quant"
PAPER = f"{QUANTIZED} --recipe paper --subspace streaming --rank 512"


def run(model: str, flags: str) -> RunArgs:
    config = str(ROOT / "configs" / f"llama_{model}.json")
    return parse_args(["--model_config", config, "--dataset", "pydocs", "--device", "cuda", *shlex.split(flags)])


@cache
def rows(products: int = FLOAT_PRODUCTS) -> dict[MeasuredSpeed, RunArgs]:
    """The newest row of each setting with such products that ran alone on a card of the table, with its arguments."""
    kept: dict[tuple[str, ...], dict[str, str]] = {}
    with (ROOT / SOURCE).open(newline="") as file:
        for row in csv.DictReader(file):
            ours = row["method"].startswith("q_galore") and row["flags"].startswith("--device cuda")
            if ours and row["in_a_row_tokens_per_second"] and not row["error"] and "peaks alone" not in row["note"]:
                command = (row["device"], row["model"], row["flags"])
                kept.pop(command, None)  # a newer row of the same command comes later
                kept[command] = row
    newest = {}
    for row in kept.values():
        args = run(row["model"], row["flags"])
        others = args.batch.max_length != 256 or bool(args.model.recompute)
        if args.quantization.weight_format.products != products or others:
            continue  # the table has no column for these
        if args.subspace.direction != "adam":
            continue  # it is of the paper's algorithm
        every = args.model.checkpoint_every if args.model.activation_checkpointing else 0
        batch, int8 = args.batch, args.model.int8_activations
        setting = (NAMES[row["device"]], row["model"], batch.batch_size, batch.gradient_accumulation)
        setting += (args.subspace.rank, every, int8)
        speed, peak = int(row["in_a_row_tokens_per_second"]), float(row["run_peak_gb"])
        newest[setting] = MeasuredSpeed(*setting, speed, peak, row["commit"]), args
    return dict(newest.values())


def test_the_table_of_measured_speeds_is_the_newest_rows() -> None:
    assert set(MEASURED_SPEEDS) == rows().keys() and len(MEASURED_SPEEDS) == len(rows())
    for args in rows().values():  # as its docstring says
        assert (args.subspace.subspace, args.subspace.update_proj_gap) == ("streaming", 200)
        assert args.batch.max_length == 256 and args.optimizer.per_layer


@pytest.mark.parametrize(("card", "least", "most"), [("h100", 0.95, 1.05), ("h200", 1.035, 1.19)])
def test_counted_speeds_are_near_the_measured_ones(card: str, least: float, most: float) -> None:
    found = [each for each in rows() if each.card == card and each.batch_size > 2]
    assert len(found) > 15
    for each in found:
        config = read_config(ROOT / "configs" / f"llama_{each.model}.json")
        ratio = counted_tokens_per_second(rows()[each], config, CARDS[card]) / each.tokens_per_second
        assert least < ratio < most, each


def share_of_published(args: RunArgs, card: Card, tokens_per_second: float) -> float:
    """Of a card's bfloat16 rate what all products of a run take."""
    config = read_config(args.model.model_config)
    setting = replace(setting_of(args, config), has_fp8=card.fp8)
    update = q_galore(setting) if args.optimizer.is_low_rank else adamw(setting, in_chunks=True)
    operations = sum(each.operations for each in all_passes(update))
    return operations * tokens_per_second / args.tokens_per_update / (card.tflops * 1e12)


def test_no_card_is_promised_more_of_its_arithmetic_than_a_row_has_reached() -> None:
    """Nor less than the best row: the bound is that of 13B on an H200."""
    found: list[tuple[float, str]] = []
    with (ROOT / SOURCE).open(newline="") as file:
        for row in csv.DictReader(file):
            if row["in_a_row_tokens_per_second"] and row["flags"].startswith("--device cuda") and not row["error"]:
                args, speed = run(row["model"], row["flags"]), float(row["in_a_row_tokens_per_second"])
                found.append((share_of_published(args, CARDS[NAMES[row["device"]]], speed), row["commit"]))
    share, commit = max(found)
    assert commit == "3695cd6" and share == pytest.approx(MOST_OF_PUBLISHED, abs=0.005)
    bound = []
    for name, card in CARDS.items():
        for model, rank in (("60m", 128), ("350m", 256), ("1b", 512), ("7b", 1024), ("13b", 1280)):
            recipe = f"{QUANTIZED} --recipe paper --subspace streaming --rank {rank}"
            for kind in (recipe, f"{recipe} --fp8_products", f"{QUANTIZED} --recipe full_rank", "--optimizer adamw"):
                for checkpointing in ("", "--activation_checkpointing"):
                    args = run(model, f"{kind.replace('--proj_quant', '')} --batch_size 16 {checkpointing}")
                    counted = counted_tokens_per_second(args, read_config(args.model.model_config), card)
                    share = share_of_published(args, card, counted)
                    assert share <= MOST_OF_PUBLISHED * (1 + 1e-9), (name, model, kind)
                    bound += [name] * (share > MOST_OF_PUBLISHED * (1 - 1e-9))
    assert {"3090", "4090", "5090", "a100"} <= set(bound)


def test_counted_gains_of_fp8_are_near_the_measured_ones() -> None:
    """At 60M, where sums of 512 values gain little and rounding takes what they do, and at 7B."""
    counted, found = {}, rows(FP8_PRODUCTS)
    for each, args in found.items():
        config = read_config(args.model.model_config)
        plain = replace(args, quantization=replace(args.quantization, fp8_products=False))
        speeds = [counted_tokens_per_second(some, config, CARDS[each.card]) for some in (args, plain)]
        assert 1.05 < speeds[0] / each.tokens_per_second < 1.2, "as without FP8 on that card"
        for without in (other.tokens_per_second for other in rows() if other[:7] == each[:7]):
            counted[each.model] = speeds[0] / speeds[1]
            assert counted[each.model] == pytest.approx(each.tokens_per_second / without, rel=0.05)
    assert counted.keys() == {"60m", "7b"} and counted["60m"] < WORTH_ROUNDING < counted["7b"]


def test_counted_products_in_fp8_are_near_the_measured_ones() -> None:
    """But those with a ragged side, which these rows have without the padding of training (the log)."""
    ratios = []
    with (ROOT / "benchmarks/results/fp8_products.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            tokens, inputs, outputs = int(row["tokens"]), int(row["inputs"]), list(map(int, row["outputs"].split("+")))
            ragged = any(width % 16 for width in (inputs, *outputs))
            if row["device"] not in NAMES or row["op"] not in ("forward", "input gradient") or ragged:
                continue
            forward = [product_in_fp8(tokens, inputs, width) for width in outputs]
            passes = forward if row["op"] == "forward" else [product_in_fp8(tokens, sum(outputs), inputs)]
            measured = (float(row["fp8_ms"]) - float(row["factors_ms"])) / 1e3
            ratios.append(seconds(passes, CARDS[NAMES[row["device"]]].ceilings) / measured)
    assert len(ratios) > 20 and min(ratios) > 0.8 and max(ratios) < 1.1


def test_measured_peaks_are_within_a_budget_that_holds_the_plan() -> None:
    found = [each for each in rows() if each.card == "h100"]
    for each in found:
        args = rows()[each]
        candidate = Candidate((), args, read_config(args.model.model_config), {})
        assert candidate.peak * 0.99 < each.peak_gb * 1e9 < min(candidate.needs, candidate.peak * 1.03), each
    assert {each.checkpoint_every for each in found} == {0, 1, 12}


FLAGS = {
    "all": "--activation_checkpointing",
    "some": "--activation_checkpointing --checkpoint_every 5",
    "the first": "--activation_checkpointing --checkpoint_layers 7",
    "rounded": "--int8_activations",
    "both": "--int8_activations --activation_checkpointing --checkpoint_every 7",
    "micro-batches": "--gradient_accumulation 4 --activation_checkpointing --checkpoint_every 5 --int8_activations",
}


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize(
    "method",
    [PAPER, f"{PAPER} --fp8_products", f"{PAPER} --int8_products", "--optimizer adamw"],
    ids=["q-galore", "fp8", "int8", "adamw"],
)
def test_a_count_in_parts_is_that_of_all_passes(method: str, flags: str) -> None:
    args, card = run("1b", f"--batch_size 4 {method} {flags}"), CARDS["4090"]
    config = read_config(args.model.model_config)
    setting = setting_of(args, config)
    whole = q_galore(setting) if args.optimizer.is_low_rank else adamw(setting, in_chunks=True)
    expected = seconds(all_passes(whole), card.ceilings) / SHARE_OF_FLOOR
    operations = sum(each.operations for each in all_passes(whole))
    expected = max(expected, operations / (MOST_OF_PUBLISHED * card.tflops * 1e12))
    assert counted_seconds(args, config, card) == pytest.approx(expected, rel=1e-9)
    plain = run("1b", f"--batch_size 4 {method} " + "--gradient_accumulation 4" * ("accumulation" in flags))
    assert counted_seconds(plain, config, card) < expected


def test_ranks_by_depth_are_counted_by_their_mean() -> None:
    mixed, mean = (run("1b", f"--batch_size 4 {PAPER} --rank {rank}") for rank in ("256,768", "512"))
    assert setting_of(mixed, read_config(mixed.model.model_config)) == setting_of(
        mean, read_config(mean.model.model_config)
    )


def test_a_card_without_fp8_has_newton_schulz_without_it() -> None:
    """By `auto`, the default's, and for matrices that gain by it; 60M has none."""
    assert [name for name, card in CARDS.items() if not card.fp8] == ["3060", "3090", "a10", "a100"]
    for model, gains in (("60m", False), ("1b", True)):
        flags = "--optimizer q_galore_adamw8bit_per_layer --batch_size 8"
        runs = [run(model, f"{flags} {steps}") for steps in ("", "--newton_schulz muon", "--newton_schulz muon4_fp8")]
        for card in (CARDS["3090"], CARDS["4090"]):
            auto, plain, fp8 = (counted_seconds(args, read_config(args.model.model_config), card) for args in runs)
            assert auto == (fp8 if gains and card.fp8 else plain) and (fp8 < plain or not gains), (model, card.name)
        five = run(model, f"{flags} --newton_schulz muon_fp8")
        assert counted_seconds(five, read_config(five.model.model_config), card) > fp8, "a step more"


SLOWER = {
    "a smaller micro-batch": ("--batch_size 8", "--batch_size 4 --gradient_accumulation 2"),
    "float32 sums": (
        "--batch_size 4 --total_batch_size 16 --grad_accum_dtype int8",
        "--batch_size 4 --total_batch_size 16",
    ),
    "products in bfloat16": ("--batch_size 8 --fp8_products", "--batch_size 8"),
    "a larger rank": ("--batch_size 8 --rank 256", "--batch_size 8"),
    "an orthogonal direction": ("--batch_size 8", "--batch_size 8 --direction orthogonal"),
    "the whole space": ("--batch_size 8 --direction orthogonal", "--batch_size 8 --direction orthogonal --rank full"),
}


@pytest.mark.parametrize(("faster", "slower"), SLOWER.values(), ids=SLOWER)
def test_what_does_more_takes_longer(faster: str, slower: str) -> None:
    method = f"{QUANTIZED.replace(' --proj_quant', '')} --recipe paper --subspace streaming --rank 512"
    if "full" in slower:
        slower_method = method.replace(" --subspace streaming", "")
    else:
        slower_method = method
    args = [run("1b", f"{method} {faster}"), run("1b", f"{slower_method} {slower}")]
    config = read_config(args[0].model.model_config)
    first, second = (counted_tokens_per_second(each, config, CARDS["h100"]) for each in args)
    assert second < first


@pytest.mark.parametrize(("name", "tflops"), [("4090", 165.2), ("4080", 97.5), ("3090", 71.2), ("5090", 209.5)])
def test_what_is_worked_out_for_geforce_cards_is_what_the_white_papers_say(name: str, tflops: float) -> None:
    assert CARDS[name].tflops == tflops


def test_a_card_reaches_the_share_that_an_h100_does() -> None:
    rate, bandwidth, _ = CARDS["h100"].ceilings
    assert (rate, bandwidth) == pytest.approx((790e12, 3.0e12))
    assert CARDS["4090"].ceilings[0] == pytest.approx(165.2e12 * 790 / 989)
    slow, fast = (seconds([Pass(1e15, 1e12)], CARDS[name].ceilings) for name in ("4060ti", "4090"))
    assert slow > 3 * fast


@pytest.mark.parametrize("text", ["4090", "RTX 4090", "NVIDIA GeForce RTX-4090", "rtx_4090"])
def test_a_card_is_found_by_any_of_its_names(text: str) -> None:
    assert find_card(text) is CARDS["4090"]


def test_other_names_are_refused_with_those_that_there_are() -> None:
    with pytest.raises(
        UserError, match=r"--gpu 409 is not in the table of cards: did you mean 4090\? there are 3060, 3090"
    ):
        find_card("409")


def test_the_card_that_stands_for_a_size_has_no_more_memory() -> None:
    for gigabytes in (8, 11, 12, 16, 24, 32, 48, 80, 141):
        assert card_of_size(gigabytes * 10**9).gigabytes <= gigabytes
    assert card_of_size(4 * 10**9).gigabytes == 8  # there is no smaller one
