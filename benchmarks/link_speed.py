"""
Is the shaped link what it says, and is it in nobody's way? Throughput and round trip of one TCP connection: without a link,
through a link without bounds, which shows what the proxy itself can carry, and over each of the links.

They take turns; medians of rounds.
"""

import argparse
import socket
import statistics
import threading
import time
from contextlib import nullcontext

import harness
from shaped_link import LINKS, LinkProfile, ShapedLink

from terminal import Progress

SECONDS, LARGEST_TRANSFER, QUESTIONS = 0.5, 125_000_000, 5
UNBOUNDED = LinkProfile(up=1e12, down=1e12, round_trip=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    profiles: dict[str, LinkProfile | None] = {"no link": None, "a link without bounds": UNBOUNDED, **LINKS}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in profiles}
    with Progress(options.rounds * len(profiles), unit="measurement") as progress:
        for _ in range(options.rounds):
            for name, profile in profiles.items():
                found[name].append(measure(profile))
                progress.advance(f"{name}: {found[name][-1][0]:.4g} Mbit/s, {found[name][-1][1]:.3g} ms")
    rows = []
    for name, profile in profiles.items():
        megabits, milliseconds = (statistics.median(column) for column in zip(*found[name], strict=True))
        wanted = [f"{profile.up / 1e6:g}", f"{profile.round_trip * 1e3:g}"] if name in LINKS and profile else ["", ""]
        rows.append([name, f"{megabits:,.1f}", wanted[0], f"{milliseconds:.2f}", wanted[1]])
    print(harness.markdown(["", "Mbit/s", "of", "round trip, ms", "of"], rows))


def measure(profile: LinkProfile | None) -> tuple[float, float]:
    """Mbit/s upwards, and milliseconds of the shortest of some round trips."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = int(listener.getsockname()[1])
        with (
            nullcontext() if profile is None else ShapedLink(port, profile) as link,
            socket.create_connection(("127.0.0.1", link.port if link else port)) as client,
            listener.accept()[0] as server,
        ):
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            seconds = min(round_trip(client, server) for _ in range(QUESTIONS))
            size = min(LARGEST_TRANSFER, int(SECONDS * (profile.up if profile else 1e12) / 8))
            # The first byte arrives half a round trip after it was sent.
            return size * 8 / 1e6 / (transfer(client, server, size) - seconds / 2), seconds * 1e3


def round_trip(client: socket.socket, server: socket.socket) -> float:
    began = time.perf_counter()
    client.sendall(b"?")
    server.recv(1)
    server.sendall(b"!")
    client.recv(1)
    return time.perf_counter() - began


def transfer(client: socket.socket, server: socket.socket, size: int) -> float:
    """Seconds."""
    sending = threading.Thread(target=client.sendall, args=(bytes(size),))
    began = time.perf_counter()
    sending.start()
    while size:
        size -= len(server.recv(2**20))
    seconds = time.perf_counter() - began
    sending.join()
    return seconds


if __name__ == "__main__":
    main()
