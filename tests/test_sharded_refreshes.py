"""Subspaces that are refreshed in an update which turns out too late not to be finite: all ranks count them alike."""

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
