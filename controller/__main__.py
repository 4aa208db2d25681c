"""`python -m controller --config FILE`: a whole cluster without a terminal, told by log lines."""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from cluster import config as configuration
from cluster.errors import AnabranchError, ConfigError, ModelError
from cluster.signals import Interrupts
from cluster.telemetry import configure_logging, logger
from controller.controller import Controller
from controller.event_log import LogObserver
from controller.service import CONTROLLER_ID

_EPILOG = """\
`anabranch up` does the same with a live view and finds models by name; here model.path is a folder.
SIGTERM or Ctrl-C drains the cluster within controller.drain_grace_s; a second signal kills what is left.
Exit status: 0 drained; 1 failed, or a process had to be killed; 2 configuration or model refused.
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
        with Interrupts(stop.set, lambda _number: controller.hurry()):
            return controller.run(stop, LogObserver(logger("controller")))
    except AnabranchError as error:
        sys.stderr.write(f"controller: {error.message}\n")
        return 2 if isinstance(error, ConfigError | ModelError) else 1


if __name__ == "__main__":
    sys.exit(main())
