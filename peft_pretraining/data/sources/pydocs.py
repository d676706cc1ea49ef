"""`--dataset pydocs`: several megabytes of English and code that every machine with Python and torch has.

The text is Python's own documentation topics (`pydoc_data.topics`), the docstrings of the standard library, and those
of the packages that training needs. Sources are parsed with `ast`; no module is imported or run for it. A document is a
topic, or consecutive docstrings of a module, concatenated up to about the length of a C4 document, so that
--packing pad cuts off little. A repeated docstring is skipped. Whole modules and topics are held out for validation, by
a hash of their name.

The text depends on the installed versions. It is cached under a hash of them, and the loader refuses to resume a run
after they have changed.
"""

import ast
import contextlib
import gzip
import hashlib
import importlib
import importlib.metadata
import json
import logging
import sys
import sysconfig
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

from peft_pretraining.data.cache import cache_dir, publish
from peft_pretraining.data.permutation import hash64
from peft_pretraining.data.sources.documents import MemorySource, Source
from peft_pretraining.data.sources.kind import OwnBPE, SourceOptions, TextKind
from peft_pretraining.errors import UserError

PACKAGES = ("numpy", "pandas", "huggingface_hub", "datasets", "fsspec", "torch", "transformers")
"""The packages in the order in which they are read; a fixed list, so that other packages do not change the data set.

Those with much documentation for their code come first, because parsing is slow; the standard library is read before
torch.
"""
LIMIT_CHARS = 8_000_000
PACKAGE_LIMIT_CHARS = 2_000_000
DOCUMENT_CHARS = 1500
VALIDATION_FRACTION = 0.05
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "testing", "idlelib", "lib2to3", "__pycache__"}
_FORMAT = 2

_logger = logging.getLogger(__name__)


class PyDocs(TextKind):
    """Python's own documentation."""

    name = "pydocs"
    in_words = "pydocs (Python's own documentation, needs no network)"
    default_tokenizer = OwnBPE("pydocs-bpe", 8192)

    def open(self, dataset: str, split: str, options: SourceOptions) -> Source:
        """See `DatasetKind.open`."""
        return MemorySource(dataset, pydocs_documents(split))


KIND = PyDocs()


def pydocs_documents(split: str) -> list[str]:
    """The documents of split "train" or "validation", in a fixed order."""
    wanted = split == "validation"
    return [text for name, text in _load() if _is_validation(name) == wanted]


def collect() -> Iterator[tuple[str, str]]:
    """Yield (name of the module or topic, text of the document), of each folder up to PACKAGE_LIMIT_CHARS."""
    seen: set[bytes] = set()
    topics: dict[str, str] = {}
    with contextlib.suppress(ImportError):  # some distributions leave the module out
        topics = importlib.import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        for text in _concatenated(topics[name].split("\n\n")):
            yield f"topic:{name}", text
    for folder in _folders():
        size = 0
        for path in sorted(folder.rglob("*.py")):
            if size >= PACKAGE_LIMIT_CHARS:
                break
            relative = path.relative_to(folder.parent if folder.name in PACKAGES else folder)
            if _SKIPPED_FOLDERS.isdisjoint(relative.parts):
                module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
                for text in _concatenated(read_docstrings(path, module, seen)):
                    size += len(text)
                    yield module, text


def collect_up_to(limit_chars: int) -> Iterator[tuple[str, str]]:
    """Yield the documents of `collect` until they have `limit_chars` characters."""
    size = 0
    for name, text in collect():
        yield name, text
        size += len(text)
        if size >= limit_chars:
            return


def _folders() -> list[Path]:
    """The folders of installed PACKAGES, with the standard library before torch."""
    paths = sysconfig.get_paths()
    folders: list[Path] = []
    for package in PACKAGES:
        if package == "torch":
            folders.append(Path(paths["stdlib"]))
        folders.extend(Path(paths[kind]) / package for kind in ("purelib", "platlib"))
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def read_docstrings(path: Path, module: str, seen: set[bytes]) -> Iterator[str]:
    """Yield the docstrings of a file in order, each below its dotted name; none if it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in strings of other packages
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError, RecursionError):
        return
    for name, node in _documented(tree, module):
        text = ast.get_docstring(node)
        if not text or (digest := hashlib.sha1(text.encode("utf-8", "replace")).digest()) in seen:
            continue
        seen.add(digest)
        yield f"{name}\n{text.encode('utf-8', 'replace').decode()}"


_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _documented(node: _Documented, name: str) -> Iterator[tuple[str, _Documented]]:
    yield name, node
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _documented(child, f"{name}.{child.name}")


def _concatenated(pieces: Iterator[str] | list[str]) -> Iterator[str]:
    """Join consecutive pieces by blank lines until they reach DOCUMENT_CHARS."""
    parts: list[str] = []
    size = 0
    for piece in pieces:
        if not piece.strip():
            continue
        parts.append(piece.strip("\n"))
        size += len(piece)
        if size >= DOCUMENT_CHARS:
            yield "\n\n".join(parts)
            parts, size = [], 0
    if parts:
        yield "\n\n".join(parts)


def _is_validation(name: str) -> bool:
    return hash64(zlib.crc32(name.encode())) < VALIDATION_FRACTION * 2**64


def _load() -> list[tuple[str, str]]:
    versions = [(package, _version(package)) for package in PACKAGES]
    key = repr((_FORMAT, sys.version_info[:3], versions, LIMIT_CHARS, PACKAGE_LIMIT_CHARS, DOCUMENT_CHARS))
    path = cache_dir() / f"pydocs-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json.gz"
    if path.is_file():
        try:
            return _parse(path.read_bytes())
        except (OSError, EOFError, ValueError, zlib.error):
            path.unlink()  # a damaged cache file is written again
    _logger.warning("pydocs: reading the docstrings of the installed packages once, into %s", path)
    documents = list(collect_up_to(LIMIT_CHARS))
    if not documents:
        raise UserError(
            "--dataset pydocs: no documentation topics and no Python sources were found; give another --dataset."
        )
    return _parse(publish(path, gzip.compress(json.dumps(documents).encode(), mtime=0)))


def _parse(content: bytes) -> list[tuple[str, str]]:
    return [(str(name), str(text)) for name, text in json.loads(gzip.decompress(content))]
