"""Builders of small simulations."""

from __future__ import annotations

from typing import Any

from cluster import config as configuration
from cluster import hardware
from loadgen.records import Record
from loadgen.scenario import Scenario
from loadgen.simulation import models
from loadgen.simulation.machines import Efficiencies, Shape, parse_side
from loadgen.simulation.simulation import LARGE, SimulatedCluster, Simulation
from loadgen.simulation.steps import Switches


def shape(dense: str = "h100x2", attention: str | None = "h20x4", dense_workers: int = 1) -> Shape:
    """Of the built-in catalogue."""
    catalogue = hardware.built_in()
    side = parse_side(attention, catalogue) if attention else None
    return Shape(parse_side(dense, catalogue), side, dense_workers)


def cluster(
    where: Shape | None = None,
    settings: dict[str, Any] | None = None,
    switches: Switches | None = None,
    efficiencies: Efficiencies | None = None,
    model: str = "llama3-70b",
) -> SimulatedCluster:
    """Lamina's (2,4) with LLaMA3-70B, unless told otherwise."""
    return SimulatedCluster(
        models.resolve(model),
        where or shape(),
        configuration.load(None, LARGE | (settings or {})),
        efficiencies or Efficiencies(),
        switches or Switches(),
    )


def simulate(
    simulated: SimulatedCluster, scenario: Scenario, timeout_s: float = 600.0
) -> tuple[list[Record], list[dict[str, Any]]]:
    """(records, summaries) of a whole simulation."""
    records: list[Record] = []
    summaries = Simulation(simulated, scenario, timeout_s).run(records.append, lambda _: True)
    return records, summaries
