"""
Tokens from activations, position by position, through the blocks that the attacker knows (arXiv 2510.15511).

An activation depends on its own token and on those before it. Who has found these tries tokens for the next one, and sees which
of them gives the activation that came. Not all tokens need to be tried: a linear inversion and a language model name the likely
ones, and more are tried where none of these explains what came. Under noise none explains it exactly, and several remain
possible: what is kept are the texts of the highest probability, by the noise's density and by what the language model expects.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from privacy import clipped
from protocol import Array

from ..knowledge import Knowledge
from ..observation import Observations, Setting, Target, truth
from ..prefixes import Prefixes
from .attack import Recovered
from .labels import GradientReader
from .language import NextToken
from .linear_inversion import Inversion, learnt_from

__all__ = ["SearchedActivations"]

SEQUENCES_AT_ONCE = 32
INVERTED, EXPECTED = 32, 16
"""Candidates of each text so far: by inversion and expectation together, and by expectation alone."""
A_ROUND, MOST_ROUNDS, WIDENED = 256, 8, 2048
"""How many more are tried where none explains what came: round by round beside the best one, and at last by inversion alone."""
MOST_IN_VAIN = 2
"""After so many searches of a sequence that found nothing, its beginning is wrong, and no more are made."""
TRIED_AT_ONCE = 2048
UNEXPLAINED = 1.5
"""How much larger than any error of the attacker's own texts one is that noise and codec do not explain."""
LEAST_ERROR = 1e-4
"""Standard deviation of an element without noise or codec, in those of activations: another order of additions gives less."""
KEPT_TEXTS = 4
LEAST_ODDS = -12.0
"""Log of a text's probability to that of the most probable, below which it is given up."""


_Gradients: TypeAlias = tuple[Array, Array]
"""Hidden states and gradients, (M, d) each."""


@dataclass(frozen=True)
class _Texts:
    """Several possible beginnings of each sequence, equally long, those of a sequence together and the best one first."""

    tokens: list[list[int]]
    sequences: Tensor
    """(P,) the number of the sequence that each is a beginning of."""
    scores: Tensor
    """(P,) log-probability, up to a constant of the sequence."""
    edge: Prefixes
    server: Prefixes
    hidden: Tensor
    """(P, d) at the cut, of the last token."""
    expected: Tensor
    """(P, V) log-probability of the next token before it is seen; (0, V) until it is asked for."""


class SearchedActivations:
    """
    The most probable text behind activations.

    Args:
        with_gradients: whether the gradients at the hidden states are looked at, too: what follows a row is its label.
    """

    target = Target.TOKENS

    def __init__(self, *, with_gradients: bool = False) -> None:
        self._with_gradients = with_gradients
        self.name = "exact search"
        self.channel = "activations and gradients at the hidden states" if with_gradients else "activations"

    def why_not(self, setting: Setting) -> str:
        if not self._with_gradients:
            return ""
        if setting.labels != "device" or setting.label_rows != "shown":
            return "gradients at the hidden states do not come, or do not say at which rows there is a label"
        return "" if setting.activation_noise else "activations alone say all"

    def run(self, observations: Observations, knowledge: Knowledge, rng: np.random.Generator) -> Recovered:
        return self._recovered(observations, _Search(knowledge, blind=False, with_gradients=self._with_gradients))

    def baseline(self, observations: Observations, knowledge: Knowledge, rng: np.random.Generator) -> Recovered:
        return self._recovered(observations, _Search(knowledge, blind=True, with_gradients=False))

    def _recovered(self, observations: Observations, search: "_Search") -> Recovered:
        rows = observations.by_sequence(lambda exchange: exchange.activations)
        gradients = _gradients(observations) if self._with_gradients else [None] * len(rows)
        guesses: list[Array] = []
        for start in range(0, len(rows), SEQUENCES_AT_ONCE):
            some = slice(start, start + SEQUENCES_AT_ONCE)
            guesses += search.texts(rows[some], gradients[some])
        return Recovered(target=self.target, guesses=guesses)


def _gradients(observations: Observations) -> list[_Gradients | None]:
    """Of each sequence: hidden states and gradients (M, d), at its last M rows."""
    found: list[_Gradients | None] = []
    for exchange in observations.exchanges:
        assert exchange.hidden_gradient is not None
        ends = np.cumsum(exchange.label_counts)[:-1]
        found += zip(np.split(exchange.hidden_states, ends), np.split(exchange.hidden_gradient, ends), strict=True)
    return found


class _Search:
    """
    Args:
        blind: whether rows are not looked at, and only their numbers are known.
    """

    def __init__(self, knowledge: Knowledge, *, blind: bool, with_gradients: bool) -> None:
        self._cut, self._setting, self._blind = knowledge.cut, knowledge.setting, blind
        self._reader = GradientReader(knowledge) if with_gradients else None
        self._language = NextToken(knowledge.samples, self._cut.config.vocabulary_size)
        # Without noise the rows decide, and what a model expects costs the most.
        self._asks_model = blind or self._setting.activation_noise > 0
        if not blind:
            self._inversion = learnt_from(knowledge, lambda exchange: exchange.activations)
            self._learn_errors(knowledge)

    def _learn_errors(self, knowledge: Knowledge) -> None:
        """What noise and codec do, by the attacker's own texts."""
        sent = torch.from_numpy(np.concatenate([exchange.activations for exchange in knowledge.own.exchanges]))
        texts = truth(Target.TOKENS, knowledge.samples, 1)
        is_first = torch.from_numpy(np.concatenate([np.arange(len(text)) for text in texts]) == 0)
        exact = torch.from_numpy(np.concatenate([self._cut.activations([text]) for text in texts]))
        least = (LEAST_ERROR * exact[~is_first].std(0).median()) ** 2
        self._precision, self._explained = [], []
        for position, chosen in enumerate((is_first, ~is_first)):
            squares = (sent[chosen] - self._as_sent(exact[chosen], position)).pow(2)
            self._precision.append(1 / squares.mean(0).clamp(min=least))  # (d,)
            self._explained.append(UNEXPLAINED * max(squares.shape[1], float((squares @ self._precision[-1]).max())))

    def _as_sent(self, activations: Tensor, position: int) -> Tensor:
        """What would be sent of rows (N, d), but for noise and codec."""
        if not self._setting.activation_clip:
            return activations
        centre = torch.from_numpy(self._cut.centre.later if position else self._cut.centre.first)
        return centre + torch.from_numpy(clipped((activations - centre).numpy(), self._setting.activation_clip))

    @torch.no_grad()
    def texts(self, rows: Sequence[Array], gradients: Sequence[_Gradients | None]) -> list[Array]:
        """
        Rows (T, d) of each sequence -> its tokens, (T,).

        Args:
            gradients: of each sequence, what came at its last M rows; None: it is not looked at.
        """
        number = len(rows)
        self._searched_in_vain = [0] * number
        nothing: list[list[int]] = [[] for _ in rows]
        edge, server = Prefixes(self._cut.edge.blocks, number), Prefixes(self._cut.server.blocks, number)
        expected = self._language.log_probability(nothing, None)
        texts = _Texts(nothing, torch.arange(number), torch.zeros(number), edge, server, torch.empty(number, 0), expected)
        found: dict[int, list[int]] = {}
        for position in range(max(map(len, rows))):
            texts = self._longer(texts, rows, position)
            going_on = []
            for number, (text, sequence) in enumerate(zip(texts.tokens, texts.sequences.tolist(), strict=True)):
                if len(rows[sequence]) > position + 1:
                    going_on.append(number)
                else:
                    found.setdefault(sequence, text)  # the best one comes first
            if going_on:
                texts = self._expecting(_part(texts, torch.tensor(going_on)))
                texts = self._with_labels(texts, rows, gradients, position)
        return [np.array(found[sequence]) for sequence in range(len(rows))]

    def _longer(self, texts: _Texts, rows: Sequence[Array], position: int) -> _Texts:
        """The most probable texts with one token more, that of the position."""
        most = texts.expected.shape[1]
        tried = texts.expected.topk(min(EXPECTED, most), 1).indices  # (P, c)
        if self._blind:
            hidden, off = self._continued(texts.edge, tried, position), torch.zeros(tried.shape)
        else:
            came = torch.from_numpy(np.stack([rows[sequence][position] for sequence in texts.sequences.tolist()]))
            inverted = self._inversion.likelihood(came)
            tried = torch.cat([(inverted + texts.expected).topk(min(INVERTED, most), 1).indices, tried], 1)
            hidden = self._continued(texts.edge, tried, position)
            off = self._off(hidden, came, position)
            if self._tries_more(texts, tried, off, inverted, came, position):
                hidden = self._continued(texts.edge, tried, position)
                off = self._off(hidden, came, position)
        scores = texts.scores[:, None] + texts.expected.gather(1, tried) - off / 2
        is_repeated = (tried[:, :, None] == tried[:, None, :]).tril(-1).any(2)
        return _best(texts, tried, scores.masked_fill(is_repeated, -torch.inf), hidden)

    def _continued(self, edge: Prefixes, tokens: Tensor, position: int) -> Tensor:
        """(P, d) activations of tokens (P, c) that continue texts at a position: (P, c, d)."""
        flat = tokens.flatten().numpy()
        where = SimpleNamespace(positions=np.full(flat.shape, position))
        return edge.extended(self._cut.edge.embedding(flat, where)).view(*tokens.shape, -1)

    def _off(self, hidden: Tensor, came: Tensor, position: int) -> Tensor:
        """
        How far activations (P, c, d) are from the rows (P, d) that came, (P, c): the sum over elements of the squared distance
        in standard deviations of noise and codec.
        """
        sent = self._as_sent(hidden.flatten(0, 1), position).view(hidden.shape)
        return (sent - came[:, None]).pow(2) @ self._precision[position > 0]

    def _tries_more(self, texts: _Texts, tried: Tensor, off: Tensor, inverted: Tensor, came: Tensor, position: int) -> bool:
        """
        For the best text of each sequence that none of the tokens (P, c) explains: search on, and put the token that is found
        in the place of the last of those. Returns whether there was any.
        """
        seen, any_found = set[int](), False
        for number, sequence in enumerate(texts.sequences.tolist()):
            if sequence in seen or self._searched_in_vain[sequence] >= MOST_IN_VAIN:
                continue
            seen.add(sequence)
            best = int(off[number].argmin())
            least, token = float(off[number, best]), int(tried[number, best])
            if least <= self._explained[position > 0]:
                continue
            found, least = self._found(
                texts.edge.part(torch.tensor([number])), token, least, inverted[number], came[number], position
            )
            if found != token:
                tried[number, -1], any_found = found, True
            self._searched_in_vain[sequence] += least > self._explained[position > 0]
        return any_found

    def _found(
        self, text: Prefixes, token: int, least: float, inverted: Tensor, came: Tensor, position: int
    ) -> tuple[int, float]:
        """
        The token that explains a row (d,) best behind one text, and how far off it is; beginning with the best one so far. Its
        own row differs from the one that came mostly by what the tokens' embeddings differ: that names better ones.
        """

        row = self._continued(text, torch.tensor([[token]]), position)[0, 0]
        all_tried, all_rows = [torch.tensor([token])], [row[None]]
        enough = self._explained[position > 0]

        def try_all(tokens: Tensor) -> None:
            nonlocal token, least, row
            for some in torch.split(tokens, TRIED_AT_ONCE):
                hidden = self._continued(text, some[None], position)
                off = self._off(hidden, came[None], position)[0]
                all_tried.append(some)
                all_rows.append(hidden[0])
                if off.min() < least:
                    token, least, row = int(some[off.argmin()]), float(off.min()), hidden[0, off.argmin()]

        for _ in range(MOST_ROUNDS):
            before = token
            difference = came - self._as_sent(row[None], position)[0]
            try_all(_best_of(self._inversion.likelihood_beside(difference, token), A_ROUND))
            if token == before or least <= enough:
                break
        if least > enough:
            try_all(_best_of(inverted, WIDENED))
        if least > enough:  # what was tried teaches an inversion of its own for rows behind this text
            rows, tokens = torch.cat(all_rows), torch.cat(all_tried)
            mixed = torch.from_numpy(np.random.default_rng(0).permutation(len(rows)))
            behind_this_text = Inversion.learn(self._as_sent(rows, position)[mixed], tokens[mixed], tokens, self._cut.table)
            try_all(_best_of(behind_this_text.likelihood(came[None])[0], A_ROUND))
        return token, least

    def _expecting(self, texts: _Texts) -> _Texts:
        """With what the next token may be."""
        of_model, server = None, texts.server
        if self._asks_model:
            hidden = self._cut.server.final_norm(server.extended(texts.hidden))
            of_model = (hidden @ self._cut.head.T).softmax(1)
            server = server.chosen(torch.arange(len(texts.tokens)), 1)
        return replace(texts, server=server, expected=self._language.log_probability(texts.tokens, of_model))

    def _with_labels(
        self, texts: _Texts, rows: Sequence[Array], gradients: Sequence[_Gradients | None], position: int
    ) -> _Texts:
        """With what the gradients at the position say of the next token, which is its label."""
        if self._reader is None:
            return texts
        expected = texts.expected.clone()
        for number, sequence in enumerate(texts.sequences.tolist()):
            of_sequence = gradients[sequence]
            assert of_sequence is not None
            hidden, gradient = of_sequence
            row = position - (len(rows[sequence]) - len(hidden))
            if row >= 0:
                (evidence,) = self._reader.read(hidden[row : row + 1], gradient[row : row + 1])
                expected[number] += evidence.likelihood[0]
        return replace(texts, expected=expected)


def _best_of(scores: Tensor, count: int) -> Tensor:
    """The tokens of the highest scores (V,), at most ``count`` of them."""
    return scores.topk(min(count, len(scores))).indices


def _part(texts: _Texts, chosen: Tensor) -> _Texts:
    return _Texts(
        [texts.tokens[number] for number in chosen.tolist()],
        texts.sequences[chosen],
        texts.scores[chosen],
        texts.edge.part(chosen),
        texts.server.part(chosen),
        texts.hidden[chosen],
        texts.expected,
    )


def _best(texts: _Texts, tried: Tensor, scores: Tensor, hidden: Tensor) -> _Texts:
    """
    Of every sequence the most probable texts.

    Args:
        tried: (P, c) tokens behind the texts so far.
        scores: (P, c) of the longer texts.
        hidden: (P, c, d) their activations.
    """
    per_text, rows = tried.shape[1], []
    for sequence in dict.fromkeys(texts.sequences.tolist()):
        of_sequence = (texts.sequences == sequence).nonzero().flatten()
        best = scores[of_sequence].flatten().topk(min(KEPT_TEXTS, len(of_sequence) * per_text))
        probable = best.indices[best.values >= best.values[0] + LEAST_ODDS]
        rows.append(of_sequence[probable // per_text] * per_text + probable % per_text)
    chosen = torch.cat(rows)
    parents, tokens = chosen // per_text, tried.flatten()[chosen].tolist()
    return _Texts(
        [[*texts.tokens[parent], token] for parent, token in zip(parents.tolist(), tokens, strict=True)],
        texts.sequences[parents],
        scores.flatten()[chosen],
        texts.edge.chosen(chosen, per_text),
        texts.server.part(parents),
        hidden.flatten(0, 1)[chosen],
        texts.expected[:0],
    )
