"""A simulator of a machine whose parts were measured: put together as a hand does it, with prefixes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from anabranch.cli.loadgen.command import app
from cluster.errors import ConfigError, Unavailable
from cluster.policies.placement import PlacementPolicy
from cluster.policies.prefixes import Source
from cluster.types import SequenceKey, WorkerId
from loadgen.records import Record
from loadgen.scenario import Scenario
from loadgen.simulation import checks, models
from loadgen.simulation.calibration import AttendCost, Calibration, Lanes, apart, between
from loadgen.simulation.checks import Case
from loadgen.simulation.measured import MeasuredSteps
from loadgen.simulation.pool import ModelledPool
from loadgen.simulation.prefixes import EPOCH, Contents
from loadgen.simulation.simulation import SimulatedCluster, Simulation
from loadgen.simulation.work import PlannedRow
from loadgen.workload import Origin, Segment, Session, Turn
from tests.models import tiny_model

ROW_S, BASE_S, TOKEN_S, SENT_S, LANE_S, TURNS_S = 1e-4, 2e-3, 1e-6, 5e-4, 1e-3, 3e-3
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def calibration(lane_s: float = LANE_S) -> Calibration:
    """A machine of round figures: layers take 10 ms and 0.1 ms a row, a sequence nothing else."""
    decode = [(n, 0.010 + n * ROW_S + 0.001) for n in SIZES[:7]]
    first = [(n, 0.010 + n * ROW_S + n * 1e-5) for n in SIZES[4:]]
    shapes = [
        (n, 1, cached, BASE_S + n * ROW_S + n * cached * TOKEN_S, SENT_S, lane_s)
        for n in (1, 8)
        for cached in (100, 1000)
    ] + [
        (1, n, cached, n * ROW_S + n * cached * 1e-7, SENT_S, lane_s)
        for n in (32, 256)
        for cached in (100, 1000)
    ]
    costs = AttendCost(shapes)
    own, head = [(n, n * 1e-5) for n in SIZES[4:]], [(n, 0.001) for n in SIZES[:7]]
    turns = [(n, TURNS_S) for n in SIZES]
    attend: Mapping[Lanes, AttendCost] = {"local": costs, "remote": costs, "asleep": costs}
    return Calibration(decode, first, first, own, head, turns, [], [], attend)


def rows(count: int, start: int) -> list[PlannedRow]:
    """Decoding rows of sequences that lie at one arena."""
    return [
        PlannedRow(SequenceKey(f"s{n}"), start, 1, samples=True, places=[(0, 0, start + 64)])
        for n in range(count)
    ]


def measured(
    folder: Path, case: Case, *, load: Scenario | None = None
) -> tuple[list[Record], dict[str, Any]]:
    """(records, summary) of a case on that machine."""
    simulated = checks.cluster(
        case, case.config(folder, "float32"), models.resolve(str(folder)), calibration()
    )
    records: list[Record] = []
    (summary,) = Simulation(simulated, load or case.scenario, 600.0).run(records.append, lambda _: True)
    return records, summary


def test_a_local_step_is_the_sum_of_its_parts() -> None:
    """Layers, head, and attention one after the other; nothing is measured twice."""
    steps = MeasuredSteps(calibration(lane_s=0.0), "local", 1, "auto", 1e-3)
    times = steps.price(rows(8, 500))
    layers_s, attention_s = 0.010 + 8 * ROW_S, BASE_S + 8 * ROW_S + 8 * 500 * TOKEN_S
    assert times.slowest_s == pytest.approx(attention_s)
    assert times.wall_s == pytest.approx(layers_s + 0.001 + attention_s + SENT_S, rel=1e-6)
    assert times.micro_batches == 1


def test_a_remote_step_waits_unless_it_is_staggered() -> None:
    """One micro-batch waits for attention and lane; two hide the shorter side behind the longer."""
    single, both = (MeasuredSteps(calibration(), "remote", 1, n, 1e-3) for n in (1, 2))
    attention_s = BASE_S + 8 * ROW_S + 8 * 50_000 * TOKEN_S
    alone = single.price(rows(8, 50_000))
    assert alone.wall_s == pytest.approx(0.0108 + SENT_S + attention_s + LANE_S + 0.001, rel=1e-6)
    staggered = both.price(rows(8, 50_000))
    assert staggered.micro_batches == 2
    assert staggered.wall_s == pytest.approx(attention_s + BASE_S + 0.001, rel=1e-6)


def test_the_choice_follows_from_what_steps_took() -> None:
    """As in a dense worker: whole before anything is known, staggered when that promised to pay."""
    steps = MeasuredSteps(calibration(), "remote", 1, "auto", 1e-3)
    chosen = [steps.price(rows(count, 2500)).micro_batches for count in (2, 4, 8, 16, 32)]
    assert chosen[0] == 1
    assert chosen[-1] == 2


def test_a_shared_core_is_taken_for_what_asking_costs_it() -> None:
    """Where others compute between asking and the answer, asking takes more of the core; by itself a step
    lasts as long.
    """
    own, shared = (
        MeasuredSteps(calibration(), "asleep", 1, 1, 1e-3, shares_core=shares).price(rows(8, 500))
        for shares in (False, True)
    )
    assert shared.dense_s - own.dense_s == pytest.approx(TURNS_S - SENT_S)
    assert shared.wall_s == own.wall_s


def test_attention_workers_take_turns_on_a_core_they_share() -> None:
    """Both answer when all is attended to, and a message to each is handed over; side by side the slower one
    says when.
    """
    batch = [
        PlannedRow(SequenceKey(f"s{n}"), start, 1, samples=True, places=[(worker, 0, start + 64)])
        for n, (worker, start) in enumerate([(0, 50_000), (1, 30_000)])
    ]
    first_s, second_s = (BASE_S + ROW_S + start * TOKEN_S for start in (50_000, 30_000))
    dense_s = 0.010 + 2 * ROW_S + 0.001 + 2 * SENT_S + LANE_S
    for cores, waited_s in ((0, first_s), (2, first_s), (1, first_s + second_s)):
        times = MeasuredSteps(calibration(), "asleep", 2, 1, 1e-3, attention_cores=cores).price(batch)
        assert times.wall_s == pytest.approx(dense_s + waited_s, rel=1e-6)
        assert times.attention_s == pytest.approx((first_s, second_s))


@pytest.mark.parametrize(("cores", "shared"), [("auto", 0), ([1], 1), ([0, 1], 0), ([0, 1, 2], 0)])
def test_a_list_shorter_than_its_workers_is_shared(tmp_path: Path, cores: Any, shared: int) -> None:
    """By dense workers or by attention workers; without attention workers nobody shares theirs."""
    folder = tiny_model(tmp_path)
    settings = {"dense.cores": [0], "attention.cores": cores}
    for attention, expected in ((2, shared), (0, 0)):
        case = Case("shared", 1, attention, Scenario(), settings)
        simulated = checks.cluster(case, case.config(folder, "float32"), models.resolve(str(folder)))
        assert (simulated.attention_cores, simulated.shared_cores) == (expected, 0)


def test_telling_users_takes_the_dense_core_and_that_of_attention() -> None:
    """In proportion between one token and many; what gateway and client take holds up only steps that need
    the core they take it from.
    """
    told = replace(calibration(), served=[(1, 1e-3), (15, 8e-3)], passed_on=[(1, 2e-3), (15, 16e-3)])
    cases: Sequence[tuple[Lanes, float]] = (("local", 4.5e-3), ("remote", 4.5e-3 + 9e-3))
    for lanes, more_s in cases:
        quiet, loud = (
            MeasuredSteps(costs, lanes, 1, 1, 1e-3).price(rows(8, 500)) for costs in (calibration(), told)
        )
        assert loud.wall_s - quiet.wall_s == pytest.approx(more_s)
        assert loud.dense_s - quiet.dense_s == pytest.approx(4.5e-3)


def test_two_calibrations_have_a_middle_and_a_distance() -> None:
    """What is told comes back; between two lies the mean of each part; the side that moved most counts."""
    first = calibration()
    told = json.dumps(first.told())
    assert json.dumps(Calibration.of(json.loads(told)).told()) == told
    slower = replace(first, decode=[(n, 1.2 * s) for n, s in first.decode])
    middle = between(first, slower)
    assert [s for _, s in middle.decode] == pytest.approx([1.1 * s for _, s in first.decode])
    assert middle.attend["local"].rows_s(4, 400) == pytest.approx(first.attend["local"].rows_s(4, 400))
    assert 0 < apart(first, slower) < 0.2
    assert apart(first, first) == 0


def test_dense_workers_of_one_core_take_turns(tmp_path: Path) -> None:
    """Two on one core work for no more than all of the time together, and give less than on two."""
    folder = tiny_model(tmp_path)
    load = Scenario(concurrency=(16,), requests=64, prompt="64", output="32")
    shared, own = (
        measured(folder, Case("", 2, 1, load, settings))[1] for settings in ({"dense.cores": [0]}, {})
    )
    assert 0.4 < shared["dense_busy_share"] <= 0.5 < own["dense_busy_share"]
    assert own["output_throughput"] > 1.3 * shared["output_throughput"]


def test_shared_prefixes_are_computed_once(tmp_path: Path) -> None:
    """Of a trace whose prompts begin alike, later ones have their prefix; another dense worker finds it by
    the directory; nothing where sharing is off.
    """
    trace = tmp_path / "trace.jsonl"
    checks.write_shared_prefixes(trace)
    folder = tiny_model(tmp_path, max_position_embeddings=4096)
    load = Scenario(concurrency=(2,), requests=40, trace_file=trace)
    for dense in (1, 2):
        records, _ = measured(folder, Case("", dense, 1, load))
        known = [record.cached_tokens for record in records]
        assert set(known) <= {0, 1024}
        assert 4 <= known.count(0) <= 4 + 2 * dense
    records, _ = measured(folder, Case("", 1, 1, load, {"attention.prefix_sharing": False}))
    assert not any(record.cached_tokens for record in records)


def test_a_conversation_finds_its_own_past(tmp_path: Path) -> None:
    """A turn's prompt begins with all before it, answer included, as far as that lies in full blocks."""
    load = Scenario(concurrency=(1,), requests=4, prompt="100", output="28", turns=2)
    records, _ = measured(tiny_model(tmp_path), Case("", 1, 1, load))
    assert [record.cached_tokens for record in records if record.turn == 0] == [0, 0]
    assert all(record.cached_tokens >= 96 for record in records if record.turn == 1)


def test_equal_segments_give_equal_identities() -> None:
    """A prefix of one name is the same in every prompt; what is a request's own is nobody else's."""

    def session(index: int, own: int) -> Session:
        segments = (Segment(Origin.BLOCK, 7, 64), Segment(Origin.OWN, own, 64))
        return Session(index, (Turn(segments, 8),))

    contents = Contents(32)
    first, second = (contents.chain(session(n, n), 0).hashes for n in (1, 2))
    assert len(first) == len(second) == 3
    assert first[:2] == second[:2]
    assert first[2] != second[2]
    alone = Session(3, (Turn((Segment(Origin.OWN, 3, 64),), 8),))
    assert contents.chain(alone, 0).hashes == ()


def test_blocks_are_shared_kept_and_given_up() -> None:
    """One arena of ten blocks: two sequences share four, which stay until room is needed."""
    policy = PlacementPolicy(block_tokens=32, shard_tokens=10_000, max_shards=4)
    pool = ModelledPool.remote(1, 320, policy, 1, "shared")
    (arena,) = pool.arenas
    chain = Contents(32).chain(Session(0, (Turn((Segment(Origin.BLOCK, 1, 129),), 8),)), 0)
    first = pool.reserve(0, 0, 160, [])
    pool.publish(first, chain, 129)
    source = [Source(WorkerId("attention-0"), EPOCH, 0, 128)]
    second = pool.acquire(source, chain)
    assert (second[0].first, second[0].end) == (0, 128)
    assert arena.free_blocks == 5
    pool.release(first)
    pool.release(second)
    assert (arena.free_blocks, pool.used_share) == (10, 0)
    assert len(arena.shared.cached) == 4
    pool.reserve(0, 0, 256, [])
    assert len(arena.shared.cached) == 2
    assert [shard.end for shard in pool.acquire(source, chain)] == [64]


def test_what_is_off_is_named() -> None:
    """A prediction beyond a fifth, either way; not one within."""
    real = dict.fromkeys(checks.FIGURES, 100.0)
    found = checks.compared(real, real | {"p95_ttft_ms": 79.0, "mean_tpot_ms": 119.0, "mean_ttft_ms": 121.0})
    assert {name for _, name, _ in checks.beyond({"case": found})} == {"p95_ttft_ms", "mean_ttft_ms"}


def test_a_share_of_saturation_becomes_a_rate(tmp_path: Path) -> None:
    """Half of what the simulated cluster can do keeps up; its throughput follows the rate."""
    folder = tiny_model(tmp_path)
    case = Case("", 1, 1, Scenario(prompt="64", output="16"), share_of_saturation=0.5)
    simulated: SimulatedCluster = checks.cluster(
        case, case.config(folder, "float32"), models.resolve(str(folder)), calibration()
    )
    half = checks.loaded(case, simulated)
    full = checks.loaded(replace(case, share_of_saturation=1.0), simulated)
    assert half.rate is not None
    assert full.rate is not None
    assert half.rate == pytest.approx(full.rate / 2, rel=0.01)
    figures = checks.simulate(simulated, half)
    assert figures["request_throughput"] == pytest.approx(half.rate, rel=0.2)


def test_an_unknown_case_is_refused(tmp_path: Path) -> None:
    """With the names there are."""
    done = CliRunner().invoke(app, ["check", "--model", str(tiny_model(tmp_path)), "--only", "9x9"])
    assert isinstance(done.exception, ConfigError)
    assert "1x1, 8 x 1024" in done.exception.message


@pytest.mark.system
@pytest.mark.timeout(600)
def test_a_case_lies_between_two_calibrations(tmp_path: Path) -> None:
    """Of a tiny model: the file has every part, each of which took some time, and all figures; a machine that
    was not the same all the time is told instead.
    """
    file = tmp_path / "checked.json"
    folder = tiny_model(tmp_path, tokenizer=True, max_position_embeddings=16_384)
    arguments = ["check", "--model", str(folder), "--dtype", "float32", "--only", "2x1", "--json", str(file)]
    done = CliRunner().invoke(app, arguments)
    if isinstance(done.exception, Unavailable):
        assert re.search("others took|speed moved", done.exception.message)
        return
    (case,) = json.loads(file.read_text())["cases"].values()
    assert set(case["real"]) == set(checks.FIGURES)
    found = Calibration.of(case["calibration"])
    parts = found.decode, found.first, found.later, found.own, found.head, found.turns, found.passed_on
    assert all(seconds > 0 for part in parts for _, seconds in part)
    assert all(shape[3] > 0 for shape in found.attend["asleep"].shapes)
