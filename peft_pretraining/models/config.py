"""What a model's configuration says to the rest of the program; its file is Hugging Face's `config.json`.

Read before torch is loaded: checks of the command line, recipes and the memory plan need sizes alone.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from peft_pretraining.errors import UserError

HF_HINT = "or pass --use_hf_model, which trains transformers' own class"


class NetworkConfig(Protocol):
    """What is asked of every network's configuration, transformers' own included; names and meanings are theirs."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table."""

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""

    @property
    def num_hidden_layers(self) -> int:
        """Decoder layers."""

    @property
    def initializer_range(self) -> float:
        """Standard deviation of the initial matrices."""


class ModelConfig(NetworkConfig, Protocol):
    """The configuration of one of our own families.

    The memory plan counts a decoder layer as two norms, attention, and a gated MLP, of the sizes that are given here.
    """

    @property
    def model_type(self) -> str:
        """The name of the family, as in the file."""

    @property
    def source(self) -> str:
        """The file that errors name."""

    @property
    def intermediate_size(self) -> int:
        """Width of the MLP."""

    @property
    def num_attention_heads(self) -> int:
        """Heads of the queries."""

    @property
    def num_key_value_heads(self) -> int:
        """Heads of keys and values."""

    @property
    def head_dim(self) -> int:
        """Width of a head."""

    @property
    def max_position_embeddings(self) -> int:
        """Tokens of the longest sequence."""

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the head's weight is the embedding table."""

    def __hash__(self) -> int:
        """Configurations are frozen, and equal ones have one hash."""

    def matrix_shapes(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of each decoder matrix of one layer, by its name in the layer."""

    def other_shapes(self) -> list[tuple[int, ...]]:
        """Of all other trainable tensors of the model: tables, a head of its own, norms."""

    def parameter_count(self) -> int:
        """Trainable values, a tied head counted once."""


def check_length(config: ModelConfig, max_length: int) -> None:
    """Refuse sequences longer than the context: UserError."""
    if max_length > config.max_position_embeddings:
        raise UserError(
            f"--max_length is {max_length}, but {config.source} has max_position_embeddings "
            f"{config.max_position_embeddings}: give at most that, or a config with a longer context."
        )


def check_ranks(config: ModelConfig, ranks: Sequence[int | str], flag: str = "rank") -> None:
    """Refuse ranks of parts of the layers that do not fit the model: UserError. A word is no such rank.

    None may exceed the smaller side of a decoder matrix, and there are at most as many as layers.
    """
    name, shape = min(config.matrix_shapes().items(), key=lambda item: min(item[1]))
    for rank in ranks:
        if isinstance(rank, int) and rank > min(shape):
            size = f"{shape[0]} x {shape[1]}"
            raise UserError(f"--{flag} is {rank}, but {name} of {config.source} is {size}: give at most {min(shape)}.")
    if len(ranks) > config.num_hidden_layers:
        raise UserError(
            f"--{flag} has {len(ranks)} ranks for parts of the layers, and {config.source} has "
            f"{config.num_hidden_layers} layers: give at most so many."
        )


def check_momentum_rank(config: ModelConfig, rank: float) -> None:
    """Refuse factors of momenta that are smaller than no decoder matrix: UserError. rank: or below 1, a share."""
    name, shape = max(config.matrix_shapes().items(), key=lambda item: min(item[1]))
    if rank >= min(shape):
        size = f"{shape[0]} x {shape[1]}"
        raise UserError(
            f"--momentum_rank is {rank:g}, but {name} of {config.source} is {size} and the others are no wider: give "
            f"less than {min(shape)}, or a share of the shorter side such as 1/16."
        )


def read_config_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a model config; raises UserError if there is none."""
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"--model_config {path}: no such file; configs/ holds llama_9m.json to llama_13b.json."
        ) from None
    except OSError as error:
        raise UserError(f"--model_config {path}: cannot be read ({error.strerror}); give a JSON file.") from None
    except ValueError as error:
        raise UserError(f"--model_config {path}: not JSON ({error}); give a Hugging Face config.json.") from None
    if not isinstance(raw, dict):
        raise UserError(f"--model_config {path}: holds a JSON {type(raw).__name__}; a config.json is an object.")
    return raw
