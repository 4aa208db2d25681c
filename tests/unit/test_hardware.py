"""The hardware catalogue: figures, ranks, and files that cannot be used."""

from pathlib import Path

import pytest

from cluster.errors import ConfigError
from cluster.hardware import CPU_CLASS, load_catalogue


def test_the_catalogue_holds_the_papers_figures() -> None:
    """H100 and H20 as Lamina's table has them."""
    classes = load_catalogue().classes
    assert (classes["H100"].bf16_tflops, classes["H100"].bandwidth_gb_s, classes["H100"].price_usd_h) == (
        989,
        3350,
        11.06,
    )
    assert (classes["H20"].bf16_tflops, classes["H20"].bandwidth_gb_s, classes["H20"].price_usd_h) == (
        148,
        4000,
        4.63,
    )


def test_compute_and_memory_rank_differently() -> None:
    """An H100 is the better dense device and an H20 the better attention device: why the two are split."""
    catalogue = load_catalogue()
    dense, attention = catalogue.dense_rank(), catalogue.attention_rank()
    assert dense.index("H100") < dense.index("H20")
    assert attention.index("H20") < attention.index("H100")


def test_an_unknown_accelerator_is_an_ordinary_node() -> None:
    """A type nobody described counts as no accelerator."""
    catalogue = load_catalogue()
    assert catalogue.class_of("H20") == "H20"
    assert catalogue.class_of("Z9000") == catalogue.class_of(None) == CPU_CLASS


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[x]\nbf16_tflops = 1\n", "x|memory_gb"),
        ("[x\n", "cannot be read"),
        ("[x]\nspeed = 1\n", "speed|bf16_tflops"),
    ],
)
def test_a_catalogue_that_cannot_be_used_names_what_is_wrong(tmp_path: Path, text: str, named: str) -> None:
    """File and key are in the message."""
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=named):
        load_catalogue(path)


def test_an_unknown_class_is_refused_with_the_known_ones() -> None:
    """`placement.dense_classes` is checked against the catalogue."""
    with pytest.raises(ConfigError, match="H100"):
        load_catalogue().require(("H1000",))
