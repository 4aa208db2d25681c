"""What a cluster that starts or stops is waiting for, in words."""

from __future__ import annotations

import re
from pathlib import Path

from controller.events import ClusterReady, Event, Opened, SlotChanged, Stopping
from controller.slots import Phase, Slot

_SETTLED = (Phase.READY, Phase.STOPPED, Phase.GIVEN_UP)
_LOADED = re.compile(r'loading_weights.*done_bytes"?[:=] ?(\d+).*total_bytes"?[:=] ?(\d+)')
_TAIL_BYTES = 4096


class Awaited:
    """Follows a cluster's events; a `controller.Observer`. `words` may be asked for on any thread."""

    def __init__(self) -> None:
        self._slots: dict[str, Slot] = {}
        self._is_open = False
        self._was_ready = False
        self._stops = False

    def __call__(self, event: Event) -> None:
        """See `controller.Observer`."""
        match event:
            case Opened():
                self._is_open = True
            case SlotChanged(slot):
                self._slots[slot.worker_id] = slot
            case ClusterReady():
                self._was_ready = True
            case Stopping():
                self._stops = True

    def words(self) -> str:
        """For example `dense-0 starting (40 % of the weights are loaded)`; empty where all is well."""
        if not self._is_open:
            return "starting Ray"
        unsettled = [slot for slot in tuple(self._slots.values()) if slot.phase not in _SETTLED]
        if unsettled:
            return ", ".join(_words(slot) for slot in unsettled)
        return "stopping Ray" if self._stops else "" if self._was_ready else "placing the processes"


def _words(slot: Slot) -> str:
    words = f"{slot.worker_id} {slot.phase.value}"
    loaded = weights_loaded(Path(slot.log_file)) if slot.phase is Phase.STARTING and slot.log_file else None
    return words if loaded is None else f"{words} ({loaded:.0%} of the weights loaded)"


def weights_loaded(log_file: Path) -> float | None:
    """The share a dense worker's log last spoke of; None where it does not, or lies on another machine."""
    try:
        with log_file.open("rb") as log:
            log.seek(max(0, log_file.stat().st_size - _TAIL_BYTES))
            found = _LOADED.findall(log.read().decode(errors="replace"))
    except OSError:
        return None
    return int(found[-1][0]) / max(1, int(found[-1][1])) if found else None
