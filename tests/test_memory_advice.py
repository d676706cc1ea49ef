"""What a user hears whose device is too small: before the run, and when it has run out of memory."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import run_pretrain
from peft_pretraining.config.parse import parse_args
from peft_pretraining.config.run_config import RunArgs
from peft_pretraining.memory import advice
from peft_pretraining.memory.plan import plan
from peft_pretraining.models.config import ModelConfig
from peft_pretraining.models.llama.config import LlamaConfig
from peft_pretraining.models.registry import read_config
from tests.small_run import SmallRun

CUDA = torch.device("cuda", 0)
Q_GALORE = "--optimizer q_galore_adamw8bit_per_layer --weight_quant --stochastic_round --proj_quant"
RUNS = {  # flags of 7B: GB available, and what is advised
    "checkpointing": (f"{Q_GALORE} --batch_size 16", 16.0, ["--activation_checkpointing"]),
    "sums": (
        f"{Q_GALORE} --rank 1024 --batch_size 16 --total_batch_size 512 --activation_checkpointing",
        15.9,
        ["--grad_accum_dtype int8", "--accumulate_by layer", "--rank 512"],
    ),
    "rank": (
        f"{Q_GALORE} --batch_size 16 --total_batch_size 512 --activation_checkpointing --grad_accum_dtype int8",
        15.9,
        ["--accumulate_by layer", "--batch_size 8 --gradient_accumulation 64", "--rank 1568"],
    ),
    "full rank": (
        "--optimizer q_galore_adamw8bit_per_layer --weight_quant --rank full --batch_size 16 --total_batch_size 512 "
        "--activation_checkpointing --grad_accum_dtype int8",
        17.0,
        ["--accumulate_by layer", "--rank 1536"],
    ),
    "one micro-batch": (
        "--optimizer adamw --batch_size 64",
        130.0,
        ["--activation_checkpointing", "--batch_size 32 --gradient_accumulation 2"],
    ),
    "hopeless": ("--optimizer adamw --batch_size 16", 24.0, []),
}


def arguments(flags: str, root: Path) -> RunArgs:
    config = root / "configs" / "llama_7b.json"
    return parse_args(["--model_config", str(config), "--dataset", "pydocs", "--device", "cuda", *flags.split()])


def peak(args: RunArgs) -> int:
    return peak_of(args, LlamaConfig.from_json(args.model.model_config))


def peak_of(args: RunArgs, config: ModelConfig) -> int:
    return plan(args, config).peak_bytes


@pytest.mark.parametrize("run", RUNS)
def test_each_advice_fits_alone(run: str, root: Path) -> None:
    flags, available, expected = RUNS[run]
    args, limit = arguments(flags, root), int(available * 1e9)
    config = LlamaConfig.from_json(args.model.model_config)
    found = advice.flags_that_fit(args, config, limit)
    assert peak(args) > limit and found == expected
    for text in found:
        changed = arguments(f"{flags} {text}", root)
        assert peak(changed) <= limit and changed.batch.total_batch_size == args.batch.total_batch_size


@pytest.mark.parametrize("refused", ["--shard optimizer --shard_sums owner", "--grad_clipping 1", "--dtype float16"])
def test_what_the_checks_would_refuse_is_not_advised(refused: str, root: Path) -> None:
    flags, config = f"{Q_GALORE} --batch_size 4 --gradient_accumulation 8 --activation_checkpointing", "llama_60m.json"
    for more, advised in (("", True), (refused, False)):
        command = ["--model_config", str(root / "configs" / config), "--dataset", "pydocs", "--device", "cuda"]
        args = parse_args([*command, *f"{flags} {more}".split()], 2)
        fitting = advice.flags_that_fit(args, LlamaConfig.from_json(args.model.model_config), 10**12)
        assert ("--accumulate_by layer" in fitting) == advised


@pytest.mark.parametrize(
    "flags", ["--momentum_rank 1/16", "--sum_in_momentum", "--direction orthogonal --rounding_feedback 0.5"]
)
def test_what_needs_the_full_rank_is_not_advised_a_smaller_one(flags: str, root: Path) -> None:
    command = f"{Q_GALORE} --rank full --batch_size 16 --gradient_accumulation 2".replace("--proj_quant", flags)
    args = arguments(command, root)
    fitting = advice.flags_that_fit(args, LlamaConfig.from_json(args.model.model_config), 10**12)
    assert "--activation_checkpointing" in fitting and not any("--rank" in text for text in fitting)
    for text in fitting:
        arguments(f"{command} {text}", root)


@pytest.mark.parametrize("model", ["9m", "60m", "130m"])
@pytest.mark.parametrize("more", ["", "--int8_products", "--mlp_rank 64", "--rank 64,96", "--recipe full_rank"])
def test_a_smaller_rank_is_planned_with_the_recipe_that_it_brings(model: str, more: str) -> None:
    """Of the default the embeddings have one second moment a row; of the recipe beside a rank one a value."""
    command = ["--model_config", model, "--dataset", "pydocs", "--device", "cuda", "--batch_size", "3", "--optimizer"]
    command += ["q_galore_adamw8bit_per_layer", *more.split()]
    args = parse_args(command)
    config = read_config(model)
    for limit in (peak_of(args, config) - 1, int(0.97 * peak_of(args, config)), int(0.9 * peak_of(args, config))):
        for text in advice.flags_that_fit(args, config, limit):
            assert peak_of(parse_args([*command, *text.split()]), config) <= limit


def test_only_a_run_that_does_not_fit_is_warned_of(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(RUNS["rank"][0], root)
    for free, warned in ((peak(args), False), (peak(args) - 1, True)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 80 << 30))
        warning = advice.warning_of_memory(args, CUDA)
        assert (warning is not None) == warned
    assert warning is not None
    assert (
        f"planned to take {peak(args) / 1e9:.1f} GB of {peak(args) / 1e9:.1f}" in warning and "--rank 1568" in warning
    )
    assert advice.warning_of_memory(args, torch.device("cpu")) is None


def fake_memory(monkeypatch: pytest.MonkeyPatch, free: int, reserved: int) -> None:
    """A device with `free` bytes beside the `reserved` ones that PyTorch holds."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)


def test_out_of_memory_counts_what_this_run_could_have(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(RUNS["rank"][0], root)
    fake_memory(monkeypatch, 10**8, peak(args) - 2 * 10**8)  # the rest of the 80 GiB is another process's
    text = advice.out_of_memory(args, CUDA)
    assert "each of these alone would fit: " in text and "--rank 1568" in text
    fake_memory(monkeypatch, 10**8, peak(args))
    text = advice.out_of_memory(args, CUDA)
    assert "and took more" in text and "would fit" not in text


def test_a_shape_that_only_transformers_reads_has_no_plan(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.json"
    raw = json.loads((root / "configs" / "llama_9m.json").read_text())
    config.write_text(json.dumps(raw | {"mlp_bias": True}))
    flags = f"--model_config {config} --use_hf_model --batch_size 1 --optimizer adamw --dataset pydocs"
    args = parse_args(flags.split())
    fake_memory(monkeypatch, 0, 0)
    assert advice.warning_of_memory(args, CUDA) is None
    assert "planned" not in advice.out_of_memory(args, CUDA)
    assert run_pretrain.main([*flags.split(), "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "--use_hf_model True" in printed and re.search("memory +not planned", printed)


def test_a_run_without_memory_ends_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = SmallRun(tmp_path)

    def update(run: run_pretrain.Run) -> bool:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(run_pretrain.Run, "update", update)
    monkeypatch.setattr(run_pretrain, "warning_of_memory", lambda args, device: "too small")
    fake_memory(monkeypatch, 0, 10**6)
    assert small.main("run") == 2
    printed = capsys.readouterr().err
    assert "warning: too small" in printed
    assert "run_pretrain.py: cpu has no memory left: the run is planned to take 0.0 GB of 0.0" in printed
    assert f"--save_dir {tmp_path / 'run'} --continue_from auto the same command" in printed
    monkeypatch.undo()
    assert small.main("run", continue_from="auto") == 0
