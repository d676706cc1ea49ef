"""`--dataset a:0.7,b:0.3`: several sources, each with its share of the rows.

A source is anything that `--dataset` takes alone: a name, a file, a folder, a glob. Weights are positive and need not
add up to one. A comma or colon of an existing path does not split it. Either all sources hold text, or all hold token
ids. As a `Source`, for training tokenizers and tokenizing data sets, a mixture is its sources one after another. The
weights are used for the training rows (`mixed_order`) and for the validation set, to which each source contributes its
share of --eval_tokens.
"""

import glob
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from peft_pretraining.data.held_out import HeldOut, WithoutHeldOut, open_split, open_splits
from peft_pretraining.data.sources.documents import Damage, Share, Source, files_of
from peft_pretraining.data.sources.kind import DatasetKind, SourceOptions, Splits, TextKind, TokenKind
from peft_pretraining.data.sources.mapped_tokens import TokenFiles, TokenMixture, fingerprint_of_shares
from peft_pretraining.data.sources.registry import find_kind
from peft_pretraining.errors import UserError

_EXAMPLE = "as in a:0.7,b:0.3"


@dataclass(frozen=True)
class Mixture:
    """Sources of text with their weights; as a `Source` they follow one another."""

    name: str
    shares: tuple[Share, ...]

    @property
    def shards(self) -> int:
        """The number of shards of all sources."""
        return sum(share.source.shards for share in self.shares)

    def read(self, shard: int, slices: int, part: int, start: int) -> Iterator[str | Damage]:
        """See `Source.read`."""
        for share in self.shares:
            if shard < share.source.shards:
                return share.source.read(shard, slices, part, start)
            shard -= share.source.shards
        raise IndexError(f"{self.name} has {self.shards} shards")

    def fingerprint(self) -> str:
        """The fingerprint of each source with its share."""
        return fingerprint_of_shares([(share.source.fingerprint(), share.weight) for share in self.shares])


class MixtureKind(TextKind):
    """Mixtures of sources of text; `of` returns `TokenMixtureKind` for token ids."""

    in_words = "several of these with weights, such as a:0.7,b:0.3"
    precedence = -1  # before the hub, as the first part may look like one of its names

    def recognises(self, dataset: str) -> bool:
        """Whether it has a comma or ends in a weight, and is no existing path."""
        return ("," in dataset or _weight(dataset.rpartition(":")[2]) is not None) and not _exists(dataset)

    def of(self, dataset: str) -> DatasetKind:
        """See `DatasetKind.of`; it needs the network if one of its sources does."""
        kinds = {name: find_kind(name) for name, _ in split_mixture(dataset)}
        ids = [name for name, kind in kinds.items() if isinstance(kind, TokenKind)]
        if ids and len(ids) < len(kinds):
            text = next(name for name in kinds if name not in ids)
            raise UserError(
                f"--dataset {dataset}: {ids[0]} holds token ids and {text} holds text, which cannot be mixed: tokenize "
                f"{text} with qgalore tokenize, or give the text of {ids[0]}"
            )
        found = TokenMixtureKind() if ids else MixtureKind()
        found.needs_network = any(kind.needs_network for kind in kinds.values())
        return found

    def lost_as_ids(self, dataset: str) -> str:
        """See `TextKind.lost_as_ids`: the weights."""
        apart = ",".join(f"{Path(name).stem}_tokens:{weight:g}" for name, weight in split_mixture(dataset))
        return (
            f"--dataset {dataset}: the documents of its parts are written one part after another, each as often "
            "as it is there: their weights are not in the files. To mix token ids, tokenize each part alone and give "
            f"the run --dataset {apart}"
        )

    def open(self, dataset: str, split: str, options: SourceOptions) -> Mixture:
        """See `DatasetKind.open`; documents are held out of each source without a validation split."""
        splits = self.open_splits(dataset, options)
        opened = splits.validation if split == "validation" else splits.train
        assert isinstance(opened, Mixture)
        return opened

    def open_splits(self, dataset: str, options: SourceOptions) -> Splits:
        """See `DatasetKind.open_splits`."""
        shares: dict[str, list[Share]] = {split: [] for split in Splits._fields}
        for name, weight in split_mixture(dataset):
            for split, source in open_splits(name, options)._asdict().items():
                assert source is not None and not isinstance(source, TokenFiles | TokenMixture)
                shares[split].append(Share(source, weight))
        _refuse_same_files(dataset, shares["train"])
        # A text that is held out of one source may be in another, too.
        sources = [share.source for share in shares["train"]]
        held_out = [each for source in sources if isinstance(source, WithoutHeldOut) for each in source.held_out]
        train = [replace(share, source=_without(share.source, held_out)) for share in shares["train"]]
        return Splits(Mixture(dataset, tuple(train)), Mixture(dataset, tuple(shares["validation"])))


def _without(source: Source, held_out: Sequence[HeldOut]) -> Source:
    if not held_out:
        return source
    return WithoutHeldOut(source.source if isinstance(source, WithoutHeldOut) else source, tuple(held_out))


class TokenMixtureKind(TokenKind):
    """Mixtures of sources of token ids; see `MixtureKind.of`."""

    in_words = MixtureKind.in_words

    def open(self, dataset: str, split: str, options: SourceOptions) -> TokenMixture:
        """See `DatasetKind.open`."""
        shares = []
        for name, weight in split_mixture(dataset):
            files = open_split(name, split, options)
            assert isinstance(files, TokenFiles)
            shares.append((files, weight))
        return TokenMixture(dataset, tuple(shares))


KIND = MixtureKind()


def split_mixture(dataset: str) -> list[tuple[str, float]]:
    """Parse a mixture into (source, weight) pairs. Raises UserError."""
    parts: list[tuple[str, float]] = []
    unfinished: list[str] = []
    for piece in dataset.split(","):
        unfinished.append(piece)
        name, _, text = ",".join(unfinished).rpartition(":")
        name = name.strip() if len(unfinished) == 1 else name  # as after a comma in "a:0.5, b:0.5"
        weight = _weight(text)
        if weight is None:
            continue
        if len(unfinished) > 1 and not _exists(name):
            break
        if not name:
            raise UserError(f"--dataset {dataset}: {piece} names no source: give each a name and a weight, {_EXAMPLE}")
        if not (math.isfinite(weight) and weight > 0):
            raise UserError(f"--dataset {dataset}: the weight {text} of {name} is not a positive number")
        parts.append((str(Path(name).expanduser()) if name.startswith("~") else name, weight))
        unfinished = []
    if unfinished:
        raise UserError(
            f"--dataset {dataset}: {unfinished[0] or 'an empty part'} has no weight, and the whole is no path that "
            f"exists: give each source a weight, {_EXAMPLE}"
        )
    _refuse_twice(dataset, [name for name, _ in parts])
    return parts


def _refuse_twice(dataset: str, names: list[str]) -> None:
    seen: dict[str, str] = {}
    for name in names:
        path = Path(name).expanduser()
        key = str(path.resolve()) if path.exists() else name
        if key in seen:
            both = name if seen[key] == name else f"{seen[key]} and {name}, which are the same,"
            raise UserError(
                f"--dataset {dataset}: it names {both} twice: give each source once, with the sum of its weights"
            )
        seen[key] = name


def _refuse_same_files(dataset: str, shares: Sequence[Share]) -> None:
    """Raise UserError if two sources read the same file, such as a folder and a pattern for what is in it."""
    seen: dict[str, str] = {}
    for share in shares:
        files = files_of(share.source)
        for path in files.paths if files else ():
            other = seen.setdefault(os.path.realpath(path), share.source.name)
            if other != share.source.name:
                raise UserError(
                    f"--dataset {dataset}: {other} and {share.source.name} both read {path}: give each file once, "
                    "with the sum of its weights"
                )


def _weight(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _exists(name: str) -> bool:
    path = str(Path(name).expanduser())
    try:
        return Path(path).exists() or bool(glob.has_magic(path) and glob.glob(path, recursive=True))  # noqa: PTH207, for an absolute pattern
    except (OSError, ValueError):
        return False
