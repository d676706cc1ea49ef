"""`--dataset NAME`: a data set of the Hugging Face hub, streamed.

No file is downloaded as a whole: `datasets` reads them through `hub_file_system`. A run keeps the commit that was the
newest at its start. `c4` is the short name of allenai/c4's English part at a fixed commit, whose files are known
without a request.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from peft_pretraining.data.sources.data_files import DataFile, FileShards, format_of, open_files
from peft_pretraining.data.sources.documents import Damage, Files, Source, SourceWrapper
from peft_pretraining.data.sources.kind import SourceOptions, TextKind
from peft_pretraining.data.sources.retry import Reading, RetryPolicy

C4 = "c4"
C4_REPOSITORY = "allenai/c4"
C4_CONFIG = "en"
C4_REVISION = "1588ec454efa1a09f29cd18ddd04fe05fc8653a2"
"""Pinned: a changed shard would change the order of documents in a resumed run."""
C4_SHARDS = {"train": 1024, "validation": 8}
SIZE_UNKNOWN = -1
VALIDATION_SPLITS = ("validation", "valid", "dev", "val")
"""The usual names of a validation split."""

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_NAME = re.compile(rf"(?:{_PART}/)?{_PART}")
_FILE = re.compile(
    r".*\.(?:json|jsonl|parquet|arrow|txt|csv|tsv|gz|zst|xz|bz2|zip|bin|npy|model|py|git)", re.IGNORECASE
)


class Hub(TextKind):
    """Data sets of the hub."""

    name = C4
    in_words = "c4 or another data set of the Hugging Face hub (ORGANISATION/NAME, streamed)"
    precedence = 9  # local files come first
    needs_network = True

    def recognises(self, dataset: str) -> bool:
        """Whether it is a valid name on the hub and no local file or folder; sends no request."""
        if not _NAME.fullmatch(dataset) or _FILE.fullmatch(dataset) or "--" in dataset or ".." in dataset:
            return False
        return not Path(dataset).exists()

    def open(self, dataset: str, split: str, options: SourceOptions) -> Source | None:
        """See `DatasetKind.open`."""
        from peft_pretraining.data.hub_file_system import serve_pinned_files

        serve_pinned_files()
        reading = Reading(dataset, options.retry or RetryPolicy(), endpoint=options.endpoint)
        if options.stop is not None:
            reading.stop = options.stop
        if dataset != C4:
            return _open_by_name(dataset, split, options, reading)
        if _as_pinned(options):
            return _open_c4(split, options, reading)
        options = replace(options, config=options.config or C4_CONFIG, revision=options.revision or C4_REVISION)
        return _open_by_name(C4_REPOSITORY, split, options, reading)


@dataclass(frozen=True)
class HubSource(SourceWrapper):
    """The documents of a split of a data set on the hub; each file is a shard."""

    reading: Reading
    repository: str
    """Its full name."""
    revision: str
    """The commit, for --dataset_revision of a resumed run."""
    source: FileShards
    """The files, at hf:// addresses; their identity has the commit."""

    def file_list(self) -> Files | None:
        """See `FileSource.file_list`; None for C4, whose file sizes are not requested."""
        files = self.source.file_list()
        return None if files is None or SIZE_UNKNOWN in files.sizes else files

    def read(self, shard: int, slices: int, part: int, start: int) -> Iterator[str | Damage]:
        """See `Source.read`. Raises UserError when the hub cannot be reached, even if a library hides the error."""
        from peft_pretraining.data.hub_file_system import reading_for

        documents = self.source.read(shard, slices, part, start)
        while True:
            with reading_for(self.reading):
                document = next(documents, None)
            if self.reading.failure is not None:
                raise self.reading.failure
            if document is None:
                return
            yield document


def _as_pinned(options: SourceOptions) -> bool:
    """Whether the options mean the files of C4 whose names are known."""
    wanted = (options.config, options.revision, options.train_split, options.validation_split)
    known = (C4_CONFIG, C4_REVISION, "train", "validation")
    return all(got in ("", own) for got, own in zip(wanted, known, strict=True))


def _open_c4(split: str, options: SourceOptions, reading: Reading) -> HubSource:
    """Open C4 without a request to the hub."""
    count = C4_SHARDS[split]
    paths = [
        f"hf://datasets/{C4_REPOSITORY}@{C4_REVISION}/{C4_CONFIG}/c4-{split}.{i:05d}-of-{count:05d}.json.gz"
        for i in range(count)
    ]
    files = tuple(DataFile(path, "json", SIZE_UNKNOWN) for path in paths)
    identity = f"{C4_REPOSITORY}@{C4_REVISION}/{split}"
    shards = FileShards(reading.dataset, files, identity, options.text_column or "text")
    return HubSource(reading, C4_REPOSITORY, C4_REVISION, shards)


def _open_by_name(name: str, split: str, options: SourceOptions, reading: Reading) -> HubSource | None:
    from peft_pretraining.data.hub_file_system import reading_for
    from peft_pretraining.data.hub_repository import choose_column, choose_split, find_repository

    repository = find_repository(name, options, reading)
    train = options.train_split or "train"
    validation = options.validation_split or next(
        (each for each in VALIDATION_SPLITS if each in repository.splits and each != train), ""
    )
    paths = choose_split(repository, train, "--train_split", reading)
    if validation:
        held_out = choose_split(repository, validation, "--validation_split", reading)
        if both := sorted({*paths} & {*held_out}):
            raise reading.error(
                f"the splits {train} and {validation} both have the file {both[0].partition('@')[2]}: evaluate on "
                "documents that are not trained on, with another --validation_split."
            )
    if split != "train":
        if not validation:
            return None
        paths = held_out
    files = tuple(DataFile(path, format_of(path), repository.sizes[path]) for path in paths)
    column = choose_column(repository, options.text_column, reading)
    identity = f"{repository.name}@{repository.revision} {[path.partition('@')[2] for path in paths]}"
    with reading_for(reading):
        shards = open_files(reading.dataset, files, identity, replace(options, text_column=column))
    return HubSource(reading, repository.name, repository.revision, shards)


KIND = Hub()
