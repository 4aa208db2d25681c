"""`anabranch loadgen sweep up`: clusters of real processes, started one after another for it."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from anabranch.cli.loadgen import options as o
from anabranch.cli.loadgen.concurrency import numbers
from anabranch.cli.loadgen.sweep import options as s
from anabranch.cli.loadgen.sweep.running import RealCluster, sweep_real
from anabranch.cli.preflight import require_servable
from anabranch.cli.up import compose, parse_settings, resolve_model
from cluster.config import Config
from cluster.errors import InvalidRequest
from loadgen.cost import Bill
from loadgen.drivers.interface import Target
from loadgen.measurement import Settings
from loadgen.scenario import Scenario

_CLUSTERS = "Clusters and settings"
_KINDS = re.compile(r"dense=([\w.-]+)(?:,attention=([\w.-]+))?")

Dense = Annotated[str, typer.Option(metavar="N[,...]", help="Dense workers.", rich_help_panel=_CLUSTERS)]
Attention = Annotated[
    str,
    typer.Option(
        metavar="N[,...]",
        help="Attention workers, each number with each of --dense; 0 keeps the cache in the dense worker.",
        rich_help_panel=_CLUSTERS,
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model", help="Model folder, or a name of `anabranch model list`.", rich_help_panel=_CLUSTERS
    ),
]
ClusterFile = Annotated[
    Path | None,
    typer.Option("--config", help="A cluster's YAML file, for all else.", rich_help_panel=_CLUSTERS),
]
Arena = Annotated[
    str | None, typer.Option(help="KV cache of each worker that has one.", rich_help_panel=_CLUSTERS)
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any key of every cluster. Repeatable.", rich_help_panel=_CLUSTERS),
]
Kinds = Annotated[
    str,
    typer.Option(
        metavar="dense=KIND[,attention=KIND]",
        help="What each worker is paid as, for example dense=h100,attention=h20: shows what tokens cost.",
        rich_help_panel="Cost",
    ),
]


def up(
    model: Model = None,
    dense: Dense = "1",
    attention: Attention = "2",
    arena: Arena = None,
    config_file: ClusterFile = None,
    settings: Set = None,
    vary: s.Vary = None,
    search: s.Search = None,
    rates: s.Rates = "",
    concurrency: s.Concurrency = "",
    saturate: s.Saturate = None,
    first: s.From = 1.0,
    precision: s.Precision = 0.05,
    slo: o.Slo = "",
    attain: s.Attain = 0.9,
    maximise: s.Maximise = "",
    timeout_s: o.TimeoutS = 600.0,
    arrivals: o.Arrivals = None,
    cv: o.Cv = None,
    requests: o.Requests = None,
    duration: o.Duration = None,
    warm_up: o.WarmUp = 0.0,
    think: o.Think = 0.0,
    workload: o.Workload = "",
    trace_file: o.TraceFile = None,
    prompt: o.Prompt = "512",
    output: o.Output = "128",
    length_scale: o.LengthScale = 1.0,
    context: o.Context = None,
    turns: o.Turns = 1,
    kinds: Kinds = "",
    prices: o.PricesFile = None,
    senders: o.Senders = 1,
    seed: o.LoadSeed = 0,
    out: s.Out = None,
) -> None:
    """Start a cluster for each shape and setting, as `anabranch up` does, sweep it, and stop it.

    \b
    anabranch loadgen sweep up --attention 0,1,2 --concurrency 1,4,16 --prompt 256 --output 64
    anabranch loadgen sweep up --vary dense.step_tokens=128,256,512 --slo tpot:100 --duration 30
    anabranch loadgen sweep up --attention 1,2 --kinds dense=h100,attention=h20 --prices mine.toml --rates 1,2
    """
    scenario = Scenario(
        seed=seed, arrivals=arrivals, cv=cv, requests=requests, duration_s=duration,
        warm_up_s=warm_up, workload=workload,
        trace_file=trace_file, prompt=prompt, output=output, length_scale=length_scale, context=context,
        turns=turns, think_s=think,
    )  # fmt: skip
    load = (rates, concurrency, saturate, first, precision)
    wishes = s.wishes(load, (slo, attain, maximise), seed, out, vary, search)
    started = _Started(
        config_file,
        parse_settings(settings or []) | ({"model.path": model} if model else {}),
        arena,
        timeout_s,
    )
    clusters = {
        f"{d} dense + {a} attention": RealCluster(
            partial(started.reached, d, a),
            Settings(senders, wishes.standard.objectives, bill=_bill(kinds, d, a, prices)),
        )
        for d in numbers(dense, "--dense")
        for a in numbers(attention, "--attention")
    }
    if not clusters:
        raise InvalidRequest("no cluster is named: give numbers of workers, like --dense 1 --attention 0,1,2")
    raise typer.Exit(sweep_real(wishes, scenario, clusters))


@dataclass(frozen=True, slots=True)
class _Started:
    """Clusters of this machine, or of the Ray cluster that the configuration names: what they have alike."""

    config_file: Path | None
    overrides: Mapping[str, Any]
    arena: str | None
    timeout_s: float

    @contextmanager
    def reached(
        self, dense: int, attention: int, settings: Mapping[str, Any], console: Console
    ) -> Iterator[Target]:
        """A cluster of so many workers that ends with the block. Raises an error of cluster.errors."""
        # Here, not above: importing Ray takes half a second that `--help` need not take.
        from anabranch.cli.running_cluster import running_cluster

        with tempfile.TemporaryDirectory(prefix="anabranch-") as state:
            config = self._config(dense, attention, settings, state)
            words = f"starting {dense} dense and {attention} attention workers ..."
            with running_cluster(console, config, words) as record:
                yield Target(record.gateways, tls=config.security.tls, timeout_s=self.timeout_s)

    def _config(self, dense: int, attention: int, settings: Mapping[str, Any], state: str) -> Config:
        """Raises ConfigError and ModelError, before anything is started."""
        own = {
            "dense.replicas": dense,
            "attention.replicas": attention,
            "gateway.port": 0,
            "gateway.http_port": None,
            "controller.port": 0,
            "state_dir": state,
        }
        config = resolve_model(compose(self.config_file, {**self.overrides, **settings, **own}, self.arena))
        require_servable(config)
        return config


def _bill(kinds: str, dense: int, attention: int, prices: Path | None) -> Bill | None:
    """What a shape costs where workers are of these kinds."""
    if not kinds:
        return o.bill("", prices)
    found = _KINDS.fullmatch(kinds)
    if found is None or (attention and found[2] is None):
        raise InvalidRequest(f"--kinds {kinds}: write dense=h100,attention=h20")
    words = f"dense={dense}x{found[1]}"
    return o.bill(f"{words},attention={attention}x{found[2]}" if attention else words, prices)
