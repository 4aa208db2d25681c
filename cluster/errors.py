"""One tree of exceptions, with the gRPC status each becomes on the wire.

    AnabranchError
    +-- InvalidRequest          INVALID_ARGUMENT      the caller must change the request
    +-- NotFound                NOT_FOUND             no such model, request or shard
    +-- AlreadyExists           ALREADY_EXISTS        a live request has this id
    +-- Unauthenticated         UNAUTHENTICATED       no key, or an unknown one
    +-- PermissionDenied        PERMISSION_DENIED     the key may not do this
    +-- ResourceExhausted       RESOURCE_EXHAUSTED    queue or pool full: back off, or ask for less
    +-- Unavailable             UNAVAILABLE           draining or not reachable: retry elsewhere
    |   +-- Stopping            UNAVAILABLE           it says itself that it stops
    +-- DeadlineExceeded        DEADLINE_EXCEEDED     the request's time is over
    +-- Cancelled               CANCELLED             the caller hung up or aborted
    +-- Fenced                  FAILED_PRECONDITION   an older generation or epoch spoke
    |   +-- LeaseOver           FAILED_PRECONDITION   what this generation held was given up
    |   +-- NeedFull            FAILED_PRECONDITION   the lane lost the base of a plan difference
    |   +-- VersionMismatch     FAILED_PRECONDITION   wire, layout or configuration differ
    +-- ConfigError             INVALID_ARGUMENT      a configuration key or value is wrong
    +-- ModelError              INVALID_ARGUMENT      the model folder cannot be served
    |   +-- UnsupportedModel
    |   +-- BrokenModelFolder
    +-- Unplaceable             RESOURCE_EXHAUSTED    no node has what a role asks for
    +-- LaneBroken              UNAVAILABLE           a lane ended or missed its deadline
    +-- Internal                INTERNAL              a bug; please report it
        +-- EngineFailed        INTERNAL              a dense worker's engine met one, and ends

`cluster.rpc` is the one translator between this tree and gRPC.
"""

from __future__ import annotations

from typing import ClassVar


class AnabranchError(Exception):
    """Base of all errors raised on purpose.

    `status` is the gRPC status name, `reason` the machine-readable ErrorInfo reason, `message` one
    sentence that says what to do.
    """

    status: ClassVar[str] = "INTERNAL"
    reason: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str, **metadata: str) -> None:
        super().__init__(message)
        self.message = message
        self.metadata = metadata


class InvalidRequest(AnabranchError):
    """The request cannot be served as it is; changing it helps, retrying does not."""

    status = "INVALID_ARGUMENT"
    reason = "INVALID_REQUEST"


class NotFound(AnabranchError):
    """A model, request or shard by that name is not here."""

    status = "NOT_FOUND"
    reason = "NOT_FOUND"


class AlreadyExists(AnabranchError):
    """A live request already has this id and generation."""

    status = "ALREADY_EXISTS"
    reason = "ALREADY_EXISTS"


class Unauthenticated(AnabranchError):
    """No API key was given, or one nobody knows."""

    status = "UNAUTHENTICATED"
    reason = "UNAUTHENTICATED"


class PermissionDenied(AnabranchError):
    """The API key is known but may not do this."""

    status = "PERMISSION_DENIED"
    reason = "PERMISSION_DENIED"


class ResourceExhausted(AnabranchError):
    """A queue or the KV pool is full, or can never hold the request."""

    status = "RESOURCE_EXHAUSTED"
    reason = "RESOURCE_EXHAUSTED"


class Unavailable(AnabranchError):
    """The peer drains or cannot be reached; another one, or a later attempt, may serve."""

    status = "UNAVAILABLE"
    reason = "UNAVAILABLE"


class Stopping(Unavailable):
    """The peer says that it stops, alone or with the whole cluster; another one may serve."""

    reason = "STOPPING"


class DeadlineExceeded(AnabranchError):
    """The request's time was over, queued or running."""

    status = "DEADLINE_EXCEEDED"
    reason = "DEADLINE_EXCEEDED"


class Cancelled(AnabranchError):
    """The caller hung up or aborted."""

    status = "CANCELLED"
    reason = "CANCELLED"


class Fenced(AnabranchError):
    """A message of an older generation or another epoch; the speaker no longer owns the sequence."""

    status = "FAILED_PRECONDITION"
    reason = "FENCED"


class LeaseOver(Fenced):
    """What was held under this generation was given up, by a release or by its lease; nobody else has it."""

    reason = "LEASE_OVER"


class NeedFull(Fenced):
    """A plan difference named a base the receiver does not hold; send the plan whole."""

    reason = "NEED_FULL"


class VersionMismatch(Fenced):
    """Two processes speak different wire or block-layout versions or serve different models."""

    reason = "VERSION_MISMATCH"


class ConfigError(AnabranchError):
    """The configuration has an unknown key or a value out of range; the message names both."""

    status = "INVALID_ARGUMENT"
    reason = "INVALID_CONFIGURATION"


class ModelError(AnabranchError):
    """A model folder that cannot be served."""

    status = "INVALID_ARGUMENT"
    reason = "MODEL_ERROR"


class UnsupportedModel(ModelError):
    """An architecture or option this project does not implement; the message lists those it does."""

    reason = "UNSUPPORTED_MODEL"


class BrokenModelFolder(ModelError):
    """A file of the model folder is missing, truncated or malformed; the message names it."""

    reason = "BROKEN_MODEL_FOLDER"


class Unplaceable(AnabranchError):
    """No live node offers what a role needs; the message names the missing resource."""

    status = "RESOURCE_EXHAUSTED"
    reason = "UNPLACEABLE"


class LaneBroken(AnabranchError):
    """A lane ended, stalled past its deadline or spoke nonsense; its shards are unreachable."""

    status = "UNAVAILABLE"
    reason = "LANE_BROKEN"


class Internal(AnabranchError):
    """A state that cannot be: a bug of ours."""


class EngineFailed(Internal):
    """A dense worker's engine was ended by an error nobody foresaw; its process ends, and starts again."""

    reason = "ENGINE_FAILED"
