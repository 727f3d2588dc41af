"""From a model and an adapter to one folder that every runtime loads."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from terminal import Progress, version

from .attention import ATTENTIONS
from .equalisation import Equalised
from .errors import ExportError
from .gpt2 import add_gpt2
from .graph import Graph
from .model_files import write_genai_config, write_json, write_model_files
from .output_folder import output_folder
from .precision import PRECISIONS, Precision
from .source import Source, open_source

__all__ = ["export_onnx"]

FORMAT = 1
BEST_FIRST = ("q8", "q4", "fp32", "fp16")
"""Which precision a runtime loads that takes only one."""


def export_onnx(
    model: str,
    output: Path,
    *,
    adapter: Path | None = None,
    precisions: Sequence[str] = ("fp32", "q8", "q4"),
    attention: str = "gqa",
    overwrite: bool = False,
) -> None:
    """
    Raises:
        ModelError, ExportError: what is to be exported cannot be read, or ``output`` cannot be written. Nothing is left of it.
    """
    with open_source(model, adapter=adapter) as source, output_folder(output, overwrite=overwrite) as folder:
        _check(source, attention)
        (folder / "onnx").mkdir()
        weights = source.merged()
        with Progress(len(precisions) + 1, unit="precision") as progress:
            files = {}
            for name in precisions:
                progress_figures = f"{name}"
                files[name] = _write_graph(folder, source, PRECISIONS[name], attention)
                progress.advance(progress_figures)
            names = [Path(file["graph"]).name for file in files.values()]
            js = {"use_external_data_format": dict.fromkeys(names, 1), "kv_cache_dtype": {"fp16": "float16"}}
            write_model_files(folder, source, weights, {"transformers.js_config": js})
            progress.advance("model.safetensors")
        best = next(name for name in BEST_FIRST if name in precisions)
        write_genai_config(folder, source.config, filename=files[best]["graph"], shared_cache=attention == "gqa")
        write_json(folder / "splitlora.json", _manifest(source, attention, files))


def _check(source: Source, attention: str) -> None:
    width = source.config.width // source.config.num_heads
    if attention == "gqa" and width % 8:
        raise ExportError(f"--attention gqa needs heads whose width is a multiple of 8, not {width}; use attn23 or ops")


def _write_graph(folder: Path, source: Source, precision: Precision, attention: str) -> dict[str, Any]:
    form, config = ATTENTIONS[attention], source.config
    path = folder / "onnx" / f"model{precision.suffix}.onnx"
    with Graph(path) as graph:
        add_gpt2(graph, config, Equalised(source.merged(), config), precision, attention, range(config.num_layers))
        graph.save("gpt2", form.opset, form.ir_version)
    files = (path, path.with_name(f"{path.name}_data"))
    return {
        "graph": f"onnx/{path.name}",
        "bytes": {f"onnx/{file.name}": file.stat().st_size for file in files},
    }


def _manifest(source: Source, attention: str, precisions: dict[str, Any]) -> dict[str, Any]:
    config = source.config
    return {
        "format": FORMAT,
        "kind": "language model",
        "software": f"splitlora {version()}",
        "base": {"model": source.name, "fingerprint": source.fingerprint},
        "run": asdict(source.run) if source.run else None,
        "attention": attention,
        "adapter": None,
        "split": None,
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "width": config.width,
        "vocabulary_size": config.vocabulary_size,
        "context": config.num_positions,
        "end_token": config.end_token,
        "precisions": precisions,
    }
