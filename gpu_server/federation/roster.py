"""Who is in the run."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar
from weakref import WeakSet

from protocol import Contribution, Itinerary, Join, Message, RemoteProtocolError, RunSettings
from terminal import count

from .member import Member, Presence
from .turnout import Names, Turnout

__all__ = ["Asked", "NameInUse", "Roster"]

Asked = TypeVar("Asked", bound="Message | Contribution")


class NameInUse(RemoteProtocolError):
    """A client of this name is connected."""


class Roster:
    """
    The members by name, in the order in which they joined. A name is one member's as long as the run lasts.

    Before the run starts a member whose connection is lost has never been one; afterwards nobody new is let in.

    What is asked at every message is kept in indexes. Only `_note` changes them, which every member calls when it has changed.

    Args:
        matrix_shapes: of the edge part's LoRA matrices, by name.
    """

    def __init__(self, settings: RunSettings, matrix_shapes: dict[str, tuple[int, int]]) -> None:
        self._settings, self._matrix_shapes = settings, matrix_shapes
        self.members: dict[str, Member] = {}
        self.greeted: set[str] = set()
        """Names that a connection has said, and not yet joined with: they are taken, too."""
        self._presences: dict[str, Presence] = {}
        """As they were noted last."""
        self._standing = {presence: Names() for presence in Presence}
        """The same, the other way round."""
        self._turnouts: WeakSet[Turnout] = WeakSet()
        """Those that somebody keeps."""

    def __iter__(self) -> Iterator[tuple[str, Member]]:
        return iter(self.members.items())

    def greet(self, name: str, *, starting: bool, ending: bool) -> None:
        """
        Keep a place for a client that has said its name.

        Args:
            starting: whether the run still waits for its first members.
            ending: whether nothing is left to do but to fetch the adapter.

        Raises:
            NameInUse: a client of this name is connected.
            RemoteProtocolError: there is no place left, or the client has left and comes too late.
        """
        member = self.members.get(name)
        if name in self.greeted or (member is not None and member.presence.is_connected):
            raise NameInUse(
                f"the name {name} is in use by a device that is connected; it is free again when that one has gone, "
                f"and another device needs a name of its own"
            )
        if member is None:
            places = self._settings.clients - len(self.greeted) - len(self.members)  # before the start nobody is in both
            if not starting or places < 1:
                raise RemoteProtocolError(f"the run is full: it takes {count(self._settings.clients, 'device')} (--clients)")
        else:
            self.check_return(name, ending=ending)
        self.greeted.add(name)

    def check_return(self, name: str, *, ending: bool) -> None:
        """
        Raises:
            RemoteProtocolError: a member that has left comes back to a run that is over.
        """
        if ending and self.members[name].presence.has_left:
            raise RemoteProtocolError(f"{name} has left the run, and the run is over")

    def newcomer(self, join: Join) -> Member:
        """The member that a client becomes if it is taken."""
        return Member(join, self._itinerary(join), self._matrix_shapes)

    def _itinerary(self, join: Join) -> Itinerary:
        """A client's way through the run follows from its data alone."""
        return Itinerary(self._settings, self._settings.steps_of_client(join.num_samples, join.batch_size))

    def add(self, name: str, member: Member) -> None:
        self._enter(name, member)
        self.greeted.discard(name)

    def _enter(self, name: str, member: Member) -> None:
        self.members[name] = member
        member.on_change = partial(self._note, name)
        member.changed()

    def _note(self, name: str) -> None:
        """Whatever of this member has changed: the indexes show it as it is now."""
        member, before = self.members.get(name), self._presences.get(name)
        now = None if member is None else member.presence
        if now is not before:
            if before is not None:
                self._standing[before].remove(name)
                del self._presences[name]
            if now is not None:
                self._standing[now].add(name)
                self._presences[name] = now
        for turnout in self._turnouts:
            turnout.count(name)

    def came_back(self, name: str, join: Join) -> None:
        self.members[name].came_back(join)
        self.greeted.discard(name)

    def disconnected(self, name: str, now: float, *, starting: bool) -> None:
        """
        Args:
            starting: whether the run still waits for its first members.
        """
        self.greeted.discard(name)
        if starting:
            if self.members.pop(name, None) is not None:
                self._note(name)
        elif name in self.members:
            self.members[name].was_lost(now)

    # Across a restart of the server

    def saved(self) -> dict[str, dict[str, Any]]:
        """What has to be known of the members to go on after a round's end, as JSON."""
        return {name: {**vars(member.join), "left": member.presence.has_left} for name, member in self}

    def restore(self, membership: dict[str, dict[str, Any]], step: int, evaluated: Mapping[str, int]) -> None:
        """
        Nobody is connected, and all that stay have the adapter of the round that ended with ``step``.

        Args:
            membership: as `saved` gave it.
            evaluated: see `Member.evaluated`.
        """
        for name, fields in membership.items():
            join = Join(**{key: value for key, value in fields.items() if key != "left"})
            itinerary, presence = self._itinerary(join), Presence.LEFT if fields["left"] else Presence.AWAY
            member = Member(join, itinerary, self._matrix_shapes, presence, itinerary.after_round(step))
            member.evaluated = evaluated.get(name, member.evaluated)
            self._enter(name, member)

    # Whom a step or a round waits for

    def asked(self, kind: type[Asked], micro_batch: int) -> dict[str, Asked]:
        """The open questions of this kind, by client; of this micro-batch, if the kind has several."""
        return {
            name: question
            for name, member in self.members.items()
            if isinstance(question := member.questions.get(micro_batch), kind)
        }

    @property
    def last_step(self) -> int:
        """The last step for which anybody has data."""
        return max(member.last_step for _, member in self)

    def participants(self, step: int) -> list[str]:
        """Members that have data for the step, in the order of the union batch."""
        return sorted(name for name, member in self if member.has_data_for(step))

    def contributors(self) -> list[str]:
        """
        Members whose adapters make the next edge adapter: all that took part in a step of the round. Those that are overtaken
        are told where to go on only after it.
        """
        return sorted(name for name, member in self if member.contributes)

    def returning(self) -> list[str]:
        """Members that wait to be told where to go on."""
        return sorted(self._standing[Presence.RETURNING])

    def unfinished(self) -> list[str]:
        """Members that have not said goodbye: whether an adapter that was sent has arrived, only they know."""
        return [name for name, member in self if not member.presence.has_left]

    @property
    def num_unfinished(self) -> int:
        return sum(len(names) for presence, names in self._standing.items() if not presence.has_left)

    @property
    def num_connected(self) -> int:
        return sum(len(names) for presence, names in self._standing.items() if presence.is_connected)

    def turnout(self, is_wanted: Callable[[str, Member], bool], has_come: Callable[[str, Member], bool]) -> Turnout:
        """One that hears of every member that changes, as long as somebody keeps it."""
        turnout = Turnout(self.members, is_wanted, has_come)
        self._turnouts.add(turnout)
        return turnout
