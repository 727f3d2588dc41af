"""Ports of this machine that nobody uses."""

import random
import socket

__all__ = ["free_port"]


def free_port() -> int:
    """
    One that the system gives to nobody by itself, as it does those from 32768 on to whoever connects: a server that is
    killed finds its port free when it is started again.
    """
    for port in random.SystemRandom().sample(range(20000, 32768), 100):
        try:
            with socket.create_server(("127.0.0.1", port)):
                return port
        except OSError:
            continue  # somebody listens there
    raise OSError("a hundred ports from 20000 to 32767 are in use")
