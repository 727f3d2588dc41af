"""
Rounding that knows a matrix's inputs: GPTQ (arXiv 2210.17323). The error of each row is made good by the rows that are not
rounded yet, as far as their inputs go together with its own.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from graphs import Floats

from .quantisation import BlockFormat, Grid, QuantisedMatrix

__all__ = ["InputProducts", "round_for_inputs"]

WINDOW = 2048
"""Channels further apart are taken for unrelated. So no more is held of a wide layer than a few squares of this side."""
DAMPING = 0.01
"""Of the mean square of an input, added to each: a few thousand tokens say little of directions in which they hardly differ."""
NARROWED = tuple(np.linspace(1, 0.7, 7, dtype=np.float32))
"""How much of a block's range its grid covers: what lies beyond is cut off, and all else is rounded more finely."""


class InputProducts:
    """Sums, over all tokens, of the products of a layer's inputs with one another; within windows of its channels."""

    def __init__(self, width: int, form: BlockFormat) -> None:
        number = -(-width // WINDOW)
        size = form.padded(-(-width // number))
        self.windows = [slice(start, min(start + size, width)) for start in range(0, width, size)]
        self.sums = [np.zeros((window.stop - window.start,) * 2, np.float32) for window in self.windows]

    @property
    def are_finite(self) -> bool:
        """Else the inputs are so large that nothing can be said of their products."""
        return all(np.isfinite(total).all() for total in self.sums)

    @np.errstate(over="ignore", invalid="ignore")  # of which `are_finite` tells
    def add(self, inputs: Floats) -> None:  # (tokens, in)
        for window, total in zip(self.windows, self.sums, strict=True):
            total += inputs[:, window].T @ inputs[:, window]


@np.errstate(over="ignore", invalid="ignore")  # of which scales that are not finite tell
def round_for_inputs(matrix: Floats, products: InputProducts, form: BlockFormat) -> QuantisedMatrix:
    """
    Args:
        matrix: (in, out).
        products: of its inputs.

    Returns:
        Its transpose, rounded so that the product with those inputs changes little.
    """
    blocks, grids = [], []
    for window, sums in zip(products.windows, products.sums, strict=True):
        for integers, grid in _rounded(matrix[window], sums, form):
            blocks.append(integers)
            grids.append(grid)
    integers = np.stack(blocks).transpose(2, 0, 1)  # (blocks, in each, out) -> (out, blocks, in each)
    scales, zero_points = (np.stack([getattr(grid, part) for grid in grids], 1) for part in ("scales", "zero_points"))
    grid = Grid(scales=scales[..., None], zero_points=zero_points[..., None], largest=form.largest)
    return QuantisedMatrix.of(integers, grid, form)


def _rounded(matrix: Floats, sums: Floats, form: BlockFormat) -> Iterator[tuple[NDArray[np.uint8], Grid]]:
    """Of each block of rows its integers (rows of a block, out), and the grids of its columns."""
    rest, influence, importance = matrix.copy(), _influence(sums), np.diagonal(sums)
    for start in range(0, len(rest), form.size):
        stop = min(start + form.size, len(rest))
        block = rest[start:stop]  # a view: corrections reach it
        grid = _best_grid(block, importance[start:stop], form)
        # Zeros fill up the last block.
        integers = np.broadcast_to(grid.zero_points, (form.size, rest.shape[1])).astype(np.uint8)
        errors = np.empty_like(block)
        for row, own in enumerate(influence[start:stop]):
            integers[row] = grid.integers(block[row])
            errors[row] = (block[row] - grid.values(integers[row])) / own[start + row]
            block[row + 1 :] -= np.outer(own[start + row + 1 : stop], errors[row])
        rest[stop:] -= influence[start:stop, stop:].T @ errors
        yield integers, grid


def _influence(sums: Floats) -> Floats:
    """
    (in, in), upper triangular: how the error of a row changes the best values of the rows behind it. It is the Cholesky factor
    of the products' inverse: what elimination, row by row, would find.
    """
    damped = sums.astype(np.float64)
    mean = np.trace(damped) / len(damped)
    damped[np.diag_indices_from(damped)] += DAMPING * mean if mean > 0 else 1
    influence: Floats = np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)
    return influence


def _best_grid(block: Floats, importance: Floats, form: BlockFormat) -> Grid:
    """For each column the one of `NARROWED` with the least error of the product."""
    lowest, highest = block.min(0), block.max(0)
    grids = [Grid.around(lowest * share, highest * share, form) for share in NARROWED]
    errors = [importance @ np.square(grid.values(grid.integers(block)) - block) for grid in grids]
    best = np.argmin(errors, 0)  # the first of several, the widest
    scales, zero_points = (np.choose(best, [getattr(grid, part) for grid in grids]) for part in ("scales", "zero_points"))
    return Grid(scales=scales, zero_points=zero_points, largest=form.largest)
