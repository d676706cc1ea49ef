"""Write a run's tokenizer as transformers reads it: bos before a prompt as in training, and never eos after it.

tokenizer.json is that of the run, or is converted from a sentencepiece model by transformers. Its template, which in
T5's adds eos to every text, is replaced; special tokens beyond the embedding, such as T5's <extra_id_0>, are left out.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from peft_pretraining.data.tokenizer import Tokenizer, check_vocabulary
from peft_pretraining.data.tokenizers.encoders import PROBES
from peft_pretraining.errors import UserError


def write_tokenizer(tokenizer: Tokenizer, folder: Path, rows: int, longest: int | None) -> list[str]:
    """Write tokenizer.json and tokenizer_config.json to `folder`; returns sentences on what was changed.

    rows: of the embedding; longest: tokens of the model's longest sequence. Raises UserError where an id of text is
    beyond the embedding, or the tokenizer cannot be converted.
    """
    from tokenizers import AddedToken, processors
    from tokenizers import Tokenizer as Backend

    check_vocabulary(tokenizer.vocab_size, rows)
    content = json.loads(_as_json(tokenizer))
    notes = _trim(content, rows)
    content["post_processor"] = None
    backend = Backend.from_str(json.dumps(content))
    tokens = _special_tokens(tokenizer)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in set(tokens.values())])
    bos = tokens.get("bos_token")
    start = [bos] if bos else []
    backend.post_processor = processors.TemplateProcessing(
        single=[*start, "$A"], pair=[*start, "$A", "$B"], special_tokens=[(bos, tokenizer.bos_token_id)] if bos else []
    )
    notes += _differences(tokenizer, backend)
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **tokens}
    settings |= {"add_bos_token": bos is not None, "add_eos_token": False, "clean_up_tokenization_spaces": False}
    settings |= {"model_input_names": ["input_ids", "attention_mask"]}
    settings |= {} if longest is None else {"model_max_length": longest}
    (folder / "tokenizer.json").write_text(backend.to_str(pretty=True) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return notes


def special_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    """The ids of bos, eos and pad: the first two as documents were trained with them, else None."""
    pad = tokenizer.own_pad_token_id
    return {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "pad": tokenizer.eos_token_id if pad is None else pad,
    }


def _special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """The names of special tokens as tokenizer_config.json has them."""
    ids = special_ids(tokenizer) | {"unk": tokenizer.unk_token_id}
    return {f"{role}_token": tokenizer.vocabulary.piece(i) for role, i in ids.items() if i is not None}


def _as_json(tokenizer: Tokenizer) -> bytes:
    """The contents of tokenizer.json."""
    content = tokenizer.vocabulary.serialized()
    if tokenizer.vocabulary.name == "tokenizers":
        return content
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "tokenizer.model").write_bytes(content)
        Path(folder, "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        try:
            converted = transformers.AutoTokenizer.from_pretrained(folder)
            return str(converted.backend_tokenizer.to_str()).encode()
        except Exception as error:  # transformers raises whatever it meets
            raise UserError(
                f"--tokenizer {tokenizer.name}: transformers cannot convert this sentencepiece model "
                f"({' '.join(str(error).split())[:200]}). Give the tokenizer.json of the same tokenizer, or "
                "--no-tokenizer."
            ) from error


def _trim(content: dict[str, Any], rows: int) -> list[str]:
    """Remove tokens with ids beyond the embedding from the contents of a tokenizer.json; returns a sentence if any."""
    vocabulary = content["model"]["vocab"]
    names = dict(enumerate(token for token, _ in vocabulary)) if isinstance(vocabulary, list) else {}
    names |= {i: token for token, i in vocabulary.items()} if isinstance(vocabulary, dict) else {}
    names |= {token["id"]: token["content"] for token in content["added_tokens"]}
    beyond = {i: token for i, token in names.items() if i >= rows}
    if not beyond:
        return []
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < rows]
    if isinstance(vocabulary, list):
        del vocabulary[rows:]
    else:
        content["model"]["vocab"] = {token: i for token, i in vocabulary.items() if i < rows}
    first, last = min(beyond), max(beyond)
    return [
        f"the tokenizer's special tokens with ids {first} to {last} ({beyond[first]} to {beyond[last]}) are left out: "
        f"the model's embedding has {rows} rows"
    ]


def _differences(tokenizer: Tokenizer, backend: Any) -> list[str]:
    """Compare what is written with the run's tokenizer; a sentence where rare text differs. Raises UserError if all."""
    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    own = [before + ids for ids in tokenizer.encode(list(PROBES))]
    differing = [text for text, ids in zip(PROBES, own, strict=True) if backend.encode(text).ids != ids]
    if len(differing) == len(PROBES):
        raise UserError(
            f"--tokenizer {tokenizer.name}: converted for transformers it would give other ids than in training. Give "
            "the tokenizer.json of the same tokenizer, or --no-tokenizer."
        )
    if not differing:
        return []
    return [
        f"{len(differing)} of {len(PROBES)} texts with rare characters have other ids than in training: the tokenizer "
        "is converted from sentencepiece"
    ]
