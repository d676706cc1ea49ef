"""Resolve the name of a data set on the hub to the files of its splits at one commit.

`datasets.load_dataset_builder` lists the files of a configuration in the order in which it reads them; no file is
downloaded. A wrong name, configuration, revision or split raises UserError with the ones that exist.
"""

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft_pretraining.data.hub_file_system import CheckedFileSystem, patient_requests
from peft_pretraining.data.sources.data_files import IN_WORDS, format_of
from peft_pretraining.data.sources.kind import SourceOptions
from peft_pretraining.data.sources.retry import Reading, UnreachableError
from peft_pretraining.errors import UserError

FORMATS = ("json", "text", "csv", "parquet", "arrow")
"""Builders of `datasets` whose files hold text in rows or lines."""
PARQUET_BRANCH = "refs/convert/parquet"
"""The branch where the hub keeps a copy of many data sets as parquet."""
_CONVERTED = re.compile(r"(?P<config>[^/]+)/[^/]+/\d+\.parquet")
_MOST_LISTED = 30

_resolved: dict[tuple[object, ...], "Repository"] = {}
_lock = threading.Lock()


@dataclass(frozen=True)
class Repository:
    """A data set of the hub in one configuration at one commit."""

    name: str
    """Its full name, such as Salesforce/wikitext."""
    revision: str
    """The commit."""
    config: str
    splits: dict[str, tuple[str, ...]]
    """hf:// addresses of the files of each split, pinned to the commit."""
    sizes: dict[str, int]
    """Bytes of each of them."""
    columns: dict[str, str]
    """Types of the columns, where the data set's card has them."""


def find_repository(name: str, options: SourceOptions, reading: Reading) -> Repository:
    """Resolve the data set `name` with `options`, once per process. Raises UserError."""
    from huggingface_hub import constants

    key = (name, options.config, options.revision, options.endpoint or constants.ENDPOINT)
    with _lock:
        if key not in _resolved:
            try:
                with patient_requests(reading, str(key[-1])):
                    _resolved[key] = _find(name, options, reading)
            except UnreachableError as error:
                raise reading.unreachable(str(key[-1]), error) from error
        return _resolved[key]


def choose_split(repository: Repository, wanted: str, flag: str, reading: Reading) -> tuple[str, ...]:
    """The files of the split `wanted`. Raises UserError that lists the splits and names the `flag`."""
    if wanted not in repository.splits:
        raise reading.error(
            f"{_in_config(repository)} has no split {wanted}: {flag} can be {_listed(repository.splits)}."
        )
    return repository.splits[wanted]


def choose_column(repository: Repository, wanted: str, reading: Reading) -> str:
    """The column that holds the text, `wanted` unless it is empty; "" if the data set's card lists no columns.

    Raises UserError that lists the columns that hold text.
    """
    if not repository.columns:
        return wanted
    texts = [column for column, kind in repository.columns.items() if kind in ("string", "large_string")]
    if wanted in texts:
        return wanted
    there = f"--text_column can be {_listed(texts)}" if texts else "it has none that holds text"
    if wanted in repository.columns:
        raise reading.error(
            f"the column {wanted} of {_in_config(repository)} holds {repository.columns[wanted]} and not text: {there}."
        )
    if wanted:
        raise reading.error(f"{_in_config(repository)} has no column {wanted}: {there}.")
    if "text" in texts or len(texts) == 1:
        return "text" if "text" in texts else texts[0]
    raise reading.error(f"{_in_config(repository)} has no column named text: {there}.")


def _find(name: str, options: SourceOptions, reading: Reading) -> Repository:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        info = _dataset_info(HfApi(endpoint=options.endpoint), name, options.revision, reading)
    except OfflineModeIsEnabled as error:
        raise UnreachableError("HF_HUB_OFFLINE is set") from error
    files = [sibling.rfilename for sibling in info.siblings or []]
    script = f"{name.rpartition('/')[2]}.py"
    if script in files or f"{info.id.rpartition('/')[2]}.py" in files:
        raise reading.error(
            f"{info.id} is read by a script of its own ({script}), which `datasets` no longer runs. Give "
            f"--dataset_revision {PARQUET_BRANCH}, where the hub keeps a copy of most such data sets as parquet."
        )
    builder = _builder(info, files, options, reading)
    if builder.name not in FORMATS:
        raise reading.error(
            f"{info.id} holds {builder.name} files, which are not read as text: those that are, are {_listed(FORMATS)}."
        )
    found = {str(split): tuple(addresses) for split, addresses in (builder.config.data_files or {}).items()}
    # The library has one builder for all configurations, and a card may list files of any kind.
    splits = {split: tuple(each for each in addresses if format_of(each)) for split, addresses in found.items()}
    if not any(splits.values()):
        example = next((each for addresses in found.values() for each in addresses), "nothing")
        raise reading.error(f"{info.id} holds {example}: files that are read as text are {IN_WORDS}.")
    return Repository(
        info.id,
        info.sha,
        options.config if _converted_configs(files) else builder.config.name,
        {split: addresses for split, addresses in splits.items() if addresses},
        _sizes([each for addresses in splits.values() for each in addresses]),
        {column: getattr(kind, "dtype", type(kind).__name__) for column, kind in (builder.info.features or {}).items()},
    )


def _dataset_info(api: Any, name: str, revision: str, reading: Reading) -> Any:
    """The hub's information on a data set; its `sha` is the commit. Raises UserError."""
    from huggingface_hub.errors import (
        DisabledRepoError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return api.dataset_info(name, revision=revision or None)
    except GatedRepoError as error:
        raise reading.error(_gated(name, api.endpoint)) from error
    except RevisionNotFoundError as error:
        refs = api.list_repo_refs(name, repo_type="dataset")
        there = [ref.name for ref in [*refs.branches, *refs.tags]] + [ref.ref for ref in refs.converts]
        raise reading.error(
            f"{name} has no revision {revision}: --dataset_revision can be {_listed(there)}, or a commit."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise reading.error(
            f"there is no file or folder of this name, and the hub ({api.endpoint}) has no data set {name} that you "
            "may read. Check the path, or the name (ORGANISATION/NAME); for a private data set, log in with "
            "`hf auth login`."
        ) from error
    except DisabledRepoError as error:
        raise reading.error(f"the hub has disabled {name}: give another data set.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise reading.error(
            f"the hub ({api.endpoint}) refuses {name} (HTTP status {status}). Check HF_ENDPOINT and `hf auth login`."
        ) from error


def _builder(info: Any, files: Sequence[str], options: SourceOptions, reading: Reading) -> Any:
    """The builder of `datasets` for the wanted configuration. Raises UserError."""
    import datasets

    configs = _converted_configs(files)
    arguments: dict[str, str] = {"name": options.config} if options.config else {}
    if configs:
        # That branch has no card: each configuration is a folder.
        if (len(configs) > 1 or options.config) and options.config not in configs:
            raise reading.error(_configs_in_words(info.id, configs, options.config))
        arguments = {"data_dir": options.config or configs[0]}
    try:
        builder = datasets.load_dataset_builder(info.id, revision=info.sha, **arguments)
    except Exception as error:
        raise _why_no_builder(error, info, options, reading) from error
    if builder.name == "cache":  # its silent fallback after any error
        raise reading.error(f"{info.id} could not be read at commit {info.sha}: is there a file that is text?")
    return builder


def _why_no_builder(error: Exception, info: Any, options: SourceOptions, reading: Reading) -> Exception:
    """The error with a sentence on what `load_dataset_builder` has raised."""
    import datasets
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError
    from huggingface_hub import constants

    if isinstance(error, UserError):
        return error
    if info.gated and isinstance(error, DatasetNotFoundError):
        return reading.error(_gated(info.id, options.endpoint or constants.ENDPOINT))
    if isinstance(error, DataFilesNotFoundError | datasets.data_files.EmptyDatasetError):
        return reading.error(
            f"{info.id} holds no files that are read as text ({_listed(FORMATS)}). Try --dataset_revision "
            f"{PARQUET_BRANCH}, where the hub keeps a copy of many data sets as parquet."
        )
    if isinstance(error, ValueError):
        configs = datasets.get_dataset_config_names(info.id, revision=info.sha)
        if options.config not in configs:
            return reading.error(_configs_in_words(info.id, configs, options.config))
    return reading.error(f"`datasets` cannot read {info.id} ({type(error).__name__}: {error}).")


def _sizes(addresses: Sequence[str]) -> dict[str, int]:
    """Bytes of each file, from the listings by which `datasets` found them."""
    import datasets

    files = CheckedFileSystem(endpoint=datasets.config.HF_ENDPOINT, token=None)
    listed = {info["name"]: info["size"] for listing in files.dircache.values() for info in listing}
    paths = {address: address.removeprefix("hf://") for address in addresses}
    sizes = {each: int(listed[path] if path in listed else files.info(path)["size"]) for each, path in paths.items()}
    # Otherwise every thread that reads would copy the listings.
    CheckedFileSystem.clear_instance_cache()
    return sizes


def _converted_configs(files: Sequence[str]) -> list[str]:
    """The configurations of files laid out as in PARQUET_BRANCH, CONFIGURATION/SPLIT/0000.parquet; else empty."""
    found = [_CONVERTED.fullmatch(file) for file in files if not file.startswith(".")]
    return sorted({match["config"] for match in found if match}) if all(found) else []


def _gated(name: str, endpoint: str) -> str:
    return (
        f"{name} is gated: accept its terms at {endpoint}/datasets/{name} and log in with `hf auth login` (or set "
        "HF_TOKEN)."
    )


def _configs_in_words(name: str, configs: Sequence[str], wanted: str) -> str:
    has = f"has no configuration {wanted}" if wanted else "has several configurations"
    return f"{name} {has}: --dataset_config can be {_listed(configs)}."


def _in_config(repository: Repository) -> str:
    return f"{repository.name} (configuration {repository.config})"


def _listed(names: Any) -> str:
    """Join names as "a, b or c"; of very many only the first."""
    listed = list(names)
    if len(listed) > _MOST_LISTED:
        return f"{', '.join(listed[:_MOST_LISTED])}, or one of {len(listed) - _MOST_LISTED} more"
    return listed[0] if len(listed) == 1 else f"{', '.join(listed[:-1])} or {listed[-1]}" if listed else "nothing"
