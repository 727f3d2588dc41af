"""Ports of this machine that nobody uses."""

import socket

__all__ = ["free_port"]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
