"""`--dry_run`: what a command would do and take, without doing or taking any of it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from peft_pretraining.config.parse import parse_args
from peft_pretraining.memory.planned_run import PlannedRun
from peft_pretraining.models.build import build_on_meta, parameter_count
from peft_pretraining.models.llama.config import LlamaConfig
from peft_pretraining.models.registry import read_config
from tests.small_run import INT8_PRODUCTS, SmallRun, flags_of


@pytest.fixture
def small(tmp_path: Path) -> SmallRun:
    return SmallRun(tmp_path)


def dry_run(small: SmallRun, capsys: pytest.CaptureFixture[str], **flags: object) -> str:
    capsys.readouterr()
    assert small.main("run", dry_run=True, **flags) == 0
    return capsys.readouterr().out


def test_prints_every_flag_with_its_resolved_value(small: SmallRun, capsys: pytest.CaptureFixture[str]) -> None:
    flags = flags_of("q_galore_adamw8bit_per_layer") | {"batch_size": 2, "max_train_tokens": "1.1K"}
    text = dry_run(small, capsys, **flags)
    args = parse_args(small.argv("run", flags))
    pairs = (line.strip().partition(" ") for line in text.splitlines() if line.startswith("  --"))
    shown = {name.removeprefix("--"): value for name, _, value in pairs}
    # What a flag leaves to others is shown as they take it.
    others = {"full_rank_lr": args.optimizer.lr, "full_rank_weight_decay": 0.0, "beta1": 0.9, "rotate_moments": False}
    others = {name: str(value) for name, value in others.items()} | {"wandb_mode": "off", "dry_run": "True"}
    assert shown == {name: str(value) for name, value in args.to_dict().items()} | others
    # Worked out, not given: 4 micro-batches of 2; 5 updates of 256 tokens reach 1100; the cap of the interval.
    assert shown["gradient_accumulation"] == "4" and shown["num_training_steps"] == "5"
    assert shown["max_update_proj_gap"] == "24"
    assert "updates     5 of 256 tokens (8 sequences of 32 in 4 micro-batches), 1,280 in all" in text
    assert "schedule    starts at its peak, falls (cosine) to 0.1 of it at update 5\n" in text
    assert "warning: --max_train_tokens replaces --num_training_steps" in text


def test_size_and_memory(small: SmallRun, capsys: pytest.CaptureFixture[str], root: Path) -> None:
    config = root / "configs" / "llama_60m.json"
    text = dry_run(small, capsys, model_config=config, max_length=256)
    count = parameter_count(build_on_meta(config))
    assert f"model       llama_60m, {count / 1e6:.1f} M parameters, 8 layers, width 512" in text
    # Float32 weights and two float32 moments.
    gigabytes = {
        line.rsplit(None, 2)[0].strip(): float(line.split()[-2]) for line in text.splitlines() if line.endswith(" GB")
    }
    assert gigabytes["weights and optimizer states"] == pytest.approx(12 * count / 1e9, abs=0.002)
    assert gigabytes["peak"] > gigabytes["weights and optimizer states"]


def test_q_galore_takes_less_than_adam(small: SmallRun, capsys: pytest.CaptureFixture[str], root: Path) -> None:
    def peak(**flags: object) -> float:
        config = root / "configs" / "llama_1b.json"
        flags = {"model_config": config, "dtype": "bfloat16", "batch_size": 1, "total_batch_size": 1} | flags
        (line,) = [line for line in dry_run(small, capsys, **flags).splitlines() if line.strip().startswith("peak")]
        return float(line.split()[-2])

    q_galore = flags_of("q_galore_adamw8bit_per_layer") | {"rank": 512}
    assert peak(**q_galore) < 0.5 * peak(optimizer="adam8bit") < peak(optimizer="adam8bit") < peak(optimizer="adamw")


@pytest.mark.parametrize(
    ("flags", "compiled", "graphs"),
    [
        ({"device": "cuda"}, True, True),
        ({"device": "auto"}, True, True),
        ({"device": "cpu"}, False, False),
        ({"device": "cpu", "compile": "on"}, True, False),
        ({"device": "cuda", "compile": "off"}, False, False),
        ({"device": "cuda", "use_hf_model": True}, False, False),
        ({"device": "cuda", "cuda_graphs": "off"}, True, False),
        ({"device": "cuda", "simulation": True}, True, False),
        ({"device": "cuda"} | INT8_PRODUCTS, True, True),
        ({"device": "cuda", "batch_size": 2}, True, True),  # two micro-batches
        ({"device": "cuda", "batch_size": 2, "grad_accum_dtype": "int8"}, True, True),
        ({"device": "cuda", "grad_accum_dtype": "int8"}, True, False),
        ({"device": "cuda", "optimizer": "q_galore_adamw8bit"}, True, True),
        ({"device": "cuda", "weight_group_size": 20}, True, False),
        ({"device": "cuda", "residual": "fira"}, True, True),
        ({"device": "cuda", "residual": "fira", "batch_size": 2}, True, False),
    ],
)
def test_how_the_layers_run(small: SmallRun, flags: dict[str, object], compiled: bool, graphs: bool) -> None:
    given = flags_of("q_galore_adamw8bit_per_layer") | {"batch_size": 4, "total_batch_size": 4} | flags
    run = PlannedRun(parse_args(small.argv("run", given)), read_config(small.config))
    assert (run.cuda, run.compiled, run.graphs) == (flags["device"] != "cpu", compiled, graphs)


def test_writes_nothing_and_needs_no_data(
    small: SmallRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    before = sorted(tmp_path.rglob("*"))
    assert "data        c4\ntokenizer   t5-base\n" in dry_run(small, capsys, dataset="c4", save_dir=None)
    assert f"folder      {tmp_path / 'new'}" in dry_run(small, capsys, save_dir=tmp_path / "new" / "folder")
    assert sorted(tmp_path.rglob("*")) == before


def test_13b_is_planned_in_an_instant(small: SmallRun, capsys: pytest.CaptureFixture[str], root: Path) -> None:
    config = root / "configs" / "llama_13b.json"
    dry_run(small, capsys)  # what is imported once
    begin = time.process_time()
    text = dry_run(small, capsys, model_config=config, dtype="bfloat16", **flags_of("q_galore_adamw8bit_per_layer"))
    assert time.process_time() - begin < 2.0
    assert f"{LlamaConfig.from_json(config).parameter_count() / 1e6:,.1f} M parameters" in text


def test_refuses_what_the_run_would_refuse(small: SmallRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert small.main("run", dry_run=True, total_batch_size=7) == 2
    assert "--total_batch_size 7" in capsys.readouterr().err


def test_joins_no_process_group_and_is_printed_once(
    small: SmallRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    texts = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        texts.append(dry_run(small, capsys, batch_size=4))
    assert not torch.distributed.is_initialized()
    assert "device      2 x cpu" in texts[0]
    assert texts[1] == ""


def test_needs_no_cuda_for_a_cuda_run(small: SmallRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--device cuda" in dry_run(small, capsys, device="cuda")


def test_a_resume_that_the_checkpoint_would_refuse_says_so(small: SmallRun, capsys: pytest.CaptureFixture[str]) -> None:
    """With what the run itself says, and before a checkpoint is read whole."""
    flags = {**flags_of("q_galore_adamw8bit"), "num_training_steps": 4}
    stopped = small.run("run", **flags)
    (folder, newest), refused = (stopped.save_dir, stopped.checkpoints[-1]), "warning: this run would be refused: "
    for source in ("auto", newest):
        assert refused not in dry_run(small, capsys, **flags, continue_from=source)
        text = dry_run(small, capsys, **{**flags, "rank": 16}, continue_from=source)
        assert text.startswith(f"{refused}--continue_from {newest} is of another run: rank is 16 here and ")
    shorter = dry_run(small, capsys, **{**flags, "num_training_steps": 2, "warmup_steps": 1}, continue_from="auto")
    assert shorter.startswith(f"{refused}--num_training_steps 2: {newest} is after 4 updates already")
    assert dry_run(small, capsys, **flags).startswith(f"{refused}--save_dir {folder} holds the checkpoints of another")
