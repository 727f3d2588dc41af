"""A server that means harm, and a device that comes to it for its part of the model."""

import hashlib
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from conftest import make_model, run_in_thread
from device_parts import make_part
from folder_mutation import FolderMutator
from mutation import Mutator
from usual_settings import settings
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve

import edge_client.cli
from edge_client import EdgeClient
from protocol import (
    PIECE_BYTES,
    ActivationGradient,
    Activations,
    AdapterGradient,
    AskPart,
    AskPiece,
    EdgeAdapter,
    Failure,
    Hello,
    HiddenGradient,
    HiddenStates,
    Join,
    Message,
    Part,
    PartFile,
    Piece,
    Ping,
    Pong,
    RunSettings,
    Start,
    Welcome,
    decode,
    encode,
)
from split_model import PretrainedModel

PIECE = 5_000  # bytes
WIDTH, STEPS = 16, 3
SECONDS = 0.5  # after which a device that says nothing has been told nothing that it can answer
ENOUGH, SILENT = "that is enough", "this device says nothing"
REASONS = {ENOUGH: "believed", SILENT: "waits for a right answer"}

Say = Callable[[Message], bytes]


@dataclass(frozen=True)
class Offer:
    """What a server says of a part's files, and what is in them; by their SHA-256."""

    files: tuple[PartFile, ...]
    contents: Mapping[str, bytes]

    @classmethod
    def of(cls, contents: Mapping[str, bytes]) -> "Offer":
        files = tuple(PartFile(name=name, size=len(data), sha256=digest(data)) for name, data in contents.items())
        return cls(files, {digest(data): data for data in contents.values()})


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class HostileServer:
    """
    Answers until a device wants to join, which it is refused: it has believed everything.

    Args:
        offer: what is handed over.
        say: an answer as a frame, right or wrong.
        trains: it goes on for some steps of a device that keeps its labels, and refuses what follows.
    """

    def __init__(self, run: RunSettings, fingerprint: str, offer: Offer) -> None:
        self.offer, self.say = offer, encode
        self.trains = False
        self.asked_for: Counter[str] = Counter()
        """Questions, by their kind; bytes that were sent, as "bytes"."""
        self._welcome = Welcome(run="r", settings=run, fingerprint=fingerprint)
        self._of_training = replace(self._welcome, settings=replace(run, labels="device"))
        width, rank = WIDTH, run.lora_rank
        name = "base_model.model.transformer.h.0.attn.c_attn.lora_"
        shapes = {f"{name}A.weight": (rank, width), f"{name}B.weight": (3 * width, rank)}
        self._adapter = {key: np.zeros(shape, np.float32) for key, shape in shapes.items()}

    @contextmanager
    def listening(self) -> Iterator[str]:
        """Its address."""
        with socket.create_server(("127.0.0.1", 0)) as listener, serve(self._converse, sock=listener) as server:
            serving = run_in_thread(server.serve_forever)
            yield f"ws://127.0.0.1:{listener.getsockname()[1]}"
            server.shutdown()
            serving.result()

    def _converse(self, connection: ServerConnection) -> None:
        try:
            while True:
                try:
                    question = decode(connection.recv(SECONDS), 2**20)  # type: ignore[arg-type]
                except TimeoutError:
                    connection.send(encode(Failure(reason=SILENT)))
                    return
                answer = self._answer(question)
                frame = encode(answer) if isinstance(answer, Failure) else self.say(answer)
                self.asked_for[type(question).__name__] += 1
                self.asked_for["bytes"] += len(frame)
                connection.send(frame)
        except ConnectionClosed:
            pass

    def _answer(self, question: Message) -> Message:
        if isinstance(question, Ping):
            return Pong(index=question.index, software="0", run="r", clients=1, joined=0, step=0, edge_weights="float32")
        if isinstance(question, Hello):
            return self._of_training if self.trains else self._welcome
        if isinstance(question, AskPart):
            return Part(index=question.index, files=self.offer.files)
        if isinstance(question, AskPiece):
            content = self.offer.contents.get(question.sha256, b"")[question.offset :] or b"?" * PIECE
            return Piece(index=question.index, data=content[:PIECE])
        if isinstance(question, Join) and self.trains:
            return Start(step=0, total_steps=100, adapter=self._adapter)
        if isinstance(question, Activations):
            self._rows = question.values.shape
            return HiddenStates(step=question.step, values=np.ones((question.num_labelled, WIDTH), np.float32))
        if isinstance(question, HiddenGradient):
            nothing = np.zeros(self._rows, np.float32)
            return ActivationGradient(step=question.step, loss=1.0, labelled_tokens=1, values=nothing)
        if isinstance(question, AdapterGradient) and question.step < STEPS:
            return EdgeAdapter(step=question.step, tensors=self._adapter)
        return Failure(reason=ENOUGH)


class Ambush:
    """
    One device after the other comes to a server that hands over a part which is nearly right.

    Any exception that `splitlora-edge` would not turn into a sentence gets out.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, base, run = folder, folder / "base", settings(lora_dropout=0.1, epochs=None, steps=100)
        base.mkdir()
        make_model(base, n_layer=2, n_embd=WIDTH, n_head=2, n_positions=64)
        self._model = str(base)
        part = make_part(folder / "part", base, run, "int8")
        self.contents = {path.name: path.read_bytes() for path in sorted(part.iterdir())}
        self.server = HostileServer(run, PretrainedModel(base).fingerprint(), Offer.of(self.contents))
        self._data = folder / "data.txt"
        self._data.write_text("one||two\nthree||four\n")
        self._expected = edge_client.cli._errors_of_train()
        self.outcomes: Counter[str] = Counter()
        self.kinds: dict[str, Callable[[Mutator, FolderMutator], None]] = {
            "messages": self._messages,
            "manifest": self._manifest,
            "pieces": self._pieces,
            "contents": self._contents,
            "training": self._training,
        }

    def lay(self, url: str, seed: int, number: int) -> None:
        """Make a mutant, and let a device come."""
        folders = FolderMutator(seed, number)
        mutator = Mutator(seed * 1_000_003 + number)
        kind = folders.random.choice(list(self.kinds))
        self.server.offer, self.server.say = Offer.of(self.contents), encode
        self.server.trains = False
        self.kinds[kind](mutator, folders)
        self.outcomes[f"{kind}: {self.visit(url)}"] += 1

    def visit(self, url: str) -> str:
        """What becomes of a device that comes for the first time; with a model where it is to train, else for its part."""
        shutil.rmtree(state := self._folder / "state", ignore_errors=True)
        self.server.asked_for.clear()
        has = {"engine": "torch", "model": self._model} if self.server.trains else {}
        options: dict[str, Any] = {"data": self._data, "batch_size": 2, "name": "visitor", "state_dir": state, **has}
        try:
            with EdgeClient(url, give_up_after=0.01, **options) as client:
                client.start()
                for _ in client.train():
                    pass
        except self._expected as error:
            sentence, kind = str(error), type(error).__name__
        else:
            raise AssertionError("nobody has refused the device")
        assert sentence.isprintable(), sentence
        return next((outcome for reason, outcome in REASONS.items() if sentence.endswith(reason)), kind)

    def _messages(self, mutator: Mutator, folders: FolderMutator) -> None:
        number = folders.random.randrange(12)
        self.server.say = _at(number, mutator.nearly)

    def _training(self, mutator: Mutator, folders: FolderMutator) -> None:
        """Of what a device that keeps its labels is told while it trains."""
        self.server.trains = True
        self.server.say = _at(folders.random.randrange(2, 2 + 3 * STEPS), mutator.nearly)

    def _manifest(self, mutator: Mutator, folders: FolderMutator) -> None:
        draw, files = folders.random, list(self.server.offer.files)
        for _ in range(draw.choice((1, 1, 2, 5))):
            place, what = draw.randrange(len(files)), draw.randrange(5)
            file = files[place]
            if what == 0:
                files[place] = replace(file, size=draw.choice((1, file.size + 1, file.size - 1 or 1, 2**20, 2**32, 2**40)))
            elif what == 1:
                files[place] = replace(file, sha256=draw.choice((digest(b"other"), draw.choice(files).sha256)))
            elif what == 2 and len(files) > 1:
                del files[place]
            elif what == 3:
                files[place] = replace(file, name=draw.choice(("con", "x.onnx", "part", "Part.json", f"{place}")))
            else:
                files.append(replace(file, name=f"another-{len(files)}", size=file.size))
        self.server.say = lambda answer: encode(_with_files(answer, files)) if isinstance(answer, Part) else encode(answer)

    def _pieces(self, mutator: Mutator, folders: FolderMutator) -> None:
        spoil = folders.random.choice(
            (
                lambda data: data[:-1] or b"?",
                lambda data: data + b"?",
                lambda data: data * 2,
                lambda data: b"?" * PIECE_BYTES,
                lambda data: data[::-1],
                lambda data: data[: len(data) // 2 + 1],
                folders.mutated,
            )
        )
        always = folders.random.random() < 0.5
        first = folders.random.randrange(12)
        told = 0

        def say(answer: Message) -> bytes:
            nonlocal told
            told += isinstance(answer, Piece)
            if not isinstance(answer, Piece) or not (always or told == first):
                return encode(answer)
            if folders.random.random() < 0.1:
                return encode(replace(answer, index=answer.index + folders.random.choice((1, -1, 2**40))))
            return encode(replace(answer, data=spoil(answer.data)[:PIECE_BYTES] or b"?"))

        self.server.say = say

    def _contents(self, mutator: Mutator, folders: FolderMutator) -> None:
        name = folders.random.choice(list(self.contents))
        data = self.contents[name]
        change = {".onnx": folders.graph, ".json": folders.json, ".safetensors": folders.tensors}
        self.server.offer = Offer.of({**self.contents, name: change.get(Path(name).suffix, folders.mutated)(data) or b"?"})


def _at(number: int, change: Callable[[Message], bytes]) -> Say:
    """The n-th answer is another one."""
    answers = 0

    def say(answer: Message) -> bytes:
        nonlocal answers
        answers += 1
        return change(answer) if answers == number + 1 else encode(answer)

    return say


def _with_files(answer: Part, files: list[PartFile]) -> Any:
    """A `Part` that is not checked: it may be one that no honest server can make."""
    part = object.__new__(Part)
    object.__setattr__(part, "index", answer.index)
    object.__setattr__(part, "files", tuple(files))
    return part
