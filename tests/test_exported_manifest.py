"""splitlora.json of an exported folder: read by two programs, and wrong in no way that either of them would not notice."""

import json
from pathlib import Path
from typing import Any

import pytest

from storage import ExportedManifest, Folder


class FolderError(ValueError):
    """Of the program that reads."""


GRAPHS = ("onnx/edge_part.onnx", "onnx/server_part.onnx")
SPLIT = {
    "format": 1,
    "kind": "split language model",
    "base": {"model": "some/model", "fingerprint": "0f" * 16},
    "attention": "gqa",
    "adapter": None,
    "peft_adapter": None,
    "vocabulary_size": 600,
    "context": 256,
    "end_token": 0,
    "precisions": {"q8": {"edge_graph": GRAPHS[0], "server_graph": GRAPHS[1], "bytes": dict.fromkeys(GRAPHS, 5)}},
}
WHOLE = SPLIT | {
    "kind": "language model",
    "adapter": "adapter.onnx_adapter",
    "peft_adapter": "adapter",
    "precisions": {"q8": {"graph": GRAPHS[0], "bytes": {GRAPHS[0]: 5}}},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "onnx").mkdir()
    for name in GRAPHS:
        (tmp_path / name).write_bytes(b"graph")
    return tmp_path


def read(folder: Path, manifest: Any) -> ExportedManifest:
    (folder / "splitlora.json").write_text(json.dumps(manifest))
    return ExportedManifest.read(Folder(folder, FolderError))


def refusal(folder: Path, manifest: Any) -> str:
    with pytest.raises(FolderError) as caught:
        read(folder, manifest)
    return str(caught.value)


def test_manifest_says_where_the_files_are_and_how_large(folder: Path) -> None:
    manifest = read(folder, WHOLE)
    assert manifest.folder == folder
    assert (manifest.kind, manifest.attention) == ("language model", "gqa")
    assert manifest.fingerprint == "0f" * 16
    assert (manifest.adapter, manifest.peft_adapter) == (folder / "adapter.onnx_adapter", folder / "adapter")
    assert (manifest.vocabulary_size, manifest.context, manifest.end_token) == (600, 256, 0)
    assert manifest.require("q8").graphs == (folder / GRAPHS[0],)
    assert manifest.require("q8").num_bytes == 5


def test_other_tokens_that_end_a_text_may_be_named(folder: Path) -> None:
    assert read(folder, WHOLE).ends == (0,)
    assert read(folder, WHOLE | {"stop_tokens": [7, 599]}).ends == (0, 7, 599)


def test_split_model_has_its_parts_in_the_order_in_which_they_are_computed(folder: Path) -> None:
    precision = read(folder, SPLIT).require("q8")
    assert precision.graphs == (folder / GRAPHS[0], folder / GRAPHS[1])
    assert precision.num_bytes == 10


def test_folder_of_a_version_that_kept_no_peft_folder_is_read(folder: Path) -> None:
    first = {key: value for key, value in WHOLE.items() if key != "peft_adapter"}
    assert read(folder, first).peft_adapter is None


@pytest.mark.parametrize("key", [key for key in WHOLE if key != "peft_adapter"])
def test_every_member_is_required(folder: Path, key: str) -> None:
    message = refusal(folder, {name: value for name, value in WHOLE.items() if name != key})
    assert message.startswith(str(folder))
    assert (f'"{key}" is missing; export the model again' in message) or (key == "kind" and "of the kind null" in message)


@pytest.mark.parametrize("key", WHOLE)
@pytest.mark.parametrize("value", [True, 1.5, "1", [], {}, 10**400, -1])
def test_member_of_another_type_or_out_of_range_is_refused_by_name(folder: Path, key: str, value: Any) -> None:
    if (key, value) in (("attention", "1"), ("adapter", "1"), ("peft_adapter", "1"), ("precisions", {})):
        assert read(folder, WHOLE | {key: value})
    else:
        message = refusal(folder, WHOLE | {key: value})
        assert key in message
        assert len(message) < len(str(folder)) + 200


@pytest.mark.parametrize("fingerprint", [None, 7, "", "0F" * 16, "0f" * 15, "0f" * 17, "0f" * 16 + "\n", ["0f" * 16]])
def test_fingerprint_that_is_none_is_refused(folder: Path, fingerprint: Any) -> None:
    message = refusal(folder, WHOLE | {"base": {"model": "some/model", "fingerprint": fingerprint}})
    assert "the fingerprint of base is" in message
    assert message.endswith("; 32 hexadecimal digits are expected; export the model again")


@pytest.mark.parametrize("tokens", [7, "7", {}, [600], [-1], [True], [[7]], [10**400]])
def test_tokens_that_cannot_end_a_text_are_refused(folder: Path, tokens: Any) -> None:
    message = refusal(folder, WHOLE | {"stop_tokens": tokens})
    assert "stop_tokens" in message
    assert len(message) < len(str(folder)) + 200


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ([], "q8 is []; an object is expected"),
        ({"bytes": {}}, '"graph" is missing'),
        ({"graph": GRAPHS[0]}, '"bytes" is missing'),
        ({"graph": GRAPHS[0], "bytes": {}}, 'the size of "edge_part.onnx" is missing'),
        ({"graph": GRAPHS[0], "bytes": {GRAPHS[0]: "5"}}, 'edge_part.onnx is "5"; a whole number is expected'),
        ({"graph": 5, "bytes": {}}, "graph is 5; a text is expected"),
        ({"graph": "../x", "bytes": {"../x": 5}}, '"../x" is outside the folder'),
    ],
)
def test_precision_that_says_too_little_is_refused(folder: Path, precision: Any, message: str) -> None:
    assert message in refusal(folder, WHOLE | {"precisions": {"q8": precision}})


def test_later_format_is_refused_before_anything_else_is_read(folder: Path) -> None:
    assert refusal(folder, {"format": 2}) == f"{folder / 'splitlora.json'} has format 2; this splitlora reads format 1"


def test_precision_that_was_not_exported_or_not_wholly_copied_is_refused(folder: Path) -> None:
    manifest = read(folder, SPLIT)
    with pytest.raises(FolderError, match="was exported without q4; there is q8"):
        manifest.require("q4")
    (folder / GRAPHS[1]).write_bytes(b"gra")
    with pytest.raises(FolderError, match=r"server_part.onnx has 3 bytes of 5"):
        manifest.require("q8")
    (folder / GRAPHS[1]).unlink()
    with pytest.raises(FolderError, match=r"server_part.onnx is missing: the folder is incomplete"):
        manifest.require("q8")


def test_folder_without_a_manifest_says_what_makes_one(tmp_path: Path) -> None:
    for folder, message in ((tmp_path / "x", "no folder at"), (tmp_path, "is not an exported model: no splitlora.json")):
        with pytest.raises(FolderError, match=f"{message}.*splitlora-export onnx"):
            ExportedManifest.read(Folder(folder, FolderError))
