"""The meter of leaks: its counting against simple examples, its controls against attacks that are good, blind or careless."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import edge_client.cli
from edge_client.data import pack
from edge_client.leak import meter, program, report
from edge_client.leak.attacks import Recovered
from edge_client.leak.controls import masked, planted, planted_texts, shuffled
from edge_client.leak.cost import train
from edge_client.leak.cut_model import CutModel
from edge_client.leak.knowledge import Knowledge
from edge_client.leak.meter import Findings, Plan, Subject, measure, open_subject, settings_of
from edge_client.leak.observation import Observations, Setting, Target, truth
from edge_client.leak.statistics import Estimate, Ratio, count, guess_the_commonest, rare_tokens
from split_model import LoraConfig, initial_adapter, save_adapter
from storage import AdapterError

RARE = np.array([False, False, True, True])
"""Of a vocabulary of four."""


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens)


# Counting


def test_tokens_count_where_they_stand() -> None:
    counts = count(Target.TOKENS, [ids(0, 1, 2), ids(3, 3)], [ids(0, 2, 1), ids(3, 3)], RARE)
    assert (counts.tokens.above.tolist(), counts.tokens.below.tolist()) == ([1, 2], [3, 2])
    assert (counts.rare.above.tolist(), counts.rare.below.tolist()) == ([0, 2], [1, 2])
    assert counts.whole.value == 0.5


def test_of_a_bag_as_many_guesses_count_as_there_are_tokens() -> None:
    counts = count(Target.BAG, [ids(0, 2)], [ids(2, 1, 0, 3)], RARE)
    assert counts.tokens.value == 0.5
    assert counts.rare.value == 1


def test_what_is_no_token_has_no_rare_ones() -> None:
    counts = count(Target.LABEL_ROWS, [np.array([False, True])], [np.array([0.4, 0.6])], RARE)
    assert counts.tokens.value == 1
    assert counts.rare.estimate(0) is None


def test_rare_tokens_are_the_least_frequent_tenth_of_a_text() -> None:
    text = ids(*[0] * 80, *[1] * 11, *[2] * 6, *[3] * 3)
    assert rare_tokens([text], 5).tolist() == [False, False, True, True, True]


def test_a_guess_of_the_commonest_is_made_from_what_is_known() -> None:
    known, asked = [ids(1, 1, 2)], [ids(0, 0, 0), ids(3)]
    assert [guess.tolist() for guess in guess_the_commonest(Target.TOKENS, known, asked)] == [[1, 1, 1], [1]]
    assert [guess.tolist() for guess in guess_the_commonest(Target.BAG, known, asked)] == [[1, 2, 0], [1]]
    assert [guess.tolist() for guess in guess_the_commonest(Target.ROWS, [ids(5), ids(9), ids(9)], [ids(1)])] == [[9]]


def test_an_interval_holds_the_true_share_as_often_as_it_says() -> None:
    """Texts of unequal lengths whose tokens hang together: an interval over tokens would be far too narrow."""
    rng, held = np.random.default_rng(0), 0
    for seed in range(200):
        lengths = rng.integers(5, 40, size=30)
        shares = rng.beta(2, 2, size=30)
        estimate = Ratio(rng.binomial(lengths, shares), lengths).estimate(seed)
        assert estimate is not None
        held += estimate.low <= 0.5 <= estimate.high
    assert 0.9 <= held / 200 <= 0.98


def test_an_interval_is_the_same_for_the_same_seed() -> None:
    ratio = Ratio(ids(1, 5, 3, 0), ids(4, 6, 9, 2))
    assert ratio.estimate(3) == ratio.estimate(3)


# Controls


def test_no_honest_guess_reads_more_on_a_shuffled_truth_than_the_commonest() -> None:
    rng = np.random.default_rng(0)
    texts = [rng.choice(4, size=30, p=[0.5, 0.3, 0.1, 0.1]) for _ in range(20)]
    sizes = [ids(5), ids(9)]
    assert shuffled(Target.ROWS, sizes, sizes, RARE, rng).passed
    for guesses in (texts, guess_the_commonest(Target.TOKENS, texts, texts), [np.full(30, 3)] * 20):
        assert shuffled(Target.TOKENS, texts, guesses, RARE, rng).passed


def test_a_count_that_looks_at_the_truth_fails_on_a_shuffled_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    texts = [rng.integers(4, size=30) for _ in range(20)]
    from edge_client.leak import controls

    real, calls = controls.count, iter(range(1000))
    monkeypatch.setattr(  # every other call counts guesses, the others the commonest
        controls, "count", lambda target, true, guess, rare: real(target, true, guess if next(calls) % 2 else true, rare)
    )
    assert not shuffled(Target.TOKENS, texts, texts, RARE, rng).passed


@pytest.mark.parametrize(("found_of_planted", "passes"), [(1.0, True), (0.0, False)])
def test_a_planted_leak_must_be_found_as_large_as_it_is(found_of_planted: float, passes: bool) -> None:
    kept = planted_texts(40, np.random.default_rng(0))
    right = np.where(kept, int(10 * found_of_planted), 0)
    counts = meter.Counts(Ratio(right, np.full(40, 10)), Ratio(right, np.full(40, 10)), Ratio(right, np.full(40, 10)))
    control = planted(counts, kept, open_reading=Estimate(1, 1, 1), guess=0.05, seed=0)
    assert control.dose == pytest.approx(0.2)
    assert control.passed is passes


def test_a_planted_leak_that_is_read_too_large_fails() -> None:
    kept = planted_texts(40, np.random.default_rng(0))
    right = np.full(40, 9)
    counts = meter.Counts(*[Ratio(right, np.full(40, 10))] * 3)
    assert not planted(counts, kept, open_reading=Estimate(1, 1, 1), guess=0.05, seed=0).passed


# The meter with attacks that are known


@dataclass
class Nearest:
    """Nearest row among the attacker's own activations: exact where the tokens before are the same, as at first positions."""

    name: str = "nearest row"
    channel: str = "activations"
    target: Target = Target.TOKENS

    def why_not(self, setting: Setting) -> str:
        return ""

    def run(self, observations: Observations, knowledge: Knowledge, rng: np.random.Generator) -> Recovered:
        cut = knowledge.cut
        everything = [np.array([token]) for token in range(cut.config.vocabulary_size)]
        first = cut.activations(everything)
        guesses = []
        for rows in observations.by_sequence(lambda exchange: exchange.activations):
            found = np.square(rows[:1, None] - first).sum(2).argmin(1)
            guesses.append(np.concatenate([found, np.full(len(rows) - 1, -1)]))
        return Recovered(target=self.target, guesses=guesses)

    def baseline(self, observations: Observations, knowledge: Knowledge, rng: np.random.Generator) -> Recovered:
        return Recovered(target=self.target, guesses=[np.full(length, -1) for length in observations.lengths])


@dataclass
class Blind(Nearest):
    """Guesses nothing."""

    name: str = "none"

    def run(self, observations: Observations, knowledge: Knowledge, rng: np.random.Generator) -> Recovered:
        return self.baseline(observations, knowledge, rng)


class Exact(Nearest):
    """Position by position, the token of the whole vocabulary that gives the row."""

    def run(self, observations: Observations, knowledge: Knowledge, rng: np.random.Generator) -> Recovered:
        vocabulary, guesses = knowledge.cut.config.vocabulary_size, []
        for rows in observations.by_sequence(lambda exchange: exchange.activations):
            found: list[int] = []
            for row in rows[:4]:
                tries = [np.array([*found, token]) for token in range(vocabulary)]
                ends = np.cumsum([len(each) for each in tries]) - 1
                found.append(int(np.square(knowledge.cut.activations(tries)[ends] - row).sum(1).argmin()))
            guesses.append(np.array(found + [-1] * (len(rows) - len(found))))
        return Recovered(target=self.target, guesses=guesses)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """40 short texts."""
    path = tmp_path / "texts.jsonl"
    pairs = [{"prompt": f"{'abcdefgh'[i % 8]}", "completion": f"{'klmnopq'[i % 7]}{i % 5}"} for i in range(40)]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


@pytest.fixture
def subject(tiny_model: Path, texts: Path) -> Subject:
    return open_subject(texts, tiny_model, None, max_length=10)


def plan(*attacks: Any, **changes: Any) -> Plan:
    setting = Setting(cut_layer=2, labels="device", batch_size=4)
    usual: dict[str, Any] = {"settings": (setting,), "num_texts": 8, "num_own": 8, "attacks": attacks}
    return Plan(**{**usual, **changes})


def quietly(what: str, done: int, total: int) -> None:
    assert 0 < done <= total


def test_texts_are_recovered_where_nothing_is_masked_and_the_controls_pass(subject: Subject) -> None:
    findings = measure(subject, plan(Exact()), quietly)
    (reading,) = findings.measured[0].readings
    assert reading.counts.tokens.value > 0.7  # the first four of five or six
    assert reading.guess < 0.5
    assert not findings.failures
    assert "Controls passed" in report.as_text(findings, width=80)


def test_an_adapter_that_is_scaled_by_the_root_of_its_rank_is_measured_so(subject: Subject, tmp_path: Path) -> None:
    config, lora = subject.model.config, LoraConfig(rank=4, alpha=8.0, rslora=True, targets=("c_attn",))
    save_adapter(tmp_path / "adapter", initial_adapter(config, lora, 1), config, lora, "base")
    _, found = meter._adapter(replace(subject, adapter=tmp_path / "adapter"), 0)
    run = Setting(cut_layer=2).of_a_run(found)
    assert (found.scale, run.lora_alpha / run.lora_rank) == (4.0, 4.0)


def test_an_adapter_whose_layers_a_pattern_names_is_refused_by_the_pattern(subject: Subject, tmp_path: Path) -> None:
    config, lora = subject.model.config, LoraConfig(targets=("c_attn",))
    save_adapter(tmp_path, initial_adapter(config, lora, 1), config, lora, "base")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": ".*c_attn"}))
    with pytest.raises(AdapterError, match=r"LoRA targets must be among .*; got \.\*c_attn$"):
        meter._adapter(replace(subject, adapter=tmp_path), 0)


def test_attacks_of_one_name_on_two_channels_are_told_apart(subject: Subject) -> None:
    (measured,) = measure(subject, plan(Exact(), Exact(channel="all channels")), quietly).measured
    assert [reading.channel for reading in measured.readings] == ["activations", "all channels"]
    assert all(len(reading.by_seed) == 1 for reading in measured.readings)


def test_an_attack_that_finds_nothing_is_said_to_be_blind_and_is_no_control(subject: Subject) -> None:
    findings = measure(subject, plan(Exact(), Blind()), quietly)
    assert not findings.failures
    assert "tell nothing of these channels: activations: none." in " ".join(report.as_text(findings, width=80).split())
    alone = measure(subject, plan(Blind()), quietly)
    assert alone.failures == ["no attack finds anything where nothing is masked, so nothing was controlled"]


class OfMaskedOnes(Exact):
    """Has nothing to add where activations have no noise."""

    def why_not(self, setting: Setting) -> str:
        return "" if setting.activation_noise else "activations say all"


def test_an_attack_for_which_no_leak_was_planted_is_named(subject: Subject) -> None:
    open_one = Setting(cut_layer=2, labels="device", batch_size=4)
    settings = (open_one, replace(open_one, activation_noise=0.01, activation_clip=100.0))
    findings = measure(subject, plan(Exact(), OfMaskedOnes(channel="all channels"), settings=settings), quietly)
    text = " ".join(report.as_text(findings, width=80).split())
    assert "hence without a planted leak to find: all channels: nearest row. " in text


class Careless(Exact):
    """Takes what it remembers for what it sees, so it finds a leak where there is none."""

    memory: Recovered | None = None

    def run(self, observations: Observations, knowledge: Knowledge, rng: np.random.Generator) -> Recovered:
        self.memory = self.memory or super().run(observations, knowledge, rng)
        return self.memory


def test_a_leak_that_is_found_where_it_was_not_planted_fails_first_of_all(subject: Subject) -> None:
    findings = measure(subject, plan(Careless()), quietly)
    assert len(findings.failures) == 1
    assert "of a planted leak of" in findings.failures[0]
    assert report.as_text(findings, width=80).startswith("A control failed: do not rely on any figure below.")


def test_what_is_masked_is_gone_and_what_is_kept_is_not_touched(subject: Subject) -> None:
    adapter, lora = meter._adapter(subject, 0)
    cut = meter.CutModel(subject.model, adapter, lora, 2)
    samples = [subject.dataset.samples[index] for index in range(8)]
    seen = Observations.of(samples, cut, Setting(cut_layer=2, labels="device", batch_size=1), bytes(32))
    kept = planted_texts(8, np.random.default_rng(1))
    result = masked(seen, kept, np.random.default_rng(2))
    for before, after, keep in zip(seen.exchanges, result.exchanges, kept.tolist(), strict=True):
        assert (before is after) == keep
        for name in ("activations", "hidden_states", "hidden_gradient", "activation_gradient"):
            one, other = getattr(before, name), getattr(after, name)
            likeness = abs((one * other).sum()) / (np.linalg.norm(one) * np.linalg.norm(other))
            assert likeness == pytest.approx(1) if keep else likeness < 0.5


def test_measurements_repeat(subject: Subject) -> None:
    one, other = (report.as_json(measure(subject, plan(Exact(), seeds=(3, 4)), quietly)) for _ in range(2))
    for findings in (one, other):
        findings["seconds"] = 0
        for setting in findings["settings"]:
            for reading in setting["readings"]:
                reading["seconds"] = 0
    assert one == other
    assert len(one["settings"][0]["readings"][0]["by_seed"]) == 2


def test_costs_are_those_of_the_model_as_transformers_computes_them(subject: Subject, tiny_model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    findings = measure(subject, plan(Blind()), quietly)
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    total = number = 0.0
    for sample in meter._Texts.drawn(subject, findings.plan, 0).attacked:
        tokens = torch.from_numpy(sample.tokens.astype(np.int64))[None]
        labels = torch.where(torch.arange(tokens.shape[1]) < tokens.shape[1] - sample.num_labels, -100, tokens)
        with torch.no_grad():
            total += float(model(tokens, labels=labels).loss) * sample.num_labels
        number += sample.num_labels
    assert findings.nats[2] == pytest.approx(total / number, rel=1e-4)
    assert findings.measured[0].cost.forward.value == 0


def test_noise_changes_the_loss_and_is_said_to_be_worth_an_epsilon(subject: Subject) -> None:
    settings = settings_of(**{**GRID, "activation_noises": [0.0, 2.0], "activation_clip": 5.0})
    findings = measure(subject, plan(Nearest(), settings=settings), quietly)
    quiet, noisy = findings.measured
    assert abs(noisy.cost.forward.value) > 0.01  # of a random model's loss nobody can say which way
    assert not quiet.epsilons
    assert set(noisy.epsilons) == {"activations, a row", "activations, a text"}
    assert noisy.readings[0].counts.tokens.value < quiet.readings[0].counts.tokens.value


def test_an_infinite_epsilon_is_null_in_json(subject: Subject) -> None:
    settings = settings_of(**{**GRID, "activation_noises": [0.0, 1e-7], "activation_clip": 5.0})
    found = report.as_json(measure(subject, plan(Blind(), settings=settings), quietly))
    json.dumps(found, allow_nan=False)
    assert found["settings"][1]["epsilon"] == {"activations, a row": None, "activations, a text": None}


def test_noise_in_gradients_costs_what_a_training_with_it_costs(subject: Subject) -> None:
    settings = settings_of(**{**GRID, "gradient_noises": [0.0, 1000.0], "gradient_clip": 1.0})
    findings = measure(subject, plan(Blind(), settings=settings, training_steps=4), quietly)
    quiet, noisy = (each.cost.trained for each in findings.measured)
    assert quiet is not None
    assert quiet.value == 0
    assert noisy is not None
    assert abs(noisy.value) > 1e-4


def test_a_short_training_trains_both_parts_as_if_they_were_one(subject: Subject) -> None:
    import torch

    from split_model import OptimiserConfig, adamw, take_step

    (adapter, lora), texts = meter._adapter(subject, 0), meter._Texts.drawn(subject, plan(Blind()), 0).own
    cut = CutModel(subject.model, adapter, lora, 2)
    setting = Setting(cut_layer=2, labels="device", batch_size=4)
    train(cut, setting, texts, bytes(32), steps=2)

    whole = CutModel(subject.model, adapter, lora, 2)
    parts = (whole.edge, whole.server)
    optimiser = adamw([matrix for part in parts for matrix in part.matrices().values()], OptimiserConfig(learning_rate=1e-3))
    for step in range(2):
        batch = pack(texts[4 * step : 4 * step + 4])
        tokens, lengths, counts, labels = (
            torch.from_numpy(array).long() for array in (batch.tokens, batch.lengths, batch.label_counts, batch.labels)
        )
        (whole.server.summed_loss(whole.edge(tokens, lengths), lengths, counts, labels) / len(labels)).backward()
        take_step(optimiser, 1e-3)
    for ours, reference in zip((cut.edge, cut.server), parts, strict=True):
        for name, matrix in reference.adapter().items():
            assert not torch.equal(matrix, adapter[name])
            torch.testing.assert_close(
                ours.adapter()[name], matrix, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


# Settings


GRID: dict[str, Any] = {
    "cut_layers": [2],
    "codecs": ["float32"],
    "labels": ["device"],
    "label_rows": ["shown"],
    "activation_noises": [0.0],
    "activation_clip": 0.0,
    "gradient_noises": [0.0],
    "gradient_clip": 0.0,
    "batch_size": 4,
}


def test_lists_make_a_grid_that_begins_with_the_open_setting_of_each_cut() -> None:
    settings = settings_of(
        **{**GRID, "cut_layers": [1, 2], "codecs": ["int8", "int4"], "activation_noises": [0.0, 0.1], "activation_clip": 3}
    )
    assert [(each.cut_layer, each.codec, each.activation_noise, each.activation_clip) for each in settings[:5]] == [
        (1, "float32", 0, 0),
        (1, "int8", 0, 0),
        (1, "int8", 0.1, 3),
        (1, "int4", 0, 0),
        (1, "int4", 0.1, 3),
    ]
    assert len(settings) == 10


def test_where_labels_are_on_the_server_no_gradient_is_noised() -> None:
    settings = settings_of(**{**GRID, "labels": ["server", "device"], "gradient_noises": [0.0, 1.0], "gradient_clip": 1.0})
    assert [(each.labels, each.gradient_noise) for each in settings] == [("device", 0), ("server", 0), ("device", 1)]


# The report


@pytest.fixture
def findings(subject: Subject) -> Findings:
    return measure(subject, plan(Nearest(), Blind()), quietly)


@pytest.mark.parametrize("width", [60, 80, 200])
def test_no_line_of_a_report_is_wider_than_the_terminal(findings: Findings, width: int) -> None:
    lines = report.as_text(replace(findings, data="a/" * 20 + "texts.jsonl"), width=width).splitlines()
    assert max(map(len, lines)) <= width
    assert sum("whole" in line for line in lines) > 0


PROMISES = r"\b(private|privacy|safe|safely|secure|securely|protects?|protected|anonymous|guarantees?d?)\b"


def test_a_report_promises_nothing(findings: Findings) -> None:
    assert not re.search(PROMISES, report.as_text(replace(findings, data="texts", model="m"), width=80), re.I)
    assert "Not measured:" in report.as_text(findings, width=80)


# The program


@pytest.fixture
def says(tiny_model: Path, texts: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*flags: str, data: Path | None = None) -> tuple[int, str, str]:
        words = [
            "--data",
            str(data or texts),
            "--model",
            str(tiny_model),
            "--max-length",
            "6",
            "--sequences",
            "8",
        ]
        status = edge_client.cli.main(["leak", *words, "--attacker-texts", "8", *flags])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_program_prints_a_report_and_writes_it_in_all_forms(
    says: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(program, "Plan", lambda **words: Plan(**words, attacks=(Exact(),)))
    folder = tmp_path / "leak"
    status, out, err = says("--cut-layer", "1", "--codec", "int8", "--output", str(folder), "--json", str(tmp_path / "a.json"))
    assert status == 0
    assert out.startswith("Controls passed")
    assert "Cut 1, int8, no noise, labels on the device" in out
    assert err.startswith("2 settings, 1 seed, 8 texts each: about ")
    assert "measurement" in err
    assert {path.name for path in folder.iterdir()} == {"report.txt", "report.json", "picture.svg", "picture.png"}
    assert json.loads((tmp_path / "a.json").read_text()) == json.loads((folder / "report.json").read_text())
    assert not json.loads((folder / "report.json").read_text())["controls_failed"]


def test_program_that_does_not_trust_itself_says_so_and_fails(
    says: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "Plan", lambda **words: Plan(**words, attacks=(Blind(),)))
    status, out, err = says("--cut-layer", "1", "--codec", "float32")
    assert status == 1
    assert out.startswith("A control failed")
    assert err.splitlines()[-1].startswith("splitlora-edge: a control failed")


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--cut-layer", "4"], "cut layer must be between 1 and 3 for a model of 4 blocks, got 4"),
        (["--cut-layer", "2", "--sequences", "30"], "needs as many others"),
        (["--cut-layer", "2", "--sequences", "3"], "--sequences must be at least 8"),
        (["--cut-layer", "2", "--activation-noise", "0.1"], "clip"),
        (["--cut-layer", "2", "--codec", "int3"], "int3"),
        (["--cut-layer", "2", "--labels", "nowhere"], "nowhere"),
        (["--cut-layer", "2", "--label-rows", "hidden"], "noise"),
        (["--adapter", "/nowhere", "--cut-layer", "2"], "/nowhere"),
        (["--model", "/nowhere"], "no model folder at /nowhere"),
        (["--noise-delta", "1.5"], "delta"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_sentence(
    says: Callable[..., tuple[int, str, str]], flags: list[str], reason: str
) -> None:
    status, out, err = says(*flags)
    assert (status, out) == (1, "")
    assert reason in err
    assert len(err.splitlines()) == 1


def test_a_file_that_is_not_there_is_named(says: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    status, _, err = says(data=tmp_path / "none.jsonl")
    assert status == 1
    assert "none.jsonl" in err


def test_a_list_that_is_none_is_refused(says: Callable[..., tuple[int, str, str]], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        says("--cut-layer", "1,two")
    assert "'1,two' is not whole numbers separated by commas" in capsys.readouterr().err


def test_missing_extra_is_said_in_a_sentence(
    says: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "edge_client.leak.picture", raising=False)
    monkeypatch.delattr("edge_client.leak.picture", raising=False)
    status, _, err = says("--cut-layer", "1", "--output", str(tmp_path / "o"))
    assert status == 1
    assert "pip install 'splitlora[leak]'" in err


def test_command_line_is_there_without_torch() -> None:
    import subprocess
    import sys

    check = "import sys, edge_client.cli; edge_client.cli.build_parser(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_truth_has_the_form_of_guesses(subject: Subject) -> None:
    samples = [subject.dataset.samples[index] for index in range(4)]
    for target in Target:
        assert truth(target, samples, 2)
