"""Where the command `anabranch` begins: before what takes a moment to import."""

from __future__ import annotations

import signal


def main() -> None:
    """Run the command line. Ctrl-C while it is imported ends the process, without a word."""
    handled = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # and not ignored by our parent
    if handled:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from anabranch.cli.__main__ import main as run

    if handled:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()
