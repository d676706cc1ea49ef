"""Every flag of a command that goes on from a checkpoint is either free to change, or refused in a sentence."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from peft_pretraining.checkpoint import run_state
from peft_pretraining.config.run_config import GROUPS
from peft_pretraining.reporting.jsonl import read_metrics
from tests.small_run import FULL_RANK, INT8_PRODUCTS, SmallRun, flags_of, write_text

Flags = dict[str, object]

GALORE, ADAPTERS = flags_of("galore_adamw8bit"), {"optimizer": "adamw", "method": "lora", "rank": 8}
RELORA = ADAPTERS | {"method": "relora", "relora_every": 2, "relora_warmup": 1}
SVD = flags_of("q_galore_adamw8bit_per_layer")
STREAMING = SVD | {"subspace": "streaming"}
LAZY = SVD | {"queue_size": 1, "cos_threshold": 0.0, "update_proj_gap": 2}
ORTHOGONAL = FULL_RANK | {"direction": "orthogonal", "lr": 1e-2}
IN_PARTS = ORTHOGONAL | {"momentum_rank": 8}
WSD: Flags = {"scheduler": "wsd", "decay_steps": 2}
TEXT: Flags = {"dataset": "text", "packing": "pack", "shuffle_buffer": 4}  # the folder of `texts`
TWO_MICRO_BATCHES: Flags = {"batch_size": 4}

# Flag: the other flags of the command, and two values of it; None leaves a switch off.
Toggle = tuple[Flags, object, object]
REFUSED: dict[str, Toggle] = {
    "use_hf_model": (flags_of("adamw"), None, True),
    "dtype": ({}, "float32", "bfloat16"),
    "optimizer": (GALORE, "galore_adamw8bit", "galore_adamw"),
    "total_batch_size": ({}, 8, 16),
    "rank": (GALORE, 32, 16),
    "mlp_rank": (GALORE, None, 16),
    "proj_type": (GALORE, "std", "left"),
    "weight_quant": (SVD | {"weight_group_size": None, "stochastic_round": False}, True, False),
    "weight_bits": (SVD, 8, 4),
    "weight_group_size": (SVD, 48, 64),
    "int8_products": (SVD | INT8_PRODUCTS | {"dtype": "bfloat16"}, None, True),
    "fp8_products": (SVD | {"dtype": "bfloat16"}, None, True),
    "fp8_head": (SVD | {"fp8_products": True, "dtype": "bfloat16"}, None, True),
    "fp8_weight_gradients": (FULL_RANK | {"fp8_products": True, "dtype": "bfloat16"}, None, True),
    "simulation": (SVD, None, True),
    "proj_quant": (SVD | {"proj_group_size": None}, True, False),
    "proj_bits": (SVD, 4, 8),
    "proj_group_size": (SVD, 48, 64),
    "subspace": (SVD, "svd", "streaming"),
    "direction": (ORTHOGONAL, "orthogonal", "normuon"),
    "newton_schulz": (ORTHOGONAL, "muon", "polar5"),
    "momentum_rank": (ORTHOGONAL, None, 8),
    "momentum_rest_bits": (IN_PARTS, 4, 2),
    "sum_in_momentum": (ORTHOGONAL | TWO_MICRO_BATCHES, None, True),
    "full_rank_second_moment": (flags_of("galore_adamw"), "value", "row"),
    "seed": ({}, 0, 1),
    "method": (ADAPTERS, "lora", "low_rank"),
    "lora_alpha": (ADAPTERS, 32, 16),
    # The loader's.
    "max_length": ({}, 32, 16),
    "data_lanes": ({}, 8, 4),
    "packing": (TEXT, "pack", "pad"),
    "shuffle_buffer": (TEXT, 4, 8),
}
# Of adafactor and sgd a first moment comes and goes with it.
MOMENTUM = {"sgd": 0.9, "adafactor": 0.9}

FREE: dict[str, Toggle] = {
    "activation_checkpointing": (SVD, None, True),
    "recompute": (SVD, None, "attention"),
    "checkpoint_every": (SVD | {"activation_checkpointing": True}, 1, 2),
    "checkpoint_layers": (SVD | {"activation_checkpointing": True}, None, 1),
    "int8_activations": (SVD, None, True),
    "compile": ({}, "auto", "off"),
    "cuda_graphs": (SVD, "auto", "off"),
    "workers": ({}, 0, 1),
    "damaged_limit": ({}, 100, 0),
    "repeat": ({}, "each", "none"),
    "batch_size": (SVD, 4, 2),
    "accumulate_by": (SVD | TWO_MICRO_BATCHES, "micro_batch", "layer"),
    "lr": (SVD, 0.01, 0.02),
    "full_rank_lr": (SVD, 0.01, 0.02),
    "weight_decay": (SVD, 0.0, 0.1),
    "full_rank_weight_decay": (SVD, 0.0, 0.1),
    "cautious_decay": (SVD | {"weight_decay": 0.1}, None, True),
    "beta1": (GALORE, 0.9, 0.8),
    "beta2": (GALORE, 0.95, 0.9),
    "adam_eps": (GALORE, 1e-8, 1e-7),
    "grad_clipping": (SVD, 0, 0.5),
    "norm_growth": (SVD, 0, 1.01),
    "grad_accum_dtype": (SVD | TWO_MICRO_BATCHES, "float32", "int8"),
    "loss_scale": ({"dtype": "float16"}, None, 8),
    "lora_dropout": (ADAPTERS, 0, 0.1),
    "relora_every": (RELORA, 2, 3),
    "relora_warmup": (RELORA, 1, 0),
    "relora_prune": (RELORA, 0.99, 0.5),
    "stochastic_round": (SVD, True, False),
    "galore_scale": (SVD, 1.0, 0.5),
    "svd_method": (GALORE, "full", "randomized"),
    "update_proj_gap": (SVD, 3, 2),
    "max_update_proj_gap": (LAZY, 16, 2),
    "cos_threshold": (LAZY, 0.0, 1.0),
    "gamma_proj": (LAZY, 2.0, 1.0),
    "queue_size": (LAZY, 1, 3),
    "rounding_feedback": (ORTHOGONAL, 0, 0.5),
    "residual": (STREAMING, "none", "fira"),
    "rotate_moments": (STREAMING, True, False),
    "num_training_steps": ({}, 4, 5),
    "max_train_tokens": ({}, None, 1024),
    "scheduler": ({}, "cosine", "linear"),
    "warmup_steps": ({}, 0, 3),
    "min_lr_ratio": ({}, 0.1, 0.2),
    "decay_steps": (WSD, 2, 3),
    "decay_shape": (WSD, "linear", "1-sqrt"),
    "restart_cycles": ({"scheduler": "cosine_restarts"}, 1, 2),
    "eval_every": ({}, 0, 1),
    "eval_tokens": ({}, 400, 300),
    "eval_batch_size": ({}, 4, 2),
    "save_every": ({}, 0, 1),
    "keep_checkpoints": ({}, 3, 1),
    "project": ({}, "a", "b"),
    "tags": ({}, "a", "b"),
    "unset_wandb": ({"wandb_mode": "off"}, None, True),
    "wandb_mode": ({}, "auto", "off"),
    "log_every": ({}, 1, 2),
    "device": ({}, "cpu", "auto"),
    "single_gpu": ({}, None, True),
    "max_skipped_updates": ({}, 10, 5),
    "check_replicas": ({}, 0, 1),
}
ELSEWHERE = {
    "recipe": "gives other flags their defaults",
    "model_config": "its contents are compared: test_resume",
    "init_from": "a checkpoint has its own weights: test_init_from",
    "dataset": "its contents are compared: test_resume",
    "tokenizer": "its contents are compared: tests/data/test_tokenizer_files",
    "dataset_config": "part of what is compared of the data set", "dataset_revision": "likewise",
    "train_split": "likewise", "text_column": "likewise", "text_unit": "likewise",
    "add_bos": "part of what is compared of the tokenizer", "add_eos": "likewise",
    "gradient_accumulation": "follows batch_size, since the total is fixed",
    "validation_split": "is not read before an evaluation",
    "average_last": "a mean needs the updates that it is of: test_averaging",
    "adam8bit_backend": "has the same states: test_adam8bit_backend",
    "qlora_bits": "needs a GPU: test_methods",
    "save_dir": "a place: test_resume", "continue_from": "itself: test_resume",
    "name": "of wandb, as project",
    "tensorboard": "needs a package of its own: test_metrics",
    "shard": "deals the same states to ranks: test_sharding",
    "shard_sums": "sums of one update are in no checkpoint: test_sharding",
    "offload": "the same states elsewhere: test_offload",
    "memory_budget": "gives other flags their values: test_memory_budget",
    "save_last": "saves the same or nothing: test_resume",
    "dry_run": "trains nothing", "nproc": "describes other ranks than there are",
}  # fmt: skip
"""Flags that no run here toggles, each with the reason."""


def test_every_flag_is_free_or_refused() -> None:
    """A new flag, so a new option of the library, needs a line above: what becomes of a state that lacks it?"""
    flags = {field.name for group in GROUPS.values() for field in dataclasses.fields(group)}
    assert flags == REFUSED.keys() | FREE.keys() | ELSEWHERE.keys()
    assert not REFUSED.keys() & FREE.keys() and not (REFUSED.keys() | FREE.keys()) & ELSEWHERE.keys()
    fixed = set(run_state._FIXED) - {"model_config_contents"}
    assert fixed <= REFUSED.keys() | {"qlora_bits"} and not fixed & FREE.keys()


class Stopped:
    """Runs that were stopped after two updates, each trained once."""

    def __init__(self, folder: Path) -> None:
        self.small, self.text = SmallRun(folder), write_text(folder / "text")
        self._names: dict[str, str] = {}

    def of(self, flags: Flags, name: str) -> Flags:
        """Put a run with these flags, stopped after two of four updates, into the folder `name`; what goes on."""
        flags = {"num_training_steps": 4, "adam8bit_backend": None} | flags
        if flags.get("dataset") == "text":
            flags = {**flags, **{key: self.text[key] for key in ("dataset", "tokenizer")}}
        key = repr(sorted(flags.items(), key=str))
        if key not in self._names:
            self._names[key] = f"stopped-{len(self._names)}"
            self.small.stop(self._names[key], 2, **flags)
        shutil.rmtree(self.small.folder / name, ignore_errors=True)
        self.small.copy(self._names[key], name)
        return flags


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    return Stopped(tmp_path_factory.mktemp("stopped"))


both_ways = pytest.mark.parametrize("way", [(1, 2), (2, 1)], ids=["there", "back"])


@both_ways
@pytest.mark.parametrize("flag", REFUSED)
def test_what_a_checkpoint_has_in_another_form_is_refused(
    stopped: Stopped, capsys: pytest.CaptureFixture[str], flag: str, way: tuple[int, int]
) -> None:
    toggle = REFUSED[flag]
    flags = stopped.of(toggle[0] | {flag: toggle[way[0]]}, flag)
    capsys.readouterr()
    assert stopped.small.main(flag, **flags | {flag: toggle[way[1]], "continue_from": "auto"}) == 2
    *_, message = capsys.readouterr().err.strip().splitlines()
    assert f"{flag} is " in message and ("is of another run" in message or "in the order of its" in message)


@both_ways
@pytest.mark.parametrize("optimizer", MOMENTUM)
def test_a_first_moment_that_comes_or_goes_is_refused(
    stopped: Stopped, capsys: pytest.CaptureFixture[str], optimizer: str, way: tuple[int, int]
) -> None:
    values = (None, None, MOMENTUM[optimizer])
    flags = stopped.of(flags_of(optimizer) | {"beta1": values[way[0]]}, optimizer)
    assert stopped.small.main(optimizer, **flags | {"beta1": values[way[1]], "continue_from": "auto"}) == 2
    assert "beta1 is " in capsys.readouterr().err


@both_ways
@pytest.mark.parametrize("flag", ["sum_in_momentum", "momentum_rank", "direction", "mlp_rank"])
def test_a_state_that_does_not_fit_is_a_sentence_too(
    stopped: Stopped,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flag: str,
    way: tuple[int, int],
) -> None:
    """Where the flags do not tell, as those of a checkpoint that somebody has written by hand."""
    toggle = REFUSED[flag]
    flags = stopped.of(toggle[0] | {flag: toggle[way[0]]}, flag)
    monkeypatch.setattr(run_state, "_FIXED", ())
    assert stopped.small.main(flag, **flags | {flag: toggle[way[1]], "continue_from": "auto"}) == 2
    *_, message = capsys.readouterr().err.strip().splitlines()
    assert "has the state of another optimizer: " in message and message.endswith("or another checkpoint.")


# Those of other groups have no state that could be lacking on the way back.
OF_STATES = ("model", "batch", "optimizer", "method", "quantization", "subspace")
WITH_STATE = {field.name for group in OF_STATES for field in dataclasses.fields(GROUPS[group])}


@pytest.mark.parametrize(
    ("flag", "way"), [(flag, way) for flag in FREE for way in ((1, 2), (2, 1)) if flag in WITH_STATE or way == (1, 2)]
)
def test_what_may_change_goes_on_and_is_said(
    stopped: Stopped, capsys: pytest.CaptureFixture[str], flag: str, way: tuple[int, int]
) -> None:
    toggle = FREE[flag]
    flags = stopped.of(toggle[0] | {flag: toggle[way[0]]}, flag)
    capsys.readouterr()
    assert stopped.small.main(flag, **flags | {flag: toggle[way[1]], "continue_from": "auto"}) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "changed since the checkpoint" in line]
    assert len(said) == 1 and f"--{flag} " in said[0]
    losses = [line["train/loss"] for line in read_metrics(stopped.small.folder / flag) if "train/loss" in line]
    assert all(0 < loss < 10 for loss in losses)
