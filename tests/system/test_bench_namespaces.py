"""The network namespace that `anabranch bench lane` makes: there while it measures, gone afterwards."""

import signal
import subprocess
import sys

import pytest

from anabranch.cli.bench import lane
from anabranch.cli.bench.namespaces import way_to_peer

pytestmark = pytest.mark.system

HOLD = """
import signal
from anabranch.cli.bench.namespaces import way_to_peer
with way_to_peer() as way:
    print(way.prefix[-1], flush=True)
    signal.pause()
"""


def left() -> list[str]:
    """What benches have made and is still there: namespaces and ends of pairs."""
    commands = (["ip", "netns", "list"], ["ip", "-o", "link"])
    listed = [
        subprocess.run(command, check=True, capture_output=True, text=True).stdout for command in commands
    ]
    return [line for line in "".join(listed).splitlines() if "anabranch-bench-" in line or " abo" in line]


def test_tcp_passes_through_two_namespaces() -> None:
    """A lane is dialled and measured over the veth pair; nothing is left when the block ends."""
    with way_to_peer() as way:
        assert way.network.startswith("veth")
        found = lane.measure(1, way, (1, 1))
    assert found["tcp_vs_bare"]["settings"]["network"] == way.network
    assert left() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_nothing(number: signal.Signals) -> None:
    """A bench that is told to end removes what it made."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline().startswith("anabranch-bench-")
        holder.send_signal(number)
        holder.wait(timeout=60)
    assert left() == []


def test_the_next_bench_removes_what_a_killed_one_left() -> None:
    """Nothing can be done on SIGKILL; the next one does it."""
    with subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        name = holder.stdout.readline().strip()
        holder.kill()
        holder.wait(timeout=60)
    assert any(name in line for line in left())
    with way_to_peer():
        assert not any(name in line for line in left())
    assert left() == []
