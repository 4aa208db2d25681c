"""Keeping the time of other devices: what is waited for, what is counted, and what is divided again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, cast

import pytest

from anabranch.cli import emulating
from anabranch.events import Timings
from cluster import config as configuration
from cluster.emulation import EmulatedTimes, Padding
from cluster.errors import ConfigError, InvalidRequest
from loadgen.dilation import dilated, undilated
from loadgen.records import Record
from loadgen.scenario import Scenario, plan
from loadgen.simulation import models
from loadgen.simulation.steps import StepModel, Switches
from loadgen.simulation.work import Work
from tests.loadgen.simulated import shape
from tests.loadgen.test_records import WHOLE
from workers.dense import emulated_attention
from workers.dense.emulated_attention import DensePace
from workers.dense.remote_attention import AttentionTimes


class Moments:
    """A clock that sleeping moves."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        """The moment."""
        return self.now_s

    def sleep(self, seconds: float) -> None:
        """Move on."""
        self.now_s += seconds


def times(folder: Path, text: str = "h100x2,h20x1", dilation: float = 40.0) -> EmulatedTimes:
    """Of LLaMA3-70B on these devices, for a model of two layers."""
    overrides = emulating.overrides(emulating.cluster_of(text, "llama3-70b"), dilation, folder)
    emulation = configuration.load(None, overrides).emulation
    assert emulation is not None
    return EmulatedTimes(emulation, 2)


def test_padding_waits_for_what_is_left_and_counts_what_is_late() -> None:
    """Until the moment that is due; a call that took longer by itself is late, and waits for nothing; not one
    whose lateness something hides.
    """
    clock = Moments()
    padding = Padding(clock, clock.sleep)
    padding.until(100.5)
    assert clock.now_s == 100.5
    padding.until(100.2)
    assert (clock.now_s, padding.calls, padding.late) == (100.5, 2, 1)
    padding.until(100.4, grace_s=0.2)
    assert (padding.calls, padding.late) == (3, 1)


def test_a_step_takes_what_the_simulator_says(tmp_path: Path) -> None:
    """Dense work, attention and lane of a decoding step, two layers of it, are the performance model's."""
    emulated = times(tmp_path)
    work = Work(400, 0, [400_000], [], [400], [400])
    whole = Switches(staggers=False)
    model = StepModel(models.resolve("llama3-70b").shape, shape("h100x2", "h20x1"), switches=whole)
    step = model.times(work)
    assert 2 * emulated.attend_s([(1, 1000)] * 400) == pytest.approx(40 * step.slowest_s)
    assert 2 * emulated.dense_s(400, 0) == pytest.approx(40 * 2 * 68.75e9 * 400 / (2 * 989e12))
    assert 2 * emulated.lane_s([400]) == pytest.approx(40 * step.lane_s, rel=0.01)


def test_a_chunk_is_read_once_and_computed(tmp_path: Path) -> None:
    """Its rows share what is read; of many rows arithmetic is what takes the time."""
    emulated = times(tmp_path)
    assert emulated.attend_s([(2, 10_000)]) == pytest.approx(emulated.attend_s([(1, 10_000)]))
    assert emulated.attend_s([(2000, 10_000)]) > 2 * emulated.attend_s([(1, 10_000)])


def test_what_hides_a_late_attend(tmp_path: Path) -> None:
    """The reply's way, half of a round trip and more; beside the weights, the dense work behind it."""
    split, alone = times(tmp_path), times(tmp_path, "h100x2")
    assert split.slack_s(8) == pytest.approx(split.lane_s([8]) / 2)
    assert alone.slack_s(8) == pytest.approx(40 * 137.5e9 / (2 * 3.35e12) / 2)


class _Slow:
    """Attention that takes so long here, whatever it takes on the device that is meant: where it is local
    while a query is handed over, else until the reply is there.
    """

    asked = (((1, 10),),)
    appended = (1,)

    def __init__(self, clock: Moments, *, attends_s: float = 0.0, takes_s: float = 0.0) -> None:
        self.times = AttentionTimes()
        self._clock = clock
        self._attends_s = attends_s
        self._takes_s = takes_s

    def send_query(self, layer: int, query: object) -> None:
        """Attends."""
        self._clock.sleep(self._attends_s)

    def send_key_value(self, layer: int, key: object, value: object) -> None:
        """Nothing."""

    def receive(self, layer: int) -> None:
        """Takes."""
        self._clock.sleep(self._takes_s)


def _ten_layers(pace: DensePace, slow: _Slow) -> None:
    """A step of one row over ten layers, whose attention takes longer than it should."""
    attention: Any = emulated_attention.EmulatedAttention(cast("Any", slow), pace, [1])
    pace.begin_step()
    for layer in range(10):
        attention.send_query(layer, None)
        attention.send_key_value(layer, None, None)
        attention.receive(layer)


def test_dense_work_makes_up_for_late_attends_beside_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten layers whose attends are late end one attend late, not ten."""
    clock, emulated = Moments(), times(tmp_path, "h100x2")
    monkeypatch.setattr(emulated_attention, "monotonic", clock)
    pace = DensePace(emulated)
    pace.padding = Padding(clock, clock.sleep)
    _ten_layers(pace, _Slow(clock, attends_s=0.010))
    layer_s = emulated.dense_s(1, 0) + emulated.attend_s([(1, 10)])
    assert emulated.attend_s([(1, 10)]) < 0.001 < 0.010 < emulated.slack_s(1)
    assert clock.now_s - 100.0 == pytest.approx(10 * layer_s, abs=0.011)


@pytest.mark.parametrize(
    ("dense_workers", "dilation", "late"), [(1, 1.0, 10), (1, 400.0, 0), (100_000, 1.0, 0)]
)
def test_replies_after_their_moment_are_late(
    dense_workers: int, dilation: float, late: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each that an attention worker takes 10 ms for and should not; not where padding is longer, or where
    others of so many dense workers may have been served before.
    """
    clock, emulated = Moments(), times(tmp_path, dilation=dilation)
    monkeypatch.setattr(emulated_attention, "monotonic", clock)
    pace = DensePace(emulated, dense_workers)
    pace.padding = Padding(clock, clock.sleep)
    _ten_layers(pace, _Slow(clock, takes_s=0.010))
    assert pace.padding.late == late


@pytest.mark.parametrize(("took_s", "late"), [(0.010, 0), (0.300, 1)])
def test_a_reply_that_waited_for_the_other_micro_batch_is_not_late(
    took_s: float, late: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose dense work lasted beyond its moment. Taking it adds nothing to the 200 ms of dense work behind,
    and is late there if it takes longer.
    """
    clock, emulated = Moments(), times(tmp_path, dilation=20.0)
    monkeypatch.setattr(emulated_attention, "monotonic", clock)
    pace = DensePace(emulated)
    pace.padding = Padding(clock, clock.sleep)
    slow = cast("Any", _Slow(clock, takes_s=took_s))
    first, other = (emulated_attention.EmulatedAttention(slow, pace, [1]) for _ in range(2))
    dense_s = emulated.dense_s(1, 0)
    assert emulated.lane_s([1]) < 0.050 < 0.15 < dense_s < 0.25
    pace.begin_step()
    for each in (first, other):
        each.send_query(0, cast("Any", None))
        each.send_key_value(0, cast("Any", None), cast("Any", None))
    assert clock.now_s - 100.0 == pytest.approx(2 * dense_s)
    first.receive(0)
    first.send_query(1, cast("Any", None))
    assert clock.now_s - 100.0 == pytest.approx(2 * dense_s + max(dense_s, took_s))
    assert pace.padding.late == late


def test_a_reply_that_waited_for_what_should_take_no_time_is_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Work of this machine between query and reply, which the emulated device does not have."""
    clock = Moments()
    monkeypatch.setattr(emulated_attention, "monotonic", clock)
    pace = DensePace(times(tmp_path, dilation=20.0))
    pace.padding = Padding(clock, clock.sleep)
    attention: Any = emulated_attention.EmulatedAttention(cast("Any", _Slow(clock)), pace, [1])
    pace.begin_step()
    attention.send_query(0, None)
    clock.sleep(0.100)
    attention.receive(0)
    assert pace.padding.late == 1


def test_a_shape_that_exceeds_the_cores_is_refused(tmp_path: Path) -> None:
    """With the number of processes and what to do; as is a shape that is none."""
    with pytest.raises(ConfigError, match=r"1002 processes.*simulate"):
        emulating.overrides(emulating.cluster_of("h100x2,h20x1000", "llama3-70b"), 40.0, tmp_path)
    with pytest.raises(InvalidRequest, match="dense devices"):
        emulating.cluster_of("h100x2,h20x1,h20x1", "llama3-70b")
    with pytest.raises(InvalidRequest, match="at least 1"):
        emulating.overrides(emulating.cluster_of("h100x2,h20x1", "llama3-70b"), 0.5, tmp_path)


def test_times_are_multiplied_and_divided_again() -> None:
    """A plan's moments and pauses by the factor, a record's by its inverse, the server's own too."""
    load = plan(Scenario(rate=2.0, duration_s=10.0, warm_up_s=1.0, turns=2, think_s=1.0), 4096)
    slow = dilated(load, 40)
    (stage,), (slow_stage,) = load.stages, slow.stages
    assert slow_stage.warm_up_s == 40
    for session, slower in zip(stage.sessions, slow_stage.sessions, strict=True):
        assert slower.at_s == pytest.approx(40 * (session.at_s or 0))
        assert [turn.think_s for turn in slower.turns] == [40 * turn.think_s for turn in session.turns]
    seen: Record = dataclasses.replace(WHOLE, timings=Timings(1, 2, 3, 4, 5, 6, 7, preemptions=8))
    told = undilated(seen, 2)
    assert told.ttft_s == pytest.approx((seen.ttft_s or 0) / 2)
    assert told.gaps_s == pytest.approx([gap / 2 for gap in seen.gaps_s])
    assert told.timings == Timings(0.5, 1, 1.5, 2, 2.5, 3, 3.5, preemptions=8)
    assert told.output_tokens == seen.output_tokens


def test_late_calls_are_told_by_process(tmp_path: Path) -> None:
    """What each process of the cluster logged last of its calls; not what earlier clusters' others did."""
    for slot, late in (("dense-0", 1), ("attention-0", 3), ("attention-7", 5)):
        lines = [{"event": "kept_time", "calls": 100, "late": n, "late_share": n / 100} for n in (50, late)]
        (tmp_path / f"{slot}.log").write_text("\n".join(map(json.dumps, lines)))
    assert [str(kept) for kept in emulating.report(tmp_path, 1, 1)] == [
        "dense-0: 1 of 100 calls took longer than their padding (1.00%)",
        "attention-0: 3 of 100 calls took longer than their padding (3.00%)",
    ]


def test_only_this_clusters_calls_are_told(tmp_path: Path) -> None:
    """Not what an earlier one's process wrote into the same log; one that never began has none."""
    log = tmp_path / "dense-0.log"
    log.write_text(json.dumps({"event": "kept_time", "calls": 100, "late": 1}) + "\n")
    before = emulating.log_sizes(tmp_path)
    assert emulating.report(tmp_path, 1, 1, before) == []
    with log.open("a") as lines:
        lines.write(json.dumps({"event": "kept_time", "calls": 200, "late": 4}) + "\n")
    assert [kept.late for kept in emulating.report(tmp_path, 1, 1, before)] == [4]
