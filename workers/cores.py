"""Which cores a role process computes on, and whether its lanes may ask for bytes instead of sleeping.

Two processes whose threads wander over the same cores cost each other most of their time: a woken thread
waits for the core the other one spins on. One thread a role, each on a core of its own, is best as soon as
there are two micro-batches.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Literal

from cluster.config import Config
from cluster.errors import ConfigError
from workers.kernels.select import let_threads_spin

Role = Literal["dense", "attention"]

_SPIN_US: Mapping[Role, int] = {"dense": 1000, "attention": 50}
"""An attention worker's lanes ask side by side, on the core that computes for one of them: longer than a
message takes that comes at once. A dense worker asks on one thread, which has nothing else to do, for as long
as most replies take: whoever writes to a sleeping one wakes its core first, 40 us here, and that is the side
which is waited for.
"""


def own_cores(config: Config, role: Role, index: int, available: Sequence[int]) -> tuple[int, ...]:
    """The cores of the `index`th process of a role among those available here; none: wherever there is room.

    `cores: auto` gives each process as many cores as threads, dense workers first, where all roles share this
    machine and it has enough. A list is dealt out to the role's processes on it. Raises ConfigError for one
    that is too short, or names cores this machine does not have.
    """
    section = config.dense if role == "dense" else config.attention
    threads = section.threads
    if section.cores == "auto":
        dense = config.dense.replicas * config.dense.threads
        wanted = dense + config.attention.replicas * config.attention.threads
        if not config.roles_share_machine or wanted > len(available):
            return ()
        first = index * threads + (0 if role == "dense" else dense)
        return tuple(sorted(available)[first : first + threads])
    missing = set(section.cores) - set(available)
    if missing:
        raise ConfigError(f"{role}.cores: this machine has no core {', '.join(map(str, sorted(missing)))}")
    if section.cores and len(section.cores) < threads:
        raise ConfigError(f"{role}.cores: {len(section.cores)} cores for {threads} threads")
    processes = len(section.cores) // threads
    first = index % processes * threads if processes else 0
    return tuple(section.cores[first : first + threads])


def pin(config: Config, role: Role, index: int) -> float:
    """Keep this process, and every thread it starts from now on, on its cores; returns the seconds its lanes
    may spin. Raises ConfigError (`own_cores`).
    """
    cores = own_cores(config, role, index, sorted(os.sched_getaffinity(0)))
    if cores:
        keep_to(cores)
    return spin_s(config, role, is_pinned=bool(cores))


def keep_to(cores: Sequence[int]) -> None:
    """Keep this process, and every thread it starts from now on, on cores that nobody else computes on: its
    threads ask for more work for a moment before they sleep.
    """
    os.sched_setaffinity(0, cores)
    let_threads_spin()


def spin_s(config: Config, role: Role, *, is_pinned: bool) -> float:
    """Seconds a role's lanes ask for bytes before they sleep: as configured, else none but on own cores."""
    configured = config.lanes.spin_us
    return (configured if configured is not None else _SPIN_US[role] if is_pinned else 0) / 1e6
