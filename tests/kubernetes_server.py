"""Kubernetes' API as far as the autoscaler asks it, over HTTP on loopback: objects with versions, optimistic
locks, JSON patches, and watches, which a test may end.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

Manifest = dict[str, Any]

_WATCH_S = 10.0


@dataclass
class Kubernetes:
    """The state of the server: objects by path. `refused`: methods that the caller may not use,
    `refusals`: how many of them came. `watches`: how many were begun; each ends at once while
    `ends_watches` is set.
    """

    objects: dict[str, Manifest]
    refused: set[str] = field(default_factory=set)
    ends_watches: bool = False
    watches: int = 0
    refusals: int = 0
    url: str = ""
    changed: threading.Condition = field(default_factory=threading.Condition)

    def change(self, path: str, part: str, **values: Any) -> None:
        """Somebody changes an object: its `spec` or its `status`."""
        with self.changed:
            self._change(path, part, values)

    def patch(self, path: str, body: Any) -> tuple[int, Manifest]:
        """Apply a merge patch, or a JSON patch of test, replace and add; (status, answer)."""
        with self.changed:
            found = self.objects[path]
            if isinstance(body, list):
                return self._patch_by_operations(path, found, body)
            if body["metadata"]["resourceVersion"] != found["metadata"]["resourceVersion"]:
                return 409, _problem(409, "Conflict")
            self._change(path, "spec", body["spec"])
            return 200, found

    def _patch_by_operations(self, path: str, found: Manifest, body: list[Manifest]) -> tuple[int, Manifest]:
        for each in body:
            *way, last = each["path"].strip("/").split("/")
            place: Any = found
            for step in way:
                place = place[int(step) if isinstance(place, list) else step]
            if each["op"] == "test" and place.get(last) != each["value"]:
                return 422, _problem(422, "Invalid")
            if each["op"] != "test":
                place[last] = each["value"]
        self._change(path, "spec", {})
        return 200, found

    def _change(self, path: str, part: str, values: dict[str, Any]) -> None:
        found = self.objects[path]
        found.setdefault(part, {}).update(values)
        meta = found["metadata"]
        meta["resourceVersion"] = str(int(meta["resourceVersion"]) + 1)
        if part == "spec":
            meta["generation"] = meta.get("generation", 0) + 1
        self.changed.notify_all()


def _problem(status: int, reason: str) -> Manifest:
    return {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "code": status}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Kubernetes

    def do_GET(self) -> None:
        """An object, its scale, or a watch of one object of a list."""
        path, asked = self._asked()
        if "watch" in asked:
            (name,) = asked["fieldSelector"]
            self._watch(f"{path}/{name.removeprefix('metadata.name=')}")
            return
        if self._is_refused():
            return
        found = self.state.objects.get(path.removesuffix("/scale"))
        self._answer(*((200, found) if found else (404, _problem(404, "NotFound"))))

    def do_PATCH(self) -> None:
        """A patch of an object or of its scale."""
        path, _ = self._asked()
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if not self._is_refused():
            self._answer(*self.state.patch(path.removesuffix("/scale"), body))

    def _asked(self) -> tuple[str, dict[str, list[str]]]:
        parts = urlsplit(self.path)
        return parts.path, parse_qs(parts.query)

    def _is_refused(self) -> bool:
        is_refused = self.command in self.state.refused
        if is_refused:
            with self.state.changed:
                self.state.refusals += 1
                self.state.changed.notify_all()
            self._answer(403, _problem(403, "Forbidden"))
        return is_refused

    def _answer(self, status: int, body: Manifest) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _watch(self, path: str) -> None:
        """Tells how the object is, and then each change; until it is told to end."""
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        state, told = self.state, ""
        with state.changed:
            state.watches += 1
            state.changed.notify_all()
            while True:
                found = state.objects[path]
                if found["metadata"]["resourceVersion"] != told:
                    told = found["metadata"]["resourceVersion"]
                    self._chunk(json.dumps({"type": "MODIFIED", "object": found}).encode() + b"\n")
                if state.ends_watches or not state.changed.wait(_WATCH_S):
                    break
        self._chunk(b"")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # its base class's name
        """Say nothing."""


@contextmanager
def kubernetes(*objects: tuple[str, Manifest]) -> Iterator[Kubernetes]:
    """A server that has these objects, by path."""
    state = Kubernetes(dict(objects))
    handler = type("Handler", (_Handler,), {"state": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield state
    finally:
        with state.changed:
            state.ends_watches = True
            state.changed.notify_all()
        server.shutdown()
        server.server_close()
        thread.join()


def stateful_set(name: str, replicas: int) -> tuple[str, Manifest]:
    """A StatefulSet whose pods all serve; it answers for its subresource `scale` too."""
    return f"/apis/apps/v1/namespaces/llm/statefulsets/{name}", {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {"name": name, "namespace": "llm", "resourceVersion": "10", "generation": 1},
        "spec": {
            "replicas": replicas,
            "serviceName": name,
            "selector": {"matchLabels": {"app": name}},
            "template": {"metadata": {"labels": {"app": name}}},
        },
        "status": {"replicas": replicas, "readyReplicas": replicas, "observedGeneration": 1},
    }


def ray_cluster(name: str, **replicas: int) -> tuple[str, Manifest]:
    """A RayCluster whose worker groups have so many pods, all of them ready."""
    groups = [{"groupName": group, "replicas": count} for group, count in replicas.items()]
    ready = sum(replicas.values())
    return f"/apis/ray.io/v1/namespaces/llm/rayclusters/{name}", {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {"name": name, "namespace": "llm", "resourceVersion": "10", "generation": 1},
        "spec": {"workerGroupSpecs": groups},
        "status": {"desiredWorkerReplicas": ready, "readyWorkerReplicas": ready, "observedGeneration": 1},
    }
