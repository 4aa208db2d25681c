"""`python -m controller.autoscaling`: the autoscaler as a process in Kubernetes."""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from cluster import config as configuration
from cluster import rpc
from cluster.errors import AnabranchError, ConfigError
from cluster.policies.autoscaler import AutoscalerPolicy, Bounds, Scaled
from cluster.signals import Interrupts
from cluster.telemetry import configure_logging
from controller.autoscaling.loop import Autoscaler, Settings
from controller.autoscaling.pool_watch import PoolWatch

_EPILOG = """\
Without --apply nothing is changed: what would be is logged (would_resize). Rights needed: get and patch
of statefulsets/scale and list and watch of statefulsets, of the two sets alone; or get, patch, list and
watch of the RayCluster. A worker that leaves is named in the log, drains, and is waited for; meanwhile
nothing else changes.

python -m controller.autoscaling --config FILE --controller HOST:8600 \\
    --stateful-sets river-anabranch --attention 2:16 --dense 1:4 --apply
"""
_ROLES: tuple[Scaled, ...] = ("attention", "dense")


def main(argv: Sequence[str] | None = None) -> int:
    """Run until told to stop; 2 where something is given wrongly, or the extra `kubernetes` is missing."""
    arguments = _parser().parse_args(argv)
    try:
        config = configuration.load(arguments.config)
        configure_logging(config.telemetry, role="autoscaler", worker="autoscaler-0")
        stop = threading.Event()
        with (
            rpc.channel(arguments.controller, config.security.tls) as channel,
            Interrupts(stop.set, lambda number: os._exit(128 + number)),
        ):
            _autoscaler(arguments, PoolWatch(channel)).run(stop)
    except AnabranchError as error:
        sys.stderr.write(f"autoscaler: {error.message}\n")
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def _parser() -> argparse.ArgumentParser:
    policy = AutoscalerPolicy()
    parser = argparse.ArgumentParser(
        prog="python -m controller.autoscaling",
        description="Change how many attention and dense workers there are, by the load of the pool.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", type=Path, required=True, help="the cluster's YAML file")
    parser.add_argument("--controller", metavar="HOST:PORT", required=True, help="where the controller is")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--stateful-sets", metavar="NAME", help="scale the StatefulSets NAME-attention, NAME-dense"
    )
    where.add_argument("--ray-cluster", metavar="NAME", help="scale worker groups of this RayCluster")
    for role in _ROLES:
        parser.add_argument(
            f"--{role}", metavar="LEAST:MOST", type=_bounds, help=f"{role} workers; default: as is"
        )
    parser.add_argument("--apply", action="store_true", help="change, not only say what would be changed")
    for name, default, text in (
        ("pool-share", policy.pool_share, "share of the KV pool in use that is aimed at"),
        ("busy-share", policy.busy_share, "share of dense workers' time that is aimed at"),
        ("cool-down-s", policy.cool_down_s, "seconds a role is left alone after a change"),
    ):
        parser.add_argument(
            f"--{name}", metavar="X", type=float, default=default, help=f"{text} (%(default)s)"
        )
    return parser


def _bounds(text: str) -> Bounds:
    least, _, most = text.partition(":")
    if not (least.isdecimal() and most.isdecimal() and 1 <= int(least) <= int(most)):
        raise argparse.ArgumentTypeError(f"{text!r} is not LEAST:MOST, as in 2:16")
    return Bounds(int(least), int(most))


def _autoscaler(arguments: argparse.Namespace, pool: PoolWatch) -> Autoscaler:
    try:
        from kubernetes import client
        from kubernetes import config as credentials

        # Here, not above: only this process needs the extra.
        from controller.autoscaling.workloads import RayWorkerGroups, StatefulSets, Workloads
    except ImportError as error:
        raise ConfigError("the autoscaler needs the extra: pip install 'anabranch[kubernetes]'") from error
    try:
        credentials.load_incluster_config()
    except credentials.ConfigException as error:
        raise ConfigError(f"the autoscaler runs in a pod with a service account: {error}") from error
    bounds = {role: found for role in _ROLES if (found := getattr(arguments, role)) is not None}
    policy = AutoscalerPolicy(arguments.pool_share, arguments.busy_share, cool_down_s=arguments.cool_down_s)
    namespace = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace").read_text().strip()
    workloads: Workloads
    if arguments.ray_cluster:
        workloads = RayWorkerGroups(client.ApiClient(), namespace, arguments.ray_cluster)
    else:
        names = {role: f"{arguments.stateful_sets}-{role}" for role in _ROLES}
        workloads = StatefulSets(client.ApiClient(), namespace, names)
    return Autoscaler(Settings(bounds, policy, applies=arguments.apply), pool, workloads)


if __name__ == "__main__":
    sys.exit(main())
