"""Routes requests whose prompts begin alike to one replica, whose cache then has that beginning."""

import hashlib
import random

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica


class PrefixRouter(RequestRouter):  # type: ignore[misc]
    """The replica that a key falls to, as long as it has a free slot; else the least loaded one.

    A key falls to the replica that comes first in an order of its own (rendezvous hashing), so
    replicas that come or go move only the keys that are theirs. A request without a key goes to
    the least loaded replica.
    """

    def initialize_state(self, slots: int) -> None:
        """`slots`: sequences that a replica runs side by side."""
        self._slots = slots

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Groups of replicas, the first tried first; of a group, the least loaded."""
        if not candidate_replicas:
            return []
        anyone = random.sample(candidate_replicas, len(candidate_replicas))
        if pending_request is None:
            return [anyone]
        pending_request.routing_context.should_backoff = True  # where all of them are full
        key = pending_request.metadata.session_id
        if not key:
            return [anyone]
        own = max(anyone, key=lambda replica: _weight(key, replica.replica_id.unique_id))
        running = self.replica_queue_len_cache.get(own.replica_id)
        return [anyone] if running is not None and running >= self._slots else [[own], anyone]


def _weight(key: str, replica: str) -> bytes:
    return hashlib.blake2b(f"{key} {replica}".encode(), digest_size=8).digest()
