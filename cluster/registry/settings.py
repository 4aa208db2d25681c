"""The part of the configuration file that says where the registry is."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from cluster.config_section import Section
from cluster.errors import ConfigError

_PORT = 6379


@dataclass(frozen=True, slots=True)
class RegistryAddress:
    """An address, taken apart."""

    host: str
    port: int
    database: int
    username: str | None
    is_encrypted: bool


class RegistryConfig(Section):
    """Where the membership and a copy of the prefix directory are kept; `registry: redis://HOST:PORT/DB` is
    short for url.
    """

    url: str | None = Field(
        None,
        description="redis://[USER@]HOST:PORT/DB, or rediss:// with TLS; null keeps it in the controller.",
    )
    password_variable: str = Field(
        "ANABRANCH_REGISTRY_PASSWORD",
        description="Environment variable with the password, on each machine; unset: none is given.",
    )
    password_file: str | None = Field(
        None, description="File with the password, on each machine; goes before the variable."
    )
    authority: str | None = Field(
        None, description="PEM certificates that sign the server's (rediss://); null: the system's."
    )
    cluster: str = Field(
        "anabranch",
        pattern=r"^[\w.-]{1,64}$",
        description="Clusters that share a Redis, or join one Ray cluster, need names of their own.",
    )
    deadline_ms: int = Field(500, ge=10, description="Longest wait for an answer.")
    lease_s: float = Field(
        3600.0,
        ge=0.05,
        description="What no controller renews is forgotten after this time; processes on a Ray cluster "
        "that was joined end.",
    )
    blocks_most: int = Field(
        1_048_576,
        ge=0,
        description="Blocks of the prefix directory kept, 128 bytes each; others are left out.",
    )

    @field_validator("url")
    @classmethod
    def _usable(cls, value: str | None) -> str | None:
        if value is not None:
            _parse(value)
        return value

    @property
    def parts(self) -> RegistryAddress:
        """The address. There must be one."""
        assert self.url is not None
        return _parse(self.url)

    @property
    def place(self) -> str:
        """host:port, for messages."""
        return f"{self.parts.host}:{self.parts.port}"

    def password(self) -> str | None:
        """The password, which no message shows. Raises ConfigError when its file cannot be read."""
        if self.password_file is None:
            return os.environ.get(self.password_variable)
        try:
            return Path(self.password_file).expanduser().read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"registry.password_file: {self.password_file} cannot be read") from error


def _parse(url: str) -> RegistryAddress:
    """Raises ValueError for the file's author; never with the address, which may hold a secret."""
    expected = "redis://HOST:PORT/DB is expected, or rediss:// with TLS"
    try:
        parts = urlsplit(url)
        port = parts.port or _PORT
    except ValueError as error:
        raise ValueError(expected) from error
    database = parts.path.strip("/") or "0"
    if parts.scheme not in ("redis", "rediss") or not parts.hostname or not database.isdecimal():
        raise ValueError(expected)
    if parts.query or parts.fragment:
        raise ValueError(f"{expected}; options have keys of their own")
    if parts.password is not None:
        raise ValueError("a password in the address would be printed: use password_file or password_variable")
    encrypted = parts.scheme == "rediss"
    return RegistryAddress(parts.hostname, port, int(database), parts.username, encrypted)
