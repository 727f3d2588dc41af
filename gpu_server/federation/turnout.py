"""Of those that the run waits for: who has come, and who is missing."""

from collections.abc import Callable, Iterator, Mapping, MutableSet
from itertools import chain

from .member import Member

__all__ = ["Names", "Turnout"]


class Names(MutableSet[str]):
    """
    A set in the order in which names were added. To go through it takes as long as there are names in it: sets and dictionaries
    of Python keep the room of all that ever were in them at once, and look through it.
    """

    def __init__(self) -> None:
        self._names: dict[str, None] = {}
        self._room = 0
        """The most names at once, since room was made smaller."""

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def add(self, name: str) -> None:
        self._names[name] = None
        self._room = max(self._room, len(self._names))

    def discard(self, name: str) -> None:
        if name in self._names:
            del self._names[name]
            if 4 * len(self._names) <= self._room:
                self._names = dict.fromkeys(self._names)
                self._room = len(self._names)


class Turnout:
    """
    It looks at all members once, when it begins, and from then on at those alone that have changed: `Roster.turnout` makes one
    that hears of them. What its two questions say of a member may become another answer only when the member changes.

    Args:
        members: all of the run, by name.
        is_wanted: whether the run waits for this one.
        has_come: whether this one, if it is wanted, has sent what the run waits for.
    """

    def __init__(
        self,
        members: Mapping[str, Member],
        is_wanted: Callable[[str, Member], bool],
        has_come: Callable[[str, Member], bool],
    ) -> None:
        self._members, self._is_wanted, self._has_come = members, is_wanted, has_come
        self.come = Names()
        self.awaited = Names()
        """Missing, and up to date."""
        self.overtaken = Names()
        """Missing, and the run has gone on without them before: they are waited for only while there is no quorum."""
        for name in members:
            self.count(name)

    def count(self, name: str) -> None:
        """This member has changed, or is no member any more."""
        place = self._place_of(name)
        for names in (self.come, self.awaited, self.overtaken):
            if names is place:
                names.add(name)
            else:
                names.discard(name)

    def _place_of(self, name: str) -> Names | None:
        member = self._members.get(name)
        if member is None or not self._is_wanted(name, member):
            return None
        if self._has_come(name, member):
            return self.come
        return self.overtaken if member.presence.is_overtaken else self.awaited

    def __len__(self) -> int:
        """How many are wanted."""
        return len(self.come) + len(self.awaited) + len(self.overtaken)

    @property
    def is_complete(self) -> bool:
        """Whether nobody is missing."""
        return not self.awaited and not self.overtaken

    def missing(self) -> Iterator[str]:
        """In no order."""
        return chain(self.awaited, self.overtaken)

    def why_missing(self, name: str) -> str:
        """As far as that is known; empty where it is not."""
        member = self._members[name]
        if not member.presence.is_connected:
            return "not connected"
        return "evaluating" if member.is_evaluating else ""
