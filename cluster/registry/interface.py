"""What a registry keeps, and what it answers; one interface, an embedded and a shared implementation.

The controller is the only writer. Everyone else reads, and only while the controller does not answer. Of
blocks it keeps identities, which are hashes: no token is in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.blocks import BlockHash
from cluster.policies.directory import HeldBlock
from cluster.types import Epoch, WorkerId

PAST_EPOCHS_MOST = 64
"""Lives remembered per worker after another one took their place."""


@dataclass(frozen=True, slots=True)
class ControllerRecord:
    """The writer: its life, host:port, what members must agree to, and its welcome without membership.

    `welcome` is an `anabranch.v1.RegisterResponse`.
    """

    epoch: Epoch
    address: str
    agreement: str
    welcome: bytes


@dataclass(frozen=True, slots=True)
class MemberRecord:
    """One live process. `body` is the `anabranch.v1.RegisterRequest` of this moment: role, addresses,
    condition, load, versions.
    """

    worker: WorkerId
    epoch: Epoch
    body: bytes


@dataclass(frozen=True, slots=True)
class RegistryView:
    """What the registry holds at one moment. `past`: lives that ended or were replaced, by worker.

    `controller` is None, and `version` 0, where nobody has written yet or the lease ran out.
    """

    version: int
    controller: ControllerRecord | None
    members: tuple[MemberRecord, ...]
    past: Mapping[WorkerId, tuple[Epoch, ...]]


class Registry(Protocol):
    """The membership, and a copy of the prefix directory. Safe to call from several threads; a call takes a
    few deadlines at most.

    Every method raises Unavailable when the registry does not answer, ResourceExhausted when it answers
    but refuses writes, Unauthenticated when it refuses the password. What is not written again within
    the lease is forgotten.
    """

    def claim(self, controller: ControllerRecord, *, take_over: bool) -> None:
        """Be the writer, or stay it. Raises Fenced if another life is and `take_over` is not set."""
        ...

    def publish(
        self,
        writer: Epoch,
        version: int,
        present: Sequence[MemberRecord],
        gone: Sequence[tuple[WorkerId, Epoch]],
    ) -> frozenset[WorkerId]:
        """Write changes of the membership at once, and the version they lead to; renews their leases.

        A worker's other life is replaced for ever, and `gone` ends one. Returns whose record was refused,
        because that life had ended or been replaced before. Raises Fenced where `writer` is not it.
        """
        ...

    def version(self) -> int:
        """The version of the membership; cheap."""
        ...

    def read(self) -> RegistryView:
        """The whole membership. What is written meanwhile may be in it already: its version is that of the
        beginning, so that whoever compares versions looks again.
        """
        ...

    def publish_blocks(self, writer: Epoch, blocks: Sequence[HeldBlock], *, starts_over: bool = False) -> int:
        """Write who holds these blocks now, and renew the lease of all of them; `starts_over`: nothing that
        was written before holds. Returns how many blocks the registry keeps: at most
        `RegistryConfig.blocks_most`, beyond which new ones are left out. Raises Fenced as `publish`.
        """
        ...

    def find_blocks(self, identities: Sequence[BlockHash]) -> list[HeldBlock]:
        """The longest run of these blocks that is kept, from the first on."""
        ...

    def read_blocks(self) -> Iterator[list[HeldBlock]]:
        """All blocks, in parts of some hundreds, each of which takes a call; in no order. One may come twice,
        and what is written meanwhile may be missing.
        """
        ...

    def close(self) -> None:
        """Let connections go. Idempotent."""
        ...
