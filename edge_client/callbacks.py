"""Whoever would like to hear how a device's part in a run goes."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from .data import DataError
from .held_out import Evaluated
from .training import Step

if TYPE_CHECKING:
    from .client import EdgeClient

__all__ = ["Callback", "checked"]


class Callback:
    """
    Is told how a device's part in a run goes, while `EdgeClient.train` is followed. Override what you want to hear of. Names
    are those of transformers' `TrainerCallback` where they mean the same. Nothing is decided here: that is for the server.

    All methods are called on the thread that follows the training, which waits for them. What they raise is raised there, and
    as after any error this device stays a member of the run; but what `on_train_end` raises ends no run that is over.
    """

    def on_train_begin(self, client: "EdgeClient") -> None:
        """The run has started, or this device is back in it."""

    def on_step_end(self, client: "EdgeClient", step: Step) -> None:
        """A step is done. One that the server takes again, since it went back to a checkpoint, is told again."""

    def on_evaluate(self, client: "EdgeClient", evaluated: Evaluated) -> None:
        """The held-out texts are evaluated, with ``eval_every``."""

    def on_train_end(self, client: "EdgeClient") -> None:
        """The run is over, and this device has its final adapter."""


def checked(callbacks: Iterable[Callback]) -> tuple[Callback, ...]:
    """
    Raises:
        DataError: they are no list, or one of them is not derived from `Callback`: it would fail in the midst of a run.
    """
    given: object = callbacks
    found = tuple(given) if isinstance(given, Iterable) else (given,)
    for each in found:
        if not isinstance(each, Callback):
            kind = f"the class {each.__name__}, of which an object is needed" if isinstance(each, type) else type(each).__name__
            raise DataError(f"callbacks has {kind}: each is an object of a class derived from edge_client.Callback")
    if not isinstance(given, Iterable):
        raise DataError(f"callbacks is {type(given).__name__}: give a list of them")
    return found
