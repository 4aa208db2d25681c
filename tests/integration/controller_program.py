"""A controller, as `python -m controller` is one, of processes that only join: they start in a moment."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from cluster import config as configuration
from cluster.errors import AnabranchError
from cluster.signals import Interrupts
from cluster.telemetry import configure_logging, logger
from controller.controller import Controller
from controller.event_log import LogObserver
from controller.service import CONTROLLER_ID
from tests.integration.clusters import joining


def main() -> int:
    """Run a cluster until told to stop; returns the exit status."""
    config = configuration.load(Path(sys.argv[-1]))
    configure_logging(config.telemetry, role="controller", worker=CONTROLLER_ID)
    stop = threading.Event()
    controller = Controller(config, joining())
    try:
        with Interrupts(stop.set, lambda _number: controller.hurry()):
            return controller.run(stop, LogObserver(logger("controller")))
    except AnabranchError as error:
        sys.stderr.write(f"controller: {error.message}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
