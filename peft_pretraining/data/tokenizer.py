"""Load the tokenizer of --tokenizer: from the hub, a folder or a file, or trained on the data set."""

from collections.abc import Sequence
from pathlib import Path

from peft_pretraining.data.held_out import open_split
from peft_pretraining.data.sources.documents import Source
from peft_pretraining.data.sources.kind import DEFAULT_OPTIONS, OwnBPE, SourceOptions, TextKind
from peft_pretraining.data.sources.mapped_tokens import TokenFiles, TokenMixture
from peft_pretraining.data.sources.registry import find_kind
from peft_pretraining.data.tokenizers.documents import AS_USUAL, Added, Tokenizer, check_vocabulary
from peft_pretraining.data.tokenizers.files import named_tokenizer
from peft_pretraining.data.tokenizers.training import TrainedTokenizer, parse_training, train_tokenizer
from peft_pretraining.errors import UserError

__all__ = ["Added", "Tokenizer", "check_vocabulary", "keep_trained", "kept_tokenizers", "load_tokenizer"]

_KEPT = Path("tokenizer", "tokenizer.json")
"""The path of a trained tokenizer in the folder of its run or of its token ids."""


def load_tokenizer(
    name_or_path: str,
    dataset: str,
    *,
    added: Added = AS_USUAL,
    options: SourceOptions = DEFAULT_OPTIONS,
    source: Source | None = None,
    encoder: str = "auto",
    progress: bool = True,
    kept: Sequence[Path] = (),
) -> Tokenizer:
    """Load the tokenizer of --tokenizer; "" is the default of --dataset, which must hold text. Raises UserError.

    A tokenizer is trained on `source`, the documents that the run trains on, or else on the training split of
    --dataset. `encoder` is "auto", "tokenizers" or "sentencepiece" (`files.ENCODERS`). `kept`: the `kept_tokenizers` of
    a run that may be resumed.
    """
    vocab_size = parse_training(name_or_path)
    if name_or_path and vocab_size is None:
        return named_tokenizer(name_or_path, added, encoder)
    if source is None or vocab_size is None:
        kind = find_kind(dataset)
        if vocab_size is None:
            if not isinstance(kind, TextKind):
                raise ValueError(f"--dataset {dataset} holds token ids and needs no tokenizer")
            if not isinstance(kind.default_tokenizer, OwnBPE):
                return named_tokenizer(kind.default_tokenizer, added, encoder)
            name_or_path, vocab_size = kind.default_tokenizer.name, kind.default_tokenizer.vocab_size
        source = source or _training_split(name_or_path, dataset, options)
    return train_tokenizer(source, vocab_size, name_or_path, added, progress, kept)


def kept_tokenizers(save_dir: str, continue_from: str) -> list[Path]:
    """The paths where a run with these flags may have saved the tokenizer that was trained for it."""
    folders = [Path(save_dir)] if save_dir else []
    if continue_from not in ("", "auto"):
        folders[:0] = [Path(continue_from).parent, Path(continue_from)]
    return [folder / _KEPT for folder in folders]


def keep_trained(tokenizer: Tokenizer | None, folder: Path) -> None:
    """Save a tokenizer in the folder of a run or of token ids if it was trained on the data set, for resuming.

    Does nothing for other tokenizers. Raises UserError if it cannot be written.
    """
    if not isinstance(tokenizer, TrainedTokenizer):
        return
    try:
        tokenizer.keep(folder / _KEPT)
    except OSError as error:
        raise UserError(
            f"--tokenizer {tokenizer.name}: {folder / _KEPT} cannot be written ({error.strerror}): give a folder "
            "with space that can be written to."
        ) from error


def _training_split(name: str, dataset: str, options: SourceOptions) -> Source:
    opened = open_split(dataset, "train", options)
    if isinstance(opened, TokenFiles | TokenMixture):
        raise UserError(f"--tokenizer {name}: --dataset {dataset} holds token ids; a tokenizer is trained on text.")
    return opened
