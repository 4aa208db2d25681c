"""The links to all dense workers, kept in step with the membership."""

from __future__ import annotations

import asyncio

from anabranch.v1 import control_pb2, inference_pb2
from cluster.config import Config
from cluster.errors import Unavailable
from cluster.types import WorkerId
from workers.gateway.dense_link import DenseLink, GatewayIdentity, LinkEvents


class DenseLinks:
    """One link per dense worker slot, to its present incarnation.

    A new incarnation replaces the link at once. A worker that merely vanished from the membership keeps
    a stream that works for another expiry interval: a restarted controller knows nobody for a moment.
    """

    def __init__(self, identity: GatewayIdentity, config: Config, events: LinkEvents) -> None:
        self._loop = asyncio.get_running_loop()
        self._identity = identity
        self._config = config
        self._events = events
        self._absence_s = config.controller.expiry_ms / 1000
        self._links: dict[WorkerId, DenseLink] = {}
        self._absent: dict[WorkerId, asyncio.TimerHandle] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def choose(
        self, has_prompt: bool, avoid: DenseLink | None = None, *, unfit_first: bool = False
    ) -> DenseLink | None:
        """The least loaded usable link of those that serve what a sequence needs next: decoding where it
        `has_prompt` computed, else its prompt. `avoid` only where there is no other such one, and those that
        serve something else only where there is none at all; `unfit_first` these come first.
        """
        unfit = inference_pb2.SERVING_PREFILL if has_prompt else inference_pb2.SERVING_DECODE
        usable = [link for link in self._links.values() if link.usable]

        def undesired(link: DenseLink) -> tuple[bool, bool]:
            is_unfit, is_avoided = link.member.serving == unfit, link is avoid
            return (is_avoided, not is_unfit) if unfit_first else (is_unfit, is_avoided)

        return min(usable, key=lambda link: (undesired(link), link.load), default=None)

    def named(self, worker_id: str) -> DenseLink | None:
        """The usable link to a worker."""
        link = self._links.get(WorkerId(worker_id))
        return link if link is not None and link.usable else None

    def others(self, link: DenseLink) -> int:
        """How many usable links there are besides this one."""
        return sum(other.usable for other in self._links.values() if other is not link)

    def follow(self, membership: control_pb2.Membership) -> None:
        """Open, update and leave links so that they match the membership."""
        present = {
            WorkerId(member.worker_id): member
            for member in membership.members
            if member.role == inference_pb2.ROLE_DENSE
        }
        for worker_id, member in present.items():
            self._meet(worker_id, member)
        for worker_id in self._links.keys() - present.keys() - self._absent.keys():
            self._absent[worker_id] = self._loop.call_later(self._absence_s, self._leave, worker_id)

    async def close(self) -> None:
        """Close every link."""
        for timer in self._absent.values():
            timer.cancel()
        links, self._links = list(self._links.values()), {}
        await asyncio.gather(*(link.close() for link in links), *self._closing)

    def _meet(self, worker_id: WorkerId, member: inference_pb2.Member) -> None:
        timer = self._absent.pop(worker_id, None)
        if timer is not None:
            timer.cancel()
        link = self._links.get(worker_id)
        if link is not None and (link.epoch, link.member.address) == (member.epoch, member.address):
            link.member = member
            return
        if link is not None:
            self._leave(worker_id)
        self._links[worker_id] = DenseLink(member, self._identity, self._config, self._events)

    def _leave(self, worker_id: WorkerId) -> None:
        self._absent.pop(worker_id, None)
        link = self._links.pop(worker_id)
        task = self._loop.create_task(link.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        link.ready = False
        self._events.on_broken(link, Unavailable(f"{worker_id} left the cluster"))
