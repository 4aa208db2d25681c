"""What a seed means: the requests, when they arrive, and which faults follow each other. Pure."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from anabranch.cli.chaos.model import VOCABULARY_SIZE
from cluster.fault_points import POINTS

Role = Literal["gateway", "dense", "attention"]
Kind = Literal["kill", "freeze", "cut"]
Transport = Literal["local", "grpc"]
ROLES: tuple[Role, ...] = ("gateway", "dense", "attention")
KINDS: tuple[Kind, ...] = ("kill", "freeze", "cut")

_PROMPT_TOKENS = (4, 200)
_OUTPUT_TOKENS = (16, 96)
_PREFIX_TOKENS = 48
_SHARED_SHARE = 0.25
_RUSH = 48
_AWAY_S = (2.0, 9.0)


@dataclass(frozen=True, slots=True)
class Request:
    """One request: when it is sent, in seconds from the start, and what it asks for."""

    name: str
    at_s: float
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: dict[str, Any]
    is_hasty: bool = False
    """Whether its client gives up soon."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault to come. `point` is where to strike, None: wherever it is. `slot` picks among the role's
    processes, `lasts_s` says how long it stays frozen or cut off, None: until it was replaced.
    """

    role: Role
    kind: Kind
    point: str | None
    slot: int
    lasts_s: float | None


@dataclass(frozen=True, slots=True)
class Loss:
    """All processes of a role but `left` are killed, and none of them is started again for `away_s`."""

    role: Role
    left: int
    away_s: float

    @property
    def name(self) -> str:
        """As reports call it."""
        return f"all but {self.left} {self.role}" if self.left else f"all {self.role}"


def requests(seed: int, count: int) -> tuple[Request, ...]:
    """Requests of mixed lengths, half greedy and half sampled, some with a common prefix; one a second."""
    source = random.Random(f"requests {seed}")  # noqa: S311  repeatable is what it must be
    prefix = _tokens(source, _PREFIX_TOKENS)
    drawn = []
    at_s = 0.0
    for number in range(count):
        at_s += source.expovariate(1.0)
        prompt = _tokens(source, _between(source, *_PROMPT_TOKENS))
        if source.random() < _SHARED_SHARE:
            prompt = prefix + prompt
        output = _between(source, *_OUTPUT_TOKENS)
        drawn.append(Request(f"chaos-{seed}-{number}", at_s, prompt, output, _sampling(source, number)))
    return tuple(drawn)


def rush(asked: Sequence[Request]) -> tuple[Request, ...]:
    """The first requests of a schedule, all at once: as much as a fleet can serve."""
    return tuple(replace(request, at_s=0.0) for request in asked[:_RUSH])


def paced(
    asked: Sequence[Request], tokens_per_second: float, seconds_least: float = 0.0
) -> tuple[Request, ...]:
    """The same requests so far apart that their outputs make this many tokens per second, or fewer where that
    would take less than `seconds_least`.
    """
    tokens = sum(request.max_tokens for request in asked)
    scale = max(tokens / tokens_per_second, seconds_least) / asked[-1].at_s
    return tuple(replace(request, at_s=request.at_s * scale) for request in asked)


def with_haste(asked: Sequence[Request]) -> tuple[Request, ...]:
    """The same requests, every third of a client that gives up soon."""
    return tuple(replace(request, is_hasty=number % 3 == 0) for number, request in enumerate(asked))


def begun_now(asked: Sequence[Request]) -> tuple[Request, ...]:
    """The same requests as far apart, the first of them at once."""
    return tuple(replace(request, at_s=request.at_s - asked[0].at_s) for request in asked)


def losses(seed: int) -> tuple[Loss, ...]:
    """Each role once without any process, and attention with one, in a drawn order for drawn times."""
    source = random.Random(f"losses {seed}")  # noqa: S311  repeatable is what it must be
    cases: list[tuple[Role, int]] = [*((role, 0) for role in ROLES), ("attention", 1)]
    return tuple(
        Loss(role, left, source.uniform(*_AWAY_S)) for role, left in source.sample(cases, len(cases))
    )


def transport(seed: int) -> Transport:
    """Lanes take sockets of this machine and gRPC in turn; only the latter can be cut (see `network`)."""
    return "grpc" if seed % 2 else "local"


def faults(seed: int, kinds: Sequence[Kind] = KINDS) -> Iterator[Fault]:
    """Endless. Each round holds every role and kind once, in a drawn order. Every other fault strikes at a
    named point, the first one does; so does every other one of a role and kind.
    """
    source = random.Random(f"faults {seed}")  # noqa: S311  repeatable is what it must be
    can_cut = transport(seed) == "grpc"
    pairs = itertools.product(ROLES, kinds)
    possible = [pair for pair in pairs if can_cut or pair[1] != "cut" or pair[0] == "gateway"]
    first = source.sample(possible, (len(possible) + 1) // 2)
    second = [pair for pair in possible if pair not in first]
    is_at_point = True
    while True:
        for role, kind in _taking_turns(source, first, second):
            point = source.choice(POINTS[role]) if is_at_point else None
            is_at_point = not is_at_point
            lasts_s = None if source.random() < 0.5 else source.uniform(0.2, 0.6)
            yield Fault(role, kind, point, source.randrange(1000), lasts_s if kind != "kill" else None)
        if len(first) == len(second):  # else the turns are the others' by themselves
            first, second = second, first


def _taking_turns(
    source: random.Random, first: Sequence[tuple[Role, Kind]], second: Sequence[tuple[Role, Kind]]
) -> Iterator[tuple[Role, Kind]]:
    """One of the first, one of the second, and so on, each in a drawn order; `second` may have one less."""
    orders = (source.sample(pairs, len(pairs)) for pairs in (first, second))
    return (pair for turn in itertools.zip_longest(*orders) for pair in turn if pair is not None)


def _between(source: random.Random, least: int, most: int) -> int:
    """Short ones are more frequent: evenly spread in their logarithm."""
    return int(least * (most / least) ** source.random())


def _tokens(source: random.Random, count: int) -> tuple[int, ...]:
    return tuple(source.randrange(VOCABULARY_SIZE - 1) for _ in range(count))


def _sampling(source: random.Random, number: int) -> dict[str, Any]:
    if number % 2 == 0:
        return {"temperature": 0.0, "seed": 0}
    truncation: dict[str, Any] = source.choice(({}, {"top_k": 40}, {"top_p": 0.95}))
    return {"temperature": source.uniform(0.5, 1.2), "seed": source.getrandbits(32), **truncation}
