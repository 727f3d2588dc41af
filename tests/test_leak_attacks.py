"""Attacks on what crosses the wire find all without noise, and no more than a guess behind much of it."""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from family_models import make_family_model

from edge_client.data import Sample
from edge_client.leak.attacks import Attack, Recovered
from edge_client.leak.attacks.activations_exact import SearchedActivations
from edge_client.leak.attacks.adapter_gradient import BagFromAdapterGradient
from edge_client.leak.attacks.labels import LabelRows, LabelsFromGradient, LabelsRead
from edge_client.leak.attacks.linear_inversion import Inversion, InvertedActivations, InvertedGradients
from edge_client.leak.attacks.sizes import LabelsFromSizes, RowsFromSizes
from edge_client.leak.attacks.whitening import whitening
from edge_client.leak.cut_model import CutModel
from edge_client.leak.knowledge import Knowledge
from edge_client.leak.observation import NO_TOKEN, Observations, Setting, Target, truth
from edge_client.leak.prefixes import Prefixes
from split_model import LoraConfig, PretrainedModel, initial_adapter

RANK = 4
SECRET = bytes(range(32))
CODECS = ("float32", "int8", "int4")


def some_texts(count: int, seed: int) -> list[Sample]:
    """Of a language whose tokens are chosen by the one before, with some chance; the second half is the completion."""
    rng = np.random.default_rng(seed)
    texts = []
    for _ in range(count):
        tokens = [int(rng.integers(600))]
        for _ in range(int(rng.integers(8, 14))):
            tokens.append((7 * tokens[-1] + int(rng.integers(12))) % 600)
        texts.append(Sample(np.array(tokens, np.int32), len(tokens) // 2))
    return texts


TEXTS, OWN = some_texts(6, seed=1), some_texts(48, seed=2)


@pytest.fixture(
    scope="module", params=[("gpt2", {}), ("mistral-window", {"initializer_range": 0.1})], ids=lambda param: param[0]
)
def cut(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CutModel:
    """
    A tiny model behind its second block, with an adapter that has been trained for some steps: one with a table of positions,
    and one with rotary positions, grouped heads and a window shorter than the texts.
    """
    option, sizes = request.param
    model = PretrainedModel(make_family_model(tmp_path_factory.mktemp("cut"), option, **sizes))
    generator, lora = torch.Generator().manual_seed(0), LoraConfig(rank=RANK, targets=model.config.family.usual_targets)
    adapter = {
        name: matrix if ".lora_A." in name else 0.01 * torch.randn(matrix.shape, generator=generator)
        for name, matrix in initial_adapter(model.config, lora, 0).items()
    }
    return CutModel(model, adapter, lora, 2)


def attacked(attack: Attack, cut: CutModel, **settings: Any) -> Recovered:
    setting = Setting(cut_layer=2, batch_size=3, **settings)
    assert not attack.why_not(setting)
    observations = Observations.of(TEXTS, cut, setting, SECRET)
    return attack.run(observations, Knowledge(cut, setting, OWN), np.random.default_rng(0))


def share(recovered: Recovered) -> float:
    """Of what there is to be found, the part that was."""
    found, true = np.concatenate(recovered.guesses), np.concatenate(truth(recovered.target, TEXTS, 3))
    return float(np.mean((found == true)[true != NO_TOKEN]))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_every_label_is_found_in_its_gradient(cut: CutModel, codec: str, clip: float) -> None:
    assert share(attacked(LabelsFromGradient(), cut, labels="device", codec=codec, gradient_clip=clip)) == 1


def test_labels_that_are_sent_are_read(cut: CutModel) -> None:
    assert share(attacked(LabelsRead(), cut)) == 1


def test_labels_behind_much_noise_are_only_guessed(cut: CutModel) -> None:
    noise = {"labels": "device", "gradient_noise": 100.0, "gradient_clip": 1.0}
    assert share(attacked(LabelsFromGradient(), cut, **noise)) < 0.15


def test_rows_with_a_label_are_known_however_they_are_hidden_by_little_noise(cut: CutModel) -> None:
    hidden = {"labels": "device", "label_rows": "hidden", "gradient_clip": 1.0}
    probabilities = attacked(LabelRows(), cut, **hidden, gradient_noise=1e-3).guesses
    assert (np.concatenate(probabilities) > 0.5).tolist() == np.concatenate(truth(Target.LABEL_ROWS, TEXTS, 3)).tolist()


def test_rows_with_a_label_behind_much_noise_are_those_that_lengths_and_sums_suggest(cut: CutModel) -> None:
    setting = Setting(cut_layer=2, batch_size=3, labels="device", label_rows="hidden", gradient_clip=1.0, gradient_noise=100.0)
    observations, knowledge = Observations.of(TEXTS, cut, setting, SECRET), Knowledge(cut, setting, OWN)
    rng = np.random.default_rng(0)
    found, guessed = LabelRows().run(observations, knowledge, rng), LabelRows().baseline(observations, knowledge, rng)
    assert np.concatenate(found.guesses) == pytest.approx(np.concatenate(guessed.guesses), abs=0.2)


def test_rows_with_a_label_are_told_where_they_are_shown(cut: CutModel) -> None:
    probabilities = attacked(LabelRows(), cut, labels="device").guesses
    assert np.concatenate(probabilities).tolist() == np.concatenate(truth(Target.LABEL_ROWS, TEXTS, 3)).tolist()


@pytest.mark.parametrize("codec", CODECS)
def test_every_token_is_found_in_activations(cut: CutModel, codec: str) -> None:
    assert share(attacked(SearchedActivations(), cut, codec=codec)) == 1


def test_every_token_is_found_in_clipped_activations_behind_little_noise(cut: CutModel) -> None:
    assert share(attacked(SearchedActivations(), cut, activation_clip=5.0, activation_noise=1e-3)) == 1


def test_tokens_behind_much_noise_are_those_that_are_expected_without_looking(cut: CutModel) -> None:
    noise = {"activation_clip": 5.0, "activation_noise": 1e4}
    setting = Setting(cut_layer=2, batch_size=3, **noise)
    unseen = SearchedActivations().baseline(
        Observations.of(TEXTS, cut, setting, SECRET), Knowledge(cut, setting, OWN), np.random.default_rng(0)
    )
    assert share(unseen) < 0.1
    assert share(attacked(SearchedActivations(), cut, **noise)) < 0.15
    assert share(attacked(InvertedActivations(), cut, **noise)) < 0.15


def test_gradients_at_the_hidden_states_tell_the_tokens_that_noisy_activations_do_not(cut: CutModel) -> None:
    noise = {"labels": "device", "activation_clip": 5.0, "activation_noise": 1e4}
    both = SearchedActivations(with_gradients=True)
    found = np.concatenate(attacked(both, cut, **noise).guesses)
    is_label = np.concatenate([[False, *rows[:-1]] for rows in truth(Target.LABEL_ROWS, TEXTS, 3)])
    assert (found == np.concatenate(truth(Target.TOKENS, TEXTS, 3)))[is_label].all()


def test_a_linear_map_finds_tokens_whose_embeddings_are_mixed_linearly_with_others() -> None:
    generator = torch.Generator().manual_seed(0)
    table, mixing = (torch.randn(shape, generator=generator) for shape in ((600, 32), (32, 32)))
    tokens = torch.randint(600, (2000,), generator=generator)
    rows = table[tokens] @ mixing + 0.3 * torch.randn(2000, 32, generator=generator)
    inversion = Inversion.learn(rows[:1500], tokens[:1500], tokens[:1500], table)
    assert float(np.mean(inversion.guess(rows[1500:].numpy()) == tokens[1500:].numpy())) > 0.9


def test_a_linear_map_finds_labels_in_gradients_at_the_cut(cut: CutModel) -> None:
    assert share(attacked(InvertedGradients(), cut)) > 0.2


def bags(cut: CutModel, length: int) -> tuple[float, float]:
    """Of texts cut to a length, each a micro-batch of its own: the part of tokens found in their bags, and guessed."""
    short, own = ([Sample(text.tokens[: length + 1], 2) for text in texts] for texts in (TEXTS, OWN))
    setting = Setting(cut_layer=2, batch_size=1)
    observations, knowledge = Observations.of(short, cut, setting, SECRET), Knowledge(cut, setting, own)
    attack, rng = BagFromAdapterGradient(), np.random.default_rng(0)
    recovered = attack.run(observations, knowledge, rng), attack.baseline(observations, knowledge, rng)
    pairs = [list(zip(each.guesses, truth(Target.BAG, short, 1), strict=True)) for each in recovered]
    found, guessed = (np.mean([np.isin(true, guess).mean() for guess, true in some]) for some in pairs)
    return float(found), float(guessed)


def test_tokens_no_more_than_the_adapters_rank_are_found_in_its_gradient(cut: CutModel) -> None:
    found, guessed = bags(cut, RANK)
    assert found > 0.9
    assert guessed < 0.2


def test_the_adapters_gradient_says_nothing_in_a_runs_first_step(cut: CutModel) -> None:
    fresh = CutModel(cut.model, initial_adapter(cut.config, cut.lora, 0), cut.lora, 2)
    found, guessed = bags(fresh, RANK)
    assert found == pytest.approx(guessed, abs=0.1)


def test_sizes_of_frames_tell_about_how_many_rows_and_labels_there_are(cut: CutModel) -> None:
    for attack in (RowsFromSizes(), LabelsFromSizes()):
        found = np.concatenate(attacked(attack, cut, labels="device").guesses)
        assert found == pytest.approx(np.concatenate(truth(attack.target, TEXTS, 3)), abs=2)


def test_continued_prefixes_give_the_activations_of_whole_texts(cut: CutModel) -> None:
    tokens = torch.from_numpy(np.random.default_rng(0).integers(600, size=(2, 5)))
    prefixes = Prefixes(cut.edge.blocks, 2)
    for position in range(5):
        candidates = torch.stack([tokens[:, position], 599 - tokens[:, position]], 1).flatten()  # two for each prefix
        lengths = torch.tensor([position + 1] * 4)
        texts = torch.cat([torch.cat([tokens[row // 2, :position], candidates[row : row + 1]]) for row in range(4)])
        with torch.no_grad():
            expected = cut.edge(texts, lengths)[lengths.cumsum(0) - 1]
            inputs = cut.edge.embedding(candidates.numpy(), SimpleNamespace(positions=np.full(4, position)))
            torch.testing.assert_close(prefixes.extended(inputs), expected, rtol=1e-5, atol=1e-5)
        prefixes = prefixes.chosen(torch.tensor([0, 2]), per_prefix=2)


def arrays_in(value: Any) -> Sequence[np.ndarray[Any, Any]]:
    if isinstance(value, np.ndarray):
        return [value]
    if is_dataclass(value):
        return [array for field in fields(value) for array in arrays_in(getattr(value, field.name))]
    return [array for item in value for array in arrays_in(item)] if isinstance(value, tuple) else []


@pytest.mark.parametrize("labels", ["server", "device"])
def test_observations_hold_no_token_but_labels_that_were_sent(cut: CutModel, labels: str) -> None:
    observed = Observations.of(TEXTS, cut, Setting(cut_layer=2, batch_size=3, labels=labels), SECRET)
    for exchange in observed.exchanges:
        known = [exchange.lengths, exchange.label_counts] + ([exchange.labels] if exchange.labels is not None else [])
        assert len([array for array in arrays_in(exchange) if array.dtype.kind == "i"]) == len(known)
        assert (exchange.labels is None) == (labels == "device")


def test_a_setting_that_no_run_has_is_refused_in_the_words_of_a_run() -> None:
    with pytest.raises(ValueError, match="activation_noise"):
        Setting(cut_layer=2, activation_noise=0.1)
    with pytest.raises(ValueError, match="codec must be one of float32, bfloat16, int8, int4, got delta"):
        Setting(cut_layer=2, codec="delta")


def test_channels_that_repeat_each_other_are_made_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(500, 32, generator=generator) * torch.logspace(0, 1, 32)
    repeated = values.repeat(1, 8)
    directions = whitening(repeated, 1e-4).double()
    covariance = (repeated.double().T @ repeated.double()) / len(repeated)
    covariance += 1e-4 * covariance.diagonal().mean() * torch.eye(len(covariance))
    alike = directions.T @ covariance @ directions
    torch.testing.assert_close(alike, torch.eye(len(alike), dtype=torch.float64), rtol=0, atol=1e-3)
