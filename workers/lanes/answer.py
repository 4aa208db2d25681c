"""What a handler's outcome becomes on any lane: a reply, a fault, or nothing."""

from __future__ import annotations

from cluster.errors import AnabranchError, Internal
from cluster.telemetry import logger
from workers.lanes.messages import LaneHandler, LayerMessage, PartialReply

_log = logger("lanes")


def answer(handler: LaneHandler, message: LayerMessage) -> PartialReply | AnabranchError | None:
    """Let `handler` serve the message. A query gets a reply or the error that prevented it.

    A message without a query has no reply, so its error is only logged: the keys and values it brought
    are missing then, and the next plan that counts on them is answered with a fault.
    """
    try:
        return handler.handle(message)
    except AnabranchError as error:
        failure = error
    except Exception as error:  # noqa: BLE001  a bug in one message must answer it, and not end the lane
        _log.error("lane_handler_failed", error=error, step=message.step, layer=message.layer)
        failure = Internal(f"the attention worker failed: {type(error).__name__}: {error}")
    _log.warning("lane_fault", step=message.step, layer=message.layer, problem=failure.message)
    return failure if message.query is not None else None
