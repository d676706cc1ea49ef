"""What a user hears whose device is too small: before the run, and when it has run out of memory."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import run_pretrain
from peft_pretraining import memory_advice
from peft_pretraining.args import RunArgs, parse_args
from peft_pretraining.dry_run import plan
from peft_pretraining.model_config import LlamaConfig
from tests.small_run import SmallRun

CUDA = torch.device("cuda", 0)
Q_GALORE = "--optimizer q_galore_adamw8bit_per_layer --weight_quant --stochastic_round --proj_quant"
RUNS = {  # flags of 7B: GB available, and what is advised
    "checkpointing": (f"{Q_GALORE} --batch_size 16", 16.0, ["--activation_checkpointing"]),
    "sums": (
        f"{Q_GALORE} --rank 1024 --batch_size 16 --total_batch_size 512 --activation_checkpointing",
        15.9,
        ["--grad_accum_dtype int8", "--rank 512"],
    ),
    "rank": (
        f"{Q_GALORE} --batch_size 16 --total_batch_size 512 --activation_checkpointing --grad_accum_dtype int8",
        15.9,
        ["--batch_size 8", "--rank 1568"],
    ),
    "hopeless": ("--optimizer adamw --batch_size 16", 24.0, []),
}


def arguments(flags: str, root: Path) -> RunArgs:
    config = root / "configs" / "llama_7b.json"
    return parse_args(["--model_config", str(config), "--dataset", "pydocs", "--device", "cuda", *flags.split()])


def peak(args: RunArgs) -> int:
    return plan(args, LlamaConfig.from_json(args.model.model_config)).peak_bytes


@pytest.mark.parametrize("run", RUNS)
def test_each_advice_fits_alone(run: str, root: Path) -> None:
    flags, available, expected = RUNS[run]
    args, limit = arguments(flags, root), int(available * 1e9)
    advice = memory_advice.flags_that_fit(args, limit)
    assert peak(args) > limit and advice == expected
    for text in advice:
        # The total batch stays what it was.
        total = f"--total_batch_size {args.batch.total_batch_size}"
        assert peak(arguments(f"{flags} {total} {text}", root)) <= limit


def test_only_a_run_that_does_not_fit_is_warned_of(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(RUNS["rank"][0], root)
    for free, warned in ((peak(args), False), (peak(args) - 1, True)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 80 << 30))
        warning = memory_advice.warning_of_memory(args, CUDA)
        assert (warning is not None) == warned
    assert warning is not None
    assert (
        f"planned to take {peak(args) / 1e9:.1f} GB of {peak(args) / 1e9:.1f}" in warning and "--rank 1568" in warning
    )
    assert memory_advice.warning_of_memory(args, torch.device("cpu")) is None


def test_a_run_without_memory_ends_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = SmallRun(tmp_path)

    def update(run: run_pretrain.Run) -> bool:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(run_pretrain.Run, "update", update)
    monkeypatch.setattr(run_pretrain, "warning_of_memory", lambda args, device: "too small")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=10**6))
    assert small.main("run") == 2
    printed = capsys.readouterr().err
    assert "warning: too small" in printed
    assert "run_pretrain.py: cpu has no memory left: the run is planned to take 0.0 GB of 0.0" in printed
    assert "--continue_from auto goes on from the newest" in printed
    monkeypatch.undo()
    assert small.main("run", continue_from="auto") == 0
