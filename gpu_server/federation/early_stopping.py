"""Whether a run ends before its last step, and with which adapter, by what its devices' held-out texts lose."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from protocol import HeldOutLoss, RunSettings
from terminal import count

__all__ = ["EarlyStopping", "Judgement"]


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What the held-out texts of some devices lost, all of them together."""

    step: int
    """The last that was in the adapter."""
    loss: float
    """Nats per labelled token."""
    clients: tuple[str, ...]

    @classmethod
    def of(cls, step: int, told: Mapping[str, HeldOutLoss]) -> "Judgement":
        labelled_tokens = sum(each.labelled_tokens for each in told.values())
        loss = sum(each.loss * each.labelled_tokens for each in told.values()) / labelled_tokens
        return cls(step=step, loss=loss, clients=tuple(sorted(told)))


class EarlyStopping:
    """
    Compares each judgement with the best before, as transformers' `EarlyStoppingCallback` and its trainer do. The best has the
    lowest loss, by however little; only one that is lower by more than the threshold lets patience begin anew.

    Losses of other devices are losses of other texts. Where the devices are not those of the judgement before, it begins anew.

    Args:
        patience: judgements in a row without such a loss after which the run ends; 0: it does not.
        threshold: nats per labelled token.
    """

    def __init__(self, patience: int, threshold: float = 0.0) -> None:
        self._patience, self._threshold = patience, threshold
        self.judgements: list[Judgement] = []
        self.best: Judgement | None = None
        self._in_vain = 0
        """Judgements in a row that were not better by more than the threshold."""

    @classmethod
    def in_run(cls, settings: RunSettings, threshold: float) -> "EarlyStopping | None":
        """None in a run that no held-out loss decides anything of."""
        if not settings.early_stopping_patience and settings.final_adapter == "last":
            return None
        return cls(settings.early_stopping_patience, threshold)

    def judge(self, judgement: Judgement) -> None:
        if self.judgements and self.judgements[-1].clients != judgement.clients:
            self.best, self._in_vain = None, 0
        best = self.best
        is_better = best is None or best.loss - judgement.loss > self._threshold
        self._in_vain = 0 if is_better else self._in_vain + 1
        if best is None or judgement.loss < best.loss:
            self.best = judgement
        self.judgements.append(judgement)

    @property
    def last_step(self) -> int:
        """That was judged; 0: none."""
        return self.judgements[-1].step if self.judgements else 0

    @property
    def best_step(self) -> int:
        """The last in the adapter with the lowest loss; 0: none was judged."""
        return self.best.step if self.best is not None else 0

    @property
    def ends_run(self) -> bool:
        return 0 < self._patience <= self._in_vain

    def reason(self) -> str:
        """Why it ends the run."""
        assert self.best is not None
        evaluations = count(self._in_vain, "evaluation")
        by = f" by more than {self._threshold:g}" if self._threshold else ""
        return (
            f"the run ends early, after step {self.last_step}: in {evaluations} the held-out loss has not fallen"
            f"{by}; it was lowest after step {self.best_step}, {self.best.loss:.4f}"
        )

    # Across a restart of the server

    def state(self) -> list[dict[str, Any]]:
        """All judgements, as JSON."""
        return [asdict(judgement) for judgement in self.judgements]

    def restore(self, state: Iterable[Mapping[str, Any]]) -> None:
        """Begin anew, with what `state` gave."""
        self.judgements, self.best, self._in_vain = [], None, 0
        for each in state:
            self.judge(Judgement(step=each["step"], loss=each["loss"], clients=tuple(each["clients"])))
