"""A common interface of the two libraries that convert text to ids: `tokenizers` and `sentencepiece`.

For a unigram vocabulary such as T5's, sentencepiece is eight times as fast as tokenizers (2.1 against 0.27 million ids
per second of processor time on C4). It yields the same ids but for a few documents in a thousand, in which two ways to
split a word have equal scores, or which contain the name of a special token. For BPE the speeds are about equal. So a
tokenizer that has both uses sentencepiece for a unigram vocabulary, after `same_vocabulary` has shown that both files
have the same.

Both release the GIL while they encode, and may be called from several threads.
"""

import json
from collections.abc import Iterable
from typing import Any, Protocol

_SPECIAL_NAMES = {"unk": ("<unk>", "[UNK]"), "pad": ("<pad>", "[PAD]", "<|padding|>")}
_EOS_NAMES = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|eot_id|>", "[SEP]")
PROBES = (
    "The quick brown fox, 1234.5 naïve façades — \n\tdef f(x): return x**2  # 北京 \U0001f600",
    " two  spaces and\ttabs\r\n\r\nlines\n",
    "ﬁne ½ ™ Å ＡＢＣ １２３ ｶﾞ ① …",
    "e\u0301 a\u0308 \u00a0 \u200b \u00ad \u2028 zero\ufeffwidth",
    "Straße Ελλάδα Привет العربية हिन्दी ไทย 한국어 日本語",
    'https://example.org/a_b?c=d&e=%20 <b>x</b> \\frac{1}{2} {"k": [1, 2]}',
    "don't can't we'll DON'T mother-in-law's 3rd 1990s $5.00 #tag @name",
    "aaaaaaa xyzzyqwv supercalifragilisticexpialidocious \\t (a) [b] {c} <d> ~e^f|g",
)
"""Texts by which two encoders of one vocabulary are compared."""


class Encoder(Protocol):
    """Converts text to ids with one library."""

    name: str
    """Of the library."""
    kind: str
    """Of the vocabulary, for the log: unigram, BPE, byte-level BPE."""

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, without added tokens."""

    def decode(self, batch: list[list[int]]) -> list[str]:
        """The text of each list of ids."""

    def token_id(self, token: str) -> int | None:
        """The id of a piece by its name."""

    def piece(self, token_id: int) -> str:
        """The name of a piece by its id."""

    def special_ids(self) -> set[int]:
        """The ids of special tokens, without that of the unknown piece."""

    def text_ids(self) -> set[int]:
        """The ids of pieces of text."""

    def may_spell(self, ids: frozenset[int]) -> frozenset[int]:
        """Those of the given special ids that `encode` might return for a text with their names in it."""

    def begins_with(self) -> list[int]:
        """The ids that the tokenizer by default puts before a text."""

    def roles(self) -> dict[str, str]:
        """The names of the tokens for "bos", "eos", "pad" and "unk", as far as the vocabulary defines them."""

    def serialized(self) -> bytes:
        """The contents of its file."""


class TokenizersEncoder:
    """An encoder with a `tokenizers.Tokenizer`, from tokenizer.json."""

    name = "tokenizers"

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True
        model = type(backend.model).__name__
        byte_level = "ByteLevel" in repr(backend.pre_tokenizer)
        self.kind = {"Unigram": "unigram", "BPE": "byte-level BPE" if byte_level else "BPE"}.get(model, model)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """See `Encoder.encode`."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, batch: list[list[int]]) -> list[str]:
        """See `Encoder.decode`."""
        return list(self._backend.decode_batch(batch))

    def token_id(self, token: str) -> int | None:
        """See `Encoder.token_id`."""
        found = self._backend.token_to_id(token)
        return None if found is None else int(found)

    def piece(self, token_id: int) -> str:
        """See `Encoder.piece`."""
        return str(self._backend.id_to_token(token_id))

    def special_ids(self) -> set[int]:
        """See `Encoder.special_ids`."""
        special = {i for i, token in self._backend.get_added_tokens_decoder().items() if token.special}
        return special - {self.token_id(name) for name in _SPECIAL_NAMES["unk"]}

    def text_ids(self) -> set[int]:
        """See `Encoder.text_ids`."""
        special = {i for i, token in self._backend.get_added_tokens_decoder().items() if token.special}
        return set(self._backend.get_vocab(True).values()) - special

    def may_spell(self, ids: frozenset[int]) -> frozenset[int]:
        """See `Encoder.may_spell`: a unigram vocabulary lists its special tokens among the ordinary pieces."""
        return ids

    def begins_with(self) -> list[int]:
        """See `Encoder.begins_with`."""
        bare, whole = (self._backend.encode("a", add_special_tokens=added).ids for added in (False, True))
        starts = range(len(whole) - len(bare) + 1)
        return next((whole[:i] for i in starts if bare and whole[i : i + len(bare)] == bare), [])

    def roles(self) -> dict[str, str]:
        """See `Encoder.roles`: the usual names that are in the vocabulary."""
        names = {"eos": _EOS_NAMES, **_SPECIAL_NAMES}
        return {
            role: found
            for role, candidates in names.items()
            if (found := next((name for name in candidates if self.token_id(name) is not None), ""))
        }

    def serialized(self) -> bytes:
        """See `Encoder.serialized`."""
        return str(self._backend.to_str()).encode()

    def pieces(self) -> list[tuple[str | None, float | None]]:
        """(name, score) of each id; only a unigram vocabulary has scores."""
        if self.kind == "unigram":
            return [(name, score) for name, score in json.loads(self.serialized())["model"]["vocab"]]
        return [(self._backend.id_to_token(i), None) for i in range(self._backend.get_vocab_size(False))]

    def plain_added_tokens(self) -> set[str]:
        """The added tokens that are not special, which are matched in texts."""
        return {token.content for token in self._backend.get_added_tokens_decoder().values() if not token.special}


class SentencePieceEncoder:
    """An encoder with a `sentencepiece.SentencePieceProcessor`, from a .model file."""

    name = "sentencepiece"

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self.size: int = processor.get_piece_size()
        scores = [processor.get_score(i) for i in range(self.size) if not self._is_reserved(i)]
        # The scores of a BPE vocabulary count its pieces down: 0, -1, -2.
        self.kind = "BPE" if all(score == int(score) for score in scores) else "unigram"

    def encode(self, texts: list[str]) -> list[list[int]]:
        """See `Encoder.encode`."""
        # One text per call: a batch would start threads of its own, beside those of the loader.
        encode = self._processor.encode
        return [encode(text, out_type=int, add_bos=False, add_eos=False) for text in texts]

    def decode(self, batch: list[list[int]]) -> list[str]:
        """See `Encoder.decode`."""
        return [self._processor.decode(ids) for ids in batch]

    def token_id(self, token: str) -> int | None:
        """See `Encoder.token_id`."""
        found = int(self._processor.piece_to_id(token))
        return found if self._processor.id_to_piece(found) == token else None

    def piece(self, token_id: int) -> str:
        """See `Encoder.piece`."""
        return str(self._processor.id_to_piece(token_id))

    def special_ids(self) -> set[int]:
        """See `Encoder.special_ids`."""
        return {i for i in range(self.size) if self._processor.is_control(i) or self._processor.is_unused(i)}

    def text_ids(self) -> set[int]:
        """See `Encoder.text_ids`."""
        return set(range(self.size)) - self.special_ids()

    def may_spell(self, ids: frozenset[int]) -> frozenset[int]:
        """See `Encoder.may_spell`: pieces that only tokenizer_config.json, and not the file, defines as special."""
        return ids & self.text_ids()

    def begins_with(self) -> list[int]:
        """See `Encoder.begins_with`: not defined in the file; BPE models with a bos, such as LLaMA's, begin with it."""
        bos = self._processor.bos_id()
        return [bos] if bos >= 0 and self.kind == "BPE" else []

    def roles(self) -> dict[str, str]:
        """See `Encoder.roles`."""
        processor = self._processor
        ids = {role: getattr(processor, f"{role}_id")() for role in ("bos", "eos", "pad", "unk")}
        return {role: processor.id_to_piece(i) for role, i in ids.items() if i >= 0}

    def serialized(self) -> bytes:
        """See `Encoder.serialized`."""
        return bytes(self._processor.serialized_model_proto())

    def pieces(self) -> list[tuple[str, float]]:
        """(name, score) of each id."""
        return [(self._processor.id_to_piece(i), self._processor.get_score(i)) for i in range(self.size)]

    def _is_reserved(self, i: int) -> bool:
        processor = self._processor
        return bool(
            processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i) or processor.is_unused(i)
        )


def same_vocabulary(fast: TokenizersEncoder, other: SentencePieceEncoder) -> bool:
    """Whether both yield the same ids: equal pieces and scores, and equal ids of texts that test normalization."""
    if fast.kind != other.kind or fast.plain_added_tokens() - {name for name, _ in other.pieces()}:
        return False
    theirs, ours = fast.pieces(), other.pieces()
    if len(theirs) < len(ours) or not _equal(theirs, ours, other.special_ids()):
        return False
    probes = list(PROBES)
    return fast.encode(probes) == other.encode(probes)


def _equal(
    theirs: Iterable[tuple[str | None, float | None]], ours: Iterable[tuple[str, float]], special: set[int]
) -> bool:
    # Scores are float32 in one file and decimal in the other; those of special tokens are not used.
    return all(
        name == own and (i in special or score is None or abs(score - own_score) <= 1e-5 * max(1.0, abs(own_score)))
        for i, ((name, score), (own, own_score)) in enumerate(zip(theirs, ours, strict=False))
    )
