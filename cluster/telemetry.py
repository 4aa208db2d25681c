"""Structured logs and the metrics endpoint, the same in every process.

One line per event: JSON objects with `event`, `role`, `worker`, and whatever the caller names
(`request_id`, `step`, ...), so that a request can be followed through the cluster with one search.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, start_http_server

from cluster.telemetry_settings import TelemetryConfig

if TYPE_CHECKING:  # names for annotations that exist nowhere else
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

_ROOT = "anabranch"


class EventLogger:
    """Writes events of one part of the program; cheap when the level is off."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(f"{_ROOT}.{name}")

    def debug(self, event: str, **fields: Any) -> None:
        """What a developer follows."""
        self._emit(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: Any) -> None:
        """What an operator wants to find later."""
        self._emit(logging.INFO, event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        """What is wrong but handled."""
        self._emit(logging.WARNING, event, fields)

    def error(self, event: str, error: BaseException | None = None, **fields: Any) -> None:
        """What somebody must look at; `error` adds its traceback."""
        self._emit(logging.ERROR, event, fields, error)

    def _emit(
        self, level: int, event: str, fields: dict[str, Any], error: BaseException | None = None
    ) -> None:
        if self._logger.isEnabledFor(level):
            info = (type(error), error, error.__traceback__) if error else None
            self._logger.log(level, event, extra={"fields": fields}, exc_info=info)


def logger(name: str) -> EventLogger:
    """The event logger of a module, for example `logger("dense.engine")`."""
    return EventLogger(name)


class _Formatter(logging.Formatter):
    """JSON or text lines with the process's identity."""

    def __init__(self, as_json: bool, bound: dict[str, Any]) -> None:
        super().__init__()
        self._as_json = as_json
        self._bound = bound

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {**self._bound, **getattr(record, "fields", {})}
        if record.exc_info and record.exc_info[0]:
            fields["traceback"] = self.formatException(record.exc_info)
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        if self._as_json:
            line = {"time": stamp, "level": record.levelname.lower(), "event": record.getMessage(), **fields}
            return json.dumps(line, default=str)
        words = " ".join(f"{key}={value}" for key, value in fields.items())
        return f"{stamp} {record.levelname:<7} {record.getMessage()} {words}"


def configure_logging(config: TelemetryConfig, **bound: Any) -> None:
    """Send events to standard error; `bound` (role, worker, epoch) stands in every line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(config.log_format == "json", bound))
    root = logging.getLogger(_ROOT)
    root.handlers[:] = [handler]
    root.propagate = False
    root.setLevel(config.log_level.upper())


def serve_metrics(registry: CollectorRegistry, host: str, port: int, problem: Callable[[str], str]) -> int:
    """Serve a registry for Prometheus, and health for the kubelet, on its own thread; returns the port.

    GET /health/SERVICE is 200, or 503 with the `problem` of that service; /health asks for the service "".
    """
    server, _ = start_http_server(port, host, registry)
    app = server.get_app()
    assert app is not None
    server.set_app(_beside_health(_in_plain_text(app), problem))
    return int(server.server_port)


def _in_plain_text(app: WSGIApplication) -> WSGIApplication:
    """Answers in the plain format whatever else is accepted: in OpenMetrics, which Prometheus prefers, the
    library spells vllm:prompt_tokens_total with an underscore, and no dashboard finds it.
    """

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        return app(environ | {"HTTP_ACCEPT": ""}, start_response)

    return answer


def _beside_health(app: WSGIApplication, problem: Callable[[str], str]) -> WSGIApplication:
    """The same app, but for /health and what lies below it."""

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        first, _, service = environ["PATH_INFO"].strip("/").partition("/")
        if first != "health":
            return app(environ, start_response)
        found = problem(service)
        status = "503 Service Unavailable" if found else "200 OK"
        start_response(status, [("content-type", "text/plain; charset=utf-8")])
        return [f"{found or 'serving'}\n".encode()]

    return answer
