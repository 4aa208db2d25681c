"""Errors as OpenAI's JSON, with the HTTP status clients act on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cluster.errors import AnabranchError, Internal, ResourceExhausted
from cluster.telemetry import logger

_log = logger("gateway.http")

_RETRY_AFTER_S = "1"
_HTTP_STATUS: Mapping[str, int] = {
    "INVALID_ARGUMENT": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "FAILED_PRECONDITION": 409,
    "RESOURCE_EXHAUSTED": 429,
    "CANCELLED": 499,
    "INTERNAL": 500,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class BodyTooLarge(ResourceExhausted):
    """The body is larger than `gateway.max_request_bytes`; backing off does not help."""

    reason = "BODY_TOO_LARGE"


def http_status(error: AnabranchError) -> int:
    """The HTTP status of an error."""
    return 413 if isinstance(error, BodyTooLarge) else _HTTP_STATUS[error.status]


def error_body(error: AnabranchError) -> dict[str, object]:
    """The JSON of an error; `code` is the machine-readable reason, `param` the field at fault."""
    status = http_status(error)
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    parameter = error.metadata.get("field")
    return {
        "error": {"message": error.message, "type": kind, "param": parameter, "code": error.reason.lower()}
    }


async def on_error(_request: Request, error: Exception) -> Response:
    """Answer with an error of the tree."""
    assert isinstance(error, AnabranchError)
    status = http_status(error)
    headers = {"retry-after": _RETRY_AFTER_S} if status in (429, 503) else {}
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error_body(error), status, headers)


async def on_http_exception(_request: Request, error: Exception) -> Response:
    """Answer for an unknown path or method."""
    assert isinstance(error, HTTPException)
    content: dict[str, Any] = {
        "error": {
            "message": error.detail,
            "type": "invalid_request_error",
            "param": None,
            "code": str(error.status_code),
        }
    }
    return JSONResponse(content, error.status_code, error.headers)


async def on_bug(request: Request, error: Exception) -> Response:
    """Answer for what nobody expected."""
    _log.error("http_failed", error=error, path=request.url.path)
    return JSONResponse(error_body(Internal("a bug of the gateway; its log has the details")), 500)
