"""What a role would refuse after half a minute, refused before anything starts."""

from __future__ import annotations

from pathlib import Path

from cluster import hardware, prices
from cluster.config import Config
from cluster.model_spec import ModelSpec
from cluster.weight_files import read_stored_tensors
from cluster.weight_shapes import require_shapes


def require_servable(config: Config) -> None:
    """Read configuration, tokenizer and the headers of the weights, as gateway and dense worker will, and the
    hardware catalogue, as the controller will when Ray has started.

    Raises ModelError naming the file or tensor at fault, ConfigError for a catalogue that cannot be used or a
    length the model does not serve, InvalidRequest for a device without a price.
    """
    hardware.of(config.placement)
    prices.in_force(config.telemetry.cost, config.placement)
    # Here, not above: tokenizers take a moment to import, which `--help` need not wait for.
    from workers.gateway.served_model import ServedModel

    folder = Path(config.model.path)
    require_shapes(folder, ModelSpec.from_folder(folder), read_stored_tensors(folder))
    ServedModel.load(config)
