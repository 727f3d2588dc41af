"""
What a server sees of texts: every message of a step, made by the code that makes it in a run, encoded and decoded.

B sequences of a micro-batch, N rows of them all, M rows with a label, d elements in a row.
"""

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

import numpy as np
import torch

from protocol import (
    EXACT,
    ActivationGradient,
    Activations,
    AdapterGradient,
    Array,
    HiddenGradient,
    HiddenStates,
    RunSettings,
    Seconds,
    Tensors,
    decode,
    derive_seed,
    encode,
    gradient_codec,
)
from protocol.gradients import coded_gradient
from protocol.passage import coded_contribution
from protocol.rounding import Dither
from protocol.session import Codecs
from protocol.settings import CODEC_NAMES, DITHERED, FLOAT32, codec_named
from split_model import LoraConfig, summed_cross_entropy

from ..data import Batch, Sample, pack
from ..disclosure import Disclosure
from ..torch_engine import TorchEngine
from ..training import hidden_gradient
from .cut_model import CutModel

__all__ = ["NO_TOKEN", "Exchange", "Observations", "Setting", "Target", "truth"]

NO_TOKEN = -1
"""Where there is no label, or no guess."""
MOST_BYTES = 2**31
STEP = 1


class Target(enum.Enum):
    """What an attack guesses."""

    TOKENS = "tokens"
    """The token at every row."""
    LABELS = "labels"
    """The token that follows, at every row that has a label."""
    LABEL_ROWS = "rows with a label"
    """Of every row, whether it has a label."""
    BAG = "tokens of a micro-batch"
    """Which tokens a micro-batch has, in no order."""
    ROWS = "rows of a micro-batch"
    """How many rows a micro-batch has."""
    LABELLED_TOKENS = "labels of a micro-batch"
    """How many of its rows have a label."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """
    Of a run, what decides how much it leaks.

    Raises:
        ValueError: no run has such settings.
    """

    cut_layer: int
    codec: str = FLOAT32
    """One of CODEC_NAMES, in all four directions."""
    labels: str = "server"
    label_rows: str = "shown"
    activation_noise: float = 0.0
    activation_clip: float = 0.0
    gradient_noise: float = 0.0
    gradient_clip: float = 0.0
    batch_size: int = 8
    """Sequences in a micro-batch, which is a step of its own here."""

    def __post_init__(self) -> None:
        if self.codec not in CODEC_NAMES:
            raise ValueError(f"codec must be one of {', '.join(CODEC_NAMES)}, got {self.codec}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        self.of_a_run(LoraConfig(targets=("any",)))  # for the checks of a run

    def of_a_run(self, lora: LoraConfig) -> RunSettings:
        """A run of one client with these settings; what else there is makes no difference here."""
        given = asdict(self)
        del given["batch_size"]
        return RunSettings(
            activation_codec=(codec := codec_named(given.pop("codec"))),
            gradient_codec=gradient_codec(codec),
            adapter_codec=EXACT if codec == EXACT else DITHERED,
            lora_rank=lora.rank,
            lora_alpha=lora.scale * lora.rank,
            lora_dropout=lora.dropout,
            lora_targets=lora.targets,
            clients=1,
            steps=1,
            lr=1e-3,
            lr_schedule="constant",
            warmup_steps=0,
            weight_decay=0.0,
            seed=0,
            precision="float32",
            **given,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Exchange:
    """All that is sent of one micro-batch, both ways, as its receiver decodes it."""

    lengths: Array
    """(B,) rows of each sequence."""
    label_counts: Array
    """(B,) rows of each sequence that have a label, the last ones; with hidden rows, all."""
    labels: Array | None
    """(M,), where the server has them."""
    activations: Array
    """(N, d)"""
    hidden_states: Array
    """(M, d) behind the final norm; as they were sent, if labels are on the device."""
    hidden_gradient: Array | None
    """(M, d), if labels are on the device."""
    labelled_tokens: int
    """How many rows have a label; M, unless which ones is hidden."""
    activation_gradient: Array
    """(N, d)"""
    adapter_gradient: Tensors
    """Of the edge part's matrices, by the mean loss of this micro-batch alone."""
    frame_bytes: Mapping[str, int]
    """By kind of message: the bytes of its frame."""

    @property
    def positions(self) -> Array:
        """(N,) of each row in its sequence."""
        positions: Array = np.concatenate([np.arange(length) for length in self.lengths.tolist()])
        return positions

    @property
    def labelled(self) -> Array:
        """(M,) numbers of the rows that have a label, as the server is told."""
        ends = np.cumsum(self.lengths)
        pairs = zip(ends.tolist(), self.label_counts.tolist(), strict=True)
        rows: Array = np.concatenate([np.arange(end - count, end) for end, count in pairs])
        return rows


@dataclass(frozen=True, kw_only=True, eq=False)
class Observations:
    """What is sent of texts under a setting, micro-batch by micro-batch. The texts themselves are not in it."""

    setting: Setting
    exchanges: tuple[Exchange, ...]

    @classmethod
    @torch.enable_grad()
    def of(
        cls,
        samples: Sequence[Sample],
        cut: CutModel,
        setting: Setting,
        secret: bytes,
        *,
        report: Callable[[int], object] = lambda done: None,
    ) -> "Observations":
        """
        Args:
            samples: the texts, in the order of the file; micro-batches are made of neighbours.
            cut: at the setting's layer.
            secret: of the device, from which its noise is drawn.
            report: called with the number of samples done.
        """
        if cut.cut_layer != setting.cut_layer:
            raise ValueError(f"the model is cut at {cut.cut_layer}, the setting says {setting.cut_layer}")
        device = _Device(cut, setting, secret)
        exchanges: list[Exchange] = []
        for start in range(0, len(samples), setting.batch_size):
            exchanges.append(device.exchange(pack(samples[start : start + setting.batch_size]), number=len(exchanges)))
            report(min(start + setting.batch_size, len(samples)))
        return cls(setting=setting, exchanges=tuple(exchanges))

    @property
    def lengths(self) -> list[int]:
        """Rows of each sequence."""
        return [length for exchange in self.exchanges for length in exchange.lengths.tolist()]

    def by_sequence(self, of: Callable[[Exchange], Array]) -> list[Array]:
        """Rows (N, ...) of every exchange, divided among its sequences."""
        return [part for exchange in self.exchanges for part in np.split(of(exchange), np.cumsum(exchange.lengths)[:-1])]

    def labels_by_sequence(self, of: Callable[[Exchange], Array]) -> list[Array]:
        """What is guessed of labelled rows (M,) of every exchange, divided among its sequences; NO_TOKEN at other rows."""

        def spread(exchange: Exchange) -> Array:
            rows = np.full(len(exchange.activations), NO_TOKEN)
            rows[exchange.labelled] = of(exchange)
            return rows

        return self.by_sequence(spread)


Sent = TypeVar("Sent", Activations, HiddenStates, HiddenGradient, ActivationGradient, AdapterGradient)


class _Device:
    """Both sides of a step."""

    def __init__(self, cut: CutModel, setting: Setting, secret: bytes) -> None:
        self.cut, self.setting, self.settings = cut, setting, setting.of_a_run(cut.lora)
        settings = self.settings
        self.engine = TorchEngine(cut.model, settings, "cpu", "float32")
        self.engine.load_adapter({name: matrix.numpy() for name, matrix in cut.edge.adapter().items()})
        self.codecs = Codecs(settings.activation_codec, settings.gradient_codec, settings.adapter_codec)
        self.disclosure = Disclosure(settings, secret, cut.centre if setting.activation_clip else None)
        self.frame_bytes: dict[str, int] = {}

    def exchange(self, batch: Batch, number: int) -> Exchange:
        cut, setting, self.frame_bytes = self.cut, self.setting, {}
        at_device, step = setting.labels == "device", STEP + number
        self.engine.begin_step()
        computed = self.engine.forward(batch, derive_seed(0, "dropout", number))
        label_counts = self.disclosure.label_counts(batch)
        sent = self._sent(
            Activations(
                step=step,
                seconds=Seconds(),
                lengths=batch.lengths,
                label_counts=label_counts,
                labels=self.disclosure.labels(batch),
                values=self.disclosure.activations(computed, batch, step, 0),
            )
        )
        activations = torch.from_numpy(sent.values).requires_grad_()
        hidden = cut.server.hidden(activations, sent.lengths, label_counts)
        states, gradient, labelled_tokens = hidden.detach().numpy(), None, len(batch.labels)
        if at_device:
            asked = self._sent(HiddenStates(step=step, values=states))
            reply = self._sent(hidden_gradient(asked, batch, self.engine, self.disclosure, lap=Seconds))
            states, gradient, labelled_tokens = asked.values, reply.values, reply.labelled_tokens
            loss = (hidden * torch.from_numpy(gradient)).sum()
        else:
            loss = summed_cross_entropy(hidden, cut.head, torch.from_numpy(batch.labels).long())
        torch.autograd.backward(loss)
        assert activations.grad is not None
        values = activations.grad.contiguous().numpy()
        down = self._sent(ActivationGradient(step=step, loss=0.0, labelled_tokens=labelled_tokens, values=values))
        self.engine.backward(down.values)
        self.engine.end_step(labelled_tokens)
        adapter_gradient = self._sent(AdapterGradient(step=step, seconds=Seconds(), tensors=self.engine.gradients()))
        return Exchange(
            lengths=sent.lengths,
            label_counts=label_counts,
            labels=None if at_device else sent.labels,
            activations=sent.values,
            hidden_states=states,
            hidden_gradient=gradient,
            labelled_tokens=labelled_tokens,
            activation_gradient=down.values,
            adapter_gradient=adapter_gradient.tensors,
            frame_bytes=self.frame_bytes,
        )

    def _sent(self, message: Sent) -> Sent:
        """A message as it arrives."""
        codec = self.codecs.of(type(message))
        is_gradient = isinstance(message, HiddenGradient | ActivationGradient | AdapterGradient)
        dither = Dither(0, "device", type(message).__name__, message.step, 0) if is_gradient and codec != EXACT else None
        if isinstance(message, AdapterGradient) and dither is not None:
            message = coded_contribution(message, self.settings, dither)
        elif isinstance(message, HiddenGradient | ActivationGradient) and codec == DITHERED:
            message = coded_gradient(message, self.settings.activation_codec, dither)
        frame = encode(message, codec, dither)
        self.frame_bytes[type(message).__name__] = len(frame)
        arrived = decode(frame, MOST_BYTES, {codec})
        assert isinstance(arrived, type(message))
        return arrived


def truth(target: Target, samples: Sequence[Sample], batch_size: int) -> list[Array]:
    """
    What an attack on a target should find, in the form of `Recovered.guesses`.

    Args:
        batch_size: sequences in a micro-batch.
    """
    if target is Target.TOKENS:
        return [sample.tokens[:-1] for sample in samples]
    if target is Target.LABELS:
        pairs = zip(samples, truth(Target.LABEL_ROWS, samples, batch_size), strict=True)
        return [np.where(labelled, sample.tokens[1:], NO_TOKEN) for sample, labelled in pairs]
    if target is Target.LABEL_ROWS:
        return [np.arange(len(sample.tokens) - 1) >= len(sample.tokens) - 1 - sample.num_labels for sample in samples]
    batches = [pack(samples[start : start + batch_size]) for start in range(0, len(samples), batch_size)]
    if target is Target.BAG:
        return [np.unique(batch.tokens) for batch in batches]
    return [np.array([len(batch.tokens if target is Target.ROWS else batch.labels)]) for batch in batches]
