"""A server that has only a page, and says on /live what a test wants it to say."""

import json
import math
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

from conftest import REPOSITORY
from ports import free_port
from websockets.datastructures import Headers
from websockets.http11 import Request, Response
from websockets.sync.server import ServerConnection, serve

from gpu_server.page.routes import FILES, HEADERS

__all__ = ["EVENTS", "NOW", "PAGE", "FakeLive", "a_device", "a_snapshot", "an_event", "an_update", "columns", "fake_live"]

Json = dict[str, Any]

PAGE = REPOSITORY / "gpu_server/page"
NOW = 1_764_338_400.0
"""The clock of the run, in seconds since 1970: it need not be the viewer's."""

PARTS = ("edge_compute", "encode", "uplink", "queue", "server_compute", "downlink", "decode")


class FakeLive:
    """
    Serves the page with the headers of the real server.

    Args:
        snapshot: what it says first to whoever opens /live.
    """

    def __init__(self, snapshot: Json) -> None:
        self.snapshot = snapshot
        self.port = free_port()
        self.asked: Counter[str] = Counter()
        """How often each path was asked for."""
        self.queries: dict[str, set[str]] = {}
        self._pages: list[ServerConnection] = []
        self._has_page = threading.Condition()
        self._end: Callable[[], None] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def start(self) -> None:
        server = serve(self._talk, "127.0.0.1", self.port, process_request=self._answer)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()

        def end() -> None:
            server.shutdown()
            thread.join()

        self._end = end

    def stop(self) -> None:
        """As a server that is killed."""
        if self._end is not None:
            self._end()
            self._end = None
            for page in self._pages:
                page.close()
            self._pages.clear()

    def tell(self, message: Json) -> None:
        """Say it to all pages that are open, of which there is one at least."""
        with self._has_page:
            assert self._has_page.wait_for(lambda: self._pages, timeout=30)
            for page in self._pages:
                page.send(_text(message))

    def wait_for(self, path: str, times: int) -> None:
        """Until it was asked for so often."""
        with self._has_page:
            assert self._has_page.wait_for(lambda: self.asked[path] >= times, timeout=30)

    def _answer(self, connection: ServerConnection, request: Request) -> Response | None:
        path, _, query = request.path.partition("?")
        self.queries.setdefault(path, set()).add(query)
        with self._has_page:
            self.asked[path] += 1
            self._has_page.notify_all()
        if path == "/live":
            return None
        if path not in FILES:
            return connection.respond(HTTPStatus.NOT_FOUND, "nothing here\n")
        name, kind = FILES[path]
        return Response(200, "OK", Headers({**HEADERS, "Content-Type": kind}), (PAGE / name).read_bytes())

    def _talk(self, page: ServerConnection) -> None:
        page.send(_text(self.snapshot))
        with self._has_page:
            self._pages.append(page)
            self._has_page.notify_all()
        for _ in page:
            raise AssertionError("the page has said something")


@contextmanager
def fake_live(snapshot: Json) -> Iterator[FakeLive]:
    server = FakeLive(snapshot)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def _text(message: Json) -> str:
    return json.dumps(message, allow_nan=False)


def a_device(name: str, **changes: Any) -> Json:
    """One of three equal ones, whose seconds are ``seconds`` by part, in the order of PARTS."""
    seconds = changes.pop("seconds", (4.0, 0.2, 3.0, 2.0, 5.0, 2.0, 0.2))
    return {
        "name": name,
        "state": "connected",
        "words": "takes part",
        "samples": 14020,
        "batch_size": 8,
        "loss": 2.113,
        "tokens_per_second": 412.7,
        "bytes_up": 1_234_000_000,
        "bytes_down": 987_000_000,
        "last_heard": NOW - 0.4,
        "missed_steps": 0,
        "late_seconds": 0.0,
        "slowness": 1.0,
        "is_slowest": False,
        "seconds": dict(zip(PARTS, seconds, strict=True)),
        **changes,
    }


def an_event(text: str, *, ago: float = 0.0, **changes: Any) -> Json:
    return {"time": NOW - ago, "kind": "note", "text": text, "level": "info", **changes}


def columns(first: int, last: int, *, points: int = 1000, seconds_a_step: float = 0.8) -> Json:
    """A curve from one step to another, in as many points as `Curve` of the server would hold."""
    chance = random.Random(17)
    width = max(1, math.ceil((last - first + 1) / points))
    steps = [min(last, step + width - 1) for step in range(first, last + 1, width)]
    course = [2.0 + 3.2 * math.exp(-step / (0.12 * last)) for step in steps]
    noise = [0.12 * chance.gauss(0, 1) for _ in steps]
    spread = 0.3 if width > 1 else 0.0
    speed = [1240 + 60 * chance.gauss(0, 1) for _ in steps]
    return {
        "step": steps,
        "time": [NOW - (last - step) * seconds_a_step for step in steps],
        "loss": [value + bit for value, bit in zip(course, noise, strict=True)],
        "loss_low": [value + bit - spread for value, bit in zip(course, noise, strict=True)],
        "loss_high": [value + bit + spread for value, bit in zip(course, noise, strict=True)],
        "tokens_per_second": speed,
        "bytes_per_second": [2500 * value for value in speed],
        "learning_rate": [2e-4 * (1 - step / (1.2 * last)) for step in steps],
        "gradient_norm": [abs(0.8 + 0.2 * chance.gauss(0, 1)) for _ in steps],
    }


def evaluations(first: int, last: int, every: int, clients: Sequence[str] = ("kitchen", "garage")) -> Json:
    asked = [(step, client) for step in range(first, last + 1, every) for client in clients]
    losses = [2.05 + 2.4 * math.exp(-step / (0.15 * last)) + 0.05 * clients.index(client) for step, client in asked]
    return {
        "step": [step for step, _ in asked],
        "time": [NOW - (last - step) * 0.8 for step, _ in asked],
        "client": [client for _, client in asked],
        "loss": losses,
        "perplexity": [math.exp(loss) for loss in losses],
    }


def an_overview(**changes: Any) -> Json:
    return {
        "run": "kitchens",
        "sentence": "step 214 of 900, 3 of 3 devices, 12 min left",
        "state": "training",
        "step": 214,
        "total_steps": 900,
        "seconds_left": 720.0,
        "clients": 3,
        "connected": 3,
        "restarts": 1,
        "started": NOW - 5400,
        "now": NOW,
        "loss": 2.1342,
        "held_out": {"step": 200, "loss": 2.1877, "perplexity": 8.914},
        "tokens_per_second": 1240.2,
        "bytes_per_second": 3_100_000.0,
        "codec": "int8",
        "codec_reason": "links take 41 % of the time, and int8 changes the loss by less than 0.01 nats per token",
        "learning_rate": 1.7e-4,
        "bottleneck": {
            "part": "uplink",
            "client": "garage",
            "share": 0.52,
            "sentence": "garage is 2.4 times as slow as the others, who wait for it; 52 % of its time goes to uplink",
            "advice": "give it a smaller --batch-size, or the run a --quorum; a leaner --codec (int8, int4, delta), or a "
            "higher --aggregate-every, sends less",
        },
        "waiting_for": [],
        "last_checkpoint": {"step": 200, "time": NOW - 11},
        "devices": [
            a_device("kitchen", seconds=(3.1, 0.2, 2.4, 9.6, 2.2, 1.4, 0.2)),
            a_device(
                "garage",
                seconds=(4.0, 0.3, 9.9, 0.3, 2.2, 2.2, 0.2),
                words="takes part, 2.4 times as slow as the others",
                slowness=2.42,
                is_slowest=True,
                tokens_per_second=388.0,
                last_heard=NOW - 1.2,
            ),
            a_device("attic", seconds=(2.7, 0.2, 2.0, 10.6, 2.2, 1.2, 0.2), samples=9310, bytes_up=1_190_000_000),
        ],
        **changes,
    }


EVENTS = (
    an_event("listening on wss://192.168.1.20:8765 for 3 devices", ago=5400, kind="server_started"),
    an_event("kitchen takes part: 14,020 samples, batches of 8", ago=5380, kind="joined", client="kitchen"),
    an_event("garage takes part: 14,020 samples, batches of 8", ago=5377, kind="joined", client="garage"),
    an_event("attic takes part: 9,310 samples, batches of 8", ago=5290, kind="joined", client="attic"),
    an_event("all devices are there: training starts", ago=5289, kind="training_started"),
    an_event("int8 from step 40 on: links take 41 % of the time", ago=5200, kind="codec", step=40),
    an_event("attic has lost its connection", ago=2400, kind="lost", client="attic", level="warning", step=121),
    an_event("attic is back", ago=2371, kind="back", client="attic", step=121),
    an_event("listening on wss://192.168.1.20:8765 again, from step 150 on", ago=1200, kind="server_started", step=150),
    an_event("a checkpoint of step 200 is written", ago=11, kind="checkpoint", level="debug", step=200),
)


def a_snapshot(steps: int = 214, **changes: Any) -> Json:
    """What /live says first of a run of three devices, of which garage is slow."""
    curve = columns(1, steps)
    time_of = dict(zip(curve["step"], curve["time"], strict=True))
    marks = [(step, "checkpoint") for step in range(steps // 9, steps, steps // 9)]
    marks += [(round(0.19 * steps), "codec"), (round(0.7 * steps), "restart")]
    return {
        "kind": "snapshot",
        "overview": an_overview(**changes),
        "curve": curve,
        "evaluations": evaluations(steps // 10, steps, steps // 10),
        "marks": [
            {"step": step, "time": time_of.get(step, NOW - (steps - step) * 0.8), "kind": kind} for step, kind in sorted(marks)
        ],
        "events": list(EVENTS),
    }


def an_update(steps: Mapping[str, Any] | None = None, *, events: Sequence[Json] = (), **changes: Any) -> Json:
    """What it says later: new steps and events, and how things stand now."""
    return {
        "kind": "update",
        "overview": an_overview(**changes),
        "curve": dict(steps or {}),
        "evaluations": {},
        "marks": [],
        "events": list(events),
    }


if __name__ == "__main__":
    live = FakeLive(a_snapshot())
    live.start()
    print(live.url)  # noqa: T201
