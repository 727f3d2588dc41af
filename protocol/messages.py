"""
Every message, in the order a conversation uses them. Field types are checked on arrival, `__post_init__` checks the rest.

N rows of a packed batch, B sequences, M labelled rows, d width.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

import numpy as np

from .errors import InvalidName
from .limits import MAX_PART_FILE_BYTES, MAX_PART_FILES, PIECE_BYTES
from .settings import CODECS, DELTA, DITHERED, RunSettings

__all__ = [
    "PROTOCOL_VERSION",
    "ActivationGradient",
    "Activations",
    "AdapterGradient",
    "AdapterWeights",
    "Array",
    "AskPart",
    "AskPiece",
    "Contribution",
    "Done",
    "EdgeAdapter",
    "Evaluation",
    "EvaluationLoss",
    "EvaluationStates",
    "Failure",
    "Goodbye",
    "HeldOutLoss",
    "Hello",
    "HiddenGradient",
    "HiddenStates",
    "Join",
    "LabelledBatch",
    "Message",
    "Noted",
    "Part",
    "PartFile",
    "Piece",
    "Ping",
    "Pong",
    "RunEnd",
    "Seconds",
    "Start",
    "Tensors",
    "Welcome",
    "check_name",
    "identity",
]

PROTOCOL_VERSION = 3

Array: TypeAlias = np.ndarray[Any, Any]


@dataclass(frozen=True)
class ArrayType:
    """What an array field may hold."""

    dtypes: tuple[str, ...]
    num_dimensions: int
    codecs: tuple[str, ...] = ()
    """In which it may travel."""


Floats = Annotated[Array, ArrayType(("float32", "float64"), 2)]
CodedFloats = Annotated[Array, ArrayType(("float32", "float64"), 2, codecs=(*CODECS, DELTA, DITHERED))]
"""On the wire in a codec, if the run has one; here they are floats."""
Integers = Annotated[Array, ArrayType(("int32",), 1)]
Tensors = dict[str, Floats]
CodedTensors = dict[str, Annotated[Array, ArrayType(("float32", "float64"), 2, codecs=(DITHERED,))]]
"""LoRA matrices by name; on the wire in a codec, if the run has one for them."""


def _check_step(step: int) -> None:
    if step < 1:
        raise ValueError(f"steps are numbered from 1, got {step}")


def _check_sha256(digest: str) -> None:
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise ValueError(f"a SHA-256 is 64 of 0-9 a-f, got {digest[:80]!r}")


def check_name(name: str) -> str:
    """
    A client's name: it appears in files and terminals, so it is kept plain.

    Raises:
        InvalidName: it is something else.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise InvalidName(f"a client name is 1 to 64 of A-Z a-z 0-9 . _ - and starts with a letter or digit, got {name[:80]!r}")
    return name


@dataclass(frozen=True, kw_only=True, eq=False)
class Ping:
    """client -> server: is a server there?"""

    index: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Pong:
    """server -> client: yes, and this is where its run stands."""

    index: int = 0
    """The question's."""
    software: str
    """Version of the server's software."""
    run: str
    clients: int
    """How many clients the run waits for."""
    joined: int
    step: int
    """Steps finished."""
    model: str = ""
    """The base model's name on the Hugging Face hub; empty where the server has it from elsewhere."""
    waiting_for: tuple[str, ...] = ()
    """Clients that the others wait for, the first hundred of them."""
    waiting_seconds: float = 0.0
    """For how long."""
    edge_weights: str = ""
    """Precision of the weights in the part that this server hands over; empty where it hands over none."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Hello:
    """client -> server: who calls, and which model it holds."""

    name: str
    fingerprint: str
    """Empty where it holds none, and will ask for its part."""
    codecs: tuple[str, ...] = ()
    """Those it has, besides the exact one."""
    abilities: tuple[str, ...] = ()
    """What it knows of ABILITIES, which earlier releases do not."""
    instance: str = ""
    """Drawn when a client begins, and told to the server alone: who says it again is that client, and has lost its link."""

    def __post_init__(self) -> None:
        check_name(self.name)


@dataclass(frozen=True, kw_only=True, eq=False)
class Welcome:
    """server -> client: the run, whole."""

    run: str
    settings: RunSettings
    fingerprint: str
    restarts: int = 0
    """How often the server was started again in this run. Progress since its last checkpoint is lost with each."""
    next_pin: str = ""
    """SHA-256 of the public key that the server will have next; empty where no change is planned."""
    abilities: tuple[str, ...] = ()
    """What it knows of SERVER_ABILITIES, which earlier releases do not."""

    def __post_init__(self) -> None:
        check_name(self.run)  # it names a folder on the device
        if self.next_pin:
            _check_sha256(self.next_pin)


@dataclass(frozen=True, kw_only=True, eq=False)
class AskPart:
    """client -> server: which files are my part of the model?"""

    index: int


@dataclass(frozen=True, kw_only=True)
class PartFile:
    """A file of the part. It is known by its content; its name says what it is for."""

    name: str
    size: int
    """Bytes."""
    sha256: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}", self.name):
            raise ValueError(
                f"the name of a file is 1 to 64 of A-Z a-z 0-9 . _ - and starts with none of . and -, got {self.name[:80]!r}"
            )
        if not 0 <= self.size <= MAX_PART_FILE_BYTES:
            raise ValueError(f"{self.name} has 0 to {MAX_PART_FILE_BYTES} bytes, got {self.size}")
        _check_sha256(self.sha256)


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """server -> client: these files. The same wherever the same part is asked for in a run."""

    index: int
    """The question's."""
    files: tuple[PartFile, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.files) <= MAX_PART_FILES:
            raise ValueError(f"a part has 1 to {MAX_PART_FILES} files, got {len(self.files)}")
        names, sizes = set(), dict[str, int]()
        for file in self.files:
            if file.name.lower() in names:  # some file systems know no case
                raise ValueError(f"two files have the name {file.name}")
            names.add(file.name.lower())
            if sizes.setdefault(file.sha256, file.size) != file.size:
                raise ValueError(f"{file.name} has the content of another file, and another size")


@dataclass(frozen=True, kw_only=True, eq=False)
class AskPiece:
    """client -> server: what is in this file from here on?"""

    index: int
    sha256: str
    """Of the whole file, as `Part` names it."""
    offset: int
    """Bytes of the file before the piece."""

    def __post_init__(self) -> None:
        _check_sha256(self.sha256)


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """server -> client: this; how much, the server decides."""

    index: int
    """The question's."""
    data: bytes

    def __post_init__(self) -> None:
        if not 1 <= len(self.data) <= PIECE_BYTES:
            raise ValueError(f"a piece has 1 to {PIECE_BYTES} bytes, got {len(self.data)}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Join:
    """client -> server: what I bring, and where I stand. Answered when the run starts, or at once if it has."""

    num_samples: int
    batch_size: int
    longest: int
    """Rows of its longest sequence; with the batch size, a bound on every later message."""
    step: int = 0
    """The last step it has finished: 0 if none, or if it does not remember."""
    kept: int | None = None
    """The latest step of which it keeps a version of a sample that counts, 0 if none; None where the run keeps none."""

    def __post_init__(self) -> None:
        for name in ("num_samples", "batch_size", "longest"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Start:
    """server -> client: go on from here. Also the answer to a question about a step that the run has left behind."""

    step: int
    """Steps finished: 0 in a fresh run. The client goes on with the next one."""
    total_steps: int
    """
    Of the whole run; a client whose data ends earlier takes part in fewer. Fewer than a client has data for, where the run has
    ended early, see `RunSettings.may_end_early`.
    """
    adapter: Tensors
    """As it was when the present round began."""
    round: int = 0
    """The last step that is in the adapter. Later than `step` only where the client's data has ended."""
    codec: str = ""
    """Of the next step's activations; empty: as the run's settings say."""


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """
    A client's time since the question before, divided: the parts add up to it.

    What happens while the client computes takes none of its time: of an answer's way only the part that it waited for counts.
    """

    edge_compute: float = 0.0
    encode: float = 0.0
    uplink: float = 0.0
    queue: float = 0.0
    """At the server, until the others' questions had come and the model was free."""
    server_compute: float = 0.0
    downlink: float = 0.0
    decode: float = 0.0

    def __post_init__(self) -> None:
        if min(vars(self).values()) < 0:
            raise ValueError("seconds are at least 0")

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(**{part: seconds + getattr(other, part) for part, seconds in vars(self).items()})


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledBatch:
    """Activations at the cut, and the tokens to predict from them, unless the client keeps these: see `RunSettings.labels`."""

    lengths: Integers
    """(B,) rows of each sequence."""
    label_counts: Integers
    """(B,) how many of each sequence's last rows have a label."""
    labels: Integers
    """(M,) next tokens at the labelled rows; (0,) where the client keeps them."""
    values: CodedFloats
    """(N, d)."""

    def __post_init__(self) -> None:
        if len(self.lengths) != len(self.label_counts):
            raise ValueError(f"{len(self.lengths)} lengths and {len(self.label_counts)} label counts")
        wrong = np.flatnonzero((self.lengths < 1) | (self.label_counts < 0) | (self.label_counts > self.lengths))
        if len(wrong):
            length, count = self.lengths[wrong[0]], self.label_counts[wrong[0]]
            raise ValueError(f"lengths must be positive, label counts between 0 and the length; got {length} and {count}")
        if (num_rows := self._lengths_in_values().sum(dtype=np.int64)) != len(self.values):
            raise ValueError(f"lengths add up to {num_rows}, values have {len(self.values)} rows")
        if len(self.labels) not in (0, self.num_labelled):
            raise ValueError(f"label counts add up to {self.num_labelled}, got {len(self.labels)} labels")

    @property
    def num_labelled(self) -> int:
        """M, the rows that have a label, whoever has it."""
        return int(self.label_counts.sum(dtype=np.int64))

    def _lengths_in_values(self) -> Array:
        """The lengths of the sequences whose rows ``values`` has."""
        return self.lengths


@dataclass(frozen=True, kw_only=True, eq=False)
class Activations(LabelledBatch):
    """
    client -> server: a micro-batch of its batch of a step; it may be empty. Answered when it is computed, together with the
    other clients' of this number.
    """

    step: int
    micro_batch: int = 0
    """0, 1, ... within the step; a client may ask the next ones before the first is answered."""
    seconds: Seconds
    samples: Integers | None = None
    """(B,) where samples are kept, for each sequence its number in the client's data; -1: neither side keeps it."""
    exact: CodedFloats | None = None
    """(N, d) the values as held-out ones travel, in steps that check the codec."""
    since: Integers | None = None
    """
    (B,) where the edge learns nothing, for each sequence the step whose rows of this sample the server has kept, and ``values``
    has none of it; 0: its rows are in ``values``, as all are where this is None.
    """

    def __post_init__(self) -> None:
        if self.since is not None:
            if self.samples is None or len(self.since) != len(self.lengths):
                raise ValueError(f"{len(self.lengths)} lengths and {len(self.since)} steps since which samples are kept")
            if ((self.since < 0) | (self.since >= self.step) | ((self.since > 0) & (self.samples < 0))).any():
                raise ValueError(f"steps since which samples are kept are earlier ones of numbered samples; got {self.since}")
        super().__post_init__()
        _check_step(self.step)
        if self.samples is not None and len(self.samples) != len(self.lengths):
            raise ValueError(f"{len(self.lengths)} lengths and {len(self.samples)} samples")
        if self.exact is not None and self.exact.shape != self.values.shape:
            raise ValueError(f"values are {list(self.values.shape)}, and exactly {list(self.exact.shape)}")

    def _lengths_in_values(self) -> Array:
        return self.lengths if self.since is None else self.lengths[self.since == 0]


@dataclass(frozen=True, kw_only=True, eq=False)
class HiddenStates:
    """
    server -> client, where clients keep the labels: what the model makes of a micro-batch, for the client to compute the loss
    from. It is no answer yet: it asks for `HiddenGradient`.
    """

    step: int
    micro_batch: int = 0
    values: CodedFloats
    """(M, d) hidden states behind the final norm, at the labelled rows."""
    queue_seconds: float = 0.0
    """From the question's arrival until it was computed."""
    compute_seconds: float = 0.0

    def __post_init__(self) -> None:
        _check_step(self.step)


@dataclass(frozen=True, kw_only=True, eq=False)
class HiddenGradient:
    """client -> server: the loss at the `HiddenStates` of a micro-batch, and its gradient."""

    step: int
    micro_batch: int = 0
    seconds: Seconds
    summed_loss: float
    """Nats, summed over the rows that have a label; with noise in runs whose gradients have it, and then perhaps negative."""
    labelled_tokens: int
    """How many have one: all M, unless `RunSettings.label_rows` hides which."""
    values: CodedFloats
    """(M, d), of the summed loss."""

    def __post_init__(self) -> None:
        _check_step(self.step)
        if not 0 <= self.labelled_tokens <= len(self.values):
            raise ValueError(f"{self.labelled_tokens} labelled tokens, and a gradient of {len(self.values)} rows")


@dataclass(frozen=True, kw_only=True, eq=False)
class ActivationGradient:
    """server -> client: the gradient of a micro-batch's loss at the cut, and the loss of the step so far."""

    step: int
    micro_batch: int = 0
    loss: float
    """Nats per labelled token of all clients, in this micro-batch and those before it."""
    labelled_tokens: int
    """Of all clients, in this micro-batch and those before it. The sum over a step, divided by its last, is its gradient."""
    values: CodedFloats
    """(N, d), of the summed loss."""
    codec: str = ""
    """With a step's last micro-batch: of the next step's activations; empty: no other than before."""
    queue_seconds: float = 0.0
    """From the question's arrival until it was computed."""
    compute_seconds: float = 0.0

    def __post_init__(self) -> None:
        _check_step(self.step)


@dataclass(frozen=True, kw_only=True, eq=False)
class Contribution:
    """What a client adds to the next edge adapter. Answered when all have come."""

    step: int
    seconds: Seconds
    tensors: CodedTensors

    def __post_init__(self) -> None:
        _check_step(self.step)


@dataclass(frozen=True, kw_only=True, eq=False)
class AdapterGradient(Contribution):
    """client -> server, in rounds of one step: the gradient of its LoRA matrices."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AdapterWeights(Contribution):
    """client -> server, at the end of a longer round: its LoRA matrices, or where the run codes them their changes."""


@dataclass(frozen=True, kw_only=True, eq=False)
class EdgeAdapter:
    """server -> client: the LoRA matrices everybody goes on with."""

    step: int
    """The last step that is in them."""
    tensors: CodedTensors
    """What they have changed since the round began, where the run codes them: see `RunSettings.adapter_codec`."""
    checkpoint: int = 0
    """The earliest step that the server may still go back to: a client keeps what it needs from there on."""
    queue_seconds: float = 0.0
    compute_seconds: float = 0.0

    def __post_init__(self) -> None:
        _check_step(self.step)


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation(LabelledBatch):
    """client -> server: a held-out batch. Changes nothing."""

    index: int


@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluationLoss:
    """server -> client: what the batch loses under the server's present adapter."""

    index: int
    summed_loss: float
    """Nats, summed over the labelled tokens."""


@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluationStates:
    """server -> client, where clients keep the labels: what the server's present adapter makes of the batch."""

    index: int
    values: CodedFloats
    """(M, d) as in `HiddenStates`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldOutLoss:
    """client -> server, between two steps: what all my held-out texts lose. For the run's records; changes nothing else."""

    step: int
    """The last step that is in both parts' adapters; 0 before the first."""
    loss: float
    """Nats per labelled token; with noise in runs whose gradients have it, and then perhaps negative."""
    labelled_tokens: int

    def __post_init__(self) -> None:
        if self.labelled_tokens < 1:
            raise ValueError(f"labelled_tokens must be at least 1, got {self.labelled_tokens}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Noted:
    """server -> client: I have heard of your `HeldOutLoss`."""

    step: int
    """The question's."""
    reached: int
    """
    The last step that the server's part has been trained in. If it is a later one, the part has changed while the client
    evaluated: the loss is that of no adapter, and is not kept.
    """


@dataclass(frozen=True, kw_only=True, eq=False)
class Done:
    """client -> server: my data is used up. Answered at the run's end."""

    step: int

    def __post_init__(self) -> None:
        _check_step(self.step)


@dataclass(frozen=True, kw_only=True, eq=False)
class RunEnd:
    """server -> client: the run is over, and saved; this is its final edge adapter."""

    step: int
    """The run's last."""
    tensors: Tensors
    best_step: int = 0
    """The last in this adapter, where the run ends with that of an earlier one, see `RunSettings.final_adapter`; else 0."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Goodbye:
    """client -> server: I leave for good."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Failure:
    """server -> client: refused, and why. The last message."""

    reason: str
    retry_after: float = 0.0
    """Seconds after which the same may be allowed, at most an hour; 0: never."""

    def __post_init__(self) -> None:
        if not 0 <= self.retry_after <= 3600:
            raise ValueError(f"retry_after is 0 to 3600 seconds, got {self.retry_after}")


Message = (
    Ping
    | Pong
    | Hello
    | Welcome
    | AskPart
    | Part
    | AskPiece
    | Piece
    | Join
    | Start
    | Activations
    | HiddenStates
    | HiddenGradient
    | ActivationGradient
    | AdapterGradient
    | AdapterWeights
    | EdgeAdapter
    | Evaluation
    | EvaluationLoss
    | EvaluationStates
    | HeldOutLoss
    | Noted
    | Done
    | RunEnd
    | Goodbye
    | Failure
)


def identity(message: Message) -> tuple[type, int, int]:
    """
    What makes a message this one within its conversation: its kind, its index or step, and its micro-batch.

    No side sends two messages of one identity in succession (a `Start` counts as another if its round is), so a message with
    the identity of the one before it is that message, delivered twice.
    """
    number: int = getattr(message, "index", getattr(message, "step", 0))  # a Pong has both
    return type(message), number, getattr(message, "micro_batch", 0)
