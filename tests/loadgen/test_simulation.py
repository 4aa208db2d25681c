"""Simulated runs: exact where a hand can follow, every request accounted for, the same each time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from anabranch.cli.loadgen.command import app
from cluster import config as configuration
from cluster.errors import InvalidRequest, UnsupportedModel
from cluster.policies.placement import PlacementPolicy
from cluster.types import SequenceKey, WorkerId
from loadgen.members import Sample
from loadgen.metrics import definition
from loadgen.records import Outcome, Record
from loadgen.results import PAGE, read_records, read_summaries
from loadgen.scenario import ArrivalKind, Scenario
from loadgen.simulation import models
from loadgen.simulation.machines import Efficiencies, Shape
from loadgen.simulation.pool import ModelledPool
from loadgen.simulation.simulation import SETTINGS, Simulation
from loadgen.simulation.steps import ModelledSteps, StepModel, Switches
from loadgen.simulation.work import PlannedRow, Work, work_of
from tests.loadgen.simulated import cluster, shape, simulate
from tests.models import tiny_model

SETTING = {
    "date", "version", "client", "backend", "endpoint", "model_id", "senders", "objectives_ms", "scenario",
    "content_seed", "workload", "notes",
}  # fmt: skip
"""What a summary says of a run beside its figures."""

LOAD = Scenario(workload="azure-conv", requests=60)


def test_one_request_takes_what_a_hand_computes() -> None:
    """LLaMA3-70B on 2 x H100 + 4 x H20: a prompt of 512 in one chunk, which asks nobody, then rows, weights
    read each time.

    To the scheduler and back 1 ms each, 1 ms for the directory and 1 ms for room;
    137.5 GB over 2 x 3.35 TB/s; 80 layers of 33 us.
    """
    (record,), _ = simulate(cluster(), Scenario(concurrency=(1,), requests=1, prompt="512", output="4"))
    chunk_s = 2 * 68.75e9 * 512 / (2 * 989e12) + 4 * 8192 * 80 * (512 * 513 / 2) / (2 * 989e12)
    keys_s = 512 * 80 * 2 * 2 * 1024 / (0.914 * 50e9)  # all to one attention worker
    assert record.ttft_s == pytest.approx(0.004 + chunk_s + keys_s, rel=1e-3)
    queries_s = 80 * 2 * 2 * 8192 / (0.914 * 50e9)  # and outputs, of one row
    row_s = 137.5e9 / (2 * 3.35e12) + 80 * 33e-6 + queries_s
    for first, second in pairwise(record.deltas_s):
        assert second - first == pytest.approx(row_s + 513 * 327680 / 4e12, rel=2e-3)


def test_where_the_cache_is_local_no_directory_is_asked() -> None:
    """To the scheduler and back 1 ms each and 1 ms for room: a dense worker without attention workers has
    nobody who could have left it a prefix. Behind another's row it waits for room in one step, not two.
    """
    alone, local = (
        Scenario(concurrency=(1,), requests=1, prompt="512", output="4"),
        cluster(shape("h100x4", None)),
    )
    (record,), _ = simulate(local, alone)
    chunk_s = 2 * 68.75e9 * 512 / (4 * 989e12) + 4 * 8192 * 80 * (512 * 513 / 2) / (4 * 989e12)
    assert record.ttft_s == pytest.approx(0.003 + chunk_s, rel=1e-3)
    beside = Scenario(arrivals=ArrivalKind.CONSTANT, rate=5.0, requests=2, prompt="512", output="64")
    for where, waited in ((local, 2), (cluster(), 3)):
        first, second = sorted(simulate(where, beside)[0], key=lambda each: each.intended_s)
        (alone_s, beside_s), step_s = (first.ttft_s, second.ttft_s), first.deltas_s[2] - first.deltas_s[1]
        assert alone_s is not None
        assert beside_s is not None
        assert waited - 1 < (beside_s - alone_s) / step_s < waited + 0.5


def test_the_same_seed_gives_the_same_records() -> None:
    """Line by line; another seed gives others."""
    first, second, other = (
        [record.to_line() for record in simulate(cluster(), scenario)[0]]
        for scenario in (LOAD, LOAD, Scenario(workload="azure-conv", requests=60, seed=1))
    )
    assert first == second
    assert first != other


def test_every_request_is_answered_in_full() -> None:
    """Tokens as asked, moments ascending, the server's account adds up to what the client saw."""
    records, (summary,) = simulate(cluster(), LOAD)
    assert summary["completed"] == len(records) == 60
    for record in records:
        assert record.output_tokens == record.asked_output_tokens == len(record.deltas_s)
        assert all(a < b for a, b in pairwise(record.deltas_s))
        assert record.timings is not None
        assert record.sent_s is not None
        parts_s = (
            record.timings.queue_seconds + record.timings.prefill_seconds + record.timings.decode_seconds
        )
        assert record.deltas_s[-1] - record.sent_s == pytest.approx(parts_s + 0.002)
        assert (
            record.timings.dense_seconds
            <= record.timings.prefill_seconds + record.timings.decode_seconds + 1e-9
        )


@pytest.mark.parametrize(
    "where", [shape(), shape("h100x4", None), shape("h100x2", "h20x3", 2), shape("h100x4", None, 2)], ids=str
)
def test_no_side_is_busy_for_more_than_all_of_the_time(where: Shape) -> None:
    """Under more load than a cluster can do: no device works more than the time, one side nearly all."""
    _, (summary,) = simulate(cluster(where), Scenario(concurrency=(64,), requests=200, prompt="2000"))
    busy = [summary[f"{side}_busy_share"] for side in ("dense", "attention")]
    assert summary["completed"] == 200
    assert all(0 < share <= 1 for share in busy)
    assert max(busy) > 0.7


def test_energy_is_that_of_every_device_for_the_whole_time() -> None:
    """Two dense workers of two H100 each, and three H20, at the catalogue's watts."""
    _, (summary,) = simulate(cluster(shape("h100x2", "h20x3", 2)), LOAD)
    assert summary["power_w"] == 4 * 700 + 3 * 400
    joules = summary["joules_per_output_token"] * summary["total_output_tokens"]
    assert joules == pytest.approx(summary["power_w"] * summary["duration"])


def test_a_full_pool_preempts_and_still_answers_everybody() -> None:
    """Sequences that outgrow the cache give way by the scheduler's rule, begin anew, and end."""
    small = cluster(efficiencies=Efficiencies(memory=0.868), where=shape("h100x2", None))
    records, (summary,) = simulate(
        small, Scenario(concurrency=(8,), requests=12, prompt="400", output="700"), timeout_s=10**6
    )
    assert small.arena_tokens < 8 * 1100
    assert summary["preemptions"] > 0
    assert all(record.outcome is Outcome.COMPLETED for record in records)
    assert summary["max_pool_used_share"] > 0.9


def test_who_cannot_be_served_is_told_why() -> None:
    """Too long for the pool, queue full, and too late: failures by their reason, the rest is answered."""
    small = cluster(efficiencies=Efficiencies(memory=0.868), where=shape("h100x2", None))
    _, (long,) = simulate(small, Scenario(concurrency=(1,), requests=2, prompt="9000", output="8"))
    assert long["errors"] == {"RESOURCE_EXHAUSTED": 2}
    crowded = cluster(settings={"dense.max_waiting": 1, "dense.max_batch": 1})
    _, (full,) = simulate(crowded, Scenario(concurrency=(8,), requests=16, prompt="64", output="8"))
    assert set(full["errors"]) == {"RESOURCE_EXHAUSTED"}
    assert full["completed"] > 0
    assert full["completed"] + full["failed"] == 16
    _, (late,) = simulate(cluster(), Scenario(concurrency=(4,), requests=8, output="500"), timeout_s=1.0)
    assert late["errors"] == {"DEADLINE_EXCEEDED": 8}


def test_a_closed_loop_keeps_its_number_and_sessions_go_on() -> None:
    """Never more under way than users; a turn's prompt is all before it; one stage follows the other."""
    scenario = Scenario(concurrency=(2, 5), requests=20, prompt="100", output="10", turns=2, think_s=0.01)
    records, summaries = simulate(cluster(), scenario)
    assert [summary["max_concurrent_requests"] for summary in summaries] == [2, 5]
    assert [summary["completed"] for summary in summaries] == [20, 20]
    assert {record.prompt_tokens for record in records if record.turn == 1} == {210}
    first = [record for record in records if record.stage == "concurrency 2"]
    second = [record for record in records if record.stage == "concurrency 5"]
    assert max(record.ended_s for record in first) <= min(record.intended_s for record in second)


def test_a_stopped_simulation_reports_what_there_is() -> None:
    """Under way: interrupted; not yet due: unsent."""
    scenario = Scenario(workload="azure-conv", requests=200)
    simulation, records = Simulation(cluster(), scenario, 600.0), list[Record]()
    answers: Iterator[bool] = iter([True, True, False])
    (summary,) = simulation.run(records.append, lambda _: next(answers))
    assert simulation.was_stopped
    assert summary["interrupted"] > 0
    assert summary["unsent"] > 0
    assert summary["planned"] == len(records) + summary["unsent"] == 200


def test_prompts_elsewhere_cost_nothing_here() -> None:
    """The first token of a prompt of 20,000 comes after the step of one row; here after its chunks."""
    scenario = Scenario(concurrency=(1,), requests=1, prompt="20000", output="2")
    here = cluster()
    elsewhere = replace(here, prompts_elsewhere=True)
    (slow,), _ = simulate(here, scenario)
    (fast,), _ = simulate(elsewhere, scenario)
    assert fast.ttft_s is not None
    assert slow.ttft_s is not None
    assert fast.ttft_s < 0.05 < 1.0 < slow.ttft_s


def test_the_pool_gives_back_what_it_gave() -> None:
    """Room over several arenas, grown and released: nothing is left, and nothing is given twice."""
    policy = PlacementPolicy(block_tokens=32, shard_tokens=64, max_shards=8)
    pool = ModelledPool.remote(3, 320, policy, 1, "shared")
    shards = pool.reserve(0, 0, 200, [])
    grown = pool.reserve(0, 200, 300, shards)
    assert [(b.first, b.end) for b in grown][-1][1] == 300
    assert sum(shard.end - shard.first for shard in grown) == 300
    assert pool.reserve(0, 0, 10_000, []) == []
    pool.release(grown)
    assert pool.used_share == 0


def test_instances_keep_to_their_own_or_borrow() -> None:
    """Attention i is at home at dense i modulo their number: separate stays there, borrowing leaves last."""
    policy = PlacementPolicy(block_tokens=32, shard_tokens=64, max_shards=8)
    separate = ModelledPool.remote(4, 320, policy, 2, "separate")
    assert {s.worker for s in separate.reserve(1, 0, 500, [])} == {
        WorkerId("attention-1"),
        WorkerId("attention-3"),
    }
    assert separate.reserve(1, 0, 500, []) == []
    borrowing = ModelledPool.remote(4, 320, policy, 2, "borrowing")
    assert {s.worker for s in borrowing.reserve(1, 0, 640, [])} == {
        WorkerId("attention-1"),
        WorkerId("attention-3"),
    }
    assert {s.worker for s in borrowing.reserve(1, 0, 500, [])} == {
        WorkerId("attention-0"),
        WorkerId("attention-2"),
    }


def test_switches_only_ever_help() -> None:
    """Overlap and staggering never lengthen a step, and shorten one where there is something to hide."""
    work = Work(400, 0, [120_000] * 4, [], [100] * 4, [100] * 4)
    model = models.resolve("llama3-70b").shape
    walls = {
        switches: StepModel(model, shape(), Efficiencies(), switches).times(work).wall_s
        for switches in (Switches(o, s) for o in (False, True) for s in (False, True))
    }
    bare = walls[Switches(False, False)]
    assert walls[Switches(True, False)] < bare
    assert all(wall_s <= bare for wall_s in walls.values())


def test_micro_batches_are_cut_between_sequences() -> None:
    """A prompt beside 40 decoding rows is one of the two: it is not cut, and both read the weights."""
    model = StepModel(models.resolve("llama3-70b").shape, shape())
    places = [(0, 0, 4096)]
    rows = [PlannedRow(SequenceKey(f"r{n}"), 1000, 1, True, places) for n in range(40)]
    prompt = PlannedRow(SequenceKey("prompt"), 1024, 1024, True, places)
    step = ModelledSteps(model, 2).price([*rows, prompt])
    halves = [model.micro_batch(work_of(half, 4)) for half in (rows, [prompt])]
    assert step == model.step(halves)
    assert step.micro_batches == 2
    assert step.dense_s > 137.5e9 / (2 * 3.35e12) + 2 * 68.75e9 * 1024 / (2 * 989e12)


def test_a_model_may_be_any_folder(tmp_path: Path) -> None:
    """A config.json gives a shape that the equations know; an unknown name lists those bundled."""
    folder = tiny_model(tmp_path)
    found = models.resolve(str(folder))
    spec_bytes = found.shape.kv_token_bytes
    assert spec_bytes > 0
    assert found.context_tokens > 0
    with pytest.raises(InvalidRequest, match="llama3-70b"):
        models.resolve("nobody")
    (tmp_path / "config.json").write_text('{"architectures": ["OtherForCausalLM"]}')
    with pytest.raises(UnsupportedModel):
        models.resolve(str(tmp_path))


@pytest.mark.parametrize("setting", ["attention.arena=1MiB", "lanes.spin_us=5", "dense.replicas=2"])
def test_a_setting_that_would_change_nothing_is_refused(tmp_path: Path, setting: str) -> None:
    """By its key, with those that are read: an arena here is what the device holds."""
    done = CliRunner().invoke(app, ["simulate", "--set", setting, "--out", str(tmp_path / "out")])
    assert isinstance(done.exception, InvalidRequest)
    assert done.exception.message.startswith(f"{setting.partition('=')[0]}: a simulation does not read this")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", SETTINGS)
def test_every_setting_that_is_taken_is_one_of_the_configuration(key: str) -> None:
    """So that no refusal recommends what another would refuse."""
    section, _, name = key.partition(".")
    configuration.load(None, {key: getattr(getattr(configuration.load(None), section), name)})


def test_all_devices_of_a_dense_worker_work_together() -> None:
    """One request keeps all four as busy as the worker is, and hardly anything is idle; two such workers with
    one request leave half of the money idle.
    """
    scenario = Scenario(concurrency=(1,), requests=4, prompt="2000", output="50")
    for workers, idle in ((1, 0.0), (2, 0.5)):
        _, (summary,) = simulate(cluster(shape("h100x4", None, workers)), scenario)
        assert summary["usd_per_mtok_idle"] / summary["usd_per_mtok"] == pytest.approx(idle, abs=0.03)


@pytest.mark.parametrize("text", ["flops=0", "speed=1", "memory=x", "call_s=0"])
def test_a_wrong_efficiency_is_refused(text: str) -> None:
    """Unknown names, values that are none, and shares out of range."""
    with pytest.raises(InvalidRequest):
        Efficiencies.parse(text)


def test_weights_that_do_not_fit_are_refused() -> None:
    """With what would help."""
    with pytest.raises(InvalidRequest, match="more devices"):
        cluster(shape("h100", "h20x4"))


def test_the_command_writes_what_a_real_run_writes(tmp_path: Path) -> None:
    """`loadgen simulate` gives a folder that is read as a real run's, and says what it leaves out."""
    done = CliRunner().invoke(
        app,
        ["simulate", "--attention", "h20x4", "--rate", "5", "--duration", "4", "--slo", "tpot:60", "--out",
         str(tmp_path / "out")],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "cannot deploy" in done.output
    assert "per million output tokens" in done.output
    (summary,) = read_summaries(tmp_path / "out")
    records = read_records(tmp_path / "out")
    assert summary["completed"] == len(records) > 0
    assert summary["backend"] == "simulation"
    assert summary["request_goodput"] > 0
    assert all(definition(key) for key in set(summary) - SETTING)
    page = (tmp_path / "out" / PAGE).read_text()
    assert all(title in page for title in ("Batch size", "KV pool occupancy", "4 attention, 1 dense"))
    assert "s simulated in" in done.output


@pytest.mark.parametrize(
    ("where", "roles", "keeping"),
    [
        (shape(), {"dense-0": "dense"} | {f"attention-{n}": "attention" for n in range(4)}, "attention"),
        (shape("h100x4", None, 2), {"dense-0": "dense", "dense-1": "dense"}, "dense"),
    ],
    ids=str,
)
def test_every_member_is_sampled_once_a_second(where: Shape, roles: dict[str, str], keeping: str) -> None:
    """What it runs and holds, idle seconds included, through all stages; blocks are told by who has them."""
    samples: list[Sample] = []
    scenario = Scenario(concurrency=(2, 4), requests=8, prompt="3000", output="200", think_s=5.0)
    simulation = Simulation(cluster(where), scenario, 600.0)
    simulation.run(lambda _: None, lambda _: True, keep_sample=samples.append)
    assert {sample.worker_id: sample.role for sample in samples} == roles
    for name in roles:
        moments = [sample.at_s for sample in samples if sample.worker_id == name]
        assert all(0 < after - before <= 1.001 for before, after in pairwise(moments))
        assert moments[0] == 0
        assert simulation.simulated_s - 1 <= moments[-1] <= simulation.simulated_s
    dense = [sample.running for sample in samples if sample.role == "dense"]
    assert max(dense) >= 2
    assert min(dense) == 0
    assert {sample.role for sample in samples if sample.blocks} == {keeping}
    assert all(0 <= sample.blocks_used <= sample.blocks for sample in samples)
    assert max(sample.blocks_used for sample in samples) >= 3000 // 32


def test_a_long_run_is_sampled_less_often() -> None:
    """A request each thousand seconds: an hour's looks a second apart, then fewer and fewer."""
    samples: list[Sample] = []
    scenario = Scenario(arrivals=ArrivalKind.CONSTANT, rate=0.001, requests=18, prompt="64", output="4")
    simulation = Simulation(cluster(), scenario, 600.0)
    simulation.run(lambda _: None, lambda _: True, keep_sample=samples.append)
    assert simulation.simulated_s > 17_000
    looks = sum(sample.role == "dense" for sample in samples)
    assert 3600 + 3600 + (simulation.simulated_s - 3 * 3600) / 4 == pytest.approx(looks, abs=5)


def test_one_micro_batch_in_the_configuration_is_one_in_the_simulation() -> None:
    """Staggered where it pays and may be; `dense.micro_batches: 1` leaves it out."""
    load = Scenario(concurrency=(400,), requests=500, prompt="500", output="20")
    shares = [
        simulate(cluster(settings=settings), load)[1][0]["staggered_share"]
        for settings in ({}, {"dense.micro_batches": 1})
    ]
    assert shares[0] > 0 == shares[1]
