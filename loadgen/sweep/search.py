"""Draws settings worth trying from a space: throughput over settings is irregular, with sharp peaks, so it is
searched and not extrapolated. The one translator of Optuna.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cluster.errors import ConfigError
from loadgen.sweep.load import Course
from loadgen.sweep.space import Choice, Dimension

try:
    import optuna
except ImportError as error:
    raise ConfigError("--search needs Optuna: pip install 'anabranch[search]'") from error

optuna.logging.set_verbosity(optuna.logging.WARNING)


def search(
    dimensions: Sequence[Dimension],
    measured: Callable[[Mapping[str, Any]], Course],
    *,
    trials: int,
    seed: int,
    goes_on: Callable[[], bool],
) -> list[Course]:
    """The courses of `trials` drawn settings, by a tree-structured Parzen estimator (Bergstra, 2011) that
    maximises their worth. The same seed draws the same where the same comes of it. Settings that are drawn
    again are not measured again; settings that cannot be are worth 0.
    """
    sampler = optuna.samplers.TPESampler(seed=seed)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    distributions = {dimension.key: _distribution(dimension) for dimension in dimensions}
    known: dict[tuple[Any, ...], Course] = {}
    for _ in range(trials):
        trial = study.ask(distributions)
        drawn = tuple(trial.params.values())
        if drawn not in known:
            course = measured(trial.params)
            if not goes_on():
                break
            known[drawn] = course
        study.tell(trial, known[drawn].worth)
    return list(known.values())


def _distribution(dimension: Dimension) -> optuna.distributions.BaseDistribution:
    if isinstance(dimension, Choice):
        return optuna.distributions.CategoricalDistribution(dimension.values)
    if dimension.is_whole:
        return optuna.distributions.IntDistribution(
            int(dimension.low), int(dimension.high), log=dimension.is_log
        )
    return optuna.distributions.FloatDistribution(dimension.low, dimension.high, log=dimension.is_log)
