"""Who calls: API keys, what each may do, and the tenant identity that separates their caches."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from cluster.errors import ConfigError, PermissionDenied, Unauthenticated
from cluster.telemetry import logger

_log = logger("gateway.callers")


class KeyEntry(BaseModel):
    """One entry of the keys file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tenant: str = Field(min_length=1)
    salt: str = ""
    max_streams: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)


@dataclass(frozen=True, slots=True)
class Caller:
    """An authenticated caller. Without a keys file everyone is the same caller, without limits.

    `tenant` is a hash over tenant name and salt: cached prefixes are shared inside it only, and what
    it is cannot be chosen by a client.
    """

    name: str = ""
    tenant: str = ""
    max_streams: int | None = None
    max_tokens: int | None = None

    def require_streams(self, open_streams: int) -> None:
        """Refuse one more stream beyond the key's limit."""
        if self.max_streams is not None and open_streams >= self.max_streams:
            raise PermissionDenied(
                f"this API key may have {self.max_streams} requests open at once: wait for one to end"
            )

    def require_tokens(self, max_tokens: int) -> None:
        """Refuse more output than the key's limit."""
        if self.max_tokens is not None and max_tokens > self.max_tokens:
            raise PermissionDenied(
                f"this API key may ask for {self.max_tokens} tokens, max_tokens is {max_tokens}: ask for less"
            )


ANYONE = Caller()


class CallerDirectory:
    """Knows the keys. The file is read again when its modification time or size changes; a file that
    became unreadable changes nothing, and is reported.
    """

    def __init__(self, keys_file: str | None) -> None:
        """Raises ConfigError where the file is there but wrong, or not there."""
        self._path = Path(keys_file) if keys_file is not None else None
        self._stamp = self._stat()
        self._callers = _read(self._path) if self._path is not None else {}

    def authenticate(self, authorization: str | None) -> Caller:
        """The caller behind an `authorization` header. Raises Unauthenticated."""
        if self._path is None:
            return ANYONE
        self._refresh(self._path)
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthenticated("no API key: send `authorization: Bearer KEY`")
        caller = self._callers.get(_fingerprint(key.strip()))
        if caller is None:
            raise Unauthenticated("the API key is unknown")
        return caller

    def _refresh(self, path: Path) -> None:
        stamp = self._stat()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._callers = _read(path)
        except ConfigError as error:
            _log.error("api_keys_unreadable", error=error)
            return
        _log.info("api_keys_read", keys=len(self._callers))

    def _stat(self) -> tuple[int, int] | None:
        if self._path is None:
            return None
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size


_KeysFile = TypeAdapter(dict[str, KeyEntry])


def _read(path: Path) -> Mapping[bytes, Caller]:
    try:
        entries = _KeysFile.validate_python(yaml.safe_load(path.read_text()) or {})
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"security.api_keys_file: {path} cannot be read: {error}") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark is not None else 0
        raise _wrong(path, f"line {line}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise _wrong(path, f"not YAML ({type(error).__name__})") from None
    except ValidationError as error:
        raise _wrong(path, "; ".join(sorted({_explain(item) for item in error.errors()}))) from None
    return {_fingerprint(key): _caller(entry) for key, entry in entries.items()}


def _wrong(path: Path, problem: str) -> ConfigError:
    """What is wrong, without the file's text: that holds keys, which do not belong in logs."""
    return ConfigError(f"security.api_keys_file: {path}: {problem}")


def _explain(item: ErrorDetails) -> str:
    field = ".".join(str(part) for part in item["loc"][1:])  # the first part is the key
    return f"{field}: {item['msg']}" if field else str(item["msg"])


def _fingerprint(key: str) -> bytes:
    """Keys are compared by hash: the time a look-up takes then tells nothing about them."""
    return hashlib.sha256(key.encode()).digest()


def _caller(entry: KeyEntry) -> Caller:
    identity = hashlib.sha256(f"{len(entry.tenant)}:{entry.tenant}:{entry.salt}".encode()).hexdigest()
    return Caller(entry.tenant, identity, entry.max_streams, entry.max_tokens)
