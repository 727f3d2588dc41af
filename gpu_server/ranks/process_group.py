"""The ranks of one run, connected by torch.distributed."""

import atexit
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous

from terminal import plain

from ..errors import ConfigError, RankLost, ServerError
from .agreement import without_backend
from .packing import NotAMessage, pack, unpack
from .place import LEADER, Place

__all__ = ["ProcessGroup"]

logger = logging.getLogger("gpu_server")

TO_JOIN = timedelta(minutes=30)
"""Also the most that a rank may come later than another to a sum: they begin a micro-batch together."""
FOREVER = timedelta(days=3650)
"""A rank waits for what is to be done next as long as devices may be away. Whether the others live, the pulse says."""
SECONDS_BETWEEN_PULSES = 0.5
MOST_SECONDS_SILENT = 60
"""After more a rank is taken for lost whose connection still seems to be there."""
SECONDS_TO_LEARN_WHO = 2.0
SECONDS_TO_END = 10.0
ANOTHER = "another rank"

# What travels under which tag: a rank's pulse comes beside whatever else it has to tell.
LENGTHS, MESSAGES, PULSES, FAREWELLS, NOTHING = range(5)


class ProcessGroup:
    """
    The `Ranks` of one run, of which this process is one. All exchange messages and pulses with the leader by gloo, and
    gradients with each other: by gloo, too, and from `use_nccl` on by NCCL.

    A rank that is gone is noticed at once where its process has ended, within `MOST_SECONDS_SILENT` where its machine has:
    then whatever waits for it fails.
    """

    def __init__(self, place: Place, ended: Callable[[RankLost | None], None]) -> None:
        """
        Connect to all others; each has to come.

        Args:
            ended: is called on some thread when there is nothing more to do: with the rank that is gone, or with None when the
                leader sends this one home.

        Raises:
            ConfigError: this torch has no gloo.
            ServerError: the others cannot be reached.
        """
        self.place, self._ended = place, ended
        self.bytes_sent = 0
        """By this process: messages, and its numbers and gradients that were added up."""
        self._lost: RankLost | None = None
        self._is_lost, self._is_closing, self._lock = threading.Event(), threading.Event(), threading.Lock()
        self._farewells: list[Any] = []
        if not (dist.is_available() and dist.is_gloo_available()):
            raise ConfigError(without_backend("gloo"))
        try:
            with _ended_by_signals():
                _join(place)
        except (RuntimeError, ValueError) as error:
            raise ServerError(f"rank {place.rank} cannot meet the others: {_first_line(error)}") from None
        self.group = dist.group.WORLD
        """In which gradients are added up, and a part's frozen weights are kept together, where they are sharded."""
        watches = [self._answer_pulse] if place.leads else [self._send_pulse, self._expect_farewell]
        self._watching = [
            threading.Thread(target=watch, args=(rank,), name=f"rank-{rank}", daemon=True)
            for watch in watches
            for rank in self.partners
        ]
        self._seconds_silent = dict.fromkeys(self.partners, 0)
        atexit.register(_leave)
        for thread in (*self._watching, threading.Thread(target=self._count_silence, name="silence", daemon=True)):
            thread.start()

    def use_nccl(self) -> None:
        """Among devices that each rank has of its own. All ranks call it, after `torch.cuda.set_device`."""
        # What NCCL waits for when a rank is gone is given up, and this process is not killed for it: the leader has to save.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")
        self.group = dist.new_group(backend="nccl", timeout=TO_JOIN)

    @property
    def num_ranks(self) -> int:
        return self.place.num_ranks

    @property
    def partners(self) -> list[int]:
        """With which ranks this one exchanges messages: the leader with all others, these with the leader."""
        return [rank for rank in range(self.place.num_ranks) if rank != LEADER] if self.place.leads else [LEADER]

    # Messages

    def send(self, messages: Mapping[int, Any]) -> None:
        """As `sending`, and nothing meanwhile."""
        with self.sending(messages):
            pass

    @contextmanager
    def sending(self, messages: Mapping[int, Any]) -> Iterator[None]:
        """
        One to each of these ranks, while something else is done; see `pack` for what it may be. In the end all have theirs,
        even if that fails: what is sent must not be dropped on its way.

        Raises:
            RankLost: one has not.
        """
        sent = []
        for rank, message in messages.items():
            data = torch.from_numpy(pack(message))
            self.bytes_sent += len(data)
            with self._talking_to(rank):
                sent.append((rank, dist.isend(torch.tensor([len(data)]), rank, tag=LENGTHS)))
                sent.append((rank, dist.isend(data, rank, tag=MESSAGES)))
        try:
            yield
        finally:
            for rank, work in sent:
                with self._talking_to(rank):
                    _wait(work)

    def receive(self, rank: int) -> Any:
        """
        What that rank sends next, see `pack`.

        Raises:
            RankLost: it is gone.
            ServerError: it has sent something else.
        """
        length = torch.empty(1, dtype=torch.int64)
        with self._talking_to(rank):
            _wait(dist.irecv(length, rank, tag=LENGTHS))
        data = torch.empty(int(length), dtype=torch.uint8)
        with self._talking_to(rank):
            _wait(dist.irecv(data, rank, tag=MESSAGES))
        try:
            return unpack(data.numpy())
        except NotAMessage as error:
            raise ServerError(f"what rank {rank} sends is not understood: {error}; start all ranks with one version") from None

    # Sums

    def sum_numbers(self, numbers: list[float]) -> list[float]:
        summed = torch.tensor(numbers, dtype=torch.float64)
        self._all_reduce(summed, dist.group.WORLD)
        return summed.tolist()

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        parameters = list(parameters)
        # One without a gradient on any rank stays without: an optimiser passes it over.
        having = self.sum_numbers([float(parameter.grad is not None) for parameter in parameters])
        summed = [parameter for parameter, number in zip(parameters, having, strict=True) if number]
        if not summed:
            return
        gradients = [torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in summed]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        self._all_reduce(flat, self.group)
        parts = torch.split(flat, [parameter.numel() for parameter in summed])
        for parameter, part in zip(summed, parts, strict=True):
            parameter.grad = part.view_as(parameter)

    def _all_reduce(self, tensor: torch.Tensor, group: Any) -> None:
        with self._talking_to(None):
            dist.all_reduce(tensor, group=group)
        others = self.place.num_ranks - 1
        self.bytes_sent += 2 * others * tensor.nbytes // self.place.num_ranks  # in a ring, which sends every part twice

    # Who is gone

    @property
    def lost(self) -> RankLost | None:
        """Which rank is gone."""
        return self._lost

    def _lose(self, rank: int | None) -> RankLost:
        with self._lock:
            lost = self._lost or RankLost(ANOTHER if rank is None else f"rank {rank}")
            if self._lost is None and not self._is_closing.is_set():
                self._lost = lost
                self._is_lost.set()
                self._ended(lost)
            return lost

    @contextmanager
    def _talking_to(self, rank: int | None) -> Iterator[None]:
        """
        Args:
            rank: None: to all, and any of them may fail.
        """
        try:
            yield
        except RuntimeError as error:  # as gloo and NCCL say that a connection is closed
            logger.debug("rank %d: %s", self.place.rank, _first_line(error))
            if rank is None and not self.place.leads:
                raise RankLost(ANOTHER) from None  # the leader finds out which, and says what is to be done
            if rank is None:
                self._is_lost.wait(SECONDS_TO_LEARN_WHO)  # by the pulse
            raise self._lose(rank) from None

    @contextmanager
    def or_lost(self) -> Iterator[None]:
        """What torch cannot do any more since a rank is gone fails in many ways, and for this one reason."""
        try:
            yield
        except RuntimeError:
            if self._is_lost.wait(SECONDS_TO_LEARN_WHO) and self._lost is not None:
                raise self._lost from None
            raise

    def _answer_pulse(self, rank: int) -> None:
        """The leader's side of what `_send_pulse` does."""
        sign = torch.zeros(1, dtype=torch.uint8)
        with self._until_lost(rank):
            while True:
                _wait(dist.irecv(sign, rank, tag=PULSES))
                self._seconds_silent[rank] = 0
                _wait(dist.isend(sign, rank, tag=PULSES))

    def _send_pulse(self, rank: int) -> None:
        """Signs of life, there and back, by which each notices when the other is gone."""
        sign = torch.zeros(1, dtype=torch.uint8)
        with self._until_lost(rank):
            while True:
                _wait(dist.isend(sign, rank, tag=PULSES))
                _wait(dist.irecv(sign, rank, tag=PULSES))
                self._seconds_silent[rank] = 0
                time.sleep(SECONDS_BETWEEN_PULSES)

    def _expect_farewell(self, rank: int) -> None:
        """Until the leader sends this process home."""
        with self._until_lost(rank):
            _wait(dist.irecv(torch.zeros(1, dtype=torch.uint8), rank, tag=FAREWELLS))
            self._is_closing.set()
            self._ended(None)

    def _count_silence(self) -> None:
        """One whose machine is gone, or which is stopped, is only silent: what waits for it has to be broken off."""
        while True:
            time.sleep(1)  # and no clock is asked: what stood still meanwhile may have been this process
            for rank in self.partners:
                self._seconds_silent[rank] += 1
                if self._seconds_silent[rank] > MOST_SECONDS_SILENT and not self._is_closing.is_set():
                    self._lose(rank)
                    self._break_off(rank)
                    return

    def _break_off(self, rank: int) -> None:
        with suppress(RuntimeError):
            for farewell in self._farewells:
                _wait(farewell, timedelta(seconds=1))
            # Where one operation has waited too long, gloo breaks all others off.
            _wait(dist.irecv(torch.zeros(1, dtype=torch.uint8), rank, tag=NOTHING), timedelta(milliseconds=1))

    @contextmanager
    def _until_lost(self, rank: int) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            logger.debug("rank %d, pulse of rank %d: %s", self.place.rank, rank, _first_line(error))
            self._lose(rank)

    def send_home(self) -> None:
        """Of the leader: the others are no longer needed, and end at once, whatever they do. Does not wait for them."""
        self._is_closing.set()
        for rank in self.partners:
            with suppress(RuntimeError):  # of one that is gone
                self._farewells.append(dist.isend(torch.zeros(1, dtype=torch.uint8), rank, tag=FAREWELLS))

    def close(self) -> None:
        """Of the leader: see the others end, and part from them."""
        if self._lost is not None:
            return
        self.send_home()
        ends = time.monotonic() + SECONDS_TO_END
        for thread in self._watching:
            thread.join(max(0.0, ends - time.monotonic()))
        if not any(thread.is_alive() for thread in self._watching):
            atexit.unregister(_leave)
            if self.group is dist.group.WORLD:  # NCCL would wait for the others
                dist.destroy_process_group()


def _leave() -> None:
    """Threads that wait in torch cannot be ended, and torch aborts a process that ends while they do."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _join(place: Place) -> None:
    """
    Raises:
        RuntimeError, ValueError: the others cannot be met.
    """
    store, _, _ = next(rendezvous("env://", place.rank, place.num_ranks, timeout=TO_JOIN))
    # With torchrun --max-restarts the store outlives the ranks, which would find the addresses of those before them.
    store = dist.PrefixStore(f"splitlora/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=place.rank, world_size=place.num_ranks, timeout=TO_JOIN)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """While torch waits Python does not see signals: whoever is told to end meanwhile has nothing to save, and just ends."""
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(work: Any, timeout: timedelta = FOREVER) -> None:
    assert work is not None  # only for a rank that is not in the group
    work.wait(timeout)


def _first_line(error: Exception) -> str:
    return plain(str(error).partition("\n")[0])
