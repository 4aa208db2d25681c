"""The catalogue: complete, sourced, and ranked by what each side pays for."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import ConfigError
from cluster.hardware import attention_rank, built_in, class_of, dense_rank, load, parse, require

ONE = """
[mine]
device = "cuda"
accelerator_types = ["X1"]
flops_per_s = 1e12
memory_bytes = 1e9
bandwidth_bytes_per_s = 1e12
price_per_hour_usd = 2.0
price_date = 2025-01-01
[mine.sources]
flops_per_s = "a"
memory_bytes = "a"
bandwidth_bytes_per_s = "a"
price_per_hour_usd = "a"
"""


def test_the_built_in_catalogue_is_whole() -> None:
    """Every class that placement and the papers speak of is there, each figure with a source."""
    names = {"h100", "h20", "h200", "a100", "l40s", "l4", "t4", "tpu-v6e", "cpu-node"}
    assert set(built_in()) == names
    assert all(item.sources["price_per_hour_usd"] for item in built_in().values())


def test_the_papers_devices_have_the_papers_figures() -> None:
    """TFLOPS, GB, TB/s and price of Lamina's table."""
    figures = {
        name: (item.flops_per_s, item.memory_bytes, item.bandwidth_bytes_per_s, item.price_per_hour_usd)
        for name, item in built_in().items()
    }
    assert figures["h100"] == (989e12, 80e9, 3.35e12, 11.06)
    assert figures["h20"] == (148e12, 96e9, 4.0e12, 4.63)
    assert figures["tpu-v6e"] == (918e12, 32e9, 1.64e12, 2.70)


def test_the_sides_prefer_different_hardware() -> None:
    """An H100 computes more per dollar than an H20, an H20 reads more: the reason for two roles."""
    dense, attention = dense_rank(built_in()), attention_rank(built_in())
    assert dense.index("h100") < dense.index("h20")
    assert attention.index("h20") < attention.index("h100")
    assert (dense[0], attention[0]) == ("tpu-v6e", "h20")
    assert dense[-1] == "cpu-node"


def test_a_node_is_classed_by_its_accelerator() -> None:
    """Ray's names find the class whatever their case; no accelerator is a CPU node; unknown is none."""
    found = [class_of(names, built_in()) for names in (["H20"], ["tpu-v6e"], [])]
    assert [item.name for item in found if item] == ["h20", "tpu-v6e", "cpu-node"]
    assert class_of(["GB999"], built_in()) is None


def test_an_own_catalogue_replaces_the_built_in_one(tmp_path: Path) -> None:
    """placement.hardware names a file; figures nobody publishes may be left out."""
    path = tmp_path / "hardware.toml"
    path.write_text(ONE)
    catalogue = load(str(path))
    assert list(catalogue) == ["mine"]
    assert catalogue["mine"].power_watts is None
    assert load(None) is built_in()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (ONE.replace("1e12\nmemory", "-1\nmemory"), "mine.flops_per_s"),
        (ONE.replace('memory_bytes = "a"\n', ""), "sources must name exactly"),
        (ONE.replace("price_per_hour_usd = 2.0", "prize = 2.0"), "mine.prize"),
        ("mine = 3", "a table"),
        ("[", "here"),
        ("", "at least one"),
    ],
)
def test_a_wrong_catalogue_is_refused_by_name(text: str, complaint: str) -> None:
    """File, class and key are in the message."""
    with pytest.raises(ConfigError, match=complaint):
        parse(text, "here")


def test_a_missing_catalogue_is_refused(tmp_path: Path) -> None:
    """The key and the path are in the message."""
    with pytest.raises(ConfigError, match=r"placement\.hardware.*none\.toml"):
        load(str(tmp_path / "none.toml"))


def test_an_unknown_class_is_refused_with_the_known_ones() -> None:
    """Names of the catalogue and of Ray pass, in any case; a typing error does not."""
    require(("h100", "H20", "A100-80g"), built_in())
    with pytest.raises(ConfigError, match="called h1000; there are h100"):
        require(("h1000",), built_in())
