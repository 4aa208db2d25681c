"""Models that are named by where they lie: a repository of a hub, or a folder of an object store.

OWNER/NAME@COMMIT           a repository of Hugging Face's hub, or of the one that HF_ENDPOINT names;
                            HF_TOKEN, if set, is sent. The hub says each file's hash at that commit.
https://HOST/FOLDER[?QUERY] a folder with a file SHA256SUMS, as `sha256sum * > SHA256SUMS` writes it; the
                            query goes with each file's name, ANABRANCH_MODEL_AUTHORIZATION is sent if set.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import quote, urlsplit, urlunsplit

from anabranch.cli.models.provenance import PROVENANCE_FILE, sha256_of
from anabranch.cli.models.web import Web, without_query
from cluster.errors import BrokenModelFolder, ConfigError, ModelError, NotFound, Unauthenticated

_HUB = "https://huggingface.co"
_REPOSITORY = re.compile(r"([\w.-]+/)?[\w.-]+@[\w./-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SUMS = "SHA256SUMS"
_SUM = re.compile(r"([0-9a-f]{64}) [ *](.+)")
_NEEDED = re.compile(r"model.*\.safetensors|.+\.json|.+\.jinja|README\.md|LICENSE.*")
"""Of a repository: others hold the same weights in other forms, of which ours reads none."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a model: where it is, and what it must be."""

    name: str
    url: str
    digest: str
    """sha256:HEX, or git:HEX where the hub knows a file by git's hash alone."""
    size_bytes: int | None = None

    def is_at(self, path: Path) -> bool:
        """Whether the file at `path` is this one."""
        kind, _, expected = self.digest.partition(":")
        return expected == (sha256_of(path) if kind == "sha256" else _git_hash(path))


class Remote(Protocol):
    """Where a model lies."""

    @property
    def spelled(self) -> str:
        """What `anabranch model fetch` is told, without secrets."""

    @property
    def name(self) -> str:
        """What it is called here, unless told otherwise."""

    @property
    def authorization(self) -> str | None:
        """Header's value for its host."""

    def files(self, web: Web) -> Sequence[RemoteFile]:
        """Its files. Raises ModelError, and what `Web.read` does."""


def remote_model(source: str, environment: Mapping[str, str] = os.environ) -> Remote:
    """What a source's text names. Raises ModelError when it names nothing."""
    if source.startswith(("http://", "https://")) and urlsplit(source).path.strip("/"):
        return StoreFolder(source, environment.get("ANABRANCH_MODEL_AUTHORIZATION"))
    if _REPOSITORY.fullmatch(source):
        repository, _, revision = source.partition("@")
        token = environment.get("HF_TOKEN")
        endpoint = (environment.get("HF_ENDPOINT") or _HUB).rstrip("/")
        return HubRepository(repository, revision, endpoint, f"Bearer {token}" if token else None)
    raise ModelError(
        f"{source!r} is neither a name that `anabranch model list` shows, nor OWNER/NAME@COMMIT of a hub, nor"
        f" the https:// URL of a folder with {_SUMS}"
    )


@dataclass(frozen=True, slots=True)
class HubRepository:
    """A repository at one commit, whose files the hub's own hashes describe."""

    repository: str
    revision: str
    endpoint: str
    authorization: str | None = None

    @property
    def spelled(self) -> str:
        """See `Remote`."""
        return f"{self.repository}@{self.revision}"

    @property
    def name(self) -> str:
        """See `Remote`."""
        return self.repository.rpartition("/")[2]

    def files(self, web: Web) -> Sequence[RemoteFile]:
        """See `Remote`. ConfigError for a branch or a tag: it moves; told is the commit it is at."""
        revision = quote(self.revision, safe="")
        url = f"{self.endpoint}/api/models/{self.repository}/revision/{revision}?blobs=true"
        try:
            found = web.read_json(url)
        except (NotFound, Unauthenticated) as error:
            raise type(error)(
                f"{self.spelled}: {error.message}; is it spelled so, and HF_TOKEN set if it is private?"
            ) from error
        if not _COMMIT.fullmatch(self.revision) or found.get("sha") != self.revision:
            raise ConfigError(
                f"{self.spelled} may be another model tomorrow: fetch {self.repository}@{found.get('sha')}"
            )
        siblings = [each for each in found.get("siblings", []) if _NEEDED.fullmatch(each["rfilename"])]
        return [self._file(each) for each in siblings if "/" not in each["rfilename"]]

    def _file(self, sibling: Mapping[str, object]) -> RemoteFile:
        name = str(sibling["rfilename"])
        large, small, size = sibling.get("lfs"), sibling.get("blobId"), sibling.get("size")
        if not (isinstance(large, dict) or small):
            raise BrokenModelFolder(f"{self.spelled}: {self.endpoint} does not tell the hash of {name}")
        digest = f"sha256:{large['sha256']}" if isinstance(large, dict) else f"git:{small}"
        url = f"{self.endpoint}/{self.repository}/resolve/{self.revision}/{quote(name)}"
        return RemoteFile(name, url, digest, size if isinstance(size, int) else None)


@dataclass(frozen=True, slots=True)
class StoreFolder:
    """A folder that http(s) reads, with the sums of its files beside them."""

    url: str
    authorization: str | None = None

    @property
    def spelled(self) -> str:
        """See `Remote`."""
        return without_query(self.url)

    @property
    def name(self) -> str:
        """See `Remote`."""
        return urlsplit(self.url).path.rstrip("/").rpartition("/")[2]

    def files(self, web: Web) -> Sequence[RemoteFile]:
        """See `Remote`."""
        try:
            sums = web.read(self._file(_SUMS)).decode()
        except NotFound as error:
            raise NotFound(
                f"{error.message}; beside the model lies a file {_SUMS}: `sha256sum * > {_SUMS}`"
            ) from error
        except UnicodeDecodeError as error:
            raise BrokenModelFolder(f"{self.spelled}: {_SUMS} is no text") from error
        found = []
        for line in filter(None, sums.splitlines()):
            match = _SUM.fullmatch(line)
            if match is None or "/" in match[2] or match[2].startswith(".") or match[2] == PROVENANCE_FILE:
                raise BrokenModelFolder(
                    f"{self.spelled}: a line of {_SUMS} is not a SHA-256 and a file: {line}"
                )
            if match[2] != _SUMS:
                found.append(RemoteFile(match[2], self._file(quote(match[2])), f"sha256:{match[1]}"))
        return found

    def _file(self, name: str) -> str:
        parts = urlsplit(self.url)
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}", fragment=""))


def _git_hash(path: Path) -> str:
    """Git's name of a file's contents; such files are small."""
    contents = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(contents) + contents, usedforsecurity=False).hexdigest()
