"""A split of a data set on the hub, or of a folder that has the hub's layout."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from peft_pretraining.errors import UserError

_READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
"""The readers of `datasets` by the ending of a file."""


def load_split(dataset: str, config: str, split: str, columns: Collection[str]) -> Any:
    """The `datasets.Dataset` of a split with at least these columns.

    dataset: a name on the hub, or a folder that holds CONFIG/SPLIT*.parquet (or .jsonl, .json, .csv), as a copy of the
    hub's has it. Raises UserError for what is not there or cannot be read.
    """
    import datasets

    folder = Path(dataset)
    try:
        if folder.is_dir():
            reader, files = _files(folder, config, split)
            found = datasets.load_dataset(reader, data_files={split: files}, split=split)
        elif dataset.startswith(("/", ".", "~")):
            raise UserError(f"--dataset {dataset}: there is no such folder")
        else:
            found = datasets.load_dataset(dataset, config, split=split)
    except UserError:
        raise
    except Exception as error:  # of datasets, of the hub, or of a reader
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(
            f"--dataset {dataset}: {config}/{split} cannot be read ({reason}); give a folder with {config}/{split}*"
            f"{'|'.join(_READERS)}, or a name on the hub while it can be reached"
        ) from error
    missing = sorted(set(columns) - set(found.column_names))
    if missing:
        raise UserError(
            f"--dataset {dataset}: {config}/{split} has no column {' and '.join(missing)}; its columns are "
            f"{', '.join(found.column_names)}"
        )
    if not len(found):
        raise UserError(f"--dataset {dataset}: {config}/{split} holds no examples")
    return found


def _files(folder: Path, config: str, split: str) -> tuple[str, list[str]]:
    """The reader of a split's files and their paths. Raises UserError where there are none, or of two kinds."""
    found = sorted(path for path in (folder / config).glob(f"{split}*") if path.suffix in _READERS)
    found = [path for path in found if path.stem == split or path.stem.startswith(f"{split}-")]
    if not found:
        raise UserError(
            f"--dataset {folder}: there is no {config}/{split}.parquet, nor one that ends in -00000-of-00001.parquet, "
            "nor one in .jsonl, .json or .csv"
        )
    if len(kinds := {path.suffix for path in found}) > 1:
        raise UserError(f"--dataset {folder}: {config}/{split} is there as {' and '.join(sorted(kinds))}: keep one")
    return _READERS[found[0].suffix], [str(path) for path in found]
