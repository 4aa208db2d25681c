"""What tokens cost, in dollars and joules, from records, a shape, prices and rated powers. Pure.

Allocation basis: all that is paid for, busy or not, over the T seconds that a stage counts, by role r:

    A_r = devices_r x price_r / 3600 x T        A = A_dense + A_attention

Usage basis: that share of it in which devices worked, from the server's own account in each record. A request
that was in the batch for R = prefill + decode seconds saw its dense worker compute for the share dense / R of
them, its attention workers for attention / R. All requests of a batch see the same steps, so at each moment
the mean over the requests there estimates the share itself; with n requests there, at most n of the N workers
of a role work, if they are spread evenly, each with all of its devices:

    s(t) = mean(share_i) x min(n, N) / N,  0 where n = 0        busy = integral of s / T

Network is money for devices that stood while bytes moved: of dense devices, what lanes caused of `waited`,
waited x lane / (lane + attention); of the attention devices, all of `lane` that fits beside their work.
Idle is the rest, so that

    A = dense + attention + network + idle        U = A - idle

Energy is the power that makers rate all devices at, times T: not measured, and by allocation alone. Hosts,
networks and cooling are not in it.

Input and output share either basis by seconds in the batch: input has sum(prefill) / sum(prefill + decode).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from cluster.errors import InvalidRequest
from cluster.hardware import Catalogue
from cluster.prices import Price, Prices, per_mtok
from loadgen.metrics import Objectives, Summary
from loadgen.records import Outcome, Record

Role: TypeAlias = Literal["dense", "attention"]

PARTS = ("dense", "attention", "network", "idle")
"""What the dollars of a cluster are split into."""

_PART = re.compile(r"(dense|attention)=([1-9][0-9]*)x([\w.-]+)")


@dataclass(frozen=True, slots=True)
class Devices:
    """All devices of one role."""

    count: int
    kind: str
    price: Price
    rated_w: float | None = None
    """Of one; None where nobody publishes it."""
    per_worker: int = 1
    """How many work together, as one worker."""

    @property
    def usd_per_s(self) -> float:
        """Of all of them."""
        return self.count * self.price.usd_per_s

    @property
    def workers(self) -> int:
        """How many work each by itself."""
        return self.count // self.per_worker


@dataclass(frozen=True, slots=True)
class Bill:
    """What is paid for: the dense devices and, unless they attend themselves, those of attention."""

    dense: Devices
    attention: Devices | None

    @classmethod
    def parse(cls, shape: str, prices: Prices, catalogue: Catalogue) -> Bill:
        """`dense=1xh100,attention=2xh20`; the catalogue knows what each kind draws. Raises InvalidRequest
        for another, or a kind without a price.
        """
        roles: dict[str, Devices] = {}
        for part in shape.split(","):
            found = _PART.fullmatch(part)
            if found is None or found[1] in roles:
                raise InvalidRequest(
                    f"{part!r} is no part of a shape: write --shape dense=1xh100,attention=2xh20"
                )
            role, count, kind = found.groups()
            if kind not in prices:
                raise InvalidRequest(f"there is no price of {kind!r}, only of {', '.join(prices)}")
            rated_w = catalogue[kind].power_watts if kind in catalogue else None
            roles[role] = Devices(int(count), kind, prices[kind], rated_w)
        if "dense" not in roles:
            raise InvalidRequest(f"--shape {shape} has no dense devices: every cluster has")
        return cls(roles["dense"], roles.get("attention"))

    @property
    def roles(self) -> tuple[tuple[Role, Devices], ...]:
        """Each role that has devices."""
        return (("dense", self.dense), *((("attention", self.attention),) if self.attention else ()))

    @property
    def power_w(self) -> float | None:
        """Rated power of all devices; None where that of some kind is not known."""
        powers = [devices.count * devices.rated_w for _, devices in self.roles if devices.rated_w is not None]
        return sum(powers) if len(powers) == len(self.roles) else None


@dataclass(frozen=True, slots=True)
class Busy:
    """Shares of a stage's time, 0 to 1, each of all devices of a role."""

    dense: float = 0.0
    dense_network: float = 0.0
    attention: float = 0.0
    attention_network: float = 0.0


def priced(records: Sequence[Record], summaries: Sequence[Summary], bill: Bill) -> list[Summary]:
    """The summaries of a run's stages with what each cost."""
    return [{**summary, **costs(records, summary, bill, _objectives(summary))} for summary in summaries]


def costs(records: Sequence[Record], summary: Summary, bill: Bill, objectives: Objectives) -> Summary:
    """A stage's, as figures beside its others (`metrics.COSTS`): None where nothing was measured."""
    stage = [record for record in records if record.stage == summary["stage"]]
    completed = [record for record in stage if record.outcome is Outcome.COMPLETED]
    measured = [record for record in completed if not record.warm_up]
    good = list(filter(objectives.kept_by, measured)) if objectives.bounds_ms else None
    duration_s = summary["duration"]
    allocated = {role: devices.usd_per_s * duration_s for role, devices in bill.roles}
    until_s = max((record.ended_s for record in stage if not record.warm_up), default=0.0)
    shares = _shares(busy(completed, bill, until_s - duration_s, until_s), allocated)
    whole = sum(allocated.values())
    used = None if shares is None else whole - shares["idle"]
    tokens, outputs = _tokens(measured), sum(record.output_tokens for record in measured)
    return {
        "shape": ",".join(f"{role}={devices.count}x{devices.kind}" for role, devices in bill.roles),
        "prices": {devices.kind: str(devices.price) for _, devices in bill.roles},
        "allocated_usd": whole,
        "used_usd": used,
        **_per_token("", whole, measured),
        **_per_token("used_", used, measured),
        **{
            f"usd_per_mtok_{part}": per_mtok(None if shares is None else shares[part], tokens)
            for part in PARTS
        },
        "tokens_per_usd": tokens / whole if whole else None,
        "good_tokens_per_usd": None if good is None or not whole else _tokens(good) / whole,
        "usd_per_mtok_at_slo": None if good is None else per_mtok(whole, _tokens(good)),
        "power_w": bill.power_w,
        "joules_per_output_token": None
        if bill.power_w is None or not outputs
        else bill.power_w * duration_s / outputs,
    }


def busy(completed: Sequence[Record], bill: Bill, from_s: float, until_s: float) -> Busy | None:
    """See the module; None where the server gives no account of its time, or no time passed."""
    changes: list[tuple[float, int, Busy]] = []
    for record in completed:
        if (stay := _stay(record)) is not None:
            begins_s, ends_s, seen = stay
            changes += [(max(begins_s, from_s), 1, seen), (max(ends_s, from_s), -1, seen)]
    if not changes or until_s <= from_s:
        return None
    changes.sort(key=lambda change: change[0])
    sums, there, before_s = [0.0] * 4, 0, from_s
    now = [0.0] * 4
    counts = (bill.dense.workers,) * 2 + ((bill.attention.workers,) * 2 if bill.attention else (1, 1))
    for at_s, step, seen in changes:
        if there:
            for place, count in enumerate(counts):
                sums[place] += (at_s - before_s) * now[place] / there * min(there, count) / count
        there, before_s = there + step, at_s
        for place, share in enumerate(_parts(seen)):
            now[place] += step * share
    return Busy(*(min(1.0, whole / (until_s - from_s)) for whole in sums))


def _objectives(summary: Summary) -> Objectives:
    return Objectives(tuple(summary["objectives_ms"].items()))


def _stay(record: Record) -> tuple[float, float, Busy] | None:
    """When a request was in the batch, and which shares of that time it saw its workers at work."""
    told = record.timings
    if told is None or record.first_token_s is None or record.last_token_s is None:
        return None
    whole_s = told.prefill_seconds + told.decode_seconds
    if whole_s <= 0:
        return None
    elsewhere_s = told.lane_seconds + told.attention_seconds
    network_s = told.waited_seconds * told.lane_seconds / elsewhere_s if elsewhere_s else 0.0
    dense = min(1.0, told.dense_seconds / whole_s)
    attention = min(1.0, told.attention_seconds / whole_s)
    seen = Busy(
        dense,
        min(1.0 - dense, network_s / whole_s),
        attention,
        min(1.0 - attention, told.lane_seconds / whole_s),
    )
    return record.first_token_s - told.prefill_seconds, record.last_token_s, seen


def _parts(seen: Busy) -> tuple[float, float, float, float]:
    return seen.dense, seen.dense_network, seen.attention, seen.attention_network


def _shares(seen: Busy | None, allocated: dict[Role, float]) -> dict[str, float] | None:
    """Dollars of dense, attention, network and idle. Where the dense devices attend too, what they wait for
    attention is attention's.
    """
    if seen is None:
        return None
    dense_usd, attention_usd = allocated["dense"], allocated.get("attention")
    attended = seen.attention if attention_usd is not None else min(seen.attention, 1.0 - seen.dense)
    parts = {
        "dense": dense_usd * seen.dense,
        "attention": (dense_usd if attention_usd is None else attention_usd) * attended,
        "network": 0.0
        if attention_usd is None
        else dense_usd * seen.dense_network + attention_usd * seen.attention_network,
    }
    return {**parts, "idle": max(0.0, sum(allocated.values()) - sum(parts.values()))}


def _per_token(prefix: str, usd: float | None, measured: Sequence[Record]) -> Summary:
    """Dollars per million tokens: all, input, output."""
    prompts = sum(record.prompt_tokens for record in measured)
    outputs = sum(record.output_tokens for record in measured)
    share = _input_share(measured)
    inputs, rest = (None, None) if usd is None or share is None else (usd * share, usd * (1.0 - share))
    return {
        f"{prefix}usd_per_mtok": per_mtok(usd, prompts + outputs),
        f"{prefix}usd_per_mtok_input": per_mtok(inputs, prompts),
        f"{prefix}usd_per_mtok_output": per_mtok(rest, outputs),
    }


def _input_share(measured: Sequence[Record]) -> float | None:
    """Of the seconds in the batch; where the server tells none, of those the client saw."""
    prefill_s = decode_s = 0.0
    for record in measured:
        if record.timings is not None:
            prefill_s += record.timings.prefill_seconds
            decode_s += record.timings.decode_seconds
        else:
            prefill_s += record.ttft_s or 0.0
            decode_s += (record.e2el_s or 0.0) - (record.ttft_s or 0.0)
    whole_s = prefill_s + decode_s
    return prefill_s / whole_s if whole_s > 0 else None


def _tokens(records: Sequence[Record]) -> int:
    return sum(record.prompt_tokens + record.output_tokens for record in records)
