"""
Labels from the gradient at the hidden states.

At a hidden state h with the label y that gradient is p W - W_y, where W is the head and p = softmax(h W^T): whoever knows h and
W computes it for every token that y may be, and sees which one came. Clipping and noise change that as little as that they are
known: the gradient of every candidate is clipped alike, and the noise says how far off a candidate may be. Then the model's own
p decides between those that are equally near.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from protocol import Array

from ..knowledge import Knowledge
from ..observation import Exchange, Observations, Setting, Target, truth
from .attack import Recovered

__all__ = ["GradientReader", "LabelRows", "LabelsFromGradient", "LabelsRead", "likeliest"]

LEARNT_FROM = 4
"""Micro-batches of the attacker's own texts that tell how far to trust the odds of rows."""
TRUSTS = (0.0, 0.1, 0.25, 0.5, 1.0)
CHUNK_ROWS = 128
OF_MODEL = 0.8
"""The model's share in what a label may be before its gradient is seen; the rest is of labels in the attacker's own texts."""
UNSEEN = 1.0
"""How often tokens that the attacker has not seen would have come in its own texts, all together."""
LEAST_ERROR = 1e-9
"""Of a gradient's mean square: what float32 leaves of it in the difference of products."""
CHANNEL = "gradient at the hidden states"


@dataclass(frozen=True)
class Evidence:
    """Of m rows of one micro-batch, for every token of the vocabulary."""

    prior: Tensor
    """(m, V) log of the model's probability of the token."""
    likelihood: Tensor
    """(m, V) log of the gradient's density if the token is the label, up to the row's ``constant``."""
    unlabelled: Tensor
    """(m,) the same if the row has no label."""


class GradientReader:
    """Compares the gradient that came with that of every label. Learns the codec's error from the attacker's own texts."""

    def __init__(self, knowledge: Knowledge) -> None:
        self._knowledge, self._head = knowledge, knowledge.cut.head
        self._clip, self._noise = knowledge.setting.gradient_clip, knowledge.setting.gradient_noise

    @cached_property
    def _of_own_labels(self) -> Tensor:
        """(V,) how often tokens are labels in the attacker's own texts; a token that is not there, half as often as once."""
        labels = np.concatenate([sample.labels for sample in self._knowledge.samples])
        counts = torch.bincount(torch.from_numpy(labels).long(), minlength=len(self._head)) + UNSEEN / len(self._head)
        return counts / counts.sum()

    @cached_property
    def _squares(self) -> Tensor:
        return self._head.pow(2).sum(1)  # (V,)

    @cached_property
    def _error_of_codec(self) -> float:
        """The mean square of what the codec changes, of that of a row."""
        exact = self._knowledge.setting.codec == "float32"
        return LEAST_ERROR if exact else max(LEAST_ERROR, self._measured_error())

    def _measured_error(self) -> float:
        errors, samples = [], iter(self._knowledge.samples)
        for exchange in self._knowledge.own.exchanges:
            assert exchange.hidden_gradient is not None
            came, counts = torch.from_numpy(exchange.hidden_gradient), exchange.label_counts.tolist()
            expected = torch.zeros_like(came)
            for end, sample in zip(np.cumsum(counts).tolist(), (next(samples) for _ in counts), strict=True):
                rows = slice(end - sample.num_labels, end)
                labels = torch.from_numpy(sample.labels).long()
                expected[rows] = self._clipped(
                    self._mean(torch.from_numpy(exchange.hidden_states[rows]))[1] - self._head[labels]
                )
            beyond = (came - expected).pow(2).mean(1) - (self._noise * self._clip) ** 2
            errors.append((beyond.sum() / came.pow(2).mean(1).sum()).item())
        return float(np.mean(errors))

    def _mean(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """log p (m, V), and p W (m, d)."""
        log_p = (hidden @ self._head.T).log_softmax(1)
        return log_p, log_p.exp() @ self._head

    def _clipped(self, gradient: Tensor) -> Tensor:
        norms = gradient.norm(dim=1, keepdim=True)
        return gradient * (self._clip / norms.clamp(min=self._clip)) if self._clip else gradient

    @torch.no_grad()
    def read(self, hidden: Array, gradient: Array) -> Iterator[Evidence]:
        """Of rows (M, d) each, in chunks."""
        for start in range(0, len(hidden), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            came = torch.from_numpy(gradient[rows])  # (m, d)
            log_p, mean = self._mean(torch.from_numpy(hidden[rows]))
            # Of p W - W_v for every v: its product with what came, and its own square; then both are scaled by the clipping.
            product = (came * mean).sum(1, keepdim=True) - came @ self._head.T  # (m, V)
            square = mean.pow(2).sum(1, keepdim=True) - 2 * mean @ self._head.T + self._squares
            if self._clip:
                scale = self._clip / square.clamp(min=self._clip**2).sqrt()
                product, square = product * scale, square * scale.pow(2)
            variance = (self._noise * self._clip) ** 2 + self._error_of_codec * came.pow(2).mean(1, keepdim=True)
            # The gradient of a row without a label is zero: what came has no product with it, and it has no square.
            prior = (OF_MODEL * log_p.exp() + (1 - OF_MODEL) * self._of_own_labels).log()
            yield Evidence(prior, (2 * product - square) / (2 * variance.clamp(min=1e-30)), came.new_zeros(len(came)))


class LabelsFromGradient:
    """Labels that stay on the device: the token whose gradient at the hidden state is most probably the one that came."""

    name, channel, target = "label of the gradient", CHANNEL, Target.LABELS

    def why_not(self, setting: Setting) -> str:
        return "" if setting.labels == "device" else "the server has the labels"

    def run(self, observations: Observations, knowledge: Knowledge, rng: np.random.Generator) -> Recovered:
        reader = GradientReader(knowledge)

        def guess(exchange: Exchange) -> Array:
            assert exchange.hidden_gradient is not None
            evidence = reader.read(exchange.hidden_states, exchange.hidden_gradient)
            guessed: Array = torch.cat([(rows.prior + rows.likelihood).argmax(1) for rows in evidence]).numpy()
            return guessed

        return Recovered(target=self.target, guesses=observations.labels_by_sequence(guess))

    def baseline(self, observations: Observations, knowledge: Knowledge, rng: np.random.Generator) -> Recovered:
        return likeliest(observations, knowledge)


class LabelsRead:
    """Labels that are sent to the server are read."""

    name, channel, target = "read", "labels", Target.LABELS

    def why_not(self, setting: Setting) -> str:
        return "labels are not sent" if setting.labels == "device" else ""

    def run(self, observations: Observations, knowledge: Knowledge, rng: np.random.Generator) -> Recovered:
        def read(exchange: Exchange) -> Array:
            assert exchange.labels is not None
            return exchange.labels

        return Recovered(target=self.target, guesses=observations.labels_by_sequence(read))

    def baseline(self, observations: Observations, knowledge: Knowledge, rng: np.random.Generator) -> Recovered:
        return likeliest(observations, knowledge)


def likeliest(observations: Observations, knowledge: Knowledge) -> Recovered:
    """What the model itself expects, whatever gradient came."""

    def guess(exchange: Exchange) -> Array:
        hidden, head = torch.from_numpy(exchange.hidden_states), knowledge.cut.head
        guessed: Array = torch.cat([(rows @ head.T).argmax(1) for rows in torch.split(hidden, CHUNK_ROWS)]).numpy()
        return guessed

    return Recovered(target=Target.LABELS, guesses=observations.labels_by_sequence(guess))


class LabelRows:
    """
    Which rows have a label, where that is hidden: those whose gradient is that of some label rather than noise alone.

    The rows with a label are the last ones of a sequence, and how many there are in the micro-batch is told: what is asked is
    where they begin, in all its sequences together.
    """

    name, channel, target = "gradient of some label, or of none", CHANNEL, Target.LABEL_ROWS

    def why_not(self, setting: Setting) -> str:
        return "" if setting.labels == "device" else "the server has the labels"

    def run(self, observations: Observations, knowledge: Knowledge, rng: np.random.Generator) -> Recovered:
        if observations.setting.label_rows == "shown":
            return Recovered(target=self.target, guesses=observations.by_sequence(_as_told))
        reader, shares = GradientReader(knowledge), _shares_of_labels(knowledge)
        learnt_from = [(exchange, _log_odds(reader, exchange)) for exchange in knowledge.own.exchanges[:LEARNT_FROM]]
        samples = iter(knowledge.samples)
        labelled = [truth(Target.LABEL_ROWS, list(islice(samples, len(odds))), 1) for _, odds in learnt_from]

        def score(trust: float) -> float:
            """How probable the rows with a label in the attacker's own texts are, if its odds are to be trusted so far."""
            pairs = zip(learnt_from, labelled, strict=True)
            found = [(_of_last_rows(odds, exchange.labelled_tokens, shares, trust), rows) for (exchange, odds), rows in pairs]
            return sum(float(np.log(np.where(np.concatenate(rows), some, 1 - some) + 1e-9).sum()) for some, rows in found)

        trust = max(TRUSTS, key=score)

        def probability(exchange: Exchange) -> Array:
            return _of_last_rows(_log_odds(reader, exchange), exchange.labelled_tokens, shares, trust)

        return Recovered(target=self.target, guesses=observations.by_sequence(probability))

    def baseline(self, observations: Observations, knowledge: Knowledge, rng: np.random.Generator) -> Recovered:
        shares = _shares_of_labels(knowledge)

        def probability(exchange: Exchange) -> Array:
            return _of_last_rows([np.zeros(length) for length in exchange.lengths], exchange.labelled_tokens, shares, 0.0)

        return Recovered(target=self.target, guesses=observations.by_sequence(probability))


def _shares_of_labels(knowledge: Knowledge) -> tuple[float, float]:
    """Of the attacker's own texts: the mean share of rows that have a label, and its standard deviation."""
    shares = [sample.num_labels / (len(sample.tokens) - 1) for sample in knowledge.samples]
    return float(np.mean(shares)), float(np.std(shares))


def _log_odds(reader: GradientReader, exchange: Exchange) -> list[Array]:
    """Of each sequence, (T,) of every row that it has a label, by its own gradient alone."""
    assert exchange.hidden_gradient is not None
    evidence = reader.read(exchange.hidden_states, exchange.hidden_gradient)
    odds = torch.cat([(rows.prior + rows.likelihood).logsumexp(1) - rows.unlabelled for rows in evidence])
    return [part.double().numpy() for part in torch.split(odds, exchange.lengths.tolist())]


def _as_told(exchange: Exchange) -> Array:
    told = np.zeros(len(exchange.activations))
    told[exchange.labelled] = 1
    return told


def _of_last_rows(log_odds: list[Array], total: int, shares: tuple[float, float], trust: float) -> Array:
    """
    The probability of each row to have a label, (N,).

    Args:
        log_odds: of each sequence, (T,) of every row that it has a label, by what was seen of it alone.
        total: how many rows of all sequences have one.
        shares: see `_shares_of_labels`.
        trust: with which the odds are multiplied; they rest on a model's idea of the text, which may be wrong.
    """
    mean, spread = shares
    weights = []  # of each sequence, (T + 1,): the log-odds that its last 0, 1, ... rows have a label
    for odds in log_odds:
        share = np.arange(len(odds) + 1) / len(odds)
        usual = -((share - mean) ** 2) / (2 * (spread**2 + 1 / len(odds) ** 2))
        weights.append(usual + trust * np.concatenate(([0.0], np.cumsum(odds[::-1]))))
    before = [np.zeros(1)]  # of the sequences so far, that they have 0, 1, ... labels together
    for weight in weights:
        before.append(_added(before[-1], weight))
    behind = [np.zeros(1)]
    for weight in weights[::-1]:
        behind.append(_added(behind[-1], weight))
    found = []
    for number, weight in enumerate(weights):
        others = _added(before[number], behind[len(weights) - 1 - number])
        rest = total - np.arange(len(weight))
        possible = (rest >= 0) & (rest < len(others))
        posterior = np.where(possible, weight + others[np.where(possible, rest, 0)], -np.inf)
        posterior = np.exp(posterior - posterior.max())
        # A row has a label if at least as many of the last rows have one.
        found.append(1 - np.cumsum(posterior / posterior.sum())[:-1][::-1])
    return np.concatenate(found)


def _added(one: Array, other: Array) -> Array:
    """Logs of the weights of 0, 1, ... -> logs of the weights of their sums."""
    sums = np.full(len(one) + len(other) - 1, -np.inf)
    for number, weight in enumerate(one):
        part = slice(number, number + len(other))
        sums[part] = np.logaddexp(sums[part], weight + other)
    return sums
