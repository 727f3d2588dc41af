"""
The contestant that splits nothing: federated LoRA, the whole model on every client (FedAvg, arXiv 1602.05629).

Each client is both parts of the split model in one process, with the same data, optimiser and initial adapter. At a round's end
it sends its whole adapter and gets the mean of all; batches are of one size, so that clients count alike. The messages are
the protocol's, with the same compression, over TCP through whatever link there is.
"""

import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edge_client.data import Batch, Dataset, pack
from protocol import AdapterWeights, EdgeAdapter, Seconds, Tensors, decode, encode
from split_model import EdgePart, LoraConfig, OptimiserConfig, PretrainedModel, ServerPart, adamw, initial_adapter, take_step
from storage import load_tokenizer

__all__ = ["Round", "WholeModel", "mean", "serve", "train"]

MAX_BYTES = 2**28
ROWS_AT_A_TIME = 20


class WholeModel:
    """Both parts in one process, and the optimiser of both; where they are cut changes nothing."""

    def __init__(self, folder: Path, lora: LoraConfig, learning_rate: float, seed: int) -> None:
        base, placed = PretrainedModel(folder), {"weight_dtype": torch.float32, "device": torch.device("cpu")}
        self.edge, self.server = EdgePart(base, 1, lora, **placed), ServerPart(base, 1, lora, **placed)  # type: ignore[arg-type]
        self._matrices = {**self.edge.matrices(), **self.server.matrices()}
        self._learning_rate = learning_rate
        self._optimiser = adamw(self._matrices.values(), OptimiserConfig(learning_rate=learning_rate))
        self._tokenizer, self._end_token = load_tokenizer(folder), base.config.end_token
        self.load_adapter({name: matrix.numpy() for name, matrix in initial_adapter(base.config, lora, seed).items()})

    def read(self, path: Path) -> Dataset:
        return Dataset.load(path, self._tokenizer, self._end_token, max_length=512)

    def learn(self, batch: Batch) -> float:
        """One step; the loss before it, in nats per labelled token."""
        loss = self._summed_loss(batch) / len(batch.labels)
        torch.autograd.backward(loss)
        take_step(self._optimiser, self._learning_rate)
        return loss.item()

    @torch.no_grad()
    def perplexity(self, data: Dataset) -> float:
        """Token-weighted."""
        summed, count = 0.0, 0
        for start in range(0, len(data.samples), ROWS_AT_A_TIME):
            batch = pack(data.samples[start : start + ROWS_AT_A_TIME])
            summed, count = summed + self._summed_loss(batch).item(), count + len(batch.labels)
        return math.exp(summed / count)

    def adapter(self) -> Tensors:
        """A copy."""
        return {name: matrix.detach().numpy().copy() for name, matrix in self._matrices.items()}

    def load_adapter(self, adapter: Tensors) -> None:
        for part in (self.edge, self.server):
            part.load_adapter({name: torch.from_numpy(adapter[name]) for name in part.matrices()})

    def _summed_loss(self, batch: Batch) -> torch.Tensor:
        arrays = (batch.tokens, batch.lengths, batch.label_counts, batch.labels)
        tokens, lengths, label_counts, labels = (torch.from_numpy(array).long() for array in arrays)
        return self.server.summed_loss(self.edge(tokens, lengths), lengths, label_counts, labels)


def mean(adapters: Sequence[Tensors]) -> Tensors:
    return {name: np.mean([adapter[name] for adapter in adapters], axis=0) for name in adapters[0]}


def serve(clients: int, told: Any) -> None:
    """The server's process, until its clients leave: says its port, then averages."""
    with Listener(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(clients) as pool:
        told.send(listener.address[1])
        ends = [listener.accept() for _ in range(clients)]
        while True:
            try:
                messages = list(pool.map(Connection.recv_bytes, ends))  # at once, as their links bring them
            except EOFError:
                return
            contributions = [decode(message, MAX_BYTES) for message in messages]
            adapter = mean([contribution.tensors for contribution in contributions])  # type: ignore[union-attr]
            answer = encode(EdgeAdapter(step=contributions[0].step, tensors=adapter))  # type: ignore[union-attr]
            list(pool.map(Connection.send_bytes, ends, [answer] * clients))


@dataclass(frozen=True)
class Round:
    """What a round took a client."""

    training: float
    """Seconds of all its steps."""
    exchange: float
    """Seconds from the last of them to the mean adapter."""
    bytes_up: int
    bytes_down: int


def train(model: WholeModel, batches: Iterator[Batch], rounds: int, steps: int, port: int) -> Iterator[Round]:
    """A client's part in so many rounds of so many steps, over whatever listens at ``port``."""
    with Client(("127.0.0.1", port)) as server:
        for number in range(1, rounds + 1):
            began = time.perf_counter()
            for _ in range(steps):
                model.learn(next(batches))
            trained = time.perf_counter()
            question = encode(
                AdapterWeights(step=number * steps, seconds=Seconds(edge_compute=trained - began), tensors=model.adapter())
            )
            server.send_bytes(question)
            answer = server.recv_bytes()
            model.load_adapter(decode(answer, MAX_BYTES).tensors)  # type: ignore[union-attr]
            yield Round(trained - began, time.perf_counter() - trained, len(question), len(answer))
