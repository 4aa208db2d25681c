"""Which cores a role computes on: own ones where roles share a machine, and never one twice."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from cluster.config import Config
from cluster.errors import ConfigError
from workers.cores import Role, own_cores, spin_s


def config(**sections: dict[str, Any]) -> Config:
    """A configuration with some sections given."""
    return Config.model_validate(sections)


def everybody(settings: Config, available: range) -> list[int]:
    """The cores of all processes, dense workers first."""
    dense = [own_cores(settings, "dense", i, available) for i in range(settings.dense.replicas)]
    others = [own_cores(settings, "attention", i, available) for i in range(settings.attention.replicas)]
    return [core for cores in (*dense, *others) for core in cores]


def test_roles_on_one_machine_get_cores_of_their_own() -> None:
    """Every process has as many cores as threads, and no core has two processes."""
    settings = config(dense={"threads": 2, "replicas": 2}, attention={"threads": 3, "replicas": 4})
    assert everybody(settings, range(16)) == list(range(16))


@pytest.mark.parametrize(
    "settings",
    [
        config(attention={"replicas": 3}),
        config(attention={"replicas": 1, "cores": []}, dense={"cores": []}),
        config(
            attention={"replicas": 1, "host": "10.0.0.2"},
            dense={"host": "10.0.0.1"},
            security={"insecure": True},
        ),
    ],
    ids=["too few cores", "any core asked for", "machines of their own"],
)
def test_nobody_is_pinned_without_reason(settings: Config) -> None:
    """Where cores do not suffice, are left free, or roles have machines of their own."""
    assert everybody(settings, range(2)) == []


def test_a_list_is_dealt_out() -> None:
    """Named cores go to the role's processes in turn, and again from the start when they run out."""
    settings = config(attention={"threads": 2, "cores": [4, 5, 6, 7], "replicas": 3})
    assert [own_cores(settings, "attention", i, range(8)) for i in range(3)] == [(4, 5), (6, 7), (4, 5)]


@pytest.mark.parametrize(("role", "cores", "threads"), [("dense", [9], 1), ("attention", [1], 2)])
def test_cores_that_cannot_be_had_are_refused(
    role: Literal["dense", "attention"], cores: list[int], threads: int
) -> None:
    """A core the machine lacks, and fewer cores than threads, are named."""
    settings = config(**{role: {"cores": cores, "threads": threads}})
    with pytest.raises(ConfigError, match=f"{role}.cores"):
        own_cores(settings, role, 0, range(2))


@pytest.mark.parametrize(
    ("configured", "role", "is_pinned", "seconds"),
    [
        (None, "attention", True, 50e-6),
        (None, "dense", True, 1e-3),
        (None, "attention", False, 0.0),
        (None, "dense", False, 0.0),
        (0, "dense", True, 0.0),
        (200, "attention", False, 200e-6),
    ],
)
def test_lanes_spin_on_own_cores_only(
    configured: int | None, role: Role, is_pinned: bool, seconds: float
) -> None:
    """Unless told otherwise; a dense worker, which only waits, for longer."""
    settings = config(lanes={"spin_us": configured})
    assert spin_s(settings, role, is_pinned=is_pinned) == pytest.approx(seconds)
