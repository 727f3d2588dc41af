"""Held-out texts: what they lose under the adapter that the run has, before, while and after it learns."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from protocol import Array, Evaluation, EvaluationLoss, EvaluationStates, HeldOutLoss, Noted, RemoteProtocolError
from terminal import duration

from .data import Batch, DataError, Dataset, pack
from .device_log import DeviceLog
from .disclosure import Disclosure
from .engine import Engine
from .membership import Membership

__all__ = ["ABILITY", "Evaluated", "HeldOut", "perplexity"]

ABILITY = "held-out-loss"
"""What a server must have for this, of SERVER_ABILITIES."""
LARGEST_EXPONENT = 700.0  # exp() of more is no float


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What a device's held-out texts lost."""

    step: int
    """After this step; 0 before the first."""
    loss: float
    """Nats per labelled token."""
    labelled_tokens: int

    @property
    def perplexity(self) -> float:
        return _perplexity_of(self.loss)


class HeldOut:
    """
    A device's held-out texts, evaluated while the run goes on. The others wait meanwhile, since each step needs all of them.

    Inside a round of several steps every device has an edge adapter of its own, which with the server's is a model that nobody
    will ever have. So it is only evaluated where a round ends, with the adapter that the run has then.

    Args:
        every: steps from one evaluation to the next.
        told: called with each evaluation.
    """

    def __init__(
        self,
        data: Dataset,
        batch_size: int,
        every: int,
        *,
        membership: Membership,
        engine: Engine,
        disclosure: Disclosure,
        log: DeviceLog,
        told: Callable[[Evaluated], object] = lambda evaluated: None,
    ) -> None:
        self._told = told
        self._data, self._batch_size, self._every = data, batch_size, every
        self._membership, self._engine, self._disclosure, self._log = membership, engine, disclosure, log
        self.evaluations: list[Evaluated] = []
        """What has been measured, the earliest first. Of a step that the run takes again there is one more."""
        self.check_server()

    def check_server(self) -> None:
        """
        Raises:
            DataError: the server does not know what this device would tell it. One that was updated may be an older one later.
        """
        if ABILITY not in self._membership.welcome.abilities:
            raise DataError(
                f"the server of run {self._membership.welcome.run} is of a version that takes no held-out losses: update it, "
                "or start this device without --eval-every"
            )

    def evaluate_if_due(self, step: int) -> None:
        """As `evaluate`, before the first step, and at each round's end by which another ``every`` steps are done."""
        in_round = self._membership.welcome.settings.aggregate_every
        round_before = (step - 1) // in_round * in_round
        if not step or step // self._every > round_before // self._every:
            self.evaluate(step)

    def evaluate_once(self, step: int) -> None:
        """As `evaluate`; what is known already becomes the last of `evaluations`, and is not measured again."""
        known = next((evaluated for evaluated in reversed(self.evaluations) if evaluated.step == step), None)
        if known is None:
            self.evaluate(step)
        elif known is not self.evaluations[-1]:
            self.evaluations.append(known)

    def evaluate(self, step: int) -> None:
        """
        Evaluate all texts, and tell the server.

        Args:
            step: the last that is in the adapter.

        Raises:
            DataError: as `check_server`.
            Redirected: the run stands elsewhere.
        """
        self.check_server()
        membership = self._membership
        began = membership.stopwatch.now()
        batches = list(_losses(membership, self._engine, self._data, self._batch_size, self._disclosure))
        losses = np.concatenate([of_batch for of_batch, _ in batches])
        num_labels = sum(num for _, num in batches)
        told = self._disclosure.summed_loss(losses, "held out", step) / num_labels
        noted = membership.exchange(HeldOutLoss(step=step, loss=told, labelled_tokens=num_labels), Noted)
        if noted.step != step:
            raise RemoteProtocolError(f"expected a note of the held-out loss of step {step}, got that of step {noted.step}")
        seconds = membership.stopwatch.now() - began
        membership.stopwatch.lap()  # an evaluation belongs to no step
        if noted.reached < step:
            return  # the run is over, and has gone back to its best adapter
        if noted.reached > step:
            self._log.tell(
                "note",
                f"the run went on to step {noted.reached} while this device evaluated its held-out texts after step {step}, so "
                "their loss is that of no adapter, and does not count; fewer texts in --eval-data, or a longer --step-deadline "
                "on the server, leave it the time",
                level="warning",
                step=step,
            )
            return
        evaluated = Evaluated(step=step, loss=float(losses.sum(dtype=np.float64)) / num_labels, labelled_tokens=num_labels)
        self.evaluations.append(evaluated)
        when = f"after step {step}" if step else "before the first step"
        self._log.tell(
            "evaluated",
            f"perplexity {evaluated.perplexity:.3f} of the held-out texts {when}, measured in {duration(seconds)}",
            step=step,
            loss=evaluated.loss,
            labelled_tokens=num_labels,
            seconds=round(seconds, 3),
        )
        self._told(evaluated)


def perplexity(
    membership: Membership, engine: Engine, data: Dataset, batch_size: int, disclosure: Disclosure
) -> Iterator[float]:
    """
    Token-weighted perplexity through both parts, exp(summed loss / labelled tokens).

    Gives the estimate after every batch; the last one is the perplexity of all data.

    Raises:
        Redirected: the server has gone back to a checkpoint meanwhile: the batches before had another adapter.
    """
    summed_loss, num_labels = 0.0, 0
    for losses, num in _losses(membership, engine, data, batch_size, disclosure):
        summed_loss += float(losses.sum(dtype=np.float64))
        num_labels += num
        yield _perplexity_of(summed_loss / max(1, num_labels))


def _perplexity_of(loss: float) -> float:
    return math.exp(loss) if loss < LARGEST_EXPONENT else math.inf


def _losses(
    membership: Membership, engine: Engine, data: Dataset, batch_size: int, disclosure: Disclosure
) -> Iterator[tuple[Array, int]]:
    """
    Of each batch of held-out texts: its losses in nats, one for each label where this device computes them, and only their sum
    where the server does; and how many labels there are.
    """
    for number in range(data.num_batches(batch_size)):
        batch = pack(data.samples[number * batch_size : (number + 1) * batch_size])
        yield _evaluate(membership, engine, number, batch, disclosure), len(batch.labels)


def _evaluate(membership: Membership, engine: Engine, number: int, batch: Batch, disclosure: Disclosure) -> Array:
    """A batch is known by its number in the data, whenever it is asked about."""
    index = membership.next_index()
    question = Evaluation(
        index=index,
        lengths=batch.lengths,
        label_counts=disclosure.label_counts(batch),
        labels=disclosure.labels(batch),
        values=disclosure.activations(engine.infer(batch), batch, "held out", number),
    )
    answer: EvaluationLoss | EvaluationStates
    if membership.welcome.settings.labels == "server":
        answer = membership.exchange(question, EvaluationLoss)
        losses = np.array([answer.summed_loss])
    else:
        answer = membership.exchange(question, EvaluationStates)
        losses = engine.losses(disclosure.of_labelled_rows(answer.values, batch), batch.labels)
    if answer.index != index:
        raise RemoteProtocolError(f"expected what becomes of batch {index}, got that of batch {answer.index}")
    membership.stopwatch.lap()  # an evaluation belongs to no step
    return losses
