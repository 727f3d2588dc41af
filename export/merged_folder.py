"""From a model and an adapter to a plain Hugging Face checkpoint."""

from pathlib import Path

from terminal import Progress

from .model_files import write_model_files
from .onnx_folder import Watched
from .output_folder import check_output, output_folder
from .source import open_source

__all__ = ["merge"]


def merge(
    model: str | None, output: Path, *, run_dir: Path | None = None, adapter: Path | None = None, overwrite: bool = False
) -> None:
    """
    Write the merged model in float32; arguments and errors are those of `export_onnx`.

    Plain LoRA is added tensor by tensor, in the memory of one tensor; the result equals PEFT's. PEFT merges all else itself.
    """
    check_output(output, overwrite=overwrite, read=(model, run_dir, adapter))
    with (
        open_source(model, run_dir=run_dir, adapter=adapter) as source,
        output_folder(output, overwrite=overwrite) as folder,
        Progress(len(source.config.tensor_shapes), unit="tensor") as progress,
    ):
        write_model_files(folder, source, Watched(source.merged(), progress, "model.safetensors"), {})
