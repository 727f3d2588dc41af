"""Whoever follows a run: the SDK, a page, a test."""

from ..federation import RunStatus, StepRecord

__all__ = ["Observer"]


class Observer:
    """
    Is told how a run goes. Override what you want to hear of; see `GpuServer.observe`.

    Both methods are called on the thread that serves the devices, so they return at once. What they raise ends the run.
    """

    def step_finished(self, record: StepRecord) -> None:
        """A step is trained, its replies are sent, and its line of metrics is written."""

    def status_changed(self, status: RunStatus) -> None:
        """
        A client has joined, is back, is lost or has left; a step is finished, whose record follows by `step_finished`; the run
        is complete. Phases that last for a part of a step are not told.
        """
