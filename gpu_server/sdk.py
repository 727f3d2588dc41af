"""The SDK: a server for one run, in five lines."""

import functools
import inspect
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, ParamSpec

from protocol.limits import CACHES_ON_SERVER
from storage import CacheFolder

from .config import ServerConfig, described
from .errors import RankLost
from .federation import Action, StepRecord
from .history import RunFiles, telling_to
from .resuming import go_back, start_from
from .run_setup import parting_on_failure, set_up
from .serving import EventRelay, Observer, RunServer

__all__ = ["GpuServer", "RunEndedEarly"]


SECONDS_DEAF_TO_SIGNALS = 1.0


class RunEndedEarly(RuntimeError):
    """All clients left, or the server was stopped, before the last step."""


Settings = ParamSpec("Settings")


def _with_settings(
    config: Callable[Settings, ServerConfig],
) -> Callable[[Callable[..., None]], Callable[Concatenate[Any, Settings], None]]:
    """Give an ``__init__(self, **options)`` the keyword arguments of a configuration: in type checkers, editors and `help`."""

    def with_signature(initialise: Callable[..., None]) -> Callable[Concatenate[Any, Settings], None]:
        own, _ = inspect.signature(initialise).parameters.values()
        settings = inspect.signature(config).parameters.values()
        initialise.__signature__ = inspect.Signature([own, *settings])  # type: ignore[attr-defined]
        initialise.__doc__ = f"Keyword arguments, and what they are as flags of the command line:\n\n{described()}"
        return initialise

    return with_signature


class GpuServer:
    """
    Holds the server part of a model and trains it for all devices of one run.

        with GpuServer(model="gpt2", clients=2, steps=300, run_dir="runs/demo") as server:
            for step in server.train():
                print(step.number, step.loss)

    Its keyword arguments are the fields of `ServerConfig`; ``help(GpuServer.__init__)`` lists them.

    Raises:
        ServerError, ModelError, AdapterError: a setting, the run's folder, the model or the initial adapter cannot be used.
    """

    config: ServerConfig
    """All settings, those of a resumed run included."""
    choices: list[str]
    """What of them was chosen by the server or an earlier run, and why."""
    url: str
    """
    Where the server listens, such as ws://127.0.0.1:8765 or wss://0.0.0.0:8765; there is one from the beginning of the ``with``
    block on. Devices elsewhere replace 0.0.0.0, which means all of this machine's addresses, with its name or one of these.
    """
    page_url: str | None
    """Where a browser shows the run, the page's token included; from when on as `url`. None where there is no page."""

    @_with_settings(ServerConfig)
    def __init__(self, **options: Any) -> None:
        self._run = run = set_up(options)
        self.config, self.choices = run.config, run.choices
        self._observers: list[Observer] = []

    def observe(self, observer: Observer) -> None:
        """Tell ``observer``, beside others, how the run goes. Call it before the ``with`` block."""
        if hasattr(self, "_thread"):
            raise RuntimeError("the run is served already: call observe before the with block")
        self._observers.append(observer)

    @property
    def adapter_folder(self) -> Path:
        """Where the adapter is when the run is complete."""
        return self._run.directory.adapter_folder

    def __enter__(self) -> "GpuServer":
        """
        Listen; ``url`` tells where.

        Raises:
            ServerError: the address cannot be listened on, another server has the run's folder, or the run cannot go on.
        """
        with parting_on_failure(self._run.leader):
            try:
                self._run.directory.hold()
                return self._begin()
            except BaseException:
                self._run.directory.release()
                raise

    def _begin(self) -> "GpuServer":
        run, self._steps = self._run, _StepQueue()
        observers = [self._steps, *run.observers, *self._observers]
        self._events = EventRelay(run.journal, observers)
        self._server = RunServer(
            run.federation,
            run.engine,
            door=run.door,
            journal=run.journal,
            observers=observers,
            events=self._events,
            model_name="" if Path(self.config.model).is_dir() else self.config.model,
            grace_period=self.config.linger,
            caches=functools.cache(self._cache_of) if run.federation.settings.keeps_samples else None,
            edge_part=run.edge_part,
            viewers=run.page.viewers,
            metrics=run.prometheus.exposition,
            # Before steps are taken back: until then at least the devices of the server before were there.
            last_step_time=RunFiles(run.directory.path).last_step_time() if run.federation.restarts else None,
            spacing=run.spacing,
        )
        with telling_to(self._events):
            actions = go_back(run) if run.federation.restarts else []
            if run.federation.restarts and run.door.has_page:
                files = RunFiles(run.directory.path)
                # Without what this server adds meanwhile; no clock says which that is.
                before = files.everything(last_step=run.federation.step, num_events=files.num_events())
                run.page.recall(before, files.last_checkpoint())
        listening: Future[str] = Future()
        self._thread = threading.Thread(target=self._serve, args=(listening, actions), name="server")
        self._thread.start()
        try:
            self.url = listening.result()
            self.page_url = run.door.page_url(int(self.url.rpartition(":")[2]))
        except BaseException:
            if listening.exception() is None:  # Ctrl-C or SIGTERM meanwhile
                self.suspend()
            self._thread.join()
            raise
        if run.leader is not None:
            run.leader.when_lost(self._server.fail)
        return self

    def _serve(self, listening: "Future[str]", actions: list[Action]) -> None:
        def begin(url: str) -> None:
            self._run.journal.begin(url)  # not before: a run whose port is in use leaves nothing behind
            listening.set_result(url)

        try:
            with telling_to(self._events):
                self._server.run(begin, actions)
        except Exception as error:
            if not listening.done():
                listening.set_exception(error)
            self._steps.fail(error)
        finally:
            self._run.journal.close()
            self._steps.end()

    def train(self) -> Iterator[StepRecord]:
        """
        Follow the run step by step, until it is complete and its clients have left.

        Raises:
            RunEndedEarly: all clients left, or `stop` was called, before the last step; what was learnt until then is saved.
            TrainingDiverged: the loss is no longer a number.
            ServerError: the run directory cannot be written any more.
        """
        yield from self._steps.follow()
        status = self._run.federation.status()
        if status.is_saved and status.step == status.total_steps:
            return
        if status.is_saved:
            who = "the devices that had steps to do" if status.unfinished else "all devices"
            what = f"{who} have left the run"
        else:
            what = "the server was stopped"
        where = f"; {start_from(self._run)}" if status.step else ""
        raise RunEndedEarly(f"{what} after step {status.step} of {status.total_steps}{where}")

    @property
    def total_steps(self) -> int:
        """Length of the run in steps; 0 until it starts."""
        return self._run.federation.total_steps

    def stop(self) -> None:
        """End the run before its time; its clients are told. From any thread."""
        self._server.stop()

    def suspend(self) -> None:
        """Stop after a checkpoint; the clients try to come back until the run goes on with ``resume``. From any thread."""
        self._server.suspend()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """
        Raises:
            RankLost: a process that computes together with this one is gone, and its end is why this one was told to end.
        """
        try:
            self._end(kind)
        except (KeyboardInterrupt, SystemExit):
            self._raise_lost()
            raise
        if kind is not None and not issubclass(kind, RankLost):
            self._raise_lost()

    def _raise_lost(self) -> None:
        if self._run.leader is not None:
            self._run.leader.raise_lost()

    def _end(self, kind: type[BaseException] | None) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit):
            self.suspend()  # Ctrl-C or SIGTERM: the run may go on later
        else:
            self.stop()
        self._thread.join()
        if self._run.federation.status().is_saved:
            self._run.directory.remove_what_only_a_run_needs()
        self._run.directory.release()
        if self._run.leader is not None:
            self._run.leader.close()

    def _cache_of(self, client: str) -> CacheFolder:
        # Beside a sample's last versions there are those of all steps that the run may go back to; devices keep less.
        return self._run.directory.activation_cache(client, CACHES_ON_SERVER * self.config.cache_bytes)


class _StepQueue(Observer):
    """Takes the steps from the thread that serves to the one that follows the run."""

    def __init__(self) -> None:
        self._queue: queue.Queue[StepRecord | BaseException | None] = queue.Queue()

    def step_finished(self, record: StepRecord) -> None:
        self._queue.put(record)

    def fail(self, error: BaseException) -> None:
        self._queue.put(error)

    def end(self) -> None:
        self._queue.put(None)

    def _get(self) -> StepRecord | BaseException | None:
        while True:
            try:
                # Python does not see a signal that comes just before it begins to wait, until it wakes: a server whose devices
                # are away would be deaf to SIGTERM.
                return self._queue.get(timeout=SECONDS_DEAF_TO_SIGNALS)
            except queue.Empty:
                continue

    def follow(self) -> Iterator[StepRecord]:
        """The steps as they come; an error at the end is raised."""
        while (step := self._get()) is not None:
            if isinstance(step, BaseException):
                raise step
            yield step
        self._queue.put(None)  # whoever follows a second time finds the end, too
