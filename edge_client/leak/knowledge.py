"""What an attacker holds besides what it sees."""

from collections.abc import Sequence
from functools import cached_property

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
