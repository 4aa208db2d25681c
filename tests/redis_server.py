"""A real Redis for tests: in a container where an engine answers, else a local server on loopback."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import redis

from cluster.config import TlsConfig
from cluster.registry.settings import RegistryConfig

_START_S = 20.0
_GIVEN = "TEST_REDIS_URL"
_ENGINE_SOCKET = Path("/var/run/docker.sock")
BINARY = next(filter(None, map(shutil.which, ("redis-server", "valkey-server"))), None)
MISSING = "no Redis: no container engine answers and neither redis-server nor valkey-server is installed"


@dataclass
class LocalRedis:
    """One server process, which can be frozen, killed and started again on the same port."""

    folder: Path
    password: str = ""
    tls: TlsConfig | None = None
    options: Sequence[str] = ()
    port: int = 0
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def start(self) -> None:
        """Start, and wait until it answers."""
        assert BINARY is not None, MISSING
        self.port = self.port or free_port()
        with (self.folder / "redis.log").open("ab") as log:
            self.process = subprocess.Popen([BINARY, *self._arguments()], stdout=log, stderr=log)
        end_s = time.monotonic() + _START_S
        while not self._answers():
            assert self.process.poll() is None, (self.folder / "redis.log").read_text()
            assert time.monotonic() < end_s, "Redis does not answer"

    def signal(self, number: signal.Signals) -> None:
        """SIGSTOP, SIGCONT, ..."""
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(_START_S)

    def client(self) -> redis.Redis:
        """A client of the test's own."""
        return redis.Redis(
            port=self.port,
            password=self.password or None,
            socket_timeout=5,
            ssl=self.tls is not None,
            ssl_ca_certs=self.tls.authority if self.tls else None,
        )

    def config(self, **settings: object) -> RegistryConfig:
        """How our processes reach it; the password in a file."""
        found: dict[str, object] = {"url": f"{'rediss' if self.tls else 'redis'}://127.0.0.1:{self.port}/0"}
        if self.tls:
            found["authority"] = self.tls.authority
        if self.password:
            file = self.folder / "password"
            file.write_text(f"{self.password}\n")
            found["password_file"] = str(file)
        return RegistryConfig.model_validate(found | settings)

    def _arguments(self) -> list[str]:
        arguments = ["--bind", "127.0.0.1", "--dir", str(self.folder), "--save", ""]
        if self.tls:
            files = {"cert": self.tls.certificate, "key": self.tls.key, "ca-cert": self.tls.authority}
            arguments += [word for name, path in files.items() for word in (f"--tls-{name}-file", str(path))]
            arguments += ["--port", "0", "--tls-port", str(self.port), "--tls-auth-clients", "no"]
        else:
            arguments += ["--port", str(self.port)]
        if self.password:
            arguments += ["--requirepass", self.password]
        return [*arguments, *self.options]

    def _answers(self) -> bool:
        try:
            with self.client() as client:
                return bool(client.ping())
        except redis.exceptions.ConnectionError:
            return False


@contextmanager
def local_redis(
    folder: Path, password: str = "", tls: TlsConfig | None = None, options: Sequence[str] = ()
) -> Iterator[LocalRedis]:
    """A local server that runs; gone at the end."""
    server = LocalRedis(folder, password, tls, options)
    server.start()
    try:
        yield server
    finally:
        if server.process is not None:
            server.process.kill()
            server.process.wait(_START_S)


def is_given() -> bool:
    """Whether whoever runs the tests names a server, which needs no password."""
    return _GIVEN in os.environ


def engine_answers() -> bool:
    """Whether containers can be started here."""
    if "DOCKER_HOST" not in os.environ and not _ENGINE_SOCKET.exists():
        return False  # asking all the same would leave an open socket behind
    import docker

    try:
        with closing(docker.from_env(timeout=2)) as engine:
            return bool(engine.ping())
    except docker.errors.DockerException:
        return False


@contextmanager
def any_redis(folder: Path) -> Iterator[RegistryConfig]:
    """The server of TEST_REDIS_URL, else one in a container where an engine answers, else a local one."""
    if is_given():
        yield RegistryConfig(url=os.environ[_GIVEN])
        return
    if not engine_answers():
        with local_redis(folder) as server:
            yield server.config()
        return
    from testcontainers.community.redis import RedisContainer

    with RedisContainer() as container:
        host, port = container.get_container_host_ip(), container.get_exposed_port(6379)
        yield RegistryConfig(url=f"redis://{host}:{port}/0")


def free_port() -> int:
    """A port of loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
