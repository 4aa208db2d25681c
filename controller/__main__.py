"""`python -m controller --config FILE`: a whole cluster without a terminal, told by log lines."""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from cluster import config as configuration
from cluster.config import Config
from cluster.errors import AnabranchError, ConfigError, ModelError
from cluster.signals import Interrupts
from cluster.telemetry import configure_logging, logger
from controller.alone import run_alone
from controller.event_log import LogObserver
from controller.service import CONTROLLER_ID

_EPILOG = """\
`anabranch up` does the same with a live view and finds models by name; here model.path is a folder.
With --alone it starts nobody: something else, Kubernetes for example, starts `python -m workers.ROLE ...
--controller HOST:PORT` and restarts what ends. When it stops, the others go on with what they last heard.

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
    parser.add_argument(
        "--alone", metavar="HOST:PORT", help="start nobody; others reach this controller at HOST:PORT"
    )
    arguments = parser.parse_args(argv)
    try:
        config = configuration.load(arguments.config)
        configure_logging(config.telemetry, role="controller", worker=CONTROLLER_ID)
        stop = threading.Event()
        if arguments.alone is not None:
            with Interrupts(stop.set, lambda number: os._exit(128 + number)):
                run_alone(config, arguments.alone, stop)
            return 0
        return _run_cluster(config, stop)
    except AnabranchError as error:
        sys.stderr.write(f"controller: {error.message}\n")
        return 2 if isinstance(error, ConfigError | ModelError) else 1


def _run_cluster(config: Config, stop: threading.Event) -> int:
    # Here, not above: a controller alone needs no Ray.
    from controller.controller import Controller

    controller = Controller(config)
    with Interrupts(stop.set, lambda _number: controller.hurry()):
        return controller.run(stop, LogObserver(logger("controller")))


if __name__ == "__main__":
    sys.exit(main())
