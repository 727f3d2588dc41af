"""What a server says instead of a traceback."""

__all__ = ["ConfigError", "ServerError"]


class ServerError(ValueError):
    """
    The server cannot begin, or go on: a disk is full, a checkpoint is torn, a port is taken, a certificate cannot be used. The
    message says what is wrong and what to do.
    """


class ConfigError(ServerError):
    """A setting that cannot be; the message names it and its value."""
