"""Noise on what a device sends, and what it is worth."""

from .accounting import NoiseWorth, worth
from .centre import Centre, public_token_ids
from .noise import SECRET_BYTES, GaussianNoise, clipped
from .report import NoiseReport, visits_of

__all__ = [
    "SECRET_BYTES",
    "Centre",
    "GaussianNoise",
    "NoiseReport",
    "NoiseWorth",
    "clipped",
    "public_token_ids",
    "visits_of",
    "worth",
]
