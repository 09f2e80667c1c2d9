"""A small stand-in for the Hub on loopback: one dataset repository, and the ways in which a network lets one down."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from data.dataset import Dataset
from data.shard import write_shard

REPO = "someone/tokens"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
VOCAB = 1000
_PIECE = 1 << 14  # bytes between two looks at the clock when the body is slow


def make_dataset(train: int = 3, **changes) -> Dataset:
    """A Hub dataset of one validation shard and `train` training shards."""
    names = tuple(f"train_{number}.bin" for number in range(1, train + 1))
    values = {"name": "tokens", "source": "hub", "repo": REPO, "vocab_size": VOCAB, "val_shards": ("val.bin",), "train_shards": names}
    return Dataset(**{**values, "default_train_shards": train, **changes})


def make_shards(folder: Path, dataset: Dataset, tokens: int = 20_000) -> dict[str, bytes]:
    """Bytes of valid shards by name, each different, made in `folder` and left there."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(dataset.shards()):
        write_shard(folder / name, np.random.default_rng(seed).integers(0, dataset.vocab_size, tokens))
    return {name: (folder / name).read_bytes() for name in dataset.shards()}


def sha256(content: bytes) -> str:
    """Hexadecimal digest."""
    return hashlib.sha256(content).hexdigest()


class Hub:
    """Serves `files` until closed; its faults may be switched at any time."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = dict(files)
        self.wrong: Counter[str] = Counter()  # how many more times a body has one byte changed, by name
        self.cut: Counter[str] = Counter()  # how many more times a body ends in the middle, by name
        self.unresolved: set[str] = set()  # listed, but the file itself is not found
        self.status = 0  # every request is answered so; 0: as it should be
        self.seconds = 0.0  # a whole body takes at least so long
        self.requests: list[tuple[str, str]] = []  # (method, path)
        self.tokens: set[str | None] = set()  # Authorization headers seen
        self.bodies: Counter[str] = Counter()  # bodies asked for, by name
        self.busy, self.peak = 0, 0  # bodies on their way, now and at most
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def url(self) -> str:
        """What HF_ENDPOINT is set to."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Hub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = 0.0
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    """The three things huggingface-hub asks for: what is there, where a file lies (HEAD), and its bytes (GET)."""

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        """Headers only."""
        self._answer()

    def do_GET(self) -> None:
        """Headers and body; a client that went away is not our fault."""
        try:
            self._answer()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _answer(self) -> None:
        hub, path = self.server.hub, urlsplit(self.path).path
        with hub.lock:
            hub.requests.append((self.command, path))
            hub.tokens.add(self.headers.get("Authorization"))
        if hub.status:
            self._head(hub.status)
        elif path == f"/api/datasets/{REPO}/revision/main":
            self._listing()
        elif path.startswith(f"/api/datasets/{REPO}/"):
            self._head(404, {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith(f"/datasets/{REPO}/resolve/{COMMIT}/"):
            self._resolve(path.rpartition("/")[2])
        elif path.startswith("/store/"):
            self._body(path.rpartition("/")[2])
        else:
            self._head(404, {"X-Error-Code": "RepoNotFound"})

    def _head(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": "0", **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()

    def _listing(self) -> None:
        files = self.server.hub.files
        siblings = [
            {
                "rfilename": name,
                "size": len(body),
                "blobId": "0" * 40,
                "lfs": {"sha256": sha256(body), "size": len(body), "pointerSize": 130},
            }
            for name, body in files.items()
        ]
        body = json.dumps({"id": REPO, "sha": COMMIT, "siblings": siblings}).encode()
        self._head(200, {"Content-Type": "application/json", "Content-Length": str(len(body))})
        self.wfile.write(body)

    def _resolve(self, name: str) -> None:
        hub = self.server.hub
        if name not in hub.files or name in hub.unresolved:
            self._head(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        self._head(302, {"Location": f"{hub.url}/store/{name}", **self._linked(name)})

    def _linked(self, name: str) -> dict[str, str]:
        body = self.server.hub.files[name]
        return {"X-Repo-Commit": COMMIT, "X-Linked-Etag": f'"{sha256(body)}"', "X-Linked-Size": str(len(body)), "ETag": f'"{sha256(body)}"'}

    def _body(self, name: str) -> None:
        hub = self.server.hub
        body = hub.files[name]
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        ranged = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if start else {}
        self._head(206 if start else 200, {"Content-Length": str(len(body) - start), **ranged, **self._linked(name)})
        if self.command == "HEAD":
            return
        with hub.lock:
            hub.bodies[name] += 1
            hub.busy += 1
            hub.peak = max(hub.peak, hub.busy)
            wrong, cut = hub.wrong[name] > 0, hub.cut[name] > 0
            hub.wrong[name] -= wrong
            hub.cut[name] -= cut
        try:
            if wrong:  # in the middle of the tokens, and a valid token still
                middle = len(body) // 4 * 2
                body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
            self._send(body[start : len(body) // 2 if cut else None])
        finally:
            with hub.lock:
                hub.busy -= 1

    def _send(self, body: bytes) -> None:
        """The body in pieces, spread over the hub's seconds."""
        hub = self.server.hub
        for at in range(0, len(body), _PIECE):
            self.wfile.write(body[at : at + _PIECE])
            if hub.seconds:
                time.sleep(hub.seconds * _PIECE / len(body))
