"""Held-out texts that are evaluated while a run goes on: told once, the same whatever happens, and nothing else is another."""

import json
import math
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from conftest import adapter_bytes, metrics, run_split
from ports import free_port
from test_federation import Table, kinds, told
from test_membership import JOIN, LOST, World, activations, evaluation, gradient, start, welcome
from test_training import DATA, TENSORS, NotingEngine
from usual_settings import settings as usual

from edge_client import DataError, EdgeClient
from edge_client.data import Batches
from edge_client.device_log import DeviceLog
from edge_client.disclosure import Disclosure
from edge_client.held_out import HeldOut
from edge_client.membership import Membership, Position, Redirected
from edge_client.saved_steps import SavedSteps
from edge_client.stopwatch import Stopwatch
from edge_client.training import train
from gpu_server import GpuServer
from gpu_server.federation import KeepHeldOutLoss, Reply
from gpu_server.history import EvaluationRecord, RunFiles
from gpu_server.serving import Observer
from protocol import (
    ActivationGradient,
    AdapterWeights,
    Done,
    Evaluation,
    EvaluationLoss,
    EvaluationStates,
    HeldOutLoss,
    Noted,
    RemoteProtocolError,
    RunEnd,
    RunSettings,
    Start,
)
from protocol.settings import SERVER_ABILITIES

STEPS = 7
RUNS: dict[str, dict[str, Any]] = {
    "rounds of one step": {},
    "rounds of three steps": {"aggregate_every": 3},
    "labels on the device": {"labels": "device"},
    "onnxruntime, labels on the device": {"labels": "device"},
    "delta": {"codec": "delta", "check_codec_every": 0},
    "noise": {
        "labels": "device",
        **{f"{kind}_{what}": 0.5 for kind in ("activation", "gradient") for what in ("noise", "clip")},
    },
}


@pytest.fixture
def settings(tiny_model: Path) -> dict[str, Any]:
    return {
        "model": str(tiny_model),
        "cut_layer": 2,
        "lora_rank": 4,
        "lora_dropout": 0.1,
        "steps": STEPS,
        "dtype": "float32",
        "micro_batches": 3,
        "checkpoint_every": 1,
    }


def device(pairs_file: Callable[..., Path], name: str, state: Path, **more: Any) -> dict[str, Any]:
    return {
        "data": pairs_file(name, 9, offset=len(name)),
        "eval_data": pairs_file(f"held-out-{name}", 5, offset=50),
        "batch_size": 3,
        "state_dir": state,
        **more,
    }


def evaluations(run_dir: Path) -> dict[tuple[str, int], float]:
    """Each by client and step; there are no two of the same."""
    records = list(RunFiles(run_dir).evaluations())
    found = {(record.client, record.step): record.loss for record in records}
    assert len(found) == len(records)
    return found


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in metrics(run_dir)]


@pytest.mark.parametrize("kind", RUNS)
def test_run_is_the_same_to_the_bit_with_and_without_evaluations(
    settings: dict[str, Any], tmp_path: Path, pairs_file: Callable[..., Path], kind: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr("edge_client.client_state.os.urandom", lambda size: b"s" * size)  # the same noise in both runs
    found = []
    for every in (None, 2):
        devices = {
            name: device(pairs_file, name, tmp_path / f"{every}-{name}", eval_every=every if name == "a" else None, in_flight=2)
            for name in ("a", "b")
        }
        for options in devices.values():
            del options["eval_data" if every is None else "in_flight"]
            if "onnxruntime" in kind:
                options.update(engine="onnxruntime", dtype="auto")
        run_dir = tmp_path / f"run-{every}"
        run_split({**settings, **RUNS[kind], "run_dir": str(run_dir)}, devices)
        found.append((adapter_bytes(run_dir), losses(run_dir)))
    assert found[0] == found[1]
    steps = [step for _, step in sorted(evaluations(run_dir))]
    # Within a round there is no adapter that all have: it is evaluated at the first end of a round behind the second step, ...
    assert steps == ([0, 3, 6, 7] if "aggregate_every" in RUNS[kind] else [0, 2, 4, 6, 7])


def test_what_the_server_is_told_is_the_loss_that_others_find_with_the_runs_adapter(
    settings: dict[str, Any], tmp_path: Path, pairs_file: Callable[..., Path]
) -> None:
    options = device(pairs_file, "a", tmp_path / "state", eval_every=3)
    result = run_split({**settings, "run_dir": str(tmp_path / "run")}, {"a": options})
    found = evaluations(tmp_path / "run")
    before, after = result.perplexity["a"]
    assert math.exp(found["a", 0]) == pytest.approx(before, rel=1e-12)
    assert math.exp(found["a", STEPS]) == pytest.approx(after, rel=1e-12)
    pairs = [(line["prompt"], line["completion"]) for line in map(json.loads, options["eval_data"].read_text().splitlines())]
    base = Path(settings["model"])
    samples = reference.encode(pairs, base)
    peft = reference.load_peft(base, tmp_path / "run/adapter")
    assert after == pytest.approx(reference.perplexity(peft, samples), rel=1e-4)
    (record, *_) = RunFiles(tmp_path / "run").evaluations()
    assert record.labelled_tokens == sum(len(tokens) - unlabelled for tokens, unlabelled in samples)


class Killed(BaseException):
    """A device is gone in the middle of what it does."""


@pytest.mark.parametrize(("kind", "aggregate_every"), [(Evaluation, 1), (HeldOutLoss, 3)])
def test_device_that_is_killed_while_it_evaluates_goes_on_and_its_loss_is_told_once(
    settings: dict[str, Any],
    tmp_path: Path,
    pairs_file: Callable[..., Path],
    kind: type,
    aggregate_every: int,
    monkeypatch: Any,
) -> None:
    options = {**settings, "aggregate_every": aggregate_every}
    for name in ("undisturbed", "run"):
        clients = {one: device(pairs_file, one, tmp_path / name / one, eval_every=3) for one in ("a", "b")}
        if name == "run":
            _kill_in(monkeypatch, kind, after_step=3)
            result = _run_with_restarts({**options, "run_dir": str(tmp_path / "run")}, clients)
        else:
            run_split({**options, "run_dir": str(tmp_path / name)}, clients)
    assert result == {"a": 2, "b": 1}
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "undisturbed")
    assert losses(tmp_path / "run") == losses(tmp_path / "undisturbed")
    assert evaluations(tmp_path / "run") == evaluations(tmp_path / "undisturbed")
    assert {step for _, step in evaluations(tmp_path / "run")} == {0, 3, 6, STEPS}


def _kill_in(monkeypatch: Any, kind: type, *, after_step: int) -> None:
    """Device a, once, when it has asked this and before it has the answer."""
    exchange, struck = Membership.exchange, threading.Event()

    def killing(self: Membership, question: Any, answer_kind: type) -> Any:
        answer = exchange(self, question, answer_kind)
        if type(question) is kind and self._hello.name == "a" and self.position.step == after_step and not struck.is_set():
            struck.set()
            raise Killed
        return answer

    monkeypatch.setattr(Membership, "exchange", killing)


def _run_with_restarts(server_options: dict[str, Any], clients: dict[str, dict[str, Any]]) -> dict[str, int]:
    """A run whose devices are started again when they were killed; how often each was started."""
    started = dict.fromkeys(clients, 0)

    def take_part(url: str, name: str, options: dict[str, Any]) -> None:
        while True:
            started[name] += 1
            try:
                with EdgeClient(
                    url, model=server_options["model"], name=name, engine="torch", dtype="float32", **options
                ) as client:
                    list(client.train())
                return
            except Killed:
                pass

    with GpuServer(port=0, clients=len(clients), **server_options) as server:
        threads = [threading.Thread(target=take_part, args=(server.url, name, options)) for name, options in clients.items()]
        for thread in threads:
            thread.start()
        list(server.train())
        for thread in threads:
            thread.join()
    return started


@pytest.mark.parametrize(
    ("aggregate_every", "evaluated", "checkpoint"), [(1, [0, 1, 2, 3, 4, 5], 4), (3, [0, 3], 0)], ids=["short", "long"]
)
def test_server_that_goes_back_forgets_what_was_evaluated_since_and_keeps_the_rest_once(
    settings: dict[str, Any],
    tmp_path: Path,
    pairs_file: Callable[..., Path],
    aggregate_every: int,
    evaluated: list[int],
    checkpoint: int,
) -> None:
    options = {**settings, "aggregate_every": aggregate_every, "checkpoint_every": 4}
    run_split(
        {**options, "run_dir": str(tmp_path / "undisturbed")}, {"a": device(pairs_file, "a", tmp_path / "other", eval_every=1)}
    )
    run_dir, port = tmp_path / "run", free_port()
    options = {**options, "port": port, "run_dir": str(run_dir)}
    as_before = device(pairs_file, "a", tmp_path / "state", eval_every=1)
    with GpuServer(**options) as server:
        client = EdgeClient(
            f"ws://127.0.0.1:{port}", engine="torch", model=settings["model"], name="a", dtype="float32", **as_before
        ).__enter__()
        steps = client.train()
        for _ in range(6):
            next(steps)
        server.suspend()
    assert [record.step for record in RunFiles(run_dir).evaluations()] == evaluated
    newest = sorted((run_dir / "checkpoints").glob("*.safetensors"))[-1]
    os.truncate(newest, newest.stat().st_size // 2)
    seen = Seen()
    again = GpuServer(**options, resume=True)
    again.observe(seen)
    with again:
        kept = [record.step for record in RunFiles(run_dir).evaluations()]
        list(steps)
        client.__exit__(None, None, None)
        list(again.train())
    assert kept == [step for step in evaluated if step <= checkpoint]
    assert evaluations(run_dir) == evaluations(tmp_path / "undisturbed")
    assert adapter_bytes(run_dir) == adapter_bytes(tmp_path / "undisturbed")
    assert [record.step for record in seen.records if isinstance(record, EvaluationRecord)][-1] == STEPS


class Seen(Observer):
    def __init__(self) -> None:
        self.records: list[Any] = []

    def step_finished(self, record: Any) -> None:
        self.records.append(record)

    def evaluated(self, record: EvaluationRecord) -> None:
        self.records.append(record)


def test_whoever_follows_a_run_hears_of_an_evaluation_behind_its_step(
    settings: dict[str, Any], tmp_path: Path, pairs_file: Callable[..., Path]
) -> None:
    seen = Seen()
    options = device(pairs_file, "a", tmp_path / "state", eval_every=2)
    server = GpuServer(**settings, port=0, run_dir=str(tmp_path / "run"))
    server.observe(seen)
    with server:
        with EdgeClient(server.url, engine="torch", model=settings["model"], name="a", dtype="float32", **options) as client:
            list(client.train())
            assert [found.step for found in client.evaluations] == [0, 2, 4, 6, 7]
        list(server.train())
    steps = [record.step if isinstance(record, EvaluationRecord) else record.number for record in seen.records]
    assert steps == sorted(steps)
    told = [record for record in seen.records if isinstance(record, EvaluationRecord)]
    assert [(each.loss, each.labelled_tokens) for each in told] == [
        (each.loss, each.labelled_tokens) for each in client.evaluations
    ]


# When


@pytest.mark.parametrize(
    ("every", "aggregate_every", "expected"),
    [(1, 1, [0, 1, 2, 3, 4, 5, 6]), (3, 1, [0, 3, 6]), (3, 4, [0, 4, 8]), (10, 4, [0, 12, 20]), (2, 4, [0, 4, 8])],
)
def test_it_is_evaluated_at_the_first_rounds_end_by_which_so_many_more_steps_are_done(
    every: int, aggregate_every: int, expected: list[int]
) -> None:
    membership: Any = type("M", (), {"welcome": type("W", (), {"abilities": ("held-out-loss",)})})()
    membership.welcome.settings = replace(usual(), aggregate_every=aggregate_every)
    nothing: Any = None
    held_out = HeldOut(nothing, 1, every, membership=membership, engine=nothing, disclosure=nothing, log=nothing)
    done: list[int] = []
    held_out.evaluate = done.append  # type: ignore[method-assign]
    for step in range(0, expected[-1] + 1, aggregate_every):
        held_out.evaluate_if_due(step)
    assert done == expected


# What the server makes of it


def held_out(table: Table, name: str, step: int, loss: float = 2.5) -> list[Any]:
    return table.federation.receive(name, HeldOutLoss(step=step, loss=loss, labelled_tokens=9), table.now)


def do_step(table: Table, step: int, *names: str) -> None:
    for name in names:
        table.activations(name, step)
    table.trained(*names)
    for name in names:
        table.contribute(name, step)
    table.aggregated()


def test_loss_is_kept_once_and_noted_as_often_as_it_is_told() -> None:
    table = Table({"a": 3, "b": 3})
    kept, reply = held_out(table, "a", 0)
    assert kept == KeepHeldOutLoss(client="a", step=0, loss=2.5, labelled_tokens=9)
    assert isinstance(reply, Reply)
    assert isinstance(reply.message, Noted)
    assert (reply.message.step, reply.message.reached) == (0, 0)
    assert kinds(held_out(table, "a", 0)) == [Reply]
    assert kinds(held_out(table, "b", 0)) == [KeepHeldOutLoss, Reply]
    do_step(table, 1, "a", "b")
    assert kinds(held_out(table, "a", 1)) == [KeepHeldOutLoss, Reply]


def test_loss_of_a_part_that_has_moved_on_is_not_kept_and_its_client_is_told() -> None:
    table = Table({"a": 1, "b": 3})
    do_step(table, 1, "a", "b")
    do_step(table, 2, "b")  # a has no data for it
    (noted,) = held_out(table, "a", 1)
    assert (noted.message.step, noted.message.reached) == (1, 2)


def test_loss_within_a_round_is_not_kept() -> None:
    table = Table({"a": 4}, aggregate_every=2)
    table.activations("a", 1)
    table.trained("a")
    assert kinds(held_out(table, "a", 1)) == [Reply]
    table.activations("a", 2)
    table.trained("a")
    assert kinds(held_out(table, "a", 2)) == [Reply]
    table.contribute("a", 2, AdapterWeights)
    table.aggregated()
    assert kinds(held_out(table, "a", 2)) == [KeepHeldOutLoss, Reply]


def test_loss_that_a_resumed_run_has_already_is_not_kept_again() -> None:
    before = Table({"a": 3})
    do_step(before, 1, "a")
    table = Table({"a": 3})
    table.federation.members.clear()  # a server that was started again knows nobody
    told = {"a": HeldOutLoss(step=1, loss=2.5, labelled_tokens=9)}
    table.federation.restore(1, 1, before.federation.membership(), before.federation.edge_adapter, 0.0, told=told)
    table.come_back("a", 1)
    assert kinds(held_out(table, "a", 1)) == [Reply]


@pytest.mark.parametrize(
    ("step", "loss", "noise", "said"),
    [
        (2, 1.0, 0.0, "HeldOutLoss of step 2, and the run has reached step 0"),
        (0, -1.0, 0.0, r"a says that its held-out texts lose -1; it may be 0 to 1e\+06"),
        (0, 2e6, 0.0, r"a says that its held-out texts lose 2e\+06; it may be 0 to 1e\+06"),
        (0, -2e6, 0.5, r"a says that its held-out texts lose -2e\+06; it may be -1e\+06 to 1e\+06"),
    ],
)
def test_loss_that_cannot_be_is_refused(step: int, loss: float, noise: float, said: str) -> None:
    noisy = {"labels": "device", "gradient_noise": noise, "gradient_clip": 1.0} if noise else {}
    table = Table({"a": 3}, **noisy)
    with pytest.raises(RemoteProtocolError, match=f"^{said}$"):
        held_out(table, "a", step, loss)


def test_time_of_an_evaluation_is_not_that_of_the_next_step() -> None:
    table = Table({"a": 3})
    table.now = 50.0
    held_out(table, "a", 0)
    table.now = 51.0
    assert table.federation.timing.away("a", table.now) == 1.0
    assert told(held_out(table, "a", 0), Noted) == ["a"]


# What its user may have got wrong


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"eval_every": 0}, "eval-every must be at least 1 step, got 0"),
        ({"eval_every": 5, "eval_data": None}, "eval-every 5 needs held-out texts: give --eval-data FILE"),
    ],
)
def test_what_cannot_be_evaluated_is_said_at_once(
    tmp_path: Path, pairs_file: Callable[..., Path], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(DataError, match=f"^{said}$"):
        EdgeClient("ws://127.0.0.1:1", **{**device(pairs_file, "a", tmp_path), **options})


def test_device_is_told_in_a_sentence_that_its_server_is_too_old_for_it(
    settings: dict[str, Any], tmp_path: Path, pairs_file: Callable[..., Path], monkeypatch: Any
) -> None:
    monkeypatch.setattr("gpu_server.federation.federation.SERVER_ABILITIES", ())
    as_before = device(pairs_file, "a", tmp_path / "state")
    with GpuServer(**settings, port=0, run_dir=str(tmp_path / "run")) as server:
        made = {"engine": "torch", "model": settings["model"], "name": "a", "dtype": "float32", **as_before}
        refused = r"takes no held-out losses: update it, or start this device without --eval-every$"
        with pytest.raises(DataError, match=refused), EdgeClient(server.url, **made, eval_every=2):
            raise AssertionError
        with EdgeClient(server.url, **made) as client:  # without it takes part as ever
            assert len(list(client.train())) == STEPS
        list(server.train())


def test_settings_have_nothing_of_it() -> None:
    """It is the device's own choice, and no server can ask for more of its held-out texts."""
    assert not [name for name in vars(usual()) if "eval" in name]
    assert isinstance(usual(), RunSettings)


# What a device makes of it, call by call


class Answering:
    """A `Membership` whose server answers at once, and has reached a step of its own."""

    def __init__(self, settings: RunSettings, reached: int) -> None:
        self.welcome: Any = type("Welcome", (), {"abilities": SERVER_ABILITIES, "settings": settings, "run": "r"})
        self.stopwatch, self.told, self._reached = Stopwatch(), list[HeldOutLoss](), reached

    def next_index(self) -> int:
        return 1

    def exchange(self, question: Any, answer_kind: type) -> Any:
        if isinstance(question, HeldOutLoss):
            self.told.append(question)
            return Noted(step=question.step, reached=self._reached)
        if answer_kind is EvaluationLoss:
            return EvaluationLoss(index=1, summed_loss=2.0 * len(question.labels))
        return EvaluationStates(index=1, values=np.ones((question.num_labelled, 2), np.float32))


def evaluating(settings: RunSettings, reached: int = 4) -> tuple[HeldOut, Answering]:
    server: Any = Answering(settings, reached)
    return HeldOut(
        DATA,
        2,
        1,
        membership=server,
        engine=NotingEngine([]),
        disclosure=Disclosure(settings, b"s" * 32),
        log=DeviceLog("a", None),
    ), server


def test_mean_of_all_batches_is_told() -> None:
    device, server = evaluating(usual())
    device.evaluate(4)
    (told,) = server.told
    assert (told.step, told.loss, told.labelled_tokens) == (4, 2.0, 6)
    assert [(found.step, found.perplexity) for found in device.evaluations] == [(4, pytest.approx(math.exp(2.0)))]


def test_loss_that_the_run_has_overtaken_does_not_count_and_the_user_is_told(caplog: pytest.LogCaptureFixture) -> None:
    device, _ = evaluating(usual(), reached=6)
    device.evaluate(4)
    assert device.evaluations == []
    assert caplog.messages == [
        "the run went on to step 6 while this device evaluated its held-out texts after step 4, so their loss is that of no "
        "adapter, and does not count; fewer texts in --eval-data, or a longer --step-deadline on the server, leave it the time"
    ]


def test_last_step_that_the_run_has_taken_again_is_evaluated_again_before_its_best_adapter_is_chosen(tmp_path: Path) -> None:
    """The server has gone back to a checkpoint before it, and has forgotten what it was told."""
    settings = usual(epochs=None, steps=3, final_adapter="best")
    device, membership = evaluating(settings, reached=3)
    batches = Batches(data=DATA, name="a", batch_size=1, shuffle=True, seed=settings.seed, num_parts=1)
    begun = Start(step=3, total_steps=3, adapter=TENSORS, round=3)
    told_before_done: list[list[int]] = []

    def exchange(question: Any, answer_kind: type) -> Any:
        if not isinstance(question, Done):
            return Answering.exchange(membership, question, answer_kind)
        told_before_done.append([told.step for told in membership.told])
        if len(told_before_done) == 1:
            raise Redirected(begun)
        return RunEnd(step=3, tensors=TENSORS)

    more: Any = {"position": Position(), "training_follows": lambda: None, "exchange": exchange}
    vars(membership).update(more)
    membership.welcome.restarts = 0
    engine: Any = NotingEngine([])
    train_to_its_end = train(
        membership,
        engine,
        batches,
        begun,
        disclosure=Disclosure(settings, b"s" * 32),
        saved_steps=SavedSteps(tmp_path),
        held_out=device,
    )
    assert list(train_to_its_end) == []
    assert told_before_done == [[3], [3, 3]]
    assert [found.step for found in device.evaluations] == [3, 3]


def test_where_losses_have_noise_the_held_out_one_has_and_the_device_itself_knows_it_exactly() -> None:
    noise = {"labels": "device", "gradient_noise": 0.5, "gradient_clip": 1.0}
    exact, noisy = evaluating(usual(labels="device")), evaluating(usual(**noise))
    for device, _ in (exact, noisy, noisy):
        device.evaluate(4)
    assert [found.loss for found in exact[0].evaluations] == [found.loss for found in noisy[0].evaluations[:1]] == [2.0]
    assert exact[1].told[0].loss == 2.0
    first, again = (told.loss for told in noisy[1].told)
    assert first == again != 2.0  # told again, it tells no more


def test_held_out_loss_is_told_again_on_the_next_connection_unless_the_run_stands_elsewhere() -> None:
    question = HeldOutLoss(step=2, loss=1.0, labelled_tokens=3)
    for step, round_, answered in ((2, 2, True), (3, 2, False), (1, 2, True)):  # the last: its own data ended after step 1
        here = World([welcome(), start(2), LOST], [welcome(), start(step, round=round_), Noted(step=2, reached=2)])
        member = here.member()
        member.start(JOIN)
        if answered:
            assert member.exchange(question, Noted).step == 2
            assert isinstance(here.made[1].asked[-1], HeldOutLoss)
        else:
            with pytest.raises(Redirected, match="go on after step 3"):
                member.exchange(question, Noted)


def test_training_that_evaluates_is_sent_elsewhere_once() -> None:
    back = welcome(restarts=1)
    here = World([welcome(), start(), LOST], [back, start(), gradient(1)])
    member = here.member()
    member.start(JOIN)
    with pytest.raises(Redirected):
        member.exchange(evaluation(1), EvaluationLoss)
    member.training_follows()
    assert member.exchange(activations(1), ActivationGradient).step == 1
