"""`--dataset FOLDER` in C4's layout: files *train*.json.gz and *validation*.json.gz in it, or in its folder en/."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from peft_pretraining.data.sources.documents import Source
from peft_pretraining.data.sources.gzip_json import GzipShards
from peft_pretraining.data.sources.kind import SourceOptions, TextKind
from peft_pretraining.errors import UserError

_READ_BYTES = 1 << 18


class C4Folder(TextKind):
    """A folder that was downloaded from the hub, or is made like it."""

    in_words = "a folder in C4's layout"
    precedence = 2  # any folder, after those of token ids

    def recognises(self, dataset: str) -> bool:
        """Any folder."""
        return Path(dataset).expanduser().is_dir()

    def open(self, dataset: str, split: str, options: SourceOptions) -> Source:
        """See `DatasetKind.open`."""
        folder = Path(dataset).expanduser()
        for place in (folder, folder / "en"):
            if files := sorted(path.name for path in place.glob(f"*{split}*.json.gz")):
                sizes = [(file, (place / file).stat().st_size) for file in files]
                return GzipShards(dataset, tuple(files), repr(sizes), partial(_chunks, place))
        raise UserError(
            f"--dataset {dataset}: neither it nor its folder en/ holds a file *{split}*.json.gz "
            "(gzip-compressed JSON lines with a field text, as in allenai/c4)."
        )


def _chunks(folder: Path, name: str) -> Iterator[bytes]:
    """The bytes of a file of the folder."""
    path = folder / name
    try:
        with path.open("rb") as file:
            while chunk := file.read(_READ_BYTES):
                yield chunk
    except OSError as error:
        raise UserError(f"--dataset: {path} cannot be read ({error.strerror}).") from error


KIND = C4Folder()
