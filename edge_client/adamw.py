"""AdamW in numpy, for devices without torch. It computes what `torch.optim.AdamW` does, and keeps its state under its names."""

import math
from collections.abc import Mapping

import numpy as np

from protocol import Array, Tensors
from storage import AdapterError

__all__ = ["AdamW"]

MOMENTS = ("exp_avg", "exp_avg_sq")
BETA, BETA_OF_SQUARES, EPSILON = 0.9, 0.999, 1e-8
"""As `split_model.OptimiserConfig` says."""


class AdamW:
    """
    AdamW (arXiv 1711.05101).

    Args:
        matrices: float32; each step changes them in place.
    """

    def __init__(self, matrices: Mapping[str, Array], *, weight_decay: float) -> None:
        self._matrices, self._weight_decay = matrices, weight_decay
        self._state: dict[str, _Moments] = {}
        """Of every matrix; empty before the first step."""

    def step(self, gradients: Tensors, learning_rate: float) -> None:
        """Update the matrices once, at the given rate."""
        for name, matrix in self._matrices.items():
            moments = self._state.setdefault(name, _Moments(np.zeros_like(matrix), np.zeros_like(matrix)))
            matrix *= np.float32(1 - learning_rate * self._weight_decay)
            matrix -= moments.update(gradients[name], learning_rate)

    def state(self) -> Tensors:
        """
        A copy of what has been learnt; empty before the first step. Names begin with the matrix's number: "0/exp_avg" and
        "0/exp_avg_sq" in the matrix's shape, "0/step" of shape (), "1/exp_avg" and so on.
        """
        found: Tensors = {}
        for index, name in enumerate(self._matrices):
            if name in self._state:
                moments = self._state[name]
                found[f"{index}/step"] = np.array(moments.step, np.float32)
                found[f"{index}/exp_avg"] = moments.mean.copy()
                found[f"{index}/exp_avg_sq"] = moments.mean_of_squares.copy()
        return found

    def restore(self, state: Tensors) -> None:
        """
        Take over what `state` returned.

        Raises:
            AdapterError: it belongs to other matrices.
        """
        expected = {f"{index}/{key}": matrix.shape for index, matrix in enumerate(self._matrices.values()) for key in MOMENTS}
        expected |= {f"{index}/step": () for index in range(len(self._matrices))}
        found = {name: array.shape for name, array in state.items()}
        if found and found != expected:
            odd = min(name for name in {**found, **expected} if found.get(name) != expected.get(name))
            raise AdapterError(
                f"the optimiser's state does not fit: it has {odd} in the shape {found.get(odd)}, expected {expected.get(odd)}"
            )
        self._state = {}
        for index, name in enumerate(self._matrices):
            if state:
                mean, mean_of_squares = (state[f"{index}/{key}"].astype(np.float32) for key in MOMENTS)
                self._state[name] = _Moments(mean, mean_of_squares, int(state[f"{index}/step"]))


class _Moments:
    """Of one matrix's gradients."""

    def __init__(self, mean: Array, mean_of_squares: Array, step: int = 0) -> None:
        self.mean, self.mean_of_squares, self.step = mean, mean_of_squares, step

    def update(self, gradient: Array, learning_rate: float) -> Array:
        """Take a gradient in, and return what is to be subtracted from the matrix."""
        self.step += 1
        self.mean += np.float32(1 - BETA) * (gradient - self.mean)
        self.mean_of_squares *= np.float32(BETA_OF_SQUARES)
        self.mean_of_squares += np.float32(1 - BETA_OF_SQUARES) * gradient * gradient
        # Both means begin at zero, and are too small by these factors.
        correction, correction_of_squares = 1 - BETA**self.step, 1 - BETA_OF_SQUARES**self.step
        divisor = np.sqrt(self.mean_of_squares) / np.float32(math.sqrt(correction_of_squares)) + np.float32(EPSILON)
        update: Array = np.float32(learning_rate / correction) * self.mean / divisor
        return update
