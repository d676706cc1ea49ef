"""Weights that are dealt to ranks, as the optimizer has them: schedules of refreshes, and a mesh that is left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from peft_pretraining.build import build_training
from peft_pretraining.config.parse import parse_args
from peft_pretraining.models.llama.modeling import LlamaForCausalLM
from peft_pretraining.runtime.signals import StopRequest
from peft_pretraining.runtime.world import start_world
from qgalore.optimizer import LowRankAdamW
from qgalore.subspace.methods import Streaming
from tests.small_run import CONFIG, on_ranks
from tests.test_layer_graphs import STREAMING, skip_for_kernels

FAULT = 4
"""The update in which gradients below the first layer are not finite."""


def schedules_after_each_update(folder: Path, shard: str) -> None:
    """A rank that trains, and writes the schedules of all its subspaces after each update."""
    world = start_world("cpu", StopRequest())
    config = folder / "model.json"
    argv = f"--model_config {config} --dataset {folder} --batch_size 2 --num_training_steps 100 --wandb_mode off"
    argv += f" --save_dir {folder}/run --update_proj_gap 1 --max_length 16 --device cpu --lr 0.01 {STREAMING}"
    args = parse_args(argv.split(), 1)
    found, late = [], []
    with pytest.MonkeyPatch.context() as patch:
        skip_for_kernels(patch)
        model, optimizer = build_training(args, world.device, None, world.shard_mesh(shard))
        assert isinstance(model, LlamaForCausalLM) and isinstance(optimizer, LowRankAdamW)
        subspaces = [weight.subspace for weight in optimizer.low_rank_weights()]
        for step in range(FAULT + 3):
            ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(step))
            spoilt = model.model.embed_tokens.register_forward_hook(_spoil) if step == FAULT else None
            loss = model(ids, ids).loss_sum / ids.numel()
            if spoilt is not None:
                spoilt.remove()
            optimizer.skip_update_if(torch.tensor(False))
            loss.backward()
            optimizer.step()
            late.append(bool(optimizer.late_overflow()))
            optimizer.zero_grad()
            for subspace in subspaces:
                subspace.settle()  # as before the next update
            found.append([each.schedule_row() for each in subspaces if isinstance(each, Streaming)])
    (folder / f"{world.rank}.json").write_text(json.dumps([found, late]))
    world.close()


def _spoil(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
    out.register_hook(lambda grad: grad * float("nan"))


@pytest.mark.parametrize("shard", ["optimizer", "full"])
def test_ranks_keep_one_schedule_when_an_update_is_found_bad_after_a_refresh(shard: str, tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 3}))
    log = tmp_path / "log"
    assert on_ranks(2, schedules_after_each_update, tmp_path, shard, log=log) == [0, 0], log.read_text()
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    (schedules, late), (others, others_late) = ranks
    assert late == others_late == [step == FAULT for step in range(FAULT + 3)]
    assert schedules == others
    refreshes = [[row[3] for row in rows] for rows in schedules]
    assert all(later > before for before, later in zip(refreshes[0], refreshes[-1], strict=True)), "nothing refreshed"


# ---- a mesh that is left


def leave_and_come_back(folder: Path) -> None:
    """A rank that trains with a mesh, leaves it, and trains alone with the states of both ranks."""
    world = start_world("cpu", StopRequest())
    argv = f"--model_config {folder}/model.json --dataset {folder} --batch_size 2 --num_training_steps 9"
    args = parse_args(f"{argv} --save_dir {folder}/run --max_length 16 --device cpu --lr 0.01 {STREAMING}".split(), 1)
    model, optimizer = build_training(args, world.device, None, world.shard_mesh("optimizer"))
    assert isinstance(model, LlamaForCausalLM) and isinstance(optimizer, LowRankAdamW)

    def update(step: int) -> None:
        ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(step))
        (model(ids, ids).loss_sum / ids.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()

    update(0)
    parts = world.gather(optimizer.state_dict())
    whole = {"state": {}, "param_groups": parts[0]["param_groups"]}
    for part in parts:
        whole["state"].update(part["state"])
    optimizer.detach()
    with pytest.raises(ValueError, match="load a whole model and optimizer"):
        optimizer.attach(model)
    optimizer.load_state_dict(whole)
    optimizer.attach(model)
    before = [param.detach().clone() for param in model.parameters()]
    update(1)
    changed = [not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
    assert all(changed), "a weight that another rank had owned was not trained"
    world.close()


def test_a_mesh_that_was_left_needs_a_whole_state(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 2}))
    log = tmp_path / "log"
    assert on_ranks(2, leave_and_come_back, tmp_path, log=log) == [0, 0], log.read_text()
