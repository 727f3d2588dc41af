"""The SDK: whoever uses it takes part in a run in five lines of Python."""

import hashlib
import math
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Union

import numpy as np
from tokenizers import Tokenizer

from privacy import Centre, NoiseReport
from protocol import (
    Array,
    Hello,
    Join,
    RemoteProtocolError,
    RunSettings,
    Start,
    TrainingDiverged,
    Welcome,
    check_name,
    largest_message_bytes,
)
from protocol.invitation import Invitation
from protocol.settings import ABILITIES, OFFERED
from storage import ChatTemplate, Folder, ModelError, NamedFiles, find_model
from terminal import importing, user_text_path

from .access import Access, default_name
from .arguments import number, one_of, switch, text, whole_number
from .callbacks import Callback, checked
from .client_state import NO_TEMPLATE, ClientState, DeviceCache, StateError, WayToCompute, allowed_cache_bytes
from .connection import ConnectionFailed, Refused, SecretRefused
from .data import Batch, Batches, DataError, Dataset, Form, check_file
from .device_log import DeviceLog
from .disclosure import Demands, Disclosure
from .engine import Engine
from .engine_choice import DEVICES, ENGINES, TORCH, choose_engine
from .enrolment import state_folder, store
from .given_texts import TextFiles, Texts
from .held_out import Evaluated, HeldOut, perplexity
from .membership import Membership, Redirected
from .part.fetching import fetch_part, part_digest
from .part.part_cache import PART_BYTES, PartCache
from .pinning import CertificateChanged
from .server_status import model_of_server
from .token_file import CUT, check_long
from .training import Step, train
from .waiting import WaitReports, reason_to_wait

if TYPE_CHECKING:
    from split_model import ModelConfig, PretrainedModel
    from storage import PartDescription

    from .part.device_part import DevicePart

__all__ = ["EdgeClient"]

TITLE = "the server's part of the model"


class EdgeClient:
    """
    A device and its data, in a run of the server at ``server``.

        with EdgeClient("ws://127.0.0.1:8765", data="notes.jsonl", batch_size=8) as client:
            for step in client.train():
                print(step.number, step.loss)

    Args:
        server: WebSocket address; for wss:// this device has been enrolled there, or the certificate is an authority's.
        model: the run's base model, a Hugging Face folder or a hub name; None: the server hands over this device's part of it.
        data: .jsonl, .csv, .txt or .parquet; the texts stay on this device.
            Or the entries themselves: a list or an iterator of dicts, or a `datasets.Dataset`, each as a line of .jsonl would
            be. An iterator is read to its end at once. A device that comes back to a run needs the same again, as of a file.
        eval_data: held-out texts for `perplexity`; the same.
        eval_every: steps from one evaluation of ``eval_data`` to the next, for which the others wait: before the first step, at
            each round's end by which so many more are done, and when the run is over. `evaluations` has what comes of it, and
            so have the server's records. None evaluates only when `perplexity` is called.
        max_length: the greatest number of tokens in a sample; never more than the model has positions.
        long: what becomes of a longer sample: "cut" keeps its beginning, "split" makes several of it that overlap, "skip"
            leaves it out.
        loss_on: what is learnt: "all", the "completion", or in conversations the turns of the "assistant"; None is what each
            entry is made for, see docs/training.md.
        shuffle: a new order in every epoch, from the run's seed; False keeps the file's order.
        name: of this device in the run; the default is made of the host's name and the data file's.
        engine: what computes: "onnxruntime", on the part that the server hands over, or "torch", on ``model``; "auto" is torch
            where ``model`` is given and torch finds a CUDA device, or where the server hands over no part. A device that comes
            back to a run goes on with the engine it began with; with another, where one is asked for, it warns.
        device, dtype: where and in which precision the frozen weights compute; "auto" chooses by what the hardware has
            instructions for, and a device that comes back to a run goes on in the precision it began with; in another, where
            one is asked for, it warns. With onnxruntime the server decides the precision.
        state_dir: where this device keeps its enrolments, and what it needs to go on with a run after it was killed; the
            default is the user's folder for such things.
        give_up_after: seconds without a connection after which the run is given up; None tries forever. But if nobody answers
            the very first attempt, None ends with an error, since the address may be wrong; a device that was killed in a run
            of this server goes on trying.
        in_flight: micro-batches that are under way at once, if the run divides batches; 1 waits for each answer.
        cache_bytes: with the codec delta, how much of the samples' activations is kept in ``state_dir``; None is as much as the
            server keeps, and at most 1 GiB. A device that comes back to a run needs the same again.
        part_bytes: how much of what servers hand over is kept in ``state_dir``; a larger part is refused. None is 4 GiB.
        labels: "device" takes part in no run in which labels leave this device; "server" in any.
        activation_noise, gradient_noise: the least noise of a run in which this device takes part, in units of the run's clip;
            see `RunSettings`.
        callbacks: are told of every step and evaluation.
        report: called while this device makes itself ready, with what it is at, how many bytes of it are done, and of how many.

    Raises:
        DataError, ModelError, InvalidName, EnrolmentError: a file or the name cannot be used.
        ConnectionFailed, Refused, RemoteProtocolError: the server cannot be used, on entering and later.
        TooMuchDisclosed: on entering, before any data is sent: the run does not keep to ``labels`` or the noise.
        StateError: the folder for this device's state cannot be written, or what is in it cannot be trusted.
        PackageMissing: what computes is not installed; the message says what installs it.
    """

    data: Dataset
    """Without ``model`` it is read on entering, when the server has handed over the tokenizer."""
    eval_data: Dataset | None = None
    engine: str
    """On entering: what computes, "onnxruntime" or "torch"."""
    engine_choice: str
    """On entering: why."""
    dtype: str
    """On entering: of the frozen weights."""
    choice: str
    """On entering: why."""
    disclosure: Disclosure
    """On entering: what of the data leaves this device."""
    log_file: Path
    """What this device sees of its runs, a line an event."""

    def __init__(
        self,
        server: str,
        *,
        model: str | None = None,
        data: Texts,
        eval_data: Texts | None = None,
        eval_every: int | None = None,
        batch_size: int = 8,
        max_length: int = 512,
        long: str = "cut",
        loss_on: str | None = None,
        shuffle: bool = True,
        name: str | None = None,
        engine: str = "auto",
        device: str = "auto",
        dtype: str = "auto",
        state_dir: str | os.PathLike[str] | None = None,
        give_up_after: float | None = None,
        in_flight: int = 2,
        cache_bytes: int | None = None,
        part_bytes: int | None = None,
        labels: str = "server",
        activation_noise: float = 0.0,
        gradient_noise: float = 0.0,
        callbacks: Sequence[Callback] = (),
        report: Callable[[str, int, int], object] | None = None,
    ) -> None:
        self.batch_size = whole_number("batch-size", batch_size, 1)
        self._max_length = whole_number("max-length", max_length, 2, " tokens")
        self._in_flight = whole_number("in-flight", in_flight, 1)
        self._cache_bytes = None if cache_bytes is None else whole_number("cache-bytes", cache_bytes, 0)
        part_bytes = PART_BYTES if part_bytes is None else whole_number("part-bytes", part_bytes, 0)
        self.eval_every = None if eval_every is None else whole_number("eval-every", eval_every, 1, " step")
        if eval_every is not None and eval_data is None:
            raise DataError(f"eval-every {eval_every} needs held-out texts: give --eval-data FILE")
        self._give_up_after = None if give_up_after is None else number("give-up-after", give_up_after, 0)
        self.server, self.shuffle = text("server", server), switch("shuffle", shuffle)
        self._asked_engine, self._device = one_of("engine", engine, ENGINES), one_of("device", device, DEVICES)
        if engine == TORCH and model is None:
            raise ModelError("the torch engine computes with a model of this device's own: give --model, or leave --engine out")
        check_long(long)
        self._form, self.long = Form(loss_on=loss_on), long
        try:
            noise = number("activation-noise", activation_noise, 0), number("gradient-noise", gradient_noise, 0)
            self._demands = Demands(labels, *noise)
        except ValueError as error:
            raise DataError(str(error)) from None
        state = state_folder(state_dir)
        self._callbacks, self._texts = checked(callbacks), TextFiles()
        self._has_ended = False
        path = self._texts.path(data, "data")
        held_out = None if eval_data is None else self._texts.path(eval_data, "eval_data")
        self._access = Access.to(server, state, None if name is None else check_name(text("name", name)))
        self.name = name or self._access.name or default_name(path)
        self._state = ClientState(state, server, self.name)
        self._tokens, self._report = state / "tokens", report
        self.log_file = self._state.log_file
        self._log = DeviceLog(self.name, self.log_file)
        self._held_out: HeldOut | None = None
        self._parts, self._dtype = PartCache(state / "parts", part_bytes), dtype
        self._files, self._read_for = (path, held_out), ""
        self._hub_name = ""
        self._model: PretrainedModel | None = None
        if model is not None:
            model = user_text_path(model)
            self._hub_name = "" if Path(model).is_dir() else model  # noted on the disk; a folder's path may be another tomorrow
            self._model = _open_model(model)
            self._read_data(self._model.tokenizer(), self._model.config, Folder(self._model.folder, ModelError))
            return
        for path in filter(None, self._files):  # what is wrong with them is said before anything is fetched
            check_file(path)

    def _read_data(self, tokenizer: Tokenizer, config: "Described", files: Folder) -> None:
        self._form = replace(self._form, template=ChatTemplate.find(files))
        data, held_out = self._files
        try:
            self.data = self._load(data, tokenizer, config, files.path)
            if held_out is not None:
                self.eval_data = self._load(held_out, tokenizer, config, files.path)
        finally:
            self._texts.remove()

    def _load(self, path: Path, tokenizer: Tokenizer, config: "Described", where: Path) -> Dataset:
        report = self._report
        try:
            data = Dataset.load(
                path,
                tokenizer,
                config.end_token,
                min(self._max_length, config.num_positions),
                form=self._form,
                long=self.long,
                folder=self._tokens,
                report=None if report is None else lambda done, total: report(path.name, done, total),
            )
        except DataError as error:
            raise DataError(self._texts.in_words(str(error))) from None
        # Tokens may have been added to the tokenizer and not to the model. The server would blame the device for its labels.
        if data.highest_token >= config.vocabulary_size:
            raise ModelError(
                f"{where}: the tokenizer gives token {data.highest_token} "
                f"({tokenizer.id_to_token(data.highest_token)!r}), the model's vocabulary has {config.vocabulary_size}"
            )
        return data

    @classmethod
    def join(
        cls,
        invitation: str,
        *,
        model: str | None = None,
        engine: str = "auto",
        state_dir: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> "EdgeClient":
        """
        Enrol this device by its invitation, and be a client of the server that it names.

        Args:
            invitation: what `splitlora-server enrol` has printed. It is kept in ``state_dir``, so this needs to be said once.
            model, engine: as of EdgeClient; with torch, None is the model that the server names, if it is on the hub.
            options: the other arguments of EdgeClient, but for the name, which the invitation says.

        Raises:
            InvalidInvitation: it is none. No error repeats any part of it.
            EnrolmentError: it cannot be kept.
            ModelError: the torch engine needs a model, and the server has its own from a folder.
            ConnectionFailed, Refused, CertificateChanged, RemoteProtocolError: the server cannot be asked for its model.
        """
        parsed = Invitation.parse(invitation)
        store(state_folder(state_dir), parsed)
        if model is None and engine == TORCH:
            model = model_of_server(parsed, state_folder(state_dir))
        return cls(parsed.url, model=model, engine=engine, name=parsed.name, state_dir=state_dir, **options)

    def __enter__(self) -> "EdgeClient":
        """Connect, learn the run's settings and make the device's part of the model ready. `start` then joins the run."""
        self._wait_reports = WaitReports(lambda: reason_to_wait(self._access.connect, self.name), self._log)
        self._membership = Membership(
            self._access.connect,
            Hello(
                name=self.name,
                fingerprint=self._model.fingerprint() if self._model else "",
                codecs=OFFERED,
                abilities=ABILITIES,
                instance=secrets.token_hex(16),
            ),
            give_up_after=self._give_up_after,
            # The address of a run in which this device was is right, and who says how long to try means to wait.
            server_may_be_away=self._state.is_in_a_run or self._give_up_after is not None,
            before=self._state.welcome(),
            wants_part=self._asked_engine != TORCH,
            while_waiting=self._wait_reports,
            welcomed=self._access.heard,
            log=self._log,
        )
        self._start: Start | None = None
        self._wait_reports.begin()
        try:
            self._make_ready(self.welcome.settings)
            self._held_out = self._evaluated_every(self.eval_every)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def _make_ready(self, settings: RunSettings) -> None:
        self._demands.check(settings, self.welcome.run)
        before = self._before = self._state.way_to_compute(self.welcome.run)
        self.engine, self.engine_choice = choose_engine(
            self._asked_engine,
            has_model=self._model is not None,
            device=self._device,
            dtype=self._dtype,
            settings=settings,
            edge_weights=self._membership.edge_weights,
            before=None if before is None else before.engine,
        )
        self._engine: Engine
        if self._model is not None and self.engine == TORCH:
            with importing("the torch engine", install="splitlora[torch]"):
                from .torch_engine import TorchEngine, choose_weight_dtype

            self.dtype, self.choice = choose_weight_dtype(
                self._dtype, self._device, settings, before=None if before is None else before.dtype
            )
            self._enter_run(self._way_to_compute(part=""), self._model.config)
            self._engine = TorchEngine(self._model, settings, self._device, self.dtype)
            self.disclosure = self._disclosure(settings, self._model.config)
            return
        from .onnx_engine import OnnxEngine

        part, digest = self._fetch_part()
        self.dtype, self.choice = part.description.weights, "as the server hands them over"
        if self._model is None and self._read_for != digest:  # entered again, this client has its texts, and no file of values
            self._read_data(part.tokenizer(), part.description, part.files)
            self._read_for = digest
        self._enter_run(self._way_to_compute(digest), part.description)
        self._engine = OnnxEngine(part, settings)
        self.disclosure = self._disclosure(settings, part.description)

    def _fetch_part(self) -> "tuple[DevicePart, str]":
        """The part that the server hands over, and its digest."""
        from .part.device_part import DevicePart
        from .part.runtime import Runtime

        device = "cuda" if self._device == "cuda" else "cpu"
        Runtime(device)  # what cannot compute here is said before anything is fetched
        report = self._report
        files, paths = fetch_part(
            self._membership, self._parts, None if report is None else lambda done, total: report(TITLE, done, total)
        )
        part = DevicePart(NamedFiles(paths, ModelError, TITLE), device)
        if part.description.fingerprint != self.welcome.fingerprint:
            raise ModelError(
                f"{TITLE} is one of another base model (fingerprint {part.description.fingerprint}) than that of the run "
                f"({self.welcome.fingerprint})"
            )
        return part, part_digest(files)

    def _evaluated_every(self, steps: int | None) -> HeldOut | None:
        if steps is None or self.eval_data is None:
            return None
        return HeldOut(
            self.eval_data,
            self.batch_size,
            steps,
            membership=self._membership,
            engine=self._engine,
            disclosure=self.disclosure,
            log=self._log,
            told=self._tell_evaluated,
        )

    def _tell_evaluated(self, evaluated: Evaluated) -> None:
        for callback in self._callbacks:
            callback.on_evaluate(self, evaluated)

    def _way_to_compute(self, part: str) -> WayToCompute:
        template, settings = self._form.template, self.welcome.settings
        return WayToCompute(
            engine=self.engine,
            dtype=self.dtype,
            part=part,
            data=self._described_data(),
            kind=self.data.kind,
            template=NO_TEMPLATE if template is None else hashlib.sha256(template.identity.encode()).hexdigest(),
            cache_bytes=str(allowed_cache_bytes(settings, self._cache_bytes)) if settings.keeps_samples else "",
        )

    def _described_data(self) -> str:
        usual = f"{self.data.digest} max-length={self._max_length} {'shuffled' if self.shuffle else 'in order'}"
        other = [f"long={self.long}"] if self.long != CUT else []
        return " ".join([usual, *other, *([f"loss-on={self._form.loss_on}"] if self._form.loss_on else [])])

    def _enter_run(self, way: WayToCompute, config: "Described") -> None:
        """
        Raises:
            DataError: the data is not what this device has trained on in this run before.
        """
        if self._before is not None and (other := way.other_data(self._before)):
            data = self._texts.in_words(str(self._files[0]))
            raise DataError(
                f"{data} is not the data with which this device has taken part in run {self.welcome.run} so far: "
                f"{' is another, and '.join(other)} is another. Give it as it was to go on; other data are for another run"
            )
        self._way = way
        if self._before is None:
            # A device that is killed from here on comes back as this client and computes as before: else the result changes.
            self._note_run()
        self._width = config.width
        self._batches, self._activation_cache = self._divide(self.welcome.settings)

    def _note_run(self) -> None:
        self._state.enter(self.welcome, self._way, model=self._hub_name)

    def _disclosure(self, settings: RunSettings, config: "Described") -> Disclosure:
        """To be called before the engine has an adapter: the centre is one of the base model."""
        secret, centre = None, None
        if "noise" in settings.abilities():
            secret = self._state.noise_secret()
        if settings.activation_clip:

            def activations(ids: Array, lengths: Array) -> Array:
                return self._engine.infer(Batch(ids, lengths, label_counts=np.zeros_like(lengths), labels=ids[:0]))

            centre = Centre.of_model(config.vocabulary_size, config.num_positions, activations)
        return Disclosure(settings, secret, centre)

    def _divide(self, settings: RunSettings) -> tuple[Batches, DeviceCache | None]:
        """The data as batches of this run, and the activation cache of those samples that are kept, if any are."""
        num_cached, cache = 0, None
        if settings.keeps_samples:
            cache_bytes = allowed_cache_bytes(settings, self._cache_bytes)
            # Where nothing changes there is one version of a sample, and only the server has its rows.
            element = np.dtype(settings.precision).itemsize
            how: dict[str, int] = {} if settings.trains_edge else {"versions": 1, "element": element}
            num_cached = self.data.num_that_fit(cache_bytes, width=self._width, **how)
            cache = self._state.activation_cache(cache_bytes)
        batches = Batches(
            data=self.data,
            name=self.name,
            batch_size=self.batch_size,
            shuffle=self.shuffle,
            seed=settings.seed,
            num_parts=settings.micro_batches,
            num_cached=num_cached,
        )
        return batches, cache

    @property
    def welcome(self) -> Welcome:
        """The run, as the server announced it."""
        return self._membership.welcome

    def start(self) -> Start:
        """Join the run and wait until it starts, with all of its clients. `train` and `perplexity` do so themselves."""
        if self._start is None:
            largest_message = largest_message_bytes(
                rows=self.batch_size * self._longest,
                width=self._width,
                precision=self.welcome.settings.precision,
                adapter_elements=self._engine.num_adapter_elements,
            )
            join = Join(num_samples=len(self.data.samples), batch_size=self.batch_size, longest=self._longest)
            # What is on the disk decides where the server lets this client go on.
            self._membership.position.step = self._state.saved_steps.last_step()
            cache = self._activation_cache
            try:
                start = self._membership.start(join, largest_message=largest_message, activation_cache=cache)
            except Refused:
                if self._before is None:
                    self._state.delete()  # this device takes no part, so there is nothing to which it could come back
                raise
            self._go_to(start)
            if self._before is not None:
                # Not earlier: one that comes back another way and is refused goes on as before once it is started as before.
                self._note_run()
                self._tell_another_way(self._before)
            self._tell_that_it_starts()
        assert self._start is not None
        return self._start

    def train(self) -> Iterator[Step]:
        """Take part in the run, step by step, to its end."""
        return self._telling(
            train(
                self._membership,
                self._engine,
                self._batches,
                self.start(),
                disclosure=self.disclosure,
                saved_steps=self._state.saved_steps,
                in_flight=self._in_flight,
                held_out=self._held_out,
            )
        )

    def _tell_that_it_starts(self) -> None:
        assert self._start is not None
        self._log.tell(
            "started",
            f"takes part in run {self.welcome.run} from step {self._start.step + 1} of {self.num_steps} on",
            level="debug",
            step=self._start.step,
            run=self.welcome.run,
            steps=self.num_steps,
            samples=len(self.data.samples),
            batch_size=self.batch_size,
            engine=self.engine,
            dtype=self.dtype,
        )

    def _tell_another_way(self, before: WayToCompute) -> None:
        was, now = before.in_words, self._way.in_words
        if was != now:
            self._log.tell(
                "note",
                f"this device goes on in run {self.welcome.run} with {now}; before it was stopped it computed with {was}: the "
                "run's adapter will not be to the bit that of an undisturbed run",
                level="warning",
            )

    def _telling(self, steps: Iterator[Step]) -> Iterator[Step]:
        """Them, each told to the log, and to the callbacks."""
        for callback in self._callbacks:
            callback.on_train_begin(self)
        for step in steps:
            self._log.tell(
                "step",
                f"step {step.number}: loss {step.loss:.4f}",
                level="debug",
                step=step.number,
                loss=step.loss,
                tokens=step.tokens,
                bytes=step.num_bytes,
                seconds={part: round(value, 6) for part, value in vars(step.seconds).items()},
            )
            for callback in self._callbacks:
                callback.on_step_end(self, step)
            yield step
        self._log.tell("done", f"run {self.welcome.run} is over", level="debug", step=self.num_steps, bytes=self.num_bytes)
        try:
            for callback in self._callbacks:
                callback.on_train_end(self)
        except Exception:
            self._has_ended = True  # nothing is left to go on with, and nobody should wait for this device
            raise

    @property
    def evaluations(self) -> Sequence[Evaluated]:
        """What ``eval_data`` has lost so far, with ``eval_every``: the earliest first."""
        return () if self._held_out is None else tuple(self._held_out.evaluations)

    def perplexity(self, on_batch: Callable[[float], object] | None = None) -> float:
        """
        Perplexity of the held-out texts under the present adapter.

        Args:
            on_batch: called after every batch with the perplexity of those so far.

        Raises:
            DataError: the client has no eval_data.
        """
        if self.eval_data is None:
            raise DataError("perplexity needs eval_data")
        self.start()
        while True:
            try:
                found = math.nan  # of no batches, which no data set has
                estimates = perplexity(self._membership, self._engine, self.eval_data, self.batch_size, self.disclosure)
                for found in estimates:
                    if on_batch is not None:
                        on_batch(found)
                return found
            except Redirected as redirected:  # the server has gone back to a checkpoint: begin again with its adapter
                self._go_to(redirected.start)

    def _go_to(self, start: Start) -> None:
        self._start = start
        self._engine.load_adapter(start.adapter)

    def noise_report(self) -> NoiseReport | None:
        """What the noise on what this device sends is worth; None in a run without noise, and without dp-accounting."""
        try:
            return NoiseReport.in_run(
                self.welcome.settings,
                steps=self.num_steps,
                num_samples=len(self.data.samples),
                batch_size=self.batch_size,
                longest=self._longest,
            )
        except ImportError:
            return None

    @property
    def _longest(self) -> int:
        """Rows of the longest text that this device sends."""
        return max(data.longest for data in (self.data, self.eval_data) if data is not None)

    @property
    def num_steps(self) -> int:
        """In how many steps this client takes part."""
        return self._batches.last_step(self.welcome.settings)

    @property
    def num_bytes(self) -> int:
        """Bytes of all messages so far, both ways."""
        return self._membership.num_bytes

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """
        Leave the run, if it is over, has diverged, or the user says so (Ctrl-C). After any other exception only close the
        connection, as if this device had been killed: started again as before, it goes on, and nothing of the run has changed.
        """
        self._wait_reports.close()
        if kind is not None:
            self._log.tell(*_ending(kind, error), level="debug")
        # What has diverged would diverge again.
        if kind is None or self._has_ended or issubclass(kind, KeyboardInterrupt | TrainingDiverged):
            self._state.delete()
            self._membership.close()
            return
        self._membership.hang_up()
        if self._start is None:
            return  # this client was in no run yet, so there is nothing to go on with, and nothing to say
        if issubclass(kind, Refused) and not issubclass(kind, SecretRefused):
            self._state.delete()  # the server will not take this device back
            return
        how = "joined with its new invitation" if issubclass(kind, SecretRefused) else "started again with the same command"
        self._log.tell("note", f"this device stays in run {self.welcome.run}: {how}, it goes on there")


SAYS_NO_TEXT = (ConnectionFailed, Refused, CertificateChanged, RemoteProtocolError, TrainingDiverged, StateError)
"""Errors whose sentences never have anything of the owner's texts in them, as those on data may."""


def _ending(kind: type[BaseException], error: BaseException | None) -> tuple[str, str]:
    """Kind of event and text, of what ends this device before the run is over."""
    if issubclass(kind, KeyboardInterrupt):
        return "left", "the user has ended it"
    why = f": {error}" if issubclass(kind, SAYS_NO_TEXT) else ""
    return "refused" if issubclass(kind, Refused) else "stopped", f"{kind.__name__}{why}"


Described = Union["ModelConfig", "PartDescription"]
"""What says a model's sizes."""


def _open_model(name: str) -> "PretrainedModel":
    with importing("--model", install="splitlora[torch]", instead="leave --model out: the server hands over what is needed"):
        from split_model import PretrainedModel
    return PretrainedModel(find_model(name))
