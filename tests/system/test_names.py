"""A name of several gateways as this machine's own resolver knows it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fake_gateway import FakeGateway
from tests.helm.charts import ROOT

pytestmark = pytest.mark.system

_ASK = """
import sys
from anabranch import Client
with Client(sys.argv[1]) as client:
    for _ in range(4):
        client.generate("x", max_tokens=1).text()
    print(*sorted(client.health()))
"""
_WITH_HOSTS = 'mount --bind "$0" /etc/hosts && exec "$@"'


def test_one_name_of_two_addresses_is_two_gateways(tmp_path: Path) -> None:
    """A client without a resolver of the test's asks both, in turn, as it does in a pod."""
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 gateways.test\n127.0.0.2 gateways.test\n")
    with FakeGateway() as first, FakeGateway(host="127.0.0.2", port=first.port) as second:
        words = [sys.executable, "-c", _ASK, f"dns:///gateways.test:{first.port}"]
        command = ["unshare", "--mount", "bash", "-c", _WITH_HOSTS, str(hosts), *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [first.address, second.address]
        assert (len(first.requests), len(second.requests)) == (2, 2)
