"""From a model and an adapter to one folder that every runtime loads."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graphs import Floats, Graph, Weights
from split_model import check_cut_layer
from storage.exported_manifest import FORMAT, KIND, MANIFEST, SPLIT_KIND
from terminal import Progress, import_onnxruntime, version

from .adapter_folder import copy_adapter
from .attention import ATTENTIONS
from .decoder_graph import DecoderGraph
from .equalisation import Equalised
from .errors import ExportError
from .lora import LoraAdapter
from .model_files import write_genai_config, write_json, write_model_files
from .output_folder import check_output, output_folder
from .precision import PRECISIONS, Precision
from .source import Source, open_source

__all__ = ["export_onnx"]

onnxruntime = import_onnxruntime("exporting", install="splitlora[export]")

ADAPTER_FILE, PEFT_FOLDER = "adapter.onnx_adapter", "adapter"
BEST_FIRST = ("q8", "q4", "fp32", "fp16")
"""A runtime that loads only one precision gets the first of these that is exported."""


def export_onnx(
    model: str | None,
    output: Path,
    *,
    run_dir: Path | None = None,
    adapter: Path | None = None,
    precisions: Sequence[str] = ("fp32", "q8", "q4"),
    attention: str = "gqa",
    keep_adapter: bool = False,
    split: int | None = None,
    overwrite: bool = False,
) -> None:
    """
    Write an exported folder.

    Args:
        model: a Hugging Face folder, or a name on the hub; None is the model of the run.
        run_dir: a run, whose adapter is merged.
        adapter: a PEFT folder that is merged instead.
        precisions: of fp32, fp16, q8 and q4.
        attention: gqa, attn23 or ops; see `attention`.
        keep_adapter: whether the adapter stays a file of its own that can be exchanged, and the graphs are the base model's.
        split: the number of blocks in the edge part, for two graphs instead of one.

    Raises:
        ModelError, ExportError: what is to be exported cannot be read, or ``output`` cannot be written. Nothing is left of it.
    """
    check_output(output, overwrite=overwrite)
    with (
        open_source(model, run_dir=run_dir, adapter=adapter, plain_only=keep_adapter) as source,
        output_folder(output, overwrite=overwrite) as folder,
    ):
        export = OnnxFolder(folder, source, attention, keep_adapter=keep_adapter, split=split)
        export.write(precisions)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One graph: the whole model or a stretch of it."""

    key: str
    """Under which the manifest names it."""
    file: str
    blocks: range


class OnnxFolder:
    """Writes one exported folder."""

    def __init__(self, folder: Path, source: Source, attention: str, *, keep_adapter: bool, split: int | None) -> None:
        self.folder, self.source, self.attention, self.split = folder, source, attention, split
        self.config = source.config
        self.adapter: LoraAdapter = {}
        self.weights = source.merged()
        if keep_adapter:
            if split is not None:
                raise ExportError(
                    "--keep-adapter and --split cannot be combined: a runtime takes an adapter for one whole graph"
                )
            if source.adapter is None or source.adapter_folder is None:
                raise ExportError("--keep-adapter needs an adapter: give --run-dir or --adapter")
            self.adapter, self.weights = source.adapter, source.base()
        self.equalised = Equalised(self.weights, self.config)
        head_width = self.config.head_width
        if attention == "gqa" and head_width % 8:
            raise ExportError(
                f"--attention gqa needs heads of a multiple of 8 elements, this model's have {head_width}; use attn23 or ops"
            )
        self.parts = self._parts()

    def _parts(self) -> list[Part]:
        blocks = range(self.config.num_layers)
        if self.split is None:
            return [Part(key="graph", file="model", blocks=blocks)]
        check_cut_layer(self.split, self.config.num_layers)
        return [
            Part(key="edge_graph", file="edge_part", blocks=blocks[: self.split]),
            Part(key="server_graph", file="server_part", blocks=blocks[self.split :]),
        ]

    def write(self, precisions: Sequence[str]) -> None:
        (self.folder / "onnx").mkdir()
        # Each tensor is read once for each precision and once for model.safetensors; a tied table, once more for a second part.
        tables = len(self.parts) - 1 if self.config.tied_head else 0
        total = len(self.config.tensor_shapes) * (1 + len(precisions)) + tables * len(precisions)
        with Progress(total, unit="tensor") as progress:
            files = {name: self._write_graphs(PRECISIONS[name], progress) for name in precisions}
            names = [Path(name).name for entry in files.values() for name in entry["bytes"] if name.endswith(".onnx")]
            js = {"use_external_data_format": dict.fromkeys(names, 1), "kv_cache_dtype": {"fp16": "float16"}}
            watched = Watched(self.weights, progress, "model.safetensors")
            write_model_files(self.folder, self.source, watched, {"transformers.js_config": js})
        if self.adapter and self.source.adapter_folder is not None:
            write_adapter(self.folder / ADAPTER_FILE, self.adapter, self.equalised)
            copy_adapter(self.source.adapter_folder, self.folder / PEFT_FOLDER)
        if self.split is None:
            best = next(name for name in BEST_FIRST if name in precisions)
            shared = self.attention == "gqa"
            write_genai_config(self.folder, self.source, filename=files[best]["graph"], shared_cache=shared)
        write_json(self.folder / MANIFEST, self._manifest(files))

    def _write_graphs(self, precision: Precision, progress: Progress) -> dict[str, Any]:
        form, entry, sizes = ATTENTIONS[self.attention], {}, dict[str, int]()
        weights = Watched(self.equalised, progress, precision.name)
        for part in self.parts:
            path = self.folder / "onnx" / f"{part.file}{precision.suffix}.onnx"
            with Graph(path) as graph:
                adapted = self.adapter.keys()
                DecoderGraph(graph, self.config, weights, precision, self.attention, part.blocks, adapted).build()
                graph.save(self.config.family.model_type, form.opset, form.ir_version)
            entry[part.key] = f"onnx/{path.name}"
            sizes |= {f"onnx/{file.name}": file.stat().st_size for file in (path, graph.data_path)}
        return {**entry, "bytes": sizes}

    def _manifest(self, precisions: dict[str, Any]) -> dict[str, Any]:
        config = self.config
        return {
            "format": FORMAT,
            "kind": KIND if self.split is None else SPLIT_KIND,
            "software": f"splitlora {version()}",
            "base": {"model": self.source.name, "fingerprint": self.source.fingerprint},
            "run": asdict(self.source.run) if self.source.run else None,
            "attention": self.attention,
            "adapter": ADAPTER_FILE if self.adapter else None,
            "peft_adapter": PEFT_FOLDER if self.adapter else None,
            "split": self.split,
            "num_layers": config.num_layers,
            "num_heads": config.num_heads,
            "width": config.width,
            "vocabulary_size": config.vocabulary_size,
            "context": config.num_positions,
            "end_token": config.end_token,
            "stop_tokens": list(config.stop_tokens),
            "precisions": precisions,
        }


class Watched(Weights):
    """Weights that advance a progress bar whenever a tensor is read."""

    def __init__(self, weights: Weights, progress: Progress, what: str) -> None:
        self._weights, self._progress, self._what = weights, progress, what

    def read(self, name: str) -> Floats:
        tensor = self._weights.read(name)
        self._progress.advance(self._what)
        return tensor

    def pieces(self, name: str) -> Iterator[Floats]:
        yield from self._weights.pieces(name)
        self._progress.advance(self._what)


def write_adapter(path: Path, adapter: LoraAdapter, base: Equalised) -> None:
    """Write an adapter as ONNX Runtime takes it, for the slots of graphs with the weights ``base``."""
    parameters = {}
    for layer, update in adapter.items():
        a, b = update.a.T * base.rows(layer)[:, None], update.b.T * np.float32(update.scale) * base.columns(layer)
        for name, matrix in (("lora_A", a), ("lora_B", b)):
            value = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(matrix, np.float32))
            parameters[f"{layer}.{name}.weight"] = value
    file = onnxruntime.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(1)
    file.set_parameters(parameters)
    file.export_adapter(str(path))
