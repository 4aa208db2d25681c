"""Arrival processes are what they are called."""

import numpy as np
import pytest

from cluster.errors import InvalidRequest
from loadgen.arrivals import Arrivals, Constant, Gamma, Limit, Ramp, Replay, Weibull, poisson, spread

COUNT = 20_000
RATE = 5.0


def _gaps(arrivals: Arrivals, seed: int = 1) -> np.ndarray:
    return np.diff(arrivals.times_s(np.random.default_rng(seed), Limit(requests=COUNT)))


@pytest.mark.parametrize("cv", [0.3, 1.0, 2.5])
def test_gaps_have_the_mean_and_cv_asked_for(cv: float) -> None:
    """Mean within four standard errors of 1 / rate, coefficient of variation within 6 %."""
    gaps = _gaps(Gamma(RATE, cv))
    assert gaps.mean() == pytest.approx(1 / RATE, abs=4 * cv / RATE / COUNT**0.5)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.06)


def _kolmogorov_smirnov(samples: np.ndarray, cumulative: np.ndarray) -> float:
    """sqrt(n) times the largest distance between the empirical distribution and the other one; `cumulative`
    is the latter at the sorted samples.
    """
    steps = np.arange(len(samples) + 1) / len(samples)
    return float(np.maximum(steps[1:] - cumulative, cumulative - steps[:-1]).max() * len(samples) ** 0.5)


def test_poisson_gaps_are_exponential() -> None:
    """Kolmogorov-Smirnov at the 0.1 % level (1.95); and a tail that is cut at four means would be found."""
    gaps = np.sort(_gaps(poisson(RATE)))
    assert _kolmogorov_smirnov(gaps, -np.expm1(-RATE * gaps)) < 1.95
    cut = np.minimum(gaps, 4 / RATE)
    assert _kolmogorov_smirnov(cut, -np.expm1(-RATE * cut)) > 1.95


def test_poisson_arrivals_do_not_gather_at_seconds() -> None:
    """The parts of a second at which requests are due are uniform: no edge has more than its share."""
    times = poisson(RATE).times_s(np.random.default_rng(2), Limit(requests=COUNT))
    parts = np.sort(times % 1.0)
    assert _kolmogorov_smirnov(parts, parts) < 1.95


@pytest.mark.parametrize(
    "arrivals", [*(Gamma(RATE, cv) for cv in (0.5, 1.0, 4.0)), Weibull(RATE, 0.4)], ids=str
)
def test_a_duration_holds_as_many_arrivals_as_rate_times_duration(arrivals: Arrivals) -> None:
    """Over 400 schedules of 20 s the mean count is the asked one, within four standard errors: nothing is cut
    from gaps, and the first one is the rest of a gap, without which cv 4 would give 7 more.
    """
    counts = [
        len(arrivals.times_s(np.random.default_rng(seed), Limit(duration_s=20.0))) for seed in range(400)
    ]
    error = np.std(counts) / len(counts) ** 0.5
    assert np.mean(counts) == pytest.approx(RATE * 20, abs=4 * error)


def test_constant_arrivals_are_equally_far_apart() -> None:
    """Every gap is the same, and a duration is not overstepped."""
    times = Constant(4.0).times_s(np.random.default_rng(0), Limit(duration_s=3.0))
    assert times.tolist() == [index / 4 for index in range(12)]


@pytest.mark.parametrize(("rate", "rate_end"), [(1.0, 9.0), (9.0, 1.0), (5.0, 5.0)])
def test_a_ramp_has_its_rates_at_both_ends(rate: float, rate_end: float) -> None:
    """The first and last fifth hold what the line asks there, within four standard deviations."""
    duration = 2000.0
    times = Ramp(rate, rate_end, duration).times_s(np.random.default_rng(3), Limit(duration_s=duration))
    for low, high in ((0.0, 0.2), (0.8, 1.0)):
        middle = (low + high) / 2
        asked = (rate + (rate_end - rate) * middle) * duration / 5
        found = ((times >= low * duration) & (times < high * duration)).sum()
        assert found == pytest.approx(asked, abs=4 * asked**0.5)


@pytest.mark.parametrize("arrivals", [poisson(3.0), Gamma(3.0, 5.0), Ramp(1.0, 4.0, 60.0)], ids=str)
def test_the_same_seed_gives_the_same_schedule(arrivals: Arrivals) -> None:
    """Bit for bit; another seed gives another one."""
    first, again, other = (
        arrivals.times_s(np.random.default_rng(seed), Limit(duration_s=60.0)) for seed in (7, 7, 8)
    )
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()
    assert (np.diff(first) >= 0).all()


def test_a_replay_is_the_trace() -> None:
    """Moments are those recorded, from the first one on, at the speed asked for, up to the limit."""
    replay = Replay((10.0, 10.5, 12.0, 20.0), speed=2.0)
    times = replay.times_s(np.random.default_rng(0), Limit(duration_s=4.0))
    assert times.tolist() == [0.0, 0.25, 1.0]


def test_rounded_stamps_are_spread_up_to_the_next() -> None:
    """Each moment stays between its stamp and the following one; stamps that are all different stay."""
    stamps = np.repeat([0.0, 3.0, 6.0], 500)
    moved = spread(stamps, np.random.default_rng(4))
    assert ((moved >= stamps) & (moved < stamps + 3)).all()
    assert len(np.unique(moved)) == len(moved)
    different = np.array([0.0, 1.0, 5.0])
    assert spread(different, np.random.default_rng(4)).tolist() == different.tolist()


def test_what_cannot_be_scheduled_is_refused() -> None:
    """A schedule without an end, and rates and variations that are none."""
    with pytest.raises(InvalidRequest, match="how many requests"):
        Limit()
    with pytest.raises(InvalidRequest, match="rate of arrivals is 0"):
        poisson(0.0)
    with pytest.raises(InvalidRequest, match="cv of arrivals is -1"):
        Gamma(1.0, -1.0)
