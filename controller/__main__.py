"""`python -m controller --config FILE`: a whole cluster without a terminal, told by log lines."""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from cluster import config as configuration
from cluster.errors import AnabranchError, ConfigError, ModelError
from cluster.telemetry import EventLogger, configure_logging, logger
from controller.controller import Controller
from controller.events import ClusterReady, Event, Opened, SlotChanged, Stopping
from controller.service import CONTROLLER_ID
from controller.signals import Interrupts

_EPILOG = """\
`anabranch up` does the same with a live view and finds models by name; here model.path is a folder.
SIGTERM or Ctrl-C drains the cluster within controller.drain_grace_s; a second signal kills what is left.
Exit status: 0 drained; 1 failed, or a process had to be killed at its work; 2 configuration or model refused.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a cluster until told to stop; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m controller",
        description="Start, place and supervise the processes of one Anabranch cluster.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", type=Path, required=True, help="the cluster's YAML file")
    arguments = parser.parse_args(argv)
    try:
        config = configuration.load(arguments.config)
        configure_logging(config.telemetry, role="controller", worker=CONTROLLER_ID)
        controller = Controller(config)
        stop = threading.Event()
        with Interrupts(stop.set, controller.hurry):
            return controller.run(stop, LogObserver(logger("controller")))
    except AnabranchError as error:
        sys.stderr.write(f"controller: {error.message}\n")
        return 2 if isinstance(error, ConfigError | ModelError) else 1


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


if __name__ == "__main__":
    sys.exit(main())
