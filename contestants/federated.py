"""
Federated LoRA: the whole model on every client, and nothing but adapters on the way (FedAvg, arXiv 1602.05629).

In rounds of one step every client sends the gradient of its adapter, and the server, which sums them, takes the optimiser's
step for everybody: what is learnt is exactly centralised. In longer rounds every client takes its steps by itself, with an
optimiser of its own; at a round's end it sends its adapter, and gets the mean of all, weighted by the tokens that they learnt
from. Split learning treats the part of the adapter that is on devices in the same way.

The clients compute one after the other in one process. Their messages are encoded as if they were sent, by the protocol that a
split run has, and counted.
"""

import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from edge_client.data import Batch, Dataset
from protocol import AdapterGradient, AdapterWeights, Array, EdgeAdapter, RunSettings, Seconds, Tensors, decode, encode
from split_model import Adapter

from .training import Taken, dropout_seed
from .whole_model import ADAPTER, WholeModel, arrays

__all__ = ["Federated", "mean"]

LARGEST_MESSAGE = 2**32
LABELLED_TOKENS = "labelled_tokens"
"""How many there are travels along as a matrix of one element."""

Contribution = AdapterGradient | AdapterWeights


class Federated:
    """
    A `Contestant`.

    Args:
        model: whose adapter all clients begin with.
        clients: their names.
    """

    def __init__(self, model: WholeModel, settings: RunSettings, clients: Sequence[str]) -> None:
        self._model, self._settings = model, settings
        self._sums_gradients = settings.aggregate_every == 1
        self._adapter = model.adapter()
        """Of the last round's end."""
        self._states = dict.fromkeys(clients, model.state())
        """Of each client's model, in longer rounds."""
        self._labelled = dict[str, int]()
        """Of the clients that have taken steps in this round, the tokens that they have learnt from."""
        self._spent = dict[str, float]()
        """The same: seconds since their last message."""

    def take_step(self, step: int, batches: dict[str, Batch], learning_rate: float, *, ends_round: bool) -> Taken:
        if self._sums_gradients:
            return self._take_step_together(step, batches, learning_rate)
        losses, seconds = {}, {}
        for name, batch in batches.items():
            began = time.perf_counter()
            self._model.restore(self._states[name])
            losses[name] = self._model.backward(batch, dropout_seed(self._settings, name, step))
            self._model.take_step(len(batch.labels), learning_rate)
            self._states[name] = self._model.state()
            self._labelled[name] = self._labelled.get(name, 0) + len(batch.labels)
            spent = time.perf_counter() - began
            self._spent[name] = self._spent.get(name, 0.0) + spent
            seconds[name] = Seconds(edge_compute=spent)
        if not ends_round:
            return Taken(losses=losses, seconds=seconds, server_compute=0.0)
        return self._end_round(step, losses, seconds)

    def evaluate(self, data: Dataset) -> tuple[float, int]:
        self._model.load_adapter(self._adapter)
        return self._model.evaluate(data)

    def adapter(self) -> Adapter:
        return self._adapter

    def _take_step_together(self, step: int, batches: dict[str, Batch], learning_rate: float) -> Taken:
        losses, spent, messages = {}, {}, {}
        for name, batch in batches.items():
            began = time.perf_counter()
            losses[name] = self._model.backward(batch, dropout_seed(self._settings, name, step))
            tensors = _with_labelled_tokens(self._model.take_gradients(), len(batch.labels))
            computed = time.perf_counter()
            messages[name] = encode(AdapterGradient(step=step, seconds=Seconds(edge_compute=computed - began), tensors=tensors))
            spent[name] = Seconds(edge_compute=computed - began, encode=time.perf_counter() - computed)
        began = time.perf_counter()
        gradients, labelled = _received(messages)
        self._model.put_gradients({name: _sum(name, gradients) for name in self._adapter})
        norm = self._model.take_step(sum(labelled), learning_rate)
        self._adapter = self._model.adapter()
        answer = encode(EdgeAdapter(step=step, tensors=arrays(self._adapter)))
        return Taken(
            losses=losses,
            gradient_norm=norm,
            seconds=spent,
            server_compute=time.perf_counter() - began,
            bytes_up={name: len(message) for name, message in messages.items()},
            bytes_down=dict.fromkeys(messages, len(answer)),
        )

    def _end_round(self, step: int, losses: dict[str, float], seconds: dict[str, Seconds]) -> Taken:
        messages = {}
        for name, labelled_tokens in self._labelled.items():
            began = time.perf_counter()
            adapter = {key: tensor for key, tensor in self._states[name].items() if key.startswith(ADAPTER)}
            tensors = {key.removeprefix(ADAPTER): array for key, array in arrays(adapter).items()}
            messages[name] = encode(
                AdapterWeights(
                    step=step,
                    seconds=Seconds(edge_compute=self._spent[name]),
                    tensors=_with_labelled_tokens(tensors, labelled_tokens),
                )
            )
            seconds[name] = seconds.get(name, Seconds()) + Seconds(encode=time.perf_counter() - began)
        began = time.perf_counter()
        adapters, labelled = _received(messages)
        # A round without any label has taught nobody anything: all count alike.
        averaged = mean(adapters, labelled if any(labelled) else None)
        answer = encode(EdgeAdapter(step=step, tensors=averaged))
        server_compute = time.perf_counter() - began
        self._adapter = {name: torch.from_numpy(array) for name, array in averaged.items()}
        for name in self._labelled:
            averages = {f"{ADAPTER}{key}": tensor for key, tensor in self._adapter.items()}
            self._states[name] = {**self._states[name], **averages}
        self._labelled.clear()
        self._spent.clear()
        return Taken(
            losses=losses,
            seconds=seconds,
            server_compute=server_compute,
            bytes_up={name: len(message) for name, message in messages.items()},
            bytes_down=dict.fromkeys(messages, len(answer)),
        )


def mean(adapters: Sequence[Tensors], weights: Sequence[int] | None = None) -> Tensors:
    """
    Args:
        weights: of the adapters; None: all count alike.
    """
    weights = [1] * len(adapters) if weights is None else weights
    shares = [weight / sum(weights) for weight in weights]
    return {
        name: np.sum([adapter[name] * share for adapter, share in zip(adapters, shares, strict=True)], axis=0).astype(
            adapters[0][name].dtype
        )
        for name in adapters[0]
    }


def _sum(name: str, tensors: Sequence[Tensors]) -> Array:
    summed: Array = np.sum([each[name] for each in tensors], axis=0)
    return summed


def _with_labelled_tokens(tensors: Tensors, number: int) -> Tensors:
    kind = next(iter(tensors.values())).dtype
    return {**tensors, LABELLED_TOKENS: np.array([[number]], kind)}


def _received(messages: Mapping[str, bytes]) -> tuple[list[Tensors], list[int]]:
    """What the server reads: the tensors of every client, and how many labelled tokens each has learnt from."""
    found, labelled = [], []
    for message in messages.values():
        contribution = decode(message, LARGEST_MESSAGE)
        assert isinstance(contribution, Contribution)
        tensors = dict(contribution.tensors)
        labelled.append(int(tensors.pop(LABELLED_TOKENS).item()))
        found.append(tensors)
    return found, labelled
