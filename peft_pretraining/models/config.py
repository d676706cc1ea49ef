"""What a model's configuration says to the rest of the program; its file is Hugging Face's `config.json`.

Read before torch is loaded: checks of the command line, recipes and the memory plan need sizes alone.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from peft_pretraining.errors import UserError
from peft_pretraining.models.config_files import shipped_configs
from peft_pretraining.models.config_source import IN_STATE, STATE, config_path

HARMLESS = frozenset({
    "architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "use_cache", "name_or_path",
    "pretraining_tp", "auto_map", "output_attentions", "output_hidden_states", "return_dict",
    "return_dict_in_generate", "output_scores", "torchscript", "tokenizer_class", "attn_implementation",
    "gradient_checkpointing", "unsloth_version", "unsloth_fixed", "id2label", "label2id", "num_labels", "problem_type",
    "finetuning_task", "task_specific_params", "prefix", "sep_token_id", "decoder_start_token_id",
    "forced_bos_token_id", "forced_eos_token_id", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens",
    "max_length", "min_length", "do_sample", "temperature", "top_k", "top_p", "typical_p", "num_beams",
    "num_beam_groups", "diversity_penalty", "num_return_sequences", "length_penalty", "early_stopping",
    "repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "remove_invalid_values",
    "exponential_decay_length_penalty", "chunk_size_feed_forward", "is_decoder", "is_encoder_decoder",
    "cross_attention_hidden_size", "add_cross_attention", "tie_encoder_decoder", "pruned_heads", "tf_legacy_loss",
    "use_bfloat16", "is_llama_config", "transformers.js_config",
})  # fmt: skip
"""Keys of a config.json that say nothing about the computation of a model that is trained here."""
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


def is_of_mlp(name: str) -> bool:
    """Whether `--mlp_rank` is for a decoder matrix of this dotted name in its layer or model: one in a module mlp."""
    return ".mlp." in f".{name}"


def rank_problems(
    source: str,
    layers: int,
    shapes: Mapping[str, tuple[int, ...]],
    ranks: Sequence[int | str],
    mlp_ranks: Sequence[int | str] = (),
) -> list[str]:
    """List which ranks of parts of the layers do not fit a model, in sentences. A word is no such rank.

    None may exceed the smaller side of a decoder matrix, and there are at most as many as layers. source: the file of
    the configuration; shapes: of decoder matrices by name; mlp_ranks: of `is_of_mlp`, empty for the same.
    """
    problems = []
    for flag, given, of_mlp in (("rank", ranks, False), ("mlp_rank", mlp_ranks, True)):
        its_own = {name: shape for name, shape in shapes.items() if not mlp_ranks or is_of_mlp(name) == of_mlp}
        if not given or not its_own:
            continue
        name, shape = min(its_own.items(), key=lambda item: min(item[1]))
        if too_large := [rank for rank in given if isinstance(rank, int) and rank > min(shape)]:
            size = " x ".join(map(str, shape))
            problems.append(f"--{flag} is {too_large[0]}, but {name} of {source} is {size}: give at most {min(shape)}.")
        if len(given) > layers:
            problems.append(
                f"--{flag} has {len(given)} ranks for parts of the layers, and {source} has {layers} layers: give at "
                "most so many."
            )
    return problems


def check_method_rank(config: ModelConfig, rank: int | str) -> None:
    """Refuse factors that are no smaller than a decoder matrix: UserError. A word is no rank."""
    name, shape = min(config.matrix_shapes().items(), key=lambda item: min(item[1]))
    if isinstance(rank, int) and rank >= min(shape):
        raise UserError(too_high_for_factors(rank, name, config.source, shape))


def too_high_for_factors(rank: int, name: str, source: object, shape: tuple[int, ...]) -> str:
    """A sentence on a rank whose factors would be no smaller than a decoder matrix; name: that of the matrix."""
    return (
        f"--rank is {rank}, but {name} of {source} is {' x '.join(map(str, shape))}, and factors of that rank would "
        f"save nothing: give less than {min(shape)}."
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


def read_config_json(name: str | Path, flag: str = "--model_config") -> dict[str, Any]:
    """The JSON object of the config that `--model_config` names (`config_path`); raises UserError if there is none.

    flag: the flag that the name is from, for the text.
    """
    path = config_path(name, flag)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{flag} {name}: no such file; give a config.json, a folder that has one, the name of a model on the hub "
            f"(ORGANISATION/NAME), or a size of configs/: {', '.join(shipped_configs())}."
        ) from None
    except OSError as error:
        raise UserError(f"{flag} {name}: cannot be read ({error.strerror}); give a JSON file.") from None
    except ValueError as error:
        raise UserError(f"{flag} {name}: not JSON ({error}); give a Hugging Face config.json.") from None
    if path.name == STATE and isinstance(raw, dict):
        raw = raw.get(IN_STATE, raw)
    if not isinstance(raw, dict):
        raise UserError(f"{flag} {name}: holds a JSON {type(raw).__name__}; a config.json is an object.")
    return raw
