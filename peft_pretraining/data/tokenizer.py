"""The tokenizer: t5-base from the hub, a directory, a file, or a small BPE of our own (`OwnBPE`).

It is the `tokenizers` library's own object, read from `tokenizer.json`: rebuilding one through transformers depends on
that library's version and takes five seconds to import. A special token never comes out of a text: one that is spelled
in a document ("</s>", "<extra_id_0>") becomes pieces of ordinary text, or is dropped where the vocabulary has it as a
piece. So T5's 100 extra ids need no rows in the embedding: `vocab_size` is 32,000 although the file lists 32,100.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from peft_pretraining.data.cache import cache_dir, publish
from peft_pretraining.data.sources.documents import Damage
from peft_pretraining.data.sources.kind import DEFAULT_OPTIONS, OwnBPE, TextKind
from peft_pretraining.data.sources.registry import find_kind
from peft_pretraining.errors import UserError

_EOS_CANDIDATES = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|eot_id|>", "[SEP]")
_UNK_CANDIDATES = ("<unk>", "[UNK]")
_PAD_CANDIDATES = ("<pad>", "[PAD]", "<|padding|>")
_PROBE = "The quick brown fox, 1234.5 naïve façades — \n\tdef f(x): return x**2  # 北京 \U0001f600"
# A prefix of a document is tokenised first where only its beginning is needed; the last tokens of a prefix may differ
# from those of the whole text (".\n" can be one token), so this many are never used.
_PREFIX_MARGIN = 16
_PREFIX_CHARS_PER_TOKEN = 6


class Tokenizer:
    """Text to ids. `encode` and `encode_beginnings` add no special tokens and may be called from several threads."""

    def __init__(self, backend: Any, name: str, eos_token: str | None, pad_token: str | None) -> None:
        self._backend = backend
        self.name = name
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True
        self.eos_token_id: int = _token_id(backend, name, eos_token, _EOS_CANDIDATES)
        # Padding is masked by length, so a tokenizer without a padding token pads with anything.
        pads = [backend.token_to_id(token) for token in (pad_token, *_PAD_CANDIDATES) if token is not None]
        self.pad_token_id: int = next((pad for pad in pads if pad is not None), self.eos_token_id)
        special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        unknown = {backend.token_to_id(token) for token in _UNK_CANDIDATES}
        self._never_in_text = frozenset(special - unknown)
        text_ids = [i for i in backend.get_vocab(True).values() if i not in special]
        self.vocab_size: int = max([*text_ids, self.eos_token_id, self.pad_token_id]) + 1
        """One more than the largest id that can occur in a batch."""

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text."""
        encoded: list[list[int]] = [
            encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)
        ]
        for i, ids in enumerate(encoded):
            # A Unigram vocabulary such as T5's lists its special tokens among the ordinary pieces, and finds them in a
            # text.
            if not self._never_in_text.isdisjoint(ids):
                encoded[i] = [token for token in ids if token not in self._never_in_text]
        return encoded

    def encode_beginnings(self, texts: list[str], count: int) -> list[list[int]]:
        """The first `count` ids of each text, without tokenising the rest of a long one.

        A long text is cut before a white-space character, and tokenised whole if that gave too few ids.
        """
        prefixes = [_prefix(text, count * _PREFIX_CHARS_PER_TOKEN) for text in texts]
        encoded = self.encode(prefixes)
        short = [
            i
            for i, text in enumerate(texts)
            if len(prefixes[i]) < len(text) and len(encoded[i]) < count + _PREFIX_MARGIN
        ]
        for i, ids in zip(short, self.encode([texts[i] for i in short]), strict=True):
            encoded[i] = ids
        return [ids[:count] for ids in encoded]

    def decode(self, batch: list[list[int]]) -> list[str]:
        """Text of each list of ids, for people to read."""
        return list(self._backend.decode_batch(batch))

    def save(self, path: Path) -> None:
        """Write tokenizer.json."""
        path.write_text(self._backend.to_str(), encoding="utf-8")

    def fingerprint(self) -> str:
        """A hash of how a fixed sentence is tokenised: two tokenizers that differ would make a resumed order wrong."""
        ids = [*self.encode([_PROBE])[0], self.eos_token_id, self.vocab_size]
        return hashlib.sha256(repr(ids).encode()).hexdigest()[:16]


def load_tokenizer(name_or_path: str, dataset: str) -> Tokenizer:
    """The tokenizer that --tokenizer names; "" takes the default of --dataset, which holds text. Raises UserError."""
    if name_or_path:
        return _named_tokenizer(name_or_path)
    kind = find_kind(dataset)
    if not isinstance(kind, TextKind):
        raise ValueError(f"--dataset {dataset} holds token ids and needs no tokenizer")
    if isinstance(kind.default_tokenizer, OwnBPE):
        return _own_tokenizer(kind.default_tokenizer, kind, dataset)
    return _named_tokenizer(kind.default_tokenizer)


def _named_tokenizer(name: str) -> Tokenizer:
    """From a directory, a file, or the hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        return _from_files(name, path / "tokenizer.json", path)
    if path.is_file():
        return _from_files(name, path, path.parent)
    if name.count("/") > 1 or name.startswith((".", "~", "/")):
        raise UserError(
            f"--tokenizer {name}: no such file or directory. Give a directory that holds tokenizer.json, or a hub name."
        )
    return _from_hub(name)


def check_vocabulary(tokenizer_size: int, model_vocab: int) -> None:
    """Raise UserError if the tokenizer can yield an id that the model's embedding lacks."""
    if tokenizer_size > model_vocab:
        raise UserError(
            f"--tokenizer yields ids up to {tokenizer_size - 1}, but the model of --model_config has a vocabulary of "
            f"{model_vocab}: set vocab_size in the config to at least {tokenizer_size}, or choose a smaller tokenizer."
        )


def _prefix(text: str, length: int) -> str:
    if len(text) <= length:
        return text
    cut = length
    while cut > length // 2 and not (text[cut].isspace() and not text[cut - 1].isspace()):
        cut -= 1
    return text[:cut] if cut > length // 2 else text


def _token_id(backend: Any, name: str, token: str | None, candidates: tuple[str, ...]) -> int:
    for candidate in (token,) if token is not None else candidates:
        if (token_id := backend.token_to_id(candidate)) is not None:
            return int(token_id)
    wanted = repr(token) if token is not None else " or ".join(candidates)
    raise UserError(
        f"--tokenizer {name}: it has no end-of-sequence token ({wanted}), which has to end every document. "
        "Name one as eos_token in tokenizer_config.json beside tokenizer.json."
    )


def _from_files(name: str, file: Path, folder: Path) -> Tokenizer:
    from tokenizers import Tokenizer as Backend

    if not file.is_file():
        raise UserError(
            f"--tokenizer {name}: {file} is missing. Save the tokenizer with save_pretrained() of a fast tokenizer."
        )
    try:
        backend = Backend.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise UserError(
            f"--tokenizer {name}: {file} is not a tokenizer.json of the tokenizers library ({error})."
        ) from error
    settings: dict[str, Any] = {}
    for config in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / config).is_file():
            try:
                settings.update(json.loads((folder / config).read_text(encoding="utf-8")))
            except ValueError as error:
                raise UserError(f"--tokenizer {name}: {folder / config} is not JSON ({error}).") from error
    return Tokenizer(backend, name, _content(settings.get("eos_token")), _content(settings.get("pad_token")))


def _content(token: Any) -> str | None:
    """Special tokens are written as a string or as {"content": ...}."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _from_hub(name: str) -> Tokenizer:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        file = Path(hf_hub_download(name, "tokenizer.json"))
        for config in ("special_tokens_map.json", "tokenizer_config.json"):
            try:
                hf_hub_download(name, config)
            except EntryNotFoundError:
                continue
    except Exception as error:  # missing repository, no network, no permission: all mean the same to the user
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--tokenizer {name}: it is no local directory and could not be fetched from the hub ({reason}). "
            "Check the name and the network, or give a directory that holds tokenizer.json."
        ) from error
    return _from_files(name, file, file.parent)


def _own_tokenizer(own: OwnBPE, kind: TextKind, dataset: str) -> Tokenizer:
    """Trained once on the training documents of a data set and cached under their hash."""
    from tokenizers import Tokenizer as Backend

    source = kind.open(dataset, "train", DEFAULT_OPTIONS)
    texts = [
        item for shard in range(source.shards) for item in source.read(shard, 1, 0, 0) if not isinstance(item, Damage)
    ]
    digest = hashlib.sha256("\0".join(texts).encode("utf-8", "replace")).hexdigest()[:16]
    path = cache_dir() / f"{own.name}-{own.vocab_size}-{digest}.json"
    if path.is_file():
        try:
            return Tokenizer(Backend.from_file(str(path)), own.name, "</s>", "<pad>")
        except Exception:  # the library raises bare Exception; a damaged cache file is made again
            path.unlink()
    content = publish(path, train_bpe(texts, own.vocab_size).encode())
    return Tokenizer(Backend.from_str(content.decode()), own.name, "</s>", "<pad>")


def train_bpe(texts: list[str], vocab_size: int) -> str:
    """tokenizer.json of a byte-level BPE; pad 0, eos 1. The same texts give the same file."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return str(backend.to_str())
