"""
The measurement: which texts, settings and attacks, in what order; and what of it decides whether it can be believed.

For every seed, some texts are drawn from the file to be attacked; others are the attacker's own, from which it learns. For
every setting the messages of a step are made of both, each attack guesses, and the guesses are counted. Each cut is measured
first in the open setting, without codec and noise: costs are compared with it, and there the controls are made.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from time import monotonic

import numpy as np

from privacy import SECRET_BYTES
from protocol import Array
from protocol.settings import FLOAT32
from split_model import (
    Adapter,
    LoraConfig,
    PretrainedModel,
    adapted_layers,
    check_cut_layer,
    initial_adapter,
    load_adapter,
)
from storage import AdapterSettings, ChatTemplate
from terminal import count as counted

from ..data import DataError, Dataset, Form, Sample
from .attacks import ATTACKS, Attack, Recovered
from .controls import Planted, Shuffled, masked, planted, planted_texts, shuffled
from .cost import Prediction, extra_nats, predict, train
from .cut_model import CutModel
from .knowledge import Knowledge
from .observation import NO_TOKEN, Observations, Setting, Target, truth
from .statistics import Counts, Ratio, count, guess_the_commonest, rare_tokens

__all__ = ["QUANTILES", "Cost", "Findings", "Measured", "Plan", "Reading", "measure", "open_subject", "settings_of"]

MOST_TEXTS = 5000
"""Of the file: enough to know which tokens are rare."""
ATTACKS_LEARN, ATTACKS_READ = 60, 10
"""Of all attacks together: as long as the messages of so many texts, once, and for each. Measured on GPT-2 small's shape."""
QUANTILES = (0.05, 0.5, 0.95, 1.0)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """
    What is to be measured.

    Raises:
        ValueError: a number is out of its range.
    """

    settings: tuple[Setting, ...]
    """Of each cut, the open one first."""
    num_texts: int = 12
    """How many are attacked, for each seed."""
    num_own: int = 48
    """How many texts of the same kind the attacker has."""
    seeds: tuple[int, ...] = (0,)
    training_steps: int | None = None
    """Of a short training, with each setting and without; None: 20 for settings with noise in the labels' gradients."""
    noise_delta: float = 1e-6
    attacks: tuple[Attack, ...] = ATTACKS

    def __post_init__(self) -> None:
        if self.num_texts < 8:
            raise ValueError(
                f"--sequences must be at least 8, for intervals over fewer texts say nothing; got {self.num_texts}"
            )
        if not self.seeds:
            raise ValueError("--seeds must be at least 1")
        if not 0 < self.noise_delta < 1:
            raise ValueError(f"--noise-delta must be between 0 and 1, got {self.noise_delta:g}")
        if self.num_own < 8:
            raise ValueError(f"--attacker-texts must be at least 8, got {self.num_own}")
        if self.training_steps is not None and self.training_steps < 0:
            raise ValueError(f"--training-steps must be at least 0, got {self.training_steps}")

    def steps(self, setting: Setting) -> int:
        if self.training_steps is None:
            return 20 if setting.gradient_noise or setting.gradient_clip else 0
        return self.training_steps


def settings_of(
    *,
    cut_layers: Sequence[int],
    codecs: Sequence[str],
    labels: Sequence[str],
    label_rows: Sequence[str],
    activation_noises: Sequence[float],
    activation_clip: float,
    gradient_noises: Sequence[float],
    gradient_clip: float,
    batch_size: int,
) -> tuple[Setting, ...]:
    """
    All combinations that a run can have, of each cut the open one first; where labels are on the server there is no gradient to
    be noised, and such combinations are left out.

    Raises:
        ValueError: there is none, or a value is out of its range.
    """
    settings = []
    for cut in cut_layers:
        settings.append(Setting(cut_layer=cut, codec=FLOAT32, labels="device", batch_size=batch_size))
        for where, codec, noise, gradient_noise, rows in product(
            labels, codecs, activation_noises, gradient_noises, label_rows
        ):
            on_server = where == "server" and len(labels) > 1
            if on_server and (gradient_noise or rows == "hidden"):
                continue
            settings.append(
                Setting(
                    cut_layer=cut,
                    codec=codec,
                    labels=where,
                    label_rows=rows,
                    activation_noise=noise,
                    # Among several amounts of noise, none at all means: not clipped either.
                    activation_clip=activation_clip if noise or len(activation_noises) == 1 else 0.0,
                    gradient_noise=gradient_noise,
                    gradient_clip=gradient_clip if not on_server and (gradient_noise or len(gradient_noises) == 1) else 0.0,
                    batch_size=batch_size,
                )
            )
    return tuple(dict.fromkeys(settings))


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What one attack recovered under one setting; see `Counts`."""

    attack: str
    channel: str
    target: Target
    counts: Counts
    """Of all seeds together."""
    by_seed: tuple[Counts, ...]
    commonest: Counts
    """Of guesses of what is commonest."""
    unseen: Counts
    """Of what this attack guesses if its channel says nothing: of labels, what the model itself finds likeliest."""
    shuffled: tuple[Shuffled, ...]
    """For each seed."""
    planted: tuple[Planted, ...]
    """For each seed; only of the open setting."""
    seconds: float

    @property
    def guess(self) -> float:
        """The better of both guesses."""
        return max(self.commonest.tokens.value, self.unseen.tokens.value)

    @property
    def finds_nothing(self) -> bool:
        """Whether the attack is no better than guesses; if so in the open, a low reading elsewhere means nothing."""
        found = self.counts.tokens.estimate(0)
        return found is None or found.low <= self.guess


@dataclass(frozen=True)
class Cost:
    """In nats a labelled token more than with the open setting."""

    forward: Ratio
    """On the attacked texts, with the same adapter: what codec and noise do to activations and hidden states is in it."""
    trained: Ratio | None
    """The same after a short training with the setting, compared with one without; None where there was none."""
    training_steps: int


@dataclass(frozen=True, kw_only=True)
class Measured:
    """All that was found of one setting."""

    setting: Setting
    readings: tuple[Reading, ...]
    not_attacked: tuple[tuple[str, str], ...]
    """Attacks, by channel and name, for which there was nothing under this setting, and why."""
    cost: Cost
    epsilons: dict[str, float]
    """What noise is worth; see `_epsilons`. Empty without noise."""
    frame_bytes: dict[str, float]
    """By kind of message, the mean size of a frame."""


@dataclass(frozen=True, kw_only=True)
class Norms:
    """Quantiles of the norms of rows, from which a clip is chosen: `QUANTILES`."""

    cut_layer: int
    activations: tuple[float, ...]
    """Behind the centre."""
    gradients: tuple[float, ...]
    """Of the loss of one label at the hidden state."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The result of a measurement."""

    plan: Plan
    data: str
    model: str
    adapter: str
    num_samples: int
    """In the file."""
    longest: int
    """Rows of the longest attacked text."""
    num_cut: int
    measured: tuple[Measured, ...]
    norms: tuple[Norms, ...]
    nats: dict[int, float] = field(default_factory=dict)
    """By cut layer: the loss in nats a label of the open setting."""
    seconds: float = 0.0

    @property
    def failures(self) -> list[str]:
        """Controls that failed, a sentence each; none: the meter trusts itself."""
        failed = []
        for each in self.measured:
            for reading in each.readings:
                where = f"{reading.channel}, {reading.attack}, cut {each.setting.cut_layer}, {each.setting.codec}"
                for control in reading.planted:
                    if not control.passed and not reading.finds_nothing:
                        failed.append(
                            f"{where}: of a planted leak of {control.least:.1%} to {control.most:.1%}, "
                            f"{control.found.value:.1%} was found [{control.found.low:.1%}, {control.found.high:.1%}]"
                        )
                failed += [
                    f"{where}: on shuffled texts it reads {control.reading:.2%}, more than the {control.guess:.2%} "
                    "that can be guessed"
                    for control in reading.shuffled
                    if not control.passed
                ]
        if not any(reading.planted and not reading.finds_nothing for each in self.measured for reading in each.readings):
            failed.append("no attack finds anything where nothing is masked, so nothing was controlled")
        return failed


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is measured on."""

    data: Path
    model: PretrainedModel
    adapter: Path | None
    dataset: Dataset


def open_subject(data: Path, model: Path, adapter: Path | None, *, max_length: int) -> Subject:
    """
    Raises:
        DataError, ModelError: a file cannot be used.
    """
    opened = PretrainedModel(model)
    longest = min(max_length, opened.config.num_positions)
    form = Form(template=ChatTemplate.find(opened.folder))
    dataset = Dataset.load(data, opened.tokenizer(), opened.config.end_token, longest, form=form)
    return Subject(data=data, model=opened, adapter=adapter, dataset=dataset)


def _adapter(subject: Subject, seed: int) -> tuple[Adapter, LoraConfig]:
    """The adapter of the folder, or the one with which a run begins."""
    config = subject.model.config
    if subject.adapter is None:
        lora = LoraConfig(targets=config.family.usual_targets)
        return initial_adapter(config, lora, seed), lora
    settings = AdapterSettings.read(subject.adapter)
    values, named = settings.values, settings.values["target_modules"]
    lora = LoraConfig(
        rank=int(values["r"]),
        alpha=float(values["lora_alpha"]),
        rslora=settings.has("use_rslora"),
        targets=(named,) if isinstance(named, str) else tuple(named),
    )
    adapted_layers(config, lora)  # says what is wrong with a pattern in place of names
    return load_adapter(subject.adapter, config, lora), lora


def measure(
    subject: Subject,
    plan: Plan,
    report: Callable[[str, int, int], object],
    *,
    expect: Callable[[float], object] = lambda seconds: None,
) -> Findings:
    """
    Args:
        report: called with what is at work, how many pieces of work are done, and how many there are.
        expect: called once, soon, with how many seconds it will take, roughly.

    Raises:
        DataError: there are too few texts.
        ModelError: the model has no such cut.
    """
    began = monotonic()
    measurement = _Measurement(subject, plan, report)
    expect(measurement.expected_seconds())
    measured = tuple(measurement.all())
    summary = subject.dataset.samples.summary
    return Findings(
        plan=plan,
        data=str(subject.data),
        model=str(subject.model.folder),
        adapter="" if subject.adapter is None else str(subject.adapter),
        num_samples=len(subject.dataset.samples),
        longest=max(len(sample.tokens) - 1 for texts in measurement.texts for sample in texts.attacked),
        num_cut=summary.num_cut,
        measured=measured,
        norms=tuple(measurement.norms),
        nats=measurement.nats,
        seconds=monotonic() - began,
    )


@dataclass(frozen=True)
class _Texts:
    """Of one seed."""

    attacked: list[Sample]
    own: list[Sample]

    @classmethod
    def drawn(cls, subject: Subject, plan: Plan, seed: int) -> "_Texts":
        samples = subject.dataset.samples
        rng = np.random.default_rng([seed, 1])
        order = rng.permutation(len(samples))[: 2 * (plan.num_texts + plan.num_own)].tolist()
        usable = [sample for sample in (samples[index] for index in order) if sample.num_labels and len(sample.tokens) > 2]
        if len(usable) < 2 * plan.num_texts:
            num_usable = counted(len(usable), "text")
            raise DataError(
                f"{subject.data} has {num_usable} that can be used; the meter attacks {plan.num_texts}, and needs "
                f"as many others for the attacker to learn from: give at least {2 * plan.num_texts}, or fewer --sequences"
            )
        return cls(usable[: plan.num_texts], usable[plan.num_texts : plan.num_texts + plan.num_own])


@dataclass
class _Pieces:
    """What is counted of one attack under one setting, seed by seed."""

    attack: Attack
    counts: list[Counts] = field(default_factory=list)
    commonest: list[Counts] = field(default_factory=list)
    unseen: list[Counts] = field(default_factory=list)
    shuffled: list[Shuffled] = field(default_factory=list)
    planted: list[Planted] = field(default_factory=list)
    seconds: float = 0.0

    def reading(self) -> Reading:
        return Reading(
            attack=self.attack.name,
            channel=self.attack.channel,
            target=self.attack.target,
            counts=Counts.joined(self.counts),
            by_seed=tuple(self.counts),
            commonest=Counts.joined(self.commonest),
            unseen=Counts.joined(self.unseen),
            shuffled=tuple(self.shuffled),
            planted=tuple(self.planted),
            seconds=self.seconds,
        )


class _Measurement:
    def __init__(self, subject: Subject, plan: Plan, report: Callable[[str, int, int], object]) -> None:
        self.subject, self.plan, self._report = subject, plan, report
        for setting in plan.settings:
            check_cut_layer(setting.cut_layer, subject.model.config.num_layers)
        self.texts = [_Texts.drawn(subject, plan, seed) for seed in plan.seeds]
        samples, rng = subject.dataset.samples, np.random.default_rng(0)
        some = rng.permutation(len(samples))[:MOST_TEXTS].tolist()
        self.is_rare = rare_tokens([samples[index].tokens for index in some], subject.model.config.vocabulary_size)
        self.norms: list[Norms] = []
        self.nats: dict[int, float] = {}
        self._done = 0
        self._total = len(plan.seeds) * sum(
            1
            + sum(2 if _is_open(setting) else 1 for attack in plan.attacks if not _why_not(attack, setting))
            + (plan.steps(setting) > 0)
            for setting in plan.settings
        )

    def expected_seconds(self) -> float:
        """From the time that the messages of one micro-batch take here."""
        plan, began = self.plan, monotonic()
        setting = plan.settings[0]
        texts = self.texts[0].attacked[: setting.batch_size]
        Observations.of(texts, self._cut(setting.cut_layer, plan.seeds[0]), _opened(setting), _secret(0))
        one_text = (monotonic() - began) / len(texts)
        attacks = ATTACKS_LEARN + (ATTACKS_READ + 1) * plan.num_texts
        number = sum(
            plan.num_own + attacks * (2 if _is_open(setting) else 1) + 2 * plan.steps(setting) * setting.batch_size
            for setting in plan.settings
        )
        return number * len(plan.seeds) * one_text

    def all(self) -> Iterator[Measured]:
        by_cut: dict[int, list[Setting]] = {}
        for setting in self.plan.settings:
            by_cut.setdefault(setting.cut_layer, []).append(setting)
        for cut_layer, settings in by_cut.items():
            yield from self._of_cut(cut_layer, settings)

    def _of_cut(self, cut_layer: int, settings: list[Setting]) -> Iterator[Measured]:
        cuts = [self._cut(cut_layer, seed) for seed in self.plan.seeds]
        open_predictions: list[Prediction] = []
        open_trained: dict[int, list[Prediction]] = {}
        for setting in settings:
            pieces = [_Pieces(attack) for attack in self.plan.attacks if not _why_not(attack, setting)]
            predictions, sizes = [], []
            for seed, texts, cut in zip(self.plan.seeds, self.texts, cuts, strict=True):
                observations = self._observe(texts.attacked, cut, setting, seed)
                sizes += [exchange.frame_bytes for exchange in observations.exchanges]
                predictions.append(predict(observations, texts.attacked, cut.head))
                if _is_open(setting):
                    self._note_norms(cut, observations, is_first=seed == self.plan.seeds[0])
                knowledge = Knowledge(cut, setting, texts.own)
                for each in pieces:
                    self._attack(each, observations, knowledge, texts, seed)
                if _is_open(setting):
                    self._plant(pieces, cut, setting, texts, seed)
            open_predictions = open_predictions or predictions
            self.nats.setdefault(
                cut_layer, sum(p.nats.sum() for p in predictions) / sum(p.num_labels.sum() for p in predictions)
            )
            steps, trained = self.plan.steps(setting), None
            if steps:
                if steps not in open_trained:
                    open_trained[steps] = [
                        self._trained(_opened(setting), seed, texts, steps)
                        for seed, texts in zip(self.plan.seeds, self.texts, strict=True)
                    ]
                after = [
                    self._trained(setting, seed, texts, steps) for seed, texts in zip(self.plan.seeds, self.texts, strict=True)
                ]
                self._advance("training")
                trained = _joined(after, open_trained[steps])
            yield Measured(
                setting=setting,
                readings=tuple(each.reading() for each in pieces),
                not_attacked=tuple(
                    (f"{attack.channel}: {attack.name}", _why_not(attack, setting))
                    for attack in self.plan.attacks
                    if _why_not(attack, setting)
                ),
                cost=Cost(_joined(predictions, open_predictions), trained, steps),
                epsilons=_epsilons(setting, self.texts, self.plan.noise_delta),
                frame_bytes={kind: float(np.mean([size[kind] for size in sizes])) for kind in sizes[0]},
            )

    def _cut(self, cut_layer: int, seed: int) -> CutModel:
        adapter, lora = _adapter(self.subject, seed)
        return CutModel(self.subject.model, adapter, lora, cut_layer)

    def _observe(self, samples: list[Sample], cut: CutModel, setting: Setting, seed: int) -> Observations:
        observations = Observations.of(samples, cut, setting, _secret(seed))
        self._advance("messages of a step")
        return observations

    def _attack(self, pieces: _Pieces, seen: Observations, knowledge: Knowledge, texts: _Texts, seed: int) -> None:
        attack, began = pieces.attack, monotonic()
        recovered = attack.run(seen, knowledge, np.random.default_rng([seed, 2]))
        pieces.seconds += monotonic() - began
        true, known = self._truths(attack.target, texts, seen.setting.batch_size)
        guesses = _asked(recovered, texts)
        pieces.counts.append(count(attack.target, true, guesses, self.is_rare))
        pieces.commonest.append(count(attack.target, true, guess_the_commonest(attack.target, known, true), self.is_rare))
        unseen = attack.baseline(seen, knowledge, np.random.default_rng([seed, 6]))
        pieces.unseen.append(count(attack.target, true, _asked(unseen, texts), self.is_rare))
        pieces.shuffled.append(shuffled(attack.target, true, guesses, self.is_rare, np.random.default_rng([seed, 3])))
        self._advance(attack.name)

    def _plant(self, pieces: list[_Pieces], cut: CutModel, setting: Setting, texts: _Texts, seed: int) -> None:
        """Every text is a micro-batch of its own there, so that for every attack the dose is one of texts."""
        alone, rng = replace(setting, batch_size=1), np.random.default_rng([seed, 4])
        kept = planted_texts(len(texts.attacked), rng)
        seen = masked(Observations.of(texts.attacked, cut, alone, _secret(seed)), kept, rng)
        knowledge = Knowledge(cut, alone, texts.own)
        for each in pieces:
            target = each.attack.target
            guesses = _asked(each.attack.run(seen, knowledge, rng), texts)
            true, known = self._truths(target, texts, 1)
            open_reading = each.counts[-1].tokens.estimate(seed)
            if open_reading is not None:
                guess = count(target, true, guess_the_commonest(target, known, true), self.is_rare).tokens.value
                counts = count(target, true, guesses, self.is_rare)
                each.planted.append(planted(counts, kept, open_reading=open_reading, guess=guess, seed=seed))
            self._advance(f"control of {each.attack.name}")

    def _truths(self, target: Target, texts: _Texts, batch_size: int) -> tuple[list[Array], list[Array]]:
        """Of the attacked texts, and of the attacker's own."""
        found = []
        for samples in (texts.attacked, texts.own):
            of_rows = truth(target, samples, batch_size)
            found.append([each[each != NO_TOKEN] for each in of_rows] if target is Target.LABELS else of_rows)
        return found[0], found[1]

    def _trained(self, setting: Setting, seed: int, texts: _Texts, steps: int) -> Prediction:
        cut = self._cut(setting.cut_layer, seed)
        train(cut, setting, texts.own, _secret(seed), steps=steps)
        return predict(Observations.of(texts.attacked, cut, setting, _secret(seed)), texts.attacked, cut.head)

    def _note_norms(self, cut: CutModel, observations: Observations, *, is_first: bool) -> None:
        if not is_first:
            return
        rows = [exchange.activations - cut.centre.rows(exchange.lengths) for exchange in observations.exchanges]
        gradients = [exchange.hidden_gradient for exchange in observations.exchanges if exchange.hidden_gradient is not None]
        self.norms.append(Norms(cut_layer=cut.cut_layer, activations=_quantiles(rows), gradients=_quantiles(gradients)))

    def _advance(self, what: str) -> None:
        self._done += 1
        self._report(what, self._done, self._total)


def _why_not(attack: Attack, setting: Setting) -> str:
    if attack.target is Target.LABEL_ROWS and setting.label_rows == "shown":
        return "the server is told which rows have a label"
    return attack.why_not(setting)


def _asked(recovered: Recovered, texts: _Texts) -> list[Array]:
    """Guesses of what was asked for: of labels, those of rows that have one."""
    if recovered.target is not Target.LABELS:
        return list(recovered.guesses)
    return [guess[len(guess) - sample.num_labels :] for guess, sample in zip(recovered.guesses, texts.attacked, strict=True)]


def _quantiles(rows: Sequence[Array]) -> tuple[float, ...]:
    norms = np.linalg.norm(np.concatenate(rows), axis=1)
    return tuple(float(value) for value in np.quantile(norms, QUANTILES))


def _is_open(setting: Setting) -> bool:
    return setting == _opened(setting)


def _opened(setting: Setting) -> Setting:
    """At the same cut, without codec and noise."""
    return Setting(cut_layer=setting.cut_layer, codec=FLOAT32, labels="device", batch_size=setting.batch_size)


def _joined(costly: Sequence[Prediction], cheap: Sequence[Prediction]) -> Ratio:
    return Ratio.joined([extra_nats(one, other) for one, other in zip(costly, cheap, strict=True)])


def _secret(seed: int) -> bytes:
    """Of the device that is imitated: measurements can be repeated; a real device's is random."""
    return np.random.default_rng([seed, 5]).bytes(SECRET_BYTES)


def _epsilons(setting: Setting, texts: Sequence[_Texts], delta: float) -> dict[str, float]:
    """
    What the noise is worth, each at the given delta: "activations, a row" sent once, "activations, a text" of the longest text
    attacked, sent once; and the same of gradients with their sums of losses.
    """
    from privacy.accounting import NoiseWorth, apart_in_activations, apart_in_gradients

    found: dict[str, float] = {}
    attacked = [sample for each in texts for sample in each.attacked]
    rows = max(len(sample.tokens) - 1 for sample in attacked)
    labelled = rows if setting.label_rows == "hidden" else max(sample.num_labels for sample in attacked)
    for name, sigma, apart, longest in (
        ("activations", setting.activation_noise, apart_in_activations, rows),
        ("gradients", setting.gradient_noise, apart_in_gradients, labelled),
    ):
        if sigma:
            worth = NoiseWorth.of(partial(apart, sigma), visits=1, longest=longest, delta=delta)
            found |= {f"{name}, a row": worth.row_once, f"{name}, a text": worth.text}
    return found
