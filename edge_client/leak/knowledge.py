"""What an attacker holds besides what it sees."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from privacy import SECRET_BYTES

from ..data import Sample
from .cut_model import CutModel
from .observation import Observations, Setting

__all__ = ["Knowledge"]


class Knowledge:
    """
    Of a server that is curious, and follows the protocol: the model, the adapter, the setting, and texts of the same kind.

    Args:
        cut: the model with the run's present adapter of both parts, cut where the run cuts it.
        samples: the attacker's own texts; none of those that are attacked.
    """

    def __init__(self, cut: CutModel, setting: Setting, samples: Sequence[Sample]) -> None:
        self.cut, self.setting, self.samples = cut, setting, tuple(samples)

    @cached_property
    def own(self) -> Observations:
        """What the attacker's own texts would look like, with noise of its own: what it learns its attacks from."""
        return Observations.of(self.samples, self.cut, self.setting, bytes(SECRET_BYTES))

    @cached_property
    def drawn_samples(self) -> tuple[Sample, ...]:
        """Texts of random tokens, as long as the attacker's own: from these it learns of tokens that none of its own has."""
        rng = np.random.default_rng(0)
        size = self.cut.config.vocabulary_size
        return tuple(
            Sample(rng.integers(size, size=len(sample.tokens), dtype=np.int32), sample.num_labels) for sample in self.samples
        )

    @cached_property
    def drawn(self) -> Observations:
        """What these would look like."""
        return Observations.of(self.drawn_samples, self.cut, self.setting, bytes(SECRET_BYTES))
