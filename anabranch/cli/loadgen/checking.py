"""`anabranch loadgen calibrate` and `check`: this machine's parts, and the simulator beside real runs."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from anabranch.cli import model as models
from anabranch.cli.bench.others import Others, watched
from anabranch.cli.loadgen.watching import LiveLine
from anabranch.cli.models.catalogue import DEFAULT_MODEL
from cluster.config import Config, TlsConfig
from cluster.errors import ConfigError, Unavailable
from loadgen.drivers.interface import Target
from loadgen.measurement import Measurement, Settings
from loadgen.metrics import Summary
from loadgen.pool import StopSwitch
from loadgen.scenario import Scenario
from loadgen.simulation import checks
from loadgen.simulation.calibration import Calibration
from loadgen.simulation.checks import Case

_TIMEOUT_S = 600.0
_BEYOND_MOST = 1
_OTHERS_MOST = 0.05
"""Share of the machine that others may take while a real run is measured."""
_SPEEDS_APART_MOST = 0.15
"""How far memory may be from the speed that it had while the machine was calibrated."""

_WARM_UP = Scenario(concurrency=(4,), requests=8, prompt="300", output="8")
"""First calls compile, touch memory, and tell dense workers what their steps take."""

ModelName = Annotated[str, typer.Option(help="Model folder, or a name of `anabranch model list`.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]


def calibrate(
    file: Annotated[Path, typer.Argument(help="File to write.", dir_okay=False)],
    model: ModelName = DEFAULT_MODEL,
    dtype: Dtype = "bfloat16",
) -> None:
    """Measure the parts of a step on this machine (dense work, attention, lanes), one core a role.

    For `check`. It takes some three minutes, in which nothing else should run here.

    \b
    anabranch loadgen calibrate machine.json
    """
    from anabranch.cli.bench.calibration import measure

    console = Console(stderr=True)
    calibration = measure(models.resolve(model), dtype, lambda words: console.print(words, highlight=False))
    file.write_text(calibration.to_json() + "\n", "utf-8")


def check(
    file: Annotated[Path, typer.Argument(help="What `calibrate` wrote.", dir_okay=False)],
    model: ModelName = DEFAULT_MODEL,
    dtype: Dtype = "bfloat16",
    only: Annotated[str, typer.Option(help="Cases whose names begin so. Default: all.")] = "",
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write into FILE, in place of earlier runs of a case."),
    ] = None,
) -> None:
    """Run real clusters on this machine and the simulator beside them, and say how far its figures are off.

    The simulator knows the calibration alone. Exit status 1 where more than one figure is off by more than a
    fifth. `make validation` shows FILE in docs/validation.md.

    \b
    anabranch loadgen calibrate machine.json
    anabranch loadgen check machine.json --json bench/simulator.json
    """
    calibration = Calibration.read(file)
    folder = models.resolve(model)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="anabranch-check-") as state:
        trace = Path(state) / "shared.jsonl"
        checks.write_shared_prefixes(trace)
        chosen = [case for case in checks.cases(trace) if case.name.startswith(only)]
        if not chosen:
            raise ConfigError(
                f"no case begins with {only!r}: {', '.join(c.name for c in checks.cases(trace))}"
            )
        for case in chosen:
            found[case.name] = _checked(case, case.config(folder, dtype), folder, calibration, Path(state))
            if json_file is not None:
                _keep(json_file, calibration, found)
    beyond = checks.beyond({name: case["figures"] for name, case in found.items()})
    raise typer.Exit(int(len(beyond) > _BEYOND_MOST))


def _checked(
    case: Case, config: Config, folder: Path, calibration: Calibration, state: Path
) -> dict[str, Any]:
    """One case, simulated and then run."""
    from anabranch.cli.bench import results_file

    console = Console()
    simulated = checks.cluster(case, config, folder, calibration)
    scenario = checks.loaded(case, simulated)
    predicted = checks.simulate(simulated, scenario)
    real, others = _run(console, config, state, scenario, case.name)
    figures = checks.compared(real, predicted)
    for name, values in figures.items():
        line = f"{case.name}: {name} {values['real']:.1f}, predicted {values['predicted']:.1f}"
        console.print(f"{line} ({values['off']:+.1%})", highlight=False)
    memory = others.read_bytes_per_s / calibration.read_bytes_per_s
    if others.share > _OTHERS_MOST:
        raise Unavailable(
            f"{case.name}: others took {others.share:.0%} of the machine, so this run says nothing: repeat "
            f'it when nothing else runs (--only "{case.name}")'
        )
    if abs(memory - 1) > _SPEEDS_APART_MOST:
        raise Unavailable(
            f"{case.name}: memory gave {memory:.2f} of what it gave while the machine was calibrated, so "
            f'this run says nothing: repeat it (--only "{case.name}"), or calibrate again'
        )
    return {
        "figures": figures,
        "rate": scenario.rate,
        "others_share": others.share,
        "memory": round(memory, 3),
        "calibration": json.loads(calibration.to_json()),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": results_file.commit(),
    }


def _keep(json_file: Path, calibration: Calibration, found: dict[str, Any]) -> None:
    cases = json.loads(json_file.read_text("utf-8"))["cases"] if json_file.exists() else {}
    told = {"machine": calibration.machine, "model": calibration.model, "cases": cases | found}
    json_file.write_text(json.dumps(told, indent=1) + "\n", "utf-8")


def _run(
    console: Console, config: Config, state: Path, scenario: Scenario, name: str
) -> tuple[Summary, Others]:
    # Here, not above: importing Ray takes half a second that `--help` need not take.
    from anabranch.cli.running_cluster import apart, running_cluster

    with running_cluster(console, apart(config, state / "state"), f"{name}: starting") as record:
        target = Target(record.gateways, "", "", None, TlsConfig(), _TIMEOUT_S, ignore_eos=True)
        _measured(target, _WARM_UP)
        with watched() as others:
            summary = _measured(target, scenario)
    return summary, others


def _measured(target: Target, scenario: Scenario) -> Summary:
    """Of one stage; one sender suffices for so little."""
    console = Console(stderr=True)
    measurement = Measurement(scenario, target, Settings(senders=1))
    with contextlib.closing(StopSwitch()) as stop, console.status("starting the sender") as status:
        (summary,) = measurement.run(LiveLine(console, status), stop, lambda _: None)
    return summary
