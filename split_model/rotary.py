"""
Rotary position embeddings (RoFormer, arXiv 2104.09864), and the scalings by which models see further than they were trained to.

The frequencies are computed in float32, operation by operation as transformers computes them (`modeling_rope_utils.py`), so
that they are the same to the bit: at position 100,000 a frequency that differs in its last bit turns by another angle.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from storage import ModelError

from .config_file import ConfigFile, Settings
from .packing import Packing
from .placement import Placement
from .transfer import copied_to

__all__ = ["LONGROPE", "LongRotary", "Rotary", "Rotation", "read_rotary", "rotate"]

SCALINGS = ("default", "linear", "llama3", "yarn")
DYNAMIC = "dynamic"
"""
A scaling that changes frequencies only of sequences beyond the model's number of positions. No sequence is longer here, so that
it is the same as "default".
"""
LONGROPE = "longrope"
"""A scaling with a divisor for each frequency; only families of which a model has it ask for it."""
FASTEST, SLOWEST = 32.0, 1.0
"""Yarn's usual "high" and "low"."""


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """
    How queries and keys are turned by their positions. Element i and element i + width / 2 of a head are a pair; position p
    turns it by p times the pair's frequency.
    """

    width: int
    """Elements of a head that are turned, the first ones. An even number."""
    base: float
    """Of the frequencies, base^(-2 i / width); `rope_theta` in config.json."""
    scaling: str = "default"
    """One of SCALINGS; or LONGROPE, see `LongRotary`."""
    factor: float = 1.0
    """By which a frequency is divided, where it is."""
    pretrained_positions: int = 0
    """Before the scaling; of "llama3", "yarn" and LONGROPE."""
    low: float = 0.0
    high: float = 0.0
    """
    How many turns a pair makes within the pretrained positions, if its frequency is divided wholly and, "high", if it is not
    divided at all; between the two it is divided partly. "low_freq_factor" and "high_freq_factor" of "llama3", "beta_slow" and
    "beta_fast" of "yarn".
    """
    truncates: bool = True
    """Of "yarn": whether these bounds are moved outwards to whole pairs."""
    amplitude: float = 1.0
    """By which queries and keys grow as they are turned; `attention_factor` in config.json."""

    def frequencies(self) -> NDArray[numpy.float32]:
        """Of each pair, in radians a position: (width / 2,)."""
        wavelengths = self._wavelengths()
        plain = 1.0 / wavelengths
        if self.scaling == "linear":
            plain = plain / self.factor
        elif self.scaling == "llama3":
            plain = self._by_wavelength(plain)
        elif self.scaling == "yarn":
            scaled, kept = 1.0 / (self.factor * wavelengths), 1 - self._share_divided()
            plain = scaled * (1 - kept) + plain * kept
        frequencies: NDArray[numpy.float32] = plain.numpy()
        return frequencies

    def settings(self, head_width: int) -> dict[str, Any]:
        """What transformers' `rope_parameters` would say of it."""
        settings: dict[str, Any] = {"rope_type": self.scaling, "rope_theta": self.base}
        if self.width != head_width:
            settings["partial_rotary_factor"] = self.width / head_width
        if self.scaling in ("linear", "llama3", "yarn"):
            settings["factor"] = self.factor
        if self.scaling == "llama3":
            settings |= {"low_freq_factor": self.low, "high_freq_factor": self.high}
        if self.scaling == "yarn":
            settings |= {"beta_slow": self.low, "beta_fast": self.high, "truncate": self.truncates}
            settings["attention_factor"] = self.amplitude
        if self.pretrained_positions:
            settings["original_max_position_embeddings"] = self.pretrained_positions
        return settings

    def _wavelengths(self) -> Tensor:
        """Of each pair, in positions a radian: (width / 2,)."""
        return self.base ** (torch.arange(0, self.width, 2, dtype=torch.float32) / self.width)

    def _share_divided(self) -> Tensor:
        """Yarn's, of each pair (YaRN, arXiv 2309.00071, 3.2)."""

        def pair_of(turns: float) -> float:
            turned = self.width * math.log(self.pretrained_positions / (turns * 2 * math.pi))
            return turned / (2 * math.log(self.base))

        first, last = pair_of(self.high), pair_of(self.low)
        if self.truncates:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, self.width - 1)
        if first == last:
            last += 0.001  # a step instead of a ramp
        return ((torch.arange(self.width // 2, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)

    def _by_wavelength(self, plain: Tensor) -> Tensor:
        """Llama 3's: short waves are left alone, long ones divided, and between the two it is a mixture of both."""
        wavelengths = 2 * math.pi / plain
        longest_kept, shortest_scaled = self.pretrained_positions / self.high, self.pretrained_positions / self.low
        scaled = torch.where(wavelengths > shortest_scaled, plain / self.factor, plain)
        share = (self.pretrained_positions / wavelengths - self.low) / (self.high - self.low)
        mixed = (1 - share) * scaled / self.factor + share * scaled
        is_between = ~(wavelengths < longest_kept) & ~(wavelengths > shortest_scaled)
        return torch.where(is_between, mixed, scaled)


@dataclass(frozen=True, kw_only=True)
class LongRotary(Rotary):
    """
    LongRoPE (arXiv 2402.13753): every frequency has a divisor of its own. Sequences beyond the pretrained positions have other
    divisors, by which nothing is computed here: a model of this kind has `pretrained_positions` and no more.
    """

    divisors: tuple[float, ...]
    """Of each pair, within the pretrained positions; `short_factor` in config.json."""
    divisors_beyond: tuple[float, ...]
    """`long_factor` in config.json."""
    positions_beyond: int
    """How many positions the model has with these."""

    def frequencies(self) -> NDArray[numpy.float32]:
        divided: NDArray[numpy.float32] = (1.0 / (torch.tensor(self.divisors) * self._wavelengths())).numpy()
        return divided

    def settings(self, head_width: int) -> dict[str, Any]:
        divisors = {"short_factor": list(self.divisors), "long_factor": list(self.divisors_beyond)}
        return super().settings(head_width) | divisors | {"attention_factor": self.amplitude}


def read_rotary(
    file: ConfigFile,
    head_width: int,
    num_positions: int,
    *,
    scalings: Sequence[str] = (*SCALINGS, DYNAMIC),
    may_be_partial: bool = False,
    pretrained_positions: int | None = None,
) -> Rotary:
    """
    What config.json says under rope_parameters, and in older files under rope_scaling and rope_theta.

    Args:
        scalings: those that the family knows.
        may_be_partial: whether the family can turn a part of each head.
        pretrained_positions: the family's default, in a family that has one; else the scaling says it.

    Raises:
        ModelError: a scaling or an option of it is not known, or a value cannot be right.
    """
    # transformers reads rope_scaling instead of rope_parameters where both are there.
    older, newer = file.settings("rope_scaling"), file.settings("rope_parameters")
    given = newer if older.is_empty else older
    base = given.number("rope_theta", file.number("rope_theta", 10_000.0))
    share = given.number("partial_rotary_factor", file.number("partial_rotary_factor", 1.0))
    width = int(head_width * share)
    if share > 1 or width < 2 or width % 2 or (width != head_width and not may_be_partial):
        some = "an even number of elements" if may_be_partial or width == head_width else "all elements"
        raise ModelError(
            f"{file.path}: partial_rotary_factor {share:g} turns {width} of {head_width} elements of a head; {some} "
            "can be turned"
        )
    has_old_key = given.has("type")
    scaling = given.one_of("type" if has_old_key and not given.has("rope_type") else "rope_type", "default", scalings)
    values: dict[str, Any] = {"width": width, "base": base, "scaling": scaling}
    if scaling in ("linear", "llama3"):
        values["factor"] = given.number("factor")
    if scaling in ("llama3", "yarn", LONGROPE):
        key = "original_max_position_embeddings"
        usual = given.integer(key, num_positions, least=2)
        values["pretrained_positions"] = file.integer(key, pretrained_positions or usual, least=2)
    if scaling == DYNAMIC:
        values["scaling"] = "default"
        given.number("factor")
        if given.has("original_max_position_embeddings"):
            given.integer("original_max_position_embeddings")
    if scaling == "llama3":
        values |= {"low": given.number("low_freq_factor"), "high": given.number("high_freq_factor")}
    if scaling == "yarn":
        values |= _yarn(given, values["pretrained_positions"], num_positions)
    if scaling in ("llama3", "yarn") and values["low"] >= values["high"]:
        raise ModelError(
            f"{file.path}: {given.within} begins to scale at {values['low']:g} and ends at {values['high']:g} turns"
        )
    if scaling == LONGROPE:
        values |= _longrope(given, width // 2, values["pretrained_positions"], num_positions)
    given.check_all_known()
    return LongRotary(**values) if scaling == LONGROPE else Rotary(**values)


def _yarn(given: Settings, pretrained: int, num_positions: int) -> dict[str, Any]:
    factor = given.number("factor") if given.has("factor") else num_positions / pretrained

    def amplitude(weight: float) -> float:  # YaRN, 3.4
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    weights = [given.number(key) for key in ("mscale", "mscale_all_dim") if given.has(key)]
    usual = amplitude(weights[0]) / amplitude(weights[1]) if len(weights) == 2 else amplitude(1)
    return {
        "factor": factor,
        "low": given.number("beta_slow") if given.has("beta_slow") else SLOWEST,
        "high": given.number("beta_fast") if given.has("beta_fast") else FASTEST,
        "truncates": given.boolean("truncate", True),
        "amplitude": given.number("attention_factor") if given.has("attention_factor") else usual,
    }


def _longrope(given: Settings, num_pairs: int, pretrained: int, num_positions: int) -> dict[str, Any]:
    factor = given.number("factor") if given.has("factor") else num_positions / pretrained
    usual = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(pretrained))
    return {
        "amplitude": given.number("attention_factor") if given.has("attention_factor") else usual,
        "divisors": given.numbers("short_factor", num_pairs),
        "divisors_beyond": given.numbers("long_factor", num_pairs),
        "positions_beyond": num_positions,
    }


class Rotation:
    """
    The angles of a batch's rows. All blocks of a part have one.

    Args:
        rotary: None for a model that has its positions in its embedding.
    """

    def __init__(self, rotary: Rotary | None, placement: Placement) -> None:
        self._rotary, self._placement = rotary, placement
        self._frequencies = None if rotary is None else torch.from_numpy(rotary.frequencies()).to(placement.device)
        self._of: Packing | None = None
        self._tables: tuple[Tensor, Tensor] | None = None

    def tables(self, packing: Packing) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines of each row's angles, (N, 1, width / 2) in `Placement.residual`; None without rotation."""
        if self._rotary is None or self._frequencies is None:
            return None
        if packing is not self._of:
            positions = copied_to(self._placement.device, torch.from_numpy(packing.positions))
            angles = (positions.float().unsqueeze(1) * self._frequencies).unsqueeze(1)
            amplitude, dtype = self._rotary.amplitude, self._placement.residual
            self._tables = (angles.cos() * amplitude).to(dtype), (angles.sin() * amplitude).to(dtype)
            self._of = packing
        return self._tables


def rotate(heads: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the first elements of every head, (N, H, D) -> (N, H, D); the tables are those of `Rotation`."""
    return _Rotate.apply(heads, *tables)  # type: ignore[no-any-return, no-untyped-call]


class _Rotate(torch.autograd.Function):
    """The gradient is turned back. Nothing is kept for it but the tables, which all blocks share."""

    @staticmethod
    def forward(context: Any, heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        context.tables = cosines, sines
        return _turned(heads, cosines, sines)

    @staticmethod
    def backward(context: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        cosines, sines = context.tables
        return _turned(upstream[0], cosines, -sines), None, None


def _turned(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    half = cosines.shape[-1]
    widths = [half, half, heads.shape[-1] - 2 * half]
    turned = torch.empty_like(heads)
    first, second, rest = torch.split(heads, widths, dim=-1)
    new_first, new_second, same = torch.split(turned, widths, dim=-1)
    torch.mul(first, cosines, out=new_first).addcmul_(second, sines, value=-1)
    torch.mul(second, cosines, out=new_second).addcmul_(first, sines)
    same.copy_(rest)
    return turned
