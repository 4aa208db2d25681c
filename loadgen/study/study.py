"""What a study asks, read from its file (`example.toml` shows one). Pure, but for reading it.

    part: a model under a load, in some ways  >  case: a cluster  >  way: real, emulated, simulated  >  seed

Cases of a part are compared with its first one, and ways of a case with each other.
"""

from __future__ import annotations

import tomllib
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from cluster.errors import InvalidRequest
from cluster.hardware import Catalogue
from loadgen.scenario import Scenario
from loadgen.simulation import models
from loadgen.simulation.machines import Efficiencies, Shape, parse_side
from loadgen.simulation.steps import Switches


class Way(StrEnum):
    """How a case is measured."""

    REAL = "real"
    """By processes of this machine, a core for each role where there are enough."""
    EMULATED = "emulated"
    """By processes that keep the time of devices that are not here."""
    SIMULATED = "simulated"
    """On a virtual clock; beside a real way calibrated by parts, else by what the catalogue says."""


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Load(_Table):
    """A scenario, as far as a study varies it (`loadgen.scenario.Scenario`). Times are seconds."""

    concurrency: int | None = Field(None, ge=1)
    rate: float | None = Field(None, gt=0)
    requests: int | None = Field(None, ge=1)
    duration_s: float | None = Field(None, gt=0)
    warm_up_s: float = Field(0.0, ge=0)
    workload: str = ""
    context: int | None = Field(None, ge=2)
    prompt: str = "512"
    output: str = "128"
    turns: int = Field(1, ge=1)
    think_s: float = Field(0.0, ge=0)
    rows: tuple[tuple[int, int], ...] = ()
    """(prompt, output) tokens of the requests in their order, again from the first when they are used up."""

    def scenario(self, seed: int, rows_file: Path) -> Scenario:
        """Under a seed; rows are written into a file, where a scenario reads them from."""
        if self.rows:
            rows_file.write_text("".join(f"{prompt},{output}\n" for prompt, output in self.rows), "utf-8")
        return Scenario(
            seed=seed,
            concurrency=() if self.concurrency is None else (self.concurrency,),
            rate=self.rate,
            requests=self.requests,
            duration_s=self.duration_s,
            warm_up_s=self.warm_up_s,
            workload=self.workload,
            context=self.context,
            prompt=self.prompt,
            output=self.output,
            turns=self.turns,
            think_s=self.think_s,
            trace_file=rows_file if self.rows else None,
        )


class Case(_Table):
    """A cluster: devices by their kinds, as for `loadgen simulate`. A real one has an attention worker for
    each device of `attention`.
    """

    name: str
    dense: str
    attention: str = ""
    dense_workers: int = Field(1, ge=1)
    settings: dict[str, Any] = {}
    """Of the configuration, by key."""
    overlap: bool = True
    """Whether keys and values travel while old tokens are attended to."""
    efficiency: str = ""
    """As for `--efficiency`: shares of what devices reach, and the lanes' round trip."""
    arena_tokens: int | None = Field(None, ge=1)
    """Of each arena at most; None: what the devices hold."""

    def shape(self, catalogue: Catalogue) -> Shape:
        """Its devices. Raises InvalidRequest for kinds that are not in the catalogue."""
        attention = parse_side(self.attention, catalogue) if self.attention else None
        return Shape(parse_side(self.dense, catalogue), attention, self.dense_workers)

    @property
    def efficiencies(self) -> Efficiencies:
        """Raises InvalidRequest for wrong ones."""
        return Efficiencies.parse(self.efficiency)

    @property
    def switches(self) -> Switches:
        """What is left out; two micro-batches are a setting: `dense.micro_batches`."""
        return Switches(overlaps=self.overlap)


class Part(_Table):
    """Cases under one load."""

    title: str
    words: str = ""
    ways: tuple[Way, ...] = Field(min_length=1)
    model: str
    """Of real clusters a folder or a name of `anabranch model list`, else one of `simulate --model`."""
    dilation: float = Field(40.0, ge=1)
    """How many times slower emulated clusters are."""
    load: Load
    case: tuple[Case, ...] = Field(min_length=1)


class Study(_Table):
    """A whole study. Every run of it is repeated under each of the seeds."""

    seeds: tuple[int, ...] = Field((1, 2, 3), min_length=1)
    part: tuple[Part, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_are_unique(self) -> Study:
        titles = [part.title for part in self.part]
        if len(set(titles)) < len(titles):
            raise ValueError("two parts have one title")
        for part in self.part:
            names = [case.name for case in part.case]
            if len(set(names)) < len(names):
                raise ValueError(f"two cases of {part.title} have one name")
        return self

    def require_known(self, catalogue: Catalogue) -> None:
        """Raise InvalidRequest for unknown devices, models and efficiencies, and for what a way cannot obey:
        better now than when others have taken their time.
        """
        for part in self.part:
            for case in part.case:
                self._require_obeyed(part, case, case.shape(catalogue), case.efficiencies)
            if Way.REAL not in part.ways:
                models.resolve(part.model)

    def _require_obeyed(self, part: Part, case: Case, shape: Shape, reached: Efficiencies) -> None:
        where, default = f"{part.title}: {case.name}", Efficiencies()
        if Way.REAL in part.ways:
            is_told = bool(case.efficiency) or not case.overlap or case.arena_tokens is not None
            if is_told or shape.dense.devices > 1:
                raise InvalidRequest(
                    f"{where}: real clusters take one device a dense worker, and neither overlap, efficiency "
                    "nor arena_tokens: say what they are to do in settings"
                )
        elif Way.EMULATED in part.ways and (reached.step_s, reached.call_s) != (
            default.step_s,
            default.call_s,
        ):
            raise InvalidRequest(f"{where}: emulated clusters take their own step_s and call_s")


def read(path: Path) -> Study:
    """A study's file. Raises InvalidRequest, which says where it is wrong."""
    try:
        return Study.model_validate(tomllib.loads(path.read_text("utf-8")))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise InvalidRequest(f"{path} is no study: {error}") from error
    except ValidationError as error:
        places = "; ".join(": ".join(filter(None, _told(wrong))) for wrong in error.errors())
        raise InvalidRequest(f"{path} is no study: {places}") from error


def _told(wrong: ErrorDetails) -> tuple[str, str]:
    """Where, and what."""
    return ".".join(map(str, wrong["loc"])), wrong["msg"].removeprefix("Value error, ")
