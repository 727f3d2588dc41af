"""The command splitlora-export. Nothing heavy is imported before it is known what is asked."""

import argparse
import shutil
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from terminal import Parser, run_program, show_log, version

__all__ = ["build_parser", "main"]

PROGRAM = "splitlora-export"
PRECISIONS = ("fp32", "fp16", "q8", "q4")


def build_parser() -> Parser:
    parser = Parser(prog=PROGRAM, description="Turn a run's result into what people deploy.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    onnx = commands.add_parser(
        "onnx",
        help="export a model for onnxruntime and other runtimes",
        description="Write a folder that onnxruntime, onnxruntime-genai, transformers.js, optimum and transformers load.",
    )
    _add_source(onnx)
    onnx.add_argument(
        "--precision",
        type=_precisions,
        default=("fp32", "q8", "q4"),
        metavar="LIST",
        help="of fp32, fp16 (for GPUs), q8 and q4, separated by commas (default: fp32,q8,q4)",
    )
    onnx.add_argument(
        "--attention",
        choices=("gqa", "attn23", "ops"),
        default="gqa",
        help="gqa: onnxruntime's operator, which writes to one cache buffer; attn23: the operator of standard ONNX, opset 23; "
        "ops: matrix products only (default: %(default)s)",
    )
    onnx.add_argument("--keep-adapter", action="store_true", help="export the base model, and its adapter as a file of its own")
    onnx.add_argument(
        "--split", type=int, metavar="K", help="write two graphs: the embeddings with the first K blocks, and the rest"
    )
    onnx.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="texts like those that the model will see, one per line, by which q8 and q4 are made (default: texts that the "
        "model writes itself)",
    )
    onnx.set_defaults(run=run_onnx)

    merge = commands.add_parser("merge", help="export a plain checkpoint", description="Write a plain Hugging Face checkpoint.")
    _add_source(merge)
    merge.set_defaults(run=run_merge)

    verify = commands.add_parser(
        "verify",
        help="compare an exported folder with its model",
        description="Compare an exported folder with its checkpoint, or with its base model and adapter in PEFT.",
    )
    verify.add_argument("folder", type=Path, metavar="DIR", help="a folder written by splitlora-export onnx")
    verify.add_argument(
        "--prompts", type=Path, metavar="FILE", help="texts to measure on, one per line (default: 24 English sentences)"
    )
    _add_adapter(verify)
    verify.set_defaults(run=run_verify)
    return parser


def _add_source(command: argparse.ArgumentParser) -> None:
    _add_adapter(command)
    command.add_argument("--output", type=Path, required=True, metavar="DIR", help="the folder to write")
    command.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")


def _add_adapter(command: argparse.ArgumentParser) -> None:
    adapter = command.add_mutually_exclusive_group()
    adapter.add_argument("--run-dir", type=Path, metavar="RUN", help="the run directory with the adapter")
    adapter.add_argument("--adapter", type=Path, metavar="DIR", help="a PEFT adapter folder, instead of a run")
    command.add_argument(
        "--model", help="the base model: a Hugging Face folder, or a hub name such as gpt2 (default: the run's)"
    )


def _precisions(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    unknown = [name for name in names if name not in PRECISIONS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(PRECISIONS)}")
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0, 1 after an error with one sentence on standard error, 130 after Ctrl-C."""
    options = build_parser().parse_args(arguments)
    if threading.current_thread() is threading.main_thread():
        # As Ctrl-C does: no half folder is left. 128 + 15 is what a shell calls the end by this signal.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with show_log("export"):
        return run_program(PROGRAM, lambda: options.run(options), _errors_of_users, install="splitlora[export]")


def run_onnx(options: argparse.Namespace) -> None:
    from .onnx_folder import export_onnx

    export_onnx(
        options.model,
        options.output,
        run_dir=options.run_dir,
        adapter=options.adapter,
        precisions=options.precision,
        attention=options.attention,
        keep_adapter=options.keep_adapter,
        split=options.split,
        calibration=options.calibration,
        overwrite=options.overwrite,
    )
    _say(f"done: {options.output}; to check it: splitlora-export verify {options.output}")


def run_merge(options: argparse.Namespace) -> None:
    from .merged_folder import merge

    merge(options.model, options.output, run_dir=options.run_dir, adapter=options.adapter, overwrite=options.overwrite)
    _say(f"done: {options.output}")


def run_verify(options: argparse.Namespace) -> None:
    from .errors import Disagreement
    from .verification import table, verify

    agreements = verify(options.folder, options.prompts, model=options.model, run_dir=options.run_dir, adapter=options.adapter)
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print(table(agreements, columns))  # noqa: T201
    nonsense = [agreement for agreement in agreements if not agreement.is_finite]
    if nonsense:
        overflow = all(agreement.may_overflow for agreement in nonsense)
        why = ", which they overflow: use another precision" if overflow else ": its files are broken; export it again"
        names = ", ".join(agreement.precision for agreement in nonsense)
        raise Disagreement(f"{options.folder} computes no numbers in {names}{why}")
    beyond = [agreement.precision for agreement in agreements if not agreement.within_tolerance]
    if beyond:
        raise Disagreement(f"{options.folder} is beyond tolerance in {', '.join(beyond)}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201


def _errors_of_users() -> tuple[type[Exception], ...]:
    from storage import AdapterError, ModelError

    from .errors import Disagreement, ExportError

    return (ExportError, Disagreement, AdapterError, ModelError)
