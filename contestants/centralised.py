"""
Centralised LoRA: everybody's texts in one place, one model, and every step on the batches of all clients together.

A split run in rounds of one step, without dropout and with exact floats, learns exactly this.
"""

import time

from edge_client.data import Batch, Dataset
from protocol import RunSettings
from split_model import Adapter

from .training import Taken, dropout_seed
from .whole_model import WholeModel

__all__ = ["Centralised"]


class Centralised:
    """
    A `Contestant`.

    Args:
        num_bytes: by client, of its texts: they are sent once, before the first step, and counted with it.
    """

    def __init__(self, model: WholeModel, settings: RunSettings, num_bytes: dict[str, int]) -> None:
        self._model, self._settings, self._num_bytes = model, settings, num_bytes

    def take_step(self, step: int, batches: dict[str, Batch], learning_rate: float, *, ends_round: bool) -> Taken:
        began = time.perf_counter()
        losses = {
            name: self._model.backward(batch, dropout_seed(self._settings, name, step)) for name, batch in batches.items()
        }
        norm = self._model.take_step(sum(len(batch.labels) for batch in batches.values()), learning_rate)
        return Taken(
            losses=losses,
            gradient_norm=norm,
            server_compute=time.perf_counter() - began,
            seconds={},
            bytes_up=self._num_bytes if step == 1 else {},
        )

    def evaluate(self, data: Dataset) -> tuple[float, int]:
        return self._model.evaluate(data)

    def adapter(self) -> Adapter:
        return self._model.adapter()
