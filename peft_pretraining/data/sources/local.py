"""`--dataset` with a folder, glob or file of text on this machine, in any of the usual formats.

The splits are found by the names of files and folders (see `split_names`). Files that name no split are for training,
unless others name train: then they are skipped, with a warning. Test files are read only if a flag names them, and are
mentioned in a warning otherwise. Hidden files and files that only describe data are ignored. Of several formats in a
split the one with most bytes is read, and of several links to a file one; both are logged.
"""

import filecmp
import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath

from peft_pretraining.data.sources.compression import SUFFIXES as COMPRESSIONS
from peft_pretraining.data.sources.data_files import (
    IN_WORDS,
    DataFile,
    FileShards,
    bytes_in_words,
    check_contents,
    format_of,
    open_files,
    read_file,
)
from peft_pretraining.data.sources.documents import is_text
from peft_pretraining.data.sources.file_heads import what_is, why_unreadable
from peft_pretraining.data.sources.kind import SourceOptions, TextKind
from peft_pretraining.data.sources.log_once import log_once
from peft_pretraining.data.sources.split_names import is_in_a_title, named, splits_named
from peft_pretraining.errors import UserError

_COMPARED_FILES, _SAME_DOCUMENTS, _FIRST_ITEMS = 64, 5, 200
_FEW = 8
"""Up to one file in so many may be of another format than its name and counts as damage; more are an error."""
_ABOUT = re.compile(r"(?i)(readme|licen[cs]e|copying|notice|changelog|requirements)([-._]\w+)*\.txt")
_ABOUT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "config.json", "state.json"}

_logger = logging.getLogger(__name__)


class LocalFiles(TextKind):
    """Files of text on this machine."""

    in_words = f"a folder, glob or file of {IN_WORDS}"
    precedence = 2  # any folder and file, after those of token ids

    def recognises(self, dataset: str) -> bool:
        """Whether it is an existing path, a glob, or a name with the suffix of a file of documents."""
        return Path(dataset).expanduser().exists() or glob.has_magic(dataset) or bool(format_of(dataset))

    def open(self, dataset: str, split: str, options: SourceOptions) -> FileShards | None:
        """See `DatasetKind.open`."""
        return open_local(dataset, split, options)


KIND = LocalFiles()


@dataclass(frozen=True)
class _Listed:
    """The files of a data set that were found."""

    root: Path
    paths: tuple[str, ...]
    """Relative to `root`, with /, in order."""

    def file(self, path: str) -> DataFile:
        found = self.root / path
        return DataFile(str(found), format_of(path), found.stat().st_size)


def open_local(dataset: str, split: str, options: SourceOptions) -> FileShards | None:
    """Open the files of split "train" or "validation"; None for a missing validation split. Raises UserError."""
    path = Path(dataset).expanduser()
    if path.is_file():
        return _open_file(dataset, path, split, options)
    try:
        listed = _list_folder(dataset, path) if path.is_dir() else _list_glob(dataset, path)
    except OSError as error:
        raise UserError(f"--dataset {dataset}: {error.filename} cannot be read ({error.strerror}).") from error
    chosen = {each: _of_split(dataset, listed, each, options) for each in ("train", "validation")}
    if not (paths := chosen[split]):
        return None
    _check_apart(dataset, listed.root, chosen["train"], chosen["validation"])
    opened = _open_listed(dataset, _Listed(listed.root, tuple(paths)), options)
    if split == "validation":
        _check_beginnings(dataset, opened, [listed.file(path) for path in chosen["train"]])
    return opened


def _open_file(dataset: str, path: Path, split: str, options: SourceOptions) -> FileShards | None:
    """Open a single file, which is for training."""
    if name := options.train_split or options.validation_split:
        flag = "--train_split" if options.train_split else "--validation_split"
        raise UserError(f"{flag} {name}: --dataset {dataset} is a single file and has no splits; give its folder.")
    if not format_of(path.name):
        raise UserError(f"--dataset {dataset} does not end like a file of text ({IN_WORDS}){_looks_like(path)}.")
    if split == "validation":
        return None
    beside = (other.name for other in sorted(path.parent.iterdir()) if other.name != path.name and is_data(other))
    if held_out := next((name for name in beside if splits_named(name) == {"validation"}), None):
        log_once(
            f"--dataset {dataset} is a single file, and {held_out} beside it is not read: to evaluate on that, give "
            "their folder"
        )
    return _open_listed(dataset, _Listed(path.parent, (path.name,)), options)


def _looks_like(path: Path) -> str:
    if reason := why_unreadable(str(path)):
        return f", and cannot be read ({reason})"
    found = what_is(str(path), "json")
    return f"; it seems to be {found or 'JSON lines, whose name should end with .jsonl'}"


def _open_listed(dataset: str, listed: _Listed, options: SourceOptions) -> FileShards:
    files = tuple(map(listed.file, listed.paths))
    checked = list(check_contents(files))
    others = [each for each in checked if each.found]
    if others and len(others) * _FEW >= len(files):
        raise others[0].error(dataset)
    bad = [each for each in checked if each.found or each.unreadable]
    if bad and len(bad) < len(files):
        log_once(
            f"--dataset {dataset}: {len(bad)} of {len(files)} files cannot be read and count as damaged places, such "
            f"as {bad[0].file.path} ({f'it is {bad[0].found}' if bad[0].found else bad[0].unreadable})"
        )
    common = os.path.commonpath([str(PurePosixPath(path).parent) for path in listed.paths])
    sizes = [
        (path if not common else str(PurePosixPath(path).relative_to(common)), file.size)
        for path, file in zip(listed.paths, files, strict=True)
    ]
    return open_files(dataset, files, repr(sizes), options, checked)


# ---- what is there


def _list_folder(dataset: str, folder: Path) -> _Listed:
    if any((folder / "en").glob("c4-*.json*")):
        folder = folder / "en"  # C4's English part, beside which may be other parts
    walked = list(_walk(folder))
    found = sorted(path for path in walked if is_data(folder / path))
    if lost := [path for path in walked if format_of(path) and not (folder / path).exists()]:
        log_once(f"--dataset {dataset}: {sorted(lost)[0]} is a link to a file that is not there, and is left out")
    if not found:
        others = sorted({Path(path).suffix or "no ending" for path in _walk(folder)})
        there = f"; there are files of {', '.join(others[:5])}" if others else ""
        advice = ": plain text needs the ending .txt" if {".md", ".text", ".rst"} & {*others} else ""
        raise UserError(f"--dataset {dataset}: there is no file of text in this folder ({IN_WORDS}){there}{advice}.")
    return _Listed(folder, tuple(found))


def _walk(folder: Path) -> Iterator[str]:
    """Yield the files below a folder, relative to it; follows links, but visits each folder once."""
    seen = set()

    def refuse(error: OSError) -> None:
        raise error

    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = [] if real in seen else [name for name in folders if not name.startswith((".", "__"))]
        files = [] if real in seen else files
        seen.add(real)
        yield from (Path(parent, name).relative_to(folder).as_posix() for name in files)


def _list_glob(dataset: str, pattern: Path) -> _Listed:
    if not glob.has_magic(str(pattern)):
        raise UserError(f"--dataset {dataset}: there is no such file.")
    root, rest = _split_pattern(pattern)
    # Path.glob would match hidden files, too.
    matched = [root / path for path in glob.glob(rest, root_dir=root, recursive=True)]  # noqa: PTH207
    found = {path.relative_to(root) for path in matched if is_data(path)}
    if files := sorted(path.as_posix() for path in found if not _special(path, pattern.parts)):
        return _Listed(root, tuple(files))
    if not matched:
        there = sorted(path.name for path in root.iterdir())[:5] if root.is_dir() else []
        holds = f"{root} holds {', '.join(there)}" if there else f"there is no folder {root}, or nothing in it"
        raise UserError(f"--dataset {dataset}: no file matches this pattern; {holds}.")
    if all(path.is_dir() for path in matched):
        raise UserError(
            f"--dataset {dataset}: only folders match this pattern; for the files in them write {dataset}/**."
        )
    raise UserError(
        f"--dataset {dataset}: no file of text matches this pattern ({IN_WORDS}), only others such as "
        f"{sorted(matched)[0]}."
    )


def _split_pattern(pattern: Path) -> tuple[Path, str]:
    """(the folder to search, the pattern below it); an existing folder may have glob characters in its name."""
    root = Path()
    for number, part in enumerate(pattern.parts):
        if glob.has_magic(part) and not (root / part).is_dir():
            return root, str(Path(*pattern.parts[number:]))
        root /= part
    return root.parent, glob.escape(root.name)


def _special(path: Path, asked: tuple[str, ...]) -> bool:
    """Whether a file is in a folder such as __pycache__ that the pattern does not name."""
    return any(part.startswith("__") and part not in asked for part in path.parent.parts)


def is_data(path: Path) -> bool:
    """Whether a path is a file of documents: not hidden, and not one that describes a data set or another file."""
    name = path.name
    about = name in _ABOUT_DATA or _ABOUT.fullmatch(name)
    if name.startswith(".") or about or not format_of(name) or not path.is_file():
        return False
    return not (path.suffix == ".json" and path.with_suffix("").is_file())


# ---- splits


def _of_split(dataset: str, listed: _Listed, split: str, options: SourceOptions) -> list[str]:
    """The paths of a split, all of one format; [] for a missing validation split."""
    flag = f"--{split}_split"
    if name := options.train_split if split == "train" else options.validation_split:
        if not (paths := [path for path in listed.paths if named(path, name)]):
            raise UserError(f"{flag} {name}: no file of --dataset {dataset} is called so. {_splits_in_words(listed)}")
        return _of_one_format(dataset, split, listed.root, paths)
    both = [path for path in listed.paths if {"train", "validation"} <= splits_named(path)]
    if both:
        raise UserError(
            f"--dataset {dataset}: {both[0]} is called both train and validation; rename it, or choose the "
            "splits with --train_split and --validation_split."
        )
    paths = [path for path in listed.paths if split in splits_named(path)]
    unnamed = [path for path in listed.paths if not splits_named(path)]
    if split == "train":
        if name := options.validation_split:
            unnamed = [path for path in unnamed if not named(path, name)]
        if paths and unnamed:
            paths = _with_or_without(dataset, listed, paths, unnamed)
        if not (paths := paths or unnamed):
            raise UserError(
                f"--dataset {dataset}: there is no file to train on. {_splits_in_words(listed)} "
                "Choose one with --train_split."
            )
        _log_unread_test_split(dataset, listed, options.validation_split)
    return _of_one_format(dataset, split, listed.root, paths) if paths else []


def _with_or_without(dataset: str, listed: _Listed, called_train: list[str], unnamed: list[str]) -> list[str]:
    """The paths to train on where some are called train: those alone, unless it is a word in titles of little text."""
    sizes = [sum(listed.file(path).size for path in paths) for paths in (called_train, unnamed)]
    others = f"{_files(len(unnamed))} without a split in the name, such as {unnamed[0]}"
    if sizes[1] > sizes[0] and all(map(is_in_a_title, called_train)):
        log_once(
            f"--dataset {dataset}: {called_train[0]} has the word train in its name, and is read as {others}; "
            "--train_split train trains on what is called so alone"
        )
        return [path for path in listed.paths if path in {*called_train, *unnamed}]
    log_once(
        f"--dataset {dataset}: {others}, left out ({100 * sizes[1] / max(1, sum(sizes)):.0f} % of the text), because "
        f"{_files(len(called_train))}, such as {called_train[0]}, {'is' if len(called_train) == 1 else 'are'} called "
        "train; rename one or the other to train on all"
    )
    return called_train


def _log_unread_test_split(dataset: str, listed: _Listed, evaluated: str) -> None:
    tests = [
        path for path in listed.paths if splits_named(path) == {"test"} and not (evaluated and named(path, evaluated))
    ]
    if tests:
        log_once(
            f"--dataset {dataset}: {_files(len(tests))} called test, such as {tests[0]}, left unread; "
            "--validation_split test evaluates on what is called so"
        )


def _splits_in_words(listed: _Listed) -> str:
    counts = Counter(split for path in listed.paths for split in splits_named(path) or {"without a name"})
    return "Its splits: " + ", ".join(f"{name} ({_files(count)})" for name, count in sorted(counts.items())) + "."


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


def _of_one_format(dataset: str, split: str, root: Path, paths: list[str]) -> list[str]:
    """The files of the format with most bytes, without duplicates."""
    by_suffix: dict[str, list[str]] = {}
    for path in _without_links(dataset, root, paths):
        by_suffix.setdefault(_suffix(path), []).append(path)
    sizes = {suffix: sum((root / path).stat().st_size for path in group) for suffix, group in by_suffix.items()}
    taken = max(by_suffix, key=lambda suffix: (sizes[suffix], len(by_suffix[suffix]), suffix))
    if len(by_suffix) > 1:
        listed = {
            suffix: f"{_files(len(group))} of {suffix} ({bytes_in_words(sizes[suffix])})"
            for suffix, group in sorted(by_suffix.items())
        }
        log_once(
            f"--dataset {dataset}: for {split} the {listed.pop(taken)} are read, and {' and '.join(listed.values())} "
            f"are left out: {_how_to_read_all(dataset, by_suffix, sizes)}"
        )
    return _each_once(dataset, by_suffix[taken])


def _how_to_read_all(dataset: str, by_suffix: dict[str, list[str]], sizes: dict[str, int]) -> str:
    """Patterns of all formats with their shares of the bytes; for a glob, which has a pattern of its own, in words."""
    if not Path(dataset).expanduser().is_dir():
        return "a pattern that ends with a format's name reads that one; several are given as FIRST:0.7,SECOND:0.3"
    patterns = []
    for suffix, group in sorted(by_suffix.items()):
        ending = group[0][group[0].lower().rindex(suffix) :]  # with that of a compression
        share = max(0.001, sizes[suffix] / max(1, sum(sizes.values())))
        patterns.append(f"{dataset.rstrip('/')}/**/*{ending}:{share:.2g}")
    return f"--dataset '{','.join(patterns)}' reads all"


def _without_links(dataset: str, root: Path, paths: list[str]) -> list[str]:
    """The paths without further links to the same file, of which the first is kept."""
    first: dict[object, str] = {}
    again = [(path, kept) for path in paths if (kept := first.setdefault(_key(root / path), path)) != path]
    if again:
        path, kept = again[0]
        more = f", and so are {len(again) - 1} more" if len(again) > 1 else ""
        log_once(f"--dataset {dataset}: {path} and {kept} are one file by two names, which is read once{more}")
    return list(first.values())


def _key(path: Path) -> object:
    """An identity of a file that is equal for all links to it."""
    found = path.stat()
    return (found.st_dev, found.st_ino) if found.st_ino else os.path.realpath(path)


def _each_once(dataset: str, paths: list[str]) -> list[str]:
    """The paths without further copies of a file in another compression."""
    kept: dict[str, str] = {}
    for path in paths:
        kept.setdefault(_decompressed_name(path), path)
    if len(kept) < len(paths):
        left = next(path for path in paths if path not in kept.values())
        log_once(
            f"--dataset {dataset}: of files that are there once more in another compression one is read, so "
            f"{kept[_decompressed_name(left)]} and not {left}"
        )
    return list(kept.values())


def _suffix(path: str) -> str:
    """The suffix without compression: .jsonl for a.jsonl.gz."""
    return PurePosixPath(_decompressed_name(path)).suffix.lower()


def _decompressed_name(path: str) -> str:
    for compression in COMPRESSIONS:
        if path.lower().endswith(compression):
            path = path[: -len(compression)]
    return path


def _check_beginnings(dataset: str, validation: FileShards, train: list[DataFile]) -> None:
    """Raise UserError if a validation file and a training file of any format begin with the same documents."""

    def beginning(file: DataFile) -> tuple[str, ...]:
        items = islice(read_file(file, validation.column, validation.unit), _FIRST_ITEMS)
        texts = tuple(islice(filter(is_text, items), _SAME_DOCUMENTS))
        return texts if len(texts) == _SAME_DOCUMENTS else ()

    of_training = {texts: file for file in train[:_COMPARED_FILES] if (texts := beginning(file))}
    for file in validation.files[:_COMPARED_FILES]:
        if other := of_training.get(beginning(file)):
            raise UserError(
                f"--dataset {dataset}: {file.path} of the validation split begins with the same documents as "
                f"{other.path} of the training split: perplexity would be measured on text that was trained on. "
                "Remove one of them."
            )


def _check_apart(dataset: str, root: Path, train: list[str], validation: list[str]) -> None:
    """Raise UserError if a file is in both splits, by its path or as a copy of the same name."""
    by_name: dict[str, list[str]] = {}
    real = {_key(root / path): path for path in train}
    for path in validation:
        if (other := real.get(_key(root / path), path)) != path:
            raise UserError(
                f"--dataset {dataset}: {path} of the validation split is a link to {other} of the training split: "
                "perplexity would be measured on text that was trained on."
            )
    for path in train:
        by_name.setdefault(PurePosixPath(path).name, []).append(path)
    for path in validation:
        for other in by_name.get(PurePosixPath(path).name, []):
            one, two = root / other, root / path
            empty = one.stat().st_size == 0
            if path == other or (not empty and filecmp.cmp(one, two, shallow=False)):
                same = "" if path == other else f", as {other}, which is its copy"
                raise UserError(
                    f"--dataset {dataset}: {path} is in the validation split and in the training split"
                    f"{same}: perplexity would be measured on text that was trained on."
                )
