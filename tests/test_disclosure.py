"""What of a device's texts leaves it: what a run may take, what it is given, and what the user is told."""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import adapter_bytes, run_in_thread
from protocol_samples import SETTINGS

import edge_client.cli
from edge_client import DataError, EdgeClient, TooMuchDisclosed
from edge_client.client_state import ClientState
from edge_client.data import Batch, Sample, pack
from edge_client.disclosure import LOSS_CAP, Demands, Disclosure
from edge_client.membership import Membership
from gpu_server import GpuServer
from privacy import SECRET_BYTES, Centre
from protocol import RunSettings

SECRET = b"s" * 32
READ = replace(SETTINGS, check_codec_every=0)
"""A run whose server has the labels."""
KEPT = replace(READ, labels="device")
NOISY = replace(KEPT, label_rows="hidden", activation_noise=0.5, activation_clip=4.0, gradient_noise=0.25, gradient_clip=2.0)


def batch() -> Batch:
    """Sequences of 4, 1 and 2 rows, of which the last 2, 1 and 0 have a label."""
    samples = [(np.arange(5), 2), (np.array([8, 9]), 1), (np.arange(3), 0)]
    return pack([Sample(tokens.astype(np.int32), num_labels) for tokens, num_labels in samples])


# What is sent


def test_labels_leave_the_device_only_where_the_server_has_them() -> None:
    for settings in (READ, KEPT, NOISY):
        disclosure = Disclosure(settings, SECRET)
        assert disclosure.labels(batch()).tolist() == ([3, 4, 9] if settings is READ else [])
        assert disclosure.label_counts(batch()).tolist() == ([4, 1, 2] if settings is NOISY else [2, 1, 0])


def test_rows_with_a_label_are_the_last_of_every_sequence() -> None:
    rows, hidden = np.arange(7, dtype=np.float32)[:, None], Disclosure(NOISY, SECRET)
    assert hidden.of_labelled_rows(rows, batch()).ravel().tolist() == [2, 3, 4]
    assert hidden.of_all_rows(np.ones((3, 1), np.float32), batch()).ravel().tolist() == [0, 0, 1, 1, 1, 0, 0]


def test_all_rows_that_are_shown_have_a_label() -> None:
    rows, shown = np.arange(3, dtype=np.float64)[:, None], Disclosure(KEPT)
    assert np.array_equal(shown.of_labelled_rows(rows, batch()), rows)
    assert np.array_equal(shown.of_all_rows(rows, batch()), rows)
    assert shown.of_all_rows(rows[:0], pack([])).shape == (0, 1)


def test_without_noise_nothing_is_changed() -> None:
    values = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    assert Disclosure(KEPT).activations(values, batch(), 1, 0) is values
    assert Disclosure(KEPT).gradient(values, 1, 0) is values


def test_activations_are_clipped_around_their_public_centre() -> None:
    settings = replace(KEPT, activation_clip=1.0)
    centre = Centre(first=np.full(3, 100, np.float32), later=np.full(3, -5, np.float32))
    sent = Disclosure(settings, SECRET, centre).activations(np.zeros((7, 3), np.float32), batch(), 1, 0)
    expected = np.full((7, 3), -5 + 1 / np.sqrt(3))
    expected[[0, 4, 5]] = 100 - 1 / np.sqrt(3)
    np.testing.assert_allclose(sent, expected, rtol=1e-6)


def test_what_is_sent_for_one_thing_has_no_noise_of_another() -> None:
    zeros, disclosure = np.zeros((7, 3), np.float32), Disclosure(NOISY, SECRET)
    sent = [
        *(disclosure.activations(zeros, batch(), *purpose) for purpose in ((1, 0), (1, 1), (2, 0), ("held out", 1))),
        2 * disclosure.activations(zeros, batch(), "held out", 2),
        *(4 * disclosure.gradient(zeros, *purpose) for purpose in ((1, 0), (1, 1))),  # its sigma x C is a quarter
    ]
    for number, one in enumerate(sent):
        assert (one != 0).all()
        for other in sent[:number]:
            assert (one != other).all()
    assert np.array_equal(sent[0], Disclosure(NOISY, SECRET).activations(zeros, batch(), 1, 0))


def test_sum_of_losses_has_noise_where_the_gradient_has() -> None:
    losses, exact, noisy = np.array([1.5, 30.0, 2.0], np.float32), Disclosure(KEPT), Disclosure(NOISY, SECRET)
    assert exact.summed_loss(losses, 1, 0) == 33.5
    clipped_alone = Disclosure(replace(KEPT, gradient_clip=2.0), SECRET)
    assert clipped_alone.summed_loss(losses, 1, 0) == 33.5
    draws = np.array([noisy.summed_loss(losses, 1, number) for number in range(400)])
    spread = NOISY.gradient_noise * LOSS_CAP
    assert abs(draws.mean() - (1.5 + LOSS_CAP + 2.0)) < 4 * spread / 20  # a label counts no more than the cap
    assert 0.85 * spread < draws.std() < 1.15 * spread
    assert noisy.summed_loss(losses, 1, 0) == draws[0]
    assert noisy.summed_loss(losses[:0], 1, 0) != 0.0  # whether there was any label is not told either


# What a user demands


@pytest.mark.parametrize(
    ("demands", "settings", "refused"),
    [
        (Demands(), READ, None),
        (Demands(), NOISY, None),
        (Demands(labels="device"), KEPT, None),
        (Demands("device", 0.5, 0.25), NOISY, None),
        (
            Demands(labels="device"),
            READ,
            "run r sends the labels, the token ids of what is learnt, to the server, and --labels device forbids it; start the "
            "server with --labels device",
        ),
        (
            Demands(activation_noise=0.1),
            KEPT,
            "run r puts no noise on activations, and this device demands --activation-noise 0.1; start the server with that "
            "much and --activation-clip",
        ),
        (
            Demands(activation_noise=0.5, gradient_noise=0.5),
            NOISY,
            "run r puts noise of 0.25 times the clip on gradients at the hidden states, and this device demands "
            "--gradient-noise 0.5; start the server with that much and --gradient-clip",
        ),
        (Demands(gradient_noise=0.5), READ, "run r puts no noise on gradients at the hidden states, and .*"),
    ],
)
def test_run_that_takes_more_than_the_user_allows_is_refused(
    demands: Demands, settings: RunSettings, refused: str | None
) -> None:
    if refused is None:
        demands.check(settings, "r")
    else:
        with pytest.raises(TooMuchDisclosed, match=f"^{refused}$"):
            demands.check(settings, "r")


@pytest.mark.parametrize(
    ("demands", "wrong"),
    [
        ({"labels": "nobody"}, "labels must be server or device, got 'nobody'"),
        ({"activation_noise": -0.5}, "activation-noise must be at least 0, got -0.5"),
        ({"gradient_noise": float("nan")}, "gradient-noise must be at least 0, got nan"),
        ({"gradient_noise": float("inf")}, "gradient-noise must be at least 0, got inf"),
    ],
)
def test_demand_that_is_none_is_said(pairs_file: Callable[..., Path], demands: dict[str, Any], wrong: str) -> None:
    with pytest.raises(DataError, match=f"^{re.escape(wrong)}$"):
        EdgeClient("ws://127.0.0.1:1", data=pairs_file("a", 1), **demands)


Serve = Callable[..., Any]


@pytest.fixture
def serve(tiny_model: Path, tmp_path: Path) -> Serve:
    @contextmanager
    def serve(**settings: Any) -> Iterator[GpuServer]:
        usual = {"cut_layer": 1, "steps": 1, "port": 0, "dtype": "float32"}
        with GpuServer(model=str(tiny_model), **{**usual, "run_dir": tmp_path / "run", **settings}) as server:
            yield server
            server.stop()

    return serve


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
def test_device_that_refuses_has_told_the_server_its_name_and_nothing_else(
    serve: Serve, tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path], monkeypatch: Any, engine: str
) -> None:
    said = []
    monkeypatch.setattr("edge_client.connection.Session.send", _noting(said))
    model = {"model": str(tiny_model)} if engine == "torch" else {}
    options = {"data": pairs_file("a", 3), "name": "a", "state_dir": tmp_path / "state", "engine": engine}
    with serve() as server:
        device = EdgeClient(server.url, labels="device", **options, **model)
        with pytest.raises(TooMuchDisclosed, match="--labels device forbids it"):
            device.__enter__()
        assert server.url
    assert [kind for kind in said if kind != "Ping"] == ["Hello"]
    assert not ClientState(tmp_path / "state", server.url, "a").is_in_a_run


def _noting(said: list[str]) -> Callable[..., bytes]:
    from protocol import Session

    send = Session.send

    def noted(session: Session, message: Any) -> bytes:
        if session.side.value == "client":
            said.append(type(message).__name__)
        return send(session, message)

    return noted


def test_refusing_is_one_sentence_at_the_command_line(
    serve: Serve, tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with serve(labels="device") as server:
        flags = ["--gradient-noise", "0.5", "--model", str(tiny_model), "--engine", "torch", "--dtype", "float32"]
        place = ["--server", server.url, "--name", "a", "--state-dir", str(tmp_path / "state")]
        assert edge_client.cli.main(["train", *place, "--data", str(pairs_file("a", 3)), *flags]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(
        r"run [\w-]+ puts no noise on gradients at the hidden states, .* demands --gradient-noise 0\.5; start", line
    )


# A device that is killed


class Killed(BaseException):
    """Nothing of the device's own catches it."""


@pytest.mark.parametrize("aggregate_every", [1, 2])
def test_device_that_is_killed_while_it_replies_sends_the_same_noise_when_it_is_back(
    serve: Serve, tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path], monkeypatch: Any, aggregate_every: int
) -> None:
    settings = {
        f"{kind}_{what}": value for kind in ("activation", "gradient") for what, value in (("noise", 0.1), ("clip", 5.0))
    }
    settings.update(labels="device", label_rows="hidden", steps=4, micro_batches=2, aggregate_every=aggregate_every)
    reply, draw, outcomes = Membership.reply, os.urandom, []
    for killed in (False, True):
        secrets = iter([b"s" * 32, b"t" * 32])  # whoever makes a second one has lost the first
        monkeypatch.setattr(os, "urandom", lambda size, own=secrets: next(own) if size == SECRET_BYTES else draw(size))
        replies = 0

        def counted(membership: Membership, message: Any, killed: bool = killed) -> None:
            nonlocal replies
            replies += 1
            if killed and replies == 6:  # the second of step 3
                raise Killed
            reply(membership, message)

        monkeypatch.setattr(Membership, "reply", counted)
        options = {"model": str(tiny_model), "engine": "torch", "dtype": "float32", "state_dir": tmp_path / f"state-{killed}"}
        device = {"data": pairs_file("a", 5), "batch_size": 2, "name": "a", **options}
        run_dir = tmp_path / f"run-{killed}"
        with serve(run_dir=run_dir, **settings) as server:
            ended = run_in_thread(lambda server=server: list(server.train()))
            with suppress(Killed), EdgeClient(server.url, **device) as client:
                list(client.train())
            if killed:
                assert not ended.done()
                with EdgeClient(server.url, **device) as client:
                    list(client.train())
            outcomes.append(([record.loss for record in ended.result(timeout=60)], adapter_bytes(run_dir)))
    assert outcomes[0] == outcomes[1]


# What a user is told


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (READ, "this device sends activations (no noise), and the labels as token ids"),
        (KEPT, "this device keeps the labels, and sends activations (no noise) and gradients at the hidden states (no noise)"),
        (
            NOISY,
            "this device keeps the labels, and sends activations (clipped to 4, noise 0.5 times that) and gradients at the "
            "hidden states (clipped to 2, noise 0.25 times that)",
        ),
        (
            replace(READ, activation_clip=4.0),
            "this device sends activations (clipped to 4, no noise), and the labels as token ids",
        ),
    ],
)
def test_what_leaves_the_device_is_said_in_one_sentence(settings: RunSettings, said: str) -> None:
    assert str(Disclosure(settings, SECRET)) == said


def test_device_says_what_its_noise_is_worth_as_the_server_does(
    serve: Serve, tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path], monkeypatch: Any
) -> None:
    pytest.importorskip("dp_accounting")
    options = {"model": str(tiny_model), "engine": "torch", "dtype": "float32", "state_dir": tmp_path / "state", "name": "a"}
    with serve(labels="device", gradient_noise=1.0, gradient_clip=2.0, steps=7) as server:
        ended = run_in_thread(lambda: list(server.train()))
        with EdgeClient(server.url, data=pairs_file("a", 6), batch_size=2, **options) as client:
            report = client.noise_report()
            assert report is not None
            assert (report.visits, report.longest) == (3, client.data.longest)
            with monkeypatch.context() as without:
                without.setitem(sys.modules, "dp_accounting", None)
                assert client.noise_report() is None
            list(client.train())
        ended.result(timeout=60)
    assert json.loads((tmp_path / "run/run.json").read_text())["noise"] == {"a": report.as_json()}


def test_run_without_noise_has_none_to_report(
    serve: Serve, tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(tiny_model), "--engine", "torch", "--dtype", "float32", "--state-dir", str(tmp_path / "state")]
    with serve(labels="device") as server:
        ended = run_in_thread(lambda: list(server.train()))
        data = str(pairs_file("a", 2))
        assert edge_client.cli.main(["train", "--server", server.url, "--name", "a", "--data", data, *words]) == 0
        ended.result(timeout=60)
    said = capsys.readouterr().err
    assert (
        "; this device keeps the labels, and sends activations (no noise) and gradients at the hidden states (no noise);"
        in said
    )
    assert "epsilon" not in said


def test_centre_of_activations_tells_nothing_of_the_data(
    serve: Serve, tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path], monkeypatch: Any
) -> None:
    """It is a function of the base model, whatever a device has, and wherever the run stands."""
    found = []
    monkeypatch.setattr("edge_client.client.Disclosure", lambda settings, secret, centre: found.append((secret, centre)))
    with serve(activation_clip=10.0, activation_noise=0.5) as server:
        for name in "ab":
            options = {"model": str(tiny_model), "name": name, "state_dir": tmp_path / name, "engine": "torch"}
            data = pairs_file(name, 3, 10 * ord(name))
            EdgeClient(server.url, data=data, dtype="float32", **options).__enter__()._membership.hang_up()
    (secret, centre), (other_secret, other) = found
    assert secret != other_secret
    assert np.array_equal(centre.first, other.first)
    assert np.array_equal(centre.later, other.later)
    assert not np.allclose(centre.first, centre.later)
