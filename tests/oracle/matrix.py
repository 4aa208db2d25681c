"""What parts of the full oracle share: a covering choice of combinations, and the account of a comparison."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.cluster_harness import Output
from tests.models import NEAR_TIE

NEAR_TIES_MOST = 0.02
"""A part with more positions that float32 cannot decide would prove nothing."""

LOGPROB_TOLERANCE = 1e-4
"""Natural log-probabilities computed in float32, the real model's included, from transformers' in float64.

Transformers in float32 is no yardstick for them: at tokens of log-probability -45 it is itself as far away.
"""


@dataclass
class Tally:
    """What a comparison found. `positions` are those of the reference; `compared` excludes near-ties."""

    cases: int = 0
    positions: int = 0
    compared: int = 0
    near_ties: int = 0
    largest_difference: float | None = None
    """Between log-probabilities; None where none were compared."""
    reference_difference: float | None = None
    """The largest one of the reference in float32 from itself in float64, for comparison; None: not known."""
    problems: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Take in another comparison's account."""
        self.cases += other.cases
        self.positions += other.positions
        self.compared += other.compared
        self.near_ties += other.near_ties
        if other.largest_difference is not None:
            self.differ(other.largest_difference)
        if other.reference_difference is not None:
            self.note_reference(other.reference_difference)
        self.problems += other.problems

    def differ(self, difference: float) -> None:
        """A log-probability was found this far from the reference's."""
        wide = math.inf if math.isnan(difference) else difference
        self.largest_difference = max(wide, self.largest_difference or 0.0)

    def note_reference(self, difference: float) -> None:
        """So far is a log-probability of the float32 reference from that of the float64 one."""
        self.reference_difference = max(difference, self.reference_difference or 0.0)

    def demand(self, holds: bool, problem: str) -> None:
        """Note a problem unless the claim holds."""
        if not holds:
            self.problems.append(problem)

    def verdict(self) -> list[str]:
        """Everything that makes this account a failure; empty when it passes."""
        found = list(self.problems)
        if self.near_ties > NEAR_TIES_MOST * self.positions:
            found.append(f"{self.near_ties} near-ties in {self.positions} positions")
        if self.largest_difference is not None and not self.largest_difference <= LOGPROB_TOLERANCE:
            found.append(f"log-probabilities differ by {self.largest_difference:.2e}")
        if not self.compared:
            found.append("nothing was compared")
        return found


@dataclass(frozen=True)
class Expected:
    """A free-running reference: per token its id, its lead on the second best, its log-probability.

    Tokens and leads are computed in float32, `logprobs` in float64 where the reference is transformers;
    `rounded_logprobs` are the same in float32.
    """

    tokens: Sequence[int]
    gaps: Sequence[float]
    logprobs: Sequence[float] = ()
    rounded_logprobs: Sequence[float] = ()

    def beginning(self, count: int) -> Expected:
        """The first `count` tokens of it."""
        logprobs = (self.logprobs[:count], self.rounded_logprobs[:count])
        return Expected(self.tokens[:count], self.gaps[:count], *logprobs)

    def sharp_length(self) -> int:
        """Tokens before the first near-tie."""
        return next((i for i, gap in enumerate(self.gaps) if gap < NEAR_TIE), len(self.gaps))


def compare(name: str, output: Output, expected: Expected) -> Tally:
    """Account for one output: equal to the reference up to the first near-tie, log-probabilities included."""
    sharp = expected.sharp_length()
    tally = Tally(1, len(expected.tokens), sharp, sum(gap < NEAR_TIE for gap in expected.gaps))
    tally.demand(output.failure is None, f"{name}: failed with {output.failure}")
    tally.demand(
        len(output.token_ids) == len(expected.tokens),
        f"{name}: {len(output.token_ids)} of {len(expected.tokens)} tokens",
    )
    pairs = zip(output.token_ids[:sharp], expected.tokens, strict=False)
    wrong = next((index for index, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
    if wrong is not None:
        tally.problems.append(
            f"{name}: token {wrong} is {output.token_ids[wrong]}, the reference has {expected.tokens[wrong]}"
            f" with a lead of {expected.gaps[wrong]:.2e}"
        )
    elif expected.logprobs:
        for ours, theirs in zip(output.logprobs[:sharp], expected.logprobs, strict=False):
            tally.differ(math.inf if ours is None else abs(ours - theirs))
        for rounded, exact in zip(expected.rounded_logprobs[:sharp], expected.logprobs, strict=False):
            tally.note_reference(abs(rounded - exact))
    return tally


Pair = tuple[tuple[int, int], tuple[int, int]]
"""Two (factor, value) that stand in one combination."""


def covering(*factors: Sequence[object]) -> list[tuple[int, ...]]:
    """Combinations (as indices into `factors`) in which every two values of two factors meet.

    Greedy: each combination starts from a pair that has not met and takes for every other factor the
    value that meets most new ones (the idea of AETG, Cohen et al., IEEE TSE 23(7), 1997, without its dice).
    """
    open_pairs = {
        ((i, a), (j, b))
        for i, j in itertools.combinations(range(len(factors)), 2)
        for a in range(len(factors[i]))
        for b in range(len(factors[j]))
    }
    found: list[tuple[int, ...]] = []
    while open_pairs:
        chosen = dict(min(open_pairs))
        for index, factor in enumerate(factors):
            if index not in chosen:
                newly = [len(_pairs(chosen | {index: value}) & open_pairs) for value in range(len(factor))]
                chosen[index] = newly.index(max(newly))
        open_pairs -= _pairs(chosen)
        found.append(tuple(chosen[index] for index in range(len(factors))))
    return found


def _pairs(chosen: dict[int, int]) -> set[Pair]:
    return set(itertools.combinations(sorted(chosen.items()), 2))
