"""Which of the processes that a controller left behind are the next one's. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from controller.keeper import Held, Launch
from controller.slots import Phase, Slot


def keeper_name(slot: Slot) -> str:
    """By which the keeper of a slot's attempt is found."""
    return f"{slot.worker_id}.{slot.attempt}"


def filled(
    slots: Sequence[Slot],
    held: Mapping[str, Held | None],
    launch_of: Callable[[Slot], Launch],
    *,
    may_move: bool,
) -> tuple[Slot, ...]:
    """Each slot with the process of its last attempt, if that runs and was started as it would be now.

    `held` is by the keeper's name, None where it holds nothing; `may_move` says that processes find a
    controller at another address. An empty slot goes on counting where its last attempt was.
    """
    return tuple(_filled(slot, held, launch_of(slot), may_move) for slot in slots)


def _filled(slot: Slot, held: Mapping[str, Held | None], launch: Launch, may_move: bool) -> Slot:
    slot = replace(slot, attempt=_last_attempt(slot.worker_id, held))
    found = held.get(keeper_name(slot))
    if found is None or not _is_same(found.launch, launch, may_move):
        return slot
    return replace(
        slot,
        phase=Phase.STARTING,
        node=found.node,
        process_id=found.started.process_id,
        log_file=found.started.log_file,
    )


def _last_attempt(worker_id: str, names: Iterable[str]) -> int:
    parts = (name.rpartition(".") for name in names)
    return max((int(number) for worker, _, number in parts if worker == worker_id), default=0)


def _is_same(before: Launch, now: Launch, may_move: bool) -> bool:
    return before.config_text == now.config_text and (may_move or before.command == now.command)
