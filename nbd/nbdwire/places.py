# SPDX-License-Identifier: Apache-2.0
"""Who may be connected to a server: clients in transmission, and clients before it."""

import threading
import time
from collections.abc import Hashable
from typing import Final, Generic, TypeVar

RESERVED_SECONDS: Final = 1.0

C = TypeVar("C", bound=Hashable)


class Places(Generic[C]):
    """Who is connected: ``clients`` in transmission at most, and ``haggling`` before it.

    Nobody is kept out by clients that do not get on with their handshake: if there are too many of
    them, the oldest one makes room, of the peer which has most of them.
    """

    def __init__(self, clients: int, haggling: int) -> None:
        if clients < 1 or haggling < 1:
            raise ValueError("a server needs room for one client at least, and for one handshake")
        self.most_clients = clients
        self.most_haggling = haggling
        self._lock = threading.Lock()
        self._haggling: dict[C, Hashable] = {}
        self._reserved: dict[C, float] = {}
        self._inside: set[C] = set()

    def arrive(self, client: C, origin: Hashable) -> C | None:
        """A client begins its handshake; the result must be hung up to make room for it."""
        with self._lock:
            victim = None
            if len(self._haggling) >= self.most_haggling:
                victim = self._victim()
                self._forget(victim)
            self._haggling[client] = origin
            return victim

    def _victim(self) -> C:
        counts: dict[Hashable, int] = {}
        for origin in self._haggling.values():
            counts[origin] = counts.get(origin, 0) + 1
        busiest = max(counts, key=lambda origin: counts[origin])
        return next(client for client, origin in self._haggling.items() if origin == busiest)

    def full(self) -> bool:
        """Whether there is no place for one more client in transmission."""
        return len(self._inside) >= self.most_clients

    def reserve(self, client: C) -> bool:
        """Whether it may go on into transmission; its place is held for about a second."""
        now = time.monotonic()
        with self._lock:
            if client in self._inside:
                return True
            self._reserved.pop(client, None)
            if not self._has_room(now):
                return False
            self._reserved[client] = now
            return True

    def _has_room(self, now: float) -> bool:
        if len(self._inside) + len(self._reserved) < self.most_clients:
            return True
        oldest = next(iter(self._reserved), None)
        if oldest is None or now - self._reserved[oldest] < RESERVED_SECONDS:
            return False
        del self._reserved[oldest]
        return True

    def enter(self, client: C) -> bool:
        """The client begins transmission; False if there is no place for it."""
        if not self.reserve(client):
            return False
        with self._lock:
            # Somebody may have got the reservation meanwhile, but not the place behind it.
            if len(self._inside) >= self.most_clients:
                return False
            self._forget(client)
            self._inside.add(client)
            return True

    def leave(self, client: C) -> None:
        """The client is gone."""
        with self._lock:
            self._forget(client)

    def _forget(self, client: C) -> None:
        self._haggling.pop(client, None)
        self._reserved.pop(client, None)
        self._inside.discard(client)
