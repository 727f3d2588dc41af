"""Devices that keep the labels: what they reply to hidden states, computed in torch."""

from pathlib import Path

import torch

from protocol import Activations, Array, HiddenGradient, Seconds
from split_model import PretrainedModel
from split_model.loss import summed_cross_entropy

__all__ = ["LabelKeepers"]


class LabelKeepers:
    """
    Args:
        folder: the base model's, whose head computes the loss, in float64.
    """

    def __init__(self, folder: Path) -> None:
        model = PretrainedModel(folder)
        self._head = model.tensors[model.config.head_name].view().to(torch.float64)

    def reply(self, hidden: Array, batch: Activations) -> HiddenGradient:
        """
        Args:
            hidden: (M, d) that the server has made of the batch.
        """
        states = torch.from_numpy(hidden.copy()).requires_grad_()
        loss = summed_cross_entropy(states, self._head, torch.from_numpy(batch.labels).long())
        (gradient,) = torch.autograd.grad(loss, states)
        return HiddenGradient(
            step=batch.step,
            micro_batch=batch.micro_batch,
            seconds=Seconds(),
            summed_loss=loss.item(),
            labelled_tokens=len(hidden),
            values=gradient.numpy(),
        )
