"""Who lives: the table behind the control service.

Pure but for the injected clock; safe to call from the server's threads. Members are the proto's own
messages, because the table's content is what goes over the wire.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from anabranch.v1 import control_pb2, inference_pb2
from cluster.clock import Clock, monotonic
from cluster.errors import Fenced, InvalidRequest, NotFound, ResourceExhausted, VersionMismatch
from cluster.types import LAYOUT_VERSION, WIRE_VERSION, Epoch, WorkerId

MEMBERS_MOST = 8192
_PAST_EPOCHS_MOST = 64
"""Dead incarnations remembered per slot; older ones are told to register and lose to the newest."""
_READERS = (inference_pb2.ROLE_GATEWAY, inference_pb2.ROLE_DENSE)
"""Who decides by the loads of others. An attention worker hears only who comes, goes or drains."""
_LOADS_PER_S = 100_000
"""Loads told to all readers together, each of which costs the controller some microseconds."""
RESTORED_GRACE_S = 5.0
"""What a member known from an earlier controller gets beyond the expiry, in order to find this one."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What a process must agree to in order to join."""

    config_digest: str
    heartbeat_ms: int
    expiry_ms: int


@dataclass(slots=True)
class _Entry:
    """One live member. The message is never handed out while it lives; copies are.

    A restored one was admitted by an earlier controller, and has not spoken to this one yet.
    """

    member: inference_pb2.Member
    heard_s: float
    is_restored: bool = False
    leaves_s: float | None = None  # by when it is to have left, if it is

    @property
    def is_leaving(self) -> bool:
        """Whether it drains, or will once it has heard that it is to."""
        return self.leaves_s is not None or self.member.state == inference_pb2.MEMBER_STATE_DRAINING


@dataclass(slots=True)
class _Slot:
    """One name, and who has it. Epochs in `past` never get it back."""

    past: deque[int] = field(default_factory=lambda: deque(maxlen=_PAST_EPOCHS_MOST))
    entry: _Entry | None = None

    def retire(self) -> inference_pb2.Member:
        """Take the name from its present holder, for good."""
        assert self.entry is not None
        member, self.entry = self.entry.member, None
        self.past.append(member.epoch)
        return member


class MembershipTable:
    """The one writer of the fact who lives.

        unknown --register--> live --silent for expiry_ms, or process ended--> past (Fenced for ever)
                               |                                                ^
                               +------another epoch registers for the slot------+

    The version grows with each change, loads included; loads are published by `sweep`, so that many
    heartbeats cost one version, and the less often the more there are to tell. An incarnation unknown here
    gets NotFound and registers again: that is how the table is rebuilt after a restart of the controller.
    Those that `restore` brought back count as members until then.

    `on_change` is called, outside the lock, with each member that joined or changed its state.
    """

    def __init__(
        self,
        terms: Terms,
        clock: Clock = monotonic,
        on_change: Callable[[inference_pb2.Member], None] = lambda _member: None,
    ) -> None:
        self.terms = terms
        self._clock = clock
        self._on_change = on_change
        self._lock = threading.Lock()
        self._slots: dict[str, _Slot] = {}
        self._version = 0
        self._faces_version = 0  # that of the last change but of loads
        self._told: control_pb2.Membership | None = None  # to who asked, as of this version
        self._loads_changed = False
        self._loads_due_s = self._swept_s = clock()

    def register(self, request: control_pb2.RegisterRequest) -> control_pb2.Membership:
        """Admit an incarnation; the one that had the slot before is fenced.

        Raises InvalidRequest, VersionMismatch naming what differs, Fenced for a past incarnation.
        """
        _require_agreement(request, self.terms)
        member = _checked(request.member)
        with self._lock:
            slot = self._slot(member.worker_id)
            if member.epoch in slot.past:
                raise Fenced(f"{member.worker_id}: incarnation {member.epoch:016x} was replaced; end")
            if slot.entry is not None and slot.entry.member.epoch != member.epoch:
                slot.retire()
            slot.entry = _Entry(member, self._clock())
            self._change_faces()
            membership = self._snapshot()
        self._on_change(_copy(member))
        return membership

    def heartbeat(self, request: control_pb2.HeartbeatRequest) -> control_pb2.Membership | None:
        """Note a sign of life; returns the membership, not to be modified, where the caller's is too old for
        what its role decides.

        Raises NotFound for an incarnation unknown here, Fenced for one that was replaced or expired.
        """
        with self._lock:
            entry = self._living(request.worker_id, request.epoch)
            entry.heard_s = self._clock()
            member = entry.member
            changed = request.state != member.state
            if changed:
                member.state = request.state
                self._change_faces()
            self._loads_changed |= _says_more_than_memory(member.load, request.load)
            member.load.CopyFrom(request.load)
            needed = self._version if member.role in _READERS else self._faces_version
            is_known = needed <= request.membership_version <= self._version
            news = None if is_known else self._news()
            told = _copy(member) if changed else None
        if told is not None:
            self._on_change(told)
        return news

    def sweep(self, *, frozen: bool = False) -> tuple[inference_pb2.Member, ...]:
        """Remove members silent for longer than the expiry and return those that ever spoke here; publish
        changed loads.

        To be called every heartbeat interval. Time during which the controller itself did not run
        is nobody's silence: what exceeds two intervals since the last sweep is forgiven. With `frozen`
        nobody's time passes.
        """
        with self._lock:
            now_s = self._clock()
            passed_s = now_s - self._swept_s
            forgiven_s = passed_s if frozen else max(0.0, passed_s - 2 * self.terms.heartbeat_ms / 1000)
            self._swept_s = now_s
            silent = list(self._retire_silent(now_s, forgiven_s))
            if silent:
                self._change_faces()
            elif self._loads_changed and now_s >= self._loads_due_s:
                self._publish_loads(now_s)
            return tuple(entry.member for entry in silent if not entry.is_restored)

    def restore(
        self,
        registrations: Sequence[control_pb2.RegisterRequest],
        past: Mapping[WorkerId, Iterable[Epoch]],
        version: int,
    ) -> int:
        """Take over what an earlier controller knew; returns how many members that brought back.

        Whoever registered here in the meantime stays, unless that life had ended before. Whoever does
        not agree with the terms is left out. `version` is that of the earlier membership.
        """
        with self._lock:
            for worker_id, epochs in past.items():
                slot = self._slot(worker_id)
                slot.past.extend(epoch for epoch in epochs if epoch not in slot.past)
                if slot.entry is not None and slot.entry.member.epoch in slot.past:
                    slot.retire()
            restored = sum(self._bring_back(registration) for registration in registrations)
            self._version = max(self._version, version)
            self._change_faces()
            return restored

    def registrations(self) -> tuple[int, list[control_pb2.RegisterRequest]]:
        """The version, and every member as it would register now, load and condition included."""
        with self._lock:
            membership = self._snapshot()
        return membership.version, [self._registration(member) for member in membership.members]

    def drain(self, slot: str, grace_s: float) -> None:
        """Let a process that nobody supervises leave within this time. Idempotent: the first time counts.

        Raises NotFound, and InvalidRequest for the last one of its role.
        """
        with self._lock:
            self._require_others(slot)
            self._dismiss(slot, grace_s)

    def dismiss(self, slot: str, grace_s: float) -> None:
        """Let the members of a slot, if there are any, know how long they have to leave."""
        with self._lock:
            self._dismiss(slot, grace_s)

    def left_s(self, worker_id: str) -> float | None:
        """How long a member that is to leave still has for it; None for one that may stay."""
        with self._lock:
            slot = self._slots.get(worker_id)
            if slot is None or slot.entry is None or slot.entry.leaves_s is None:
                return None
            return max(0.0, slot.entry.leaves_s - self._clock())

    def remove(self, slot: str) -> None:
        """Forget the members of a slot whose process is known to have ended; nothing if there is none."""
        with self._lock:
            for name in self._slots.values():
                if name.entry is not None and name.entry.member.slot == slot:
                    name.retire()
                    self._change_faces()

    def holds(self, worker_id: str, epoch: int) -> bool:
        """Whether this incarnation lives."""
        with self._lock:
            slot = self._slots.get(worker_id)
            return slot is not None and slot.entry is not None and slot.entry.member.epoch == epoch

    def membership(self) -> control_pb2.Membership:
        """Everyone alive, in order of names."""
        with self._lock:
            return self._snapshot()

    def _slot(self, worker_id: str) -> _Slot:
        if worker_id not in self._slots and len(self._slots) >= MEMBERS_MOST:
            raise ResourceExhausted(f"this controller knows {MEMBERS_MOST} slots, and takes no more")
        return self._slots.setdefault(worker_id, _Slot())

    def _retire_silent(self, now_s: float, forgiven_s: float) -> Iterable[_Entry]:
        for slot in self._slots.values():
            entry = slot.entry
            if entry is None:
                continue
            # A restored member's grace lies ahead of now.
            entry.heard_s = max(entry.heard_s, min(now_s, entry.heard_s + forgiven_s))
            if now_s - entry.heard_s > self.terms.expiry_ms / 1000:
                slot.retire()
                yield entry

    def _bring_back(self, registration: control_pb2.RegisterRequest) -> bool:
        member = registration.member
        slot = self._slot(member.worker_id)
        if slot.entry is not None or member.epoch in slot.past or _differences(registration, self.terms):
            return False
        slot.entry = _Entry(_copy(member), self._clock() + RESTORED_GRACE_S, is_restored=True)
        return True

    def _registration(self, member: inference_pb2.Member) -> control_pb2.RegisterRequest:
        return control_pb2.RegisterRequest(
            member=member,
            wire_version=WIRE_VERSION,
            layout_version=LAYOUT_VERSION,
            config_digest=self.terms.config_digest,
        )

    def _living(self, worker_id: str, epoch: int) -> _Entry:
        slot = self._slots.get(worker_id)
        if slot is not None and slot.entry is not None and slot.entry.is_restored and epoch not in slot.past:
            raise NotFound(f"{worker_id} is known from an earlier controller only; register again")
        if slot is not None and slot.entry is not None and slot.entry.member.epoch == epoch:
            return slot.entry
        if slot is not None and (epoch in slot.past or slot.entry is not None):
            raise Fenced(f"{worker_id}: incarnation {epoch:016x} was replaced or taken for dead; end")
        raise NotFound(f"{worker_id} is not registered here; register again")

    def _change_faces(self) -> None:
        self._version += 1
        self._faces_version = self._version
        self._told = None

    def _publish_loads(self, now_s: float) -> None:
        self._version += 1
        self._told = None
        self._loads_changed = False
        living = [entry.member.role for entry in self._entries()]
        told = len(living) * sum(role in _READERS for role in living)
        self._loads_due_s = now_s + told / _LOADS_PER_S

    def _require_others(self, slot: str) -> None:
        role = next((entry.member.role for entry in self._entries() if entry.member.slot == slot), None)
        if role is None:
            raise NotFound(f"there is no {slot}: `anabranch status` lists the workers")
        peers = [entry for entry in self._entries() if entry.member.role == role]
        if all(peer.is_leaving or peer.member.slot == slot for peer in peers):
            name = inference_pb2.Role.Name(role).removeprefix("ROLE_").lower()
            raise InvalidRequest(f"{slot} is the last {name}: end it where it was started")

    def _dismiss(self, slot: str, grace_s: float) -> None:
        for entry in self._entries():
            if entry.member.slot == slot and entry.leaves_s is None:
                entry.leaves_s = self._clock() + grace_s

    def _entries(self) -> list[_Entry]:
        return [slot.entry for slot in self._slots.values() if slot.entry is not None]

    def _news(self) -> control_pb2.Membership:
        """Made once a version, since all ask for it."""
        if self._told is None:
            self._told = self._snapshot()
        return self._told

    def _snapshot(self) -> control_pb2.Membership:
        members = sorted((entry.member for entry in self._entries()), key=lambda member: member.worker_id)
        return control_pb2.Membership(version=self._version, members=members)


def _require_agreement(request: control_pb2.RegisterRequest, terms: Terms) -> None:
    for name, theirs, ours in _differences(request, terms):
        raise VersionMismatch(
            f"{request.member.worker_id}: {name} {theirs} differs from the controller's {ours}; start "
            "it with the same version and the same configuration file"
        )


def _differences(
    request: control_pb2.RegisterRequest, terms: Terms
) -> list[tuple[str, int | str, int | str]]:
    """What the two do not agree on: name, theirs, ours."""
    facts: tuple[tuple[str, int | str, int | str], ...] = (
        ("wire version", request.wire_version, WIRE_VERSION),
        ("block layout version", request.layout_version, LAYOUT_VERSION),
        ("configuration digest", request.config_digest, terms.config_digest),
    )
    return [fact for fact in facts if fact[1] != fact[2]]


def _checked(given: inference_pb2.Member) -> inference_pb2.Member:
    """An own copy of a member that has everything others rely on."""
    for name in ("worker_id", "role", "epoch", "address"):
        if not getattr(given, name):
            raise InvalidRequest(f"member.{name} is missing")
    member = _copy(given)
    member.slot = given.slot or given.worker_id
    return member


def _copy(given: inference_pb2.Member) -> inference_pb2.Member:
    member = inference_pb2.Member()
    member.CopyFrom(given)
    return member


def _says_more_than_memory(before: inference_pb2.Load, after: inference_pb2.Load) -> bool:
    """Whether a load changed in what others decide by: memory and times change always, and they do not."""
    masked = inference_pb2.Load()
    masked.CopyFrom(after)
    masked.resident_bytes = before.resident_bytes
    masked.resident_peak_bytes = before.resident_peak_bytes
    masked.waiting_tokens = before.waiting_tokens
    masked.ClearField("step_times")
    if before.HasField("step_times"):
        masked.step_times.CopyFrom(before.step_times)
    return masked != before
