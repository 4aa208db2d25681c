"""`anabranch up`: start a cluster and watch it until told to stop."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import typer
import yaml
from rich.console import Console

from anabranch.cli import emulating
from anabranch.cli import model as model_store
from anabranch.cli import up_options as o
from anabranch.cli.live import LiveView
from anabranch.cli.preflight import require_servable
from cluster import config as configuration
from cluster.config import Config
from cluster.errors import ConfigError
from cluster.signals import Interrupts
from cluster.telemetry import configure_logging, logger
from controller import roles
from controller.event_log import LogObserver
from controller.events import Event
from controller.state import StateFolder, default_path

_DEFAULT_ARENA = "1GiB"
_GATEWAYS_MOST = 64  # gateway i adds i to both ports: this far apart they never meet


def up(
    model: o.Model = None,
    config_file: o.ConfigFile = None,
    gateways: o.Gateways = None,
    dense: o.Dense = None,
    attention: o.Attention = None,
    arena: o.Arena = None,
    dtype: o.Dtype = None,
    port: o.Port = None,
    http_port: o.HttpPort = None,
    host: o.Host = None,
    ray_address: o.RayAddress = None,
    insecure: o.Insecure = False,
    emulate: o.Emulate = None,
    model_shape: o.ModelShape = "llama3-70b",
    dilation: o.Dilation = 40.0,
    settings: o.Settings = None,
) -> None:
    """Start a cluster and show it until Ctrl-C, which drains and stops it.

    \b
    anabranch up                              one dense, two attention workers
    anabranch up --attention 3 --arena 2GiB   three attention workers
    anabranch up --attention 0                all in the dense worker
    anabranch up --model ~/models/Qwen3-0.6B  any Hugging Face folder
    anabranch up --set dense.step_tokens=512  any key that `anabranch config` shows
    anabranch up --emulate h100x2,h20x4       processes that keep the time of such devices, 40 times slower;
                                              `anabranch loadgen run` divides it again
    """
    flags = {
        "gateway.replicas": gateways,
        "dense.replicas": dense,
        "attention.replicas": attention,
        "model.path": model,
        "model.dtype": dtype,
        "gateway.port": port,
        "gateway.http_port": http_port,
        "ray.address": ray_address,
        "security.insecure": insecure or None,
        **{f"{section}.host": host for section in ("controller", "gateway", "dense", "attention")},
    }
    overrides = {key: value for key, value in flags.items() if value is not None}
    overrides |= parse_settings(settings or [])
    if emulate is not None:
        cluster = emulating.cluster_of(emulate, model_shape)
        overrides = emulating.overrides(cluster, dilation, default_path() / "emulated-model") | overrides
    config = resolve_model(compose(config_file, overrides, arena))
    require_servable(config)
    logs = StateFolder.of(config).logs
    logged = emulating.log_sizes(logs)
    status = run(config)
    if emulate is not None:
        for kept in emulating.report(logs, config.dense.replicas, config.attention.replicas, logged):
            print(kept)
    raise typer.Exit(status)


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """`["dense.threads=2"]` to `{"dense.threads": 2}`; values are YAML. Raises ConfigError."""
    parsed: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not (key and equals):
            raise ConfigError(f"--set {setting}: key=value is expected, for example dense.threads=2")
        try:
            parsed[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            problem = getattr(error, "problem", None) or "it cannot be parsed"
            raise ConfigError(f"--set {setting}: the value is not YAML: {problem}") from error
    return parsed


def compose(config_file: Path | None, overrides: dict[str, Any], arena: str | None) -> Config:
    """File, flags and what follows from them: where the cache lies, and ports that do not meet."""
    replicas = overrides.pop("attention.replicas", None)
    config = configuration.load(config_file, overrides)
    if replicas is None:
        replicas = config.attention.replicas
    overrides["attention.replicas"] = replicas
    if replicas == 0:
        if arena is not None or config.dense.local_arena == 0:
            overrides["dense.local_arena"] = arena or _DEFAULT_ARENA
    elif arena is not None:
        overrides["attention.arena"] = arena
    gateway = config.gateway
    if gateway.replicas > 1 and gateway.port and "http_port" not in gateway.model_fields_set:
        overrides["gateway.http_port"] = gateway.port + _GATEWAYS_MOST
    return configuration.load(config_file, overrides)


def resolve_model(config: Config) -> Config:
    """The same with `model.path` a folder and `model.name` a name.

    Raises ModelError, which says how to fetch the model if it is not here.
    """
    folder = model_store.resolve(config.model.path).absolute()
    named = config.model.model_copy(update={"path": str(folder), "name": config.model.name or folder.name})
    return config.model_copy(update={"model": named})


def run(config: Config, command: roles.Command = roles.module_command) -> int:
    """Run a cluster in this process until told to stop; returns the exit status.

    `command` replaces what the slots run. Raises what `Controller.run` raises.
    """
    # Here, not above: importing Ray takes half a second that `--help` need not take.
    from controller.controller import Controller

    state = StateFolder.of(config)
    state.prepare()
    _log_to_file(config, state.logs)
    log = LogObserver(logger("controller"))
    controller = Controller(config, command)
    stop = threading.Event()
    view = LiveView(Console(stderr=True), f"Anabranch: {config.model.name}", controller.fleet)

    def observe(event: Event) -> None:
        log(event)
        view(event)

    with Interrupts(stop.set, lambda _number: controller.hurry()), view:
        return controller.run(stop, observe)


def _log_to_file(config: Config, folder: Path) -> None:
    """The terminal belongs to the view."""
    configure_logging(config.telemetry, role="controller", worker="controller-0")
    for handler in logging.getLogger("anabranch").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream((folder / "controller.log").open("a"))
