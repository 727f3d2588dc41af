"""Noise of the device's own: what it adds, that it is as random as it says, and that it is the same only where it must be."""

import math
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from privacy import SECRET_BYTES, Centre, GaussianNoise, clipped, public_token_ids
from protocol import Array

SECRET = bytes(range(SECRET_BYTES))
PURPOSE = ("activations", 3, 0)


def rows(n: int = 40, width: int = 768, dtype: str = "float64", scale: float = 1.0) -> Array:
    values: Array = (np.random.default_rng(n).standard_normal((n, width)) * scale).astype(dtype)
    return values


def noise_on(values: Array, purpose: tuple[str | int, ...] = PURPOSE, *, secret: bytes = SECRET, **options: Any) -> Array:
    """What is added to rows that no clip shortens, in units of sigma times the clip."""
    clip, sigma = 1e3, options.pop("sigma", 1.0)
    noisy: Array = GaussianNoise(secret, sigma=sigma, clip=clip)(values, purpose, **options)
    added: Array = (noisy - values) / (sigma * clip)
    return added


# Clipping


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rows_beyond_the_clip_are_shortened_to_it_and_others_are_not_touched(dtype: str) -> None:
    values = rows(dtype=dtype) * np.geomspace(1e-3, 1e3, 40)[:, None].astype(dtype)
    clip = float(np.median(np.linalg.norm(values, axis=1)))
    shortened = GaussianNoise(SECRET, sigma=0.0, clip=clip)(values, PURPOSE)
    assert shortened.dtype == values.dtype
    norms = np.linalg.norm(values.astype("float64"), axis=1)
    np.testing.assert_array_equal(shortened[norms <= clip], values[norms <= clip])
    expected = values.astype("float64") / norms[:, None] * clip
    tolerance = 4 * np.finfo(dtype).eps
    np.testing.assert_allclose(shortened[norms > clip], expected[norms > clip], rtol=tolerance)
    assert np.linalg.norm(shortened.astype("float64"), axis=1).max() <= clip * (1 + tolerance)


def test_row_of_zeros_is_clipped_without_a_warning() -> None:
    np.testing.assert_array_equal(clipped(np.zeros((2, 8)), 1.0), np.zeros((2, 8)))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rows_are_clipped_around_their_centre(dtype: str) -> None:
    centre = rows(2, dtype=dtype, scale=50.0)[:1]
    values = centre + rows(dtype=dtype)
    near = GaussianNoise(SECRET, sigma=0.0, clip=1.0)(values, PURPOSE, centre)
    distances = np.linalg.norm((near - centre).astype("float64"), axis=1)
    np.testing.assert_allclose(distances, 1.0, rtol=1e-3 if dtype == "float32" else 1e-12)
    far = GaussianNoise(SECRET, sigma=0.0, clip=1e3)(values, PURPOSE, centre)
    np.testing.assert_allclose(far, values, rtol=4 * np.finfo(dtype).eps, atol=1e-5 if dtype == "float32" else 1e-14)


def test_without_clip_and_noise_values_are_what_they_were() -> None:
    values = rows(dtype="float32")
    assert GaussianNoise(SECRET, sigma=0.0, clip=0.0)(values, PURPOSE) is values


# The noise is Gaussian


@pytest.mark.parametrize(("dtype", "sigma"), [("float32", 0.3), ("float64", 0.3), ("float64", 30.0)])
def test_noise_has_the_mean_and_the_deviation_that_it_should(dtype: str, sigma: float) -> None:
    added = noise_on(rows(500, dtype=dtype), sigma=sigma).ravel()
    n = added.size
    assert abs(added.mean()) < 5 / math.sqrt(n)
    assert abs(added.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((added**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((added**4).mean() - 3) < 5 * math.sqrt(96 / n)


def test_noise_is_distributed_as_a_gaussian_up_to_its_tails() -> None:
    """Kolmogorov and Smirnov's distance, and the numbers beyond 3 and 4 deviations, against the error function."""
    added = np.sort(noise_on(rows(1300)).ravel())
    n = added.size
    cdf = np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in added[::50]])
    assert np.abs(cdf - (np.arange(n)[::50] + 0.5) / n).max() < 2.2 / math.sqrt(n)  # exceeded once in 10,000
    for beyond in (3.0, 4.0):
        expected = n * math.erfc(beyond / math.sqrt(2))
        assert abs((np.abs(added) > beyond).sum() - expected) < 5 * math.sqrt(expected)


def test_noise_of_elements_rows_and_blocks_is_independent() -> None:
    added = noise_on(rows(1000, 256))  # four blocks
    bound = 5 / math.sqrt(added.size / 2)
    for one, other in (
        (added[:, :-1], added[:, 1:]),
        (added[:-1], added[1:]),
        (added[:500], added[500:]),
        (added[:250], added[250:500]),
        (added[:128].ravel()[: 2**14], added[:128].ravel()[2**14 :]),  # both numbers of Box and Muller's pairs
    ):
        assert abs((one * other).mean()) < bound * math.sqrt(added.size / 2 / one.size)
        assert abs(((one**2 - 1) * (other**2 - 1)).mean()) < 2 * bound * math.sqrt(added.size / 2 / one.size)


@pytest.mark.parametrize("sigma", [1e-3, 0.7, 30.0])
def test_lowest_bits_of_what_is_sent_tell_nothing_of_the_value(sigma: float) -> None:
    """All that is sent lies on one grid, of powers of two, that is fine beside the noise."""
    noise, values = GaussianNoise(SECRET, sigma=sigma, clip=4.0), rows(8)
    grid = sigma * 4.0 * 2.0**-20
    for sent in (noise(values, PURPOSE), noise.on_bounded(values, PURPOSE), noise(values / 3, PURPOSE)):
        exponents = [math.frexp(number)[1] - 53 + trailing_zeros(number) for number in sent.ravel() if number]
        assert grid / 2 < 2.0 ** min(exponents) <= 2 * grid


def trailing_zeros(number: float) -> int:
    """Of the 53 bits of a float's significand."""
    significand = int(math.ldexp(math.frexp(abs(number))[0], 53))
    return (significand & -significand).bit_length() - 1


def test_what_is_bounded_by_itself_gets_noise_and_is_not_clipped() -> None:
    sums = np.full((1, 10_000), 500.0)
    added = GaussianNoise(SECRET, sigma=0.5, clip=20.0).on_bounded(sums, PURPOSE) - sums
    assert abs(added.mean()) < 5 * 10.0 / 100
    assert abs(added.std() / 10.0 - 1) < 5 / math.sqrt(2 * 10_000)


def test_an_odd_number_of_elements_is_noised_to_the_last() -> None:
    assert (noise_on(rows(3, 5)) != 0).all()
    assert noise_on(rows(1, 1)).shape == (1, 1)
    assert noise_on(np.zeros((0, 5))).shape == (0, 5)


# It is the same for the same message, and for no other


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_message_that_is_sent_again_is_equal_to_the_bit(dtype: str) -> None:
    values, centre = rows(dtype=dtype), rows(1, dtype=dtype)
    first = GaussianNoise(SECRET, sigma=0.5, clip=3.0)(values, PURPOSE, centre)
    again = GaussianNoise(SECRET, sigma=0.5, clip=3.0)(np.asfortranarray(values), PURPOSE, np.repeat(centre, len(values), 0))
    assert first.dtype == again.dtype == values.dtype
    np.testing.assert_array_equal(first, again)


def test_noise_of_another_secret_purpose_value_or_setting_is_independent() -> None:
    values = rows(300)
    nudged = values.copy()
    nudged[17, 5] = np.nextafter(nudged[17, 5], 9)
    added = {
        "first": noise_on(values),
        "secret": noise_on(values, secret=bytes(SECRET_BYTES)),
        "kind": noise_on(values, ("hidden gradient", 3, 0)),
        "step": noise_on(values, ("activations", 4, 0)),
        "micro-batch": noise_on(values, ("activations", 3, 1)),
        "text for number": noise_on(values, ("activations", "3", 0)),
        "split otherwise": noise_on(values, ("activations", 30)),
        "value": noise_on(nudged),
        "sigma": noise_on(values, sigma=2.0),
        "centre": noise_on(values, centre=rows(1)),
        "type": noise_on(values.astype("float32")),
    }
    for one, other in combinations(added, 2):
        correlation = (added[one] * added[other]).mean()
        assert abs(correlation) < 5 / math.sqrt(values.size), (one, other)


def test_noise_of_another_shape_of_the_same_bytes_is_independent() -> None:
    one, other = noise_on(np.ones((256, 512))), noise_on(np.ones((512, 256)))
    assert abs((one.ravel() * other.ravel()).mean()) < 5 / math.sqrt(one.size)


# What is refused


@pytest.mark.parametrize(
    ("secret", "sigma", "clip", "message"),
    [
        (b"short", 1.0, 1.0, "a secret has 32 bytes, got 5"),
        (SECRET, 0.5, 0.0, "noise of sigma 0.5 needs a clip"),
        (SECRET, -1.0, 1.0, "are finite and not negative, got -1.0 and 1.0"),
        (SECRET, 1.0, float("inf"), "are finite and not negative, got 1.0 and inf"),
        (SECRET, float("nan"), 1.0, "are finite and not negative, got nan and 1.0"),
    ],
)
def test_noise_that_would_mean_nothing_is_refused(secret: bytes, sigma: float, clip: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaussianNoise(secret, sigma=sigma, clip=clip)


def test_the_secret_is_not_shown() -> None:
    noise = GaussianNoise(SECRET, sigma=1.0, clip=1.0)
    assert SECRET.hex() not in repr(noise)
    assert repr(SECRET) not in repr(noise)


# The centre


def test_the_token_ids_of_the_centre_follow_from_the_models_sizes_alone() -> None:
    ids, lengths = public_token_ids(50257, 1024)
    assert (ids.dtype, lengths.dtype, len(ids)) == (np.int32, np.int32, lengths.sum())
    assert ids[:4].tolist() == [39228, 31701, 37027, 7897]
    assert 0 <= ids.min() < 500 < 49_500 < ids.max() < 50257
    assert len(set(ids.tolist())) > 480
    again, _ = public_token_ids(50257, 1024)
    np.testing.assert_array_equal(ids, again)
    short, lengths = public_token_ids(7, 3)
    assert (short.max(), lengths.max()) == (6, 3)


def test_the_centre_is_the_mean_of_first_positions_and_of_all_others() -> None:
    lengths, values = np.array([3, 1, 2], np.int32), rows(6, 4)
    centre = Centre.of(values, lengths)
    np.testing.assert_allclose(centre.first, values[[0, 3, 4]].mean(0), rtol=1e-14)
    np.testing.assert_allclose(centre.later, values[[1, 2, 5]].mean(0), rtol=1e-14)
    spread = centre.rows(np.array([1, 2], np.int32))
    np.testing.assert_array_equal(spread, [centre.first, centre.first, centre.later])


def test_the_centre_of_a_model_of_one_position_is_that_of_its_first() -> None:
    centre = Centre.of(rows(5, 4, "float32"), np.ones(5, np.int32))
    np.testing.assert_array_equal(centre.first, centre.later)
    assert centre.rows(np.ones(2, np.int32)).dtype == np.float32
