"""Changes that make a good folder bad. What they need is imported when they are used: some tests of folders need no torch."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["change_manifest", "change_weights", "foreign_graph", "move_out", "swap_two_ids"]


def change_weights(model: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Of a model's folder, whose tensors ``change`` is given by name."""
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    change(weights)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, model / "model.safetensors", {"format": "pt"})


def swap_two_ids(tokenizer: dict[str, Any]) -> None:
    """Of two entries, in what tokenizer.json holds."""
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


def change_manifest(folder: Path, **values: Any) -> None:
    """Of an exported folder."""
    path = folder / "splitlora.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def foreign_graph(folder: Path, precision: str, file: str) -> None:
    """One that doubles what it is given, in an exported folder whose manifest knows its size."""
    import onnx
    from onnx import TensorProto, helper

    given, doubled = (helper.make_tensor_value_info(name, TensorProto.INT64, ["B", "S"]) for name in ("input_ids", "doubled"))
    node = helper.make_node("Add", ["input_ids", "input_ids"], ["doubled"])
    onnx.save(helper.make_model(helper.make_graph([node], "foreign", [given], [doubled]), ir_version=10), folder / file)
    change_manifest(folder, precisions={precision: {"graph": file, "bytes": {file: (folder / file).stat().st_size}}})


def move_out(path: Path) -> None:
    """To another folder, and leave a link."""
    path.symlink_to(path.rename(path.parents[2] / "elsewhere"))
