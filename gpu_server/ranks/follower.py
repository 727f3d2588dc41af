"""What every rank but the first does: compute what rank 0 says, as long as there is something to compute."""

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from split_model import PretrainedModel
from storage import ModelError, find_model
from terminal import user_text_path

from ..config import ServerConfig
from ..errors import RankLost, ServerError
from ..federation import Trained
from ..part_trainer import HiddenShare, PartTrainer, make_trainer
from .agreement import introduction, own_device
from .place import LEADER, Place
from .process_group import MOST_SECONDS_SILENT, ProcessGroup
from .telling import FAILING_EVERYWHERE, adapter_of, batches_of

__all__ = ["follow"]


def follow(place: Place, options: Mapping[str, Any]) -> NoReturn:
    """
    Be one of the other ranks. This process ends when rank 0 sends it home, with status 0, or when rank 0 is gone, with a
    sentence and status 1. Signals are for rank 0, which saves the run before it sends all home.

    Args:
        options: as `ServerConfig`, those that are given to every rank. What is not given rank 0 says.

    Raises:
        ServerError: the others cannot be met.
    """

    def end(error: ServerError | ModelError | None) -> NoReturn:
        # At once, whatever this process waits for: it has nothing to save.
        if error is not None:
            print(f"splitlora-server: rank {place.rank}: {error}", file=sys.stderr, flush=True)  # noqa: T201
        os._exit(0 if error is None else 1)

    group = ProcessGroup(place, end)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    try:
        _compute(group, _trainer(group, options))
    except RankLost as lost:
        # Soon a thread that watches rank 0 calls `end`. But where only two others have lost each other, rank 0 waits for both.
        time.sleep(MOST_SECONDS_SILENT)
        end(lost)
    except (ServerError, ModelError) as error:
        end(error)


def _trainer(group: ProcessGroup, options: Mapping[str, Any]) -> PartTrainer:
    """That of this rank, when the leader has found that all are alike."""
    group.send({LEADER: introduction(group.place, options)})
    told = group.receive(LEADER)
    config = ServerConfig.from_options(told["config"])
    device = own_device(told["device"], group.place)
    if told["backend"] == "nccl":
        group.use_nccl()
    name = user_text_path(options["model"]) if "model" in options else config.model
    try:
        model = PretrainedModel(find_model(name))
        group.send({LEADER: {"model": name, "fingerprint": model.fingerprint()}})
    except ModelError as error:
        group.send({LEADER: {"error": str(error)}})
    adapter = adapter_of(group.receive(LEADER)["adapter"])  # which comes when all have the same model
    return make_trainer(config, model, adapter, device, group)


def _compute(group: ProcessGroup, trainer: PartTrainer) -> NoReturn:
    """What the leader says, one after the other; until this process ends."""
    while True:
        told = group.receive(LEADER)
        try:
            with group.or_lost():
                reply = COMMANDS[told.pop("command")](trainer, **told)
        except FAILING_EVERYWHERE:
            reply = {}  # the leader has found the same, and says it
        if reply is not None:
            group.send({LEADER: reply})


def _train(trainer: PartTrainer, *, batches: dict[str, Any], **more: Any) -> dict[str, Any]:
    return _gradients(trainer.train(batches=batches_of(batches), **more))


def _forward(trainer: PartTrainer, *, batches: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"hidden": trainer.forward(batches=batches_of(batches), **more)}


def _backward(trainer: PartTrainer, *, gradients: dict[str, Any], **more: Any) -> dict[str, Any]:
    shares = {client: HiddenShare(values) for client, values in gradients.items()}
    return _gradients(trainer.backward(gradients=shares, **more))


def _gradients(trained: Trained) -> dict[str, Any]:
    return {"gradients": trained.gradients, "summed_losses": trained.summed_losses}


def _take_step(trainer: PartTrainer, *, step: int, total_steps: int, gradient_factor: float) -> None:
    trainer.take_step(step, total_steps, gradient_factor)


def _summed_loss(trainer: PartTrainer, *, batches: dict[str, Any], of: str) -> dict[str, Any]:
    trainer.summed_loss(list(batches_of(batches).values()), of)
    return {}


def _infer(trainer: PartTrainer, *, batches: dict[str, Any], of: str) -> dict[str, Any]:
    (batch,) = batches_of(batches).values()
    return {"hidden": {"": trainer.infer(batch, of)}}


def _restore(trainer: PartTrainer, *, adapter: dict[str, Any], optimiser: dict[str, Any]) -> None:
    trainer.restore(adapter_of(adapter), adapter_of(optimiser))


COMMANDS: dict[str, Callable[..., dict[str, Any] | None]] = {
    "train": _train,
    "forward": _forward,
    "backward": _backward,
    "take_step": _take_step,
    "summed_loss": _summed_loss,
    "infer": _infer,
    "restore": _restore,
}
"""By the name of the method of `Trainer`: what is replied, if anything is."""
