"""Where the commands `anabranch` and `loadgen` begin: before what takes a moment to import."""

from __future__ import annotations

import signal


def loadgen() -> None:
    """`anabranch loadgen` as a program of its own."""
    main("loadgen")


def main(name: str = "anabranch") -> None:
    """Run a command line. Ctrl-C while it is imported ends the process, without a word."""
    handled = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # and not ignored by our parent
    if handled:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from anabranch.cli.__main__ import PROGRAMS
    from anabranch.cli.__main__ import main as run

    if handled:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run(PROGRAMS[name])
