"""transformers' LLaMA behind our call signature."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_pretraining.errors import UserError
from peft_pretraining.models.config import read_config_json
from peft_pretraining.models.head import CausalLMOutput, head_output
from peft_pretraining.models.network import CausalLM


class HFCausalLM(CausalLM):
    """transformers' LLaMA behind our call signature, with transformers' state-dict keys and our loss."""

    matrix_names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

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
        """See `CausalLM`; for every layer, else ValueError."""
        if every != 1:
            raise ValueError(f"transformers' model recomputes every layer, not every {every}")
        arguments = {"use_reentrant": False, "preserve_rng_state": False}
        if hasattr(self.model, "activation_checkpointing_enable"):  # the name since transformers 5.2x
            self.model.activation_checkpointing_enable(arguments)
        else:
            self.model.gradient_checkpointing_enable(arguments)

    def keep_int8_activations(self) -> None:
        """UserError: transformers' layers cannot."""
        raise UserError("transformers' LLaMA keeps its activations as they are: build the project's own")

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> CausalLMOutput:
        """See `CausalLM`."""
        hidden = self.model(input_ids=input_ids, use_cache=False).last_hidden_state
        return head_output(hidden, self.lm_head, labels)
