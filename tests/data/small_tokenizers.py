"""Small tokenizers of every kind, made on the spot."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from tests.data.conftest import document

TEXTS = [document(i) for i in range(200)] + [
    f"The {a} {b}s {c} over it, {n} times; naïve – “{a}{b}” (x_{n}) = {n * n}.0!"
    for n, (a, b, c) in enumerate(
        (a, b, c)
        for a in ("quick", "lazy", "brown", "small", "tall")
        for b in ("fox", "dog", "cat", "tokenizer", "model")
        for c in ("jump", "walk", "read", "learn")
    )
]
AWKWARD = [
    "", " ", "x",
    "naïve \x00 NUL \x01\x02\x1c\x85 controls", "  two  spaces\t\ttabs\r\n\nlines ", "北京 \U0001f600 unknown ☃☃☃",
    "word " * 3000, "w" * 5000, "\u200b\u00ad\ufeff", "e\u0301" * 40, "▁a ▁▁b", "a.\n\n" * 700, document(5) * 40,
]  # fmt: skip
"""Texts that two encoders might take in two ways."""


def write_model(folder: Path, kind: str, name: str, vocab_size: int = 300, **options: Any) -> Path:
    """A sentencepiece model "unigram", as T5's, or "bpe", as LLaMA's; returns its path."""
    special: dict[str, Any] = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    if kind == "bpe":
        special = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1, "byte_fallback": True, "vocab_size": 600}
    settings: dict[str, Any] = {
        "vocab_size": vocab_size, "model_type": kind, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "hard_vocab_limit": False, "minloglevel": 2, "num_threads": 1,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    prefix = str(folder / "training")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=prefix, **settings | special | options
    )
    (folder / "training.vocab").unlink()
    return (folder / "training.model").rename(folder / name)


def write_unigram_json(model: Path, path: Path, scores: float = 1.0) -> None:
    """The tokenizer.json of a unigram .model, its scores multiplied."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    pieces = [(processor.id_to_piece(i), processor.get_score(i) * scores) for i in range(processor.get_piece_size())]
    backend = Backend(models.Unigram([*pieces, ("<extra_id_0>", 0.0)], unk_id=2, byte_fallback=False))
    # Metaspace alone would put no space before a text that begins with one, and sentencepiece does.
    backend.normalizer = normalizers.Prepend("▁")
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("<pad>", "</s>", "<unk>", "<extra_id_0>")])
    backend.save(str(path))


def byte_level(special: Sequence[str], begins_with: str = "") -> Any:
    """A byte-level BPE of 400 pieces as GPT-2's, with a template that begins a text if it is told so."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(special), initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(TEXTS, trainer)
    if begins_with:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{begins_with} $A", special_tokens=[(begins_with, backend.token_to_id(begins_with))]
        )
    return backend
