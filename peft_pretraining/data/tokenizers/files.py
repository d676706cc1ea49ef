"""Read a tokenizer from a folder, a file or the hub.

tokenizer.json is read by the `tokenizers` library: through transformers the result would depend on that library's
version, and its import takes five seconds. A .model file is read by sentencepiece, alone or beside tokenizer.json, and
GPT-2's pair of vocab.json and merges.txt by `tokenizers`. tokenizer_config.json beside them names the special tokens.
"""

import json
from pathlib import Path
from typing import Any

from peft_pretraining.data.tokenizers.documents import AS_USUAL, Added, Tokenizer
from peft_pretraining.data.tokenizers.encoders import Encoder, SentencePieceEncoder, TokenizersEncoder, same_vocabulary
from peft_pretraining.errors import UserError

ENCODERS = ("auto", "tokenizers", "sentencepiece")
_JSON = "tokenizer.json"
_MODELS = ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "spm.model")
_PAIR = ("vocab.json", "merges.txt")
_SETTINGS = ("special_tokens_map.json", "tokenizer_config.json")


def named_tokenizer(name: str, added: Added = AS_USUAL, encoder: str = "auto") -> Tokenizer:
    """Read a tokenizer from a folder, a file or the hub. `encoder` is one of ENCODERS. Raises UserError."""
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"--tokenizer {name}: there is no user {name[1:].partition('/')[0]}, whose folder it would be."
        ) from error
    try:
        if path.is_dir():
            return _from_folder(name, path, added, encoder)
        if path.is_file():
            return _from_file(name, path, added, encoder)
    except OSError as error:
        raise UserError(f"--tokenizer {name}: {path} cannot be read ({error.strerror}).") from error
    if name.count("/") > 1 or name.startswith((".", "~", "/")) or path.suffix in (".json", ".model"):
        raise UserError(
            f"--tokenizer {name}: no such file or directory. Give a hub name, a directory that holds {_JSON}, or such "
            "a file or a sentencepiece .model."
        )
    return _from_folder(name, _download(name), added, encoder)


def _from_folder(name: str, folder: Path, added: Added, encoder: str) -> Tokenizer:
    """Read a tokenizer from whichever known files are in a folder."""
    settings = _settings(name, folder)
    if (folder / _JSON).is_file():
        return _tokenizer(name, read_json(name, folder / _JSON), _model_in(folder), settings, added, encoder)
    if (model := _model_in(folder)) is not None:
        return _tokenizer(name, None, model, settings, added, encoder)
    if all((folder / part).is_file() for part in _PAIR):
        return _tokenizer(name, _read_pair(name, folder, settings), None, settings, added, encoder)
    files = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise UserError(
        f"--tokenizer {name}: {folder / _JSON} is missing, and so are a sentencepiece .model and "
        f"{' with '.join(_PAIR)}; it holds {files}. Save the tokenizer with save_pretrained() of a fast tokenizer."
    )


def _from_file(name: str, file: Path, added: Added, encoder: str) -> Tokenizer:
    """Read a tokenizer from a file and the settings beside it."""
    folder, settings = file.parent, _settings(name, file.parent)
    if file.name in _PAIR and all((folder / part).is_file() for part in _PAIR):
        return _tokenizer(name, _read_pair(name, folder, settings), None, settings, added, encoder)
    if file.suffix == ".model":
        return _tokenizer(name, None, file, settings, added, encoder)
    return _tokenizer(name, read_json(name, file), _model_in(folder), settings, added, encoder)


def _tokenizer(
    name: str, fast: TokenizersEncoder | None, model: Path | None, settings: dict[str, Any], added: Added, encoder: str
) -> Tokenizer:
    """Build a tokenizer with the encoders that there are; the preferred one comes first."""
    if encoder not in ENCODERS:
        raise ValueError(f"encoder {encoder!r} is none of {ENCODERS}")
    other: SentencePieceEncoder | None = None
    # BPE is as fast with either library, so there tokenizer.json suffices.
    if model is not None and (fast is None or fast.kind == "unigram" or encoder == "sentencepiece"):
        other = _read_model(name, model, optional=fast is not None and encoder != "sentencepiece")
    if fast is None:
        if other is None or encoder == "tokenizers":
            raise UserError(f"--tokenizer {name}: the encoder tokenizers reads no .model file; give a {_JSON}.")
        return Tokenizer([other], name, settings, added)
    agree = other is not None and same_vocabulary(fast, other)
    if encoder == "sentencepiece" and not agree:
        wrong = f"{model} gives other ids than {_JSON}" if other else "it has no sentencepiece .model"
        raise UserError(f"--tokenizer {name}: the encoder sentencepiece was asked for, but {wrong}.")
    encoders: list[Encoder] = [other, fast] if other is not None and agree else [fast]
    return Tokenizer(encoders[::-1] if encoder == fast.name else encoders, name, settings, added)


def read_json(name: str, file: Path) -> TokenizersEncoder:
    """Read a tokenizer.json. Raises UserError."""
    from tokenizers import Tokenizer as Backend

    content = file.read_bytes()
    try:
        return TokenizersEncoder(Backend.from_buffer(content))
    except Exception as error:  # the library raises bare Exception
        what = _what_it_is(content) or str(error)
        raise UserError(
            f"--tokenizer {name}: {file} is not a tokenizer.json of the tokenizers library ({what}). Give one that "
            "save_pretrained() of a fast tokenizer wrote, or a sentencepiece file by a name that ends in .model."
        ) from error


def _read_model(name: str, file: Path, optional: bool) -> SentencePieceEncoder | None:
    """Read a .model file; None if that fails and is `optional`. Raises UserError."""
    try:
        import sentencepiece
    except ImportError as error:
        if optional:
            return None
        raise UserError(
            f"--tokenizer {name}: {file} needs the package sentencepiece: pip install sentencepiece, or give a {_JSON}."
        ) from error
    content = file.read_bytes()
    try:
        if not content:
            raise ValueError("it is empty")
        return SentencePieceEncoder(sentencepiece.SentencePieceProcessor(model_proto=content))
    except Exception as error:  # RuntimeError, and others by version
        if optional:
            return None
        what = _what_it_is(content) or (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--tokenizer {name}: {file} is not a sentencepiece model ({what}). Give the .model file that "
            f"sentencepiece wrote, or the {_JSON} of the same tokenizer."
        ) from error


def _read_pair(name: str, folder: Path, settings: dict[str, Any]) -> TokenizersEncoder:
    """Read GPT-2's vocab.json and merges.txt. Raises UserError."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    vocabulary, merges = (folder / part for part in _PAIR)
    try:
        backend = Backend(models.BPE.from_file(str(vocabulary), str(merges)))
    except Exception as error:  # the library raises bare Exception
        raise UserError(
            f"--tokenizer {name}: {vocabulary} with {merges} is not the vocabulary of a byte-level BPE ({error}). Save "
            "the tokenizer with save_pretrained() of a fast tokenizer."
        ) from error
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(settings.get("add_prefix_space", False)))
    backend.decoder = decoders.ByteLevel()
    roles = ("bos_token", "eos_token", "pad_token", "unk_token", "mask_token")
    named = [settings[role] for role in roles if isinstance(settings.get(role), str)]
    special = dict.fromkeys([*named, "<|endoftext|>", "<s>", "</s>", "<pad>", "<unk>"])
    backend.add_special_tokens(
        [AddedToken(token, special=True) for token in special if backend.token_to_id(token) is not None]
    )
    return TokenizersEncoder(backend)


def _model_in(folder: Path) -> Path | None:
    """The .model file of a folder: one with a usual name, or the only one."""
    for name in _MODELS:
        if (folder / name).is_file():
            return folder / name
    models = [path for path in folder.glob("*.model") if path.is_file() and not path.name.startswith(".")]
    return models[0] if len(models) == 1 else None


def _settings(name: str, folder: Path) -> dict[str, Any]:
    """Read the settings of special tokens beside a tokenizer. Raises UserError."""
    settings: dict[str, Any] = {}
    for config in _SETTINGS:
        if (folder / config).is_file():
            try:
                settings.update(json.loads((folder / config).read_text(encoding="utf-8")))
            except (ValueError, TypeError) as error:
                raise UserError(f"--tokenizer {name}: {folder / config} is not a JSON object ({error}).") from error
    return {key: _content(value) for key, value in settings.items()}


def _content(value: Any) -> Any:
    """The name of a special token, which is written as a string or as {"content": ...}."""
    return value["content"] if isinstance(value, dict) and isinstance(value.get("content"), str) else value


def _what_it_is(content: bytes) -> str:
    """Describe a file that is often mistaken for a tokenizer's; "" if it is none of these."""
    if content.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS: fetch the file itself with git lfs pull"
    if not content.strip():
        return "it is empty"
    if content.startswith(b"IQ== 0"):
        return "it is a list of ranks of tiktoken, as LLaMA 3 has beside its tokenizer.json"
    if content.lstrip().startswith(b"<"):
        return "it is a web page"
    return ""


def _download(name: str) -> Path:
    """Download the files of a tokenizer; returns their folder in the hub's cache. Raises UserError."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError

    def fetch(file: str) -> Path | None:
        try:
            return Path(hf_hub_download(name, file))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            return None

    def fetch_if_possible(file: str) -> None:
        try:
            hf_hub_download(name, file)
        except EntryNotFoundError:  # not there, or not in the cache and no network
            return

    try:
        found = fetch(_JSON)
        if found is None:
            found = next((file for model in _MODELS if (file := fetch(model)) is not None), None)
        else:
            # Beside tokenizer.json it is only for speed.
            fetch_if_possible(_MODELS[0])
        if found is None:
            parts = [fetch(part) for part in _PAIR]
            found = parts[0] if all(parts) else None
        for config in _SETTINGS:
            fetch_if_possible(config)
    except GatedRepoError as error:
        raise UserError(
            f"--tokenizer {name}: it is gated on the hub. Accept its terms on its page there, and log in with hf auth "
            "login or set HF_TOKEN."
        ) from error
    except Exception as error:  # missing repository, no network, no permission: all mean the same to the user
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--tokenizer {name}: it is no local file or directory and could not be fetched from the hub ({reason}). "
            f"Check the name and the network, log in if it is private, or give a directory that holds {_JSON}; "
            "--tokenizer train:8192 trains one on the text itself."
        ) from error
    if found is None:
        raise UserError(
            f"--tokenizer {name}: on the hub it has no {_JSON}, no {' or '.join(_MODELS)} and no "
            f"{' with '.join(_PAIR)}. Save it with save_pretrained() of a fast tokenizer and give that directory."
        )
    return found.parent
