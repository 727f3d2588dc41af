"""Rounding by what a model's layers are given: what is given, how matrices are rounded for it, and what a user may ask for."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from conftest import make_model
from family_models import OPTIONS, make_family_model
from family_tokenizers import make_family_tokenizer
from numpy.typing import NDArray
from onnx_reference import random_ids
from safetensors.torch import load_file, save_file

from export import ExportError, export_onnx
from export.cli import main
from export.observation import Observer
from export.quantisation import BlockFormat, Grid, quantise
from export.rounding import DAMPING, InputProducts, round_for_inputs
from export.texts import _drawn, encode_texts
from graphs import StoredWeights
from split_model import PretrainedModel
from storage import encode, load_tokenizer
from storage.tokenizer import beginning

Floats = NDArray[np.float32]


def correlated_inputs(tokens: int, width: int) -> Floats:
    generator = np.random.default_rng(0)
    return (generator.standard_normal((tokens, width)) @ generator.standard_normal((width, width))).astype(np.float32)


def one_by_one(matrix: NDArray[np.float64], products: NDArray[np.float64], grid: Grid) -> NDArray[np.float64]:
    """
    What GPTQ stands for, by its definition: rows are rounded from the first to the last, and after each all rows behind it are
    solved for again, such that the product changes least with all errors that have been made.
    """
    best, found = matrix.copy(), np.zeros_like(matrix)
    for row in range(len(matrix)):
        found[row] = grid.values(grid.integers(best[row].astype(np.float32)))
        rest = slice(row + 1, None)
        errors = matrix[: row + 1] - found[: row + 1]
        best[rest] = matrix[rest] + np.linalg.solve(products[rest, rest], products[rest, : row + 1] @ errors)
    return found


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_is_that_of_solving_again_after_every_row(bits: int) -> None:
    form = BlockFormat(bits=bits, size=32)
    inputs, matrix = correlated_inputs(200, 32), np.random.default_rng(1).standard_normal((32, 7), np.float32)
    products = InputProducts(32, form)
    products.add(inputs[:90])
    products.add(inputs[90:])
    found = round_for_inputs(matrix, products, form)
    exact = inputs.astype(np.float64).T @ inputs
    exact += np.eye(32) * DAMPING * np.trace(exact) / 32
    zero_points = found.zero_points if bits == 8 else found.zero_points & 15
    grid = Grid(scales=found.scales[:, 0], zero_points=zero_points[:, 0].astype(np.float32), largest=form.largest)
    expected = one_by_one(matrix.astype(np.float64), exact, grid)
    assert np.mean(np.abs(found.values(32, form).T - expected) > 1e-5) < 0.02  # where a value lies halfway, digits decide


@pytest.mark.parametrize(("width", "size"), [(96, 32), (100, 64)])
def test_a_product_changes_less_than_with_the_nearest_values(width: int, size: int) -> None:
    form = BlockFormat(bits=4, size=size)
    inputs, matrix = correlated_inputs(1000, width), np.random.default_rng(1).standard_normal((width, 40), np.float32)
    products = InputProducts(width, form)
    products.add(inputs)
    calibrated, nearest = round_for_inputs(matrix, products, form), *quantise([matrix.T], form)
    errors = [np.square(inputs @ (stored.values(width, form).T - matrix)).mean() for stored in (calibrated, nearest)]
    assert errors[0] < errors[1] / 1.5


@pytest.mark.parametrize("inputs", [np.zeros((5, 64), np.float32), np.ones((1, 64), np.float32)], ids=["nothing", "one token"])
def test_inputs_that_say_nothing_of_a_matrix_leave_it_near(inputs: Floats) -> None:
    form, matrix = BlockFormat(bits=4, size=32), np.random.default_rng(1).standard_normal((64, 8), np.float32)
    products = InputProducts(64, form)
    products.add(inputs)
    found = round_for_inputs(matrix, products, form).values(64, form).T
    assert np.abs(found - matrix).max() < np.ptp(matrix)
    assert np.corrcoef(found.reshape(-1), matrix.reshape(-1))[0, 1] > 0.9


def test_channels_of_a_wide_layer_are_held_in_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.rounding.WINDOW", 128)
    form, inputs = BlockFormat(bits=4, size=64), correlated_inputs(500, 300)
    products = InputProducts(300, form)
    products.add(inputs)
    assert [(window.start, window.stop) for window in products.windows] == [(0, 128), (128, 256), (256, 300)]
    matrix = np.random.default_rng(1).standard_normal((300, 5), np.float32)
    whole = round_for_inputs(matrix, products, form).values(300, form)
    for window in products.windows:
        alone = InputProducts(window.stop - window.start, form)
        alone.add(inputs[:, window])
        expected = round_for_inputs(matrix[window], alone, form).values(window.stop - window.start, form)
        assert np.array_equal(whole[:, window], expected)


@torch.no_grad()
@pytest.mark.parametrize("option", OPTIONS)
def test_layers_are_given_what_transformers_gives_them(tmp_path: Path, option: str) -> None:
    folder = make_family_model(tmp_path, option)
    base, theirs = PretrainedModel(folder), reference.load_base(folder)
    config = base.config
    texts = [random_ids(600, 20), random_ids(600, 9, seed=1)]
    observer = Observer(config, texts, "attn23", tmp_path)
    weights, expected = StoredWeights(base), dict[str, list[torch.Tensor]]()
    hooks = []
    for index in range(config.num_layers):
        for layer in config.layer_shapes:
            name = f"{config.block_name(index)}.{layer}"
            module = theirs.get_submodule(f"{config.names.prefix}{name}")
            hooks.append(
                module.register_forward_pre_hook(lambda _, given, name=name: expected.setdefault(name, []).append(given[0]))
            )
    for tokens in texts:
        theirs(input_ids=torch.from_numpy(tokens)[None])
    hidden, seen = observer.embedded(weights), set[str]()
    for index in range(config.num_layers):
        results = list(observer.block(index, weights, hidden))
        hidden = [after for after, _ in results]
        for text, (_, given) in enumerate(results):
            for layers, inputs in given.items():
                for layer in layers:
                    right = expected[layer][text].reshape(inputs.shape).numpy()
                    assert np.abs(inputs - right).max() < 2e-5 * max(1, np.abs(right).max()), layer
                    seen.add(layer)
    assert seen == set(expected)


def test_tokens_are_drawn_with_the_probabilities_of_the_model() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.1], np.float32))
    drawn = _drawn(np.broadcast_to(logits, (20_000, 4)), np.random.default_rng(0))
    counted = np.bincount(drawn[:, 0], minlength=4) / len(drawn)
    assert np.abs(counted - np.exp(logits)).max() < 4 * np.sqrt(0.25 / len(drawn))  # four standard deviations


def test_the_same_model_is_exported_to_the_same_bytes(tiny_model: Path, tmp_path: Path) -> None:
    for name in ("one", "another"):
        export_onnx(str(tiny_model), tmp_path / name, precisions=["q8", "q4"])
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one/onnx").iterdir()]
    assert len(files) == 4
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "another" / file).read_bytes(), file


def test_nothing_is_observed_for_precisions_that_round_nothing(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("export.onnx_folder.written_by", refuse)
    export_onnx(str(tiny_model), tmp_path / "out", precisions=["fp32", "fp16"])


def test_texts_of_a_user_are_those_that_it_is_rounded_for(tiny_model: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("name : The Wrestlers | food : French\nThe Wrestlers serves French food.\n" * 20)
    for name, options in {"own": {}, "given": {"calibration": texts}}.items():
        export_onnx(str(tiny_model), tmp_path / name, precisions=["q4"], **options)
    own, given = ((tmp_path / name / "onnx/model_q4.onnx_data").read_bytes() for name in ("own", "given"))
    assert own != given


def test_texts_that_are_none_are_refused_in_a_sentence(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    for file, reason in {
        "none.txt": "none.txt cannot be read",
        "empty.txt": "has no text; --calibration is a file with a text on each line",
        "bytes.txt": "bytes.txt cannot be read",
    }.items():
        command = ["onnx", "--model", str(tiny_model), "--output", str(tmp_path / "out"), "--calibration", str(tmp_path / file)]
        assert main(command) == 1
        assert reason in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_texts_begin_and_end_as_in_training(tmp_path: Path) -> None:
    folder = make_family_tokenizer(tmp_path / "model", "Llama 2")
    tokenizer = load_tokenizer(folder)
    end, (begin,) = tokenizer.token_to_id("</s>"), beginning(tokenizer)
    given: dict[str, Any] = {"end_token": end, "longest": 9, "vocabulary_size": 9999, "option": "--calibration"}
    plain, ended = encode_texts(["a", "a</s>"], tokenizer, folder, **given)
    assert plain.tolist() == ended.tolist() == [begin, *encode(tokenizer, ["a"])[0], end]


def test_texts_that_no_precision_is_made_by_are_refused(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts.txt").write_text("The Wrestlers serves French food.\n")
    command = [
        "onnx",
        "--model",
        str(tiny_model),
        "--output",
        str(tmp_path / "out"),
        "--calibration",
        str(tmp_path / "texts.txt"),
    ]
    assert main([*command, "--precision", "fp32,fp16"]) == 1
    assert capsys.readouterr().err.endswith(
        "--calibration is of no use for fp32 and fp16: only q8 and q4 are made by texts; add one of them to --precision, or "
        "leave --calibration out\n"
    )
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_model_is_refused_before_anything_is_observed(tmp_path: Path) -> None:
    model, texts = make_model(tmp_path, vocab_size=300), tmp_path / "texts.txt"
    texts.write_text("The Wrestlers serves French food.\n")
    with pytest.raises(ExportError, match="the tokenizer is of another model"):
        export_onnx(str(model), tmp_path / "out", precisions=["q4"], calibration=texts)


def test_a_model_that_computes_no_numbers_is_refused_in_few_bits(tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    for block in (0, 1):  # together beyond the largest float32
        tensors[f"transformer.h.{block}.mlp.c_proj.bias"].fill_(3e38)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError, match="leave q8 and q4 out"):
        export_onnx(str(model), tmp_path / "out", precisions=["fp32", "q8"])
    assert not (tmp_path / "out").exists()
    export_onnx(str(model), tmp_path / "out", precisions=["fp32"])


def test_of_a_large_file_some_texts_from_everywhere_are_enough(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever is kept of a text, for a file of millions it would be more than any memory."""
    seen: list[int] = []
    lines = [f"{'a' if number < 300 else 'z'} {number}" for number in range(600)]
    (tmp_path / "texts.txt").write_text("\n".join(lines))
    monkeypatch.setattr("export.onnx_folder.MOST_TOKENS", 100)

    class NotedObserver(Observer):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            seen.extend(int(tokens[0]) for tokens in given[1])
            assert 100 <= self.num_tokens < 110

    monkeypatch.setattr("export.onnx_folder.Observer", NotedObserver)
    caplog.set_level("INFO", "export")
    export_onnx(str(tiny_model), tmp_path / "out", precisions=["q4"], calibration=tmp_path / "texts.txt")
    assert len(set(seen)) == 2
    assert f"calibrated by {len(seen)} of 600 texts, drawn at random" in caplog.text


@pytest.mark.parametrize("token", [50256, 600, -1])
def test_a_first_token_that_a_model_does_not_have_begins_no_text(tiny_model: Path, tmp_path: Path, token: int) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"bos_token_id": token}))
    export_onnx(str(model), tmp_path / "out", precisions=["q8"])
    assert json.loads((tmp_path / "out/genai_config.json").read_text())["model"]["bos_token_id"] == config["eos_token_id"]


def test_inputs_whose_squares_are_no_floats_leave_a_matrix_to_its_nearest_values(tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    block = "transformer.h.0.mlp"
    tensors[f"{block}.c_fc.weight"][:, 3] = 1e20
    tensors[f"{block}.c_proj.weight"][3] = 0
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    export_onnx(str(model), tmp_path / "out", precisions=["q4"])


def test_a_model_of_one_position_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = make_model(tmp_path, n_positions=1)
    with pytest.raises(ExportError, match="this model takes a single token"):
        export_onnx(str(model), tmp_path / "out")
    assert not (tmp_path / "out").exists()
