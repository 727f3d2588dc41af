"""A listening socket that limits unauthenticated connections, called strangers here, and a rate limiter for messages."""

import errno
import gc
import math
import os
import socket
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from terminal import count

from .errors import ServerError

try:
    import resource
except ModuleNotFoundError:  # Windows, where a process may open as many files as there is memory for
    resource = None  # type: ignore[assignment]

__all__ = ["Limits", "Listener", "RateLimiter"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one connection, and all together, may use of the server."""

    connections: int
    strangers: int
    """Unauthenticated connections: those that have not said, or not proved, who they are."""
    handshake_seconds: float
    """For each of: TLS, HTTP, the first message."""
    messages_per_second: float
    queue: int
    """Messages of one client that are held before its socket is no longer read."""
    pages: int = 0
    """Open pages that show the run; they count for none of the others."""

    def within_open_files(self, devices: int) -> "Limits":
        """
        The same, but with no more connections than this process may open files for, less those that are open and a reserve for
        those it will write. The system's limit is raised as far as this process may.

        Raises:
            ServerError: the run's devices alone are too many.
        """
        if resource is None:
            return self
        own = len(os.listdir("/dev/fd")) + FILES_IN_RESERVE
        allowed = _allow_open_files(own + self.connections + self.pages)
        free, needed = allowed - own, devices + 3
        pages = min(self.pages, max(0, free - needed) // 4)
        connections = min(self.connections, free - pages)
        if connections == self.connections:
            return replace(self, pages=min(self.pages, free - connections))
        if connections < needed:
            raise ServerError(
                f"this process may open {allowed} files, and a run of {count(devices, 'device')} takes {own + needed}: raise "
                f"the limit, such as by ulimit -n 1024, or by LimitNOFILE=1024 in a unit file"
            )
        # While one stranger is turned away, the next has its connection already.
        strangers = min(self.strangers, (connections - devices) // 2)
        return replace(self, connections=connections, strangers=strangers, pages=pages)


FILES_IN_RESERVE = 12
"""Checkpoints, metrics, enrolments and samples are written one by one, each with a lock or its folder; modules are read."""

STRANGERS_BETWEEN_COLLECTIONS = 8
ADMITTED_BETWEEN_FREEZES = 64


class Listener(socket.socket):
    """
    A listening socket that accepts a limited number of connections.

    Beyond ``limits.connections`` a new one is closed at once; pages are not counted among them. Beyond ``limits.strangers`` the
    oldest of the unauthenticated connections has to go: an honest client authenticates within a moment, so the oldest is one
    that says nothing.
    """

    def __init__(self, family: int, limits: Limits) -> None:
        super().__init__(family, socket.SOCK_STREAM)
        self._limits = limits
        self._open: dict[int, socket.socket] = {}
        self._strangers: dict[int, socket.socket] = {}  # in the order of their coming
        self._pages: dict[int, socket.socket] = {}
        self._gone = self._admitted = 0
        """Strangers that have gone since the last collection, and connections that were admitted since the last freeze."""
        self._may_freeze = not gc.get_freeze_count()
        """Nothing is frozen in this process. A program that has frozen what it has, before it made a server, keeps it so."""
        self._is_turn = False
        self._spare = -1
        """An open file that is closed for a moment where a connection finds none: to accept and close it. -1: there is none."""
        self._take_spare()

    def close(self) -> None:
        super().close()
        self._give_spare_up()

    @classmethod
    def open(cls, host: str, port: int, limits: Limits) -> "Listener":
        """
        Raises:
            ServerError: the address cannot be listened on.
        """
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
            listener = cls(family, limits)
            try:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(address)
                listener.listen()
            except OSError:
                listener.close()
                raise
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ServerError(f"cannot listen on {host}:{port}: {reason}; choose another --port or --host") from None
        return listener

    def accept(self) -> tuple[socket.socket, Any]:
        # One by one: asyncio would take a hundred before it has closed any that is turned away, at 300 kB each with TLS.
        self._is_turn = not self._is_turn
        if not self._is_turn:
            raise BlockingIOError("what was accepted before comes first")
        try:
            connection, address = super().accept()
        except OSError as error:
            if error.errno == errno.EBADF or isinstance(error, BlockingIOError):
                raise
            # Whatever became of this one connection, it does not end the server. One that finds no file would be offered again
            # and again, until there is one.
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._close_next()
            raise BlockingIOError(str(error)) from None
        if self._spare < 0:
            self._take_spare()
        self._gone += _forget_closed(self._strangers)
        if self._gone >= STRANGERS_BETWEEN_COLLECTIONS:
            self._collect()
        if len(self._open) >= self._limits.connections:
            _forget_closed(self._open)
        if len(self._open) >= self._limits.connections:
            connection.close()
            raise BlockingIOError("as many connections as may be")
        if len(self._strangers) >= self._limits.strangers:
            self._turn_away(next(iter(self._strangers)))
        descriptor = connection.fileno()
        for known in (self._strangers, self._open, self._pages):
            known.pop(descriptor, None)  # of a connection that was closed
        self._open[descriptor] = self._strangers[descriptor] = connection
        return connection, address

    def admit(self, descriptor: int) -> None:
        """The connection of this file descriptor is authenticated."""
        if self._strangers.pop(descriptor, None) is not None:
            self._admitted += 1

    def admit_page(self, descriptor: int) -> bool:
        """
        The connection of this file descriptor shows the run to somebody who may see it, and takes no place of a device's or a
        stranger's any more. False where there are as many as may be.
        """
        _forget_closed(self._pages)
        if descriptor not in self._open or len(self._pages) >= self._limits.pages:
            return False
        self.admit(descriptor)
        self._pages[descriptor] = self._open.pop(descriptor)
        return True

    def turn_strangers_away(self) -> None:
        """All of them, at the end: nobody waits until their time is over."""
        for descriptor in list(self._strangers):
            self._turn_away(descriptor)

    def freeze(self) -> None:
        """Keep Python's collector, which comes often here, from what there is now."""
        if self._may_freeze:
            self._admitted = 0
            gc.unfreeze()  # some of it has gone since
            gc.collect()
            gc.freeze()

    def freeze_newcomers(self) -> None:
        """The connections, too, where many came since the last time: they last, and thousands take half a second to look at."""
        if self._admitted >= ADMITTED_BETWEEN_FREEZES:
            self.freeze()

    def unfreeze(self) -> None:
        """What `freeze` has frozen."""
        if self._may_freeze:
            gc.unfreeze()

    def _collect(self) -> None:
        """Asyncio leaves cycles where a TLS handshake comes to nothing, of 300 kB each."""
        self._gone = 0
        self.freeze_newcomers()
        gc.collect()

    def _turn_away(self, descriptor: int) -> None:
        self._gone += 1
        try:
            self._strangers.pop(descriptor).shutdown(socket.SHUT_RDWR)  # its owner sees the end, and closes it
        except OSError:
            pass  # it was closed from the other side

    def _close_next(self) -> None:
        """Close the connection that waits to be accepted, and the oldest stranger's, so that the next one finds a file."""
        if self._strangers:
            self._turn_away(next(iter(self._strangers)))
        self._give_spare_up()
        with suppress(OSError):  # it has gone by itself
            super().accept()[0].close()
        self._take_spare()

    def _take_spare(self) -> None:
        with suppress(OSError):  # another thread was faster to take the file: with the next connection it is tried again
            self._spare = os.open(os.devnull, os.O_RDONLY)

    def _give_spare_up(self) -> None:
        if self._spare >= 0:
            os.close(self._spare)
        self._spare = -1


def _forget_closed(connections: dict[int, socket.socket]) -> int:
    """Take out those that were closed; say how many."""
    closed = [descriptor for descriptor, connection in connections.items() if connection.fileno() == -1]
    for descriptor in closed:
        del connections[descriptor]
    return len(closed)


class RateLimiter:
    """
    A token bucket: how long the next message has to wait so that there are at most so many a second. A second's worth may come
    at once.
    """

    def __init__(self, per_second: float) -> None:
        self._per_second = per_second
        self._free_at = -math.inf

    def delay(self, now: float) -> float:
        """Seconds that a message which comes now has to wait."""
        self._free_at = max(self._free_at, now - 1.0) + 1.0 / self._per_second
        return max(0.0, self._free_at - now)


def _allow_open_files(wanted: int) -> int:
    """Raise this process's limit on open files to so many, as far as it may; give what the limit is now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    more = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
    except (OSError, ValueError):
        return soft
    return more
