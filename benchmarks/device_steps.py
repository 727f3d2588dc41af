"""
A training step of GPT-2's shapes on one device: this project's beside that of transformers + PEFT. A part of device_check.py.

The contestants take steps on the same rows, of E2E's lengths, with the same weights and the same LoRA:

- transformers + PEFT: the whole model, as its users run it. See `Peer` for what is chosen in its favour.
- this project, all blocks: the same work, done as the server does it; no wire. This is the comparison of like with like, once
  more so with the residual stream in bfloat16, in which the peer's is.
- this project, the server's part: what a server does of a step, from the arrays that messages hold to the gradients that go
  back. It does less than the whole, for the devices do the rest: its tokens a second say how many devices a card serves, and
  multiplied by its share of the step's multiplications they compare with the others'.

Tokens are those of the texts: padding does not count. They take turns; a turn is a step that is not measured, in which the
allocator takes back what memory the others had, and some that are; the median of all turns counts. Whose step does not fit
takes it in 2, 4 or more parts, whose gradients add up.

Another race, with one shape, says what single choices of this project cost: sums in an order that is always the same, packed
rows in attention, the residual stream in float32, dropout's masks.

Before anything is timed, all compute the same gradients, or the case has failed. Weights are drawn by name where they are used,
so that a model of 1.5 billion parameters needs no file.
"""

import gc
import statistics
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Protocol, cast

import harness  # noqa: F401  # first: it finds the tests' modules
import numpy as np
import reference
import torch
from torch import Tensor
from torch.nn import functional as F

from edge_client.data import Batch, Sample, pack
from gpu_server.part_trainer import PartTrainer
from protocol import Activations, Array, RunSettings, Seconds
from split_model import (
    DTYPES,
    Adapter,
    LoraConfig,
    ModelConfig,
    OptimiserConfig,
    PretrainedModel,
    ServerPart,
    adamw,
    choose_device,
    choose_dtype,
    copied_to,
    gradient_norm,
    initial_adapter,
    packing,
    take_step,
)
from split_model.families import FAMILIES
from split_model.loss import rows_at_a_time
from storage import ModelError

__all__ = ["DoesNotFit", "Race", "doubts", "measure"]

SHAPES = {"GPT2-S": (12, 768, 12), "GPT2-M": (24, 1024, 16), "GPT2-XL": (48, 1600, 25)}
"""Blocks, width, heads. A quarter of the blocks are the devices'."""
ROWS = (8, 64, 512)
MODEL_OF_CHOICES = "GPT2-M"
TINY_SHAPES, FEW_ROWS = {"tiny": (4, 64, 4)}, (8, 24)
VOCABULARY, SMALL_VOCABULARY = 50257, 601
ROWS_A_CLIENT = 8
DECILES_OF_LENGTHS = (20, 36, 41, 45, 49, 53, 56, 61, 65, 72, 115)
"""Of the rows of E2E's train.txt, in GPT-2's tokens, with the ends of prompt and completion."""
SHARE_OF_LABELS = 0.466
"""Of a row's tokens, those of its completion and its end."""
LORA = LoraConfig(rank=8, alpha=32.0, targets=("c_attn",))
RATE = 1e-30
"""With it an optimiser's step costs what every step costs, and moves nothing: all steps compute the same."""

TURNS, STEPS_A_TURN = 3, 3
PARTS = (1, 2, 4, 8, 16, 32, 64)
SECONDS_TO_SPARE = 15.0
LARGEST_DIFFERENCES = {"float32": 1e-3, "bfloat16": 5e-2}
"""Of a gradient to the peer's, relative. In bfloat16 both round in every block, and neither is right."""


@contextmanager
def in_any_order() -> Iterator[None]:
    """Sums may be taken in whatever order is fastest, torch's default; the parts ask for one that is always the same."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("default")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


@contextmanager
def in_grids() -> Iterator[None]:
    """Attention pads sequences of like lengths to grids, as where torch has no kernel for packed rows."""
    before = packing._varlen_attn
    packing._varlen_attn = lambda device: None  # type: ignore[assignment]
    try:
        yield
    finally:
        packing._varlen_attn = before


class DoesNotFit(Exception):
    """The card has too little memory."""


class MadeUpModel:
    """In place of a `PretrainedModel`: a shape, and weights that are drawn on ``device`` when they are asked for."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.config = config
        self.tensors = {name: _MadeUpTensor(name, shape, dtype, device) for name, shape in config.tensor_shapes.items()}

    def not_finite(self, what: str) -> ModelError:
        return ModelError(f"the made-up model gives {what} that are not finite numbers")


@dataclass(frozen=True)
class _MadeUpTensor:
    """In place of a `StoredTensor`."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def view(self) -> Tensor:
        """The same values every time."""
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(self.name.encode()))
        values = 0.02 * torch.randn(self.shape, generator=generator, device=self.device)
        _, module, parameter = ("." + self.name).rsplit(".", 2)
        is_scale_of_norm = module.startswith("ln_") and parameter == "weight"
        return (values + is_scale_of_norm).to(self.dtype)


def drawn_rows(count: int, vocabulary_size: int) -> list[Sample]:
    """Of E2E's lengths, with tokens that mean nothing."""
    rng = np.random.default_rng(count)
    quantiles = np.linspace(0, 1, len(DECILES_OF_LENGTHS))
    return [
        Sample(rng.integers(0, vocabulary_size, length, dtype=np.int32), max(1, round(SHARE_OF_LABELS * length)))
        for length in np.interp(rng.random(count), quantiles, DECILES_OF_LENGTHS).round().astype(int)
    ]


class Contestant(Protocol):
    """Who takes training steps."""

    name: str

    def prepare(self, samples: list[Sample], parts: int) -> None:
        """Have at hand, in the CPU's memory, all that a step on these takes, in so many parts."""

    def step(self) -> float:
        """One step, the optimiser's included; its loss in nats a label."""

    def gradient_difference(self, first: "Peer | AllBlocks") -> float:
        """How far this one's gradient for what both have prepared is from the first one's, relative."""

    def share(self) -> float:
        """Of the step's multiplications, those that this one does."""

    def clear(self) -> None:
        """Forget what was prepared, and a step that broke off."""


class Peer:
    """
    The whole model in transformers, its LoRA by PEFT: the model in ``dtype``, the adapter in float32 as PEFT has it, SDPA, rows
    padded to the longest of their part, transformers' own loss. In its favour: there is no mask, since causal attention needs
    none for padding at the end, so SDPA may take its fastest kernel; no keys and values are kept; AdamW is one kernel; parts
    are made of rows of about the same length; everything is padded before the clock runs; and sums may be in any order.
    """

    name = "transformers + PEFT"

    def __init__(self, model: MadeUpModel, adapter: Adapter, dtype: torch.dtype, device: torch.device) -> None:
        import peft
        import transformers

        shape = model.config
        config = transformers.GPT2Config(
            n_layer=shape.num_layers,
            n_embd=shape.width,
            n_head=shape.num_heads,
            n_positions=shape.num_positions,
            vocab_size=shape.vocabulary_size,
            bos_token_id=shape.end_token,
            eos_token_id=shape.end_token,
            use_cache=False,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        )
        with device:
            base = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        with torch.no_grad():
            for name, parameter in base.named_parameters():
                parameter.copy_(model.tensors[name.removeprefix(shape.names.prefix)].view())
        lora = peft.LoraConfig(
            r=LORA.rank,
            lora_alpha=LORA.alpha,
            target_modules=list(LORA.targets),
            fan_in_fan_out=True,
            task_type="CAUSAL_LM",
        )
        self._model: Any = peft.get_peft_model(base, lora).train()
        self._device = device
        learnt = {name: each for name, each in self._model.named_parameters() if each.requires_grad}
        self.matrices = {name.replace(".default", ""): each for name, each in learnt.items()}
        with torch.no_grad():
            for name, matrix in self.matrices.items():
                matrix.copy_(adapter[name])
        self._optimiser = torch.optim.AdamW(self.matrices.values(), lr=RATE, fused=device.type == "cuda")
        self.parts: list[tuple[Tensor, Tensor]] = []
        self._num_labels = 0

    def prepare(self, samples: list[Sample], parts: int) -> None:
        self._num_labels = sum(sample.num_labels for sample in samples)
        in_order = sorted(samples, key=lambda sample: len(sample.tokens))
        bounds = np.linspace(0, len(in_order), parts + 1).round().astype(int)
        self.parts = [_padded(in_order[begin:end]) for begin, end in pairwise(bounds)]

    def step(self) -> float:
        with in_any_order():
            loss = self._accumulate()
            self._optimiser.step()
            self._optimiser.zero_grad()
            return loss

    def gradients(self) -> Adapter:
        """Of one step, float32."""
        with in_any_order():
            self._accumulate()
        gradients = {name: cast(Tensor, matrix.grad).float().cpu() for name, matrix in self.matrices.items()}
        self._optimiser.zero_grad()
        return gradients

    def gradient_difference(self, first: "Peer | AllBlocks") -> float:
        return 0.0

    def share(self) -> float:
        return 1.0

    def clear(self) -> None:
        self.parts = []
        self._optimiser.zero_grad()

    @torch.no_grad()
    def activations(self, samples: Sequence[Sample], cut: int) -> Array:
        """What the first ``cut`` blocks make of the samples, (N, d) packed, float32."""
        found: list[Array] = []

        def keep(_: object, inputs: tuple[Tensor, ...]) -> None:
            found.append(inputs[0].float().cpu().numpy())

        transformer = self._model.base_model.model.transformer
        ids, _ = _padded(samples)
        with transformer.h[cut].register_forward_pre_hook(keep):
            transformer(input_ids=ids.to(self._device))
        return np.concatenate([rows[: len(sample.tokens) - 1] for rows, sample in zip(found[0], samples, strict=True)])

    def _accumulate(self) -> float:
        losses = []
        for ids, labels in self.parts:
            there = {"input_ids": ids.to(self._device), "labels": labels.to(self._device)}
            loss: Tensor = self._model(**there, num_items_in_batch=self._num_labels).loss
            torch.autograd.backward(loss)
            losses.append(loss.detach())
        return float(torch.stack(losses).sum())


def _padded(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """(B, T) ids and labels."""
    return reference.pad([(sample.tokens.tolist(), len(sample.tokens) - sample.num_labels) for sample in samples])


class AllBlocks:
    """
    The server's part, with all blocks in it. What is not timed of a run is the wire; the embedding is looked up here.

    Args:
        within: a context in which it takes its steps.
        dropout: of LoRA. Whoever has some computes something else than the others.
        in_bfloat16: what flows through the blocks as well.
    """

    def __init__(
        self,
        model: MadeUpModel,
        adapter: Adapter,
        dtype: torch.dtype,
        device: torch.device,
        *,
        name: str = "this project, all blocks",
        within: Callable[[], AbstractContextManager[None]] = nullcontext,
        dropout: float = 0.0,
        in_bfloat16: bool = False,
    ) -> None:
        self.name, self._within, self._dropout = name, within, dropout
        lora = replace(LORA, dropout=dropout)
        self._part = ServerPart(
            cast(PretrainedModel, model), 0, lora, weight_dtype=dtype, device=device, in_bfloat16=in_bfloat16
        )
        self._part.load_adapter(adapter)
        self._part.train()
        self._positions = model.tensors["wpe.weight"].view()
        self._optimiser = adamw(self._part.matrices().values(), OptimiserConfig(learning_rate=RATE, weight_decay=0.0))
        self._parts: list[tuple[Tensor, Tensor, Batch]] = []
        self._num_labels = 0

    def prepare(self, samples: list[Sample], parts: int) -> None:
        self._num_labels, self._parts = sum(sample.num_labels for sample in samples), []
        for number in range(parts):
            batch = pack(samples[number::parts])
            positions = np.concatenate([np.arange(length, dtype=np.int32) for length in batch.lengths])
            rows = torch.from_numpy(np.stack([batch.tokens, positions])).long()
            self._parts.append((rows, torch.from_numpy(batch.labels).long(), batch))

    def step(self) -> float:
        with self._within():
            loss = self._accumulate()
            gradient_norm(self._part.matrices().values())
            take_step(self._optimiser, RATE)
            return loss

    def gradients(self) -> Adapter:
        """Of one step."""
        with self._within():
            self._accumulate()
        found = self._part.gradients()
        self._part.clear_gradients()
        return found

    def gradient_difference(self, first: "Peer | AllBlocks") -> float:
        return 0.0 if self._dropout else reference.relative_difference(self.gradients(), first.gradients())

    def share(self) -> float:
        return 1.0

    def clear(self) -> None:
        self._parts = []
        self._part.clear_gradients()

    def _accumulate(self) -> float:
        losses = []
        for rows, labels, batch in self._parts:
            tokens, positions = copied_to(self._part.device, rows)
            embedded = F.embedding(tokens, self._part.head) + F.embedding(positions, self._positions)
            activations, labels = embedded.to(self._part.dtype), copied_to(self._part.device, labels)
            self._part.seed_dropout(range(len(batch.lengths)))
            loss = self._part.losses(activations, batch.lengths, batch.label_counts, labels).sum()
            torch.autograd.backward(loss)
            losses.append(loss.detach())
        self._part.divide_gradients(self._num_labels)
        return float(torch.stack(losses).sum()) / self._num_labels


class Server:
    """
    What a server computes of a step. Activations come from the peer.

    Args:
        cut: how many blocks are the devices'.
    """

    name = "this project, the server's part"

    def __init__(
        self, model: MadeUpModel, adapter: Adapter, dtype: torch.dtype, device: torch.device, *, cut: int, peer: Peer
    ) -> None:
        self._model, self._adapter, self._dtype, self._device = model, adapter, dtype, device
        self._cut, self._peer = cut, peer
        self._questions: list[dict[str, Activations]] = []
        self._trainer: PartTrainer | None = self._make_trainer(1)
        self._parts_of_trainer = 1
        self._num_rows = self._num_labels = 0

    def prepare(self, samples: list[Sample], parts: int) -> None:
        self._num_rows = sum(len(sample.tokens) - 1 for sample in samples)
        self._num_labels = sum(sample.num_labels for sample in samples)
        clients = [samples[start : start + ROWS_A_CLIENT] for start in range(0, len(samples), ROWS_A_CLIENT)]
        self._questions = [
            {f"client-{number}": self._question(of[part::parts], part) for number, of in enumerate(clients)}
            for part in range(parts)
        ]
        if self._trainer is None or parts != self._parts_of_trainer:
            self._trainer = None  # before there is another one
            self._trainer, self._parts_of_trainer = self._make_trainer(parts), parts

    def step(self) -> float:
        return self._train()[0]

    def gradient_difference(self, first: Peer | AllBlocks) -> float:
        """Of its norm: the trainer keeps the gradient itself to itself."""
        _, found = self._train()
        of_part = [
            gradient
            for name, gradient in first.gradients().items()
            if int(name.partition(".h.")[2].partition(".")[0]) >= self._cut
        ]
        expected = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(each) for each in of_part])))
        return abs(found - expected) / expected

    def share(self) -> float:
        """Attention's products of queries and keys, which are few in rows of this length, are not counted."""
        shape = self._model.config
        of_block, of_head = 12 * shape.width**2 * self._num_rows, shape.vocabulary_size * shape.width * self._num_labels
        return ((shape.num_layers - self._cut) * of_block + of_head) / (shape.num_layers * of_block + of_head)

    def clear(self) -> None:
        self._questions, self._trainer = [], None

    def _train(self) -> tuple[float, float]:
        """Loss, and the gradient's norm."""
        assert self._trainer is not None
        for number, questions in enumerate(self._questions):
            trained = self._trainer.train(1, 1, number, questions, {})
        return trained.loss, trained.gradient_norm

    def _question(self, samples: Sequence[Sample], part: int) -> Activations:
        batch, width = pack(samples), self._model.config.width
        return Activations(
            step=1,
            micro_batch=part,
            seconds=Seconds(),
            lengths=batch.lengths,
            label_counts=batch.label_counts,
            labels=batch.labels,
            values=self._peer.activations(samples, self._cut) if samples else np.zeros((0, width), np.float32),
        )

    def _make_trainer(self, parts: int) -> PartTrainer:
        settings = RunSettings(
            cut_layer=self._cut,
            lora_rank=LORA.rank,
            lora_alpha=LORA.alpha,
            lora_dropout=0.0,
            lora_targets=LORA.targets,
            clients=1,
            steps=1,
            micro_batches=parts,
            lr=RATE,
            lr_schedule="constant",
            warmup_steps=0,
            weight_decay=0.0,
            seed=0,
            precision="float32",
        )
        return PartTrainer(
            cast(PretrainedModel, self._model), settings, self._adapter, weight_dtype=self._dtype, device=self._device
        )


@dataclass
class _Entry:
    """A contestant in a race, and its figures for some rows."""

    contestant: Contestant
    own_bytes: int
    """Of the card's memory, between steps."""
    parts: int = 0
    difference: float = 0.0
    loss: float = 0.0
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    """Of the card's memory, within a step."""


class _Clock:
    """Time and memory of a device that computes while the program goes on."""

    def __init__(self, device: torch.device) -> None:
        self._is_card = device.type == "cuda"

    def now(self) -> float:
        """Seconds, when all that was asked of the device is done."""
        if self._is_card:
            torch.cuda.synchronize()
        return time.perf_counter()

    def allocated(self) -> int:
        """Bytes; 0 on the CPU, as of `peak`."""
        return torch.cuda.memory_allocated() if self._is_card else 0

    def peak(self) -> int:
        """Most bytes since the last time it was asked for."""
        if not self._is_card:
            return 0
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak

    def give_back(self) -> None:
        """What nobody holds, to whoever asks the card for memory."""
        gc.collect()
        if self._is_card:
            torch.cuda.empty_cache()


LineUp = Callable[[MadeUpModel, Adapter, torch.dtype, torch.device], Iterator[Contestant]]
"""Makes the contestants of a race one after the other; all are compared with the first."""


def against_the_peer(model: MadeUpModel, adapter: Adapter, dtype: torch.dtype, device: torch.device) -> Iterator[Contestant]:
    yield (peer := Peer(model, adapter, dtype, device))
    yield AllBlocks(model, adapter, dtype, device)
    if dtype == torch.bfloat16:
        yield AllBlocks(model, adapter, dtype, device, name="this project, all blocks, --residual bfloat16", in_bfloat16=True)
    yield Server(model, adapter, dtype, device, cut=max(1, model.config.num_layers // 4), peer=peer)


def choices(model: MadeUpModel, adapter: Adapter, dtype: torch.dtype, device: torch.device) -> Iterator[Contestant]:
    """What single choices of the parts cost."""
    yield AllBlocks(model, adapter, dtype, device, name="as it is")
    yield AllBlocks(model, adapter, dtype, device, name="sums in any order", within=in_any_order)
    yield AllBlocks(model, adapter, dtype, device, name="attention in grids", within=in_grids)
    if dtype == torch.bfloat16:
        yield AllBlocks(model, adapter, dtype, device, name="--residual bfloat16", in_bfloat16=True)
    yield AllBlocks(model, adapter, dtype, device, name="--lora-dropout 0.1", dropout=0.1)


class Race:
    """All contestants of a line-up, with weights of one shape."""

    def __init__(
        self, shape: tuple[int, int, int], vocabulary_size: int, dtype: torch.dtype, device: torch.device, line_up: LineUp
    ) -> None:
        blocks, width, heads = shape
        self.config = ModelConfig(
            family=FAMILIES["gpt2"],
            num_layers=blocks,
            width=width,
            num_heads=heads,
            num_key_value_heads=heads,
            head_width=width // heads,
            inner_width=4 * width,
            num_positions=1024,
            vocabulary_size=vocabulary_size,
            norm_epsilon=1e-5,
            activation="gelu_new",
            tied_head=True,
            end_token=0,
        )
        rows_at_a_time.cache_clear()  # as in a process that has just begun
        model, generator = MadeUpModel(self.config, dtype, device), torch.Generator().manual_seed(1)
        adapter = {  # B of a new adapter is zero, and then A has no gradient
            name: 0.02 * torch.randn(matrix.shape, generator=generator)
            for name, matrix in initial_adapter(self.config, LORA, 0).items()
        }
        self._clock, self._entries = _Clock(device), list[_Entry]()
        before = self._clock.allocated()
        for contestant in line_up(model, adapter, dtype, device):
            self._entries.append(_Entry(contestant, self._clock.allocated() - before))
            before = self._clock.allocated()

    @property
    def contestants(self) -> list[Contestant]:
        return [entry.contestant for entry in self._entries]

    def run(self, num_rows: int, seconds: float) -> dict[str, Any]:
        """
        The figures of a step with so many rows.

        Args:
            seconds: after which there is no further turn.

        Raises:
            DoesNotFit: for a contestant, in however many parts.
        """
        began, samples = time.monotonic(), drawn_rows(num_rows, self.config.vocabulary_size)
        for entry in self._entries:
            entry.seconds, entry.peak_bytes = [], 0
            self._find_parts(entry, samples)
        first = cast(Peer | AllBlocks, self._entries[0].contestant)
        for entry in self._entries:
            entry.difference = entry.contestant.gradient_difference(first)
        for turn in range(TURNS):
            if turn and time.monotonic() - began > seconds:
                break
            for entry in self._entries:
                self._take_turn(entry)
        num_tokens = sum(len(sample.tokens) - 1 for sample in samples)
        return {
            "rows": num_rows,
            "tokens": num_tokens,
            "labels": sum(sample.num_labels for sample in samples),
            "contestants": {entry.contestant.name: self._figures(entry, num_tokens) for entry in self._entries},
        }

    def _find_parts(self, entry: _Entry, samples: list[Sample]) -> None:
        """As few as fit; the first step is taken with them."""
        for parts in filter(len(samples).__ge__, PARTS):
            try:
                entry.contestant.prepare(samples, parts)
                entry.loss, entry.parts = entry.contestant.step(), parts
            except torch.cuda.OutOfMemoryError:
                entry.parts = 0
            # Not in the except clause: while it lasts, the error holds on to everything that the step has allocated.
            if entry.parts:
                return
            entry.contestant.clear()
            self._clock.give_back()
        raise DoesNotFit(f"{entry.contestant.name} does not fit into the card's memory, in however many parts")

    def _take_turn(self, entry: _Entry) -> None:
        of_others = self._clock.allocated() - entry.own_bytes
        entry.contestant.step()
        self._clock.peak()
        for _ in range(STEPS_A_TURN):
            began = self._clock.now()
            entry.contestant.step()
            entry.seconds.append(self._clock.now() - began)
        entry.peak_bytes = max(entry.peak_bytes, self._clock.peak() - of_others)

    @staticmethod
    def _figures(entry: _Entry, num_tokens: int) -> dict[str, Any]:
        return {
            "tokens_per_second": num_tokens / statistics.median(entry.seconds),
            "seconds": statistics.median(entry.seconds),
            "seconds_of_all": [min(entry.seconds), max(entry.seconds)],
            "peak_bytes": entry.peak_bytes,
            "parts": entry.parts,
            "share": entry.contestant.share(),
            "loss": entry.loss,
            "gradient_difference": entry.difference,
        }


def measure(device_name: str, seconds: float, note: Callable[..., None]) -> str:
    """
    Run all races; each case is noted when it is done.

    Args:
        device_name: "cuda", or "cpu" for a shape that says nothing of speed.
        seconds: after which no case is begun.
        note: takes figures by name.

    Returns:
        What is wrong; empty if nothing is.
    """
    ends, device = time.monotonic() + seconds - SECONDS_TO_SPARE, choose_device(device_name)
    is_card = device.type == "cuda"
    dtype = choose_dtype("auto", device)[0] if is_card else "float32"
    shapes, all_rows = (SHAPES, ROWS) if is_card else (TINY_SHAPES, FEW_ROWS)
    vocabulary_size = VOCABULARY if is_card else SMALL_VOCABULARY
    cases: list[dict[str, Any]] = []
    left_out: list[str] = []
    wrong: list[str] = []
    note(dtype=dtype, cases=cases, left_out=left_out)
    of_choices = (MODEL_OF_CHOICES if is_card else next(iter(shapes)), choices, all_rows[1:2])
    race: Race | None
    for name, line_up, numbers in (of_choices, *((name, against_the_peer, all_rows) for name in shapes)):
        race = None  # and the last one's memory is free
        for num_rows in numbers:
            case = f"{name}, {num_rows} rows"
            if time.monotonic() > ends:
                left_out.append(f"{case}: no time was left")
                continue
            try:
                race = race or Race(shapes[name], vocabulary_size, DTYPES[dtype], device, line_up)
                cases.append({"model": name, "race": line_up.__name__, **race.run(num_rows, ends - time.monotonic())})
            except (DoesNotFit, torch.cuda.OutOfMemoryError) as error:
                left_out.append(f"{case}: {str(error).partition('. ')[0]}")
            else:
                wrong += [f"{case}: {doubt}" for doubt in doubts(cases[-1], LARGEST_DIFFERENCES[dtype])]
                speeds = (f"{who} {of['tokens_per_second']:,.0f}" for who, of in cases[-1]["contestants"].items())
                print(f"  {case}, tokens/s: {'; '.join(speeds)}", flush=True)
            note(cases=cases, left_out=left_out)
            _Clock(device).give_back()
    return "; ".join(wrong if cases else left_out)


def doubts(case: dict[str, Any], largest: float) -> list[str]:
    """By whom the same step was not computed."""
    return [
        f"the gradient of {name} is {of['gradient_difference']:.1e} from the first one's, more than {largest:.0e}"
        for name, of in case["contestants"].items()
        if not of["gradient_difference"] <= largest
    ]
