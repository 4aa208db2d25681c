"""The first moment of the command line, and what importing the package costs."""

from __future__ import annotations

import signal
import subprocess
import sys

INTERRUPTED = """
import os, signal, sys

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "anabranch.cli.__main__":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
from anabranch.cli.entry import main
main()
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    """A Python process that runs a small program."""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)


def test_ctrl_c_while_the_command_is_imported_ends_it_without_a_word() -> None:
    """No traceback of some library's import: the process ends by the signal, as a shell expects."""
    ended = run(INTERRUPTED)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "")


def test_the_clients_are_imported_when_asked_for() -> None:
    """The stubs alone bring no client with them; asking the package for one does, for anything else fails."""
    ended = run(
        "import sys, anabranch.v1\n"
        "assert 'anabranch.client' not in sys.modules\n"
        "from anabranch import AsyncClient, Client\n"
        "assert Client.__module__ == 'anabranch.client'\n"
        "assert AsyncClient.__module__ == 'anabranch.async_client'\n"
        "assert not hasattr(anabranch, 'Server')\n"
    )
    assert ended.returncode == 0, ended.stderr
