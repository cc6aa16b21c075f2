# SPDX-License-Identifier: Apache-2.0
"""Memory for large requests, shared by all connections of a server; and TCP's keepalive."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from nbdwire.errors import ConnectionClosed

FREE: Final = (1 << 20) + 4096
"""Bytes: a buffer up to this size, which holds a request with 1 MiB of payload, is not counted.

So small requests never wait for large ones.
"""

PATIENCE: Final = 10.0
"""Seconds for which a client may keep others waiting for memory, while it does not go on itself."""


@dataclass(frozen=True)
class Keepalive:
    """When TCP asks whether a silent peer is alive still, and how often before it gives up.

    ``idle`` and ``interval`` are in seconds. A dead peer is noticed after ``idle + count *
    interval`` seconds of silence.
    """

    idle: int = 60
    interval: int = 15
    count: int = 4

    def __post_init__(self) -> None:
        if min(self.idle, self.interval, self.count) < 1:
            raise ValueError("keepalive: idle, interval and count are at least 1")


class Budget:
    """Bytes that the buffers of all connections may take together.

    A connection that wants more than is left waits, and reads nothing meanwhile: its client is held
    up, no other is. A client that holds bytes and does not go on itself (it sends half a write, or
    does not read what it asked for) is hung up once it kept another waiting for ``patience``
    seconds.

    >>> budget = Budget(1 << 30)
    >>> account = budget.open(hang_up=lambda why: None)   # for a connection
    >>> share = account.share()                           # for one of its buffers
    >>> share.take(32 << 20); share.held
    33554432
    >>> share.keep(0), share.held
    (True, 0)
    """

    def __init__(self, total: int, *, patience: float = PATIENCE) -> None:
        self.total = total
        self._patience = patience
        self._changed = threading.Condition()
        self._held = 0
        self._holders: dict[Share, None] = {}

    @property
    def held(self) -> int:
        """Bytes taken at this moment."""
        return self._held

    def open(self, hang_up: Callable[[str], None]) -> "Account":
        """For one connection; ``hang_up(why)`` ends it, and must not block."""
        return Account(self, hang_up)

    # Called by shares

    def _take(self, share: "Share", size: int) -> None:
        with self._changed:
            # What it has is no use while it waits; two that keep theirs could wait for each other.
            self._set(share, 0)
            began = time.monotonic()
            while not share.account.closed and self._held and self._held + size > self.total:
                self._changed.wait(self._patience / 4)
                if time.monotonic() - began >= self._patience:
                    self._evict()
            if share.account.closed:
                raise ConnectionClosed("the connection was hung up while it waited for memory")
            self._set(share, size)

    def _keep(self, share: "Share", size: int) -> bool:
        with self._changed:
            granted = self._held - share.held + size <= self.total // 2
            self._set(share, size if granted else 0)
            return granted

    def _set(self, share: "Share", size: int) -> None:
        if size < share.held:
            self._changed.notify_all()
        self._held += size - share.held
        share.held = size
        self._holders.pop(share, None)
        if size:
            self._holders[share] = None

    def _evict(self) -> None:
        """Hang up the first that has been waiting for its client all the time."""
        limit = time.monotonic() - self._patience
        for share in self._holders:
            since = share.idle_since
            if since is not None and since <= limit and not share.account.closed:
                share.account.closed = True
                share.account.hang_up("it kept others waiting for memory that it held")
                return

    def _close(self, account: "Account") -> None:
        with self._changed:
            account.closed = True
            self._changed.notify_all()


class Account:
    """What one connection has of a `Budget`, in one share for each of its buffers."""

    def __init__(self, budget: Budget, hang_up: Callable[[str], None]) -> None:
        self._budget = budget
        self._shares: list[Share] = []
        self.hang_up = hang_up
        self.closed = False

    def share(self) -> "Share":
        """A share that holds nothing yet."""
        share = Share(self._budget, self)
        self._shares.append(share)
        return share

    def close(self) -> None:
        """Nothing of it waits any longer: ConnectionClosed instead."""
        self._budget._close(self)

    def end(self) -> None:
        """The connection is over: its buffers are gone."""
        self._budget._close(self)
        for share in self._shares:
            share.keep(0)


class Share:
    """What one buffer has of a `Budget`; for one thread at a time.

    ``held`` is in bytes. Set ``idle_since`` to ``time.monotonic()`` before waiting for the client
    while something is held, and to None afterwards.
    """

    __slots__ = ("_budget", "account", "held", "idle_since")

    def __init__(self, budget: Budget, account: Account) -> None:
        self._budget = budget
        self.account = account
        self.held = 0
        self.idle_since: float | None = None

    def take(self, size: int) -> None:
        """Have room for a buffer of ``size`` bytes; waits. ConnectionClosed if it is hung up."""
        if size > FREE and size > self.held:
            self._budget._take(self, size)

    def keep(self, size: int) -> bool:
        """Have ``size`` bytes at rest, if half of the budget suffices; else False and have none."""
        if size <= FREE:
            size = 0
        if size == self.held == 0:
            return True
        return self._budget._keep(self, size)
