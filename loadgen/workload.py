"""What is asked: rows of lengths, made to fit the model, put together to sessions. Pure.

    rows (drawn, or read from a trace) --scaled, clipped--> rows --paired with moments--> sessions of turns

Whatever changes a row says so: the lines go into the report.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.errors import InvalidRequest
from loadgen.lengths import Lengths


@dataclass(frozen=True, slots=True)
class Row:
    """Lengths of one request, in tokens.

    `blocks` name pieces of the prompt, `block_tokens` long each but for the last one; pieces of one name have
    the same contents, so that prompts which begin with the same names share a prefix. Without names a prompt
    is like no other.
    """

    prompt_tokens: int
    output_tokens: int
    at_s: float | None = None
    """When the trace has it, in seconds since the trace began."""
    tenant: str = ""
    blocks: tuple[int, ...] = ()
    block_tokens: int = 0


class Origin(IntEnum):
    """What a segment's number counts."""

    OWN = 0
    """Requests: contents that no other request has."""

    BLOCK = 1
    """Blocks of a trace."""

    ANSWER = 2
    """Answers that nobody has seen, in a simulation."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a prompt: the same origin and number, the same contents."""

    origin: Origin
    number: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of a session. Its prompt is all before it, answers included, and then `segments`."""

    segments: tuple[Segment, ...]
    output_tokens: int
    think_s: float = 0.0
    """Pause before it, after the answer it follows."""

    @property
    def new_tokens(self) -> int:
        """What it adds to the prompt."""
        return sum(segment.tokens for segment in self.segments)


@dataclass(frozen=True, slots=True)
class Session:
    """A conversation, or one request: `at_s` is when it begins; None: when a user is free for it."""

    index: int
    turns: tuple[Turn, ...]
    at_s: float | None = None
    tenant: str = ""


def stream(seed: int, name: str) -> np.random.Generator:
    """A generator of its own for each purpose: how many numbers one takes does not change the others."""
    return np.random.default_rng([seed, *name.encode()])


def drawn(prompts: Lengths, outputs: Lengths, seed: int, count: int) -> list[Row]:
    """Rows of independent lengths."""
    pairs = zip(
        prompts.draw(stream(seed, "prompts"), count).tolist(),
        outputs.draw(stream(seed, "outputs"), count).tolist(),
        strict=True,
    )
    return [Row(prompt, output) for prompt, output in pairs]


def scaled(rows: Sequence[Row], factor: float) -> list[Row]:
    """All lengths, those of blocks included, times `factor`; at least 1."""
    if not factor > 0:
        raise InvalidRequest(f"lengths cannot be scaled by {factor:g}")
    return [
        replace(
            row,
            prompt_tokens=max(1, round(row.prompt_tokens * factor)),
            output_tokens=max(1, round(row.output_tokens * factor)),
            block_tokens=max(1, round(row.block_tokens * factor)) if row.blocks else 0,
        )
        for row in rows
    ]


def clipped(rows: Sequence[Row], context: int) -> tuple[list[Row], str]:
    """Rows that fit a context, and a line that says what became shorter; empty where nothing did.

    An output is cut to half of the context, a prompt to what the output leaves. Prefixes stay shared, since
    prompts lose their ends.
    """
    if context < 2:
        raise InvalidRequest(f"a context of {context} tokens has no room for a prompt and an output")
    fitting = []
    for row in rows:
        output = min(row.output_tokens, context // 2)
        prompt = min(row.prompt_tokens, context - output)
        fitting.append(replace(row, prompt_tokens=prompt, output_tokens=output))
    shorter = sum(before != after for before, after in zip(rows, fitting, strict=True))
    if not shorter:
        return fitting, ""
    changes = ", ".join(
        f"mean {name} {np.mean([getattr(row, key) for row in rows]):,.1f} -> "
        f"{np.mean([getattr(row, key) for row in fitting]):,.1f}"
        for name, key in (("prompt", "prompt_tokens"), ("output", "output_tokens"))
    )
    share = f"{shorter:,} of {len(rows):,} requests"
    return fitting, f"clipped to the context of {context:,} tokens: {share}, {changes}"


def repeated(rows: Sequence[Row], count: int) -> tuple[list[Row], str]:
    """`count` rows, from the beginning again where there are fewer; and a line that says so."""
    if not rows:
        raise InvalidRequest("the workload has no requests")
    whole = list(itertools.islice(itertools.cycle(rows), count))
    again = f"its {len(rows):,} requests are repeated to make {count:,}" if count > len(rows) else ""
    return whole, again


def sessions(
    rows: Sequence[Row],
    times_s: NDArray[np.float64] | None,
    *,
    turns: int,
    think_s: float,
    context: int,
    seed: int,
) -> tuple[list[Session], str]:
    """Sessions of `turns` consecutive rows each, begun at `times_s` or when a user is free; and a line that
    says which turns had to go, since a conversation would have outgrown the context.

    Think times are exponential with mean `think_s`: before every turn but the first of a session that begins
    at a given moment.
    """
    if turns > 1 and any(row.blocks for row in rows):
        raise InvalidRequest("these prompts carry their conversations already; leave --turns out")
    pauses = stream(seed, "think").exponential(think_s, len(rows)) if think_s else np.zeros(len(rows))
    found: list[Session] = []
    dropped = 0
    for index in range(len(rows) // turns):
        first = index * turns
        chosen = _fitting(rows[first : first + turns], context)
        dropped += turns - len(chosen)
        begins_s = None if times_s is None else float(times_s[index])
        made = []
        for place, row in enumerate(chosen, first):
            waits = begins_s is None or place > first
            made.append(
                Turn(_segments(row, place), row.output_tokens, float(pauses[place]) if waits else 0.0)
            )
        found.append(Session(index, tuple(made), begins_s, rows[first].tenant))
    words = f"{dropped:,} turns left out, with which sessions would outgrow the context" if dropped else ""
    return found, words


def counted(plan: Sequence[Session]) -> int:
    """Requests of sessions."""
    return sum(len(session.turns) for session in plan)


def described(rows: Sequence[Row]) -> dict[str, Any]:
    """What was planned, in one glance: requests, mean lengths, and the share of prompts' blocks an infinite
    cache would have.
    """
    seen: set[int] = set()
    known = whole = 0
    for row in rows:
        known += sum(1 for _ in itertools.takewhile(seen.__contains__, row.blocks))
        whole += len(row.blocks)
        seen.update(row.blocks)
    return {
        "requests": len(rows),
        "mean_prompt_tokens": float(np.mean([row.prompt_tokens for row in rows])),
        "mean_output_tokens": float(np.mean([row.output_tokens for row in rows])),
        "ideal_prefix_share": known / whole if whole else 0.0,
    }


def _segments(row: Row, place: int) -> tuple[Segment, ...]:
    """A row's prompt: its blocks, and contents of its own for what they do not cover."""
    made, left = [], row.prompt_tokens
    for block in row.blocks:
        tokens = min(row.block_tokens, left)
        if tokens:
            made.append(Segment(Origin.BLOCK, block, tokens))
        left -= tokens
    if left:
        made.append(Segment(Origin.OWN, place, left))
    return tuple(made)


def _fitting(rows: Sequence[Row], context: int) -> Sequence[Row]:
    """The leading rows that fit one context together, at least the first."""
    whole = 0
    for count, row in enumerate(rows):
        whole += row.prompt_tokens + row.output_tokens
        if count and whole > context:
            return rows[:count]
    return rows
