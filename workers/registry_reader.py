"""What the registry says of the cluster while the controller does not answer."""

from __future__ import annotations

from anabranch.v1 import control_pb2
from anabranch.wire import agreement, registration
from cluster.config import Config
from cluster.errors import AnabranchError
from cluster.registry.interface import Registry, RegistryView
from cluster.registry.opening import open_registry
from cluster.telemetry import logger

_log = logger("registry")


class RegistryReader:
    """Reads a shared registry; where none is configured it has nothing to say. For one thread.

    Raises ConfigError when it is made, as `open_registry`.
    """

    def __init__(self, config: Config) -> None:
        self._registry: Registry | None = None
        if config.registry.url is not None:
            self._registry = open_registry(config.registry)
        self._agreement = agreement(config.digest)
        self._problem = ""
        self.controller = ""
        """host:port of the controller that wrote last; empty while unknown."""

    def look(self, known_version: int) -> control_pb2.RegisterResponse | None:
        """The welcome a controller would give, with the membership as it wrote it last; None when that is
        no newer than `known_version`, or nothing usable is there. Waits no longer than a few deadlines.
        """
        if self._registry is None:
            return None
        try:
            return self._welcome(self._registry.read(), known_version)
        except AnabranchError as error:
            self._complain(error.message)
            return None

    def close(self) -> None:
        """Let the connections go. Idempotent."""
        if self._registry is not None:
            self._registry.close()

    def _welcome(self, view: RegistryView, known_version: int) -> control_pb2.RegisterResponse | None:
        controller = view.controller
        if controller is None or not view.members:
            self._complain("the registry knows of no cluster")
            return None
        if controller.agreement != self._agreement:
            self._complain(f"it serves {controller.agreement}, this process {self._agreement}")
            return None
        self._problem = ""
        self.controller = controller.address
        if view.version <= known_version:
            return None
        welcome = control_pb2.RegisterResponse.FromString(controller.welcome)
        welcome.membership.version = view.version
        welcome.membership.members.extend(registration(record.body).member for record in view.members)
        return welcome

    def _complain(self, problem: str) -> None:
        """Once per problem."""
        if problem != self._problem:
            _log.warning("registry_not_used", problem=problem)
        self._problem = problem
