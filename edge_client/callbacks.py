"""Whoever would like to hear how a device's part in a run goes."""

from typing import TYPE_CHECKING

from .held_out import Evaluated
from .training import Step

if TYPE_CHECKING:
    from .client import EdgeClient

__all__ = ["Callback"]


class Callback:
    """
    Is told how a device's part in a run goes, while `EdgeClient.train` is followed. Override what you want to hear of. Names
    are those of transformers' `TrainerCallback` where they mean the same. Nothing is decided here: that is for the server.

    All methods are called on the thread that follows the training, which waits for them. What they raise is raised there, and
    as after any error this device stays a member of the run.
    """

    def on_train_begin(self, client: "EdgeClient") -> None:
        """The run has started, or this device is back in it."""

    def on_step_end(self, client: "EdgeClient", step: Step) -> None:
        """A step is done. One that the server takes again, since it went back to a checkpoint, is told again."""

    def on_evaluate(self, client: "EdgeClient", evaluated: Evaluated) -> None:
        """The held-out texts are evaluated, with ``eval_every``."""

    def on_train_end(self, client: "EdgeClient") -> None:
        """The run is over, and this device has its final adapter."""
