#!/usr/bin/env bash
# A repository may say in .huggingface.yaml which of its files are its data set. Where the hub answers a request for that
# file with 503, as it does under load, datasets goes on as if there were none: other files are loaded, without an error.
# (huggingface_hub raises LocalEntryNotFoundError, which is a FileNotFoundError, and that is taken for "not there".)
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet datasets==5.2.0 huggingface_hub==2.4.0 fsspec==2026.9.0 pyarrow==26.0.1
"$folder/venv/bin/python" - "$folder" <<'PY'
import json
import os
import sys
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789" * 4
SETTINGS = ".huggingface.yaml"
FILES = {
    "README.md": b"A card.\n",
    SETTINGS: b"configs:\n- config_name: default\n  data_files: chosen.txt\n",
    "chosen.txt": b"text\n",
    "draft.txt": b"another text\n",
}
overloaded = False


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does for one data set."""

    def do_GET(self):
        path = urllib.parse.urlsplit(self.path).path
        name = path.rpartition("/")[2]
        if path.startswith("/api/") and "/tree/" in path:
            entries = [{"type": "file", "oid": name, "size": len(FILES[name]), "path": name} for name in FILES]
            self.reply(200, json.dumps(entries).encode())
        elif path.startswith("/api/datasets/") and "/revision/" in path:
            siblings = [{"rfilename": name} for name in FILES]
            self.reply(200, json.dumps({"id": "some/name", "sha": COMMIT, "siblings": siblings}).encode())
        elif name == SETTINGS and overloaded:
            self.reply(503, b"", {"Retry-After": "0"})
        elif "/resolve/" in path and name in FILES:
            self.reply(200, FILES[name], {"ETag": f'"{name}"'})
        else:
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_POST = do_GET

    def reply(self, status, content, headers={}):
        self.send_response(status)
        for key, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments):
        pass


hub = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=hub.serve_forever, daemon=True).start()
endpoint = urllib.parse.urlunsplit(("http", "{}:{}".format(*hub.server_address), "", "", ""))
os.environ |= {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1"}
os.environ |= {"HF_HUB_VERBOSITY": "error", "HF_HUB_CACHE": f"{sys.argv[1]}/before", "HF_HOME": sys.argv[1]}
import datasets
import huggingface_hub
from huggingface_hub import constants


def files():
    found = datasets.load_dataset_builder("some/name").config.data_files["train"]
    return [address.rpartition("/")[2] for address in found]


print("datasets", datasets.__version__, "huggingface_hub", huggingface_hub.__version__)
before = files()
print("files of the data set:                            ", *before)
overloaded, constants.HF_HUB_CACHE = True, f"{sys.argv[1]}/after"
after = files()
print("files while a request for its settings gives 503: ", *after)
hub.shutdown()
assert before == ["chosen.txt"], "the behaviour has changed"
assert after == ["chosen.txt", "draft.txt"], "the behaviour has changed"
print("as described: the settings were passed over, and other files taken")
PY
