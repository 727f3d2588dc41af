"""A step while it is computed, and what is recorded of it afterwards."""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from protocol import Activations, Array, HiddenGradient, HiddenStates, Seconds, Tensors
from protocol.codecs import Coded

__all__ = ["Aggregated", "AskedBack", "StepInProgress", "StepRecord", "Trained"]


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """A finished step: what metrics.jsonl says of it, and what whoever follows a run is given."""

    number: int
    """1, 2, ..."""
    loss: float
    """Nats per labelled token."""
    labelled_tokens: int
    tokens: int
    seconds: dict[str, Seconds]
    """By client: what it has spent since the step before."""
    deadline: float
    """Seconds that the next step waits for its clients' activations before it asks whether a quorum is there."""
    codec: str
    """In which this step's activations came; empty where none travel."""
    server_compute: float
    """Seconds that the server computed, also while clients did not wait for it."""
    bytes_up: dict[str, int] = field(default_factory=dict)
    """By client, on the socket, WebSocket framing included, since the record before."""
    bytes_down: dict[str, int] = field(default_factory=dict)
    time: float = 0.0
    """
    When it was finished, in seconds since 1970, UTC. Lines of earlier versions have neither this nor what follows: it is 0, NaN
    or empty.
    """
    step_seconds: float = 0.0
    """Since the step before was finished; a server's first step: since the run began, or went on."""
    learning_rate: float = math.nan
    gradient_norm: float = math.nan
    """
    Euclidean, of the mean loss by the server's adapter, before the optimiser's step; in rounds of one step, where the edge's
    gradients are summed, by both adapters together.
    """
    losses: dict[str, float] = field(default_factory=dict)
    """By client: nats per labelled token of its own; nobody without any is in it."""
    labelled: dict[str, int] = field(default_factory=dict)
    """By client of this step: its labelled tokens."""
    samples: dict[str, int] = field(default_factory=dict)
    """By client of this step: its sequences."""
    tokens_of: dict[str, int] = field(default_factory=dict)
    """By client of this step: its part of ``tokens``."""
    together: int = 0
    """
    Clients of this step of which only sums are known, in place of a client: so a line has it of a run with very many, see
    `history.TOGETHER`. 0 where each is named, as in every step that a server has just finished.
    """

    @property
    def num_taking_part(self) -> int:
        """Clients of this step; in lines of earlier versions, which do not say who took part, those that are in them."""
        return self.together or len(self.labelled or self.seconds)

    @property
    def num_bytes(self) -> int:
        """Of all clients, both ways."""
        return sum(self.bytes_up.values()) + sum(self.bytes_down.values())


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What came of a `Train` or a `Backward`."""

    loss: float
    """Nats per labelled token, over the step's micro-batches so far."""
    labelled_tokens: int
    """Of the step's micro-batches so far."""
    gradients: dict[str, Array]
    """By client: (N, d), of the micro-batch's summed loss by the client's activations; nobody where the edge learns nothing."""
    summed_losses: dict[str, float] = field(default_factory=dict)
    """By client: of the micro-batch, in nats."""
    gradient_norm: float = 0.0
    """Euclidean, of the mean loss by the server's adapter; 0 until the step's last micro-batch."""


@dataclass(frozen=True, kw_only=True)
class Aggregated:
    """What came of an `Aggregate`."""

    edge_adapter: Tensors
    """A copy of the edge part's LoRA matrices."""
    change: Mapping[str, Coded] | None = None
    """What they have changed since the round before, as clients are to get it; None where they get the matrices."""
    gradient_norm: float = 0.0
    """Euclidean, of the mean loss by the edge adapter; 0 where adapters are averaged."""


@dataclass
class AskedBack:
    """A micro-batch between its forward and its backward computation, where devices have the labels."""

    hidden_states: dict[str, HiddenStates]
    """What each of its clients was asked back with."""
    gradients: dict[str, HiddenGradient] = field(default_factory=dict)
    """What of it they have replied."""

    def waits_for(self, client: str) -> bool:
        return client in self.hidden_states and client not in self.gradients


@dataclass
class StepInProgress:
    """What one step has come to, from its first micro-batch until it is recorded."""

    micro_batch: int = 0
    """The first that is not answered; 0 again once the last is, as of all questions without micro-batches."""
    asked_back: deque[AskedBack] = field(default_factory=deque)
    """This micro-batch and those after it whose clients are asked back, in their order; always empty where the server has the
    labels."""
    labels_of: dict[str, int] = field(default_factory=dict)
    """Members whose first micro-batch is computed, and the labelled tokens of each so far. Nobody enters a step later."""
    summed_losses: dict[str, float] = field(default_factory=dict)
    """Nats of these labels, by member."""
    samples_of: dict[str, int] = field(default_factory=dict)
    """Sequences computed, by member."""
    tokens_of: dict[str, int] = field(default_factory=dict)
    """Rows computed, labelled or not, by member."""
    loss: float = math.nan
    """Nats per labelled token so far; as the engine gives it, which has the sum."""
    labelled_tokens: int = 0
    gradient_norm: float = 0.0
    """As far as the step is computed; see `StepRecord`."""
    server_compute: float = 0.0
    """Seconds of the engine, the aggregation's included."""

    @property
    def next_forward(self) -> int:
        """The first micro-batch of which nothing is computed."""
        return self.micro_batch + len(self.asked_back)

    def asked_back_of(self, micro_batch: int) -> AskedBack | None:
        """None if its clients are not asked back yet, or are answered."""
        place = micro_batch - self.micro_batch
        return self.asked_back[place] if 0 <= place < len(self.asked_back) else None

    def add(self, batches: Mapping[str, Activations]) -> None:
        """A micro-batch is going to be computed. The first one says who is in the step."""
        for name, batch in batches.items():
            self._add_labels(name, len(batch.labels))  # none where devices have them: they tell their number later
            self.samples_of[name] = self.samples_of.get(name, 0) + len(batch.lengths)
            self.tokens_of[name] = self.tokens_of.get(name, 0) + len(batch.values)

    def add_labels(self, gradients: Mapping[str, HiddenGradient]) -> None:
        """The gradients of a micro-batch have come."""
        for name, gradient in gradients.items():
            self._add_labels(name, gradient.labelled_tokens)

    def _add_labels(self, name: str, num_labels: int) -> None:
        self.labels_of[name] = self.labels_of.get(name, 0) + num_labels

    def add_trained(self, trained: Trained, seconds: float) -> None:
        """A micro-batch is computed, which took so many ``seconds``."""
        self.loss, self.labelled_tokens, self.gradient_norm = trained.loss, trained.labelled_tokens, trained.gradient_norm
        for name, summed_loss in trained.summed_losses.items():
            self.summed_losses[name] = self.summed_losses.get(name, 0.0) + summed_loss
        self.server_compute += seconds

    def add_aggregated(self, aggregated: Aggregated, seconds: float) -> None:
        """The step ends a round, whose edge adapter is made; that took so many ``seconds``."""
        self.gradient_norm = math.hypot(self.gradient_norm, aggregated.gradient_norm)
        self.server_compute += seconds

    def micro_batch_is_answered(self) -> None:
        """The next one is the first that is not."""
        self.micro_batch += 1
        if self.asked_back:
            self.asked_back.popleft()

    def goes_on_from(self, micro_batch: int) -> None:
        """Nothing that is computed of other micro-batches is of use any more."""
        self.micro_batch = micro_batch
        self.asked_back.clear()

    def record(
        self,
        number: int,
        *,
        seconds: dict[str, Seconds],
        step_seconds: float,
        learning_rate: float,
        deadline: float,
        codec: str,
    ) -> StepRecord:
        """What is told of the step once its round's adapter, if it ends one, is made."""
        return StepRecord(
            number=number,
            loss=self.loss,
            labelled_tokens=self.labelled_tokens,
            tokens=sum(self.tokens_of.values()),
            seconds=seconds,
            deadline=deadline,
            codec=codec,
            server_compute=self.server_compute,
            step_seconds=step_seconds,
            learning_rate=learning_rate,
            gradient_norm=self.gradient_norm,
            losses={name: summed / self.labels_of[name] for name, summed in self.summed_losses.items() if self.labels_of[name]},
            labelled=dict(self.labels_of),
            samples=dict(self.samples_of),
            tokens_of=dict(self.tokens_of),
        )
