"""`anabranch up` with processes that only join: FOLDER [key=value ...].

With a terminal as standard input it becomes the session's controlling one, so that Ctrl-C works.
"""

from __future__ import annotations

import fcntl
import os
import sys
import termios
from pathlib import Path

from anabranch.cli import up
from anabranch.cli.__main__ import reporting
from cluster.ending import leave
from tests.integration.clusters import configured, joining


def main() -> int:
    """Run a cluster with the settings given; returns the exit status."""
    if os.isatty(0):
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    settings = up.parse_settings(sys.argv[2:])
    config = configured(
        Path(sys.argv[1]), **{key.replace(".", "__"): value for key, value in settings.items()}
    )
    return up.run(config, joining())


if __name__ == "__main__":
    leave(reporting(main))
