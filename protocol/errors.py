"""
Whose fault it is.

* ProtocolError
    * LocalProtocolError    we tried to send what the protocol forbids: a bug on this side
    * RemoteProtocolError   the peer sent what the protocol forbids, or bytes that are no message
* InvalidName               a user chose a client name that cannot be one
* TrainingDiverged          nobody's: the numbers that a run exchanges are no longer finite
"""

__all__ = ["InvalidName", "LocalProtocolError", "ProtocolError", "RemoteProtocolError", "TrainingDiverged"]


class ProtocolError(Exception):
    """Base class of every error of this package."""


class LocalProtocolError(ProtocolError):
    """We tried to send a message that is not allowed now."""


class RemoteProtocolError(ProtocolError):
    """The peer sent a message that is not allowed now, or bytes that are not a message."""


class InvalidName(ValueError):
    """Not a client name."""


class TrainingDiverged(ArithmeticError):
    """Activations, gradients or losses are no longer finite numbers."""
