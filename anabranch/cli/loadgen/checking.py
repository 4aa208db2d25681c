"""`anabranch loadgen check`: real clusters on this machine, and the simulator beside them."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from anabranch.cli import model as models
from anabranch.cli.bench.others import watched
from anabranch.cli.loadgen.calibrating import WARM_UP, calibrated, telling
from anabranch.cli.loadgen.watching import LiveLine
from anabranch.cli.models.catalogue import DEFAULT_MODEL
from cluster.config import TlsConfig
from cluster.errors import ConfigError, Unavailable
from loadgen.drivers.interface import Target
from loadgen.measurement import Measurement, Settings
from loadgen.metrics import Summary
from loadgen.pool import StopSwitch
from loadgen.scenario import Scenario
from loadgen.simulation import checks
from loadgen.simulation import models as simulated_models
from loadgen.simulation.calibration import apart, between
from loadgen.simulation.checks import Case
from loadgen.simulation.models import SimulatedModel

_TIMEOUT_S = 600.0
_BEYOND_MOST = 1
_OTHERS_MOST = 0.05
"""Share of the machine that others may take while a real run is measured."""
_MOVED_MOST = 0.1
"""How far the machine's speed may move from one calibration to the next."""

ModelName = Annotated[str, typer.Option(help="Model folder, or a name of `anabranch model list`.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]


def check(
    model: ModelName = DEFAULT_MODEL,
    dtype: Dtype = "bfloat16",
    only: Annotated[str, typer.Option(help="Cases whose names begin so. Default: all.")] = "",
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write into FILE, in place of earlier runs of a case."),
    ] = None,
) -> None:
    """Run real clusters on this machine and the simulator beside them, and say how far its figures are off.

    The simulator knows the parts of a step alone (dense work, attention, lanes, each by itself), measured
    while the cluster is up and idle, before its run and behind it. Four minutes a case, in which nothing
    else should run here: a case is refused where others took more of the machine, or its speed moved.
    Exit status 1 where more than one figure is off by more than a fifth. FILE holds what was measured;
    `make validation` shows it in docs/validation.md, beside what the simulator says of it then.

    \b
    anabranch loadgen check --json bench/simulator.json
    """
    from anabranch.cli.bench import results_file

    folder = models.resolve(model)
    shape = simulated_models.resolve(str(folder))
    told = {"machine": results_file.machine(), "model": asdict(shape), "dtype": dtype}
    beyond: list[object] = []
    refused: list[str] = []
    with tempfile.TemporaryDirectory(prefix="anabranch-check-") as state:
        trace = Path(state) / "shared.jsonl"
        checks.write_shared_prefixes(trace)
        chosen = [case for case in checks.cases(trace) if case.name.startswith(only)]
        if not chosen:
            raise ConfigError(
                f"no case begins with {only!r}: {', '.join(c.name for c in checks.cases(trace))}"
            )
        for case in chosen:
            try:
                run = _measured_between(case, folder, dtype, Path(state), shape)
            except Unavailable as error:
                refused.append(error.message)
                continue
            comparisons = checks.comparisons({**told, "cases": {case.name: run}})
            beyond += checks.beyond(comparisons)
            _tell(case.name, comparisons[case.name])
            if json_file is not None:
                _keep(json_file, told, case.name, run)
    if refused:
        raise Unavailable("; ".join(refused))
    raise typer.Exit(int(len(beyond) > _BEYOND_MOST))


def _measured_between(
    case: Case, folder: Path, dtype: str, state: Path, shape: SimulatedModel
) -> dict[str, Any]:
    """One case, run between two calibrations. Raises Unavailable where the machine was not the same in all
    three.
    """
    # Here, not above: importing Ray takes half a second that `--help` need not take.
    from anabranch.cli.bench import results_file
    from anabranch.cli.running_cluster import apart as on_free_ports
    from anabranch.cli.running_cluster import running_cluster

    console = Console()
    config = case.config(folder, dtype)
    simulated = checks.cluster(case, config, shape)
    with running_cluster(console, on_free_ports(config, state / "state"), f"{case.name}: starting") as record:
        target = Target(record.gateways, "", "", None, TlsConfig(), _TIMEOUT_S, ignore_eos=True)
        _measured(target, WARM_UP)
        told = telling(partial(_measured, target), case.dense)
        before = calibrated(simulated, folder, dtype, told, console)
        scenario = checks.loaded(case, replace(simulated, calibration=before))
        with watched() as others:
            real = _measured(target, scenario)
        after = calibrated(simulated, folder, dtype, told, console)
    moved = apart(before, after)
    if others.share > _OTHERS_MOST:
        raise Unavailable(_refusal(case, f"others took {others.share:.0%} of the machine"))
    if moved > _MOVED_MOST:
        raise Unavailable(_refusal(case, f"the machine's speed moved by {moved:.0%}"))
    return {
        "real": {figure: real[figure] for figure in checks.FIGURES},
        "rate": scenario.rate,
        "others_share": others.share,
        "moved": round(moved, 3),
        "calibration": between(before, after).told(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": results_file.commit(),
    }


def _measured(target: Target, scenario: Scenario) -> Summary:
    """Of one stage; one sender suffices for so little."""
    console = Console(stderr=True)
    measurement = Measurement(scenario, target, Settings(senders=1))
    with contextlib.closing(StopSwitch()) as stop, console.status("starting the sender") as status:
        (summary,) = measurement.run(LiveLine(console, status), stop, lambda _: None)
    return summary


def _tell(name: str, figures: Mapping[str, Mapping[str, float]]) -> None:
    console = Console()
    for figure, values in figures.items():
        line = f"{name}: {figure} {values['real']:.1f}, predicted {values['predicted']:.1f}"
        console.print(f"{line} ({values['off']:+.1%})", highlight=False)


def _refusal(case: Case, why: str) -> str:
    return (
        f"{case.name}: {why}, so this run says nothing: repeat it when nothing else runs "
        f'(--only "{case.name}")'
    )


def _keep(json_file: Path, told: Mapping[str, Any], name: str, run: Mapping[str, Any]) -> None:
    cases = json.loads(json_file.read_text("utf-8"))["cases"] if json_file.exists() else {}
    whole = {**told, "cases": {**cases, name: run}}
    json_file.write_text(json.dumps(whole, indent=1) + "\n", "utf-8")
