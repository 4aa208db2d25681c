"""The HTTP server: uvicorn on the gateway's own event loop, started and stopped by the gateway."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Generator, Sequence

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import Route

from cluster import rpc
from cluster.config import Config
from cluster.errors import AnabranchError, Unavailable
from workers.gateway.http_errors import on_bug, on_error, on_http_exception

_BACKLOG = 512


class _Server(uvicorn.Server):
    """Signals are the role's business; and somebody waits to hear that it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


class HttpServer:
    """Serves routes over HTTP, or HTTPS where `security.tls` is configured."""

    def __init__(self, config: Config, routes: Sequence[Route]) -> None:
        self._config = config
        app = Starlette(routes=routes)
        app.add_exception_handler(AnabranchError, on_error)
        app.add_exception_handler(HTTPException, on_http_exception)
        app.add_exception_handler(Exception, on_bug)
        self._app = app
        self._server: _Server | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self, port: int) -> int:
        """Listen; returns the port. Raises Unavailable (taken), ConfigError (plain text beyond loopback)."""
        host = self._config.gateway.host
        rpc.require_safe_bind(host, self._config.security)
        listener = _listen(host, port)
        self._server = _Server(self._settings())
        self._task = asyncio.create_task(self._server.serve([listener]))
        waiting = asyncio.create_task(self._server.listening.wait())
        await asyncio.wait((self._task, waiting), return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if self._task.done():
            await self._task  # raises why
        return int(listener.getsockname()[1])

    async def stop(self, grace_s: float) -> None:
        """Stop listening, let open responses end within `grace_s`. Idempotent."""
        if self._server is None or self._task is None:
            return
        self._server.config.timeout_graceful_shutdown = max(1, round(grace_s))
        self._server.should_exit = True
        await self._task

    def _settings(self) -> uvicorn.Config:
        tls = self._config.security.tls
        limits = self._config.gateway
        return uvicorn.Config(
            self._app,
            lifespan="off",
            access_log=False,
            log_config=None,
            ws="none",
            server_header=False,
            limit_concurrency=2 * limits.max_streams + 256,
            ssl_certfile=tls.certificate,
            ssl_keyfile=tls.key,
            ssl_ca_certs=tls.authority,
            ssl_cert_reqs=ssl.CERT_REQUIRED if tls.mutual else ssl.CERT_NONE,
        )


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise Unavailable(f"cannot bind {host}:{port}: is the port in use?") from error
    return listener
