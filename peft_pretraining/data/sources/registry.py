"""Find the kinds of `--dataset`: every module of this folder with an object `KIND` (see `kind`)."""

import importlib
import pkgutil
import re
from pathlib import Path

from peft_pretraining.data import sources
from peft_pretraining.data.sources.documents import Source
from peft_pretraining.data.sources.kind import DEFAULT_OPTIONS, DatasetKind, OwnBPE, SourceOptions, TextKind
from peft_pretraining.data.sources.mapped_tokens import TokenFiles, TokenMixture
from peft_pretraining.errors import UserError

_HUB_ADDRESS = re.compile(
    r"(?:hf://|(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/)datasets/(?P<name>[^/?#@]+.*)", re.IGNORECASE
)
_HUB_PAGES = ("tree", "viewer", "blob", "resolve", "raw", "discussions", "commits", "main")
_SHOWN_CHARS = 100


def kinds() -> list[DatasetKind]:
    """All kinds, in the alphabetical order of their modules."""
    found: list[DatasetKind] = []
    for name in sorted(module.name for module in pkgutil.iter_modules(sources.__path__)):
        kind = getattr(importlib.import_module(f"{sources.__name__}.{name}"), "KIND", None)
        if kind is None:
            continue
        if not isinstance(kind, DatasetKind):
            raise TypeError(f"KIND of {sources.__name__}.{name} is no DatasetKind")
        if kind.name and kind.name in {other.name for other in found}:
            raise ValueError(f"two modules of {sources.__name__} define the kind {kind.name}")
        found.append(kind)
    return found


def find_kind(dataset: str) -> DatasetKind:
    """Find the kind of `--dataset` by its name, else by who recognizes it. Raises UserError that lists all kinds."""
    found = kinds()
    if not dataset.strip():
        raise UserError(f"--dataset is empty: give {in_words(found)}")
    for kind in found:
        if kind.name and kind.name == dataset:
            return kind
    for kind in sorted(found, key=lambda kind: kind.precedence):
        try:
            if kind.precedence >= 0:  # not for mixtures, whose parts are checked one by one
                _refuse_address(dataset)
            if kind.recognises(dataset):
                return kind.of(dataset)
        except UserError:
            raise
        except (OSError, ValueError, RuntimeError) as error:  # of the system: too long a name, no such home
            shown = (
                dataset if len(dataset) <= _SHOWN_CHARS else f"{dataset[:_SHOWN_CHARS]}... ({len(dataset)} characters)"
            )
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"--dataset {shown} cannot be looked up ({reason}): give {in_words(found)}") from error
    names = " nor ".join(kind.name for kind in found if kind.name)
    raise UserError(f"--dataset {dataset} is neither {names} nor a file or folder that exists: give {in_words(found)}")


def _refuse_address(dataset: str) -> None:
    """Raise UserError with what to give instead if `dataset` is an address (a URL)."""
    on_hub = _HUB_ADDRESS.match(dataset)
    if on_hub and not Path(dataset).exists():
        first, *rest = re.split("[/?#@]", on_hub["name"])
        name = f"{first}/{rest[0]}" if rest and rest[0] and rest[0] not in _HUB_PAGES else first
        raise UserError(f"--dataset {dataset} is an address of the hub: give the name alone, --dataset {name}")
    scheme, found, path = dataset.partition("://")
    if not found or not re.fullmatch("[A-Za-z][A-Za-z0-9+.-]*", scheme):
        return
    if scheme == "file":
        raise UserError(f"--dataset {dataset} is an address: give the path alone, --dataset {path}")
    raise UserError(
        f"--dataset {dataset} is an address, and nothing is read from {scheme}:// during a run: download it and give "
        "the file or folder, or give the name of a data set on the Hugging Face hub (ORGANISATION/NAME)"
    )


def open_dataset(
    dataset: str, split: str, options: SourceOptions = DEFAULT_OPTIONS
) -> Source | TokenFiles | TokenMixture | None:
    """Open split "train" or "validation" of `--dataset`; None for a missing validation split (for which
    `held_out.open_split` holds documents out). Raises UserError."""
    kind = find_kind(dataset)
    if split not in kind.splits:
        raise UserError(f"--dataset {dataset} has no split {split}: it has {' and '.join(kind.splits)}")
    return kind.open(dataset, split, options)


def in_words(listed: list[DatasetKind]) -> str:
    """A list of kinds for a sentence: "A, B, or C"."""
    texts = [kind.in_words for kind in listed]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])}, or {texts[-1]}"


def all_kinds_in_words() -> str:
    """The values of `--dataset`, for its help."""
    return in_words(kinds())


def text_kinds_in_words() -> str:
    """The values of `--dataset` that are text, for a help text."""
    return in_words([kind for kind in kinds() if isinstance(kind, TextKind)])


def default_tokenizers_in_words() -> str:
    """The defaults of `--tokenizer` by kind, for its help."""
    texts = [str(TextKind.default_tokenizer)]
    for kind in kinds():
        if isinstance(kind, TextKind) and kind.default_tokenizer != TextKind.default_tokenizer:
            own = isinstance(kind.default_tokenizer, OwnBPE)
            tokenizer = "a small BPE trained on it once" if own else kind.default_tokenizer
            texts.append(f"for {kind.name or kind.in_words} {tokenizer}")
    return "; ".join(texts)
