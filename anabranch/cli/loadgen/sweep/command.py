"""The commands of `anabranch loadgen sweep`."""

from __future__ import annotations

import typer

from anabranch.cli.loadgen.sweep.running import run
from anabranch.cli.loadgen.sweep.simulated import simulate
from anabranch.cli.loadgen.sweep.started import up

app = typer.Typer(
    name="sweep",
    help="Try loads, clusters and settings: where each is saturated, what tokens cost there, what is best. "
    "Modelled (simulate), on a cluster that runs (run), or on clusters started for it (up).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(simulate)
app.command()(run)
app.command()(up)
