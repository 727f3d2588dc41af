"""Where a step's time goes: what clients tell of theirs, and how long their questions have waited here."""

from collections import defaultdict

from protocol import Seconds

__all__ = ["StepTiming"]

ClientMicroBatch = tuple[str, int]
"""Client and micro-batch."""


class StepTiming:
    """Seconds of one monotonic clock that is passed in."""

    def __init__(self) -> None:
        self._replied: dict[str, float] = {}
        self._asked: dict[ClientMicroBatch, float] = {}
        self._queued: dict[ClientMicroBatch, float] = {}
        self._asked_back: dict[ClientMicroBatch, float] = {}
        self._spent: defaultdict[str, Seconds] = defaultdict(Seconds)
        self._link_seconds = self._all_seconds = 0.0
        """Of all clients, since `take_link_share` was called last."""

    def away(self, client: str, now: float) -> float:
        """Seconds since the client's last reply."""
        return now - self._replied.get(client, now)

    def asked_back(self, question: ClientMicroBatch, now: float) -> None:
        """Its client has been asked for something before the answer."""
        self._asked_back[question] = now
        self.replied(question[0], now)

    def thought(self, question: ClientMicroBatch, now: float) -> float:
        """Seconds since its client was asked back."""
        return now - self._asked_back.pop(question, now)

    def question(self, question: ClientMicroBatch, spent: Seconds, now: float) -> None:
        """It has come, with what its client spent since the one before."""
        self._asked[question] = now
        self._spent[question[0]] += spent

    def computing(self, questions: list[ClientMicroBatch], now: float) -> None:
        """All that were waited for are there, and the model is free."""
        self._queued = {question: now - self._asked.pop(question, now) for question in questions}

    def queued(self, question: ClientMicroBatch) -> float:
        """How long a question that is computed had to wait for that."""
        return self._queued.get(question, 0.0)

    def replied(self, client: str, now: float) -> None:
        self._replied[client] = now

    def take(self) -> dict[str, Seconds]:
        """What each client has spent since this was called last."""
        taken = dict(sorted(self._spent.items()))
        self._spent.clear()
        self._link_seconds += sum(spent.uplink + spent.downlink for spent in taken.values())
        self._all_seconds += sum(sum(vars(spent).values()) for spent in taken.values())
        return taken

    def take_link_share(self) -> float:
        """The links' share of all that clients have spent, in the steps taken since this was called last; 0 if in none."""
        share = self._link_seconds / self._all_seconds if self._all_seconds else 0.0
        self._link_seconds = self._all_seconds = 0.0
        return share
