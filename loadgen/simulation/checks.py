"""Real runs that the simulator must predict, and how near it came: the cases, and what is compared. Pure.

Each case is run by a real cluster on a machine that is calibrated by parts (`calibration`), and by the
simulator under the same plan of load.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cluster import config as configuration
from cluster import hardware
from cluster.config import Config
from cluster.perfmodel import ModelShape
from loadgen.metrics import Summary
from loadgen.scenario import Scenario
from loadgen.simulation.calibration import Calibration
from loadgen.simulation.machines import Shape, Side
from loadgen.simulation.models import SimulatedModel
from loadgen.simulation.simulation import SimulatedCluster, Simulation
from loadgen.workload import stream

FIGURES = ("output_throughput", "mean_ttft_ms", "p95_ttft_ms", "mean_tpot_ms", "p95_tpot_ms")
"""What is compared, by its key in a summary."""

WITHIN = 0.2
"""How far a prediction may be off."""

_MACHINE = "cpu-node"
_ARENA_BYTES = 2**30
_TIMEOUT_S = 600.0
_SATURATING_USERS = 24
_SATURATING_REQUESTS = 96
_OPEN_S = 110.0
_AZURE = Scenario(workload="azure-conv", context=2048)

_PREFIXES, _PREFIX_BLOCKS, _OWN_TOKENS, _OUTPUT_TOKENS, _SHARED_REQUESTS = 4, 2, 128, 48, 64
_TRACE_BLOCK_TOKENS = 512
"""Of the trace format (Mooncake's)."""


@dataclass(frozen=True, slots=True)
class Case:
    """A cluster of `dense` dense workers and `attention` attention workers, and its load."""

    name: str
    dense: int
    attention: int
    scenario: Scenario
    settings: Mapping[str, Any] = field(default_factory=dict)
    share_of_saturation: float | None = None
    """The rate is this share of what the simulator says such a cluster can do."""

    def config(self, folder: Path, dtype: str) -> Config:
        """Of the real cluster, without what says where it runs."""
        return configuration.load(
            None,
            {
                "model.path": str(folder),
                "model.dtype": dtype,
                "dense.replicas": self.dense,
                "attention.replicas": self.attention,
                "attention.arena": _ARENA_BYTES,
                "dense.local_arena": 0 if self.attention else _ARENA_BYTES,
                **self.settings,
            },
        )


def cases(shared_prefixes: Path) -> tuple[Case, ...]:
    """All of them; `shared_prefixes`: where `write_shared_prefixes` wrote its trace."""

    def batch(rows: int, context: int, requests: int, output: int) -> Scenario:
        prompt = str(context - output // 2)
        return Scenario(concurrency=(rows,), requests=requests, prompt=prompt, output=str(output))

    one_core = {"dense.cores": [0], "attention.cores": [1], "lanes.spin_us": 0}
    return (
        Case("1x0, 1 x 128", 1, 0, batch(1, 128, 24, 64)),
        Case("1x0, 32 x 128", 1, 0, batch(32, 128, 128, 64)),
        Case("1x1, 8 x 1024", 1, 1, batch(8, 1024, 48, 64)),
        Case("1x1, 8 x 4096", 1, 1, batch(8, 4096, 16, 64)),
        Case("1x1, Azure-Conv at 0.5", 1, 1, _AZURE, share_of_saturation=0.5),
        Case("1x1, Azure-Conv at 0.9", 1, 1, _AZURE, share_of_saturation=0.9),
        Case(
            "2x1, shared prefixes",
            2,
            1,
            Scenario(concurrency=(8,), requests=_SHARED_REQUESTS, trace_file=shared_prefixes),
            one_core,
        ),
    )


def write_shared_prefixes(path: Path) -> None:
    """A trace whose prompts begin with one of a few prefixes, drawn by a seed."""
    generator = stream(0, "shared prefixes")
    lines = []
    for number in range(_SHARED_REQUESTS):
        prefix = int(generator.integers(_PREFIXES)) * _PREFIX_BLOCKS
        lines.append(
            json.dumps(
                {
                    "timestamp": 1000 * number,
                    "input_length": _PREFIX_BLOCKS * _TRACE_BLOCK_TOKENS + _OWN_TOKENS,
                    "output_length": _OUTPUT_TOKENS,
                    "hash_ids": [*range(prefix, prefix + _PREFIX_BLOCKS), 1_000_000 + number],
                }
            )
        )
    path.write_text("\n".join(lines) + "\n", "utf-8")


def cluster(
    case: Case, config: Config, model: SimulatedModel, calibration: Calibration | None = None
) -> SimulatedCluster:
    """What the simulator runs for a case, once there is a calibration."""
    kind = hardware.built_in()[_MACHINE]
    attention = Side(kind, case.attention) if case.attention else None
    return SimulatedCluster(
        model,
        Shape(Side(kind, 1), attention, case.dense),
        config,
        calibration=calibration,
    )


def simulate(simulated: SimulatedCluster, scenario: Scenario) -> Summary:
    """The figures of a scenario of one stage."""
    (summary,) = Simulation(simulated, scenario, _TIMEOUT_S).run(lambda _: None, lambda _: True)
    return summary


def loaded(case: Case, simulated: SimulatedCluster) -> Scenario:
    """The case's load, at its rate."""
    if case.share_of_saturation is None:
        return case.scenario
    full = replace(case.scenario, concurrency=(_SATURATING_USERS,), requests=_SATURATING_REQUESTS)
    most = simulate(simulated, full)["request_throughput"]
    return _at_rate(case, round(case.share_of_saturation * most, 3))


def comparisons(told: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """{case: what `compared` says} of real runs that `anabranch loadgen check` wrote down, by the simulator
    as it is and what was measured beside them.
    """
    model = SimulatedModel(**{**told["model"], "shape": ModelShape(**told["model"]["shape"])})
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "shared.jsonl"
        write_shared_prefixes(trace)
        for case in cases(trace):
            if (run := told["cases"].get(case.name)) is not None:
                config = case.config(Path(model.name), told["dtype"])
                simulated = cluster(case, config, model, Calibration.of(run["calibration"]))
                predicted = simulate(simulated, _at_rate(case, run["rate"]))
                found[case.name] = compared(run["real"], predicted)
    return found


def _at_rate(case: Case, rate: float | None) -> Scenario:
    return case.scenario if rate is None else replace(case.scenario, rate=rate, duration_s=_OPEN_S)


def compared(real: Mapping[str, float], predicted: Summary) -> dict[str, dict[str, float]]:
    """{figure: {real, predicted, off}}; `off`: predicted / real - 1."""
    return {
        name: {
            "real": real[name],
            "predicted": predicted[name],
            "off": predicted[name] / real[name] - 1,
        }
        for name in FIGURES
    }


def beyond(comparisons: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Sequence[tuple[str, str, float]]:
    """(case, figure, off) of every prediction that is further off than `WITHIN`."""
    return [
        (case, name, values["off"])
        for case, figures in comparisons.items()
        for name, values in figures.items()
        if abs(values["off"]) > WITHIN
    ]
