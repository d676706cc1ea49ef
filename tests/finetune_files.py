"""Small files in the layout of GLUE and MMLU, and small models with a tokenizer, for tests of fine-tuning."""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.small_run import restored_process
from tests.test_trainers_guide import accelerate_state

WORDS = 60
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


@contextlib.contextmanager
def offline(folder: Path) -> Iterator[None]:
    """Let nothing ask the hub, and let `datasets` keep what it has read in a folder; put back what a run changes."""
    with pytest.MonkeyPatch.context() as patch, accelerate_state(), restored_process():
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", str(folder / "cache"))
        gc.freeze()  # the Trainer collects garbage after each run, and looks at what all tests before have left
        yield
        gc.unfreeze()


def sentence(number: int, factor: int = 3, words: int = 6) -> str:
    return " ".join(f"w{(number + factor * i) % WORDS}" for i in range(words))


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_parquet(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)


def write_glue(folder: Path, task: str, columns: Sequence[str], classes: int, validation: Sequence[str]) -> None:
    """Whether the sentence, or the second one, begins with an even word; classes 1: how many words are even."""

    def row(number: int) -> dict[str, Any]:
        texts = [sentence(number + 7 * place, 2 + number % 2) for place in range(len(columns))]
        first = int(texts[-1].split()[0][1:])
        return {**dict(zip(columns, texts, strict=True)), "label": first / 12 if classes == 1 else first % classes}

    write_parquet(folder / task / "train-00000-of-00001.parquet", [row(i) for i in range(24)])
    for split in validation:
        write_lines(folder / task / f"{split}.jsonl", [row(i) for i in range(30, 40)])


def write_mmlu(folder: Path, train: int = 16) -> None:
    """Questions whose answer is the letter of their only word w0."""

    def row(number: int, subject: str) -> dict[str, Any]:
        choices = [f"w{number % WORDS}" if place != number % 4 else "w0" for place in range(4)]
        return {"question": sentence(number), "subject": subject, "choices": choices, "answer": number % 4}

    write_lines(folder / "all" / "auxiliary_train.jsonl", [row(i, "") for i in range(1, 1 + train)])
    write_lines(folder / "all" / "validation.jsonl", [row(i, "high_school_physics") for i in range(41, 49)])


def save_tokenizer(folder: Path) -> int:
    """A tokenizer of words, with its special tokens; returns how many tokens it has."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    rest = [*"ABCD", *(f"{letter}." for letter in "ABCD"), "Answer:", *(f"w{i}" for i in range(WORDS))]
    words = {word: number for number, word in enumerate([*special, *rest])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    named = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "cls_token": "<s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **named).save_pretrained(folder)
    return len(words)


def save_roberta(folder: Path) -> Path:
    """A RoBERTa of random weights, as it is pretrained: without a classifier."""
    from transformers import RobertaConfig, RobertaForMaskedLM

    torch.manual_seed(0)
    vocabulary = save_tokenizer(folder)
    config = RobertaConfig(vocab_size=vocabulary, max_position_embeddings=66, **SIZES)
    RobertaForMaskedLM(config).save_pretrained(folder)
    return folder


def save_llama(folder: Path) -> Path:
    """A LLaMA of random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    vocabulary = save_tokenizer(folder)
    LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, max_position_embeddings=64, **SIZES)).save_pretrained(folder)
    return folder
