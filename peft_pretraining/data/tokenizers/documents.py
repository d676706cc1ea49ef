"""The tokenizer of a run: it converts texts to the ids of documents, with bos and eos.

A text never yields a special token: the name of one in a document ("</s>", "<extra_id_0>") is split into ordinary
pieces, or dropped if the vocabulary has it as a piece of text. So T5's 100 extra ids need no rows in the embedding:
`vocab_size` is 32,000 although its file lists 32,100.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from peft_pretraining.data.tokenizers.encoders import Encoder
from peft_pretraining.errors import UserError

_PROBE = "The quick brown fox, 1234.5 naïve façades — \n\tdef f(x): return x**2  # 北京 \U0001f600"
# Where only the beginning of a document is needed a prefix is tokenized. The last tokens of a prefix may differ from
# those of the whole text (".\n" can be one token), so this many are never used.
_PREFIX_MARGIN = 16
_PREFIX_CHARS_PER_TOKEN = 6
_BOS_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[CLS]")


class Added(NamedTuple):
    """Whether a bos and an eos token are added to each document."""

    bos: bool | None = None
    """--add_bos; None: as the tokenizer's files define."""
    eos: bool = True
    """--add_eos."""


AS_USUAL = Added()


class Tokenizer:
    """Converts text to ids; thread-safe. `encode` and `encode_beginnings` add no special tokens."""

    def __init__(
        self,
        encoders: Sequence[Encoder],
        name: str,
        settings: Mapping[str, str | bool] | None = None,
        added: Added = AS_USUAL,
    ) -> None:
        """`encoders` yield the same ids; the first of them is used. tokenizer.json defines which tokens are special.

        `settings`: those of tokenizer_config.json: bos_token, eos_token, pad_token, unk_token, add_bos_token. Raises
        UserError if the vocabulary lacks a token that is to be added.
        """
        self.name = name
        self._encoders, self._encoder = tuple(encoders), encoders[0]
        vocabulary = next((encoder for encoder in encoders if encoder.name == "tokenizers"), encoders[0])
        self._vocabulary = vocabulary
        named = {role: (settings or {}).get(f"{role}_token") for role in ("bos", "eos", "pad", "unk")}
        tokens = vocabulary.roles() | {role: token for role, token in named.items() if isinstance(token, str)}
        ids = {role: vocabulary.token_id(token) for role, token in tokens.items()}
        self.bos_token_id: int | None = self._bos(vocabulary, settings or {}, added.bos, ids.get("bos"))
        """The token that is added before each document, or None."""
        self.eos_token_id: int | None = ids.get("eos") if added.eos else None
        """The token that is added after each document, or None."""
        if added.eos and self.eos_token_id is None:
            raise UserError(
                f"--tokenizer {name}: it has no end-of-sequence token ({tokens.get('eos', 'such as </s>')}), which "
                "has to end every document. Name one as eos_token in tokenizer_config.json beside it, or give "
                "--no-add_eos."
            )
        self.unk_token_id: int | None = ids.get("unk")
        """The token for text that the vocabulary has no other piece for, or None."""
        special, added_ids = vocabulary.special_ids(), [self.bos_token_id, self.eos_token_id]
        pads = [ids.get("pad"), self._usual_pad(vocabulary)]
        self.own_pad_token_id: int | None = next((pad for pad in pads if pad is not None), None)
        """The vocabulary's token for padding, or None."""
        # Padding is masked by length, so that without a padding token any other will do.
        pads = [self.own_pad_token_id, self.eos_token_id, self.bos_token_id, 0]
        self.pad_token_id: int = next(pad for pad in pads if pad is not None)
        never_in_text = frozenset(special | {i for i in added_ids if i is not None})
        self._dropped = {encoder.name: encoder.may_spell(never_in_text) for encoder in encoders}
        self._before = [] if self.bos_token_id is None else [self.bos_token_id]
        self._after = [] if self.eos_token_id is None else [self.eos_token_id]
        self.vocab_size: int = max([*vocabulary.text_ids(), *self._before, *self._after, self.pad_token_id]) + 1
        """One more than the largest id that can occur in a batch."""

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text."""
        return self._encode(self._encoder, texts)

    def encode_beginnings(self, texts: list[str], count: int) -> list[list[int]]:
        """The first `count` ids of each text, without tokenizing the rest of a long one.

        A long text is cut before a white-space character, and again further on if that yields too few ids.
        """
        encoded: list[list[int]] = [[]] * len(texts)
        pending, length = list(range(len(texts))), count * _PREFIX_CHARS_PER_TOKEN
        while pending:
            prefixes = [_prefix(texts[i], length) for i in pending]
            short = []
            for i, prefix, ids in zip(pending, prefixes, self.encode(prefixes), strict=True):
                encoded[i] = ids[:count]
                if len(prefix) < len(texts[i]) and len(ids) < count + _PREFIX_MARGIN:
                    short.append(i)
            pending, length = short, length + length // 2 + 1
        return encoded

    def encode_documents(self, texts: list[str], max_length: int | None = None) -> list[list[int]]:
        """The ids of each document with bos and eos, cut to `max_length` including these.

        Empty for a text without ids of its own, such as one of zero-width characters. Raises UserError if `max_length`
        leaves no room for an id of the text.
        """
        if max_length is None:
            encoded = self.encode(texts)
        else:
            room = max_length - len(self._before) - len(self._after)
            if room < 1:
                raise UserError(
                    f"--max_length {max_length} has no room for text beside the tokens that begin and end a document: "
                    f"give at least {max_length + 1 - room}."
                )
            encoded = self.encode_beginnings(texts, room)
        for ids in encoded:
            if ids:
                ids[:0] = self._before
                ids += self._after
        return encoded

    def decode(self, batch: list[list[int]]) -> list[str]:
        """The text of each list of ids."""
        return self._encoder.decode(batch)

    def save(self, path: Path) -> None:
        """Write tokenizer.json, or the .model file where there is none."""
        path.write_bytes(self._vocabulary.serialized())

    @property
    def vocabulary(self) -> Encoder:
        """The encoder that knows all tokens and their roles: that of tokenizer.json, if there is one."""
        return self._vocabulary

    @property
    def encoder(self) -> str:
        """The library that encodes: "tokenizers" or "sentencepiece"."""
        return self._encoder.name

    def fingerprint(self) -> str:
        """A hash of the ids of a fixed sentence, by which a resumed run detects another tokenizer."""
        return self._fingerprint(self._encoder)

    def resume_as(self, fingerprint: str) -> bool:
        """Use the encoder of the run that saved this fingerprint; returns False if it used another tokenizer.

        For a resumed run: the first encoder depends on installed packages and on the files beside the tokenizer.
        """
        of_sentence, _, of_pieces = fingerprint.partition("-")
        if of_pieces and of_pieces != self._hash_of_pieces():
            return False
        for encoder in self._encoders:
            if self._fingerprint(encoder) == of_sentence:
                self._encoder = encoder
                return True
        return False

    def describe(self) -> str:
        """A line for the log: its kind and size, the library that encodes, and the tokens that are added."""
        added = [
            f"{self._vocabulary.piece(token_id)} {verb} each document"
            for token_id, verb in ((self.bos_token_id, "begins"), (self.eos_token_id, "ends"))
            if token_id is not None
        ]
        return (
            f"{self.name}: {self._vocabulary.kind} of {self.vocab_size:,} ids, encoded by {self.encoder}; "
            f"{' and '.join(added) or 'nothing is added to documents'}"
        )

    def _encode(self, encoder: Encoder, texts: list[str]) -> list[list[int]]:
        encoded = encoder.encode(texts)
        if dropped := self._dropped[encoder.name]:
            for i, ids in enumerate(encoded):
                if not dropped.isdisjoint(ids):
                    encoded[i] = [token for token in ids if token not in dropped]
        return encoded

    def _fingerprint(self, encoder: Encoder) -> str:
        parts: list[int | str] = [*self._encode(encoder, [_PROBE])[0], *self._after, self.vocab_size]
        # Later additions are left out where they have their defaults, so that old checkpoints match.
        parts += [] if encoder.name == "tokenizers" else [encoder.name]
        parts += [f"bos {self.bos_token_id}"] if self._before else []
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def _hash_of_pieces(self) -> str:
        """A hash of the vocabulary; two trained tokenizers may yield the same ids for the fixed sentence."""
        pieces = [self._vocabulary.piece(i) for i in range(self.vocab_size)]
        return hashlib.sha256(repr(pieces).encode()).hexdigest()[:16]

    def _bos(
        self, vocabulary: Encoder, settings: Mapping[str, str | bool], asked: bool | None, named: int | None
    ) -> int | None:
        """The id of the token before each document, or None."""
        own = vocabulary.begins_with()
        by_itself = settings.get("add_bos_token")
        if not (asked if asked is not None else by_itself if isinstance(by_itself, bool) else bool(own)):
            return None
        usual = (vocabulary.token_id(name) for name in _BOS_NAMES)
        found = next((i for i in (named, *own[:1], *usual) if i is not None), None)
        if found is None and asked:
            raise UserError(
                f"--add_bos: the tokenizer {self.name} has no token that begins a document; leave the flag "
                "out, or name one as bos_token in tokenizer_config.json beside the tokenizer."
            )
        return found

    @staticmethod
    def _usual_pad(vocabulary: Encoder) -> int | None:
        token = vocabulary.roles().get("pad")
        return None if token is None else vocabulary.token_id(token)


def check_vocabulary(tokenizer_size: int, model_vocab: int, are_ids: bool = False) -> None:
    """Raise UserError if ids of the tokenizer, or of token files (`are_ids`), exceed the model's vocabulary."""
    if tokenizer_size <= model_vocab:
        return
    has = "--dataset: its token files have" if are_ids else "--tokenizer yields"
    other = "tokenize the text with a smaller tokenizer" if are_ids else "choose a smaller tokenizer"
    raise UserError(
        f"{has} ids up to {tokenizer_size - 1}, but the model of --model_config has a vocabulary of {model_vocab}: set "
        f"vocab_size in the config to at least {tokenizer_size}, or {other}."
    )


def _prefix(text: str, length: int) -> str:
    """The text up to white space after at most `length` characters; the whole text if there is none."""
    if len(text) <= length:
        return text
    cut = length
    while cut > length // 2 and not (text[cut].isspace() and not text[cut - 1].isspace()):
        cut -= 1
    return text[:cut] if cut > length // 2 else text
