"""
Tokens from rows by a linear map that the attacker learns of its own texts: from the row to the token's embedding, and from
there to the nearest token. It asks neither for the blocks in between nor for the text before the token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from protocol import Array

from ..knowledge import Knowledge
from ..observation import Exchange, Observations, Setting, Target, truth
from .attack import Recovered
from .whitening import whitening

__all__ = ["Inversion", "InvertedActivations", "InvertedGradients"]

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Of the map's size, in the mean variance of a row's elements; the one that does best on rows that were held out is taken."""
HELD_OUT = 0.2
SHRINKAGE = 0.1
"""Of the errors' covariance towards equal errors in all directions."""
UNSEEN = 0.05
"""The probability of all tokens together that are not in the attacker's own texts."""
CHUNK_ROWS = 256


@dataclass(frozen=True)
class Inversion:
    """What was learnt: a map, and how far its estimates are off in each direction."""

    mean: Tensor
    """(d,) of rows."""
    weights: Tensor
    """(d + 1, d) from a row, the mean taken away, and 1, to an embedding whose errors are alike in all directions."""
    candidates: Tensor
    """(V, d) the tokens' embeddings, in the same directions."""
    log_prior: Tensor
    """(V,) how often tokens are in the attacker's own texts."""

    @classmethod
    def learn(cls, rows: Tensor, tokens: Tensor, usual: Tensor, table: Tensor) -> "Inversion":
        """
        Args:
            rows: (N, d), what the attacker would see of tokens; the last ones are held out.
            tokens: (N,) these.
            usual: (U,) tokens of texts of the kind that is attacked.
            table: (V, d) embeddings.
        """
        mean, wanted = rows.mean(0), table[tokens]
        inputs = torch.cat([rows - mean, torch.ones(len(rows), 1)], 1)
        held_out = torch.arange(len(rows)) >= len(rows) * (1 - HELD_OUT)
        moments, products = inputs[~held_out].T @ inputs[~held_out], inputs[~held_out].T @ wanted[~held_out]
        unit = moments.diagonal().mean()

        def solved(penalty: float) -> Tensor:
            weights: Tensor = torch.linalg.solve(moments + penalty * unit * torch.eye(len(moments)), products)
            return weights

        def errors(weights: Tensor) -> Tensor:
            return inputs[held_out] @ weights - wanted[held_out]

        weights = min(map(solved, PENALTIES), key=lambda weights: float(errors(weights).pow(2).sum()))
        alike = whitening(errors(weights), SHRINKAGE)  # errors times this are alike in all directions
        counts = torch.bincount(usual, minlength=len(table))
        unseen = UNSEEN / len(table)
        return cls(mean, weights @ alike, table @ alike, ((1 - UNSEEN) * counts / len(usual) + unseen).log())

    def likelihood(self, rows: Tensor) -> Tensor:
        """Rows (m, d) -> (m, V): the log of how likely such a row is for each token, up to a constant of the row."""
        found = torch.cat([rows - self.mean, torch.ones(len(rows), 1)], 1) @ self.weights
        return found @ self.candidates.T - self.candidates.pow(2).sum(1) / 2

    def likelihood_beside(self, difference: Tensor, token: int) -> Tensor:
        """
        (V,) the same for one row, of which it is known what it would be if its token were another.

        Args:
            difference: (d,) the row less that other one, in which all that is not of the token cancels out.
            token: the other one.
        """
        found = self.candidates[token] + difference @ self.weights[:-1]
        return self.candidates @ found - self.candidates.pow(2).sum(1) / 2

    def guess(self, rows: Array) -> Array:
        """Rows (N, d) -> the most probable token of each, (N,)."""
        parts = torch.split(torch.from_numpy(rows), CHUNK_ROWS)
        found: Array = torch.cat([(self.likelihood(part) + self.log_prior).argmax(1) for part in parts]).numpy()
        return found


def commonest_by_position(observations: Observations, texts: Sequence[Array], target: Target) -> Recovered:
    """At each position the token that is the commonest there in the attacker's own texts, (T,) each with NO_TOKEN left out."""
    longest = max(observations.lengths)
    everywhere = np.bincount(np.concatenate([text[text >= 0] for text in texts]))
    guesses = []
    for position in range(longest):
        here = [int(text[position]) for text in texts if position < len(text) and text[position] >= 0]
        guesses.append(int(np.argmax(np.bincount(here))) if here else int(np.argmax(everywhere)))
    return Recovered(target=target, guesses=[np.array(guesses[:length]) for length in observations.lengths])


class InvertedActivations:
    """Activations at the cut, by a linear map."""

    name, channel, target = "linear inversion", "activations", Target.TOKENS

    def why_not(self, setting: Setting) -> str:
        return ""

    def run(self, observations: Observations, knowledge: Knowledge, rng: np.random.Generator) -> Recovered:
        inversion = learnt_from(knowledge, lambda exchange: exchange.activations)
        return Recovered(
            target=self.target, guesses=observations.by_sequence(lambda exchange: inversion.guess(exchange.activations))
        )

    def baseline(self, observations: Observations, knowledge: Knowledge, rng: np.random.Generator) -> Recovered:
        texts = truth(Target.TOKENS, knowledge.samples, 1)
        return commonest_by_position(observations, texts, self.target)


class InvertedGradients:
    """
    Gradients of the activations, which the server makes itself and learns nothing from: for whoever sees only these. A row of
    them is moved most by its own label.
    """

    name, channel, target = "linear inversion", "gradients at the cut", Target.LABELS

    def why_not(self, setting: Setting) -> str:
        return ""

    def run(self, observations: Observations, knowledge: Knowledge, rng: np.random.Generator) -> Recovered:
        labels = np.concatenate(truth(Target.LABELS, knowledge.samples, 1))
        rows = _rows(knowledge.own, lambda exchange: exchange.activation_gradient).numpy()
        has_label = labels >= 0
        found = torch.from_numpy(labels[has_label])
        moved_by = knowledge.cut.head  # a label's row of it; in some models that is not the token's embedding
        inversion = Inversion.learn(torch.from_numpy(_normalised(rows)[has_label]), found, found, moved_by)

        def guess(exchange: Exchange) -> Array:
            return inversion.guess(_normalised(exchange.activation_gradient)[exchange.labelled])

        return Recovered(target=self.target, guesses=observations.labels_by_sequence(guess))

    def baseline(self, observations: Observations, knowledge: Knowledge, rng: np.random.Generator) -> Recovered:
        return commonest_by_position(observations, truth(Target.LABELS, knowledge.samples, 1), self.target)


def learnt_from(knowledge: Knowledge, of: Callable[[Exchange], Array]) -> Inversion:
    """
    From rows (N, d) of the attacker's own exchanges to the tokens at these rows; and of random texts, from which it learns of
    all tokens alike, unless the tokens of its own texts are then found less often: what is noisy asks for the usual ones.
    """
    own, drawn = (_rows(exchanges, of) for exchanges in (knowledge.own, knowledge.drawn))
    tokens, others = (
        torch.from_numpy(np.concatenate(truth(Target.TOKENS, some, 1))).long()
        for some in (knowledge.samples, knowledge.drawn_samples)
    )
    kept = len(own) - int(HELD_OUT * len(own))  # whole texts, since neighbours are alike; the last ones are held out

    def learnt(length: int, number_drawn: int) -> Inversion:
        rows, wanted = torch.cat([own[:length], drawn[:number_drawn]]), torch.cat([tokens[:length], others[:number_drawn]])
        mixed = torch.from_numpy(np.random.default_rng(0).permutation(len(rows)))
        return Inversion.learn(rows[mixed], wanted[mixed], tokens[:length], knowledge.cut.table)

    def found(number_drawn: int) -> float:
        return float(np.mean(learnt(kept, number_drawn).guess(own[kept:].numpy()) == tokens[kept:].numpy()))

    return learnt(len(own), max((0, len(drawn)), key=found))


def _rows(observations: Observations, of: Callable[[Exchange], Array]) -> Tensor:
    return torch.from_numpy(np.concatenate([of(exchange) for exchange in observations.exchanges]))


def _normalised(rows: Array) -> Array:
    """Of gradients, whose size says how wrong the model was, the direction."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    directions: Array = rows / np.maximum(norms, 1e-30)
    return directions
