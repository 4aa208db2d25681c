"""How a cluster ends: by a call, by force, or because it cannot start. Nothing is left running."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from anabranch.v1 import control_pb2, control_pb2_grpc
from cluster import rpc
from cluster.config import TlsConfig
from cluster.errors import BrokenModelFolder, ConfigError, NotFound, Unplaceable
from controller.controller import Controller
from controller.slots import Phase
from controller.state import StateFolder
from tests.integration.clusters import DEADLINE_S, alive, configured, joining, running

pytestmark = pytest.mark.system  # many processes: minutes rather than seconds


def test_a_shutdown_call_drains_kills_and_leaves_nothing(tmp_path: Path) -> None:
    """Whoever obeys stops by itself; whoever ignores the drain is killed after the grace, and the exit
    status says so. Processes, Ray and the record are gone.
    """
    config = configured(tmp_path, attention__replicas=1)
    with running(config, joining(gateway="stubborn")) as cluster:
        cluster.await_ready()
        processes = cluster.processes()
        with rpc.channel(cluster.controller.address, TlsConfig()) as channel:
            control = control_pb2_grpc.ControlServiceStub(channel)
            control.Shutdown(control_pb2.ShutdownRequest(grace_ms=300), timeout=DEADLINE_S)
        for name in ("gateway-0", "dense-0", "attention-0"):
            cluster.await_phase(name, Phase.STOPPED)
        assert cluster.status.result(DEADLINE_S) == 1
    assert alive(processes) == []
    with pytest.raises(NotFound, match="anabranch up"):
        StateFolder(tmp_path / "state").read()


def test_a_refusing_process_fails_the_start_in_its_own_words(tmp_path: Path) -> None:
    """When a role refuses its configuration the whole start fails at once, and nothing is left."""
    with (
        running(configured(tmp_path), joining(dense="refuse")) as cluster,
        pytest.raises(ConfigError, match=r"dense-0: program: this program was told to refuse"),
    ):
        cluster.status.result(DEADLINE_S)
    assert alive(cluster.processes()) == []


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        ({"placement__attention_label": "disk=fast"}, "disk=fast"),
        ({"attention__arena": "4000GiB"}, "GiB memory"),
        ({"dense__device": "cuda", "dense__replicas": 65}, "GPU"),
        ({"placement__exclusive": True}, "anabranch_"),
    ],
    ids=["label", "memory", "gpu", "custom"],
)
def test_a_role_for_which_a_private_cluster_has_no_room_fails_at_once(
    tmp_path: Path, settings: dict[str, Any], missing: str
) -> None:
    """With the default limits: no node will join, so nothing is started and nothing waited for."""
    began_s = time.monotonic()
    with running(configured(tmp_path, **settings), joining()) as cluster:
        with pytest.raises(Unplaceable, match=missing):
            cluster.status.result(DEADLINE_S)
        assert time.monotonic() - began_s < 30
    assert alive(cluster.processes()) == []


def test_a_broken_model_folder_is_refused_before_anything_starts(tmp_path: Path) -> None:
    """No process is started for a model that cannot be served."""
    config = configured(tmp_path)
    (tmp_path / "model" / "config.json").write_text("{")
    with running(config, joining()) as cluster, pytest.raises(BrokenModelFolder, match=r"config\.json"):
        cluster.status.result(DEADLINE_S)
    assert Controller(config).fleet().slots == []
