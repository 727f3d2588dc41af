"""part.json: a device has it from the network, and believes nothing of it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from storage import GRAPH_FILES, HEAD_GRAPH_FILES, HEAD_WEIGHTS, ModelError, PartDescription, required_files

DESCRIPTION = PartDescription(
    fingerprint="0f" * 16,
    cut_layer=2,
    weights="int8",
    width=32,
    num_positions=256,
    vocabulary_size=600,
    end_token=0,
    lora_rank=4,
    lora_alpha=8.0,
    lora_dropout=0.1,
    adapter_prefix="base_model.model.transformer.h.{block}.",
    adapted={"mlp.c_fc": (32, 128), "attn.c_attn": (32, 96)},
    onnxruntime="1.23",
)


def refusal(folder: Path, content: Any) -> str:
    (folder / "part.json").write_text(json.dumps(content))
    with pytest.raises(ModelError) as caught:
        PartDescription.read(folder, onnxruntime="1.23.2")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def written(folder: Path) -> dict[str, Any]:
    DESCRIPTION.write(folder)
    content: dict[str, Any] = json.loads((folder / "part.json").read_text())
    return content


def test_what_is_written_is_read_again_and_the_layers_keep_their_order(tmp_path: Path) -> None:
    for description in (
        DESCRIPTION,
        replace(DESCRIPTION, weights="float32", lora_dropout=0.0),
        replace(DESCRIPTION, head="embedding.safetensors"),
        replace(DESCRIPTION, head=HEAD_WEIGHTS),
    ):
        description.write(tmp_path)
        found = PartDescription.read(tmp_path, onnxruntime="1.23.2")
        assert found == description
        assert list(found.adapted) == ["mlp.c_fc", "attn.c_attn"]


def test_what_a_later_version_adds_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "part.json").write_text(json.dumps(written(tmp_path) | {"weather": "fine"}))
    assert PartDescription.read(tmp_path) == DESCRIPTION


def test_a_part_knows_the_names_of_its_files_and_its_matrices() -> None:
    assert DESCRIPTION.weight_files == ("embedding.safetensors", "block-0.safetensors", "block-1.safetensors")
    assert required_files(DESCRIPTION.cut_layer) == ("part.json", *GRAPH_FILES, *DESCRIPTION.weight_files)
    with_head = required_files(DESCRIPTION.cut_layer, with_head=True)
    assert with_head == ("part.json", *GRAPH_FILES, *HEAD_GRAPH_FILES, *DESCRIPTION.weight_files)
    assert DESCRIPTION.adapter_name(1, "mlp.c_fc", "A") == "base_model.model.transformer.h.1.mlp.c_fc.lora_A.weight"


@pytest.mark.parametrize("version", ["1.23", "1.23.0", "1.24.1", "2.0", "1.32.0rc1"])
def test_a_newer_onnxruntime_runs_the_part(tmp_path: Path, version: str) -> None:
    DESCRIPTION.write(tmp_path)
    assert PartDescription.read(tmp_path, onnxruntime=version) == DESCRIPTION


@pytest.mark.parametrize("version", ["1.20", "1.22.1", "0.99", "1.9", "1", "unknown"])
def test_an_older_onnxruntime_is_told_which_one_is_needed(tmp_path: Path, version: str) -> None:
    DESCRIPTION.write(tmp_path)
    with pytest.raises(ModelError, match=f"needs onnxruntime 1.23, this device has {version}: pip install"):
        PartDescription.read(tmp_path, onnxruntime=version)


def test_part_of_another_format_is_named_before_anything_else(tmp_path: Path) -> None:
    assert "part.json has format 3; this splitlora reads formats 1 to 2" in refusal(tmp_path, {"format": 3})


@pytest.mark.parametrize("content", ["", "[]", "[" * 200_000, "9" * 5000, "\xff"])
def test_what_is_no_object_is_one_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "part.json").write_text(content, encoding="latin-1")
    with pytest.raises(ModelError, match=r"part.json (cannot be read|is not)[^\n]*$"):
        PartDescription.read(tmp_path)


@pytest.mark.parametrize("key", [key for key in DESCRIPTION.__dataclass_fields__ if key != "head"])
def test_every_member_but_the_head_is_required(tmp_path: Path, key: str) -> None:
    content = written(tmp_path)
    del content[key]
    assert f'part.json: "{key}" is missing; the server' in refusal(tmp_path, content)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        *((key, "1", f'{key} is "1"; a whole number is expected') for key in ("cut_layer", "width", "end_token", "lora_rank")),
        *((key, True, f"{key} is true; a whole number is expected") for key in ("format", "cut_layer", "vocabulary_size")),
        *((key, 0, f"{key} is 0; a whole number from 1 to ") for key in ("cut_layer", "width", "num_positions", "lora_rank")),
        *((key, 1 << 40, f"{key} is {1 << 40}; a whole number from 1 to ") for key in ("cut_layer", "width", "num_positions")),
        ("end_token", 600, "end_token is 600; a whole number from 0 to 599 is expected"),
        ("lora_alpha", 0, "lora_alpha is 0; a positive number is expected"),
        ("lora_alpha", float("nan"), "lora_alpha is NaN; a positive number is expected"),
        ("lora_alpha", float("inf"), "lora_alpha is Infinity; a positive number is expected"),
        ("lora_dropout", 1, "lora_dropout is 1; a number from 0 to below 1 is expected"),
        ("lora_dropout", None, "lora_dropout is null; a number is expected"),
        ("weights", "int4", 'weights is "int4"; one of float32, float16, int8 is expected'),
        ("fingerprint", "0F" * 16, "; 32 hexadecimal digits is expected"),
        ("fingerprint", "0f" * 16 + "\n", "; 32 hexadecimal digits is expected"),
        ("onnxruntime", "1", 'onnxruntime is "1"; a version such as 1.23 is expected'),
        ("onnxruntime", "9" * 5000, "; a version such as 1.23 is expected"),
        *(("adapter_prefix", prefix, "{block} among them") for prefix in ("h.", "{block}{block}", "{block!r}", "{0}{block}")),
        *(
            ("head", head, "; embedding.safetensors or head.safetensors is expected")
            for head in ("", "block-0.safetensors", "../head.safetensors")
        ),
        ("head", None, "head is null; a text is expected"),
        *(("adapted", value, "an object is expected") for value in ([], "c_attn", None)),
        ("adapted", {f"l{i}": [1, 1] for i in range(65)}, "adapted has 65 layers"),
        *(
            ("adapted", {name: [1, 1]}, "which is no name of a layer")
            for name in ("", "../x", "a..b", "a b", "a" * 300, "{block}")
        ),
        *(
            ("adapted", {"c_fc": shape}, "of c_fc; two sizes are expected")
            for shape in ([1], [1, 2, 3], [0, 1], [1, True], [1, 1.5], [1, 1 << 40], "12", None)
        ),
    ],
)
def test_value_that_cannot_be_right_is_named(tmp_path: Path, key: str, value: Any, message: str) -> None:
    assert message in refusal(tmp_path, written(tmp_path) | {key: value})
