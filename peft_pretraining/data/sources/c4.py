"""`--dataset c4`: allenai/c4's English part, streamed from the Hugging Face hub."""

from peft_pretraining.data.sources.documents import Source
from peft_pretraining.data.sources.gzip_json import GzipShards
from peft_pretraining.data.sources.hub import HubFiles
from peft_pretraining.data.sources.kind import SourceOptions, TextKind

REPOSITORY = "allenai/c4"
REVISION = "1588ec454efa1a09f29cd18ddd04fe05fc8653a2"
"""Pinned: a changed shard would change the order of documents in a resumed run."""
SHARDS = {"train": 1024, "validation": 8}


class C4(TextKind):
    """C4 on the hub."""

    name = "c4"
    in_words = "c4 (streamed from the hub)"
    needs_network = True

    def open(self, dataset: str, split: str, options: SourceOptions) -> Source:
        """See `DatasetKind.open`; nothing is fetched yet."""
        count = SHARDS[split]
        files = tuple(f"en/c4-{split}.{i:05d}-of-{count:05d}.json.gz" for i in range(count))
        hub = HubFiles(dataset, REPOSITORY, REVISION, options.endpoint, options.retry, options.stop)
        return GzipShards(dataset, files, f"{REPOSITORY}@{REVISION}/{split}", hub.chunks)


KIND = C4()
