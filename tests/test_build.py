"""Flags become a model and its optimizer in one place, the same for a run and for the benchmarks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from peft_pretraining.build import build_training, compiles_layers
from peft_pretraining.config.flag_groups import ModelArgs
from peft_pretraining.config.flags import read_specs
from peft_pretraining.config.parse import parse_args
from peft_pretraining.models.llama.modeling import LlamaForCausalLM
from peft_pretraining.models.ops.swiglu import swiglu_through_int8
from peft_pretraining.optim.layer_execution import allows_graphs
from qgalore import LowRankLinear, QGaLoreAdamW8bit
from tests.small_run import SmallRun, flags_of


def test_all_options_reach_what_is_built(tmp_path: Path) -> None:
    small = SmallRun(tmp_path, layers=2)
    flags = flags_of("q_galore_adamw8bit_per_layer") | {
        "seed": 3, "dtype": "bfloat16", "activation_checkpointing": True, "checkpoint_every": 2,
        "int8_activations": True, "rank": 16, "lr": 0.02, "weight_bits": 4,
    }  # fmt: skip
    args = parse_args(small.argv("none", flags))
    model, optimizer = build_training(args, torch.device("cpu"))
    assert isinstance(model, LlamaForCausalLM) and isinstance(optimizer, QGaLoreAdamW8bit)
    assert model.training and model.lm_head.weight.dtype == torch.bfloat16
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [True, False]
    assert [layer.mlp.training_swiglu is swiglu_through_int8 for layer in model.model.layers] == [False, True]
    layers = [layer for layer in model.modules() if isinstance(layer, LowRankLinear)]
    assert [layer._frees_input for layer in layers] == [True] * 7 + [False] * 7, "where activations are recomputed"
    assert len(layers) == 14 and {layer.weight.shape[1] for layer in layers} == {32, 64}  # two codes a byte
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.02]
    assert optimizer.param_groups[1]["rank"] == 16
    other, _ = build_training(parse_args(small.argv("none", flags | {"seed": 4})), torch.device("cpu"))
    assert not torch.equal(other.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize(
    ("options", "on_a_gpu", "elsewhere"),
    [
        ({}, True, False),
        ({"compile": "on"}, True, True),
        ({"compile": "off"}, False, False),
        ({"compile": "on", "use_hf_model": True}, False, False),
    ],
)
def test_layers_that_are_compiled(options: dict[str, str | bool], on_a_gpu: bool, elsewhere: bool) -> None:
    args = ModelArgs("model.json", **options)  # type: ignore[arg-type]
    assert [compiles_layers(args, pays) for pays in (True, False)] == [on_a_gpu, elsewhere]


GRAPHS: dict[str, dict[str, object]] = {
    "The updates are inside": {},
    "--grad_clipping": {"grad_clipping": 1.0, "batch_size": 2},
    "several micro-batches": {"batch_size": 2},
    "optimizer without _per_layer": {"optimizer": "q_galore_adamw8bit"},
}
NO_GRAPHS: dict[str, dict[str, object]] = {
    "--simulation": {"simulation": True},
    "--weight_group_size": {"weight_group_size": 20},
    "--grad_accum_dtype int8": {"grad_accum_dtype": "int8"},
    "--residual": {"residual": "fira", "optimizer": "q_galore_adamw8bit"},
    "--sum_in_momentum": {
        "sum_in_momentum": True,
        "rank": "full",
        "direction": "orthogonal",
        "proj_quant": None,
        "update_proj_gap": None,
        "proj_group_size": None,
    },
}


@pytest.mark.parametrize("name", GRAPHS | NO_GRAPHS)
def test_graphs_serve_what_the_help_says(tmp_path: Path, name: str) -> None:
    flags = flags_of("q_galore_adamw8bit_per_layer") | {"batch_size": 8} | (GRAPHS | NO_GRAPHS)[name]
    assert allows_graphs(parse_args(SmallRun(tmp_path).argv("none", flags))) == (name in GRAPHS)
    (text,) = [spec.help for spec in read_specs(ModelArgs) if spec.name == "cuda_graphs"]
    served, without = " ".join(text.split()).split("No graphs are used")
    assert name in (served if name in GRAPHS else without)


def test_nothing_else_puts_a_training_together(root: Path) -> None:
    files = [root / "run_pretrain.py"]
    files += [path for name in ("peft_pretraining", "benchmarks", "scripts") for path in (root / name).rglob("*.py")]
    calls = ("build_optimizer(", "low_rank_converter(", "set_execution(")
    found = {
        str(path.relative_to(root))
        for path in files
        for line in path.read_text(encoding="utf-8").splitlines()
        if any(call in line for call in calls) and not line.startswith("def ")
    }
    of_runs, opened = "peft_pretraining/build.py", "peft_pretraining/after_training/trained_model.py"
    assert found == {of_runs, opened}, "the second opens what was trained, and has no optimizer"
