"""
Thousands of bare connections to one server: how fast they join, what each costs it in memory, how fast it answers meanwhile.

    python benchmarks/connections.py --devices 1000 5000
    python benchmarks/connections.py --devices 1000 --tls

The server is a process of its own, with a tiny model. The devices are another: they greet and join, and say nothing more, so
that the run waits for one more than there are. Then all connections are lost at once, and come back. A ping on a further
connection, again and again, says how long the server keeps anybody waiting.
"""

import argparse
import asyncio
import base64
import os
import ssl
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
ANY_KEY = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
ANY_KEY.check_hostname, ANY_KEY.verify_mode = False, ssl.CERT_NONE
PINGING = "pinging"
MODEL = {"n_layer": 2, "n_embd": 32, "n_head": 2}


class Device:
    """
    A connection, and what is said over it.

    Args:
        secret: with which it is let in over TLS; without one nothing is encrypted.
    """

    def __init__(self, url: str, name: str, secret: str) -> None:
        self._url, self._name, self._options = url, name, OPTIONS
        if secret:
            credentials = base64.b64encode(f"{name}:{secret}".encode()).decode()
            self._options = {**OPTIONS, "ssl": ANY_KEY, "additional_headers": {"Authorization": f"Basic {credentials}"}}
        self.connection: ClientConnection

    async def connect(self) -> None:
        self.connection = await connect(self._url, **self._options)

    async def join(self, fingerprint: str) -> None:
        await self.connect()
        await self.ask(Hello(name=self._name, fingerprint=fingerprint))
        await self.connection.send(encode(Join(num_samples=10**6, batch_size=1, longest=8)))

    async def ask(self, message: Message) -> None:
        await self.connection.send(encode(message))
        await self.connection.recv()

    def drop(self) -> None:
        self.connection.transport.abort()


async def joined(devices: list[Device], fingerprint: str) -> float:
    """Let all of them in; seconds that this took."""
    places, began = asyncio.Semaphore(AT_ONCE), time.monotonic()

    async def join(device: Device) -> None:
        async with places:
            await device.join(fingerprint)

    await asyncio.gather(*(join(device) for device in devices))
    return time.monotonic() - began


async def answers(device: Device, stopped: asyncio.Event) -> list[float]:
    """Milliseconds until each ping was answered, one after the other."""
    taken: list[float] = []
    await device.connect()
    while not stopped.is_set():
        began = time.monotonic()
        await device.ask(Ping(index=len(taken) + 1))
        taken.append(1000 * (time.monotonic() - began))
        await asyncio.sleep(0.05)
    device.drop()
    return taken


async def measure(url: str, pid: int, fingerprint: str, secrets: dict[str, str]) -> list[object]:
    before, number = memory(pid), len(secrets) - 1
    devices = [Device(url, name, secret) for name, secret in secrets.items() if name != PINGING]
    row: list[object] = [number]
    for act in ("join", "come back"):
        if act == "come back":
            for device in devices:
                device.drop()
        stopped = asyncio.Event()
        pinging = asyncio.create_task(answers(Device(url, PINGING, secrets[PINGING]), stopped))
        spent = processor_seconds(pid)
        seconds = await joined(devices, fingerprint)
        await asyncio.sleep(1.0)
        spent = processor_seconds(pid) - spent
        stopped.set()
        taken = await pinging
        row += [f"{1000 * seconds / number:.1f}", f"{1000 * spent / number:.2f}"]
        row += [f"{statistics.median(taken):.0f}", f"{max(taken):.0f}"]
        if act == "join":
            row.append(f"{(memory(pid) - before) / number / 1e3:.0f}")
    for device in devices:
        device.drop()
    return row


def processor_seconds(pid: int) -> float:
    # proc_pid_stat(5): the name, in brackets, may hold spaces; utime and stime are the 12th and 13th field after it.
    ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def memory(pid: int) -> float:
    found = process_memory("RssAnon", pid)
    assert found is not None
    return found


def main() -> None:
    from conftest import make_model

    from gpu_server.enrolment import Enrolments
    from split_model import PretrainedModel

    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--devices", type=int, nargs="+", default=[1000, 5000])
    parser.add_argument("--tls", action="store_true", help="devices are enrolled, and their connections encrypted")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder), **MODEL)
        fingerprint = PretrainedModel(model).fingerprint()
        for number in options.devices:
            run_dir = Path(folder, f"run-of-{number}")
            settings = {"model": str(model), "run_dir": str(run_dir), "cut_layer": 1, "lora_rank": 2, "steps": 1}
            settings |= {"clients": number + 1, "max_connections": number + 99, "max_strangers": 2 * AT_ONCE, "device": "cpu"}
            settings |= {"dtype": "float32", "handshake_seconds": 600.0}
            enrol = Enrolments(run_dir / "clients.json").enrol if options.tls else lambda _: ""
            secrets = {name: enrol(name) for name in (PINGING, *(f"device-{index:05}" for index in range(number)))}
            server, url = harness.start_server(settings)
            rows.append(asyncio.run(measure(url, server.pid, fingerprint, secrets)))
            server.terminate()
            server.join()
    of_each = ["the server's processor, ms", "a ping meanwhile, median ms", "longest"]
    header = ["devices", "a join, ms", *of_each, "memory a device, kB", "a device that is back, ms", *of_each]
    print(harness.markdown(header, rows))


if __name__ == "__main__":
    main()
