"""Build a LLaMA: read its config, create it without memory, fill it parameter by parameter.

A model is created on the meta device and materialised one module at a time, so that a caller can turn each matrix into
its quantized form before the next one exists: a 7B model then never holds more than one matrix in bfloat16.

Each parameter has its own generator, seeded from (seed, name), and is drawn in float32 on the CPU: its values depend
neither on the device, nor on the dtype of the run, nor on which other parameters exist. Drawing on the accelerator
would be faster, but CUDA and CPU generators give different numbers, and a run moved between machines should start from
the same weights; a few threads draw ahead, about 100 M values a second and core.
"""

import hashlib
import importlib.util
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_pretraining.arg_groups import ModelArgs
from peft_pretraining.errors import UserError
from peft_pretraining.model_config import LlamaConfig, read_config_json
from peft_pretraining.modeling_llama import LlamaForCausalLM, LlamaOutput, head_output

OnModule = Callable[[nn.Module, str], None]

_DRAW_THREADS = min(8, os.cpu_count() or 1)


class HFCausalLM(nn.Module):
    """transformers' LLaMA behind our call signature, with transformers' state-dict keys and our loss."""

    def __init__(self, config_path: str | Path) -> None:
        super().__init__()
        import transformers

        read_config_json(config_path)
        try:
            config = transformers.AutoConfig.from_pretrained(str(config_path))
            network: Any = transformers.AutoModelForCausalLM.from_config(config)
        except Exception as error:  # transformers and its validators raise whatever they meet
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"--model_config {config_path}: transformers refuses it: {reason}") from error
        if not (hasattr(network, "model") and hasattr(network, "lm_head") and hasattr(network.model, "embed_tokens")):
            raise UserError(
                f"--model_config {config_path}: {type(network).__name__} has no model, model.embed_tokens and lm_head;"
                " --use_hf_model takes decoders of LLaMA's form."
            )
        if len(network.model.layers) == 0:
            raise UserError(f"--model_config {config_path}: it has no layers; num_hidden_layers must be at least 1.")
        self.config = config
        self.model = network.model
        self.lm_head = network.lm_head
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        # As in our own model: with a padding_idx the row of that id would never train.
        self.model.embed_tokens.padding_idx = None
        # Buffers are computed, not loaded: they must hold real numbers although the parameters do not exist yet.
        with torch.device("cpu"):
            self.model.rotary_emb = type(self.model.rotary_emb)(config=config)

    def gradient_checkpointing_enable(self, every: int = 1) -> None:
        """As `LlamaForCausalLM.gradient_checkpointing_enable`, for every layer; else ValueError."""
        if every != 1:
            raise ValueError(f"transformers' model recomputes every layer, not every {every}")
        arguments = {"use_reentrant": False, "preserve_rng_state": False}
        if hasattr(self.model, "activation_checkpointing_enable"):  # the name since transformers 5.2x
            self.model.activation_checkpointing_enable(arguments)
        else:
            self.model.gradient_checkpointing_enable(arguments)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> LlamaOutput:
        """As `LlamaForCausalLM.forward`."""
        hidden = self.model(input_ids=input_ids, use_cache=False).last_hidden_state
        return head_output(hidden, self.lm_head, labels)


CausalLM = LlamaForCausalLM | HFCausalLM


def build_model(
    args: ModelArgs, device: torch.device | str = "cpu", seed: int = 0, on_module: OnModule | None = None
) -> CausalLM:
    """A freshly initialised model in training mode; `on_module` as in `materialize`. Raises UserError."""
    device = torch.device(device)
    model = build_on_meta(args.model_config, args.use_hf_model)
    materialize(model, device, getattr(torch, args.dtype), seed, on_module, std=model.config.initializer_range)
    if args.activation_checkpointing:
        model.gradient_checkpointing_enable(args.checkpoint_every)
    if args.int8_activations:
        if not isinstance(model, LlamaForCausalLM):
            raise UserError("transformers' LLaMA keeps its activations as they are: build the project's own")
        model.keep_int8_activations()
    has_triton = importlib.util.find_spec("triton") is not None
    if isinstance(model, LlamaForCausalLM) and compiles_layers(args, device.type == "cuda" and has_triton):
        model.compile_layers()
    return model.train()


def compiles_layers(args: ModelArgs, pays: bool) -> bool:
    """Whether the decoder layers are to be compiled; pays: whether they are for a CUDA GPU that has Triton."""
    return not args.use_hf_model and (args.compile == "on" or (args.compile == "auto" and pays))


def build_on_meta(config_path: str | Path, use_hf_model: bool = False) -> CausalLM:
    """The model without memory for its parameters."""
    with torch.device("meta"):
        if use_hf_model:
            return HFCausalLM(config_path)
        return LlamaForCausalLM(LlamaConfig.from_json(config_path))


def materialize(
    model: nn.Module,
    device: torch.device | str,
    dtype: torch.dtype,
    seed: int,
    on_module: OnModule | None = None,
    std: float = 0.02,
) -> None:
    """Replace the meta parameters of `model` in place by initialised ones of `dtype` on `device`.

    As transformers initialises LLaMA: matrices normal with standard deviation `std`, norms one, biases zero. Buffers
    keep their dtype. `on_module(model, name)` runs as soon as the parameters of the module `name` exist and before
    those of the next one do; it may replace that module. A tied parameter is drawn once, under its first name.
    """
    modules = deque(model.named_modules())
    uses: dict[nn.Parameter, list[str]] = {}
    for name, module in modules:
        for key, parameter in _own_parameters(module):
            uses.setdefault(parameter, []).append(f"{name}.{key}" if name else key)
    drawn = _draw_ahead([(names[0], parameter.shape) for parameter, names in uses.items()], dtype, seed, std)
    tied: dict[nn.Parameter, nn.Parameter] = {}
    while modules:
        # Any reference left here would keep a float matrix alive beside its quantized form: hence a queue, not a list.
        name, module = modules.popleft()
        own = _own_parameters(module)
        for key, parameter in own:
            real = tied.get(parameter)
            if real is None:
                real = nn.Parameter(next(drawn).to(device), requires_grad=parameter.requires_grad)
            if len(uses[parameter]) > 1:
                tied[parameter] = real
            setattr(module, key, real)
            del real
        for key, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, key, buffer.to(device))
        if on_module is not None and own:
            on_module(model, name)


def _own_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(module.named_parameters(recurse=False))


def low_rank_names(model: nn.Module) -> list[str]:
    """Dotted names of the decoder's linear layers (q, k, v, o, gate, up, down), in the order of the model."""
    layers = getattr(getattr(model, "model", None), "layers", None)
    if layers is None:
        raise TypeError(f"{type(model).__name__} has no model.layers: it is not a LLaMA built by build_model")
    matrices = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return [f"model.layers.{name}" for name, _ in layers.named_modules() if name.rpartition(".")[2] in matrices]


def parameter_count(model: nn.Module) -> int:
    """Values in the model's parameters, a tied one counted once (before quantization: packed codes are fewer)."""
    return sum(parameter.numel() for parameter in model.parameters())


def _draw_ahead(shapes: list[tuple[str, torch.Size]], dtype: torch.dtype, seed: int, std: float) -> Iterator[Tensor]:
    """Initial values in the order of `shapes`; a few threads work ahead of the caller, which bounds the memory."""
    with ThreadPoolExecutor(_DRAW_THREADS) as pool:
        waiting: deque[Future[Tensor]] = deque()
        for name, shape in shapes:
            waiting.append(pool.submit(_initial_value, name, shape, dtype, seed, std))
            if len(waiting) > _DRAW_THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _initial_value(name: str, shape: torch.Size, dtype: torch.dtype, seed: int, std: float) -> Tensor:
    if name.endswith(".bias"):
        return torch.zeros(shape, dtype=dtype)
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator).to(dtype)
