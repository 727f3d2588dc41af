"""
Quantisation by what a model's layers are given while it reads texts: first channels are made equally large, for all precisions;
then, block by block, each matrix of few bits is rounded for the inputs that the blocks before it make, rounded as they are.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from graphs import Floats, Weights
from terminal import Progress

from .equalisation import Equalised, factors_of_block
from .observation import Observer
from .precision import Precision, block_forms
from .quantisation import BlockFormat, QuantisedMatrix, quantise
from .rounding import InputProducts, round_for_inputs

if TYPE_CHECKING:  # a graph is built without torch, which split_model imports
    from split_model import ModelConfig

__all__ = ["RoundedMatrices", "equalised"]

NUM_SEEN = 64
"""Tokens, drawn from all texts, by whose inputs channels are made equally large."""
CALIBRATED_BITS = 4
"""Of a matrix, at most, that is rounded for its inputs. With 8 bits the nearest values are as good."""


def equalised(
    config: "ModelConfig", weights: Weights, observer: Observer, precision: Precision, fixed: Collection[str] = ()
) -> Equalised:
    """
    Args:
        precision: the smallest that is exported.
        fixed: names of layers whose inputs and outputs stay as they are.
    """
    factors: dict[str, Floats] = {}
    seen = np.random.default_rng(0).choice(observer.num_tokens, min(NUM_SEEN, observer.num_tokens), replace=False)
    hidden, forms = observer.embedded(weights), block_forms(config, precision)
    with Progress(config.num_layers, unit="block") as progress:
        for index in range(config.num_layers):
            hidden, inputs = _observed(observer, index, weights, hidden, np.sort(seen))
            factors |= factors_of_block(config, config.block_name(index), weights, inputs, forms, fixed)
            progress.advance("calibration")
    return Equalised(weights, config, factors)


def _observed(
    observer: Observer, index: int, weights: Weights, hidden: Sequence[Floats], seen: NDArray[np.int64]
) -> tuple[list[Floats], dict[str, Floats]]:
    """What the next block is given, and of some tokens, by their numbers in all texts, what each linear layer is given."""
    following, inputs = [], dict[str, list[Floats]]()
    for after, given in observer.block(index, weights, hidden):
        following.append(after)
        here, seen = seen[seen < len(after)], seen[seen >= len(after)] - len(after)
        for layers, values in given.items():
            for layer in layers:
                inputs.setdefault(layer, []).append(values[here])
    return following, {layer: np.concatenate(parts) for layer, parts in inputs.items()}


class RoundedMatrices:
    """
    A model's matrices in the form that a precision gives them. They are asked for in the order of the blocks, so that no more
    than one block is held.

    Args:
        weights: what the observed model reads.
        stored: the same, where a matrix is read to be stored.
    """

    def __init__(
        self, config: "ModelConfig", weights: Weights, stored: Weights, observer: Observer, precision: Precision
    ) -> None:
        self._config, self._weights, self._stored, self._observer = config, weights, stored, observer
        self._forms = block_forms(config, precision)
        self._block, self._hidden = -1, list[Floats]()
        """What the block is given, (S, d) of each text."""
        self._products: dict[str, InputProducts] = {}
        self._rounded: dict[str, Floats] = {}
        """(in, out), of the block."""

    def quantised(self, name: str, form: BlockFormat) -> Iterator[QuantisedMatrix]:
        """The transpose of a matrix, (in, out), some rows at a time."""
        index = int(name.removeprefix(f"{self._config.names.blocks}.").split(".")[0])
        while self._block < index:
            self._enter_next_block()
        matrix, products = self._stored.read(name), self._products.get(name.removesuffix(".weight"))
        if products is None or not products.are_finite:
            yield from quantise([matrix.T], form)
            return
        found = round_for_inputs(matrix, products, form)
        self._rounded[name] = found.values(len(matrix), form).T
        yield found

    def _enter_next_block(self) -> None:
        if self._block < 0:
            self._hidden = self._observer.embedded(self._weights)
        else:
            rounded = Replaced(self._weights, self._rounded)
            self._hidden = [after for after, _ in self._observer.block(self._block, rounded, self._hidden)]
        self._block += 1
        self._rounded, self._products = {}, {}
        for _, given in self._observer.block(self._block, self._weights, self._hidden):
            for layers, inputs in given.items():
                self._add(layers, inputs)

    def _add(self, layers: Sequence[str], inputs: Floats) -> None:
        block = self._config.block_name(self._block)
        forms = {layer: self._forms[layer.removeprefix(f"{block}.")] for layer in layers}
        few = [layer for layer, form in forms.items() if form.bits <= CALIBRATED_BITS]
        if few and few[0] not in self._products:
            self._products |= dict.fromkeys(few, InputProducts(inputs.shape[1], forms[few[0]]))  # the same for all of them
        if few:
            self._products[few[0]].add(inputs)


class Replaced(Weights):
    """Weights of which some are others."""

    def __init__(self, weights: Weights, others: Mapping[str, Floats]) -> None:
        self._weights, self._others = weights, others

    def read(self, name: str) -> Floats:
        return self._others[name] if name in self._others else self._weights.read(name)

    def pieces(self, name: str) -> Iterator[Floats]:
        return iter([self._others[name]]) if name in self._others else self._weights.pieces(name)
