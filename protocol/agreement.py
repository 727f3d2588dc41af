"""What a message must keep to because of what was said before it: the client's offer, and the run's settings."""

from collections.abc import Iterator
from dataclasses import replace

from .codecs import Coded
from .errors import RemoteProtocolError
from .messages import (
    ActivationGradient,
    Activations,
    Array,
    EdgeAdapter,
    Evaluation,
    EvaluationLoss,
    EvaluationStates,
    Hello,
    HiddenGradient,
    HiddenStates,
    Join,
    Message,
    Start,
    Welcome,
)
from .settings import DELTA, EXACT, LARGEST_COUNT, RunSettings, gradient_codec

__all__ = ["Agreement", "changed_settings"]


class Agreement:
    """What one conversation has agreed on so far. Each side holds the other to it."""

    def __init__(self) -> None:
        self.hello: Hello | None = None
        self.settings: RunSettings | None = None
        self._join: Join | None = None

    def note(self, message: Message) -> None:
        """A message that was sent or accepted."""
        if isinstance(message, Hello):
            self.hello = message
        elif isinstance(message, Welcome):
            self.settings = message.settings
        elif isinstance(message, Join):
            self._join = message

    def check(self, message: Message) -> None:
        """
        Of a message that has come.

        Raises:
            RemoteProtocolError: it is legal in no state of this run.
        """
        if isinstance(message, Welcome):
            self._check_offered(message.settings.codecs())
            self._check_abilities(message.settings.abilities())
        if self.settings is None:
            return
        if wrong := self.wrong_labels(message):
            raise RemoteProtocolError(wrong)
        self._check_precision(message, self.settings.precision)
        in_parts = Activations | HiddenStates | HiddenGradient | ActivationGradient
        if isinstance(message, in_parts) and message.micro_batch >= self.settings.micro_batches:
            raise RemoteProtocolError(
                f"{_name(message)} of micro-batch {message.micro_batch} of step {message.step}; "
                f"this run's are numbered from 0 to {self.settings.micro_batches - 1}"
            )
        if isinstance(message, Activations) and message.since is not None and self.settings.trains_edge:
            raise RemoteProtocolError("Activations without rows of some samples, and in this run the edge adapter changes them")
        if isinstance(message, EdgeAdapter) and message.checkpoint > message.step:
            raise RemoteProtocolError(f"EdgeAdapter of step {message.step} with a later checkpoint, {message.checkpoint}")
        if isinstance(message, Start):
            self._check_start(message, self.settings)
        if isinstance(message, Start | ActivationGradient) and message.codec:
            self._check_codec(message.codec, self.settings)

    def wrong_labels(self, message: Message) -> str | None:
        """What is wrong with a message in a run whose labels are where this run's are; of our own, too."""
        if self.settings is None:
            return None
        on_device = self.settings.labels == "device"
        hidden = self.settings.label_rows == "hidden"
        here = f"in this run the {self.settings.labels} has the labels"
        if isinstance(message, EvaluationLoss if on_device else HiddenStates | HiddenGradient | EvaluationStates):
            return f"{_name(message)}, and {here}"
        if isinstance(message, Activations | Evaluation):
            wanted = 0 if on_device else message.num_labelled
            if len(message.labels) != wanted:
                return f"{_name(message)} with {len(message.labels)} labels, expected {wanted}: {here}"
            if hidden and (message.label_counts != message.lengths).any():
                return f"{_name(message)} says which rows have a label, and this run hides it"
        if isinstance(message, HiddenGradient) and not hidden and message.labelled_tokens != len(message.values):
            return (
                f"HiddenGradient of {len(message.values)} rows and {message.labelled_tokens} labelled tokens, expected as many"
            )
        return None

    def _check_abilities(self, needed: set[str]) -> None:
        missing = needed.difference(self.hello.abilities if self.hello else ())
        if missing:
            raise RemoteProtocolError(f"this run needs {', '.join(sorted(missing))}, which this side did not offer")

    def _check_precision(self, message: Message, precision: str) -> None:
        for name, array in _floats(message):
            if array.dtype.name != precision:
                raise RemoteProtocolError(f"{_name(message)}.{name} is {array.dtype.name}; this run is in {precision}")

    def _check_start(self, start: Start, settings: RunSettings) -> None:
        own_steps = self._own_steps(settings)
        least = 0 if settings.may_end_early else own_steps
        if not max(least, start.step, start.round) <= start.total_steps <= LARGEST_COUNT:
            raise RemoteProtocolError(
                f"Start after step {start.step}, with the adapter of step {start.round}, in a run of {start.total_steps} steps "
                f"in which this client takes part in {own_steps}"
            )

    def ends_early(self, start: Start) -> bool:
        """Whether it says that the run is over though the client has data left."""
        return self.settings is not None and start.step == start.total_steps < self._own_steps(self.settings)

    def _own_steps(self, settings: RunSettings) -> int:
        """For which the client has data."""
        return 0 if self._join is None else settings.steps_of_client(self._join.num_samples, self._join.batch_size)

    def _check_codec(self, codec: str, settings: RunSettings) -> None:
        if {settings.activation_codec, settings.gradient_codec} == {EXACT} and codec != EXACT:
            raise RemoteProtocolError(f"the server chose the codec {_shown(codec)} in a run that began exact and stays so")
        if codec == DELTA != settings.activation_codec:
            raise RemoteProtocolError(f"the server chose the codec {DELTA} in a run that did not begin with it")
        self._check_offered({codec, gradient_codec(codec, settings.gradient_codec)})

    def _check_offered(self, chosen: set[str]) -> None:
        missing = chosen.difference({EXACT}, self.hello.codecs if self.hello else ())
        if missing:
            names = ", ".join(map(_shown, sorted(missing)))
            raise RemoteProtocolError(f"the server chose the codec {names}, which was not offered")


def changed_settings(before: RunSettings, now: RunSettings, *, restarted: bool) -> list[str]:
    """
    What is other in a run that is welcomed again, each as "lr 0.1 is now 0.2": the same run has the same settings.

    Only its length may grow, with a restart, where the rate does not depend on it.
    """
    changed = [f"{name} {value} is now {vars(now)[name]}" for name, value in vars(before).items() if value != vars(now)[name]]
    may_grow = restarted and not before.rate_depends_on_length and (before.steps or 0) < (now.steps or 0)
    return [] if may_grow and replace(now, steps=before.steps, epochs=before.epochs) == before else changed


def _floats(message: Message) -> Iterator[tuple[str, Array]]:
    """Every tensor of floats in it, by its name; what is still coded aside, which becomes float32."""
    for name, value in vars(message).items():
        for key, array in value.items() if isinstance(value, dict) else [("", value)]:
            if not isinstance(array, Coded) and getattr(array, "dtype", None) is not None and array.dtype.kind == "f":
                yield f"{name}[{key[:80]!r}]" if key else name, array


def _name(message: Message) -> str:
    return type(message).__name__


def _shown(codec: str) -> str:
    return ascii(codec[:40])[1:-1]
