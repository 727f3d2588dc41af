"""splitlora-edge preview: what a person checks before training."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tokenizer
from family_models import OPTIONS, make_family_model, make_talking_model
from family_tokenizers import CHATML, TALK, make_family_tokenizer

from edge_client.cli import main
from edge_client.data import Dataset, Form
from edge_client.preview import Model, preview
from edge_client.server_status import ping
from storage import ModelError, load_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's tokenizer, and nothing else of it."""
    folder = tmp_path / "model"
    folder.mkdir()
    make_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    entries = [{"prompt": "a", "completion": "b\n\x1b[2J"}, {"prompt": "a" * 30, "completion": "b"}, {"text": "b" * 12}]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_samples_are_shown_with_what_is_learnt_apart(folder: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data", str(data), "--model", str(folder), "--max-length", "12", "--samples", "1"]
    assert main(["preview", *options]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "sample 1: 9 tokens, 7 of them learnt",
        "  given   a·<|endoftext|>",
        "  learnt   b·\\n·\\x1b·[·2·J·<|endoftext|>",
        "",
        "a.jsonl: 3 samples, 55 tokens, 18 of them learnt; the longest has 33",
        "          8 to 15 tokens         2 ########################################",
        "         16 to 31 tokens         0",
        "         32 to 63 tokens         1 ####################",
        "2 samples with more than 12 tokens: cut",
        "1 sample cut before what is learnt of them: take --long split, or a greater --max-length if the model has it",
        "config.json does not say how many tokens the model takes: here it is --max-length alone, 12",
    ]


@pytest.mark.parametrize("option", OPTIONS)
def test_samples_are_no_longer_than_the_positions_that_a_model_has_in_training(tmp_path: Path, option: str) -> None:
    pytest.importorskip("torch")
    from split_model import PretrainedModel

    folder = make_family_model(tmp_path, option)
    assert Model.in_folder(folder).num_positions == PretrainedModel(folder).config.num_positions


@pytest.mark.parametrize(("key", "stated"), [("n_positions", {}), ("n_ctx", {"n_positions": None}), ("other", {"n_ctx": 20})])
def test_preview_cuts_where_training_would(folder: Path, data: Path, key: str, stated: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", key: 20, **stated}))
    assert list(preview(data, Model.in_folder(folder))) == list(preview(data, Model.in_folder(folder), max_length=20))
    lines = list(preview(data, Model.in_folder(folder)))
    assert "1 sample with more than 20 tokens: cut" in lines
    assert not any("config.json" in line for line in lines)


def test_positions_that_are_no_number_are_refused(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_positions": "many"}))
    with pytest.raises(ModelError, match=r'config\.json: n_positions is "many"; a whole number from 1 on is expected'):
        Model.in_folder(folder)


@pytest.mark.parametrize("long", ["cut", "split", "skip"])
@pytest.mark.parametrize("loss_on", [None, "all"])
def test_as_much_is_learnt_as_in_training(folder: Path, data: Path, long: str, loss_on: str | None) -> None:
    tokenizer = load_tokenizer(folder)
    end = tokenizer.token_to_id("<|endoftext|>")
    trained = Dataset.load(data, tokenizer, end, 12, form=Form(loss_on=loss_on), long=long)
    num_learnt = sum(sample.num_labels for sample in trained.samples)
    lines = list(preview(data, Model.in_folder(folder), max_length=12, long=long, loss_on=loss_on, num_shown=0))
    assert f" 55 tokens, {num_learnt} of them learnt;" in lines[0]


def test_answers_of_a_conversation_are_shown_one_by_one(tmp_path: Path) -> None:
    folder, data = make_family_tokenizer(tmp_path / "model", "Qwen2", chat_template=CHATML), tmp_path / "a.jsonl"
    data.write_text(json.dumps({"messages": TALK}))
    lines = [line.replace("·", "") for line in preview(data, Model.in_folder(folder))]
    learnt = [line for line in lines if line.startswith("  learnt")]
    assert learnt[0] == "  learnt  The Mill, by the river.<|im_end|>\\n"
    assert "12 tables<|im_end|>" in learnt[1]
    assert "The Mill, by the river.<|im_end|>" in next(line for line in lines[3:] if line.startswith("  given"))
    assert lines[-2].endswith("#")
    assert lines[-1].startswith("config.json does not say how many tokens the model takes: ")


def test_device_without_a_model_previews_by_the_tokenizer_of_the_server(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    from gpu_server import GpuServer

    model = make_talking_model(tmp_path / "model", "Qwen2", CHATML)
    with data.open("a") as file:
        file.write(json.dumps({"messages": TALK}) + "\n")
    with GpuServer(model=str(model), cut_layer=1, steps=1, port=0, run_dir=tmp_path / "run", dtype="float32") as server:
        state = tmp_path / "state"
        assert (
            main(["preview", "--data", str(data), "--server", server.url, "--state-dir", str(state), "--max-length", "999"])
            == 0
        )
        shown = capsys.readouterr().out.splitlines()
        assert shown == list(preview(data, Model.in_folder(model), max_length=256)), "longer than its positions no sample is"
        assert len(list((state / "parts").iterdir())) == 4, "tokenizer, its settings, template and description: no weights"
        assert ping(server.url).pong.joined == 0
    assert main(["preview", "--data", str(data), "--server", server.url]) == 1
    assert server.url in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        (
            {},
            "no sample has <|endoftext|>, at which generation stops, in what is learnt: a model that learns this does not end, "
            "unless eos_token_id in its config.json or generation_config.json names a token that is learnt",
        ),
        (
            {"config.json": [0, 2], "generation_config.json": 0},
            "no sample has <|endoftext|>, at which generation stops, in what is learnt: a model that learns this does not end",
        ),
        (
            {"config.json": 1},
            "no sample has <|endoftext|> or <|im_start|>, at which generation stops, in what is learnt: a model that learns "
            "this does not end",
        ),
        ({"config.json": 0, "generation_config.json": [0, 2]}, None),
        ({"config.json": [0, 2], "generation_config.json": None}, None),
    ],
)
def test_data_that_does_not_teach_to_end_is_pointed_out(tmp_path: Path, stated: dict[str, Any], said: str | None) -> None:
    """Answers end with <|im_end|>, token 2 here."""
    folder, data = make_family_tokenizer(tmp_path / "model", "Qwen2", chat_template=CHATML), tmp_path / "a.jsonl"
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>", "chat_template": CHATML})
    )
    for name, ends in stated.items():
        (folder / name).write_text(json.dumps({"eos_token_id": ends, "model_type": "qwen2"}))
    data.write_text(json.dumps({"messages": TALK}))
    lines = list(preview(data, Model.in_folder(folder)))
    assert [line for line in lines if line.startswith("no sample has")] == ([] if said is None else [said])


@pytest.mark.parametrize(
    ("config", "generation"), [(0, [11, 0]), ([7, 0, 9], None), ([0, 7], [9, 11]), (7, [7, 0]), ([7, 0], 0)]
)
def test_generation_stops_where_the_whole_model_says(tmp_path: Path, config: Any, generation: Any) -> None:
    pytest.importorskip("torch")
    from split_model import PretrainedModel

    folder = make_family_model(tmp_path, "llama")
    for name, ends in (("config.json", config), ("generation_config.json", generation)):
        raw = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(raw | {"eos_token_id": ends}))
    model = Model.in_folder(folder)
    assert model.stop_tokens == PretrainedModel(folder).config.stop_tokens


@pytest.mark.parametrize("end", ["</s>", [0, True], -1])
def test_ends_that_are_no_tokens_are_refused(folder: Path, end: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    with pytest.raises(
        ModelError, match=r"generation_config\.json: eos_token_id is .*; a whole number from 0 on, or a list of"
    ):
        Model.in_folder(folder)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_members_that_are_left_out_are_counted(folder: Path, tmp_path: Path, name: str) -> None:
    data, rows = tmp_path / name, [("a", "b", "x"), ("c", "", "y"), ("d", "", "")]
    names = ("text", "id", "Tool use")
    lines = [json.dumps(dict(zip(names, row, strict=True))) for row in rows]
    data.write_text("\n".join(lines if name == "a.jsonl" else map(",".join, [names, *rows])))
    assert 'left out: "Tool use" of 2 entries and "id" of 1 entry' in list(preview(data, Model.in_folder(folder)))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a b", "prompt": "c"}, 'left out: "prompt" of 1 entry'),
        ({"text": "a b", "Input": "c"}, 'left out: "Input" of 1 entry'),
        (
            {"prompt": "a", "completion": "b", "input": "c", "output": "d"},
            'left out: "input" of 1 entry and "output" of 1 entry',
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_members_of_a_kind_that_is_not_whole_are_left_out_beside_one_that_is(
    folder: Path, tmp_path: Path, row: dict[str, str], said: str
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    assert said in list(preview(tmp_path / "a.jsonl", Model.in_folder(folder)))


@pytest.mark.parametrize(
    "row", [{"instruction": "a", "input": "b", "output": "c"}, {"text": "a", "prompt": "", "completion": ""}]
)
def test_nothing_is_left_out_of_what_an_entry_is_made_of(folder: Path, tmp_path: Path, row: dict[str, str]) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    assert not any("left out" in line for line in preview(tmp_path / "a.jsonl", Model.in_folder(folder)))


def test_nothing_is_said_where_nothing_is_left_out(folder: Path, data: Path) -> None:
    assert not any("left out" in line for line in preview(data, Model.in_folder(folder)))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--max-length", "1"], "max-length must be at least 2 tokens, got 1"),
        (["--samples", "-1"], "samples must be at least 0, got -1"),
        (["--model", "/nowhere"], "/nowhere has no tokenizer"),
        (["--data", "none.jsonl"], "none.jsonl cannot be read: No such file"),
        (["--loss-on", "completion"], "--loss-on completion learns nothing of a text that stands alone"),
    ],
)
def test_what_cannot_be_previewed_is_one_sentence(
    folder: Path, data: Path, capsys: pytest.CaptureFixture[str], options: list[Any], reason: str
) -> None:
    assert main(["preview", "--data", str(data), "--model", str(folder), *options]) == 1
    assert reason in capsys.readouterr().err


def test_tokenizer_that_names_no_end_is_refused(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_family_tokenizer(tmp_path / "model", "Llama 3", eos_token=None)
    assert main(["preview", "--data", str(data), "--model", str(folder)]) == 1
    assert "does not say which token ends a text: its tokenizer_config.json should have an eos_token" in capsys.readouterr().err
