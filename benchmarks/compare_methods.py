"""The trainings that `benchmarks/compare.py` times: ours, plain AdamW, and the peers of `compare_peers.py`.

All train the same LLaMA from the same initial weights on the same token ids with the same loss, the mean over the
targets of an update; so their first losses agree, up to the rounding of INT8 weights.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import compare_peers
from benchmarks.models import LENGTH, MICRO_BATCHES, RANKS, config_path
from benchmarks.rows import ROOT
from peft_pretraining.accumulation.layer_by_layer import LayerByLayer
from peft_pretraining.build import build_model, build_training
from peft_pretraining.config.flag_groups import ModelArgs
from peft_pretraining.config.parse import parse_args
from peft_pretraining.errors import UserError
from peft_pretraining.memory.dealt_states import prepare_mesh
from peft_pretraining.memory.host import missing_host_memory
from peft_pretraining.models.config import read_config_json
from peft_pretraining.models.head import IGNORE_INDEX
from peft_pretraining.models.init import OnModule
from peft_pretraining.models.llama.modeling import LlamaForCausalLM
from peft_pretraining.models.network import CausalLM
from peft_pretraining.models.ops.rotary import rotary_tables
from peft_pretraining.optim.lr_schedule import set_learning_rate
from peft_pretraining.optim.protocol import TrainingOptimizer
from peft_pretraining.runtime.process import make_reproducible
from peft_pretraining.runtime.world import World

CHECKPOINTING = "_checkpointing"  # at the end of a method's name; then perhaps a number: in every so many layers
ADAM: Mapping[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95)}


@dataclass(frozen=True)
class Setting:
    """A model and the options of its training."""

    config: Path
    rank: int
    micro_batch: int  # sequences
    grad_accum: int  # micro-batches
    checkpoint_every: int  # of so many layers one is recomputed; 0: none
    compile: bool  # what can be compiled
    extra: str  # more flags for ours
    seed: int
    device: torch.device
    length: int = LENGTH  # tokens of a sequence


@dataclass(frozen=True)
class Training:
    """A training that is ready to start."""

    update: Callable[[], Tensor]  # makes one update and gives its loss
    flags: str = ""
    svd_excluded: bool = False  # the first update has the only SVDs
    libraries: str = ""


class Steps(Protocol):
    """The methods of an optimizer that are used here."""

    def step(self) -> Any:
        """Update the weights."""

    def zero_grad(self) -> None:
        """Clear the gradients."""


def training_parser(program: str, description: str, models: str, results: str) -> argparse.ArgumentParser:
    """A parser with the flags of a program that trains models with our code and appends rows to a CSV file."""
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.add_argument("--models", default=models, help="names of configs, separated by commas")
    parser.add_argument("--batch_size", type=int, help="sequences in a micro-batch (default: by model)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--results", default=str(ROOT / "benchmarks/results" / results), help="CSV to append to")
    text = "more flags of run_pretrain.py, in one string (--extra=--flag for one alone)"
    parser.add_argument("--extra", default="", help=text)
    parser.add_argument("--note", default="", help="what to remember of the circumstances")
    return parser


def add_methods(parser: argparse.ArgumentParser, methods: Collection[str]) -> None:
    """Add `--methods`, which parses names separated by commas, each with or without `CHECKPOINTING`, into a list."""
    choices = f"{', '.join(methods)}, each also {CHECKPOINTING}"

    def known(names: str) -> list[str]:
        unknown = [name for name in names.split(",") if split_method(name)[0] not in methods]
        if unknown:
            raise argparse.ArgumentTypeError(f"{','.join(unknown)}: there are {choices}")
        return names.split(",")

    parser.add_argument("--methods", type=known, default="q_galore", help=f"of {choices}")


def setting_of(model: str, method: str, args: argparse.Namespace, device: torch.device) -> Setting:
    """The setting of a model for the flags of `training_parser`, with an update each micro-batch."""
    return Setting(
        config=config_path(model),
        rank=RANKS.get(model) or read_config_json(config_path(model))["hidden_size"] // 4,
        micro_batch=args.batch_size or MICRO_BATCHES.get(model, 16),
        grad_accum=1,
        checkpoint_every=split_method(method)[1],
        compile=device.type == "cuda",
        extra=args.extra,
        seed=0,
        device=device,
    )


def split_method(name: str) -> tuple[str, int]:
    """(a method's name without its suffix for recomputed layers, `Setting.checkpoint_every`)."""
    method, checkpointing, every = name.partition(CHECKPOINTING)
    return (method, int(every or 1)) if checkpointing and (every or "1").isdecimal() else (name, 0)


def token_ids(setting: Setting, vocab_size: int) -> Tensor:
    """Random token ids of an update, (grad_accum, micro_batch, length)."""
    generator = torch.Generator().manual_seed(setting.seed)
    shape = (setting.grad_accum, setting.micro_batch, setting.length)
    return torch.randint(vocab_size, shape, generator=generator).to(setting.device)


# ---- ours


def q_galore_flags(setting: Setting, recipe: str = "paper") -> list[str]:
    """The command line of `run_pretrain.py` for this setting; the paper's recipe with the streaming subspace."""
    flags = ["--model_config", str(setting.config), "--device", setting.device.type, "--seed", str(setting.seed)]
    flags += ["--batch_size", str(setting.micro_batch), "--gradient_accumulation", str(setting.grad_accum)]
    flags += ["--max_length", str(LENGTH), "--lr", str(ADAM["lr"])]
    flags += ["--optimizer", "q_galore_adamw8bit_per_layer", "--weight_quant", "--stochastic_round"]
    # With the recipe's steps: rows without this flag are older than them, and have Muon's.
    whole = ["--recipe", recipe, "--newton_schulz", "auto"]
    flags += whole if recipe == "full_rank" else ["--proj_quant", "--recipe", recipe]
    if recipe == "paper":
        flags += ["--subspace", "streaming", "--update_proj_gap", "200"]
        flags += ["--rank", str(setting.rank), "--galore_scale", "0.25"]
    if setting.grad_accum > 1:
        flags += ["--grad_accum_dtype", "int8"]
    if setting.checkpoint_every:
        flags += ["--activation_checkpointing", "--checkpoint_every", str(setting.checkpoint_every)]
    if not setting.compile:
        flags += ["--compile", "off"]
    longer = ["--max_length", str(setting.length)] if setting.length != LENGTH else []
    return [*flags, *longer, *setting.extra.split()]


def q_galore_orthogonal(setting: Setting) -> Training:
    """Our training with the orthogonal recipe and its rank."""
    return q_galore(setting, "orthogonal")


def q_galore_full_rank(setting: Setting) -> Training:
    """Our training with the recipe full_rank: the momentum of whole gradients in 8 bits, orthogonalized."""
    return q_galore(setting, "full_rank")


def q_galore_int8_activations(setting: Setting) -> Training:
    """Our training with `--int8_activations`: gate and up of each MLP are kept in INT8."""
    return q_galore(replace(setting, extra=f"--int8_activations {setting.extra}"))


def q_galore_fp8(setting: Setting) -> Training:
    """Our training with `--fp8_products`."""
    return q_galore(replace(setting, extra=f"--fp8_products {setting.extra}"))


def q_galore_int8_products(setting: Setting) -> Training:
    """Our training with `--int8_products`."""
    return q_galore(replace(setting, extra=f"--int8_products {setting.extra}"))


def q_galore_orthogonal_fp8(setting: Setting) -> Training:
    """Our training with the orthogonal recipe and `--fp8_products`."""
    return q_galore(replace(setting, extra=f"--fp8_products {setting.extra}"), "orthogonal")


def q_galore(setting: Setting, recipe: str = "paper") -> Training:
    """Our training, with the model, optimizer, order of calls and deterministic kernels of `run_pretrain.py`."""
    make_reproducible()
    if setting.device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream(setting.device))  # as a run does, for CUDA graphs
    return train_ours(setting, recipe, World(0, 1, setting.device))[0]


def train_ours(
    setting: Setting, recipe: str, world: World, shard: str = "none"
) -> tuple[Training, CausalLM, TrainingOptimizer]:
    """Our training on the ranks of `world`, each with token ids of its own; returns (training, model, optimizer).

    shard: `--shard`.
    """
    flags = q_galore_flags(setting, recipe)
    args = parse_args([*flags, "--shard", shard], world.world_size)
    mesh = world.shard_mesh(shard)
    if mesh is not None:
        prepare_mesh(mesh, args)
    model, optimizer = build_training(args, world.device, world.gradient_all_reduce() if mesh is None else None, mesh)
    batches = token_ids(replace(setting, seed=setting.seed + world.rank), model.config.vocab_size)
    target_tokens = batches[..., 1:].numel() * world.world_size

    if missing := missing_host_memory(args):
        raise UserError(missing)
    by_layer = LayerByLayer(model, optimizer) if args.by_layer else None

    def check(loss: Tensor) -> None:
        world.all_reduce(loss)
        optimizer.skip_update_if(~loss.isfinite())

    def accumulate() -> Tensor:
        if by_layer is not None:
            by_layer.forward([(ids, ids) for ids in batches], begin=lambda _: None, go_on=lambda: True)
            return by_layer.backward(target_tokens, check)
        loss = torch.zeros((), device=setting.device)
        for micro_step, input_ids in enumerate(batches, start=1):
            optimizer.is_last_micro_batch = micro_step == len(batches)
            micro_loss = model(input_ids, input_ids).loss_sum / target_tokens
            loss += micro_loss.detach()
            if optimizer.is_last_micro_batch:
                check(loss)
            micro_loss.backward()
        return loss

    def update() -> Tensor:
        set_learning_rate(optimizer, 1.0)
        loss = accumulate()
        if args.optimizer.grad_clipping:
            optimizer.clip_grad_norm_(args.optimizer.grad_clipping)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return Training(update, flags=" ".join(flags[2:])), model, optimizer


# ---- others


def others(
    setting: Setting,
    make_optimizer: Callable[..., Steps],
    compile_model: bool,
    on_module: OnModule | None = None,
    packages: tuple[str, ...] = (),
    svd_excluded: bool = False,
    use_hf_model: bool = False,
    make_loss: Callable[[nn.Module], Callable[[Tensor], Tensor]] | None = None,
) -> Training:
    """Train our LLaMA with all logits at once, as other code does, and with another project's optimizer.

    make_loss: of the model, instead of `mean_loss`.
    """
    options = ModelArgs(
        str(setting.config),
        use_hf_model=use_hf_model,
        activation_checkpointing=setting.checkpoint_every > 0,
        checkpoint_every=max(1, setting.checkpoint_every),
        compile="off",  # as a whole, below
    )
    model = build_model(options, setting.device, setting.seed, on_module)
    optimizer = make_optimizer(model, setting.rank, **ADAM)
    batches = token_ids(setting, model.config.vocab_size)
    loss_of = (make_loss or mean_loss)(model)
    if isinstance(model, LlamaForCausalLM):
        model.model.run_layers = LayersInTurn(model, setting.length)
    if compile_model and setting.compile:
        loss_of = torch.compile(loss_of)

    def update() -> Tensor:
        loss = torch.zeros((), device=setting.device)
        for input_ids in batches:
            micro_loss = loss_of(input_ids) / len(batches)
            micro_loss.backward()
            loss += micro_loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return Training(update, svd_excluded=svd_excluded, libraries=compare_peers.versions(*packages))


class LayersInTurn:
    """All layers of a LLaMA with rotary tables that are computed before anything is compiled.

    A compiler that sees how they are made has every kernel of the rotation make them again for each of its values: six
    times the time of those kernels, 16 of the 60 ms of an update of 60M by AdamW.
    """

    def __init__(self, model: LlamaForCausalLM, length: int) -> None:
        """Compute the tables for sequences of `length` and `model`, which must be on its device."""
        config, device = model.config, model.lm_head.weight.device
        self._layers = model.model.layers
        self._tables = rotary_tables(length, config.head_dim, config.rope_theta, device)

    def __call__(self, x: Tensor, *tables: Tensor) -> Tensor:
        """Run x (B, length, hidden_size) through all layers; the tables given are not used."""
        for layer in self._layers:
            x = layer(x, *self._tables)
        return x

    def memory(self) -> contextlib.AbstractContextManager[None]:
        """Empty: it has no parameters of its own."""
        return contextlib.nullcontext()


def mean_loss(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The mean cross-entropy in float32 of token ids (B, L), the last of which have no target."""

    def loss_of(input_ids: Tensor) -> Tensor:
        logits = model(input_ids).logits  # (B, L, vocab_size)
        targets = F.pad(input_ids[:, 1:], (0, 1), value=IGNORE_INDEX)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE_INDEX)

    return loss_of


def adamw(setting: Setting, compile_model: bool = False, use_hf_model: bool = False) -> Training:
    """Train with torch's fused AdamW on bfloat16 weights and states."""

    def make(model: nn.Module, rank: int, **adam: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True, **adam)

    packages = ("transformers",) if use_hf_model else ()
    return others(setting, make, compile_model, packages=packages, use_hf_model=use_hf_model)


def adamw_compiled(setting: Setting) -> Training:
    """Train like `adamw` with model and loss compiled."""
    return adamw(setting, compile_model=True)


def adamw_compiled_transformers(setting: Setting) -> Training:
    """Train like `adamw_compiled` with the LLaMA of transformers."""
    return adamw(setting, compile_model=True, use_hf_model=True)


def adam8bit_bitsandbytes(setting: Setting) -> Training:
    """Train with bitsandbytes' 8-bit Adam, model and loss compiled."""
    return others(setting, compare_peers.adam8bit, True, packages=("bitsandbytes",))


def adamw8bit_torchao(setting: Setting) -> Training:
    """Train with torchao's 8-bit AdamW, model and loss compiled."""
    return others(setting, compare_peers.adamw8bit_torchao, True, packages=("torchao",))


def adamw_compiled_float8_tensorwise(setting: Setting) -> Training:
    """Train like `adamw_compiled` under torchao's float8 training, one scale a tensor."""
    return others(setting, compare_peers.in_float8("tensorwise"), True, packages=("torchao",))


def adamw_compiled_float8_rowwise(setting: Setting) -> Training:
    """Train like `adamw_compiled` under torchao's float8 training, one scale a row."""
    return others(setting, compare_peers.in_float8("rowwise"), True, packages=("torchao",))


def adamw_liger(setting: Setting) -> Training:
    """Train transformers' LLaMA with Liger's kernels and loss, and torch's fused AdamW; nothing is compiled."""
    if setting.device.type != "cuda":
        raise UserError("adamw_liger: Liger's kernels need a CUDA GPU")
    compare_peers.apply_liger()

    def make(model: nn.Module, rank: int, **adam: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True, **adam)

    def loss(model: nn.Module) -> Callable[[Tensor], Tensor]:
        return compare_peers.liger_loss(model, IGNORE_INDEX)

    packages = ("liger-kernel", "transformers")
    return others(setting, make, False, packages=packages, use_hf_model=True, make_loss=loss)


def galore_torch(setting: Setting) -> Training:
    """Train with galore-torch's GaLoreAdamW8bit, model and loss compiled."""
    return others(setting, compare_peers.galore, True, packages=("galore-torch", "bitsandbytes"), svd_excluded=True)


def apollo_torch(setting: Setting) -> Training:
    """Train with apollo-torch's APOLLOAdamW, model and loss compiled; it makes no SVD."""
    return others(setting, compare_peers.apollo, True, packages=("apollo-torch",))


def q_galore_torch(setting: Setting, make: Callable[..., Steps] = compare_peers.q_galore) -> Training:
    """Train with q-galore-torch's QGaLoreAdamW8bit on INT8 weights, eager: gradients leave autograd in its layers."""
    packages = ("q-galore-torch", "bitsandbytes")
    return others(setting, make, False, compare_peers.convert_to_int8, packages, svd_excluded=True)


def q_galore_torch_per_layer(setting: Setting) -> Training:
    """Train with q-galore-torch's updates inside the backward pass, which leave out embeddings, head and norms."""
    if setting.grad_accum > 1:
        raise UserError("--grad_accum: q_galore_torch_per_layer updates at every micro-batch; leave the flag out")
    return q_galore_torch(setting, compare_peers.QGaLorePerLayer)


METHODS: Mapping[str, Callable[[Setting], Training]] = {
    "adamw_compiled": adamw_compiled,
    "adamw_compiled_transformers": adamw_compiled_transformers,
    "adamw": adamw,
    "adam8bit_bitsandbytes": adam8bit_bitsandbytes,
    "adamw8bit_torchao": adamw8bit_torchao,
    "adamw_compiled_float8_tensorwise": adamw_compiled_float8_tensorwise,
    "adamw_compiled_float8_rowwise": adamw_compiled_float8_rowwise,
    "adamw_liger": adamw_liger,
    "galore_torch": galore_torch,
    "apollo_torch": apollo_torch,
    "q_galore_torch": q_galore_torch,
    "q_galore_torch_per_layer": q_galore_torch_per_layer,
    "q_galore": q_galore,
    "q_galore_int8_activations": q_galore_int8_activations,
    "q_galore_int8_products": q_galore_int8_products,
    "q_galore_fp8": q_galore_fp8,
    "q_galore_orthogonal": q_galore_orthogonal,
    "q_galore_full_rank": q_galore_full_rank,
    "q_galore_orthogonal_fp8": q_galore_orthogonal_fp8,
}
