"""What the federation wants done: actions are data, and whoever performs them does so in their order."""

from dataclasses import dataclass, field
from typing import Any

from protocol import Activations, Evaluation, HiddenGradient, Message, Tensors

from .step import StepRecord

__all__ = [
    "Action",
    "Aggregate",
    "Backward",
    "Checkpoint",
    "Evaluate",
    "FinishRun",
    "FinishStep",
    "Forward",
    "KeepHeldOutLoss",
    "KeepJudgement",
    "Reply",
    "Report",
    "SaveCodecState",
    "Train",
]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """Send this to that client, if it is connected."""

    client: str
    message: Message


@dataclass(frozen=True, kw_only=True)
class Train:
    """Compute a micro-batch of a step, then call `Federation.trained`."""

    step: int
    total_steps: int
    micro_batch: int
    codecs_to_try: list[str] | None
    """
    None: the codec is not checked. Else what it and these others do to the loss is given to `Federation.checked`, before
    `trained`.
    """
    batches: dict[str, Activations]
    """
    By client, in the order of their names, which is the order of the union batch. Empty if every client that began the step
    has left; the step then ends with the micro-batches computed so far.
    """


@dataclass(frozen=True, kw_only=True)
class Forward:
    """Where devices have the labels: compute a micro-batch's hidden states, then call `Federation.forwarded`."""

    step: int
    micro_batch: int
    batches: dict[str, Activations]
    """By client, in the order of their names."""


@dataclass(frozen=True, kw_only=True)
class Backward:
    """Compute the gradients of a micro-batch that had its `Forward`, then call `Federation.trained`."""

    step: int
    total_steps: int
    micro_batch: int
    gradients: dict[str, HiddenGradient]
    """
    By client, in the order of their names. Clients of its `Forward` that are missing here have a gradient of zero. Empty if
    every client that began the step has left; the step then ends with the micro-batches computed so far.
    """


@dataclass(frozen=True, kw_only=True)
class Aggregate:
    """Make the new edge adapter of these contributions, then call `Federation.aggregated`."""

    step: int
    total_steps: int
    contributions: dict[str, Tensors]
    """LoRA gradients to be summed where a round has one step, else LoRA matrices to be averaged. By client, in their order."""
    weights: dict[str, int]
    """Labelled tokens of each contributor in the round."""


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """
    Compute a held-out batch's loss, then call `Federation.evaluated`; or where devices have the labels its hidden states, then
    call `Federation.inferred`.
    """

    client: str
    batch: Evaluation


@dataclass(frozen=True, kw_only=True)
class KeepHeldOutLoss:
    """A client has evaluated its held-out texts, with the adapter that the run has: write that."""

    client: str
    step: int
    """The last that is in the adapter."""
    loss: float
    """Nats per labelled token."""
    labelled_tokens: int


@dataclass(frozen=True, kw_only=True)
class KeepJudgement:
    """What all devices' held-out texts lose after the last round's end is judged, which a checkpoint of it must know."""

    step: int
    is_best: bool
    """Whether the adapter that the run has is the best so far, and is to be kept as such."""


@dataclass(frozen=True, kw_only=True)
class FinishStep:
    """A step is complete: write its line of metrics once the replies before it are sent."""

    record: StepRecord


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A round is complete: write what is needed to go on from here, then call `Federation.checkpointed`."""

    step: int


@dataclass(frozen=True, kw_only=True)
class FinishRun:
    """The run is complete, or nobody is left: write the adapter, then call `Federation.saved`."""

    step: int
    best_step: int = 0
    """The last in the adapter that is to be written, where that is the best one and not the last; else 0."""


@dataclass(frozen=True, kw_only=True)
class SaveCodecState:
    """The codec policy has seen or decided something: write it before anything that follows is done; it holds for good."""

    state: dict[str, Any]
    """See `CodecPolicy.state`."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Tell the operator."""

    kind: str
    """Of event; see `history.EVENT_KINDS`."""
    text: str
    client: str | None = None
    """Whom it is about, if it is one client."""
    details: dict[str, Any] = field(default_factory=dict)
    """Figures and names, as JSON has them."""


Action = (
    Reply
    | Train
    | Forward
    | Backward
    | Aggregate
    | Evaluate
    | KeepHeldOutLoss
    | KeepJudgement
    | FinishStep
    | Checkpoint
    | FinishRun
    | SaveCodecState
    | Report
)
