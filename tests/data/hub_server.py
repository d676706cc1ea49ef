"""A local HTTP server that stands for the hub and can refuse, stall, cut off, and answer with errors."""

import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

STALL_SECONDS = 1.0


class HubServer:
    """Serves the files of a folder under any ".../resolve/<revision>/<path>", with faults from a list, in turn."""

    def __init__(self, folder: Path, faults: list[str] | None = None) -> None:
        """Faults: refuse (a reset), stall, cut, garbage (a wrong range), moved (a redirect), or an HTTP status."""
        self.folder = folder
        self.faults = list(faults or [])
        self.paths: list[str] = []
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                """Be quiet."""

            def do_GET(self) -> None:
                outer.answer(self)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    @property
    def requests(self) -> int:
        """How many came in."""
        return len(self.paths)

    def close(self) -> None:
        """Stop serving."""
        self.server.shutdown()
        self.server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        """One request, good or bad."""
        with self.lock:
            self.paths.append(handler.path)
            fault = self.faults.pop(0) if self.faults else ""
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
            handler.send_response(int(fault))
            handler.send_header("Content-Length", "0")
            if fault == "429":
                handler.send_header("Retry-After", "0")
            handler.end_headers()
            return
        if fault == "moved":
            handler.send_response(302)
            handler.send_header("Location", handler.path)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        self._send(handler, fault)

    def find(self, name: str) -> Path:
        """Where the file `name` of the repository lies."""
        return self.folder / name

    def _send(self, handler: BaseHTTPRequestHandler, fault: str) -> None:
        path = self.find(handler.path.partition("/resolve/")[2].partition("/")[2])
        if not path.is_file():
            handler.send_response(404)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        content = path.read_bytes()
        first, _, last = handler.headers["Range"].removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last) + 1, len(content))
        handler.send_response(206)
        handler.send_header("Content-Length", str(stop - start))
        shown = start + 1 if fault == "garbage" else start
        handler.send_header("Content-Range", f"bytes {shown}-{stop - 1}/{len(content)}")
        handler.end_headers()
        if fault == "cut":
            handler.wfile.write(content[start : (start + stop) // 2])
            handler.close_connection = True
            return
        handler.wfile.write(content[start:stop])


class C4Hub(HubServer):
    """C4 on the hub with all its 1,024 shards, which are the few in a folder over and over."""

    def find(self, name: str) -> Path:
        """See `HubServer`."""
        shards = sorted((self.folder / "en").glob(f"{name.partition('/')[2].partition('.')[0]}.*"))
        number = name.partition(".")[2].partition("-")[0]
        return shards[int(number) % len(shards)] if number.isdigit() and shards else self.folder / name
