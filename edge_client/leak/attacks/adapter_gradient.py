"""
Which tokens a micro-batch has, from the gradient of the edge adapter.

The gradient of the first adapted layer's A is a sum of that layer's inputs, each times r numbers: its rows lie in the space of
the inputs. Other layers may have the same inputs, as those have that make queries, keys and values: the rows of all their
gradients are r' together. In block 0 an input is a function of the token and its position, which the attacker computes for all
tokens (as DAGER does, arXiv 2405.15586). With no more inputs than r', those of tokens that are there lie in the row space, and
others do not. With more inputs that is true only more or less; how much it tells beside how common tokens are, the attacker
learns from its own texts. As long as B is zero, in a run's first step, so is the gradient of A.
"""

import numpy as np
import torch
from torch import Tensor, nn

from protocol import Array
from split_model import adapted_layers
from split_model.decoder import Block
from split_model.lora import adapter_name

from ..cut_model import CutModel
from ..knowledge import Knowledge
from ..observation import Exchange, Observations, Setting, Target, truth
from .attack import Recovered
from .whitening import whitening

__all__ = ["BagFromAdapterGradient"]

SHRINKAGE = 0.01
"""See `whitening`."""
COARSE_POSITIONS = 2
KEPT_TOKENS = 500
FINE_POSITIONS = 16
"""All tokens are compared at a few positions, and the nearest of them at more."""
CHUNK_TOKENS = 8192
UNSEEN = 0.5
"""Micro-batches in which a token that the attacker has not seen would have come, half of one."""
STEPS = 20
"""Of Newton's method, for the logistic regression."""
PENALTY = 1.0
LEARNT_FROM = 8
"""Micro-batches of the attacker's own texts, at most, by which it learns how much the gradient tells."""


class _Stopped(Exception):
    """The input of the first adapted layer is there."""


class _Inputs:
    """Of the first adapted layer, in directions in which those of the attacker's own texts are spread alike."""

    def __init__(self, knowledge: Knowledge) -> None:
        self._cut, self._matrices = knowledge.cut, _matrices_of_the_same_input(knowledge.cut)
        self._by_position = self._cut.config.rotary is None
        tokens = np.concatenate(truth(Target.TOKENS, knowledge.samples, 1))
        positions = np.concatenate([np.arange(len(sample.tokens) - 1) for sample in knowledge.samples])
        inputs = _inputs(self._cut, tokens, positions)
        self.whitening = whitening(inputs - inputs.mean(0), SHRINKAGE)  # (d, d)
        self._squares: dict[tuple[int, int, int], Tensor] = {}

    def rows(self, exchange: Exchange) -> Tensor:
        """What gradients add up of the inputs, (r', d)."""
        gradients = np.concatenate([exchange.adapter_gradient[name] for name in self._matrices])
        rows: Tensor = torch.from_numpy(gradients) @ self.whitening
        return rows

    def positions(self, longest: int, count: int) -> list[int]:
        """Some of those in sequences of at most ``longest`` rows, at which a token's input is another one."""
        if not self._by_position:
            return [0]
        return sorted({int(position) for position in np.linspace(0, longest - 1, min(count, longest)).round()})

    def along(self, tokens: Tensor, position: int, directions: Tensor) -> Tensor:
        """
        How much of each token's input at a position lies along directions (r, d): squared cosines (n, r).

        Args:
            tokens: (n,) ascending; where none is left out, their lengths are kept for the next time.
        """
        inputs = _inputs(self._cut, tokens.numpy(), np.full(len(tokens), position))
        first, last = int(tokens[0]), int(tokens[-1])
        key = (position, first, last) if len(tokens) == last + 1 - first else None
        squares = None if key is None else self._squares.get(key)
        if squares is None:
            squares = (inputs @ self.whitening).pow(2).sum(1, keepdim=True)
            if key is not None:
                self._squares[key] = squares
        products: Tensor = inputs @ (self.whitening @ directions.T)
        return products.pow(2) / squares


def _matrices_of_the_same_input(cut: CutModel) -> list[str]:
    """The A of the first adapted layer of block 0, and of others that take the same input, by PEFT's names."""
    config, adapted = cut.config, adapted_layers(cut.config, cut.lora)
    names, first = config.names, next(iter(adapted))
    together = next(layers for layers in (names.qkv, (names.projection,), names.up, (names.down,)) if first in layers)
    return [adapter_name(config, 0, layer, "A") for layer in together if layer in adapted]


def _inputs(cut: CutModel, tokens: Array, positions: Array) -> Tensor:
    """What the first adapted layer gets of each token at its position, (n, d); exact in a layer before any attention."""
    block: Block = cut.edge.blocks[0]  # type: ignore[assignment]
    found: list[Tensor] = []

    def stop(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        found.append(given[0])
        raise _Stopped

    # Every adapted layer asks what is dropped of its input, the first one before all others.
    hook, alone = cut.edge.dropout.register_forward_pre_hook(stop), _Alone(positions)
    try:
        with torch.no_grad():
            block(cut.edge.embedding(tokens, alone), alone)
    except _Stopped:
        pass  # what comes behind is of no use here, and would take most of the time
    finally:
        hook.remove()
    return found[0]


class _Alone:
    """Stands where a `Packing` does: every row is a text of its own, in which attention gives back its value."""

    def __init__(self, positions: Array) -> None:
        self.positions = positions

    def attend(self, query: Tensor, key: Tensor, value: Tensor, window: int | None = None) -> Tensor:
        """See `Packing.attend`."""
        return value.repeat_interleave(query.shape[1] // value.shape[1], 1).flatten(1)


class BagFromAdapterGradient:
    """The tokens of a micro-batch whose inputs are nearest to the row space of the adapter's gradient."""

    name, channel, target = "row space", "gradients of the edge adapter", Target.BAG

    def why_not(self, setting: Setting) -> str:
        return ""

    @torch.no_grad()
    def run(self, observations: Observations, knowledge: Knowledge, rng: np.random.Generator) -> Recovered:
        inputs, usual = _Inputs(knowledge), _usual(knowledge)
        samples, size = knowledge.samples, knowledge.setting.batch_size
        own = knowledge.own.exchanges[:LEARNT_FROM]
        wanted = truth(Target.BAG, samples, size)[:LEARNT_FROM]
        features, is_there = [], []
        for exchange, bag in zip(own, wanted, strict=True):
            features.append(_features(exchange, inputs, usual))
            is_there.append(torch.zeros(len(usual)).index_fill_(0, torch.from_numpy(bag).long(), 1.0))
        weights = _regressed(torch.cat(features), torch.cat(is_there))
        distinct = _distinct(knowledge)
        guesses = []
        for exchange in observations.exchanges:
            scores = _features(exchange, inputs, usual) @ weights
            guesses.append(scores.topk(_count(exchange, distinct)).indices.numpy())
        return Recovered(target=self.target, guesses=guesses)

    def baseline(self, observations: Observations, knowledge: Knowledge, rng: np.random.Generator) -> Recovered:
        usual, distinct = _usual(knowledge), _distinct(knowledge)
        guesses = [usual.topk(_count(exchange, distinct)).indices.numpy() for exchange in observations.exchanges]
        return Recovered(target=self.target, guesses=guesses)


def _usual(knowledge: Knowledge) -> Tensor:
    """(V,) the log-odds that a token is in a micro-batch, by the attacker's own."""
    bags = truth(Target.BAG, knowledge.samples, knowledge.setting.batch_size)
    counts = torch.bincount(torch.from_numpy(np.concatenate(bags)).long(), minlength=knowledge.cut.config.vocabulary_size)
    return ((counts + UNSEEN) / (len(bags) + 1 - counts)).log()


def _distinct(knowledge: Knowledge) -> float:
    """Different tokens of a micro-batch, of its rows."""
    bags = truth(Target.BAG, knowledge.samples, knowledge.setting.batch_size)
    return sum(map(len, bags)) / sum(len(sample.tokens) - 1 for sample in knowledge.samples)


def _count(exchange: Exchange, distinct: float) -> int:
    return max(1, round(distinct * len(exchange.activations)))


def _features(exchange: Exchange, inputs: _Inputs, usual: Tensor) -> Tensor:
    """(V, 4): 1, how usual a token is, how much of its input lies in the gradient's row space, and along its rows."""
    longest, size = int(exchange.lengths.max()), len(usual)
    inside, along = torch.zeros(size), torch.zeros(size)
    rows = inputs.rows(exchange)
    if float(rows.norm()):
        basis = torch.linalg.svd(rows / rows.norm(), full_matrices=False)[2]
        for tokens in torch.split(torch.arange(size), CHUNK_TOKENS):
            inside[tokens], along[tokens] = _nearest(inputs, tokens, inputs.positions(longest, COARSE_POSITIONS), basis, rows)
        kept = (inside + along).topk(min(KEPT_TOKENS, size)).indices.sort().values
        inside[kept], along[kept] = _nearest(inputs, kept, inputs.positions(longest, FINE_POSITIONS), basis, rows)
    columns = torch.ones(size), usual, _logit(inside), along
    return torch.stack(columns, 1)


def _nearest(inputs: _Inputs, tokens: Tensor, positions: list[int], basis: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of each token, at the position that suits it best: the two measures of `_features`, (n,) each."""
    inside, along = torch.zeros(len(tokens)), torch.zeros(len(tokens))
    for position in positions:
        shares = inputs.along(tokens, position, torch.cat([basis, rows / rows.norm()]))
        inside = torch.maximum(inside, shares[:, : len(basis)].sum(1))
        along = torch.maximum(along, shares[:, len(basis) :].sum(1))
    return inside, along


def _logit(share: Tensor) -> Tensor:
    """Of what lies inside to what lies outside: 1 is certain."""
    inside = share.clamp(1e-6, 1 - 1e-6)
    return (inside / (1 - inside)).log()


def _regressed(features: Tensor, is_there: Tensor) -> Tensor:
    """Weights (4,) of a logistic regression on (n, 4) features, standardised and put back."""
    scale = features.std(0).clamp(min=1e-6)
    scale[0] = 1.0
    scaled, weights = (features / scale).double(), torch.zeros(features.shape[1], dtype=torch.float64)
    wanted, penalty = is_there.double(), PENALTY * torch.eye(features.shape[1], dtype=torch.float64)
    for _ in range(STEPS):
        found = (scaled @ weights).sigmoid()
        slope = scaled.T @ (wanted - found) - penalty @ weights
        curvature = (scaled * (found * (1 - found))[:, None]).T @ scaled + penalty
        weights = weights + torch.linalg.solve(curvature, slope).clamp(-2, 2)
    return (weights / scale.double()).float()
