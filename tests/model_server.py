"""A model hub and an object store over HTTP on loopback: serves bytes by path, in parts if asked, and breaks
off where a test wants it.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

COMMIT = "5b3f1c0de5b3f1c0de5b3f1c0de5b3f1c0de5b3f"


@dataclass(frozen=True)
class Asked:
    """What one request asked for."""

    path: str
    query: str
    offset: int
    authorization: str | None


@dataclass
class ModelServer:
    """`files`: contents by path; `moved`: paths that are elsewhere, by the URL of that place; `breaks`: bytes
    after which answers break off, one entry per answer that is longer; `key`: the Authorization asked for.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    moved: dict[str, str] = field(default_factory=dict)
    breaks: list[int] = field(default_factory=list)
    key: str | None = None
    asked: list[Asked] = field(default_factory=list)
    sent_bytes: int = 0
    url: str = ""

    def put_repository(self, folder: Path, repository: str, elsewhere: ModelServer | None = None) -> None:
        """A folder as a hub's repository at COMMIT, whose weights `elsewhere` holds, as a hub's do."""
        siblings = []
        for path in sorted(folder.iterdir()):
            contents, place = path.read_bytes(), f"/{repository}/resolve/{COMMIT}/{path.name}"
            sibling: dict[str, object] = {"rfilename": path.name, "size": len(contents)}
            sibling["blobId"] = hashlib.sha1(b"blob %d\0" % len(contents) + contents).hexdigest()
            self.files[place] = contents
            if path.suffix == ".safetensors":
                sha256 = hashlib.sha256(contents).hexdigest()
                sibling["lfs"] = {"sha256": sha256, "size": len(contents), "pointerSize": 131}
                if elsewhere is not None:
                    elsewhere.files[f"/{path.name}"] = self.files.pop(place)
                    self.moved[place] = f"{elsewhere.url}/{path.name}"
            siblings.append(sibling)
        facts = json.dumps({"sha": COMMIT, "siblings": siblings}).encode()
        for revision in (COMMIT, "main"):
            self.files[f"/api/models/{repository}/revision/{revision}"] = facts

    def put_folder(self, folder: Path, place: str) -> None:
        """A folder as an object store's, with its sums."""
        contents = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        sums = "".join(f"{hashlib.sha256(text).hexdigest()}  {name}\n" for name, text in contents.items())
        self.files |= {f"/{place}/{name}": text for name, text in contents.items()}
        self.files[f"/{place}/SHA256SUMS"] = sums.encode()

    def names_asked(self) -> list[str]:
        """The last parts of what was asked for, in order."""
        return [asked.path.rpartition("/")[2] for asked in self.asked]


def _handler(server: ModelServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts, offset = urlsplit(self.path), _offset(self.headers.get("Range"))
            authorization = self.headers.get("Authorization")
            server.asked.append(Asked(parts.path, parts.query, offset, authorization))
            if server.key and authorization != server.key:
                self.send_error(401)
            elif parts.path in server.moved:
                self.send_response(302)
                self.send_header("Location", server.moved[parts.path])
                self.send_header("Content-Length", "0")
                self.end_headers()
            elif parts.path not in server.files:
                self.send_error(404)
            else:
                self._send(server.files[parts.path], offset)

        def _send(self, contents: bytes, offset: int) -> None:
            if offset and offset >= len(contents):
                self.send_error(416)
                return
            rest = contents[offset:]
            self.send_response(206 if offset else 200)
            self.send_header("Content-Length", str(len(rest)))
            self.end_headers()
            if server.breaks and len(rest) > server.breaks[0]:
                rest = rest[: server.breaks.pop(0)]
            self.wfile.write(rest)
            server.sent_bytes += len(rest)

        def log_message(self, *arguments: object) -> None:
            """Nothing is logged."""

    return Handler


def _offset(asked: str | None) -> int:
    return int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0


@contextmanager
def model_server() -> Iterator[ModelServer]:
    """An empty server that runs."""
    server = ModelServer()
    with ThreadingHTTPServer(("127.0.0.1", 0), _handler(server)) as http:
        server.url = f"http://127.0.0.1:{http.server_port}"
        thread = threading.Thread(target=http.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join(10)
