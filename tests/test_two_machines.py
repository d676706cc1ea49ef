"""Two machines on one: two launchers, each with two ranks, which share inside and replicate between."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.small_run import ROOT, SmallRun, _free_port, environment, flags_of
from tests.test_data_parallel import assert_close_weights

LINEAR: dict[str, object] = {"lr": 1.0, "adam_eps": 1.0}


def launch(argv: list[str], ranks_of_machines: tuple[int, ...]) -> list[tuple[int, str]]:
    """Start a torchrun for each machine; returns the exit code of each and what it printed."""
    port, launchers = str(_free_port()), []
    for machine, ranks in enumerate(ranks_of_machines):
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", str(len(ranks_of_machines)),
            "--node_rank", str(machine), "--nproc_per_node", str(ranks), "--master_addr", "127.0.0.1",
            "--master_port", port, str(ROOT / "run_pretrain.py"), *argv,
        ]  # fmt: skip
        launchers.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    texts = [launcher.communicate(timeout=300)[0] for launcher in launchers]
    return [(launcher.returncode, text) for launcher, text in zip(launchers, texts, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize(("shard", "optimizer"), [("optimizer", "galore_adamw8bit"), ("full", "galore_adamw")])
def test_states_are_shared_inside_a_machine_and_replicated_between(tmp_path: Path, shard: str, optimizer: str) -> None:
    """With tables that are large enough to be dealt by rows, which `full` gathers inside a machine."""
    small = SmallRun(tmp_path, layers=2)
    small.config.write_text(json.dumps(json.loads(small.config.read_text()) | {"vocab_size": 4099}))
    flags = flags_of(optimizer) | LINEAR | {"subspace": "streaming", "num_training_steps": 5, "save_every": 5}
    flags |= {"check_replicas": 1, "batch_size": 1, "weight_decay": 0.1}
    replicated = small.run_on(4, "replicated", **flags)
    for code, text in launch(small.argv("machines", flags | {"shard": shard}), (2, 2)):
        assert code == 0, text
    machines = small.result("machines")
    assert machines.losses == pytest.approx(replicated.losses, abs=5e-4)
    assert_close_weights(machines, replicated, 1e-3)
    parts = {path.name for path in machines.checkpoints[-1].glob("optimizer_*.json")}
    assert parts == {"optimizer_00001.json"}, "the first machine writes"
    again = small.argv("machines", flags | {"shard": shard, "num_training_steps": 6, "continue_from": "auto"})
    for code, text in launch(again, (2, 2)):
        assert code == 0, text
    assert small.result("machines").checkpoint().update_step == 6


@pytest.mark.slow
def test_machines_with_unequal_numbers_of_ranks_are_refused(tmp_path: Path) -> None:
    small = SmallRun(tmp_path)
    flags = flags_of("adamw") | {"num_training_steps": 2, "batch_size": 1, "data_lanes": 63, "total_batch_size": 9}
    for code, text in launch(small.argv("odd", flags | {"shard": "optimizer"}), (2, 1)):
        assert code != 0
        assert "--shard optimizer: the machines run unequal numbers of ranks (1, 2)" in text
        assert 'run_pretrain.py", line' not in text, "a sentence, and not a traceback of ours"
