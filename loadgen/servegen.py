"""ServeGen's client models (Xiang et al., arXiv 2505.09999): each client its own renewal process and lengths.

`chunk-N-trace.csv` gives, for each ten minutes: time, rate, coefficient of variation, pattern (Gamma,
Weibull, or none where the client is idle) and the pattern's shape and scale. `chunk-N-dataset.json` gives,
for each six hours, histograms of input and output lengths. The scale is not used: the rate says it.
"""

from __future__ import annotations

import csv
import json
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cluster.errors import InvalidRequest
from loadgen.arrivals import Arrivals, Gamma, Limit, Weibull
from loadgen.lengths import Histogram
from loadgen.workload import Row, stream

_MEMBER = re.compile(r"(?:^|/)chunk-(\d+)-(trace\.csv|dataset\.json)$")


@dataclass(frozen=True, slots=True)
class Window:
    """Ten minutes of one client."""

    begins_s: float
    rate: float
    cv: float
    pattern: str
    shape: float


@dataclass(frozen=True, slots=True)
class ClientModel:
    """One client. `datasets` are the texts of its histograms by the second at which they begin: they are
    large, and only those that are needed are read.
    """

    number: int
    windows: tuple[Window, ...]
    datasets: Mapping[int, Mapping[str, str]]


def is_servegen(path: Path) -> bool:
    """Whether a path looks like these models: a folder, or an archive."""
    return path.is_dir() or path.name.endswith((".tar.gz", ".tgz"))


def read(path: Path) -> list[ClientModel]:
    """The clients of a folder or archive. Raises InvalidRequest where there are none."""
    traces: dict[int, str] = {}
    datasets: dict[int, str] = {}
    try:
        for name, text in _members(path):
            if found := _MEMBER.search(name):
                (traces if found[2] == "trace.csv" else datasets)[int(found[1])] = text
    except (OSError, tarfile.TarError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path} cannot be read: {error}") from error
    if not traces:
        raise InvalidRequest(f"{path} holds no chunk-N-trace.csv, as ServeGen's models do")
    try:
        return [_client(number, traces[number], datasets[number]) for number in sorted(traces)]
    except (KeyError, ValueError) as error:
        raise InvalidRequest(f"{path}: not as ServeGen writes its models: {error!r}") from error


def draw(
    clients: list[ClientModel], seed: int, begins_s: float, duration_s: float, rate: float | None
) -> list[Row]:
    """Requests of `duration_s` seconds from `begins_s` of the recorded day on, in the order of their times.

    `rate`: requests per second of all clients together, on average; None: as recorded.
    """
    ends_s = begins_s + duration_s
    recorded = sum(
        window.rate * max(0.0, min(end_s, ends_s) - max(window.begins_s, begins_s)) / duration_s
        for client in clients
        for window, end_s in _ended(client.windows)
    )
    if not recorded:
        raise InvalidRequest(f"no client of this trace is active from {begins_s:g} s to {ends_s:g} s")
    factor = 1.0 if rate is None else rate / recorded
    rows = [row for client in clients for row in _rows(client, seed, begins_s, ends_s, factor)]
    return sorted(rows, key=lambda row: (row.at_s, row.tenant))


def _rows(client: ClientModel, seed: int, begins_s: float, ends_s: float, factor: float) -> Iterator[Row]:
    random = stream(seed, f"client {client.number}")
    for window, end_s in _ended(client.windows):
        first_s, last_s = max(window.begins_s, begins_s), min(end_s, ends_s)
        if last_s <= first_s or not window.rate or not window.pattern:
            continue
        limit = Limit(duration_s=last_s - first_s)
        times_s = _arrivals(window, window.rate * factor).times_s(random, limit)
        if not len(times_s):
            continue
        texts = client.datasets[max(key for key in client.datasets if key <= window.begins_s)]
        prompts = _histogram(texts["input_tokens"]).draw(random, len(times_s))
        outputs = _histogram(texts["output_tokens"]).draw(random, len(times_s))
        for at_s, prompt, output in zip(times_s, prompts, outputs, strict=True):
            yield Row(int(prompt), int(output), float(first_s - begins_s + at_s), f"client-{client.number}")


def _arrivals(window: Window, rate: float) -> Arrivals:
    return Gamma(rate, window.cv) if window.pattern == "Gamma" else Weibull(rate, window.shape)


def _ended(windows: tuple[Window, ...]) -> Iterator[tuple[Window, float]]:
    """Each window with its end; the last one is as long as the one before."""
    for place, window in enumerate(windows):
        if place + 1 < len(windows):
            yield window, windows[place + 1].begins_s
        elif place:
            yield window, 2 * window.begins_s - windows[place - 1].begins_s


def _members(path: Path) -> Iterator[tuple[str, str]]:
    if path.is_dir():
        for file in sorted(path.rglob("chunk-*")):
            yield str(file), file.read_text("utf-8")
        return
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile() and (content := archive.extractfile(member)):
                yield member.name, content.read().decode("utf-8")


def _client(number: int, trace: str, dataset: str) -> ClientModel:
    windows = tuple(
        Window(float(begins_s), float(rate), float(cv), pattern, float(shape))
        for begins_s, rate, cv, pattern, shape, _scale in csv.reader(trace.splitlines())
    )
    return ClientModel(number, windows, {int(key): value for key, value in json.loads(dataset).items()})


def _histogram(text: str) -> Histogram:
    """`{45: 0.0096, 46: 0.0117}`, which is no JSON."""
    numbers = np.array(text.strip("{} ").replace(":", ",").split(","), dtype=np.float64).reshape(-1, 2)
    return Histogram(numbers[:, 0].astype(int).tolist(), numbers[:, 1].tolist())
