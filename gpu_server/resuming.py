"""How a run goes on that was served before."""

import time

from protocol import DELTA, HeldOutLoss
from terminal import count, listed

from .errors import ConfigError
from .federation import Action
from .history import RunFiles, tell
from .run_setup import Run

__all__ = ["go_back", "start_from"]


def go_back(run: Run) -> list[Action]:
    """
    Stand where the run's last checkpoint was written, or at the beginning of a run that has written none.

    Returns:
        What the federation wants done first.

    Raises:
        ConfigError: the run is complete, or has ended early, and cannot be made longer.
        ServerError: no checkpoint is intact, or the folder cannot be written.
        AdapterError: the checkpoint is of another model.
    """
    directory, engine, federation = run.directory, run.engine, run.federation
    saved = directory.checkpoints.latest(federation.run)
    directory.forget_after(saved.step if saved else -1)
    directory.rotate()
    if saved is None:
        return []
    if saved.step == run.steps_before != run.config.steps and not _may_go_on_after_the_end(run):
        raise ConfigError(
            f"the run in {run.config.run_dir} is complete, and its devices no longer have what they would go on with "
            f"(aggregate-every {run.config.aggregate_every}, codec {run.config.codec}); {start_from(run)}"
        )
    engine.restore(saved.state)
    if federation.early_stopping is not None:
        federation.early_stopping.restore(saved.judgements)
        if federation.early_stopping.ends_run and run.config.steps not in (None, run.steps_before):
            raise ConfigError(
                f"the run in {run.config.run_dir} does not go on to step {run.config.steps}: held-out losses have ended it "
                f"after step {saved.step}; {start_from(run)}"
            )
    earliest = directory.checkpoints.steps()[0]
    told = {
        record.client: HeldOutLoss(step=record.step, loss=record.loss, labelled_tokens=record.labelled_tokens)
        for record in RunFiles(directory.path).evaluations()
    }
    actions = federation.restore(saved.step, earliest, saved.membership, engine.edge_adapter(), time.monotonic(), told=told)
    _tell_where_it_goes_on(run)
    return actions


def start_from(run: Run) -> str:
    """How what the run has learnt is used in another one."""
    folder = run.directory.adapter_folder
    return f"its adapter is in {folder}, and another run starts from it with --init-adapter {folder}"


def _tell_where_it_goes_on(run: Run) -> None:
    federation, config, folder = run.federation, run.config, run.directory.adapter_folder
    here = federation.unfinished()
    if federation.step == federation.total_steps:
        is_fixed = federation.ends_early or federation.settings.rate_depends_on_length
        may_be_longer = not is_fixed and config.steps and _may_go_on_after_the_end(run)
        longer = "a larger --steps, or " if may_be_longer else ""
        done = f"all {count(federation.step, 'step')} of this run are done, and its adapter is in {folder}"
        tell("note", f"{done}; to train further: {longer}another run with --init-adapter {folder}")
    elif here:
        tell("note", f"going on after step {federation.step}; waiting for {listed(here)} to come back", step=federation.step)


def _may_go_on_after_the_end(run: Run) -> bool:
    """At the end devices forget AdamW's moments, which they need in longer rounds, and in delta their activations."""
    return run.config.aggregate_every == 1 and run.federation.settings.activation_codec != DELTA
