"""The tokenizer that a model was trained with: found by what its run has recorded, or in the export's folder."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from peft_pretraining.after_training.trained_model import Origin
from peft_pretraining.config.flag_groups import DataArgs
from peft_pretraining.data.sources.kind import OwnBPE, TextKind
from peft_pretraining.data.sources.mapped_tokens import TokenFiles, TokenMixture
from peft_pretraining.data.sources.registry import find_kind, open_dataset
from peft_pretraining.data.tokenizer import Added, Tokenizer, kept_tokenizers
from peft_pretraining.data.tokenizers.files import named_tokenizer
from peft_pretraining.data.tokenizers.training import parse_training
from peft_pretraining.errors import UserError

_GIVE = "give it as --tokenizer: a name on the hub, a folder or a file"


def tokenizer_of(origin: Origin, given: str = "", added: Added | None = None) -> Tokenizer:
    """The tokenizer that a model was trained with. Raises UserError where it is gone.

    That is one that was trained for the run or for its token files, and kept beside them, or what --tokenizer of the
    run named; of an export it is in the folder. given: a name or path to take instead; one that gives other ids than
    the run was trained on is refused. added: what is added to documents; None: as in training.
    """
    if given and parse_training(given) is not None:
        raise UserError(f"--tokenizer {given}: the model is trained already, and so is its tokenizer; {_GIVE}.")
    if origin.run is None:
        return _of_export(origin, given, added)
    recorded = _Recorded(origin, added)
    name, reason = (given, "") if given else recorded.name()
    if not name:
        raise UserError(f"{origin.path}: {reason}; {_GIVE}.")
    try:
        tokenizer = named_tokenizer(name, recorded.added)
    except UserError as error:
        if given:
            raise
        raise UserError(f"{origin.path} was trained with a tokenizer that is not found: {error} Or {_GIVE}.") from error
    if recorded.fingerprint and added is None and not tokenizer.resume_as(recorded.fingerprint):
        raise UserError(
            f"--tokenizer {name}: it gives other ids than the one that {origin.path} was trained with"
            + (f" ({recorded.described})" if recorded.described else "")
            + f"; {_GIVE}."
        )
    return tokenizer


def _of_export(origin: Origin, given: str, added: Added | None) -> Tokenizer:
    name = given or str(origin.path)
    try:
        with suppress(UserError):
            return named_tokenizer(name, added or Added())
        return named_tokenizer(name, added or Added(eos=False))  # it needs none to generate
    except UserError as error:
        if given:
            raise
        raise UserError(f"{origin.path} was exported without a tokenizer; {_GIVE}.") from error


class _Recorded:
    """What a run's checkpoint, and the token files that it read, know of the tokenizer."""

    def __init__(self, origin: Origin, added: Added | None) -> None:
        self._origin, flags = origin, origin.flags
        self._sidecars: list[tuple[Path, dict[str, Any]]] | None = None
        self.fingerprint = str(flags.get("data", {}).get("order", {}).get("tokenizer") or "")
        """That of `Tokenizer.fingerprint`; "" where it is not known."""
        if not self.fingerprint:
            self.fingerprint = str(self._of_token_files("tokenizer_fingerprint") or "")
        self.described = str(flags.get("tokenizer") or self._of_token_files("tokenizer") or "")
        """Its name; "" where it is not known."""
        self.added = added or self._added()

    def name(self) -> tuple[str, str]:
        """(name or path, "") of the tokenizer, or ("", why it is not known)."""
        flags, run = self._origin.flags, self._origin.run
        assert run is not None
        for kept in kept_tokenizers(str(run), ""):
            if kept.is_file():
                return str(kept), ""
        for path, settings in self._token_files():
            for kept in kept_tokenizers(str(path.parent), ""):
                if kept.is_file():
                    return str(kept), ""
            if name := settings.get("tokenizer"):
                return self._unless_trained(str(name))
        if name := flags.get("tokenizer"):
            return self._unless_trained(str(name))
        if not flags.get("dataset"):
            return "", "which tokenizer it was trained with is not recorded"
        with suppress(UserError):
            kind = find_kind(str(flags["dataset"]))
            if isinstance(kind, TextKind):
                default = kind.default_tokenizer
                return self._unless_trained(f"train:{default.vocab_size}" if isinstance(default, OwnBPE) else default)
        return "", f"it was trained on --dataset {flags['dataset']}, which does not tell its tokenizer"

    def _unless_trained(self, name: str) -> tuple[str, str]:
        if parse_training(name) is None:
            return name, ""
        return "", f"its tokenizer ({name}) was trained for it, and is not in its folder"

    def _added(self) -> Added:
        flags = self._origin.flags
        for _, settings in self._token_files():
            if {"bos_token_id", "eos_token_id"} <= settings.keys():
                return Added(settings["bos_token_id"] is not None, settings["eos_token_id"] is not None)
        return Added(flags.get("add_bos"), bool(flags.get("add_eos", True)))

    def _of_token_files(self, key: str) -> Any:
        """A value of the first sidecar that has one."""
        return next((s[key] for _, s in self._token_files() if s.get(key) is not None), None)

    def _token_files(self) -> list[tuple[Path, dict[str, Any]]]:
        """(path, contents of the sidecar) of the token files that the run read, as far as they are still there."""
        if self._sidecars is None:
            self._sidecars = []
            with suppress(UserError, OSError):
                self._sidecars = _sidecars(self._origin.flags)
        return self._sidecars


def _sidecars(flags: dict[str, Any]) -> list[tuple[Path, dict[str, Any]]]:
    dataset = str(flags.get("dataset", ""))
    if not dataset or isinstance(find_kind(dataset), TextKind):
        return []
    opened = open_dataset(dataset, "train", DataArgs(dataset=dataset).source_options)
    if isinstance(opened, TokenMixture):
        return [(file.path, file.settings) for files, _ in opened.shares for file in files.files]
    if isinstance(opened, TokenFiles):
        return [(file.path, file.settings) for file in opened.files]
    return []
