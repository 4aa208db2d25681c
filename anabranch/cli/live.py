"""The fleet as a table, once or refreshed while a cluster runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from anabranch.cli.awaited import Awaited
from anabranch.cli.pulse import pulse
from anabranch.v1 import control_pb2, inference_pb2
from controller.events import ClusterReady, Event, Opened, SlotChanged, Stopping
from controller.slots import Phase, Slot
from controller.state import ClusterRecord

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_STATES = {
    inference_pb2.MEMBER_STATE_STARTING: "starting",
    inference_pb2.MEMBER_STATE_READY: "ready",
    inference_pb2.MEMBER_STATE_DRAINING: "draining",
}
_PHASES = frozenset(phase.value for phase in Phase)
_STYLES = {"ready": "green", "given up": "red", "stopped": "dim"}
_OTHER_STYLE = "yellow"
_SHOWN_LETTERS = 6  # of a node's id, of an epoch: enough to tell them apart
_COLUMNS = ("slot", "state", "node", "pid", "epoch", "memory", "cache", "work")


def fleet_table(fleet: control_pb2.GetFleetResponse) -> Group:
    """One row per slot, live member or not, below it one per further arena of its process; at the end, why a
    slot has no process. Lines stay short.
    """
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0), pad_edge=False)
    for column in _COLUMNS:
        table.add_column(column, no_wrap=True)
    members = {member.worker_id: member for member in fleet.membership.members}
    slots = {slot.worker_id: slot for slot in fleet.slots}
    for name in sorted(slots.keys() | members.keys()):
        member = members.get(name)
        slot = name if member is None else member.slot or name
        table.add_row(*_row(name, slots.get(slot), member))
    problems = [
        Text(f"{slot.worker_id}, start {slot.starts}: {problem}", style="yellow")
        for slot in fleet.slots
        if (problem := _phase_and_problem(slot)[1])
    ]
    return Group(table, *problems)


def _phase_and_problem(slot: control_pb2.Slot) -> tuple[str, str]:
    """What a slot that is not ready says of itself: `PHASE` or `PHASE: problem`; empty if it is ready."""
    phase, _, problem = slot.problem.partition(": ")
    return (phase, problem) if phase in _PHASES else ("", slot.problem)


def _row(
    name: str, slot: control_pb2.Slot | None, member: inference_pb2.Member | None
) -> tuple[str | Text, ...]:
    node = slot.node[:_SHOWN_LETTERS] if slot is not None else ""
    phase = _phase_and_problem(slot)[0] if slot is not None else ""
    if member is None:
        return name, _state(phase or Phase.WAITING.value), node, "", "", "", "", ""
    # The slot knows better, but for what a process that comes up says of itself.
    state = phase if phase not in ("", Phase.STARTING.value) else _STATES.get(member.state, "")
    return (
        f"  tier {member.tier}" if member.tier else name,
        _state(state),
        node or member.host,
        str(member.process_id),
        f"{member.epoch:016x}"[:_SHOWN_LETTERS],
        size(member.load.resident_bytes) if not member.tier else "",  # of the whole process
        _blocks(member.load.blocks),
        _work(member),
    )


def _state(words: str) -> Text:
    return Text(words, style=_STYLES.get(words, _OTHER_STYLE))


def _blocks(account: inference_pb2.BlockAccount) -> str:
    """Blocks not free, of all."""
    return f"{account.capacity - account.free}/{account.capacity}" if account.capacity else ""


def _work(member: inference_pb2.Member) -> str:
    load = member.load
    if member.role == inference_pb2.ROLE_DENSE:
        return f"{load.sequences_running} run, {load.sequences_waiting} wait"
    if member.role == inference_pb2.ROLE_GATEWAY:
        return f"{load.streams_open} streams"
    return ""


def size(count: int) -> str:
    """Bytes for people: 1.5 GiB."""
    amount, unit = float(count), 0
    while amount >= 1024 and unit < len(_UNITS) - 1:
        amount, unit = amount / 1024, unit + 1
    return f"{amount:.0f} {_UNITS[unit]}" if unit < 2 else f"{amount:.1f} {_UNITS[unit]}"


def addresses(record: ClusterRecord) -> str:
    """Where clients connect, in words."""
    http = f", HTTP at {', '.join(record.http)}" if record.http else ""
    return f"serving {record.model}: gRPC at {', '.join(record.gateways)}{http}"


class SlotLines:
    """What becomes of slots, as lines: every phase once, every problem once."""

    def __init__(self) -> None:
        self._told: dict[str, Slot] = {}

    def line(self, slot: Slot) -> str | None:
        """The line for a change; None if it says nothing new."""
        told = self._told.get(slot.worker_id)
        self._told[slot.worker_id] = slot
        has_news = slot.problem and (told is None or slot.problem != told.problem)
        if told is not None and slot.phase is told.phase and not has_news:
            return None
        about = f" process {slot.process_id}" if slot.process_id else ""
        return f"{slot.worker_id} {slot.phase.value}{about}{f': {slot.problem}' if has_news else ''}"


class LiveView:
    """Shows a cluster while it runs: on a terminal a table that refreshes, else a line per event, and
    every two seconds one that says what is waited for.

    A `controller.Observer`; use as a context manager.
    """

    def __init__(
        self, console: Console, title: str, fleet: Callable[[], control_pb2.GetFleetResponse]
    ) -> None:
        self._console = console
        self._title = title
        self._fleet = fleet
        self._headline = "starting Ray"
        self._lines = SlotLines()
        self._awaited = Awaited()
        self._until_exit = ExitStack()
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4)

    def __enter__(self) -> LiveView:
        if self._console.is_terminal:
            self._live.start()
        else:
            self._console.print(f"{self._title}: {self._headline}")
            self._until_exit.enter_context(pulse(self._say))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._headline = "stopped"
        self._until_exit.close()
        if self._console.is_terminal:
            self._live.stop()
        elif error is None:
            self._console.print(self._headline)

    def __call__(self, event: Event) -> None:
        """See `controller.Observer`."""
        self._awaited(event)
        match event:
            case Opened():
                self._headline = (
                    f"controller at {event.address}, {event.nodes} node(s); starting the processes"
                )
            case ClusterReady(record):
                self._headline = f"{addresses(record)}\nCtrl-C drains and stops"
            case Stopping():
                self._headline = f"stopping; open streams have {event.grace_s:g} s, a second Ctrl-C kills"
            case SlotChanged():
                pass
        if not self._console.is_terminal:
            self._print(event)

    def _print(self, event: Event) -> None:
        line = self._lines.line(event.slot) if isinstance(event, SlotChanged) else self._headline
        if line is not None:
            self._console.print(line, highlight=False, soft_wrap=True, markup=False)

    def _say(self, passed_s: float) -> None:
        if words := self._awaited.words():
            self._console.print(f"  {passed_s:.0f} s: {words}", highlight=False, soft_wrap=True, markup=False)

    def _render(self) -> Group:
        words = self._awaited.words()
        lines = [Text(self._headline), *([Text(f"{words} ...", style="dim")] if words else [])]
        return Group(Text(self._title, style="bold"), *lines, fleet_table(self._fleet()))
