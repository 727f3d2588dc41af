"""Where a step's time goes, seen from the server: seconds of one monotonic clock that is passed in."""

from collections import defaultdict

__all__ = ["StepTiming"]


class StepTiming:
    """
    Divides each client's time since its last reply.

    edge_compute   what the client says it computed
    wire           from our reply to its next question, less what it computed
    waiting        from its question until all others' are there too
    server_compute what the server then computed
    """

    def __init__(self) -> None:
        self._replied: dict[str, float] = {}
        self._asked: dict[str, float] = {}
        self._seconds: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))

    def away(self, client: str, now: float) -> float:
        """Seconds since the client's last reply."""
        return now - self._replied.get(client, now)

    def question(self, client: str, edge_seconds: float, now: float) -> None:
        away = self.away(client, now)
        self._seconds[client]["edge_compute"] += min(edge_seconds, away)
        self._seconds[client]["wire"] += max(0.0, away - edge_seconds)
        self._asked[client] = now

    def computing(self, clients: list[str], now: float) -> None:
        for client in clients:
            self._seconds[client]["waiting"] += now - self._asked.get(client, now)

    def computed(self, clients: list[str], seconds: float) -> None:
        for client in clients:
            self._seconds[client]["server_compute"] += seconds

    def replied(self, client: str, now: float) -> None:
        self._replied[client] = now

    def take(self) -> dict[str, dict[str, float]]:
        """The step's seconds by client; the next step starts from zero."""
        taken = {client: dict(seconds) for client, seconds in sorted(self._seconds.items())}
        self._seconds.clear()
        return taken
