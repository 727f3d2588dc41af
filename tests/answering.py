"""A server that was started as a program, and answers."""

import subprocess
import sys
import time
from typing import Any

from edge_client import ConnectionFailed, ping

__all__ = ["wait_until_it_answers"]


def wait_until_it_answers(server: "subprocess.Popen[Any]", url: str) -> None:
    """This program ends if that one does before."""
    while server.poll() is None:
        try:
            ping(url)
            return
        except ConnectionFailed:
            time.sleep(0.1)
    sys.exit("the server of the run did not start")
