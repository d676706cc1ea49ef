"""Build the logical shards of `--dataset`, the streams of rows that a loader reads, from text or from token ids.

A resumed run builds its logical shards again from their saved states. How the source's shards were cut and which files
there were is saved beside these states: so a file that was replaced since can be told from another data set, and
replacing it does not change which documents the other logical shards read.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from peft_pretraining.data.dealing import DealtSource, Unit, cut_shards, deal_units, even_slices
from peft_pretraining.data.held_out import held_out_state, load_held_out_state
from peft_pretraining.data.mixed_order import MixedLogicalShard
from peft_pretraining.data.order import (
    DamageCount,
    LogicalShard,
    LogicalShardOrder,
    LogicalShardState,
    RowFormat,
    TextLogicalShard,
)
from peft_pretraining.data.sources.documents import Files, Share, Source, files_of
from peft_pretraining.data.sources.mapped_tokens import TokenFiles, fingerprint_of_shares
from peft_pretraining.data.token_order import TokenLogicalShard

_NAMED_FILES = 5


class LogicalShards(Protocol):
    """Builds the logical shards of a data set."""

    @property
    def names(self) -> list[str]:
        """The names of the sources, as the user gave them."""

    def make(self, index: int, state: LogicalShardState | None) -> LogicalShard:
        """Build logical shard `index`, from its saved state or at its beginning."""

    def fingerprint(self) -> str:
        """A hash of all data that is read, as it is now."""

    def state(self) -> list[dict[str, Any]]:
        """What a checkpoint needs besides the logical shards' own states, for each source; JSON-able."""

    def load_state(self, saved: list[dict[str, Any]] | None) -> list[str] | None:
        """Restore the `state` of a checkpoint (None: it has none). Returns sentences about files that were replaced
        since; None if this is another data set."""


class TextLogicalShards:
    """Logical shards over one or more sources of text."""

    def __init__(
        self,
        shares: Sequence[Share],
        row_format: RowFormat,
        *,
        seed: int,
        logical_shards: int,
        shuffle_buffer: int,
        repeat: bool,
        damage: DamageCount,
    ) -> None:
        """Read the beginnings of the source's shards where there are few of them. Raises UserError."""
        self._shares, self._format, self._damage = shares, row_format, damage
        self._seed, self._logical_shards = seed, logical_shards
        self._shuffle_buffer, self._repeat = shuffle_buffer, repeat
        self._files = [files and files.with_heads() for files in (files_of(share.source) for share in shares)]
        self._deal([cut_shards(share.source, logical_shards, seed) for share in shares])

    @property
    def names(self) -> list[str]:
        """See `LogicalShards.names`."""
        return [share.source.name for share in self._shares]

    def make(self, index: int, state: LogicalShardState | None) -> LogicalShard:
        """See `LogicalShards.make`."""
        if len(self._shares) == 1:
            return self._text_shard(0, index, state)
        states = [None] * len(self._shares) if state is None else state["sources"]
        parts = [self._text_shard(source, index, own) for source, own in enumerate(states)]
        weights = [share.weight for share in self._shares]
        return MixedLogicalShard(parts, weights, index, self._seed, state["row"] if state else 0)

    def fingerprint(self) -> str:
        """See `LogicalShards.fingerprint`."""
        prints = [(str(own["fingerprint"]), share.weight) for own, share in zip(self._state, self._shares, strict=True)]
        return prints[0][0] if len(prints) == 1 else fingerprint_of_shares(prints)

    def state(self) -> list[dict[str, Any]]:
        """See `LogicalShards.state`."""
        return self._state

    def load_state(self, saved: list[dict[str, Any]] | None) -> list[str] | None:
        """See `LogicalShards.load_state`."""
        if saved is None:
            # Saved by a version that cut all shards evenly, whatever they hold.
            self._deal([(even_slices(s.source.shards, self._logical_shards),) * s.source.shards for s in self._shares])
            return []
        if len(saved) != len(self._shares):
            return None
        replaced: list[str] = []
        if not all(_has_same_files(share.source, old) for share, old in zip(self._shares, saved, strict=True)):
            return None
        # For all sources first: what one of them holds out is left out of the others, too.
        for share, old in zip(self._shares, saved, strict=True):
            replaced += load_held_out_state(share.source, old)
        for share, files, old in zip(self._shares, self._files, saved, strict=True):
            names = _replaced_files(share.source, files, old)
            if names is None:
                return None
            replaced += names
        self._deal([_unpacked(old["slices"], s.source.shards) for s, old in zip(self._shares, saved, strict=True)])
        return replaced

    def _deal(self, cuts: Sequence[Sequence[int]]) -> None:
        self._dealt: list[tuple[DealtSource, list[list[Unit]]]] = [
            (DealtSource(share.source, cut), deal_units(cut, self._logical_shards, self._seed))
            for share, cut in zip(self._shares, cuts, strict=True)
        ]
        # Computed once: it is asked for before every update, and a fingerprint may have to read all texts.
        self._state = [
            _describe(share.source, files) | held_out_state(share.source) | {"slices": _packed(cut)}
            for share, files, cut in zip(self._shares, self._files, cuts, strict=True)
        ]

    def _text_shard(self, source: int, index: int, state: LogicalShardState | None) -> LogicalShard:
        dealt, units = self._dealt[source]
        order = LogicalShardOrder(index, self._seed, self._shuffle_buffer, self._repeat, source)
        return TextLogicalShard(dealt, units[index], self._format, order, self._damage, state)


class TokenLogicalShards:
    """Logical shards over one or more sets of token files."""

    def __init__(
        self, shares: Sequence[tuple[TokenFiles, float]], max_length: int, seed: int, logical_shards: int, repeat: bool
    ):
        self._shares, self._max_length, self._seed, self._logical_shards = shares, max_length, seed, logical_shards
        self._repeat = repeat
        self._state = [{"fingerprint": files.fingerprint()} for files, _ in shares]

    @property
    def names(self) -> list[str]:
        """See `LogicalShards.names`."""
        return [files.name for files, _ in self._shares]

    def make(self, index: int, state: LogicalShardState | None) -> LogicalShard:
        """See `LogicalShards.make`."""
        if len(self._shares) == 1:
            return self._token_shard(self._shares[0][0], index, state)
        states = [None] * len(self._shares) if state is None else state["sources"]
        parts = [self._token_shard(files, index, own) for (files, _), own in zip(self._shares, states, strict=True)]
        weights = [weight for _, weight in self._shares]
        return MixedLogicalShard(parts, weights, index, self._seed, state["row"] if state else 0)

    def fingerprint(self) -> str:
        """See `LogicalShards.fingerprint`."""
        prints = [(files.fingerprint(), weight) for files, weight in self._shares]
        return prints[0][0] if len(prints) == 1 else fingerprint_of_shares(prints)

    def state(self) -> list[dict[str, Any]]:
        """See `LogicalShards.state`."""
        return self._state

    def load_state(self, saved: list[dict[str, Any]] | None) -> list[str] | None:
        """See `LogicalShards.load_state`; a window of other ids is another data set."""
        return [] if saved is None or saved == self.state() else None

    def _token_shard(self, files: TokenFiles, index: int, state: LogicalShardState | None) -> LogicalShard:
        return TokenLogicalShard(files, self._max_length, index, self._logical_shards, self._seed, state, self._repeat)


def _describe(source: Source, files: Files | None) -> dict[str, Any]:
    """The part of a source's state that tells whether its data has changed; `files`: its files with heads."""
    described: dict[str, Any] = {"fingerprint": source.fingerprint()}
    if files:
        described |= {"identity": files.identity(), "sizes": list(files.sizes), "heads": list(files.heads)}
    return described


def _has_same_files(source: Source, saved: dict[str, Any]) -> bool:
    """Whether a source is the one that was saved, as far as the names of its files tell."""
    files = files_of(source)
    return files is None or "identity" not in saved or saved["identity"] == files.identity()


def _replaced_files(source: Source, files: Files | None, saved: dict[str, Any]) -> list[str] | None:
    """Sentences for files of which size, beginning or end differ from what was saved; None if anything else does."""
    now = _describe(source, files)
    same = now["fingerprint"] == saved["fingerprint"]
    if files is None or now["identity"] != saved.get("identity") or len(saved.get("sizes", [])) != len(files.sizes):
        return [] if same else None
    before, heads = saved["sizes"], saved.get("heads")
    heads = heads if heads and len(heads) == len(now["heads"]) else now["heads"]
    differing = [
        f"{name} ({before[i]} bytes, now {files.sizes[i]})" if files.sizes[i] != before[i] else f"{name} (same size)"
        for i, name in enumerate(files.names)
        if files.sizes[i] != before[i] or heads[i : i + 1] != now["heads"][i : i + 1]
    ]
    if not differing:
        return [] if same else None
    more = f" and {len(differing) - _NAMED_FILES} more" if len(differing) > _NAMED_FILES else ""
    return [
        f"--dataset {source.name}: since the checkpoint {', '.join(differing[:_NAMED_FILES])}{more} changed; the run "
        "goes on with what is there now, and documents that moved within a file may be read twice or not at all"
    ]


def _packed(cut: Sequence[int]) -> int | list[int]:
    """A single number where all are equal."""
    return cut[0] if len(set(cut)) == 1 else list(cut)


def _unpacked(saved: int | list[int], shards: int) -> list[int]:
    return [saved] * shards if isinstance(saved, int) else list(saved)
