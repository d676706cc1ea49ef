"""Any causal model of transformers behind our call signature."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_pretraining.errors import UserError
from peft_pretraining.models.config import read_config_json
from peft_pretraining.models.config_source import CONFIG
from peft_pretraining.models.head import IGNORE_INDEX, CausalLMOutput, head_output, shifted
from peft_pretraining.models.network import CausalLM
from peft_pretraining.models.recorded_init import InitialValue, InitRecorder, UnreadableInitError
from qgalore.layer.choice import why_float


@dataclass(frozen=True)
class HFConfig:
    """What is asked of a network's configuration, see `NetworkConfig`."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    initializer_range: float


class HFCausalLM(CausalLM):
    """A causal model of transformers with its own state-dict keys, its own initial values, and our loss.

    Decoder matrices are the linear layers inside the decoder layers, and GPT-2's Conv1D, but for those that compute
    more, as some routers do, or whose weight the class reads itself (`qgalore.layer.choice`). Where the class makes its
    logits by the head alone, the loss never has them all at once; where it caps, scales or shifts them, it has. The
    losses that a class adds to that of the next token are left out, such as for the balance of experts.
    """

    def __init__(self, config_path: str | Path) -> None:
        """Build it on the meta device, with real buffers. Raises UserError for what cannot be trained here."""
        super().__init__()
        self._source = f"--model_config {config_path}"
        recorder = InitRecorder()
        network = _network(config_path, self._source, recorder)
        self._network = (network,)  # in a tuple: its modules are registered below, under its own names of them
        for name, child in network.named_children():
            self.add_module(name, child)
        self.config = _config_of(network, self._source)
        self._longest: int | None = getattr(network.config, "max_position_embeddings", None)
        self.layers_name = _layers_name(network, self.config.num_hidden_layers, self._source)
        matrices = _matrix_names(self, self.layers_name)
        self._matrices = frozenset(matrices) - why_float(network, matrices).keys()
        if not self._matrices:
            raise UserError(f"{self._source}: {_kind(network)} has no linear layers inside its decoder layers.")
        _refuse_dropout(network, self._source)
        self._initial = self._initial_values(recorder)
        self.table_names = _table_names(network)
        unexpected = getattr(network, "_keys_to_ignore_on_load_unexpected", None) or ()
        self.ignored_names = (*CausalLM.ignored_names, *unexpected)
        self._plain_head = _head_is_plain(network)
        """Whether its logits are what the head makes of the last hidden states, and nothing else."""

    def _initial_values(self, recorder: InitRecorder) -> dict[str, InitialValue]:
        padded = set()
        for module in self.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                # As in our own model: the row of that id would start at zero and never train.
                module.padding_idx = None
                padded.add(module.weight)
        found = {}
        for name, parameter in self.named_parameters():
            try:
                found[name] = recorder.initial_value(parameter, whole=parameter in padded)
            except UnreadableInitError:
                kind = _kind(self._network[0])
                raise UserError(
                    f"{self._source}: {kind} computes what {name} starts with from other parameters; --use_hf_model "
                    "takes models that draw each parameter by itself."
                ) from None
        return found

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator, std: float) -> Tensor:
        """See `CausalLM`; as transformers' class initialises it."""
        return self._initial[name].draw(generator)

    def is_decoder_matrix(self, name: str) -> bool:
        """See `CausalLM`."""
        return name in self._matrices

    def train(self, mode: bool = True) -> HFCausalLM:
        """Set training mode, of transformers' own module, too."""
        super().train(mode)
        self._network[0].training = mode
        return self

    def gradient_checkpointing_enable(self, layers: Collection[int] | None = None) -> None:
        """See `CausalLM`; for all layers, else ValueError."""
        if layers is not None:
            raise ValueError(f"transformers' model recomputes every layer, not those of {layers} alone")
        network, arguments = self._network[0], {"use_reentrant": False, "preserve_rng_state": False}
        if not network.supports_gradient_checkpointing:
            raise UserError(f"{_kind(network)} cannot recompute its layers: leave --activation_checkpointing out")
        if hasattr(network, "activation_checkpointing_enable"):  # the name since transformers 5.2x
            network.activation_checkpointing_enable(arguments)
        else:
            network.gradient_checkpointing_enable(arguments)

    def keep_int8_activations(self) -> None:
        """UserError: transformers' layers cannot."""
        raise UserError("transformers' models keep their activations as they are: build the project's own")

    def multiply_head_in_fp8(self, products: int) -> None:
        """See `CausalLM`; UserError where the loss is not of what the head alone makes."""
        if not self._plain_head:
            raise UserError(
                f"--fp8_head: {_kind(self._network[0])} caps, scales or shifts its logits, of which PyTorch makes the "
                "loss: leave --fp8_head out"
            )
        self.head_products = products

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> CausalLMOutput:
        """See `CausalLM`. Raises UserError for sequences longer than the model's positions."""
        network, longest = self._network[0], self._longest
        if longest is not None and input_ids.shape[1] > longest:
            raise UserError(
                f"--max_length is {input_ids.shape[1]}, but {self._source} has max_position_embeddings {longest}: give "
                "at most that, or a config with a longer context."
            )
        if self._plain_head:
            hidden = network.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
            return head_output(hidden, network.get_output_embeddings(), labels, self.head_products)
        logits: Tensor = network(input_ids=input_ids, use_cache=False).logits  # (B, L, vocab_size)
        if labels is None:
            return CausalLMOutput(logits, None)
        loss = F.cross_entropy(
            logits.flatten(0, 1).float(), shifted(labels).flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )
        return CausalLMOutput(None, loss)


def _network(config_path: str | Path, source: str, recorder: InitRecorder) -> Any:
    """transformers' module for a config.json, without memory for its parameters."""
    import transformers

    raw = read_config_json(config_path)
    try:
        with tempfile.TemporaryDirectory() as folder:  # from_pretrained takes no contents
            Path(folder, CONFIG).write_text(json.dumps(raw), encoding="utf-8")
            config = transformers.AutoConfig.from_pretrained(folder)
        _refuse_others(config, source)
        with torch.random.fork_rng(devices=[]), recorder:
            torch.default_generator.manual_seed(0)  # for random constants, which no parameter's generator draws
            network = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except UserError:
        raise
    except Exception as error:  # transformers and its validators raise whatever they meet
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{source}: transformers refuses it: {reason}") from error
    if any(getattr(module, "is_decoder", True) is False for module in network.modules()):
        raise UserError(
            f"{source}: is_decoder is false, so each token of {_kind(network)} would see the next ones, which it is to "
            "predict; set it to true."
        )
    own = [name for name, _ in (*network.named_parameters(recurse=False), *network.named_buffers(recurse=False))]
    if own:
        raise UserError(
            f"{source}: {_kind(network)} holds {own[0]} outside of any layer; --use_hf_model takes no such."
        )
    return network


def _refuse_others(config: Any, source: str) -> None:
    """Refuse what transformers would build and what is no causal language model alone."""
    text = config.get_text_config()
    if text is not config:
        raise UserError(
            f"{source}: model_type {config.model_type!r} is more than a language model; give its text_config alone, "
            f"which has model_type {text.model_type!r}."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{source}: is_encoder_decoder is true; --use_hf_model trains decoders.")
    if getattr(config, "use_bidirectional_attention", None):
        given = config.use_bidirectional_attention
        raise UserError(f"{source}: use_bidirectional_attention is {given!r}; it must be false.")


def _config_of(network: Any, source: str) -> HFConfig:
    config = network.config
    values: dict[str, Any] = {}
    for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
        values[name] = getattr(config, name, None)
        if not isinstance(values[name], int):
            raise UserError(f"{source}: transformers' {type(config).__name__} has no {name}, which is needed here.")
    if values["num_hidden_layers"] == 0:
        raise UserError(f"{source}: it has no layers; num_hidden_layers must be at least 1.")
    std = getattr(config, "initializer_range", None)
    return HFConfig(**values, initializer_range=0.02 if std is None else std)


def _layers_name(network: Any, count: int, source: str) -> str:
    """The nn.ModuleList of the decoder layers: of those with one member a layer, the one with the most parameters."""
    sizes: dict[str, int] = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in network.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    }
    if not sizes:
        raise UserError(f"{source}: {_kind(network)} has no nn.ModuleList of its {count} decoder layers.")
    return max(sizes, key=lambda name: sizes[name])


def _table_names(network: Any) -> tuple[str, str]:
    """The names of the embeddings' and the head's weights; "" for what the class does not tell."""
    names = {id(module): f"{name}.weight" for name, module in network.named_modules()}
    embeddings, head = network.get_input_embeddings(), network.get_output_embeddings()
    return names.get(id(embeddings), ""), names.get(id(head), "")


def _matrix_names(model: nn.Module, layers_name: str) -> list[str]:
    from transformers.pytorch_utils import Conv1D

    inside = f"{layers_name}."
    return [n for n, m in model.named_modules() if n.startswith(inside) and isinstance(m, nn.Linear | Conv1D)]


def _refuse_dropout(network: Any, source: str) -> None:
    """Refuse dropout: neither a resumed run nor a layer that is recomputed could drop the same values again."""
    drops = any(
        (isinstance(module, nn.Dropout) and module.p > 0)
        or any("drop" in key and isinstance(value, float) and value > 0 for key, value in vars(module).items())
        for module in network.modules()
    )
    if drops:
        given = {k: v for k, v in network.config.to_dict().items() if "drop" in k and isinstance(v, float) and v > 0}
        named = ", ".join(f"{key} {value}" for key, value in given.items()) or "dropout"
        raise UserError(
            f"{source}: {_kind(network)} drops values at random in training ({named}), which no resumed run and no "
            "recomputed layer could repeat: set what it drops by to 0.0."
        )


class _Given(nn.Module):
    """Stands for a network without its head, and for what it returns: these hidden states and nothing else."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self._returned = _Returned(hidden)

    def forward(self, *_: object, **__: object) -> _Returned:
        return self._returned


class _Returned:
    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None  # caches, attentions, losses of routers

    def __getitem__(self, index: int | slice) -> Any:
        return (self.last_hidden_state,)[index]


class _Unchanged(nn.Module):
    """Stands for a head."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(0))  # whose dtype some cast to

    def forward(self, x: Tensor) -> Tensor:
        return x


def _head_is_plain(network: Any) -> bool:
    """Whether a class returns the output of a head without bias as its logits.

    Seen by what it makes of given hidden states with a head that changes nothing. False where that cannot be seen.
    """
    head = network.get_output_embeddings()
    names = {id(module): name for name, module in network.named_children()}
    base_name, head_name = names.get(id(network.base_model)), names.get(id(head))
    if base_name is None or head_name is None or not isinstance(head, nn.Linear) or head.bias is not None:
        return False
    if type(head).forward is not nn.Linear.forward:  # such as one with a learned scale, which starts at one
        return False
    hidden = torch.linspace(-90.0, 90.0, 2 * 3 * head.in_features).view(2, 3, -1)
    kept = dict(network._modules)
    network._modules |= {base_name: _Given(hidden), head_name: _Unchanged()}
    try:
        with torch.no_grad():
            logits = network(input_ids=torch.zeros(2, 3, dtype=torch.long), use_cache=False).logits
    except Exception:  # it asks more of its parts, and is called whole
        return False
    finally:
        network._modules.update(kept)
    return isinstance(logits, Tensor) and torch.equal(logits, hidden)


def _kind(network: Any) -> str:
    return type(network).__name__
