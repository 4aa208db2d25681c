"""One of the dense workers of `anabranch loadgen check` that share a core: what asking takes of it.

    python -m anabranch.cli.bench.calibration_turns SETTINGS

SETTINGS is the JSON of `StepSettings`, with an attention port. Prints an empty object when ready, and answers
each line it is told with one of JSON: READ with the seconds of reading all layers' weights; ASK with
[[rows, seconds], ...], all that this thread computes in steps of so many rows that read the weights before
each layer. Two that are told ASK at once take the core from each other at every layer, as dense workers do.
"""

from __future__ import annotations

import json
import sys

from anabranch.cli.bench.calibration_attention import attention_parts
from anabranch.cli.bench.step_settings import StepSettings

READ = "read"
ASK = "ask"

_ROWS = (1, 4, 16, 64, 256)
_CACHED = 512
_STEPS = 24


def main(settings: StepSettings) -> None:
    """Answer until the parent closes our standard input."""
    with attention_parts(settings) as parts:
        print("{}", flush=True)
        for line in sys.stdin:
            if line.strip() == READ:
                told: object = parts.read_s()
            else:
                told = [(rows, parts.steps(1, rows, _CACHED, _STEPS)[-1]) for rows in _ROWS]
            print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main(StepSettings.from_json(sys.argv[1]))
