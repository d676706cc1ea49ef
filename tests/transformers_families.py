"""Tiny models of transformers, by family, and a batch for each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

WIDTH, VOCABULARY = 32, 64
DECODER = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
GROUPED = DECODER | {"num_key_value_heads": 2}
ENDS = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}
GEMMA = GROUPED | ENDS | {"head_dim": 16}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 32} | ENDS
BERT = DECODER | {"pad_token_id": 0}
T5 = {
    "vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2,
    "decoder_start_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", GROUPED | {"head_dim": 16}),
    "mistral": ("MistralForCausalLM", "MistralConfig", GROUPED),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", GEMMA),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", GEMMA),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA),
    "olmo": ("OlmoForCausalLM", "OlmoConfig", GROUPED | ENDS),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", DECODER),
    "falcon": ("FalconForCausalLM", "FalconConfig", DECODER),
    "bert": ("BertForMaskedLM", "BertConfig", BERT),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", BERT | {"max_position_embeddings": 40}),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", GROUPED | {"num_local_experts": 4}),
}
"""The class of the model, that of its config, and sizes."""


def model_of(family: str, **sizes: Any) -> nn.Module:
    """A model of a family, always with the same weights, without dropout."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    kind, config, tiny = FAMILIES[family]
    made = getattr(transformers, config)(**tiny | sizes)
    for name in [name for name in vars(made) if name.endswith(("dropout", "dropout_rate", "pdrop", "dropout_prob"))]:
        setattr(made, name, 0.0)
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, kind)(made)
    return model


def loss_of(model: nn.Module, seed: int = 0) -> Tensor:
    """The loss of a batch (4, 16) that repeats itself, so that it can be learnt."""
    tokens = 2 + (torch.arange(16) * torch.tensor([[1], [3], [5], [7]]) + seed) % (VOCABULARY - 2)
    loss: Tensor = model(input_ids=tokens, labels=tokens).loss
    return loss


def stored(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A copy of every parameter, codes too, by name."""
    return ((name, param.detach().clone()) for name, param in model.named_parameters())
