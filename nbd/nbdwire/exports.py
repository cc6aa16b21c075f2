# SPDX-License-Identifier: Apache-2.0
"""The exports of a server by name: those that were added, and those made when a client asks."""

import logging
import threading
from collections.abc import Callable, Hashable
from typing import TypeAlias

from nbdwire.errors import BusyError
from nbdwire.export import Export, SupportsSessions
from nbdwire.served import ServedExport, serve

log = logging.getLogger(__name__)

OnExport: TypeAlias = Callable[[str], Export | SupportsSessions | None]
"""Makes the export of that name, or None. The name is whatever a client sent."""


class Exports:
    """Names and what stands behind them; for any thread."""

    def __init__(self, on_export: OnExport | None = None) -> None:
        self._lock = threading.Lock()
        self._added: dict[str, ServedExport] = {}
        self._demand = OnDemand(on_export) if on_export is not None else None

    def add(self, served: ServedExport) -> None:
        """ValueError if the name is taken."""
        with self._lock:
            if served.name in self._added:
                raise ValueError(f"there is an export named {served.name!r} already")
            self._added[served.name] = served

    def remove(self, name: str, users: Callable[[], int] = lambda: 0) -> None:
        """KeyError if there is none; BusyError if ``users()`` are connected to it.

        What was made on demand stays until its last user releases it.
        """
        with self._lock:
            made = self._demand is not None and self._demand.current(name) is not None
            if name not in self._added and not made:
                raise KeyError(name)
            count = users()
            if count:
                raise BusyError(f"export {name!r} is in use, clients: {count}", count)
            self._added.pop(name, None)

    def all(self) -> list[ServedExport]:
        """Those that were added, in that order."""
        with self._lock:
            return list(self._added.values())

    def has(self, name: str) -> bool:
        """Whether it was added."""
        return name in self._added

    def find(self, name: str, user: Hashable) -> ServedExport | None:
        """The export of that name, made if need be: then ``user`` must `release` the name."""
        served = self._added.get(name)
        if served is None and self._demand is not None:
            served = self._demand.use(name, user)
        return served

    def release(self, name: str, user: Hashable) -> None:
        """``user`` does not need it any longer. Of a name that was added this does nothing."""
        if self._demand is not None:
            self._demand.release(name, user)

    def enter(self, served: ServedExport, entered: Callable[[], None]) -> bool:
        """Call ``entered`` if ``served`` is on offer still; no removal comes in between."""
        with self._lock:
            current = self._added.get(served.name)
            if current is None and self._demand is not None:
                current = self._demand.current(served.name)
            if current is not served:
                return False
            entered()
            return True


class _Slot:
    def __init__(self) -> None:
        self.making = threading.Lock()
        self.users: set[Hashable] = set()
        self.served: ServedExport | None = None


class OnDemand:
    """Exports that are made when a client asks for them, and closed when the last one has left.

    For one name, making and closing never overlap.
    """

    def __init__(self, make: OnExport) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._slots: dict[str, _Slot] = {}

    def use(self, name: str, user: Hashable) -> ServedExport | None:
        """The export, which stays until `release`; None if there is none of that name."""
        with self._lock:
            slot = self._slots.setdefault(name, _Slot())
            slot.users.add(user)
        with slot.making:
            if slot.served is None:
                slot.served = self._made(name)
            served = slot.served
        if served is None:
            self.release(name, user)
        return served

    def _made(self, name: str) -> ServedExport | None:
        try:
            export = self._make(name)
            return serve(name, export) if export is not None else None
        except Exception as problem:  # whatever it is, it is this client's bad luck alone
            log.error("export %r cannot be made: %r", name, problem)
            log.debug("where it happened", exc_info=problem)
            return None

    def current(self, name: str) -> ServedExport | None:
        """What is there now."""
        slot = self._slots.get(name)
        return slot.served if slot is not None else None

    def release(self, name: str, user: Hashable) -> None:
        """The last user's release closes the export, if it can be closed."""
        with self._lock:
            slot = self._slots.get(name)
            if slot is None or user not in slot.users:
                return
            slot.users.discard(user)
            if slot.users:
                return
        with slot.making:
            with self._lock:
                if slot.users:  # somebody came meanwhile
                    return
            served, slot.served = slot.served, None
            if served is not None:
                _close(served)
        with self._lock:
            if not slot.users and self._slots.get(name) is slot:
                del self._slots[name]


def _close(served: ServedExport) -> None:
    close = getattr(served.export, "close", None)
    if close is None:
        return
    try:
        close()
    except Exception as problem:
        log.error("export %r cannot be closed: %r", served.name, problem)
