"""What seeds of `anabranch chaos` together say: counts, percentiles, and which targets were met."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import typer

from anabranch.cli.chaos import schedule
from anabranch.cli.chaos.command import chaos
from anabranch.cli.chaos.run import Course, Settings, Tell
from anabranch.cli.chaos.schedule import Kind, Role
from anabranch.cli.chaos.strike import Struck
from anabranch.cli.chaos.targets import percentile
from anabranch.cli.chaos.verdict import summary
from cluster.perfmodel import Line


def _reported(role: Role, kind: Kind, *extra_s: float, **told: Any) -> dict[str, Any]:
    """A fault at a point as a report names it, each stream's next token a second after its extra silence."""
    fault = {"role": role, "kind": kind, "point": "append-apply", "extra_s": list(extra_s)}
    again = {"recompute_s": 0.0, "prompt_tokens_recomputed": 0, "tokens_recomputed": 0}
    return {**fault, "next_token_s": [seconds + 1 for seconds in extra_s], **again, **told}


def _seed(*faults: dict[str, Any], load_share: float = 0.2) -> dict[str, Any]:
    """A seed without a failure, as a report names it."""
    nothing: dict[str, Any] = {"near_ties": [], "failures": [], "losses": []}
    return {
        **nothing,
        "requests": 2,
        "kinds": schedule.KINDS,
        "load_share": load_share,
        "faults": list(faults),
    }


def _met(seeds: Sequence[dict[str, Any]], name: str) -> bool | None:
    """What was made of the only target that is so called."""
    (met,) = [target["met"] for target in summary(seeds)["targets"] if name in target["target"]]
    assert met is None or isinstance(met, bool)
    return met


def _every_way(**told: Any) -> list[dict[str, Any]]:
    return [
        _reported(role, kind, 0.5, **told) for role, kind in itertools.product(schedule.ROLES, schedule.KINDS)
    ]


def test_a_summary_counts_and_ranks() -> None:
    """Faults per role and kind, and nearest-rank percentiles over the streams of all seeds."""
    whole = summary([_seed(_reported("dense", "kill", float(i))) for i in range(20)])
    assert whole["faults"] == {"dense kill": 20}
    assert whole["faults_at_points"] == {"append-apply": 20}
    assert whole["extra_s"]["dense"] == {"streams": 20, "p50": 9.0, "p95": 18.0}
    assert whole["next_token_s"]["dense kill"] == {"streams": 20, "p50": 10.0, "p95": 19.0}
    assert percentile([], 0.5) is None


def test_a_call_that_meets_every_target_says_so() -> None:
    """Twenty seeds of light load, each of which lost every role in every way at a point, for a short time."""
    assert all(target["met"] is True for target in summary([_seed(*_every_way())] * 20)["targets"])


def test_faults_are_counted_over_twenty_seeds_at_least() -> None:
    """Each role and kind five times and half at points, of those kinds that were asked for; fewer seeds do
    not tell.
    """
    often, rare = [_seed(*_every_way())] * 5, [_seed(_reported("gateway", "kill"))]
    assert _met([*often, *rare * 15], "each role and kind") is True
    assert _met([*often[1:], *rare * 16], "each role and kind") is False
    assert _met(often, "each role and kind") is None
    elsewhere = _seed(*_every_way(point=None))
    assert _met([_seed(*_every_way()), elsewhere] * 10, "named points") is True
    assert _met([*[_seed(*_every_way()), elsewhere] * 10, elsewhere], "named points") is False
    assert _met([elsewhere], "named points") is None


@pytest.mark.parametrize(("share", "met"), [(0.3, True), (0.31, False)])
def test_the_load_of_every_seed_is_judged(share: float, *, met: bool) -> None:
    """One whose load was too high is enough to miss it."""
    assert _met([_seed(), _seed(load_share=share)], "load") is met


@pytest.mark.parametrize(("role", "most_s"), [("gateway", 1.0), ("dense", 1.5), ("attention", 2.0)])
def test_a_lost_role_is_judged_by_the_95th_percentile(role: Role, most_s: float) -> None:
    """Of twenty streams one may wait longer, of fewer nothing is said; what the model predicts of an
    attention worker's recompute is allowed beside.
    """
    one = [_reported(role, "kill", *[most_s] * 19, 60.0)]
    two = [_reported(role, "kill", *[most_s] * 18, 60.0, most_s + 0.1)]
    assert _met([_seed(*one)], f"{role} lost: extra silence") is True
    assert _met([_seed(*two)], f"{role} lost: extra silence") is False
    assert _met([_seed(_reported(role, "kill", 60.0))], f"{role} lost: extra silence") is None
    assert _met([_seed({**two[0], "recompute_s": 0.2})], f"{role} lost: extra silence") is True


def test_nothing_is_computed_again_for_a_dense_worker_or_gateway() -> None:
    """Of a prompt, or at all; an attention worker's loss is not asked."""
    lost = {"prompt_tokens_recomputed": 0, "tokens_recomputed": 9}
    assert _met([_seed(_reported("gateway", "cut", **lost))], "gateway lost: no tokens") is False
    assert _met([_seed(_reported("dense", "cut", **lost))], "dense lost: no prompt tokens") is True
    lost = {"prompt_tokens_recomputed": 1, "tokens_recomputed": 1}
    assert _met([_seed(_reported("dense", "cut", **lost))], "dense lost: no prompt tokens") is False
    assert _met([_seed(_reported("attention", "cut", **lost))], "dense lost: no prompt tokens") is None


@pytest.mark.parametrize(("share", "status", "said"), [(0.3, 0, "met"), (0.5, 1, "missed")])
def test_a_missed_target_is_the_status_of_the_command(
    share: float, status: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though nothing failed. A line says which one it was, and of others that too little was seen."""

    async def ran(settings: Settings, _folder: Path, _tell: Tell) -> Course:
        struck = Struck(next(schedule.faults(0)), "gateway-0", 0.0, 1, True, True, 1.0, Line(0.0, 0.0))
        return Course(settings, struck=[struck], load_share=share)

    monkeypatch.setattr("anabranch.cli.chaos.run.run", ran)
    with pytest.raises(typer.Exit) as exit_:
        chaos()
    assert exit_.value.exit_code == status
    lines = capsys.readouterr().out
    assert f"target load at most 30% of capacity: {said} (" in lines
    assert "target half of the faults at named points: not judged, too few (" in lines
