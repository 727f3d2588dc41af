"""What a server says instead of a traceback."""

__all__ = ["ConfigError", "RankLost", "ServerError"]


class ServerError(ValueError):
    """
    The server cannot begin, or go on: a disk is full, a checkpoint is torn, a port is taken, a certificate cannot be used. The
    message says what is wrong and what to do.
    """


class ConfigError(ServerError):
    """A setting that cannot be; the message names it and its value."""


class RankLost(ServerError):
    """A process that computes together with this one is gone; the run can go on from its last checkpoint."""

    def __init__(self, who: str) -> None:
        super().__init__(
            f"{who} is gone: its process has ended, or the connection to it broke; --resume goes on with the run, with any "
            "number of ranks"
        )
