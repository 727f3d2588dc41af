"""
Runs in which something fails every so often: how much of their time is training, and what each kind of fault costs.

    python benchmarks/reliability.py --faults-every 60 10 --steps 2000
    python benchmarks/reliability.py --faults-every 20 --steps 500 --kinds silent

A server and three devices, as people start them: `splitlora-server serve --resume-or-start` and `splitlora-edge train`, which
fetches its part of the model. A supervisor starts each again at once when it ends with an error, as systemd does. Every device
reaches the server through a proxy of its own, which can cut its link. A seed decides what fails, and when:

    link      a device's connection is reset
    silent    a device's connection carries nothing any more, and neither side is told; new ones do
    device    a device is killed (SIGKILL)
    server    the server is killed (SIGKILL)

Time is lost from a fault until the run has finished the two steps that were next when it struck, less the time that two steps
take without a fault; so steps that are repeated count as lost. Two, since whoever has done its part of a step when it fails is
missed in the next one. The ratio of effective training time (ETTR) is the time that
the undisturbed run needs for all steps over the time that the disturbed one needs; beside it stands the share of the
disturbed run's own time that its steps took. The adapters are compared byte by byte.

Each run's figures are kept in --output, and a run that is there already is not run again.
"""

import argparse
import asyncio
import hashlib
import itertools
import json
import os
import random
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import harness  # first: it finds the tests' modules
from ports import free_port

from terminal import Progress, count

KINDS = ("link", "silent", "device", "server")
USUAL_KINDS = ("link", "device", "server")
DEVICES = ("attic", "cellar", "kitchen")
UNDISTURBED = "undisturbed"
ROWS, BATCH_SIZE = 400, 4
SERVER = {"cut_layer": 3, "lora_rank": 8, "lora_alpha": 32, "clients": len(DEVICES), "lora_dropout": 0.1, "linger": 60}
LAST_STEPS = 10  # in which nothing fails any more: a run ends once
SECONDS_BETWEEN_LOOKS = 0.02
SECONDS_WITHOUT_A_STEP = 120.0  # after which the run is taken for stuck
RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER: on for no seconds


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What one fault has cost."""

    kind: str
    victim: str
    at: float
    """Seconds since the training began."""
    step: int
    """The last that was finished when it struck."""
    seconds: float
    steps_repeated: int


class Program:
    """A program that is started again whenever it ends with an error."""

    def __init__(self, log: Path, *command: str) -> None:
        self._log, self._command = log, command
        self._is_wanted = True
        self.starts = 0
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._supervise, daemon=True)
        self._thread.start()
        self._started.wait()

    def _supervise(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        while self._is_wanted:
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(self._command, stdout=log, stderr=log, env=environment)
            self.starts += 1
            self._started.set()
            if self._process.wait() == 0:
                return

    def kill(self) -> None:
        self._process.kill()

    def is_done(self) -> bool:
        """Whether it has ended well."""
        return not self._thread.is_alive()

    def end(self) -> None:
        self._is_wanted = False
        if self._thread.is_alive():
            self._process.send_signal(signal.SIGKILL)
            self._thread.join()


class Link:
    """A proxy to a port of this machine, whose connections can be cut."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self._pumps: set[asyncio.Task[None]] = set()
        self._silent: list[Any] = []
        """What is connected, and carries nothing any more."""
        listening = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(listening,), daemon=True)
        self._thread.start()
        listening.wait()

    def cut(self) -> None:
        """Reset what is connected."""
        self._call(self._reset)

    def silence(self) -> None:
        """What is connected stays so, and carries nothing any more."""
        self._call(self._forget)

    def close(self) -> None:
        self._call(self._reset)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _call(self, what: Callable[[], None]) -> None:
        done = threading.Event()
        self._loop.call_soon_threadsafe(lambda: (what(), done.set()))
        done.wait()

    def _reset(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    def _forget(self) -> None:
        self._silent += [*self._writers, *self._pumps]  # the sockets stay open as long as somebody knows them
        for pump in self._pumps:
            pump.cancel()
        self._writers, self._pumps = set(), set()

    def _run(self, listening: threading.Event) -> None:
        async def listen() -> Any:
            server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
            self.port = server.sockets[0].getsockname()[1]
            listening.set()
            return server

        server = self._loop.run_until_complete(listen())
        self._loop.run_forever()
        server.close()

    async def _connect(self, near_reader: asyncio.StreamReader, near: asyncio.StreamWriter) -> None:
        near.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        try:
            far_reader, far = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            near.transport.abort()  # as whoever asks a port at which nobody listens
            return
        far.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        ends = {near, far}
        self._writers |= ends
        pumps = {asyncio.ensure_future(_pump(near_reader, far)), asyncio.ensure_future(_pump(far_reader, near))}
        self._pumps |= pumps
        await asyncio.wait(pumps)
        if ends <= self._writers:  # else the link has become silent: nobody is to hear of an end
            for writer in ends:
                writer.transport.abort()
            self._writers -= ends
            self._pumps -= pumps


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(2**16):
            writer.write(data)
            await writer.drain()
        writer.write_eof()
    except OSError:
        writer.transport.abort()


class Steps:
    """When which step was finished, as the server writes it: also of steps that it takes again."""

    def __init__(self, metrics: Path) -> None:
        self._path = metrics
        self._known: set[tuple[int, float]] = set()
        self.finished: list[tuple[float, int]] = []
        """Time since 1970 and number, in the order of their time."""
        self._status: tuple[int, int] = (0, 0)

    def look(self) -> int:
        """The number of the last one."""
        try:
            found = self._path.stat()
            if (found.st_ino, found.st_size) != self._status:
                # A server that goes back to its checkpoint has the file written anew.
                offset = self._status[1] if found.st_ino == self._status[0] and found.st_size > self._status[1] else 0
                self._read(offset)
        except FileNotFoundError:
            pass
        return self.finished[-1][1] if self.finished else 0

    def _read(self, offset: int) -> None:
        with self._path.open("rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            file.seek(offset)
            content = file.read()
        whole = content.rfind(b"\n") + 1
        self._status = inode, offset + whole
        for line in content[:whole].splitlines():
            row = json.loads(line)
            if (entry := (row["step"], row["time"])) not in self._known:
                self._known.add(entry)
                self.finished.append((row["time"], row["step"]))


class Storm:
    """
    One run, in a folder of its own.

    Args:
        every: seconds from one fault to the next, on average; None disturbs nothing.
    """

    def __init__(self, folder: Path, model: Path, options: argparse.Namespace, every: float | None) -> None:
        self._folder, self._options, self._every = folder, options, every
        self._run_dir = folder / "run"
        self._steps = Steps(self._run_dir / "metrics.jsonl")
        self._draw = random.Random(f"{options.seed} {every}")
        port = free_port()
        settings = {**SERVER, "model": model, "steps": options.steps, "run_dir": self._run_dir, "port": port}
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
        programs = harness.PROGRAMS
        self._links = {name: Link(port) for name in DEVICES}
        serve = (str(programs / "splitlora-server"), "serve", "--resume-or-start", "--log-format=json", *flags)
        self._programs = {"server": Program(folder / "server.log", *serve)}
        _wait_until_it_listens(port)
        for number, (name, link) in enumerate(self._links.items()):
            pairs = harness.e2e_rows("train", slice(number * ROWS, (number + 1) * ROWS))
            data = harness.write_rows(folder / f"{name}.txt", pairs)
            self._programs[name] = Program(
                folder / f"{name}.log",
                str(programs / "splitlora-edge"),
                "train",
                "--log-format=json",
                f"--server=ws://127.0.0.1:{link.port}",
                f"--name={name}",
                f"--data={data}",
                f"--batch-size={BATCH_SIZE}",
                f"--state-dir={folder / 'state'}",
            )
        self._struck: list[tuple[float, str, str]] = []

    def to_its_end(self, what: str) -> dict[str, Any]:
        """Its figures."""
        try:
            self._watch(what)
        finally:
            for program in reversed(self._programs.values()):
                program.end()
            for link in self._links.values():
                link.close()
        return self._figures()

    def _watch(self, what: str) -> None:
        total, next_fault, last, heard = self._options.steps, None, 0, time.monotonic()
        with Progress(total) as progress:
            while not all(program.is_done() for program in self._programs.values()):
                time.sleep(SECONDS_BETWEEN_LOOKS)
                step, now = self._steps.look(), time.monotonic()
                if step != last:
                    progress.advance(f"{what}, {count(len(self._struck), 'fault')}", max(0, step - last))
                    last, heard = max(step, last), now
                elif now - heard > SECONDS_WITHOUT_A_STEP:
                    sys.exit(f"{what}: nothing happens after step {step}; see {self._folder}/*.log")
                if self._every is None or not step:
                    continue
                if next_fault is None:
                    next_fault = now + self._pause()
                if now >= next_fault and step < total - LAST_STEPS:
                    self._strike()
                    next_fault += self._pause()

    def _pause(self) -> float:
        """Seconds; never so few that a fault meets what the one before has left, as long as that takes no half of the mean."""
        assert self._every is not None
        return self._draw.uniform(0.5, 1.5) * self._every

    def _strike(self) -> None:
        kind, victim = self._draw.choice(self._options.kinds), self._draw.choice(DEVICES)
        if kind == "server":
            victim = "server"
        self._struck.append((time.time(), kind, victim))
        if kind == "link":
            self._links[victim].cut()
        elif kind == "silent":
            self._links[victim].silence()
        else:
            self._programs[victim].kill()

    def _figures(self) -> dict[str, Any]:
        self._steps.look()
        events = [json.loads(line) for line in (self._run_dir / "events.jsonl").read_text().splitlines()]
        began = next(event["time"] for event in events if event["kind"] == "training_started")
        finished = sorted(self._steps.finished)
        pace = statistics.median(b - a for (a, _), (b, _) in itertools.pairwise(finished))
        return {
            "seconds": finished[-1][0] - began,
            "seconds_of_steps": pace,
            "productive_seconds": _productive(began, finished, [at for at, _, _ in self._struck], pace),
            "adapter": hashlib.sha256((self._run_dir / "adapter/adapter_model.safetensors").read_bytes()).hexdigest(),
            "starts": {name: program.starts for name, program in self._programs.items()},
            "faults": [asdict(_cost(fault, began, finished, pace)) for fault in self._struck],
        }


def _wait_until_it_listens(port: int) -> None:
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            time.sleep(0.05)


def _cost(fault: tuple[float, str, str], began: float, finished: Sequence[tuple[float, int]], pace: float) -> Loss:
    """
    Args:
        fault: when it struck, its kind, its victim.
        finished: see `Steps`.
        pace: seconds of a step.
    """
    at, kind, victim = fault
    index = bisect_right(finished, (at, sys.maxsize))
    last = finished[index - 1][0] if index else began
    stood = max((step for _, step in finished[:index]), default=0)
    regained, passed = (
        next(number for number in range(index, len(finished)) if finished[number][1] == stood + more) for more in (1, 2)
    )
    return Loss(
        kind=kind,
        victim=victim,
        at=at - began,
        step=stood,
        seconds=finished[passed][0] - last - 2 * pace,
        steps_repeated=regained - index,
    )


def _productive(began: float, finished: Sequence[tuple[float, int]], faults: Sequence[float], pace: float) -> float:
    """Seconds of the steps that are in the result: of one that a fault has met, what a step takes without."""
    times = {step: at for at, step in finished}  # the last time that it was taken
    total, before = 0.0, began
    for step in sorted(times):
        at = times[step]
        is_met = bisect_right(faults, at) > bisect_right(faults, before) or at - before > 3 * pace
        total += pace if is_met else at - before
        before = at
    return total


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of them lie; the largest where they are too few to say."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def table(runs: dict[str, dict[str, Any]]) -> str:
    undisturbed = runs[UNDISTURBED]
    rows = []
    for name, run in runs.items():
        faults = run["faults"]
        rows.append(
            (
                name,
                len(faults),
                f"{run['seconds']:.1f} s",
                f"{undisturbed['seconds'] / run['seconds']:.1%}",
                f"{run['productive_seconds'] / run['seconds']:.1%}",
                sum(fault["steps_repeated"] for fault in faults),
                "equal" if run["adapter"] == undisturbed["adapter"] else "ANOTHER",
            )
        )
    header = ("run", "faults", "time to all steps", "ETTR", "productive", "steps repeated", "adapter")
    parts = [harness.markdown(header, rows)]
    rows = []
    for kind in KINDS:
        for name, run in runs.items():
            lost = [fault["seconds"] for fault in run["faults"] if fault["kind"] == kind]
            if lost:
                figures = (statistics.median(lost), percentile(lost, 0.99), statistics.fmean(lost))
                rows.append((kind, name, len(lost), *(f"{figure:.2f} s" for figure in figures)))
    if rows:
        parts.append(harness.markdown(("fault", "run", "times", "lost, median", "p99", "mean"), rows))
    return "\n\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults-every", type=float, nargs="*", default=[60.0, 10.0], metavar="SECONDS", help="on average")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", choices=KINDS, nargs="+", default=list(USUAL_KINDS), help="drawn with equal chances")
    parser.add_argument("--model", type=Path, help="default: gpt2-mini of the folder 'shared'")
    parser.add_argument("--output", type=Path, help="folder of the figures (default: a new one)")
    options = parser.parse_args()
    output = options.output or Path(tempfile.mkdtemp(prefix="reliability-"))
    model = options.model or harness.shared("models/gpt2-mini")
    settings = {"steps": options.steps, "seed": options.seed, "kinds": options.kinds, "model": str(model)}
    runs: dict[str, dict[str, Any]] = {}
    for every in (None, *options.faults_every):
        name = UNDISTURBED if every is None else f"a fault every {every:g} s"
        kept = output / f"{name.replace(' ', '-')}.json"
        described = {**settings, "kinds": []} if every is None else {**settings, "every": every}
        run = json.loads(kept.read_text()) if kept.exists() else {}
        if run.get("settings") != described:
            output.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=f"{kept.stem}-", dir=output))
            run = {"settings": described, **Storm(folder, model, options, every).to_its_end(name)}
            kept.write_text(json.dumps(run, indent=1))
        runs[name] = run
    print(table(runs))
    print(f"\nfigures and logs: {output}")
    return 0 if len({run["adapter"] for run in runs.values()}) == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
