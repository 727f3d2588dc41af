"""The run on the network: connections, what is said over them, and what the federation wants done."""

from .event_relay import EventRelay
from .journal import Journal
from .observer import Observer
from .run_server import RunServer
from .viewers import Viewers

__all__ = ["EventRelay", "Journal", "Observer", "RunServer", "Viewers"]
