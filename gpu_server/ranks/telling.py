"""Batches and adapters in the form in which one rank tells them another, and back; see `packing`."""

from collections.abc import Mapping
from typing import Any

import torch

from protocol import Array, LabelledBatch, TrainingDiverged
from split_model import Adapter
from storage import ModelError

__all__ = ["FAILING_EVERYWHERE", "adapter_of", "arrays_of", "batches_of", "told"]

FAILING_EVERYWHERE = (TrainingDiverged, ModelError)
"""What computing raises on all ranks alike, since numbers that are not finite are added up."""


def told(batches: Mapping[str, LabelledBatch]) -> dict[str, dict[str, Array]]:
    fields = ("lengths", "label_counts", "labels", "values")
    return {name: {field: getattr(batch, field) for field in fields} for name, batch in batches.items()}


def batches_of(message: Mapping[str, Mapping[str, Any]]) -> dict[str, LabelledBatch]:
    """What was `told`."""
    return {name: LabelledBatch(**fields) for name, fields in message.items()}


def arrays_of(adapter: Adapter) -> dict[str, Array]:
    return {name: tensor.numpy() for name, tensor in adapter.items()}


def adapter_of(message: Mapping[str, Array]) -> Adapter:
    """What `arrays_of` was given."""
    return {name: torch.from_numpy(array) for name, array in message.items()}
