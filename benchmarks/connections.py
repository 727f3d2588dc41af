"""
Thousands of bare connections to one server: how fast they join, what each costs it in memory, how fast it answers meanwhile.

    python benchmarks/connections.py --devices 1000 5000

The server is a process of its own, with a tiny model. The devices are another: they greet and join, and say nothing more, so
that the run waits for one more than there are. Then all connections are lost at once, and come back. A ping on a further
connection, again and again, says how long the server keeps anybody waiting. Nothing is encrypted.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
from websockets.asyncio.client import ClientConnection, connect

from edge_client.generation import process_memory
from protocol import Hello, Join, Message, Ping, encode

AT_ONCE = 64
"""Devices that greet at the same time."""
OPTIONS: dict[str, Any] = {"max_size": 2**26, "open_timeout": 600, "ping_interval": None, "proxy": None, "compression": None}
MODEL = {"n_layer": 2, "n_embd": 32, "n_head": 2}


class Device:
    """A connection, and what is said over it."""

    def __init__(self, url: str, name: str, fingerprint: str) -> None:
        self._url, self._name, self._fingerprint = url, name, fingerprint
        self.connection: ClientConnection

    async def join(self) -> None:
        self.connection = await connect(self._url, **OPTIONS)
        await self.ask(Hello(name=self._name, fingerprint=self._fingerprint))
        await self.connection.send(encode(Join(num_samples=10**6, batch_size=1, longest=8)))

    async def ask(self, message: Message) -> None:
        await self.connection.send(encode(message))
        await self.connection.recv()

    def drop(self) -> None:
        self.connection.transport.abort()


async def joined(devices: list[Device]) -> float:
    """Let all of them in; seconds that this took."""
    places, began = asyncio.Semaphore(AT_ONCE), time.monotonic()

    async def join(device: Device) -> None:
        async with places:
            await device.join()

    await asyncio.gather(*(join(device) for device in devices))
    return time.monotonic() - began


async def answers(url: str, stopped: asyncio.Event) -> list[float]:
    """Seconds until each ping was answered, one after the other."""
    taken = []
    async with connect(url, **OPTIONS) as connection:
        index = 0
        while not stopped.is_set():
            index, began = index + 1, time.monotonic()
            await connection.send(encode(Ping(index=index)))
            await connection.recv()
            taken.append(time.monotonic() - began)
            await asyncio.sleep(0.05)
    return taken


async def measure(url: str, pid: int, fingerprint: str, number: int) -> list[object]:
    before = memory(pid)
    devices = [Device(url, f"device-{index:05}", fingerprint) for index in range(number)]
    row: list[object] = [number]
    for act in ("join", "come back"):
        if act == "come back":
            for device in devices:
                device.drop()
        stopped = asyncio.Event()
        pinging = asyncio.create_task(answers(url, stopped))
        seconds = await joined(devices)
        await asyncio.sleep(1.0)
        stopped.set()
        taken = await pinging
        row += [f"{1000 * seconds / number:.2f}", f"{1000 * statistics.median(taken):.0f}", f"{1000 * max(taken):.0f}"]
        if act == "join":
            row.append(f"{(memory(pid) - before) / number / 1e3:.0f}")
    for device in devices:
        device.drop()
    return row


def memory(pid: int) -> float:
    found = process_memory("RssAnon", pid)
    assert found is not None
    return found


def main() -> None:
    from conftest import make_model

    from split_model import PretrainedModel

    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--devices", type=int, nargs="+", default=[1000, 5000])
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder), **MODEL)
        fingerprint = PretrainedModel(model).fingerprint()
        for number in options.devices:
            settings = {"model": str(model), "run_dir": f"{folder}/{number}", "cut_layer": 1, "lora_rank": 2, "steps": 1}
            settings |= {"clients": number + 1, "max_connections": number + 99, "max_strangers": 2 * AT_ONCE, "device": "cpu"}
            settings |= {"dtype": "float32", "handshake_seconds": 600.0}
            server, url = harness.start_server(settings)
            rows.append(asyncio.run(measure(url, server.pid, fingerprint, number)))
            server.terminate()
            server.join()
    header = ["devices", "a join, ms", "a ping meanwhile, median ms", "longest", "memory a device, kB"]
    print(harness.markdown([*header, "a device that is back, ms", "a ping meanwhile, median ms", "longest"], rows))


if __name__ == "__main__":
    main()
