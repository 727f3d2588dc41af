"""
What each part of calibration is worth: a run exported in q4 with every combination of them. The parts are channels made equally
large, grids that are fitted to a layer's inputs, and errors that are made good by the rows behind them.

    python benchmarks/calibration_parts.py RUN OUTPUT --texts FILE
    python benchmarks/export_quality.py OUTPUT/all OUTPUT/none ... --run-dir RUN --every 1

The product has one way to calibrate, so parts are switched off from outside here.
"""

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path
from unittest.mock import patch

import numpy as np

from export import equalisation, export_onnx, onnx_folder, rounding

PARTS = ("channels", "grids", "errors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--texts", type=Path, help="given instead of those that the model writes, in one more folder")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    export(options.run, options.output / "all", ("fp32", "q8", "q4"))
    for number in range(len(PARTS)):
        for chosen in combinations(PARTS, number):
            with without(set(PARTS) - set(chosen)):
                export(options.run, options.output / ("+".join(chosen) or "none"), ("q4",))
    if options.texts:
        export(options.run, options.output / f"all-by-{options.texts.stem}", ("q4",), options.texts)


def export(run: Path, folder: Path, precisions: Sequence[str], texts: Path | None = None) -> None:
    if not folder.exists():
        export_onnx(None, folder, run_dir=run, precisions=precisions, calibration=texts)


def without(parts: set[str]) -> ExitStack:
    """While it is entered, these parts are left out."""
    stack = ExitStack()
    if "channels" in parts:
        unchanged = lambda config, weights, *_: equalisation.Equalised(weights, config, {})  # noqa: E731
        stack.enter_context(patch.object(onnx_folder, "equalised", unchanged))
    if "grids" in parts:
        stack.enter_context(patch.object(rounding, "NARROWED", rounding.NARROWED[:1]))
    if "errors" in parts:
        stack.enter_context(patch.object(rounding, "_influence", lambda sums: np.eye(len(sums), dtype=np.float32)))
    return stack


if __name__ == "__main__":
    main()
