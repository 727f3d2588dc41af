"""Rank 0's side: it tells the others what to compute, and puts together what comes of it."""

import math
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, TypeVar

import torch

from protocol import Array, LabelledBatch
from split_model import Adapter, PretrainedModel

from ..config import ServerConfig
from ..errors import RankLost
from ..federation import Trained
from ..part_trainer import HalfStep, HiddenShare, PartTrainer, Seeds, make_trainer
from .agreement import agreed, check_sharding, chosen_backend, differences, introduction, other_models, own_device
from .division import Work
from .place import LEADER, Place, check_port
from .process_group import ProcessGroup
from .shares import Shares
from .telling import FAILING_EVERYWHERE, arrays_of, told

__all__ = ["Leader", "RankedTrainer"]

Result = TypeVar("Result")

SECONDS_TO_SAVE = 20.0
"""When a rank is gone; torchrun gives 30."""


class Leader:
    """
    Rank 0 of a run, from the first word to the last.

    Args:
        options: as they were given to this process.

    Raises:
        ServerError: the others cannot be reached, or are not like this one.
    """

    def __init__(self, place: Place, options: Mapping[str, Any]) -> None:
        self._place = place
        self._tell: Callable[[RankLost], None] = lambda _: None
        self.choices: list[str] = []
        """What was chosen for all ranks, and why."""
        # Whatever else hangs when a rank is gone, this process ends.
        self._last_resort = threading.Timer(SECONDS_TO_SAVE, self._give_up)
        self._last_resort.daemon = True
        self._group = ProcessGroup(place, ended=self._part)
        try:
            self._ranks = {LEADER: introduction(place, options), **self._hear()}
            agreed(differences(self._ranks))
        except BaseException:
            self.close()
            raise

    def prepare(self, config: ServerConfig, device: torch.device) -> torch.device:
        """
        Have the others load the model, while this one does.

        Args:
            config: settled.
            device: of which kind all are.

        Returns:
            Where this rank computes.

        Raises:
            ConfigError: the port is taken, or torch cannot connect such devices or shard a model.
        """
        check_port(self._place, config.port)
        if config.shard:
            check_sharding()
        backend, how = chosen_backend(device.type, self._ranks)
        self.choices.append(f"ranks {self._place.num_ranks}: {how}")
        if config.shard:
            self.choices.append("shard: each rank keeps a part of the frozen weights")
        self._say({"config": asdict(config), "device": device.type, "backend": backend})
        mine = own_device(device.type, self._place)
        if backend == "nccl":
            self._group.use_nccl()
        return mine

    def trainer(self, config: ServerConfig, model: PretrainedModel, adapter: Adapter, device: torch.device) -> "RankedTrainer":
        """
        See `make_trainer`.

        Raises:
            ConfigError: another rank has another model.
        """
        mine = {"model": config.model, "fingerprint": model.fingerprint()}
        agreed(other_models({LEADER: mine, **self._hear()}))
        self._say({"adapter": arrays_of(adapter)})
        own = make_trainer(config, model, adapter, device, self._group)
        work = Work.of(model.config, config.cut_layer, with_head=config.labels == "server")
        return RankedTrainer(own, self._group, work)

    def when_lost(self, tell: Callable[[RankLost], None]) -> None:
        """Call ``tell``, once and on any thread, when a rank is gone, also if it was before."""
        self._tell = tell
        if self.lost is not None:
            tell(self.lost)

    @property
    def lost(self) -> RankLost | None:
        """Which rank is gone."""
        return self._group.lost

    def raise_lost(self) -> None:
        """
        Call it when this process was told to end: where a rank is killed, torchrun sends SIGTERM to the others at about the
        same time.

        Raises:
            RankLost: a rank is gone.
        """
        if self.lost is not None:
            raise self.lost from None

    def close(self) -> None:
        """Send the others home, and part."""
        self._group.close()
        self._last_resort.cancel()

    def _hear(self) -> dict[int, Any]:
        return {rank: self._group.receive(rank) for rank in self._group.partners}

    def _say(self, message: dict[str, Any]) -> None:
        self._group.send(dict.fromkeys(self._group.partners, message))

    def _part(self, lost: RankLost | None) -> None:
        """Without one the others have nothing to do. What this one has in memory is saved by whoever is told."""
        assert lost is not None  # nobody sends the leader home
        self._last_resort.start()
        self._group.send_home()
        self._tell(lost)

    def _give_up(self) -> None:
        print(f"splitlora-server: {self.lost}", file=sys.stderr, flush=True)  # noqa: T201
        os._exit(1)


class RankedTrainer:
    """
    A `Trainer` whose sequences are computed by all ranks, each some of them. Every rank has the whole adapter and takes the
    same steps, so adapter and optimiser are asked of this one alone.
    """

    def __init__(self, own: PartTrainer, group: ProcessGroup, work: Work) -> None:
        self._own, self._group, self._work = own, group, work
        self._shares: dict[int, Shares] = {}
        """Of the step's micro-batches whose gradient is still to come."""

    def train(
        self, step: int, total_steps: int, micro_batch: int, batches: Mapping[str, LabelledBatch], seeds: Seeds
    ) -> Trained:
        shares, of = self._divided(batches), {"step": step, "total_steps": total_steps, "micro_batch": micro_batch}
        trained, others = self._with_shares(self._own.train, shares, batches, seeds, **of)
        return _of_all(trained, others, shares)

    def forward(self, step: int, micro_batch: int, batches: Mapping[str, LabelledBatch], seeds: Seeds) -> dict[str, Array]:
        if not micro_batch:
            self._shares.clear()
        shares = self._shares[micro_batch] = self._divided(batches)
        hidden, others = self._with_shares(self._own.forward, shares, batches, seeds, step=step, micro_batch=micro_batch)
        return shares.join_labelled({LEADER: hidden, **{rank: reply["hidden"] for rank, reply in others.items()}})

    def backward(self, step: int, total_steps: int, micro_batch: int, gradients: Mapping[str, HalfStep]) -> Trained:
        shares = self._shares.pop(micro_batch) if gradients else self._divided({})
        values = {client: gradient.values for client, gradient in gradients.items()}
        # Loss and labels are known for each client's batch as a whole: they count on this rank.
        own = {
            client: HiddenShare(rows, gradients[client].summed_loss, gradients[client].labelled_tokens)
            for client, rows in shares.labelled_of(LEADER, values).items()
        }
        trained, others = self._together(
            "backward",
            lambda rank: {
                "step": step,
                "total_steps": total_steps,
                "micro_batch": micro_batch,
                "gradients": shares.labelled_of(rank, values),
            },
            lambda: self._own.backward(step, total_steps, micro_batch, own),
        )
        return _of_all(trained, others, shares)

    def take_step(self, step: int, total_steps: int, gradient_factor: float) -> None:
        message = {"command": "take_step", "step": step, "total_steps": total_steps, "gradient_factor": gradient_factor}
        self._group.send(dict.fromkeys(self._group.partners, message))
        self._own.take_step(step, total_steps, gradient_factor)

    def summed_loss(self, batches: Sequence[LabelledBatch], of: str) -> float:
        by_number = {str(number): batch for number, batch in enumerate(batches)}
        shares = self._divided(by_number)
        loss, _ = self._together(
            "summed_loss",
            lambda rank: {"batches": told(shares.of(rank, by_number)), "of": of},
            lambda: self._own.summed_loss(list(shares.of(LEADER, by_number).values()), of),
        )
        return loss

    def infer(self, batch: LabelledBatch, of: str) -> Array:
        batches = {"": batch}
        shares = self._divided(batches)
        hidden, others = self._together(
            "infer",
            lambda rank: {"batches": told(shares.of(rank, batches)), "of": of},
            lambda: self._own.infer(shares.of(LEADER, batches)[""], of),
        )
        return shares.join_labelled({LEADER: {"": hidden}, **{rank: reply["hidden"] for rank, reply in others.items()}})[""]

    def adapter(self) -> Adapter:
        return self._own.adapter()

    def optimiser_state(self) -> Adapter:
        return self._own.optimiser_state()

    def restore(self, adapter: Adapter, optimiser: Adapter) -> None:
        self._own.restore(adapter, optimiser)  # first, for it may raise
        message = {"command": "restore", "adapter": arrays_of(adapter), "optimiser": arrays_of(optimiser)}
        self._group.send(dict.fromkeys(self._group.partners, message))

    def _divided(self, batches: Mapping[str, LabelledBatch]) -> Shares:
        return Shares(batches, self._group.num_ranks, self._work)

    def _with_shares(
        self, own: Callable[..., Result], shares: Shares, batches: Mapping[str, LabelledBatch], seeds: Seeds, **more: int
    ) -> tuple[Result, dict[int, Any]]:
        """
        As `_together`, of what takes batches and their seeds.

        Args:
            own: a method of this rank's trainer, whose name is the command.
            more: its other arguments, which are the same on all ranks.
        """
        return self._together(
            own.__name__,
            lambda rank: {"batches": told(shares.of(rank, batches)), "seeds": shares.seeds_of(rank, seeds), **more},
            lambda: own(batches=shares.of(LEADER, batches), seeds=shares.seeds_of(LEADER, seeds), **more),
        )

    def _together(
        self, command: str, arguments: Callable[[int], dict[str, Any]], own: Callable[[], Result]
    ) -> tuple[Result, dict[int, Any]]:
        """
        What this rank computes, and what each of the others replies.

        Args:
            arguments: of the command to each rank.
        """
        failed: Exception | None = None
        with self._group.sending({rank: {"command": command, **arguments(rank)} for rank in self._group.partners}):
            try:
                with self._group.or_lost():
                    result = own()
            except FAILING_EVERYWHERE as error:  # all ranks find it, and each still replies
                failed = error
        replies = {rank: self._group.receive(rank) for rank in self._group.partners}
        if failed is not None:
            raise failed
        return result, replies


def _of_all(own: Trained, others: Mapping[int, Any], shares: Shares) -> Trained:
    """
    Args:
        own: the leader's; what of it is a sum is that of all ranks already.
        others: what each other rank has for the rows and clients of its share.
    """
    losses = [own.summed_losses, *(reply["summed_losses"] for reply in others.values())]
    return replace(
        own,
        gradients=shares.join_rows({LEADER: own.gradients, **{rank: reply["gradients"] for rank, reply in others.items()}}),
        summed_losses={client: math.fsum(of_rank[client] for of_rank in losses) for client in own.summed_losses},
    )
