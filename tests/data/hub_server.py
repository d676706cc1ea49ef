"""A local HTTP server that stands for the hub and can refuse, stall, cut off, and answer with errors."""

import hashlib
import json
import socket
import struct
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from peft_pretraining.data import hub_file_system, hub_repository

STALL_SECONDS = 1.0
FAULTS = ("refuse", "stall", "cut", "500", "503", "429", "garbage", "short", "whole")
"""Everything that can be done to a range request and that must not be seen in the documents."""


def point_at(hub: "HubServer", cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub and `datasets` take `hub` for the hub, as HF_ENDPOINT would before they are imported."""
    import datasets
    from huggingface_hub import HfFileSystem, constants

    # What was learned of a hub is kept by its address, and a port that is free again may be given to the next server.
    monkeypatch.setattr(hub_repository, "_resolved", {})
    for kind in (HfFileSystem, hub_file_system.CheckedFileSystem):
        kind.clear_instance_cache()
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.endpoint)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache / "datasets"))
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)


class HubServer:
    """Serves the files of a folder under any ".../resolve/<revision>/<path>", with faults from a list, in turn."""

    def __init__(self, folder: Path, faults: list[str] | None = None, port: int = 0) -> None:
        """Faults: refuse (a reset), stall, cut, garbage (a wrong range), short (fewer bytes than the range), whole (all
        of the file instead of the range), moved (a redirect), or an HTTP status."""
        self.folder = folder
        self.faults = list(faults or [])
        self.only = ""
        """Only requests whose path has this in it get faults."""
        self.made: list[str] = []
        self.paths: list[str] = []
        self.bytes_sent = 0
        self.retry_after = "0"
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                """Be quiet."""

            def do_GET(self) -> None:
                outer.answer(self)

            def do_HEAD(self) -> None:
                outer.answer(self)

            def do_POST(self) -> None:
                outer.answer(self)

        self.server = _Server(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    @property
    def requests(self) -> int:
        """How many came in."""
        return len(self.paths)

    def close(self) -> None:
        """Stop serving, on open connections too: a client that kept one would go on reaching this server."""
        self.server.shutdown()
        self.server.server_close()
        self.server.close_connections()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        """One request, good or bad."""
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        with self.lock:
            self.paths.append(handler.path)
            fault = self.faults.pop(0) if self.faults and self.only in handler.path else ""
            self.made += [fault] if fault else []
        if fault == "refuse":
            # A reset instead of an answer.
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.close_connection = True
            handler.connection.close()
            return
        if fault == "stall":
            time.sleep(STALL_SECONDS)
            handler.close_connection = True
            return
        if fault.isdigit():
            retry_after = {"Retry-After": self.retry_after} if fault in ("429", "503") else {}
            self.send(handler, int(fault), b"", retry_after)
        elif fault == "moved":
            self.send(handler, 302, b"", {"Location": handler.path})
        else:
            self.respond(handler, body, fault)

    def respond(self, handler: BaseHTTPRequestHandler, body: bytes, fault: str) -> None:
        """A file, or a part of it."""
        path = self.find(handler.path.partition("/resolve/")[2].partition("/")[2])
        if path.is_file():
            self.send_file(handler, path, {}, fault)
        else:
            self.send(handler, 404, b"")

    def find(self, name: str) -> Path:
        """Where the file `name` of the repository lies."""
        return self.folder / name

    def send(
        self,
        handler: BaseHTTPRequestHandler,
        status: int,
        content: bytes,
        headers: Mapping[str, str] | None = None,
        fault: str = "",
    ) -> None:
        """An answer; with the fault cut, half of it."""
        handler.send_response(status)
        for name, value in (headers or {}).items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        if handler.command == "HEAD":
            return
        if fault == "cut":
            content = content[: len(content) // 2]
            handler.close_connection = True
        with self.lock:
            self.bytes_sent += len(content)
        handler.wfile.write(content)

    def send_file(
        self, handler: BaseHTTPRequestHandler, path: Path, headers: Mapping[str, str], fault: str = ""
    ) -> None:
        """A file, or the range of it that is asked for."""
        size, wanted = path.stat().st_size, handler.headers.get("Range")
        if wanted is None or fault == "whole":
            if handler.command == "HEAD":
                handler.send_response(200)
                for name, value in {**headers, "Content-Length": str(size)}.items():
                    handler.send_header(name, value)
                handler.end_headers()
            else:
                self.send(handler, 200, path.read_bytes(), headers, fault)
            return
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last) + 1, size)
        if start >= size:
            self.send(handler, 416, b"", {"Content-Range": f"bytes */{size}"})
            return
        if fault == "garbage":
            start = start + 1 if start + 1 < stop else 0
        with path.open("rb") as file:
            file.seek(start)
            content = file.read(stop - start)
        content = content[:-1] if fault == "short" else content
        self.send(handler, 206, content, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"}, fault)


class _Server(ThreadingHTTPServer):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.connections: list[socket.socket] = []

    def process_request(self, request: Any, client_address: Any) -> None:
        """Remember the connection, which outlives its first request."""
        self.connections.append(request)
        super().process_request(request, client_address)

    def close_connections(self) -> None:
        """Shut down the connections that clients hold open."""
        for connection in self.connections:
            with suppress(OSError):  # closed by then
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has gone away is what stalls and kills are for."""


class C4Hub(HubServer):
    """C4 on the hub with all its 1,024 shards, which are the few in a folder over and over."""

    def find(self, name: str) -> Path:
        """See `HubServer`."""
        shards = sorted((self.folder / "en").glob(f"{name.partition('/')[2].partition('.')[0]}.*"))
        number = name.partition(".")[2].partition("-")[0]
        return shards[int(number) % len(shards)] if number.isdigit() and shards else self.folder / name


@dataclass
class HubRepository:
    """A data set or a model on `DatasetHub`."""

    folder: Path
    """Its files; a README.md may say what configurations there are."""
    revisions: dict[str, Path] = field(default_factory=dict)
    """Folders of other revisions than main, by their name."""
    hidden: bool = False
    """Private, or not there at all: the hub does not say which."""
    gated: bool = False

    def refs(self) -> dict[str, tuple[str, Path]]:
        """(commit, folder) by revision and by commit."""
        named = {"main": self.folder, **self.revisions}
        commits = {name: hashlib.sha1(f"{name} {folder}".encode()).hexdigest() for name, folder in named.items()}
        return {key: (commits[name], named[name]) for name in named for key in (name, commits[name])}


class DatasetHub(HubServer):
    """A hub with data sets and models by name, as `datasets` and huggingface_hub ask for them."""

    def __init__(
        self, repositories: Mapping[str, HubRepository], renamed: Mapping[str, str] | None = None, port: int = 0
    ) -> None:
        """`renamed`: today's names of data sets by their old ones; `port` 0: a free one."""
        super().__init__(Path(), port=port)
        self.repositories, self.renamed = dict(repositories), dict(renamed or {})

    def respond(self, handler: BaseHTTPRequestHandler, body: bytes, fault: str) -> None:
        """See `HubServer`."""
        path = unquote(urlsplit(handler.path).path)
        try:
            if "/resolve/" in path:  # of a model without the prefix
                name, _, rest = path.removeprefix("/datasets").removeprefix("/").partition("/resolve/")
                commit, folder, file = self._place(name, rest)
                if self._repository(name).gated:
                    raise _RefusedError(401, "GatedRepo")
                if not (folder / file).is_file():
                    raise _RefusedError(404, "EntryNotFound", commit)
                headers = {"X-Repo-Commit": commit, "ETag": f'"{_oid(folder / file)}"', "Accept-Ranges": "bytes"}
                self.send_file(handler, folder / file, headers, fault)
                return
            recursive = "recursive=true" in urlsplit(handler.path).query.lower()
            content = json.dumps(self._api(path.removeprefix("/api/datasets/"), body, recursive)).encode()
            self.send(handler, 200, content, {"Content-Type": "application/json"}, fault)
        except _RefusedError as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.code}
            self.send(handler, refused.status, b"", {**headers, **refused.headers})

    def _repository(self, name: str) -> HubRepository:
        found = self.repositories.get(self.renamed.get(name, name))
        if found is None or found.hidden:
            raise _RefusedError(401, "RepoNotFound")
        return found

    def _place(self, name: str, rest: str) -> tuple[str, Path, str]:
        """(commit, folder, path in it) of "REVISION/PATH"; a revision may have slashes."""
        refs = self._repository(name).refs()
        for revision in sorted(refs, key=len, reverse=True):
            if rest == revision or rest.startswith(f"{revision}/"):
                return *refs[revision], rest.removeprefix(revision).strip("/")
        raise _RefusedError(404, "RevisionNotFound")

    def _api(self, path: str, body: bytes, recursive: bool) -> Any:
        for word in ("revision", "tree", "paths-info", "refs"):
            name, found, rest = path.partition(f"/{word}")
            if found:
                break
        else:
            name, word, rest = path, "revision", "/main"
        if word == "refs":
            refs = self._repository(name).refs()
            names = [key for key, (commit, _) in refs.items() if key != commit]
            listed = [{"name": key.rpartition("/")[2], "ref": key, "targetCommit": refs[key][0]} for key in names]
            converts = [each for each in listed if each["ref"].startswith("refs/convert")]
            return {"branches": [each for each in listed if each not in converts], "tags": [], "converts": converts}
        commit, folder, inside = self._place(name, rest.strip("/"))
        if word == "revision":
            files = [file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file()]
            return {
                "id": self.renamed.get(name, name),
                "sha": commit,
                "gated": "auto" if self._repository(name).gated else False,
                "siblings": [{"rfilename": str(file)} for file in files],
            }
        if word == "paths-info":
            wanted = parse_qs(body.decode()).get("paths", []) or json.loads(body or b"{}").get("paths", [])
            return [_entry(folder, folder / each) for each in wanted if (folder / each).exists()]
        if not (folder / inside).is_dir():
            raise _RefusedError(404, "EntryNotFound")
        return [_entry(folder, each) for each in sorted((folder / inside).glob("**/*" if recursive else "*"))]


class _RefusedError(Exception):
    def __init__(self, status: int, code: str, commit: str = "") -> None:
        super().__init__(code)
        self.status, self.code, self.headers = status, code, {"X-Repo-Commit": commit} if commit else {}


def _oid(path: Path) -> str:
    return hashlib.sha1(str(path).encode()).hexdigest()


def _entry(folder: Path, path: Path) -> dict[str, object]:
    kind = "directory" if path.is_dir() else "file"
    size = 0 if path.is_dir() else path.stat().st_size
    return {"type": kind, "oid": _oid(path), "size": size, "path": str(path.relative_to(folder))}
