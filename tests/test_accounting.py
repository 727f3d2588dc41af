"""What noise is worth, against the definition of (epsilon, delta), computed apart."""

import math
import subprocess
import sys
from decimal import Decimal

import pytest

dp_accounting = pytest.importorskip("dp_accounting")

from privacy import NoiseWorth, worth  # noqa: E402


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


@pytest.mark.parametrize(("sigma", "releases"), [(2.0, 1), (2.0, 30), (10.0, 300)])
def test_epsilon_is_not_more_than_either_accountant_of_compositions_says(sigma: float, releases: int) -> None:
    one = dp_accounting.GaussianDpEvent(sigma / 2)
    exact = worth(sigma, releases, 1e-6)
    relation = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE  # the event's multiplier is of the sensitivity already
    losses = dp_accounting.pld.PLDAccountant(relation).compose(one, releases).get_epsilon(1e-6)
    divergences = dp_accounting.rdp.RdpAccountant(neighboring_relation=relation).compose(one, releases).get_epsilon(1e-6)
    assert exact == pytest.approx(losses, rel=1e-6)
    assert exact < divergences < 1.1 * exact


def test_epsilon_without_noise_is_infinite() -> None:
    assert worth(0.0, 1, 1e-6) == math.inf


@pytest.mark.parametrize(("sigma", "expected"), [(1e-300, math.inf), (1e-4, math.inf), (1e-2, 2e10), (1e10, 0), (1e300, 0)])
def test_epsilon_is_computed_for_any_sigma_without_a_warning(sigma: float, expected: float) -> None:
    assert worth(sigma, 1000, 1e-6, rows=1000) == pytest.approx(expected, rel=1e-2)


def test_figures_of_a_device_are_of_a_row_once_at_its_visits_and_of_a_text() -> None:
    figures = NoiseWorth.of(4.0, visits=10, longest=54, delta=1e-6)
    assert figures.row_once == worth(4.0, 1, 1e-6) == pytest.approx(2.23, abs=0.2)
    assert figures.row == worth(4.0, 10, 1e-6)
    assert figures.text == worth(4.0, 540, 1e-6)
    assert figures.row_once < figures.row < figures.text


@pytest.mark.parametrize("module", ["privacy", "edge_client.client", "gpu_server.sdk"])
def test_who_adds_no_noise_does_not_wait_for_the_accountant(module: str) -> None:
    check = f"import sys, {module}; sys.exit(bool({{'dp_accounting', 'scipy'}} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", check], check=True)
