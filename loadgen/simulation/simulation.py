"""A run on hardware that nobody here has: a plan of load, a cluster that is modelled, the same figures."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cluster.config import Config
from cluster.errors import InvalidRequest
from cluster.policies.settings import placement_policy, scheduler_limits
from loadgen import scenario as scenarios
from loadgen.cost import priced
from loadgen.members import Sample
from loadgen.metrics import Facts, Objectives, Summary, summarize
from loadgen.plan import Plan, Stage
from loadgen.records import Record
from loadgen.scenario import Scenario
from loadgen.simulation.calibration import Calibration, Lanes
from loadgen.simulation.clients import StageClients
from loadgen.simulation.engine import Queues, SimulatedEngine, Site
from loadgen.simulation.machines import Efficiencies, Shape
from loadgen.simulation.measured import MeasuredSteps
from loadgen.simulation.models import SimulatedModel
from loadgen.simulation.pool import ModelledPool
from loadgen.simulation.prefixes import Contents, ReportedDirectory
from loadgen.simulation.samples import SimulatedMembers
from loadgen.simulation.steps import ModelledSteps, Pricing, StepModel, Switches
from loadgen.simulation.tally import Tally
from loadgen.simulation.timeline import Timeline

LARGE: dict[str, Any] = {"dense.step_tokens": 2048, "dense.max_batch": 1024, "dense.max_waiting": 65536}
"""Settings that suit accelerators, for who gives no configuration: its defaults are for small machines."""

STEP_TOKENS_ELSEWHERE = 65536
"""Where prompts cost nothing, a step's budget must not hold them up."""


SETTINGS = (
    "attention.block_tokens",
    "attention.prefix_sharing",
    "controller.heartbeat_ms",
    "dense.max_batch",
    "dense.max_waiting",
    "dense.micro_batches",
    "dense.reserve_ahead_tokens",
    "dense.step_tokens",
    "placement.instances",
    "placement.max_shards",
    "placement.shard_tokens",
)
"""Keys of the configuration that modelled hardware leaves to be set."""

_NO_OBJECTIVES = Objectives()


@dataclass(frozen=True, slots=True)
class SimulatedCluster:
    """Hardware and settings. `config`: of a cluster that runs, of which engine, attention and placement
    count; numbers of workers follow from `shape`, and arenas too, unless there is a `calibration`: of a
    machine on whose cores such a cluster runs, one for each worker, or fewer that those of a role share.
    """

    model: SimulatedModel
    shape: Shape
    config: Config
    efficiencies: Efficiencies = field(default_factory=Efficiencies)
    switches: Switches = field(default_factory=Switches)
    prompts_elsewhere: bool = False
    calibration: Calibration | None = None
    cap_tokens: int | None = None
    """Of each arena at most: less than what the devices hold."""

    def __post_init__(self) -> None:
        """Raises InvalidRequest where the weights do not fit."""
        self.shape.cache_bytes(self.model.shape, self.efficiencies)

    @property
    def arena_tokens(self) -> int:
        """KV cache of an attention worker, or of a dense worker that has its own."""
        cache_bytes = self.shape.cache_bytes(self.model.shape, self.efficiencies)
        if self.calibration is not None:
            is_local = self.shape.attention is None
            cache_bytes = self.config.dense.local_arena if is_local else self.config.attention.arena
        held = int(cache_bytes // self.model.shape.kv_token_bytes)
        return held if self.cap_tokens is None else min(held, self.cap_tokens)

    @property
    def shared_cores(self) -> int:
        """Cores of a calibrated machine that dense workers share, where they have fewer than there are of
        them; 0 where each has its own.
        """
        return _shared(self.config.dense.cores, self.shape.dense_workers)

    @property
    def attention_cores(self) -> int:
        """The same of attention workers."""
        return _shared(
            self.config.attention.cores, self.shape.attention.devices if self.shape.attention else 0
        )

    @property
    def lanes(self) -> Lanes:
        """Where attention runs, on a machine that was calibrated."""
        if self.shape.attention is None:
            return "local"
        return "asleep" if self.config.lanes.spin_us == 0 else "remote"

    def pricing(self) -> Pricing:
        """What says how long the steps of one dense worker take."""
        if self.calibration is None:
            model = StepModel(self.model.shape, self.shape, self.efficiencies, self.switches)
            return ModelledSteps(
                model, self.config.dense.micro_batches, prompts_elsewhere=self.prompts_elsewhere
            )
        workers = self.shape.attention.devices if self.shape.attention else 1
        return MeasuredSteps(
            self.calibration,
            self.lanes,
            workers,
            self.config.dense.micro_batches,
            self.efficiencies.call_s,
            shares_core=self.shared_cores > 0,
            attention_cores=self.attention_cores,
        )

    def description(self) -> dict[str, Any]:
        """What was simulated, for the summary."""
        return {
            "price_per_hour_usd": self.shape.price_per_hour_usd,
            "is_deployable": self.shape.is_deployable,
            "arena_tokens": self.arena_tokens,
            "prompts_elsewhere": self.prompts_elsewhere,
            "efficiencies": dataclasses.asdict(self.efficiencies),
            "switches": dataclasses.asdict(self.switches),
            "step_tokens": self.config.dense.step_tokens,
            "max_batch": self.config.dense.max_batch,
        }


def _shared(cores: Sequence[int] | Literal["auto"], workers: int) -> int:
    """Cores of a list that has fewer than there are workers to have one; else 0."""
    return len(cores) if cores != "auto" and len(cores) < workers else 0


@dataclass(frozen=True, slots=True)
class Course:
    """How a simulation stands."""

    stage: Stage
    now_s: float
    sent: int
    under_way: int


def require_obeyed(settings: Mapping[str, Any]) -> None:
    """Raise InvalidRequest for a setting, by its key, that would change nothing."""
    if ignored := [key for key in settings if key not in SETTINGS]:
        raise InvalidRequest(
            f"{', '.join(ignored)}: a simulation does not read this; arenas and lanes follow from the "
            f"devices and --efficiency, workers from the shape. It reads {', '.join(SETTINGS)}"
        )


class Simulation:
    """Runs a scenario once, as `Measurement` does. The same scenario and cluster give the same records."""

    def __init__(self, cluster: SimulatedCluster, scenario: Scenario, timeout_s: float) -> None:
        """`timeout_s` after which a request failed. Raises InvalidRequest for a wrong wish."""
        self._cluster = cluster
        self._scenario = scenario
        context = cluster.model.context_tokens
        self.plan: Plan = scenarios.plan(scenario, min(context, scenario.context or context))
        self._timeout_s = timeout_s
        self._timeline = Timeline()
        self.was_stopped = False

    @property
    def simulated_s(self) -> float:
        """How far the virtual clock went."""
        return self._timeline.now_s

    def run(
        self,
        keep: Callable[[Record], None],
        goes_on: Callable[[Course], bool],
        objectives: Objectives = _NO_OBJECTIVES,
        keep_sample: Callable[[Sample], None] = lambda _: None,
    ) -> list[Summary]:
        """The figures of every stage that was begun. `keep` is given each request as it ends, `keep_sample`
        each member at its moments; `goes_on` is asked now and then, and may end the run.
        """
        members = SimulatedMembers(self._timeline, keep_sample)
        records: list[Record] = []

        def kept(record: Record) -> None:
            records.append(record)
            keep(record)

        summaries = []
        for stage in self.plan.stages:
            begins_s, tally = self._timeline.now_s, Tally()
            self._do(stage, kept, goes_on, tally, members)
            facts = Facts(
                stage=stage.name,
                counts_from_s=begins_s + stage.warm_up_s,
                planned=stage.requests,
                client_cpu_share=0.0,
                request_rate=stage.request_rate,
                concurrency=stage.concurrency,
                objectives=objectives,
            )
            figures = self._figures(tally, begins_s)
            summaries.append({**self._head(objectives), **summarize(records, facts), **figures})
            if self.was_stopped:
                break
        return priced(records, summaries, self._cluster.shape.bill)

    def _do(
        self,
        stage: Stage,
        keep: Callable[[Record], None],
        goes_on: Callable[[Course], bool],
        tally: Tally,
        members: SimulatedMembers,
    ) -> None:
        """A stage to its end, with engines and arenas of its own: nothing of one is left in the next."""
        site = self._site(tally)
        config, shape = self._cluster.config, self._cluster.shape
        limits = scheduler_limits(config, self._cluster.model.context_tokens, None)
        engines = tuple(
            SimulatedEngine(index, site, limits, self._cluster.pricing())
            for index in range(shape.dense_workers)
        )
        contents = Contents(config.attention.block_tokens) if config.attention.prefix_sharing else None
        clients = StageClients(
            stage, self._timeline.now_s, self._timeline, engines, site.call_s, self._timeout_s, keep, contents
        )
        clients.begin()
        members.look(engines, site.pool)
        self.was_stopped = not self._timeline.run(
            lambda: clients.sessions_left == 0,
            lambda: goes_on(Course(stage, self._timeline.now_s, clients.sent, len(clients.under_way))),
        )
        clients.interrupt()

    def _site(self, tally: Tally) -> Site:
        cluster, shape = self._cluster, self._cluster.shape
        policy = placement_policy(cluster.config)
        workers = shape.attention.devices if shape.attention else 0
        is_calibrated = cluster.calibration is not None
        directory = None
        if shape.attention is None:
            pool = ModelledPool.local(shape.dense_workers, cluster.arena_tokens, policy)
        else:
            pool = ModelledPool.remote(
                workers,
                cluster.arena_tokens,
                policy,
                shape.dense_workers,
                cluster.config.placement.instances,
            )
            heartbeat_s = cluster.config.controller.heartbeat_ms / 1000
            directory = ReportedDirectory(self._timeline, heartbeat_s)
        return Site(
            self._timeline,
            pool,
            Queues((cluster.attention_cores if is_calibrated else 0) or workers),
            Queues(cluster.shared_cores if is_calibrated else 0),
            tally,
            cluster.efficiencies.call_s,
            directory,
        )

    def _head(self, objectives: Objectives) -> dict[str, Any]:
        """What was run, under the keys of a measurement."""
        scenario = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in dataclasses.asdict(self._scenario).items()
        }
        return {
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "version": importlib.metadata.version("anabranch"),
            "client": "a simulation",
            "backend": "simulation",
            "endpoint": str(self._cluster.shape),
            "model_id": self._cluster.model.name,
            "senders": 0,
            "objectives_ms": dict(objectives.bounds_ms),
            "scenario": scenario,
            "content_seed": 0,
            "workload": dict(self.plan.workload),
            "modelled": self._cluster.description(),
            "notes": list(self.plan.notes),
        }

    def _figures(self, tally: Tally, begins_s: float) -> dict[str, Any]:
        shape = self._cluster.shape
        span_s = self._timeline.now_s - begins_s
        return tally.figures(span_s, shape.dense_workers, is_local=shape.attention is None)
