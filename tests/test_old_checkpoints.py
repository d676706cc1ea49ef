"""Checkpoints that this project wrote once go on: tests/golden/checkpoint_v1 is from before codes had their own name.

It has two runs of three updates each, on the CPU in float32, with the flags below.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from peft_pretraining.checkpoint.store import load_checkpoint, save_checkpoint, with_todays_names
from tests.small_run import CONFIG, SmallRun, assert_same_run, flags_of, token_stream
from tests.test_export_hf import script as script

GOLDEN = Path(__file__).parent / "golden" / "checkpoint_v1"
SIZES = {"vocab_size": 32, "hidden_size": 24, "intermediate_size": 40, "max_position_embeddings": 32}
# As the code of then went on to the sixth update.
LOSSES = {"int8": [3.2421057, 3.1770124, 3.1318774], "int4": [3.2404375, 3.1772850, 3.1312213]}
FLAGS = flags_of("q_galore_adamw8bit_per_layer") | {
    "weight_group_size": 16, "rank": 8, "update_proj_gap": 2, "proj_group_size": 16, "max_length": 16,
    "num_training_steps": 6,
}  # fmt: skip
every_run = pytest.mark.parametrize("run", LOSSES)


def small_run(folder: Path) -> SmallRun:
    small = SmallRun(folder)
    small.config.write_text(json.dumps(CONFIG | SIZES))
    for name, seed, count in (("train", 1, 4000), ("validation", 2, 400)):
        tokens = (token_stream(count, seed) % SIZES["vocab_size"]).astype(np.uint16)
        (small.data / f"{name}.uint16").write_bytes(tokens.tobytes())
    return small


def flags_of_run(run: str) -> dict[str, object]:
    return FLAGS | {"weight_bits": int(run.removeprefix("int"))}


@every_run
def test_a_run_goes_on(tmp_path: Path, run: str) -> None:
    small = small_run(tmp_path)
    shutil.copytree(GOLDEN / run, small.folder / "run")
    resumed = small.run("run", **flags_of_run(run), continue_from="auto")
    assert resumed.losses == pytest.approx(LOSSES[run], abs=2e-3)  # other processors sum in another order
    name = "model.layers.0.mlp.down_proj.weight"
    assert f"{name}_qdata" in resumed.checkpoint().model_tensors and name not in resumed.checkpoint().model_tensors
    # The same under today's names.
    old = load_checkpoint(GOLDEN / run / "step_00000003")
    assert name in old.model_tensors
    save_checkpoint(small.folder / "renamed", 3, with_todays_names(old.model_tensors), old.optimizer_state, old.state)
    renamed = small.run("renamed", **flags_of_run(run), continue_from="auto")
    assert renamed.losses == resumed.losses
    for key, tensor in resumed.checkpoint().model_tensors.items():
        assert torch.equal(tensor, renamed.checkpoint().model_tensors[key]), key


@every_run
def test_names_of_before_are_an_uninterrupted_run(tmp_path: Path, run: str) -> None:
    """A checkpoint of today, written as it was then, ends with the bits of a run that never stopped."""
    small = small_run(tmp_path)
    whole = small.run("whole", **flags_of_run(run))
    stopped = small.stop("parts", 3, **flags_of_run(run)).checkpoint()
    shutil.rmtree(stopped.path)
    tensors = {key.removesuffix("_qdata"): tensor for key, tensor in stopped.model_tensors.items()}
    tensors = {key: tensor for key, tensor in tensors.items() if not key.endswith("weight_format")}
    save_checkpoint(small.folder / "parts", 3, tensors, stopped.optimizer_state, stopped.state)
    assert_same_run(whole, small.run("parts", **flags_of_run(run), continue_from="auto"))


# Command lines of q_galore runs from before the optimizer's name meant quantized weights and projections, and what was
# the default for what they leave out.
SILENT: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "float weights": ({}, {"weight_quant": False, "stochastic_round": False, "proj_quant": False}),
    "nearest": ({"weight_quant": True, "proj_quant": True}, {"stochastic_round": False}),
}


@pytest.mark.parametrize("case", SILENT)
def test_a_run_goes_on_with_what_its_command_left_out(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command has the same bits, from a checkpoint by its path, too; a flag that is given is taken."""
    given, defaults = SILENT[case]
    silent = FLAGS | {"weight_quant": None, "stochastic_round": None, "proj_quant": None} | given
    small = small_run(tmp_path)
    whole = small.run("whole", **silent | defaults)
    (path,) = small.stop("parts", 3, **silent | defaults).checkpoints
    small.copy("parts", "by_path")
    capsys.readouterr()
    assert_same_run(whole, small.run("parts", **silent, continue_from="auto"))
    said = " ".join(f"--no-{name}" for name in defaults)
    assert f"{said}, as in the checkpoint: the command line says nothing of it" in capsys.readouterr().err
    assert_same_run(whole, small.run("by_path", **silent, continue_from=small.folder / "by_path" / path.name))
    longer = silent | {"num_training_steps": 7, "continue_from": "auto"}
    assert small.main("parts", dry_run=True, **longer) == 0
    assert "--stochastic_round False" in capsys.readouterr().out
    if case == "float weights":
        assert small.main("parts", **longer | {"weight_quant": True}) == 2
        assert "weight_quant is True here and False there" in capsys.readouterr().err
        assert small.main("parts", **longer | {"simulation": True}) == 2
        said = capsys.readouterr().err
        assert "--simulation is about quantized weights" in said and "as in the checkpoint" in said


@every_run
def test_it_is_exported_as_floats(tmp_path: Path, run: str, script: ModuleType) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    script.export(GOLDEN / run / "step_00000003", tmp_path / "out", "float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.from_numpy((token_stream(400, 2) % 32).astype(np.int64)).view(-1, 16)
    loss = float(model(input_ids=tokens, labels=tokens).loss.detach())
    assert loss == pytest.approx(3.235, abs=0.05), "perplexity was 25.4 at the end of the runs"
