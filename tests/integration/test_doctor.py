"""`anabranch doctor` between two processes, and benches' messages over real sockets."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading

import pytest

from anabranch.cli.bench import bare
from anabranch.cli.doctor import way_to
from cluster.errors import InvalidRequest, Unavailable

DOCTOR = [sys.executable, "-m", "anabranch.cli", "doctor"]


def test_a_doctor_measures_the_way_to_another() -> None:
    """One serves, the other measures; the numbers hang together, and there is a verdict."""
    with subprocess.Popen([*DOCTOR, "--serve", "--port", "0"], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        address = server.stdout.readline().split()[-1]
        ran = subprocess.run(
            [*DOCTOR, "--peer", address, "--json"], capture_output=True, text=True, timeout=100, check=True
        )
        server.terminate()
    found = json.loads(ran.stdout)
    assert found["layers_round_trip_s"] == pytest.approx(30 * found["round_trip_s"])
    assert min(found["read_bytes_per_s"], found["flops_per_s"], found["lane_bytes_per_s"]) > 1e6
    told = found["forecast"]
    assert told["verdict"].startswith("split" if told["should_split"] else "do not split")


def test_a_peer_that_is_none_is_named() -> None:
    """An address without a port, and one nobody listens on."""
    with pytest.raises(InvalidRequest, match="HOST:PORT"):
        way_to("somewhere")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(Unavailable, match=str(port)):
        way_to(f"127.0.0.1:{port}")


def test_a_message_too_large_is_not_bounced() -> None:
    """A stranger cannot make the other side take memory without end."""
    with bare.listen("127.0.0.1", 0) as listener:
        threading.Thread(target=bare.bounce_all, args=(listener,), daemon=True).start()
        address = "127.0.0.1", listener.getsockname()[1]
        with bare.connect(address, 2**40) as connected:
            assert connected.recv(1) == b""
        with bare.connect(address, 64) as connected:
            bare.trip(connected, 64)()
