"""
Which tokens a micro-batch has, from the gradient of the edge adapter.

The gradient of the first adapted layer's A is a sum of that layer's inputs, each times r numbers: its rows lie in the space of
the inputs. In block 0 an input is a function of the token and its position, which the attacker computes for all tokens (as
DAGER does, arXiv 2405.15586). With no more rows than the adapter has ranks, the inputs of tokens that are there lie in the
gradient's row space, and others do not. With more rows that is true only more or less; how much it tells beside how common
tokens are, the attacker learns from its own texts. As long as B is zero, in a run's first step, so is the gradient of A.
"""

from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from protocol import Array

from ..cut_model import CutModel
from ..knowledge import Knowledge
from ..observation import Exchange, Observations, Setting, Target, truth
from .attack import Recovered

__all__ = ["BagFromAdapterGradient"]

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
        self._cut = knowledge.cut
        tokens = np.concatenate(truth(Target.TOKENS, knowledge.samples, 1))
        positions = np.concatenate([np.arange(len(sample.tokens) - 1) for sample in knowledge.samples])
        inputs = _inputs(self._cut, tokens, positions)
        covariance = (inputs - inputs.mean(0)).T @ (inputs - inputs.mean(0)) / len(inputs)
        covariance += 0.01 * covariance.diagonal().mean() * torch.eye(len(covariance))
        self.whitening = torch.linalg.cholesky(torch.linalg.inv(covariance))  # (d, d)
        self._squares: dict[tuple[int, int, int], Tensor] = {}

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


def _inputs(cut: CutModel, tokens: Array, positions: Array) -> Tensor:
    """What the first adapted layer gets of each token at its position, (n, d); exact in a layer before any attention."""
    block = cut.edge.blocks[0]
    layer = next(module for module in block.modules() if getattr(module, "lora_A", None) is not None)
    found: list[Tensor] = []

    def stop(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        found.append(given[0])
        raise _Stopped

    hook = layer.register_forward_pre_hook(stop)
    try:
        with torch.no_grad():
            block(cut.edge.embedding(tokens, SimpleNamespace(positions=positions)), _Alone())
    except _Stopped:
        pass  # what comes behind is of no use here, and would take most of the time
    finally:
        hook.remove()
    return found[0]


class _Alone:
    """Stands where a `Packing` does: every row is a text of its own, in which attention gives back its value."""

    def attend(self, qkv: Tensor, num_heads: int) -> Tensor:
        return qkv.chunk(3, 1)[2]


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
    gradient = next(iter(exchange.adapter_gradient.values()))  # of the first layer's A, (r, d)
    longest, size = int(exchange.lengths.max()), len(usual)
    inside, along = torch.zeros(size), torch.zeros(size)
    rows = torch.from_numpy(gradient) @ inputs.whitening
    if float(rows.norm()):
        basis = torch.linalg.svd(rows / rows.norm(), full_matrices=False)[2]
        for tokens in torch.split(torch.arange(size), CHUNK_TOKENS):
            inside[tokens], along[tokens] = _nearest(inputs, tokens, _spread(longest, COARSE_POSITIONS), basis, rows)
        kept = (inside + along).topk(min(KEPT_TOKENS, size)).indices.sort().values
        inside[kept], along[kept] = _nearest(inputs, kept, _spread(longest, FINE_POSITIONS), basis, rows)
    columns = torch.ones(size), usual, _logit(inside), along
    return torch.stack(columns, 1)


def _spread(longest: int, count: int) -> list[int]:
    return sorted({int(position) for position in np.linspace(0, longest - 1, min(count, longest)).round()})


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
