"""Whoever follows a run: the SDK, a page, a test."""

from ..federation import RunStatus, StepRecord
from ..history import EvaluationRecord, RunEvent

__all__ = ["Observer"]


class Observer:
    """
    Is told how a run goes. Override what you want to hear of; see `GpuServer.observe`.

    All methods are called on the thread that serves the devices, so they return at once. What they raise ends the run.
    """

    def serving_begins(self, step: int) -> None:
        """The server listens. So many steps are done: none of a new run, those before the checkpoint of one that goes on."""

    def serving_ends(self) -> None:
        """Nothing follows. It may first finish what it has begun; nobody waits for the server any more."""

    def step_finished(self, record: StepRecord) -> None:
        """A step is trained, its replies are sent, and its line of metrics is written."""

    def status_changed(self, status: RunStatus) -> None:
        """
        A client has joined, is back, is lost or has left; a step is finished, whose record follows by `step_finished`; the run
        is complete. Phases that last for a part of a step are not told.

        Every status is a copy of all members, made only where somebody has overridden this. Among thousands of devices override
        `event_happened` instead, which says who has come or gone.
        """

    def event_happened(self, event: RunEvent) -> None:
        """Something that an operator would like to be told; see `EVENT_KINDS`."""

    def evaluated(self, record: EvaluationRecord) -> None:
        """A device has measured its held-out loss."""

    def checkpoint_written(self, step: int) -> None:
        """The run can go on from the end of this step, whatever happens."""
