"""How a case of a study is run: by real processes, by those that keep another time, or on a virtual clock."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from anabranch.cli import emulating
from anabranch.cli import model as model_store
from anabranch.cli.loadgen.recording import Recorder
from cluster import config as configuration
from cluster import hardware
from cluster.config import Config
from cluster.errors import Unavailable
from controller.state import StateFolder, default_path
from loadgen.cost import Bill
from loadgen.drivers.interface import Target
from loadgen.measurement import Measurement, Settings
from loadgen.metrics import Summary
from loadgen.results import ResultsFolder
from loadgen.scenario import Scenario
from loadgen.simulation import checks, models
from loadgen.simulation.calibration import Calibration
from loadgen.simulation.simulation import LARGE, Course, SimulatedCluster, Simulation
from loadgen.study.study import Case, Part, Way

DTYPE = "bfloat16"
"""Of real clusters."""

_TIMEOUT_S = 600.0
_LATE_MOST = 0.01
_WARM_UP = Scenario(concurrency=(4,), requests=8, prompt="64", output="8")
"""First calls compile, touch memory, and tell dense workers what their steps take."""

Measure: TypeAlias = Callable[[Scenario, Path], Summary]
"""Runs a scenario of one stage into a new folder."""


@dataclass(slots=True)
class Opened:
    """A case that can be measured. `notes` are known when it is closed."""

    measure: Measure
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Ways:
    """Opens cases of a study. `calibration`: of this machine, where real runs are predicted."""

    recorder: Recorder
    calibration: Calibration | None
    goes_on: Callable[[Course], bool]

    @contextmanager
    def opened(self, part: Part, case: Case, way: Way) -> Iterator[Opened]:
        """Raises an error of cluster.errors where there can be no such cluster."""
        if way is Way.SIMULATED:
            yield Opened(self._simulate(part, case))
            return
        config = self._real_config(part, case) if way is Way.REAL else self._emulated_config(part, case)
        with tempfile.TemporaryDirectory(prefix="anabranch-") as state:
            bill = case.shape(hardware.built_in()).bill
            with self._started(config, Path(state), f"{case.name}, {way}", bill) as opened:
                yield opened
            if way is Way.EMULATED:
                opened.notes += _late(config, Path(state))

    @contextmanager
    def _started(self, config: Config, state: Path, name: str, bill: Bill) -> Iterator[Opened]:
        # Here, not above: importing Ray takes half a second that `--help` need not take.
        from anabranch.cli.running_cluster import apart, running_cluster

        how = Settings(senders=1, bill=bill)
        with running_cluster(self.recorder.console, apart(config, state), f"{name}: starting") as record:
            target = Target(record.gateways, timeout_s=_TIMEOUT_S)

            def measure(scenario: Scenario, folder: Path) -> Summary:
                summaries = self.recorder.measure(Measurement(scenario, target, how), folder)
                if not summaries:
                    raise Unavailable("it was stopped before the first request")
                return summaries[0]

            with tempfile.TemporaryDirectory() as unseen:
                measure(_WARM_UP, Path(unseen) / "warm-up")
            yield Opened(measure)

    def _simulate(self, part: Part, case: Case) -> Measure:
        cluster = self._calibrated(part, case) if Way.REAL in part.ways else self._modelled(part, case)

        def measure(scenario: Scenario, folder: Path) -> Summary:
            simulation = Simulation(cluster, scenario, _TIMEOUT_S)
            with ResultsFolder(folder) as results:
                summaries = simulation.run(results.add, self.goes_on)
                results.sum_up(summaries)
            return summaries[0]

        return measure

    def _real(self, part: Part, case: Case) -> tuple[checks.Case, Path]:
        """As the simulator is checked on this machine, and the model's folder."""
        workers = case.shape(hardware.built_in()).attention
        devices = workers.devices if workers else 0
        real = checks.Case(case.name, case.dense_workers, devices, Scenario(), case.settings)
        return real, model_store.resolve(part.model).absolute()

    def _real_config(self, part: Part, case: Case) -> Config:
        real, folder = self._real(part, case)
        return real.config(folder, DTYPE)

    def _emulated_config(self, part: Part, case: Case) -> Config:
        folder = default_path() / "emulated-model"
        own = emulating.overrides(self._modelled(part, case), part.dilation, folder)
        return configuration.load(None, {**own, **case.settings})

    def _modelled(self, part: Part, case: Case) -> SimulatedCluster:
        return SimulatedCluster(
            models.resolve(part.model),
            case.shape(hardware.built_in()),
            configuration.load(None, {**LARGE, **case.settings}),
            case.efficiencies,
            case.switches,
            cap_tokens=case.arena_tokens,
        )

    def _calibrated(self, part: Part, case: Case) -> SimulatedCluster:
        assert self.calibration is not None, "see Study.predicted_models"
        real, folder = self._real(part, case)
        return checks.cluster(real, real.config(folder, DTYPE), folder, self.calibration)


def _late(config: Config, state: Path) -> list[str]:
    """What an emulated cluster's processes could not keep the time of."""
    found = emulating.report(StateFolder(state).logs, config.dense.replicas, config.attention.replicas)
    return [str(kept) for kept in found if kept.late > _LATE_MOST * kept.calls]
