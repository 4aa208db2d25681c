"""Parts of the command line that need no process: flags to a configuration, tables, the state folder."""

from __future__ import annotations

import io
import os
import re
import resource
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from anabranch.cli import up
from anabranch.cli.live import fleet_table, size
from anabranch.v1 import control_pb2, inference_pb2
from cluster.errors import ConfigError, NotFound
from controller.state import ClusterRecord, StateFolder, process_start


def test_the_state_folder_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder we make, and the default one, are closed to others; a user's own folder keeps its mode."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    default = tmp_path / "home" / "anabranch"
    default.mkdir(parents=True, mode=0o755)
    own = tmp_path / "own"
    own.mkdir(mode=0o755)
    modes = {}
    for folder in (default, own, tmp_path / "deep" / "new"):
        StateFolder(folder).prepare()
        modes[folder.name] = stat.S_IMODE(folder.stat().st_mode)
        assert stat.S_IMODE((folder / "logs").stat().st_mode) == 0o700
    assert modes == {"anabranch": 0o700, "own": 0o755, "new": 0o700}
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="state_dir"):
        StateFolder(tmp_path / "file" / "below").prepare()


def test_a_record_of_another_process_is_stale(tmp_path: Path) -> None:
    """A process number that was given to somebody else since does not make a dead cluster alive."""
    state = StateFolder(tmp_path)
    with state.claim():
        record = ClusterRecord(os.getpid(), process_start(os.getpid()), "127.0.0.1:1", "model")
        state.write(record)
        assert state.read() == record
        state.write(ClusterRecord(os.getpid(), process_start(os.getpid()) + 1, "127.0.0.1:1", "model"))
        with pytest.raises(NotFound, match="dead"):
            state.read()


def test_a_record_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    """A full disk is one clear error; readers go on with what they had, and no draft stays."""
    state = StateFolder(tmp_path)
    record = ClusterRecord(os.getpid(), process_start(os.getpid()), "127.0.0.1:1", "model")
    with state.claim():
        state.write(record)
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8, unlimited[1]))  # Python ignores the signal of it
        try:
            with pytest.raises(ConfigError, match="cannot be written to"):
                state.write(replace(record, model="other"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        assert state.read() == record
        assert {file.name for file in tmp_path.iterdir()} == {"cluster.json", "cluster.lock", "logs"}


def test_monolithic_mode_gets_an_arena(tmp_path: Path) -> None:
    """--attention 0 puts the cache, with the size asked for, into the dense worker."""
    assert up.compose(None, {"attention.replicas": 0}, None).dense.local_arena == 2**30
    assert up.compose(None, {"attention.replicas": 0}, "64MiB").dense.local_arena == 64 * 2**20
    file = tmp_path / "cluster.yaml"
    file.write_text("dense: {local_arena: 5MiB}\n")
    assert up.compose(file, {"attention.replicas": 0}, None).dense.local_arena == 5 * 2**20
    split = up.compose(None, {"attention.replicas": 3}, "64MiB")
    assert (split.attention.arena, split.dense.local_arena) == (64 * 2**20, 0)


def test_the_ports_of_several_gateways_do_not_meet() -> None:
    """Gateway i adds i to both ports: with several of them HTTP starts beyond the last gRPC port."""
    gateway = up.compose(None, {"gateway.replicas": 3, "gateway.port": 9000}, None).gateway
    grpc_ports = {gateway.port + i for i in range(3)}
    assert gateway.http_port is not None
    assert not grpc_ports & {gateway.http_port + i for i in range(3)}
    assert up.compose(None, {}, None).gateway.http_port == 8651
    chosen = {"gateway.replicas": 2, "gateway.http_port": 9100}
    assert up.compose(None, chosen, None).gateway.http_port == 9100


def test_settings_are_yaml() -> None:
    """Values keep their types; a key is needed."""
    assert up.parse_settings(["dense.threads=2", "model.name=null", "model.dtype=bfloat16"]) == {
        "dense.threads": 2,
        "model.name": None,
        "model.dtype": "bfloat16",
    }
    with pytest.raises(ConfigError, match="key=value"):
        up.parse_settings(["=2"])


def test_sizes_are_for_people() -> None:
    """Powers of 1024, one decimal from MiB on."""
    assert [size(0), size(2048), size(3 * 2**20 // 2), size(2**31)] == ["0 B", "2 KiB", "1.5 MiB", "2.0 GiB"]


def test_the_table_fits_a_terminal_and_shows_what_is_missing() -> None:
    """No cell is cut, whatever the figures; a slot without a process is a row, with its own phase, and its
    problem a line. A further arena is a row too, without the memory of its process, which is told once.
    """
    slots = [
        control_pb2.Slot(worker_id=name, node="ab" * 28, starts=1) for name in ("attention-63", "dense-0")
    ]
    slots.append(control_pb2.Slot(worker_id="dense-1", problem="waiting: needs GPU: 1", starts=2))
    for number, phase in enumerate(("starting", "ending", "paused", "given up", "stopped")):
        slots.append(control_pb2.Slot(worker_id=f"gateway-{number}", problem=phase, starts=1))
    load = inference_pb2.Load(resident_bytes=1023 * 2**20, sequences_running=64, sequences_waiting=256)
    load.blocks.MergeFrom(inference_pb2.BlockAccount(capacity=40960, free=1))
    members = [
        inference_pb2.Member(
            worker_id=slot.worker_id,
            role=inference_pb2.ROLE_DENSE,
            state=inference_pb2.MEMBER_STATE_DRAINING,
            process_id=4194303,
            epoch=2**64 - 1,
            load=load,
        )
        for slot in slots[:2]
    ]
    members.append(inference_pb2.Member(worker_id="attention-63.1", slot="attention-63", tier=1))
    members[-1].MergeFrom(inference_pb2.Member(state=inference_pb2.MEMBER_STATE_READY, load=load))
    fleet = control_pb2.GetFleetResponse(membership=control_pb2.Membership(members=members), slots=slots)
    console = Console(width=84, record=True, file=io.StringIO())
    console.print(fleet_table(fleet))
    text = console.export_text()
    assert "…" not in text
    shown = dict(re.findall(r"^(\S+-\d+) +(given up|[a-z]+)", text, re.MULTILINE))
    assert shown == {
        "attention-63": "draining",
        "dense-0": "draining",
        "dense-1": "waiting",
        "gateway-0": "starting",
        "gateway-1": "ending",
        "gateway-2": "paused",
        "gateway-3": "given up",
        "gateway-4": "stopped",
    }
    assert "dense-1, start 2: needs GPU: 1" in text
    assert re.search(r"^attention-63 .*\n  tier 1 +ready +ababab .* 40959/40960", text, re.MULTILINE)
    assert text.count("1023.0 MiB") == 2
