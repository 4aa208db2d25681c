"""Cost equals a hand calculation."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from anabranch.events import Timings
from cluster import hardware, prices
from cluster.errors import InvalidRequest
from cluster.hardware import Catalogue
from loadgen.cost import PARTS, Bill, Devices, busy, costs
from loadgen.metrics import Facts, Objectives, Summary, definition, summarize
from loadgen.records import Outcome, Record
from tests.loadgen.test_records import WHOLE

PRICES = """
[big]
price_per_hour_usd = 36
price_date = 2026-01-02
source = "a list"
[small]
price_per_hour_usd = 9
price_date = 2026-01-02
source = "a list"
"""


def _request(begins_s: float, *, prompt: int, output: int) -> Record:
    """In the batch for 4 s, one of prefill: its dense worker computes for half of them, attention for a
    quarter, lanes move bytes for an eighth; of those 1.5 s the dense worker waits 0.75.
    """
    return dataclasses.replace(
        WHOLE,
        turn=0,
        intended_s=begins_s,
        sent_s=begins_s,
        first_token_s=begins_s + 1,
        last_token_s=begins_s + 4,
        ended_s=begins_s + 4,
        prompt_tokens=prompt,
        output_tokens=output,
        timings=Timings(0.0, 1.0, 3.0, 2.0, 1.0, 0.5, 0.75, 0),
    )


RECORDS = [
    _request(0.0, prompt=3000, output=100),
    _request(2.0, prompt=1000, output=300),  # two in the batch from 2 to 4 s
    dataclasses.replace(
        _request(0.0, prompt=9, output=9), outcome=Outcome.FAILED, error="LATE: x", ended_s=10
    ),
]
"""Ten seconds in all, four of them empty."""

KINDS = hardware.built_in()


def _costs(
    shape: str,
    tmp_path: Path,
    objectives: str = "",
    records: list[Record] = RECORDS,
    catalogue: Catalogue = KINDS,
) -> Summary:
    (tmp_path / "prices.toml").write_text(PRICES)
    bill = Bill.parse(shape, prices.read(tmp_path / "prices.toml"), catalogue)
    facts = Facts("run", 0.0, planned=len(records), client_cpu_share=0.1)
    return costs(records, summarize(records, facts), bill, Objectives.parse(objectives))


def test_cost_by_hand(tmp_path: Path) -> None:
    """A dense device at 1 cent a second and two of attention at half a cent in all, for ten seconds: 15 cents
    for 4,400 tokens.

    Busy in the six seconds with requests: dense 1/2 of all six; attention 1/4, of one device in two for the
    four seconds with one request and of both for the two with two: 1/4 x (4/2 + 2) = 1 s; network: dense
    waits 0.75 x 0.5 / 1.5 / 4 = 1/16 of six seconds, attention 1/8 x 4 s.
    """
    found = _costs("dense=1xbig,attention=2xsmall", tmp_path)
    assert found["allocated_usd"] == pytest.approx(0.15)
    assert found["usd_per_mtok"] == pytest.approx(0.15 / 4400e-6)
    assert found["tokens_per_usd"] == pytest.approx(4400 / 0.15)
    dense, attention = 0.01 * 3, 0.005 * 1
    network = 0.01 * 6 / 16 + 0.005 * 0.5
    parts = dict(zip(PARTS, (dense, attention, network, 0.15 - dense - attention - network), strict=True))
    for part, usd in parts.items():
        assert found[f"usd_per_mtok_{part}"] == pytest.approx(usd / 4400e-6), part
    assert found["used_usd"] == pytest.approx(dense + attention + network)
    assert found["usd_per_mtok_input"] == pytest.approx(0.15 / 4 / 4000e-6)
    assert found["usd_per_mtok_output"] == pytest.approx(0.15 * 3 / 4 / 400e-6)
    assert found["used_usd_per_mtok_output"] == pytest.approx(found["used_usd"] * 3 / 4 / 400e-6)
    assert found["prices"]["small"] == "$9 an hour on 2026-01-02 (a list)"
    for key in found:
        assert definition(key)


def test_only_good_requests_count_at_the_objectives(tmp_path: Path) -> None:
    """The second has a TPOT of 3 s / 299, the first of 3 s / 99: 1,300 good tokens for the same 15 cents."""
    found = _costs("dense=1xbig,attention=2xsmall", tmp_path, "tpot:20")
    assert found["good_tokens_per_usd"] == pytest.approx(1300 / 0.15)
    assert found["usd_per_mtok_at_slo"] == pytest.approx(0.15 / 1300e-6)


def test_a_dense_device_that_attends_itself(tmp_path: Path) -> None:
    """Attention is its own time, and no money goes to the network."""
    found = _costs("dense=1xbig", tmp_path)
    shares = [found[f"usd_per_mtok_{part}"] / found["usd_per_mtok"] for part in PARTS]
    assert shares == pytest.approx([0.3, 0.15, 0.0, 0.55])


def test_devices_of_one_worker_work_together(tmp_path: Path) -> None:
    """Four that are one worker are as busy as one alone would be; four workers are not."""
    (tmp_path / "prices.toml").write_text(PRICES)
    big = prices.read(tmp_path / "prices.toml")["big"]
    whole = busy(RECORDS[:2], Bill(Devices(4, "big", big, per_worker=4), None), 0.0, 10.0)
    assert whole == busy(RECORDS[:2], Bill(Devices(1, "big", big), None), 0.0, 10.0)
    apart = busy(RECORDS[:2], Bill(Devices(4, "big", big), None), 0.0, 10.0)
    assert whole is not None
    assert apart is not None
    assert (whole.dense, apart.dense) == pytest.approx((0.3, 0.5 * (4 / 4 + 2 * 2 / 4) / 10))


def test_a_warm_up_keeps_devices_busy_and_its_tokens_do_not_count(tmp_path: Path) -> None:
    """Of a request sent before the figures count, what lies in the counted time is work all the same."""
    early = dataclasses.replace(_request(-2.0, prompt=500, output=50), warm_up=True)
    found = _costs("dense=1xbig", tmp_path, records=[early, RECORDS[1], RECORDS[2]])
    assert found["usd_per_mtok"] == pytest.approx(0.1 / 1300e-6)
    assert found["usd_per_mtok_dense"] / found["usd_per_mtok"] == pytest.approx((2 + 4) / 2 / 10)


def test_what_was_not_measured_is_not_made_up(tmp_path: Path) -> None:
    """An endpoint that tells no times has costs by allocation only, split by what the client saw."""
    blind = [dataclasses.replace(record, timings=None) for record in RECORDS]
    found = _costs("dense=1xbig", tmp_path, records=blind)
    assert found["usd_per_mtok_input"] == pytest.approx(0.1 / 4 / 4000e-6)
    assert found["used_usd"] is None
    assert found["usd_per_mtok_idle"] is None
    assert _costs("dense=1xbig", tmp_path, records=[RECORDS[2]])["usd_per_mtok"] is None


def test_energy_by_hand(tmp_path: Path) -> None:
    """A device of 700 W and two of 400 W for ten seconds and 400 output tokens."""
    found = _costs(
        "dense=1xbig,attention=2xsmall", tmp_path, catalogue={"big": KINDS["h100"], "small": KINDS["h20"]}
    )
    assert found["power_w"] == 1500
    assert found["joules_per_output_token"] == pytest.approx(37.5)


@pytest.mark.parametrize(
    "catalogue", [{"big": KINDS["h100"]}, {"big": KINDS["h100"], "small": KINDS["tpu-v6e"]}]
)
def test_energy_of_devices_whose_power_nobody_tells_is_not_made_up(
    catalogue: Catalogue, tmp_path: Path
) -> None:
    """A kind that the catalogue does not know, or knows without its power, leaves all of it unknown."""
    found = _costs("dense=1xbig,attention=1xsmall", tmp_path, catalogue=catalogue)
    assert found["allocated_usd"] > 0
    assert (found["power_w"], found["joules_per_output_token"]) == (None, None)
    assert _costs("dense=1xbig", tmp_path, records=[RECORDS[2]], catalogue=catalogue)["power_w"] == 700


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ("dense=big", "no part of a shape"),
        ("dense=0xbig", "no part of a shape"),
        ("dense=1xbig,dense=1xbig", "no part of a shape"),
        ("attention=1xbig", "no dense devices"),
        ("dense=1xhuge", "no price of 'huge', only of big, small"),
    ],
)
def test_a_shape_that_is_none_is_refused(shape: str, words: str, tmp_path: Path) -> None:
    """With what would be one."""
    with pytest.raises(InvalidRequest, match=words):
        _costs(shape, tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (PRICES.replace("36", "-1", 1), "big.price_per_hour_usd"),
        (PRICES.replace('source = "a list"', "", 1), "big.source"),
        (PRICES.replace("price_date = 2026-01-02", "", 1), "big.price_date"),
        ("[big", "holds no prices"),
    ],
)
def test_a_price_has_a_date_and_a_source(text: str, words: str, tmp_path: Path) -> None:
    """Or the file is refused, with the key."""
    (tmp_path / "prices.toml").write_text(text)
    with pytest.raises(InvalidRequest, match=words):
        prices.read(tmp_path / "prices.toml")


def test_the_catalogues_prices_are_dated() -> None:
    """The papers' devices at the papers' prices."""
    known = prices.known(hardware.built_in(), None)
    assert (known["h100"].price_per_hour_usd, known["h20"].price_per_hour_usd) == (11.06, 4.63)
    assert all(price.source for price in known.values())
