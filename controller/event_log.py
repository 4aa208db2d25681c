"""What happens to a cluster, as log lines."""

from __future__ import annotations

from cluster.telemetry import EventLogger
from controller.events import ClusterReady, Event, Opened, SlotChanged, Stopping


class LogObserver:
    """Writes one log line for each thing that happens to the cluster."""

    def __init__(self, log: EventLogger) -> None:
        self._log = log

    def __call__(self, event: Event) -> None:
        """See `controller.Observer`."""
        match event:
            case Opened():
                self._log.info("opened", address=event.address, nodes=event.nodes)
            case SlotChanged(slot):
                self._log.info(
                    "slot",
                    slot=slot.worker_id,
                    phase=slot.phase.value,
                    node=slot.node,
                    process=slot.process_id,
                    starts=slot.attempt,
                    problem=slot.problem,
                )
            case ClusterReady(record):
                self._log.info("ready", gateways=record.gateways, http=record.http)
            case Stopping():
                self._log.info("stopping", grace_s=event.grace_s)
