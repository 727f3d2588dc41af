"""
python -m gpu_server.sweep.child MODULE ARGUMENTS: runs a program that does not outlive whoever started it.

Its standard input is a pipe from there, in which nothing is ever written. The system closes it with the other process, however
that ends; then this one ends at once, as if it were killed, too. Nobody is left who holds a run's folder.
"""

import os
import runpy
import sys
import threading

__all__ = ["main"]


def main() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def _end_with_parent() -> None:
    while os.read(0, 1):  # not sys.stdin, whose lock this thread would hold when Python ends
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
