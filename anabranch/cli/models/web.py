"""Reading http(s), with a deadline: goes on where a connection broke, and keeps the authorization to its
host.
"""

from __future__ import annotations

import http.client
import json
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPMessage, HTTPResponse
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from cluster.clock import Clock, monotonic
from cluster.errors import (
    BrokenModelFolder,
    DeadlineExceeded,
    NotFound,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)

_SILENCE_S = 30.0
"""A server that sends nothing for so long is asked again."""

_ATTEMPTS_MAX = 5
"""In a row without a byte between them."""

_PAUSE_FIRST_S = 0.2
_CHUNK_BYTES = 2**20
_ANSWER_BYTES_MAX = 64 * 2**20
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses of which the next attempt may know nothing."""


class Web:
    """Asks servers until a deadline. `authorization` is the header's value; a redirection to another host, as
    hubs make them to where files lie, does not carry it there. In messages URLs have no query, which may be a
    secret.
    """

    def __init__(self, authorization: str | None, deadline_s: float, clock: Clock = monotonic) -> None:
        """`deadline_s`: seconds from now."""
        self._headers = {"Authorization": authorization} if authorization else {}
        self._clock = clock
        self._total_s = deadline_s
        self._end_s = clock() + deadline_s
        self._opener = urllib.request.build_opener(_Redirection())

    def read(self, url: str) -> bytes:
        """A small answer whole. Raises Unavailable, NotFound, Unauthenticated, DeadlineExceeded."""
        parts: list[bytes] = []
        self._persist(url, lambda: parts.append(self._whole(url)), lambda: 0)
        return parts[0]

    def read_json(self, url: str) -> dict[str, Any]:
        """As `read`; anything but an object is a BrokenModelFolder."""
        try:
            found = json.loads(self.read(url))
        except ValueError as error:
            raise BrokenModelFolder(f"{without_query(url)} answers with something else than JSON") from error
        if not isinstance(found, dict):
            raise BrokenModelFolder(f"{without_query(url)} answers with something else than a JSON object")
        return found

    def download(self, url: str, target: Path, advance: Callable[[int], None]) -> None:
        """Write a file to `target`, behind what an earlier attempt has left there; `advance` is told its
        size.

        What is there need not belong to it: compare hashes. Raises what `read` does, and ResourceExhausted
        where the disk has no room.
        """
        self._persist(url, lambda: self._receive(url, target, advance), lambda: _size(target))

    def _persist(self, url: str, attempt: Callable[[], None], done_bytes: Callable[[], int]) -> None:
        """Attempt again until one succeeds, or too many brought nothing."""
        failures = 0
        while True:
            before = done_bytes()
            try:
                return attempt()
            except urllib.error.HTTPError as error:
                error.close()
                if error.code not in _PASSING:
                    raise _answer(url, error) from error
                said: Exception = error
            except (OSError, http.client.HTTPException) as error:
                said = error
            failures = 1 if done_bytes() > before else failures + 1
            if failures == _ATTEMPTS_MAX:
                raise Unavailable(f"{without_query(url)} cannot be read: {said}") from said
            time.sleep(min(_PAUSE_FIRST_S * 2**failures, self._left_s(url)))

    def _whole(self, url: str) -> bytes:
        with self._open(url) as answer:
            text = answer.read(_ANSWER_BYTES_MAX + 1)
        if len(text) > _ANSWER_BYTES_MAX:
            raise BrokenModelFolder(f"{without_query(url)} answers with more than {_ANSWER_BYTES_MAX} bytes")
        return text

    def _receive(self, url: str, target: Path, advance: Callable[[int], None]) -> None:
        start = _size(target)
        try:
            answer = self._open(url, start)
        except urllib.error.HTTPError as error:
            if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise
            error.close()  # all of it is there, or too much: its hash will tell
            return
        with answer:
            start = start if answer.status == http.client.PARTIAL_CONTENT else 0
            coming = int(answer.headers.get("Content-Length", 0))
            _require_room(target, coming)
            with target.open("ab" if start else "wb") as file:
                while chunk := answer.read(_CHUNK_BYTES):
                    file.write(chunk)
                    advance(file.tell())
                    self._left_s(url)
                if coming and file.tell() < start + coming:
                    raise http.client.IncompleteRead(b"", start + coming - file.tell())

    def _open(self, url: str, start: int = 0) -> HTTPResponse:
        headers = self._headers | ({"Range": f"bytes={start}-"} if start else {})
        request = urllib.request.Request(url, headers=headers)  # noqa: S310  # sources are http(s) only
        answer = self._opener.open(request, timeout=min(_SILENCE_S, self._left_s(url)))
        assert isinstance(answer, HTTPResponse)
        return answer

    def _left_s(self, url: str) -> float:
        left_s = self._end_s - self._clock()
        if left_s <= 0:
            raise DeadlineExceeded(f"{without_query(url)} was not read within {self._total_s:g} s")
        return left_s


class _Redirection(urllib.request.HTTPRedirectHandler):
    """Follows, and keeps the authorization from other hosts."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        """See `HTTPRedirectHandler`."""
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and urlsplit(newurl)[:2] != urlsplit(req.full_url)[:2]:
            request.remove_header("Authorization")
        return request


def without_query(url: str) -> str:
    """What may be shown of a URL."""
    return url.partition("?")[0]


def _answer(url: str, error: urllib.error.HTTPError) -> NotFound | Unauthenticated | Unavailable:
    said = f"{without_query(url)}: {error.code} {error.reason}"
    if error.code in (http.client.UNAUTHORIZED, http.client.FORBIDDEN):
        return Unauthenticated(said)
    return NotFound(said) if error.code == http.client.NOT_FOUND else Unavailable(said)


def _require_room(target: Path, coming_bytes: int) -> None:
    free_bytes = shutil.disk_usage(target.parent).free
    if free_bytes < coming_bytes:
        raise ResourceExhausted(
            f"{target.parent} has {free_bytes / 1e6:.0f} MB free; {target.stem} needs"
            f" {coming_bytes / 1e6:.0f} MB: free some, or set ANABRANCH_CACHE to a larger disk"
        )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
