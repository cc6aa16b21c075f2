# SPDX-License-Identifier: Apache-2.0
"""The named roots of the graph, and the drain that lets it be changed while clients use it.

Every user of a disk (a connection, a job) works through a `DiskSession`, and holds the session's
gate while it is inside a verb. `drained` takes the gates of all sessions of some disks: then no
request is in flight, the graph may be changed, and it is one instant for all of them.

A lock for each user, not one for all: a request pays for an uncontended lock (100 ns), and users
never wait for each other.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Final

from fleece.block.node import Filter, Node
from fleece.errors import AlreadyExists, DrainTimeout, NotFound

DRAIN_SECONDS: Final = 5.0


class Gate:
    """Held by one user of a disk while it is inside a verb.

    Python's locks are not fair: a busy worker would take its own lock again before a waiting drain
    wakes up. Hence ``_resume``, which is clear while a drain wants the disk.
    """

    __slots__ = ("_resume", "lock")

    def __init__(self, resume: threading.Event) -> None:
        self.lock = threading.Lock()
        self._resume = resume

    def __enter__(self) -> None:
        if not self._resume.is_set():
            self._resume.wait()
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()


class DiskSession:
    """One user of a disk. ``node`` is valid while ``gate`` is held; look it up again each time."""

    def __init__(self, disk: "Disk", gate: Gate) -> None:
        self.gate = gate
        self._disk = disk

    @property
    def node(self) -> Node:
        """The root of the disk at this moment."""
        return self._disk.root

    def close(self) -> None:
        """Leave the disk. Idempotent."""
        self._disk._forget(self)


class Disk:
    """The named root that a guest or client writes to: a chain of filters over a format node."""

    def __init__(self, name: str, root: Node) -> None:
        self.name = name
        self.root = root
        self._sessions: list[DiskSession] = []
        self._sessions_lock = threading.Lock()
        self._drain_lock = threading.Lock()
        self._resume = threading.Event()
        self._resume.set()

    @property
    def size(self) -> int:
        """Bytes."""
        return self.root.size

    @property
    def read_only(self) -> bool:
        """Whether writes are refused."""
        return self.root.read_only

    @property
    def blocking(self) -> bool:
        """Whether its verbs may wait long."""
        return self.root.blocking

    def open_session(self) -> DiskSession:
        """A new user. Its first request waits if the disk is being drained."""
        with self._sessions_lock:
            session = DiskSession(self, Gate(self._resume))
            self._sessions.append(session)
            return session

    def _forget(self, session: DiskSession) -> None:
        with self._sessions_lock:
            if session in self._sessions:
                self._sessions.remove(session)

    @property
    def sessions(self) -> int:
        """How many users it has now."""
        return len(self._sessions)

    def nodes(self) -> list[Node]:
        """The chain, from the root down to the format node."""
        chain: list[Node] = [self.root]
        while isinstance(chain[-1], Filter):
            chain.append(chain[-1].next)
        return chain

    def attach(self, new: Filter) -> None:
        """Put ``new``, whose child must be the root, on top. Only while drained."""
        if new.next is not self.root:
            raise ValueError(f"{new!r} does not stand on the root of disk {self.name!r}")
        self.root = new

    def detach(self, old: Filter) -> None:
        """Take ``old`` out of the chain. Only while drained."""
        if self.root is old:
            self.root = old.next
            return
        for node in self.nodes():
            if isinstance(node, Filter) and node.next is old:
                node.next = old.next
                return
        raise ValueError(f"{old!r} is not in the chain of disk {self.name!r}")

    def close(self) -> None:
        """Close every node of the chain, from the top. All sessions must be closed.

        One that fails does not keep the others open; its error is raised in the end.
        """
        with ExitStack() as stack:
            for node in reversed(self.nodes()):
                stack.callback(node.close)

    @contextmanager
    def _hold(self, deadline: float) -> Iterator[None]:
        """Keep every user out; DrainTimeout if one is still in at ``deadline`` (monotonic)."""
        if not self._drain_lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise DrainTimeout(f"disk {self.name!r}: another operation still drains it; try again")
        taken: list[threading.Lock] = []
        try:
            with self._sessions_lock:
                self._resume.clear()
                gates = [session.gate for session in self._sessions]
            for gate in gates:
                if not gate.lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
                    raise DrainTimeout(
                        f"disk {self.name!r}: a request in flight did not end in time; "
                        "nothing was changed, try again when the storage answers"
                    )
                taken.append(gate.lock)
            yield
        finally:
            for lock in taken:
                lock.release()
            self._resume.set()
            self._drain_lock.release()


@contextmanager
def drained(disks: Sequence[Disk], timeout: float = DRAIN_SECONDS) -> Iterator[None]:
    """No request of any user of ``disks`` is in flight inside the ``with`` block.

    Raises `DrainTimeout` after ``timeout`` seconds, with every disk running as before. Disks are
    taken in the order of their names, so that two drains cannot wait for each other.
    """
    deadline = time.monotonic() + timeout
    with ExitStack() as stack:
        for disk in sorted(set(disks), key=lambda d: (d.name, id(d))):
            stack.enter_context(disk._hold(deadline))
        yield


class Graph:
    """The disks by name."""

    def __init__(self) -> None:
        self._disks: dict[str, Disk] = {}

    def add(self, disk: Disk) -> None:
        """Raises `AlreadyExists`."""
        if disk.name in self._disks:
            raise AlreadyExists(f"there is a disk named {disk.name!r} already")
        self._disks[disk.name] = disk

    def __getitem__(self, name: str) -> Disk:
        try:
            return self._disks[name]
        except KeyError:
            known = ", ".join(sorted(self._disks)) or "none"
            raise NotFound(f"there is no disk named {name!r} (disks: {known})") from None

    def __iter__(self) -> Iterator[Disk]:
        return iter(list(self._disks.values()))

    def __contains__(self, name: str) -> bool:
        return name in self._disks

    def __len__(self) -> int:
        return len(self._disks)

    def close(self) -> None:
        """Close every disk, also if closing one of them fails; that error is raised in the end."""
        with ExitStack() as stack:
            for disk in self:
                stack.callback(disk.close)
            self._disks.clear()
