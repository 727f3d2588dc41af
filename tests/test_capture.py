"""
What crosses the wire of a run, byte by byte: where devices keep their labels, no text, no token ids, no labels and no logits.

The same search finds the labels in a run whose server has them, in every payload that carries any; so it can find them.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from conftest import run_split
from protocol_samples import decoded, inflate
from websockets.sync.client import ClientConnection

from protocol import Array
from split_model import PretrainedModel

WINDOW = 5
"""Ids in succession that are looked for: fewer could be there by chance, more would miss what is cut in pieces."""


@dataclass
class Payload:
    """One message as it was sent: its kind, all that it says as bytes, and its tensors in the order of their elements."""

    kind: str
    contents: list[bytes] = field(default_factory=list)
    floats: list[Array] = field(default_factory=list)

    @classmethod
    def of(cls, frame: bytes) -> "Payload":
        packed = inflate(frame)
        _, kind, fields = msgpack.unpackb(packed)
        payload = cls(kind, [packed])
        for extension in _extensions(fields):
            payload._add(extension)
        return payload

    def _add(self, extension: msgpack.ExtType) -> None:
        if extension.code == 2:
            if extension.data and msgpack.unpackb(extension.data)[0] != "delta":
                self._add_floats(decoded(extension))
            return
        dtype, shape, raw = msgpack.unpackb(extension.data)
        size = np.dtype(dtype).itemsize
        plain = np.frombuffer(raw, np.uint8).reshape(size, -1).T.tobytes()  # PROTOCOL.md, Tensors
        self.contents.append(plain)
        if dtype.startswith("float"):
            self._add_floats(np.frombuffer(plain, dtype).reshape(shape))

    def _add_floats(self, values: Array) -> None:
        self.floats.append(values)
        # Ids could hide in floats, too, whatever their type.
        self.contents += [values.astype(dtype).tobytes() for dtype in ("<f4", "<f8", "<i4")]


def _extensions(value: Any) -> Iterator[msgpack.ExtType]:
    if isinstance(value, msgpack.ExtType):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _extensions(item)


def written(ids: Sequence[int]) -> set[bytes]:
    """A few ids in succession, in every way in which a program would write them."""
    types = [f"{order}{kind}" for order in "<>" for kind in ("u2", "i4", "i8", "f4", "f8")]
    in_msgpack = b"".join(msgpack.packb(each) for each in ids)
    return {np.array(ids).astype(dtype).tobytes() for dtype in types} | {in_msgpack, " ".join(map(str, ids)).encode()}


def windows(ids: Sequence[int]) -> set[bytes]:
    return set().union(*(written(ids[start : start + WINDOW]) for start in range(len(ids) - WINDOW + 1)))


def kinds_with(payloads: list[Payload], needles: set[bytes]) -> set[str]:
    return {p.kind for p in payloads if any(needle in content for content in p.contents for needle in needles)}


@dataclass
class Capture:
    """A run, and all that its devices have sent and got."""

    payloads: list[Payload]
    labels: set[bytes]
    """Windows of the tokens to predict, as bytes."""
    prompts: set[bytes]
    texts: set[bytes]
    head: Array

    def kinds(self, needles: set[bytes]) -> set[str]:
        """The kinds of messages in which one of them occurs."""
        return kinds_with(self.payloads, needles)

    def logits(self) -> set[bytes]:
        """Of the hidden states that the devices got, as far as they are exact: pieces of the logits and the probabilities."""
        found = set()
        for payload in self.payloads:
            if payload.kind in ("HiddenStates", "EvaluationStates") and payload.floats[0].size:
                logits = torch.from_numpy(payload.floats[0][:4].astype(np.float32)) @ torch.from_numpy(self.head).T
                for values in (logits, logits.softmax(-1), logits.log_softmax(-1)):
                    # The highest bytes of each number: their last bits depend on the order of a sum.
                    found |= {row.numpy()[:WINDOW].astype("<f4").view("<u2")[1::2].tobytes() for row in values}
        return found


@pytest.fixture
def capture(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Capture]:
    frames: list[bytes] = []
    send, receive = ClientConnection.send, ClientConnection.recv

    def noted_send(self: ClientConnection, data: Any, *arguments: Any) -> None:
        frames.append(data)
        send(self, data, *arguments)

    def noted_receive(self: ClientConnection, *arguments: Any) -> Any:
        frames.append(receive(self, *arguments))
        return frames[-1]

    monkeypatch.setattr(ClientConnection, "send", noted_send)
    monkeypatch.setattr(ClientConnection, "recv", noted_receive)

    def run(**options: Any) -> Capture:
        frames.clear()
        model = PretrainedModel(tiny_model)
        pairs = [
            {
                "prompt": f"name : The Wrestlers {i} | food : French",
                "completion": f"It serves good food by {i * 7} rivers, at noon and at night",
            }
            for i in range(8)
        ]
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        clients = {
            f"client-{i}": {"data": path, "eval_data": path, "batch_size": 4, "state_dir": tmp_path / f"state-{i}"}
            for i in range(2)
        }
        server = {"model": str(tiny_model), "run_dir": str(tmp_path / "run"), "cut_layer": 2, "steps": 3, "lr": 2e-3}
        run_split({**server, **options}, clients)
        tokenizer = model.tokenizer()
        ids = {name: [tokenizer.encode(pair[name]).ids for pair in pairs] for name in ("prompt", "completion")}
        return Capture(
            payloads=[Payload.of(frame) for frame in frames],
            labels=set().union(*(windows(each[1:]) for each in ids["completion"])),  # the first has a space before it
            prompts=set().union(*map(windows, ids["prompt"])),
            texts={
                text.encode()[start : start + 12] for pair in pairs for text in pair.values() for start in range(len(text) - 12)
            },
            head=model.tensors[model.config.head_name].view().float().numpy(),
        )

    return run


@pytest.mark.parametrize("codec", ["float32", "int8", "int4", "delta"])
def test_where_devices_keep_their_labels_no_id_and_no_text_is_sent(capture: Callable[..., Capture], codec: str) -> None:
    seen = capture(labels="device", codec=codec)
    assert {"Activations", "HiddenStates", "HiddenGradient", "ActivationGradient", "EvaluationStates"} <= seen.kinds({b""})
    assert seen.kinds(seen.labels | seen.prompts) == set()
    assert seen.kinds(seen.texts) == set()
    assert "EvaluationLoss" not in seen.kinds({b""})


def test_where_devices_keep_their_labels_no_logit_is_sent(capture: Callable[..., Capture]) -> None:
    seen = capture(labels="device")
    assert len(seen.logits()) > 20
    high = [
        Payload(p.kind, [values.astype("<f4").view("<u2")[:, 1::2].tobytes() for values in p.floats]) for p in seen.payloads
    ]
    assert kinds_with(high, seen.logits()) == set()
    planted = next(payload for payload in seen.payloads if payload.kind == "HiddenStates").floats[0][:4] @ seen.head.T
    assert kinds_with([Payload("planted", [planted.astype("<f4").view("<u2")[:, 1::2].tobytes()])], seen.logits())
    widths = {values.shape[1] for payload in seen.payloads for values in payload.floats}
    assert len(seen.head) not in widths


def test_rows_without_a_label_are_sent_like_all_others_where_that_is_hidden(capture: Callable[..., Capture]) -> None:
    seen = capture(labels="device", label_rows="hidden", gradient_noise=0.1, gradient_clip=1.0)
    assert seen.kinds(seen.labels | seen.prompts | seen.texts) == set()
    sizes: dict[str, set[int]] = {"Activations": set(), "HiddenStates": set(), "HiddenGradient": set()}
    for payload in seen.payloads:
        if payload.kind in sizes:
            sizes[payload.kind] |= {len(values) for values in payload.floats}
            assert payload.kind != "HiddenGradient" or np.linalg.norm(payload.floats[0], axis=1).min() > 0
    assert sizes["Activations"] == sizes["HiddenStates"] == sizes["HiddenGradient"]


def test_the_same_search_finds_the_labels_that_a_server_is_sent(capture: Callable[..., Capture]) -> None:
    seen = capture(labels="server")
    assert seen.kinds(seen.labels) == {"Activations", "Evaluation"}
    assert seen.kinds(seen.prompts) == set()
    carriers = [payload for payload in seen.payloads if payload.kind in ("Activations", "Evaluation")]
    assert all(any(needle in content for content in p.contents for needle in seen.labels) for p in carriers if len(p.floats[0]))
