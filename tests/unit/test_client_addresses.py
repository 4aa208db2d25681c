"""What becomes of a name: when it is looked up, what holds meanwhile, and which connections go."""

import socket
import threading

import pytest

from anabranch.addresses import Addresses, Gateway, doubt, system_addresses
from anabranch.channels import Channels
from cluster.clock import ManualClock
from cluster.errors import InvalidRequest, Unavailable

NAME = "dns:///gateways.test:8650"
PATIENCE_S = 10.0


class Names:
    """A name server whose answer a test may change."""

    def __init__(self, *hosts: str) -> None:
        self.hosts = hosts
        self.asked = 0

    def resolve(self, name: str, port: int) -> list[str]:
        """The present answer; none is an error."""
        self.asked += 1
        if not self.hosts:
            raise socket.gaierror(f"{name} is not known")
        return [f"{host}:{port}" for host in self.hosts]


def _known(addresses: Addresses) -> set[str]:
    return {gateway.address for gateway in addresses.known()}


def _looked_up(addresses: Addresses) -> Unavailable | None:
    return addresses.look_up().result(PATIENCE_S)


def test_a_name_is_looked_up_again_as_it_ages() -> None:
    """Who reads what is older than some seconds starts a lookup and does not wait for it; before, none."""
    clock, names = ManualClock(), Names("10.0.0.1")
    addresses = Addresses([NAME], names.resolve, clock)
    assert addresses.first_lookup.result(PATIENCE_S) is None
    names.hosts = ("10.0.0.1", "10.0.0.2")
    clock.advance(4.9)
    assert _known(addresses) == {"10.0.0.1:8650"}
    assert names.asked == 1
    clock.advance(0.2)
    assert _known(addresses) <= {"10.0.0.1:8650", "10.0.0.2:8650"}
    addresses.look_up(age_s=1.0).result(PATIENCE_S)
    assert _known(addresses) == {"10.0.0.1:8650", "10.0.0.2:8650"}
    assert names.asked == 2


def test_what_was_found_outlives_a_failure() -> None:
    """A name server that is away takes no gateway away; that it failed is said."""
    names = Names("10.0.0.1")
    addresses = Addresses([NAME], names.resolve, ManualClock())
    assert _looked_up(addresses) is None
    names.hosts = ()
    failure = _looked_up(addresses)
    assert failure is not None
    assert "gateways.test cannot be looked up: gateways.test is not known" in failure.message
    assert _known(addresses) == {"10.0.0.1:8650"}


def test_a_name_that_was_never_found_is_left_to_grpc() -> None:
    """Which asks by itself, and whose words the caller gets."""
    addresses = Addresses([NAME], Names().resolve, ManualClock())
    assert _looked_up(addresses) is not None
    assert addresses.known() == (Gateway(NAME),)


def test_there_is_one_lookup_at_a_time() -> None:
    """While a name server does not answer nobody asks it again, and waiting for it ends in doubt."""
    answer, asked = threading.Event(), []

    def resolve(name: str, port: int) -> list[str]:
        asked.append(name)
        assert answer.wait(PATIENCE_S)
        return ["10.0.0.1:8650"]

    addresses = Addresses([NAME], resolve, ManualClock())
    lookup = addresses.look_up()
    said = doubt(lookup)
    assert said is not None
    assert "no name server answered" in said.message
    assert addresses.look_up() is lookup
    answer.set()
    assert lookup.result(PATIENCE_S) is None
    assert asked == ["gateways.test"]


def test_addresses_keep_their_turns() -> None:
    """The order of a name's answer changes from lookup to lookup, that of the gateways does not; each client
    has its own. What is given as host:port is never looked up.
    """
    hosts = tuple(f"10.0.0.{number}" for number in range(8))
    names = Names(*hosts)
    addresses = Addresses(["other:1", NAME], names.resolve, ManualClock())
    assert _looked_up(addresses) is None
    first = addresses.known()
    names.hosts = hosts[::-1]
    assert _looked_up(addresses) is None
    assert addresses.known() == first
    assert first[0] == Gateway("other:1")
    assert {gateway.server_name for gateway in first[1:]} == {"gateways.test:8650"}
    clients = [Addresses([NAME], names.resolve, ManualClock()) for _ in range(20)]
    assert [_looked_up(each) for each in clients] == [None] * 20
    assert len({each.known()[0] for each in clients}) > 1


@pytest.mark.parametrize("given", ["dns:///name", "dns://10.0.0.1/name:1", "dns:///:1", "dns:name:1", ""])
def test_names_without_a_port_are_refused(given: str) -> None:
    """With the form that is right."""
    with pytest.raises(InvalidRequest, match="dns:///name:port"):
        Addresses([given], Names().resolve)


def test_the_system_names_one_family() -> None:
    """Loopback has an address in each family, and gateways are bound to that of IPv4."""
    assert system_addresses("127.0.0.1", 8650) == ["127.0.0.1:8650"]
    assert system_addresses("::1", 8650) == ["[::1]:8650"]
    assert system_addresses("localhost", 8650) == ["127.0.0.1:8650"]


def test_a_channel_is_closed_when_its_last_call_is_over() -> None:
    """To a gateway that is known: never. To another: not before the deadline of its last call."""
    clock = ManualClock()
    channels = Channels(lambda gateway: f"to {gateway.address}", clock)
    gone, here = Gateway("a:1"), Gateway("b:1")
    assert channels.to(gone, 10) == channels.to(gone, 30) == "to a:1"
    channels.to(here, 1)
    clock.advance(29)
    assert channels.take_unneeded((here,)) == []
    clock.advance(2)
    assert channels.take_unneeded((here,)) == ["to a:1"]
    assert channels.take_all() == ["to b:1"]
    with pytest.raises(Unavailable, match="closed"):
        channels.to(here, 1)
