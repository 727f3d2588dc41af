"""
What the live page costs a run: a step without it, with it while nobody looks, and with 100 pages open.

    python benchmarks/page_cost.py --turns 60 --steps 21

One server, one device and the reader of all pages, each a process, share this machine's cores; the model is small (6 blocks of
width 256), and its steps short. The three contestants take turns of some steps in the same run, so that what else goes on there
meets all of them. The first step of a turn is not counted: it holds the opening of pages. A ratio is of one turn and the turn
without the page beside it; given are their median and a 95 % interval of it (bootstrap). The page's own work, sending included,
is measured, too: processor time of the thread that serves, as a share of the time.
"""

import argparse
import random
import selectors
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
from conftest import make_model
from overlap import take_steps

from terminal import Progress

BATCH_SIZE, RANK = 2, 4
CONTESTANTS = {"without the page": (False, 0), "with it, nobody looks": (True, 0), "with {} pages open": (True, -1)}
"""Whether the page follows the run, and how many look; -1: as many as the benchmark is told."""
GOALS = {"with it, nobody looks": 1.005, "with {} pages open": 1.02}


def serve(settings: dict[str, Any], is_on: Any, spent: Any, urls: Any) -> None:
    """
    The server's process.

    Args:
        is_on: whether the page is told anything.
        spent: seconds of a processor that the page has used so far.
    """
    from gpu_server import GpuServer, Observer, RunEndedEarly

    class Switch(Observer):
        """Hands on to the page what it is told, while it is on, and takes the time."""

        def __init__(self, page: Any) -> None:
            self._page = page
            for name in ("step_finished", "status_changed", "event_happened", "evaluated"):
                setattr(self, name, self._while_on(self._timed(getattr(page, name))))
            page._tell = self._timed(page._tell)

        @staticmethod
        def _while_on(method: Any) -> Any:
            return lambda *arguments: method(*arguments) if is_on.value else None

        @staticmethod
        def _timed(method: Any) -> Any:
            def timed(*arguments: Any) -> None:
                began = time.thread_time()
                method(*arguments)
                spent.value += time.thread_time() - began

            return timed

    server = GpuServer(port=0, **settings)
    observers = server._run.observers
    observers[observers.index(server._run.page)] = Switch(server._run.page)
    with server:
        urls.put(server.url)
        try:
            for _ in server.train():
                pass
        except RunEndedEarly:
            pass  # the device leaves when enough is measured


def read_pages(address: tuple[str, int], pipe: Any) -> None:
    """The readers' process: keeps as many pages open as it is told, and reads what they are sent."""
    request = "\r\n".join(
        [
            *("GET /live HTTP/1.1", "Host: 127.0.0.1", "Upgrade: websocket", "Connection: Upgrade"),
            *("Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==", "", ""),
        ]
    ).encode()
    pages: list[socket.socket] = []
    with selectors.DefaultSelector() as waiting:
        waiting.register(pipe, selectors.EVENT_READ)
        while True:
            for key, _ in waiting.select():
                if key.fileobj is not pipe:
                    if not key.fileobj.recv(2**18):  # type: ignore[union-attr]
                        raise ConnectionError("the server has closed a page")
                    continue
                try:
                    wanted = pipe.recv()
                except EOFError:
                    return
                for page in pages:
                    waiting.unregister(page)
                    page.close()
                pages = []
                for _ in range(wanted):
                    page = socket.create_connection(address)
                    pages.append(page)
                    page.sendall(request)
                    if b" 101 " not in page.recv(2**12):
                        raise ConnectionError("the server shows no page")
                    waiting.register(page, selectors.EVENT_READ)
                pipe.send("open")


def median_with_interval(ratios: list[float], draws: int = 10_000) -> tuple[float, float, float]:
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(draws))
    return statistics.median(ratios), medians[draws * 25 // 1000], medians[draws * 975 // 1000]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--turns", type=int, default=30, help="of each contestant")
    parser.add_argument("--steps", type=int, default=41, help="of a turn, one of which is not counted")
    parser.add_argument("--pages", type=int, default=100)
    options = parser.parse_args()
    is_on, spent = harness.PROCESSES.Value("b", 0, lock=False), harness.PROCESSES.Value("d", 0.0, lock=False)
    urls, (pipe, theirs), (pages, of_reader) = harness.PROCESSES.Queue(), harness.PROCESSES.Pipe(), harness.PROCESSES.Pipe()
    seconds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    shares: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    total = options.turns * len(CONTESTANTS)
    with tempfile.TemporaryDirectory() as scratch, Progress(total, unit="turn") as progress:
        folder, steps = Path(scratch), total * options.steps
        model = make_model(folder, n_layer=6, n_embd=256)
        data = harness.write_rows(
            folder / "rows.txt", [(f"name {number}", "abc " * (5 + number % 20)) for number in range(2_000)]
        )
        settings = {
            "model": str(model),
            "cut_layer": 3,
            "lora_rank": RANK,
            "steps": steps + 1,
            "dtype": "float32",
            "device": "cpu",
        }
        settings |= {"run_dir": str(folder / "run"), "checkpoint_every": 10**6, "max_pages": options.pages + 1}
        server = harness.PROCESSES.Process(target=serve, args=(settings, is_on, spent, urls), daemon=True)
        server.start()
        url = urls.get()
        edge = {"model": str(model), "data": str(data), "batch_size": BATCH_SIZE, "engine": "torch", "dtype": "float32"}
        device = harness.PROCESSES.Process(
            target=take_steps, args=(url, {**edge, "state_dir": str(folder / "state")}, {0, 1}, theirs), daemon=True
        )
        device.start()
        reader = harness.PROCESSES.Process(
            target=read_pages, args=(("127.0.0.1", int(url.rpartition(":")[2])), of_reader), daemon=True
        )
        reader.start()
        theirs.close()
        of_reader.close()
        pipe.send("go on")  # the first step of the run waits for everything
        pipe.recv()
        order = random.Random(0)
        for _ in range(options.turns):
            for name in order.sample(list(CONTESTANTS), len(CONTESTANTS)):
                on, number = CONTESTANTS[name]
                is_on.value = on
                pages.send(options.pages if number < 0 else number)
                pages.recv()
                taken = []
                for step in range(options.steps):
                    if step == 1:
                        before = spent.value
                    pipe.send("go on")
                    taken.append(pipe.recv())
                seconds[name].append(statistics.mean(taken[1:]))
                shares[name].append((spent.value - before) / sum(taken[1:]))
                progress.advance(name.format(options.pages))
        pages.close()
        pipe.close()
        for process in (device, server, reader):
            process.join()
    rows = []
    first = next(iter(CONTESTANTS))
    for name, taken in seconds.items():
        ratio, low, high = median_with_interval([one / other for one, other in zip(taken, seconds[first], strict=True)])
        row: list[object] = [name.format(options.pages), f"{statistics.median(taken) * 1000:.1f} ms"]
        row += [f"{ratio:.4f} [{low:.4f}, {high:.4f}]" if name in GOALS else "1", f"{statistics.mean(shares[name]):.3%}"]
        rows.append([*row, f"{GOALS[name]:.3f}" if name in GOALS else ""])
    print(harness.markdown(["contestant", "a step", "against the first", "the page's own work, of the time", "goal"], rows))


if __name__ == "__main__":
    main()
