"""What noise is worth, against the definition of (epsilon, delta), computed apart."""

import json
import math
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from decimal import Decimal
from functools import partial
from typing import Any
from unittest.mock import MagicMock

import dp_accounting
import numpy as np
import pytest
from conftest import REPOSITORY
from protocol_samples import SETTINGS

from edge_client.data import Dataset
from edge_client.disclosure import LOSS_CAP, Disclosure
from privacy import SECRET_BYTES, NoiseReport, NoiseWorth, visits_of, worth
from privacy.accounting import apart_in_activations, apart_in_gradients


def delta_of(epsilon: float, sigma: float, releases: int, rows: int) -> float:
    """
    By the definition: of what is released of either of two inputs whose rows are 2 apart, project on the line between them (no
    other direction tells them apart); delta is how much more mass the one has than e^epsilon times the other where that is the
    likelier. Both are Gaussians of deviation sigma, 2 sqrt(releases rows) apart.
    """
    apart = 2 * math.sqrt(releases * rows) / sigma
    threshold = epsilon / apart + apart / 2  # where their densities' ratio is e^epsilon, from the mean of the other
    # erfc of what is far out is less than floats hold times e^epsilon, so both are multiplied as logarithms.
    mass, other = (log_tail(threshold - shift) for shift in (apart, 0.0))
    return float(Decimal(mass).exp() - Decimal(epsilon + other).exp())


def log_tail(x: float) -> float:
    """The logarithm of a Gaussian's mass beyond x: by Laplace's continued fraction where erfc is 0."""
    if x < 30:
        return math.log(0.5 * math.erfc(x / math.sqrt(2)))
    fraction = x
    for k in range(60, 0, -1):
        fraction = x + k / fraction
    return -x * x / 2 - math.log(fraction * math.sqrt(2 * math.pi))


@pytest.mark.parametrize("delta", [1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize(("releases", "rows"), [(1, 1), (10, 1), (1, 54), (5, 54), (300, 1)])
@pytest.mark.parametrize("sigma", [0.1, 0.5, 2.0, 10.0, 200.0])
def test_epsilon_is_the_smallest_with_that_delta(sigma: float, releases: int, rows: int, delta: float) -> None:
    epsilon = worth(sigma, releases, delta, rows)
    assert epsilon >= 0
    if epsilon == 0:
        assert delta_of(0.0, sigma, releases, rows) <= delta
    else:
        assert delta_of(epsilon, sigma, releases, rows) == pytest.approx(delta, rel=1e-5)
        assert (
            delta_of(epsilon * (1 + 1e-4), sigma, releases, rows)
            < delta
            < delta_of(epsilon * (1 - 1e-4), sigma, releases, rows)
        )


@pytest.mark.parametrize(("sigma", "releases"), [(2.0, 1), (2.0, 5), (20.0, 300)])
def test_epsilon_is_not_more_than_either_accountant_of_compositions_says(sigma: float, releases: int) -> None:
    one = dp_accounting.GaussianDpEvent(sigma / 2)
    exact = worth(sigma, releases, 1e-6)
    relation = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE  # the event's multiplier is of the sensitivity already
    losses = dp_accounting.pld.PLDAccountant(relation).compose(one, releases).get_epsilon(1e-6)
    divergences = dp_accounting.rdp.RdpAccountant(neighboring_relation=relation).compose(one, releases).get_epsilon(1e-6)
    assert exact == pytest.approx(losses, rel=1e-6)
    assert exact < divergences < 1.1 * exact


def test_figures_of_the_documentation_are_those_of_the_accountant() -> None:
    text = (REPOSITORY / "docs" / "training.md").read_text(encoding="utf-8")
    table = re.findall(
        r"^\| ([\d.]+) \| ([\d.,]+) \| ([\d.,]+) \| ([\d.,]+) \| ([\d.,]+) \| ([\d.,]+) \| ([\d.,]+) \|$", text, re.M
    )
    assert len(table) == 6
    for sigma, *written in table:
        made = report(activation_noise=float(sigma), gradient_noise=float(sigma), visits=5)
        figures = [epsilon for what in ("activations", "gradients") for epsilon in vars(made.worth[what]).values()]
        for epsilon, shown in zip(figures, written, strict=True):
            places = len(shown.partition(".")[2])
            assert float(shown.replace(",", "")) == round(epsilon, places), sigma


def test_epsilon_without_noise_is_infinite() -> None:
    assert worth(0.0, 1, 1e-6) == math.inf


@pytest.mark.parametrize(("sigma", "expected"), [(1e-300, math.inf), (1e-4, math.inf), (1e-2, 2e10), (1e10, 0), (1e300, 0)])
def test_epsilon_is_computed_for_any_sigma_without_a_warning(sigma: float, expected: float) -> None:
    assert worth(sigma, 1000, 1e-6, rows=1000) == pytest.approx(expected, rel=1e-2)


def test_figures_of_a_device_are_of_a_row_once_at_its_visits_and_of_a_text() -> None:
    figures = NoiseWorth.of(partial(apart_in_activations, 4.0), visits=10, longest=54, delta=1e-6)
    assert figures.row_once == worth(4.0, 1, 1e-6) == pytest.approx(2.23, abs=0.2)
    assert figures.row == pytest.approx(worth(4.0, 10, 1e-6), rel=1e-12)
    assert figures.text == pytest.approx(worth(4.0, 540, 1e-6), rel=1e-12)
    assert figures.row_once < figures.row < figures.text


@pytest.mark.parametrize("module", ["privacy", "edge_client.client", "gpu_server.sdk"])
def test_who_adds_no_noise_does_not_wait_for_the_accountant(module: str) -> None:
    if module.startswith("gpu_server"):
        pytest.importorskip("torch")
    check = f"import sys, {module}; sys.exit(bool({{'dp_accounting', 'scipy'}} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", check], check=True)


# What a device is told


def report(**changes: Any) -> NoiseReport:
    usual = {"activation_noise": 4.0, "gradient_noise": 3.0, "labels": "device", "delta": 1e-6, "visits": 10, "longest": 54}
    return NoiseReport.of(**{**usual, **changes})


def test_report_is_of_each_thing_that_is_sent_with_noise_and_of_both_together() -> None:
    figures = report().worth
    assert figures["activations"].text == worth(4.0, 10, 1e-6, rows=54)
    # What is released of two texts at ten visits, as one vector each: every row is 2 clips from the other text's, and every sum
    # of losses 54 caps.
    rows, losses = np.full(540, 2.0), np.full(10, 54.0)
    gradients = np.concatenate((rows, losses)) / 3.0
    apart = float(np.linalg.norm(gradients))
    assert figures["gradients"].text == pytest.approx(worth(2 / apart, 1, 1e-6), rel=1e-9)
    apart = float(np.linalg.norm(np.concatenate((rows / 4.0, gradients))))
    assert figures["both together"].text == pytest.approx(worth(2 / apart, 1, 1e-6), rel=1e-9)
    assert figures["gradients"].row_once == pytest.approx(worth(3.0 * 2 / math.sqrt(5), 1, 1e-6), rel=1e-9)


def test_another_label_moves_what_is_sent_of_it_no_further_than_the_figures_assume() -> None:
    settings = replace(SETTINGS, labels="device", check_codec_every=0, gradient_noise=1e-9, gradient_clip=2.0)
    of_device = Disclosure(settings, bytes(SECRET_BYTES))
    rows = [of_device.gradient(np.full((1, 4), value), 1, 0) / 2.0 for value in (-1e9, 1e9)]
    sums = [of_device.summed_loss(np.array([value, 3.0]), 1, 0) / LOSS_CAP for value in (0.0, 1e9)]
    moved = math.hypot(float(np.linalg.norm(rows[1] - rows[0])), sums[1] - sums[0])
    assert moved == pytest.approx(apart_in_gradients(1.0, 1), rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "of", "not_covered"),
    [
        ({}, {"activations", "gradients", "both together"}, []),
        ({"activation_noise": 0.0}, {"gradients"}, ["activations, which give the text back"]),
        ({"gradient_noise": 0.0}, {"activations"}, ["gradients at the hidden states, which name the labels"]),
        ({"gradient_noise": 0.0, "labels": "server"}, {"activations"}, ["the labels, which the server reads"]),
    ],
)
def test_report_names_what_is_sent_without_noise(changes: dict[str, Any], of: set[str], not_covered: list[str]) -> None:
    made = report(**changes)
    assert made.worth.keys() == of
    assert list(made.not_covered) == [*not_covered, "lengths and numbers of labels", "the adapter's gradients"]
    assert str(made).endswith(f". Not covered: {'; '.join(made.not_covered)}")


def test_report_is_a_sentence_and_a_table() -> None:
    made = report(activation_noise=0.0, gradient_noise=0.5, visits=1)
    figures = made.worth["gradients"]
    once, text = figures.row_once, figures.text
    assert figures.row == once
    assert str(made).startswith(
        f"what its noise is worth, as epsilons at delta 1e-06: gradients, a row sent once {once:.3g}, a row in the run "
        f"{once:.3g}, a text of 54 rows {text:,.0f} (beyond 10 it promises next to nothing). Not covered: activations"
    )
    assert json.loads(json.dumps(made.as_json(), allow_nan=False)) == {
        "delta": 1e-6,
        "visits": 1,
        "longest": 54,
        "worth": {"gradients": {"row_once": once, "row": once, "text": text}},
        "not_covered": list(made.not_covered),
    }
    assert report(gradient_noise=0.0, activation_noise=1e-6).as_json()["worth"]["activations"]["text"] is None


@pytest.mark.parametrize("changes", [{"steps": 10}, {"epochs": 3}])
@pytest.mark.parametrize(("num_samples", "batch_size"), [(9, 4), (8, 4), (3, 4), (1, 1)])
def test_visits_are_those_of_the_batches(changes: dict[str, int], num_samples: int, batch_size: int) -> None:
    settings = replace(SETTINGS, **{"steps": None, "epochs": None, **changes})
    last_step = settings.steps_of_client(num_samples, batch_size)
    visits: Counter[int] = Counter()
    samples = MagicMock(folder=None, __len__=lambda _: num_samples)
    for step in range(1, last_step + 1):
        visits.update(Dataset(samples).order(step, batch_size, ("order",)))
    assert visits_of(last_step, num_samples, batch_size) == max(visits.values())


def test_run_without_noise_has_no_report() -> None:
    client = {"steps": 9, "num_samples": 9, "batch_size": 4, "longest": 54}
    assert NoiseReport.in_run(replace(SETTINGS, activation_clip=1.0, activation_noise=0.0), **client) is None
