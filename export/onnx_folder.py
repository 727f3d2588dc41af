"""From a model and an adapter to one folder that every runtime loads."""

import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graphs import Floats, Graph, Weights
from split_model import check_cut_layer
from storage import load_tokenizer
from storage.exported_manifest import FORMAT, KIND, MANIFEST, SPLIT_KIND
from storage.fingerprint import model_number
from terminal import Progress, import_onnxruntime, user_path, version

from .adapter_folder import copy_adapter
from .attention import ATTENTIONS
from .calibration import RoundedMatrices, equalised
from .decoder_graph import DecoderGraph
from .equalisation import Equalised
from .errors import ExportError
from .exported_model import ExportedModel
from .graph_weights import Rounding
from .lora import LoraAdapter
from .model_files import first_token, write_genai_config, write_json, write_model_files
from .observation import Observer
from .output_folder import check_output, output_folder
from .precision import PRECISIONS, Precision
from .source import Source, open_source
from .texts import encode_texts, read_texts, written_by

__all__ = ["export_onnx"]

logger = logging.getLogger("export")
onnxruntime = import_onnxruntime("exporting", install="splitlora[export]")

ADAPTER_FILE, PEFT_FOLDER = "adapter.onnx_adapter", "adapter"
BEST_FIRST = ("q8", "q4", "fp32", "fp16")
"""A runtime that loads only one precision gets the first of these that is exported."""
LONGEST_TEXT = 512
"""Tokens of a text by which a model is calibrated; what comes behind them is left out."""
MOST_TOKENS = 2**16
"""Of all texts together: what a block makes of each token is kept, and a user's file may have millions of them."""


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
    calibration: Path | None = None,
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
        calibration: a file of texts like those that the model will see, one a line, by which it is quantised; without it, texts
            that the model writes itself.

    Raises:
        ModelError, ExportError: what is to be exported cannot be read, ``output`` cannot be written, or no precision is made by
            the texts of ``calibration``. Nothing is left of it.
    """
    if calibration is not None and not any(PRECISIONS[name].matrices for name in precisions):
        quantised = " and ".join(name for name, precision in PRECISIONS.items() if precision.matrices)
        raise ExportError(
            f"--calibration is of no use for {' and '.join(precisions)}: only {quantised} are made by texts; add one "
            "of them to --precision, or leave --calibration out"
        )
    check_output(output, overwrite=overwrite, read=(model, run_dir, adapter, calibration))
    with (
        open_source(model, run_dir=run_dir, adapter=adapter, plain_only=keep_adapter) as source,
        output_folder(output, overwrite=overwrite) as folder,
    ):
        texts = None if calibration is None else read_texts(user_path(calibration), "--calibration")
        export = OnnxFolder(folder, source, attention, keep_adapter=keep_adapter, split=split, texts=texts)
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

    def __init__(
        self,
        folder: Path,
        source: Source,
        attention: str,
        *,
        keep_adapter: bool,
        split: int | None,
        texts: Sequence[str] | None = None,
    ) -> None:
        self.folder, self.source, self.attention, self.split, self.texts = folder, source, attention, split, texts
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
        self.equalised = Equalised(self.weights, self.config, {})
        if self.config.num_positions < 2:
            raise ExportError(
                "this model takes a single token, so no text can be continued with it; export one that takes more"
            )
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
        smallest = min((PRECISIONS[name] for name in precisions), key=lambda precision: precision.bits)
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            observer = self._observer(Path(scratch)) if smallest.matrices else None
            if observer is not None:
                # What has room for an adapter keeps its units: the adapter of any export fits, whatever that was calibrated by.
                self.equalised = equalised(self.config, self.weights, observer, smallest, self.adapter.keys())
            self._write(precisions, observer)

    def _observer(self, scratch: Path) -> Observer:
        """Of the model while it reads the texts that were given, or texts that it writes itself."""
        config = self.config
        if self.texts is not None:
            texts = encode_texts(
                self.texts,
                load_tokenizer(self.source.folder),
                self.source.folder,
                end_token=config.end_token,
                longest=min(LONGEST_TEXT, config.num_positions),
                vocabulary_size=config.vocabulary_size,
                option="--calibration",
                enough=MOST_TOKENS,
            )
            if len(texts) < len(self.texts):
                logger.info("calibrated by %d of %d texts, drawn at random", len(texts), len(self.texts))
        else:
            whole = Part(key="graph", file="exact", blocks=range(config.num_layers))
            path = self._write_graph(scratch, whole, PRECISIONS["fp32"], self.weights)
            texts = written_by(ExportedModel([path], maps_weights=True), first_token(self.source), config.num_positions)
            for file in scratch.iterdir():
                file.unlink()
        return Observer(config, texts, self.attention, scratch)

    def _write(self, precisions: Sequence[str], observer: Observer | None) -> None:
        # Each tensor is read once for each precision and once for model.safetensors; a tied table, once more for a second part.
        tables = len(self.parts) - 1 if self.config.tied_head else 0
        total = len(self.config.tensor_shapes) * (1 + len(precisions)) + tables * len(precisions)
        with Progress(total, unit="tensor") as progress:
            files = {name: self._write_graphs(PRECISIONS[name], observer, progress) for name in precisions}
            names = [Path(name).name for entry in files.values() for name in entry["bytes"] if name.endswith(".onnx")]
            js = {"use_external_data_format": dict.fromkeys(names, 1), "kv_cache_dtype": {"fp16": "float16"}}
            watched = Watched(self.weights, progress, "model.safetensors")
            write_model_files(self.folder, self.source, watched, {"transformers.js_config": js})
        if self.adapter and self.source.adapter_folder is not None:
            write_adapter(self.folder / ADAPTER_FILE, self.adapter, model_number(self.source.fingerprint))
            copy_adapter(self.source.adapter_folder, self.folder / PEFT_FOLDER)
        if self.split is None:
            best = next(name for name in BEST_FIRST if name in precisions)
            shared = self.attention == "gqa"
            write_genai_config(self.folder, self.source, filename=files[best]["graph"], shared_cache=shared)
        write_json(self.folder / MANIFEST, self._manifest(files))

    def _write_graphs(self, precision: Precision, observer: Observer | None, progress: Progress) -> dict[str, Any]:
        entry, sizes = {}, dict[str, int]()
        weights, rounding = Watched(self.equalised, progress, precision.name), None
        if precision.matrices and observer:
            rounding = RoundedMatrices(self.config, self.equalised, weights, observer, precision)
        for part in self.parts:
            path = self._write_graph(self.folder / "onnx", part, precision, weights, rounding)
            entry[part.key] = f"onnx/{path.name}"
            sizes |= {f"onnx/{file.name}": file.stat().st_size for file in (path, path.with_name(f"{path.name}_data"))}
        return {**entry, "bytes": sizes}

    def _write_graph(
        self, folder: Path, part: Part, precision: Precision, weights: Weights, rounding: Rounding | None = None
    ) -> Path:
        form, adapted = ATTENTIONS[self.attention], self.adapter.keys()
        with Graph(folder / f"{part.file}{precision.suffix}.onnx") as graph:
            DecoderGraph(graph, self.config, weights, precision, self.attention, part.blocks, adapted, rounding).build()
            graph.save(self.config.family.model_type, form.opset, form.ir_version)
        return graph.path

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


def write_adapter(path: Path, adapter: LoraAdapter, model: int) -> None:
    """
    Write an adapter as ONNX Runtime takes it.

    Args:
        model: the `model_number` of its base model.

    Raises:
        ExportError: a matrix, times its scale, is not finite.
    """
    parameters = {}
    for layer, update in adapter.items():
        with np.errstate(over="ignore"):  # the error below says it
            scaled = update.b.T * np.float32(update.scale)
        if not np.isfinite(scaled).all():
            raise ExportError(
                f"{layer}: the adapter's matrix B, times its scale of {update.scale:g}, is beyond the largest float32; the "
                "adapter cannot be exported"
            )
        for name, matrix in (("lora_A", update.a.T), ("lora_B", scaled)):
            value = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(matrix, np.float32))
            parameters[f"{layer}.{name}.weight"] = value
    file = onnxruntime.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(model)
    file.set_parameters(parameters)
    file.export_adapter(str(path))
