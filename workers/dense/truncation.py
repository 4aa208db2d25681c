"""top_k, top_p and min_p: which tokens stay, and how far each is from its fate being another.

Distances are in logits: the least change of all scores that could turn "stays" into "leaves" or back.
They let a comparison of samplers say "too close to call" instead of failing on rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.sampling import SamplingParameters

Scores = NDArray[np.float64]

SLACK = 1e-2
"""Tokens this close under a boundary are still looked at; those further down cannot be near-ties."""

NUCLEUS_GUESSES = (512, 4096)
"""Numbers of best tokens tried for top_p before all likely ones are sorted."""


@dataclass(frozen=True, slots=True, eq=False)
class Truncated:
    """Candidates in descending order of score: all that stay, and those that leave narrowly."""

    token_ids: NDArray[np.int64]
    scores: Scores
    kept: NDArray[np.bool_]
    distances: Scores


def truncates(parameters: SamplingParameters, vocabulary_size: int) -> bool:
    """Whether any of the three filters is on."""
    return 0 < parameters.top_k < vocabulary_size or parameters.top_p < 1.0 or parameters.min_p > 0.0


def truncate(scores: Scores, parameters: SamplingParameters) -> Truncated:
    """Apply top_k, then top_p over what it left renormalised, then min_p, to tempered `scores` [V].

    Ties with the k-th best stay, as in transformers; the best token always stays.
    """
    token_ids = np.flatnonzero((scores >= _floor(scores, parameters)) & (scores > -np.inf))
    token_ids = token_ids[np.argsort(-scores[token_ids], kind="stable")]
    ordered = scores[token_ids]
    kept = np.ones(len(ordered), dtype=np.bool_)
    stays = np.full(len(ordered), np.inf)  # distance of those kept: the nearest boundary
    leaves = np.zeros(len(ordered))  # distance of those dropped: the furthest boundary to cross
    for passed, distance in _filters(ordered, _log_sum(scores), parameters):
        kept &= passed
        np.minimum(stays, np.where(passed, distance, np.inf), out=stays)
        np.maximum(leaves, np.where(passed, 0.0, distance), out=leaves)
    return Truncated(token_ids, ordered, kept, np.where(kept, stays, leaves))


def _filters(
    ordered: Scores, log_sum: float, parameters: SamplingParameters
) -> list[tuple[NDArray[np.bool_], Scores]]:
    """(passed, distance) of each filter that is on, over all candidates; `log_sum` is that of all scores."""
    filters = []
    left = len(ordered)
    if 0 < parameters.top_k < len(ordered):
        passed, distance = _best_k(ordered, parameters.top_k)
        left = int(passed.sum())
        filters.append((passed, distance))
    if parameters.top_p < 1.0:
        # top_p sees only the prefix that top_k left; what top_k dropped is not its to judge.
        log_mass = _log_sum(ordered[:left]) if parameters.top_k else log_sum
        passed, distance = _nucleus(ordered[:left], log_mass, parameters.top_p)
        rest = len(ordered) - left
        filters.append((np.pad(passed, (0, rest)), np.pad(distance, (0, rest))))
    if parameters.min_p > 0.0:
        above = ordered - ordered[0] - math.log(parameters.min_p)
        passed, distance = above >= 0.0, np.abs(above)
        distance[0] = np.inf  # the boundary moves with the best token
        filters.append((passed, distance))
    return filters


def _floor(scores: Scores, parameters: SamplingParameters) -> float:
    """A score under which no token stays, nor is within half of `SLACK` of staying.

    The mass of what lies under it still counts for top_p: with top_k on, nothing top_k keeps lies there.
    """
    floor = -math.inf
    best, size = float(scores.max()), len(scores)
    if 0 < parameters.top_k < size:
        floor = max(floor, float(np.partition(scores, size - parameters.top_k)[size - parameters.top_k]))
    elif parameters.top_p < 1.0 and not parameters.top_k:
        floor = max(floor, _nucleus_floor(scores, parameters.top_p))
    if parameters.min_p > 0.0 and not (parameters.top_k and parameters.top_p < 1.0):
        floor = max(floor, best + math.log(parameters.min_p))
    return min(floor, best) - SLACK


def _nucleus_floor(scores: Scores, top_p: float) -> float:
    """A score under which every token is beyond the nucleus; selecting is cheaper than sorting all."""
    log_sum, size = _log_sum(scores), len(scores)
    for count in NUCLEUS_GUESSES:
        if count < size:
            bound = float(np.partition(scores, size - count)[size - count])
            mass = np.exp(scores[scores >= bound] - log_sum).sum()
            if float(_log_odds(mass) - _log_odds(np.array(top_p))) > SLACK:
                return bound
    # Tokens less likely than (1 - top_p) / V sum to less than 1 - top_p.
    return log_sum + math.log((1.0 - top_p) / size)


def _log_sum(scores: Scores) -> float:
    """ln sum exp of scores of which one at least is finite."""
    best = float(scores.max())
    return best + math.log(float(np.exp(scores - best).sum()))


def _best_k(ordered: Scores, count: int) -> tuple[NDArray[np.bool_], Scores]:
    """The best `count` and their ties; each side's distance is to the other side's nearest."""
    passed = ordered >= ordered[count - 1]
    return passed, np.where(passed, ordered - ordered[count], ordered[count - 1] - ordered)


def _nucleus(ordered: Scores, log_mass: float, top_p: float) -> tuple[NDArray[np.bool_], Scores]:
    """Tokens before which less than `top_p` of the mass exp(log_mass) lies; the first always passes.

    A change of all scores by d moves the odds of any set by at most exp(2 d), so the rank j crosses the
    boundary at d = odds[j]; and a token takes another's rank when their scores meet. A token's fate
    turns at the cheapest rank j between it and the boundary: min over j of max(odds[j], |s_i - s_j|).
    """
    mass = np.exp(ordered - log_mass)
    before = np.concatenate(([0.0], np.cumsum(mass)[:-1]))
    passed = before < top_p
    odds = np.abs(_log_odds(before) - _log_odds(np.array(top_p))) / 2
    count = int(passed.sum())
    # Each side ends with the first rank of the other side, where the boundary is crossed already.
    inside, outside = slice(0, count + 1), slice(count - 1, len(ordered))
    leaving = _cheapest_rank(ordered[inside], np.append(odds[:count], 0.0)[: len(ordered)], ordered[:count])
    coming = _cheapest_rank(
        -ordered[outside][::-1], np.append(odds[count:][::-1], 0.0), -ordered[count:][::-1]
    )
    return passed, np.concatenate((leaving, coming[::-1]))


def _cheapest_rank(ranks: Scores, odds: Scores, scores: Scores) -> Scores:
    """For each of `scores`: min over j of max(odds[j], score - ranks[j]).

    `ranks` and `odds` both fall with j, so one term falls and the other grows: the minimum is where
    they cross, found by bisection.
    """
    crossing = np.searchsorted(-(ranks + odds), -scores, side="left")  # first j with score - rank >= odds
    after = np.minimum(crossing, len(ranks) - 1)
    at_crossing = np.where(crossing < len(ranks), scores - ranks[after], np.inf)
    earlier = np.where(crossing > 0, odds[np.maximum(crossing - 1, 0)], np.inf)
    return np.minimum(at_crossing, earlier)


def _log_odds(share: Scores) -> Scores:
    """ln(p / (1 - p)), infinite at the ends; cumulative sums may pass 1 by rounding."""
    share = np.clip(share, 0.0, 1.0)
    with np.errstate(divide="ignore"):
        return np.log(share) - np.log1p(-share)
