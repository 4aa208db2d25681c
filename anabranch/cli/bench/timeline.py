"""What happened when during a step, as spans, and their picture."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from time import monotonic
from typing import Any

from cluster.errors import ConfigError
from workers.lanes.messages import Lane, LayerMessage, PartialReply

Span = dict[str, Any]
"""side (lane or attention), micro_batch, layer, begin_s, end_s; seconds of the dense process's clock."""

_COLORS = ("tab:blue", "tab:orange")
_ROWS = ("dense", "lane", "attention")


@dataclass
class Trace:
    """Spans of the newest steps."""

    _steps: list[list[Span]] = field(default_factory=lambda: [[]])
    _kept: int = 4

    def add(self, side: str, micro_batch: int, layer: int, begin_s: float, end_s: float) -> None:
        """A span of the present step."""
        self._steps[-1].append(
            {"side": side, "micro_batch": micro_batch, "layer": layer, "begin_s": begin_s, "end_s": end_s}
        )

    def end_step(self) -> None:
        """What comes belongs to another step."""
        self._steps = [*self._steps[-self._kept :], []]

    def last_steps(self, count: int) -> list[Span]:
        """Spans of the last whole steps."""
        return [span for step in self._steps[:-1][-count:] for span in step]


class TracedLane:
    """A lane that notes its spans. Attention's are computed: the worker serves messages in order, so it
    begins one when the message is there and the one before is done, and takes the seconds its reply tells.
    """

    def __init__(self, lane: Lane, trace: Trace) -> None:
        self._lane = lane
        self._trace = trace
        self._sent_s: dict[int, float] = {}
        self._free_s = 0.0

    def send(self, message: LayerMessage) -> None:
        """See `Lane`."""
        begin_s = monotonic()
        self._lane.send(message)
        end_s = self._sent_s[message.micro_batch] = monotonic()
        self._trace.add("lane", message.micro_batch, message.layer, begin_s, end_s)

    def receive(self, step: int, micro_batch: int, layer: int, deadline_s: float) -> PartialReply:
        """See `Lane`."""
        begin_s = monotonic()
        reply = self._lane.receive(step, micro_batch, layer, deadline_s)
        end_s = monotonic()
        self._trace.add("waiting", micro_batch, layer, begin_s, end_s)
        attending_s = max(self._sent_s[micro_batch], self._free_s)
        self._free_s = min(end_s, attending_s + reply.compute_seconds)
        self._trace.add("attention", micro_batch, layer, attending_s, self._free_s)
        return reply

    def shut_down(self) -> None:
        """See `Lane`."""
        self._lane.shut_down()

    def close(self) -> None:
        """See `Lane`."""
        self._lane.close()


def require_plotting() -> None:
    """Before anything is measured. Raises ConfigError without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install matplotlib")


def draw(spans: Sequence[Span], path: Path, title: str) -> None:
    """A picture of the spans; dense work is what lies between them. Raises ConfigError without matplotlib."""
    require_plotting()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    begin_s = min(span["begin_s"] for span in spans)
    figure = Figure(figsize=(16, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for span in [*spans, *_dense(spans)]:
        if span["side"] in _ROWS:
            place = 1000 * (span["begin_s"] - begin_s), 1000 * (span["end_s"] - span["begin_s"])
            row = len(_ROWS) - 1 - _ROWS.index(span["side"])
            axes.broken_barh([place], (row - 0.4, 0.8), color=_COLORS[span["micro_batch"]], linewidth=0)
    axes.set_yticks(range(len(_ROWS)), labels=_ROWS[::-1])
    axes.set_xlabel("ms; colours are micro-batches")
    axes.set_title(title)
    axes.margins(x=0)
    figure.savefig(path, dpi=150)


def _dense(spans: Sequence[Span]) -> list[Span]:
    """What the dense side does between waits and sends belongs to the micro-batch it sends next."""
    own = sorted(
        (span for span in spans if span["side"] in ("lane", "waiting")), key=lambda span: span["begin_s"]
    )
    return [
        {
            "side": "dense",
            "micro_batch": after["micro_batch"] if after["side"] == "lane" else before["micro_batch"],
            "layer": after["layer"],
            "begin_s": before["end_s"],
            "end_s": after["begin_s"],
        }
        for before, after in pairwise(own)
    ]
