"""How a case of a study is run: by real processes, by those that keep another time, or on a virtual clock."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeAlias

from anabranch.cli import emulating
from anabranch.cli import model as model_store
from anabranch.cli.loadgen.calibrating import WARM_UP, calibrated, telling
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
from loadgen.simulation.calibration import Calibration, between
from loadgen.simulation.simulation import LARGE, Course, SimulatedCluster, Simulation
from loadgen.study.study import Case, Part, Way

DTYPE = "bfloat16"
"""Of real clusters."""

_TIMEOUT_S = 600.0
_LATE_MOST = 0.01
_CALIBRATION = "calibration.json"

Measure: TypeAlias = Callable[[Scenario, Path], Summary]
"""Runs a scenario of one stage into a new folder."""


@dataclass(slots=True)
class Opened:
    """A case that can be measured. `notes` are known when it is closed."""

    measure: Measure
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Ways:
    """Opens cases of a study: real runs before their simulations, which know what this machine took for the
    parts of a step while the real cluster was up and idle.
    """

    recorder: Recorder
    goes_on: Callable[[Course], bool]
    calibrations: dict[tuple[str, str], Calibration] = field(default_factory=dict)
    """By titles of parts and names of cases."""

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
                if way is Way.REAL and Way.SIMULATED in part.ways:
                    with self._calibrated(part, case, opened.measure):
                        yield opened
                else:
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

            _unseen(measure, WARM_UP)
            yield Opened(measure)

    @contextmanager
    def _calibrated(self, part: Part, case: Case, measure: Measure) -> Iterator[None]:
        """Before the real runs and behind them; kept where both were reached."""
        real, folder = self._real(part, case)
        cluster = checks.cluster(real, real.config(folder, DTYPE), models.resolve(str(folder)))
        told = telling(partial(_unseen, measure), real.dense)
        before = calibrated(cluster, folder, DTYPE, told, self.recorder.console)
        yield
        after = calibrated(cluster, folder, DTYPE, told, self.recorder.console)
        self.calibrations[part.title, case.name] = between(before, after)

    def _simulate(self, part: Part, case: Case) -> Measure:
        cluster = self._known(part, case) if Way.REAL in part.ways else self._modelled(part, case)

        def measure(scenario: Scenario, folder: Path) -> Summary:
            simulation = Simulation(cluster, scenario, _TIMEOUT_S)
            with ResultsFolder(folder) as results:
                summaries = simulation.run(results.add, self.goes_on)
                results.sum_up(summaries)
            if cluster.calibration is not None:
                (folder / _CALIBRATION).write_text(json.dumps(cluster.calibration.told()) + "\n", "utf-8")
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

    def _known(self, part: Part, case: Case) -> SimulatedCluster:
        calibration = self.calibrations.get((part.title, case.name))
        if calibration is None:
            raise Unavailable("its real runs did not come to an end, so what it takes here is not known")
        real, folder = self._real(part, case)
        return checks.cluster(real, real.config(folder, DTYPE), models.resolve(str(folder)), calibration)


def _unseen(measure: Measure, scenario: Scenario) -> Summary:
    """Nobody looks at its requests."""
    with tempfile.TemporaryDirectory() as folder:
        return measure(scenario, Path(folder) / "unseen")


def _late(config: Config, state: Path) -> list[str]:
    """What an emulated cluster's processes could not keep the time of."""
    found = emulating.report(StateFolder(state).logs, config.dense.replicas, config.attention.replicas)
    return [str(kept) for kept in found if kept.late > _LATE_MOST * kept.calls]
