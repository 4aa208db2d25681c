"""An attention worker of `anabranch bench step` and the long benches: a real one, in a process of its own.

    python -m anabranch.cli.bench.step_attention SETTINGS

SETTINGS is the JSON of `StepSettings`. Prints its gRPC port, and ends when its standard input does.
"""

from __future__ import annotations

import sys

import torch

from anabranch.cli.bench.step_settings import ATTENTION_EPOCH, StepSettings
from cluster.model_spec import ModelSpec
from workers.attention.worker import AttentionWorker
from workers.cores import keep_to, spin_s


def main(settings: StepSettings) -> None:
    """Serve until the parent closes our standard input."""
    keep_to(settings.attention_cores)
    torch.set_num_threads(len(settings.attention_cores))
    config = settings.config()
    spins_s = spin_s(config, "attention", is_pinned=True)
    worker = AttentionWorker(config, settings.attention_worker, ATTENTION_EPOCH, spins_s)
    try:
        spec = ModelSpec.from_folder(settings.model)
        worker.start(spec.geometry(config.model.dtype, config.attention.block_tokens))
        print(worker.port, flush=True)
        sys.stdin.read()
    finally:
        worker.stop()


if __name__ == "__main__":
    main(StepSettings.from_json(sys.argv[1]))
