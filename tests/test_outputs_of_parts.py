"""What two ranks have written in parts is exported, evaluated and begun from as what one process has written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from peft_pretraining.commands import evaluate
from peft_pretraining.commands import main as qgalore
from tests.small_run import ROOT, SmallRun, assert_same_bits, flags_of

pytest.importorskip("transformers", reason="exports are configured as transformers' models are")
pytestmark = pytest.mark.usefixtures("restored")

MODES = ("none", "optimizer", "full")
FLAGS = flags_of("q_galore_adamw8bit_per_layer") | {"subspace": "streaming", "total_batch_size": 4, "batch_size": 2}
"""One micro-batch an update, in which all three modes have the same bits."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """With a run of each mode on two ranks: of `none` one process has written all, the others a part each."""
    small = SmallRun(tmp_path_factory.mktemp("parts"), layers=2)
    config = json.loads(small.config.read_text()) | {"vocab_size": 4099}  # tables that are dealt by rows
    small.config.write_text(json.dumps(config))
    for shard in MODES:
        small.run_on(2, shard, **FLAGS, num_training_steps=3, shard=shard)
        written = {path.name for path in small.result(shard).checkpoints[-1].glob("model*.safetensors")}
        assert ("model_00001.safetensors" in written) == (shard != "none")
    return small


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_exports_are_the_same_files(small: SmallRun, dtype: str) -> None:
    found = []
    for shard in MODES:
        output = small.folder / f"{shard}_{dtype}"
        command = ["export", str(small.folder / shard), str(output), "--dtype", dtype, "--no-tokenizer"]
        assert qgalore(command) == 0
        found.append(files_of(output))
    assert found[0].keys() == {"config.json", "model.safetensors"}
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("shard", ["optimizer", "full"])
def test_the_script_exports_one_checkpoint(small: SmallRun, shard: str) -> None:
    """Not of a run's folder, and in a process that knows nothing of ranks."""
    outputs = []
    for name in ("none", shard):
        checkpoint, output = small.result(name).checkpoints[-1], small.folder / f"script_{name}_of_{shard}"
        command = [sys.executable, str(ROOT / "scripts" / "export_hf.py"), str(checkpoint), str(output)]
        done = subprocess.run([*command, "--no-tokenizer"], capture_output=True, text=True, cwd=small.folder)
        assert done.returncode == 0, done.stderr
        outputs.append(files_of(output))
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("shard", ["optimizer", "full"])
def test_a_run_begins_with_them(small: SmallRun, shard: str) -> None:
    """Codes go in unchanged, floats for a model without codes, and training goes on from there alike."""
    for kind, flags in {"codes": FLAGS, "floats": flags_of("adamw")}.items():
        runs = [
            small.run(
                f"from_{name}_{kind}_{shard}",
                **flags,
                num_training_steps=2,
                init_from=small.folder / name,
                save_every=2,
            )
            for name in ("none", shard)
        ]
        for step in (0, 2):
            one, other = (run.checkpoint(step) for run in runs)
            assert_same_bits(one.model_tensors, other.model_tensors)
            assert_same_bits(one.optimizer_state, other.optimizer_state)
        assert runs[0].losses == runs[1].losses
    source = small.result(shard).checkpoint().model_tensors
    assert_same_bits(small.result(f"from_{shard}_codes_{shard}").checkpoint(0).model_tensors, source)


def evaluated(run: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert evaluate.main([str(run), "--device", "cpu", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return {key: found[key] for key in ("loss", "perplexity", "perplexity_official", "tokens")}


def test_evaluations_are_equal(small: SmallRun, capsys: pytest.CaptureFixture[str]) -> None:
    """Those by one process; that of the two ranks themselves sums the loss in another order."""
    found = [evaluated(small.folder / shard, capsys) for shard in MODES]
    assert found[0] == found[1] == found[2]
    own = small.result("full").lines[-1]
    assert found[2]["loss"] == pytest.approx(own["eval/loss"], rel=1e-6) and found[2]["tokens"] == own["eval/tokens"]


@pytest.mark.parametrize("name", ["model_00001.safetensors", "manifest.json"])
def test_a_missing_part_is_named_by_every_command(
    small: SmallRun, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    broken = small.folder / f"without_{name}"
    small.copy("full", broken.name)
    for checkpoint in small.result(broken.name).checkpoints:
        (checkpoint / name).unlink()
    capsys.readouterr()
    assert qgalore(["export", str(broken), str(small.folder / f"out_{name}"), "--no-tokenizer"]) == 2
    assert name in (told := capsys.readouterr().err) and "Traceback" not in told
    assert not (small.folder / f"out_{name}").exists()
    assert evaluate.main([str(broken), "--device", "cpu", "--json"]) == 2
    assert name in capsys.readouterr().err
    assert small.main("begun", **FLAGS, init_from=broken, num_training_steps=1) == 2
    assert name in capsys.readouterr().err
