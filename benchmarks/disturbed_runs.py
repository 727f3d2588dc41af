"""
Runs of a tiny model that are disturbed at random, each compared with the run that nobody disturbed.

    python benchmarks/disturbed_runs.py --runs 200 --seed 0

A seed decides what happens in a run: kills of the server and of both devices (SIGKILL, at a message that they send or receive,
up to two of each), and up to six faults of the link between them. See tests/chaos.py and tests/disturbance.py.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from chaos import MODES_WITH_CODECS, Scene

from terminal import Progress


def main() -> int:
    from conftest import make_model  # loads transformers, which the runs' processes, that import this file too, must not

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the first run; the others count on from it")
    options = parser.parse_args()
    faults: Counter[str] = Counter()
    differing: list[int] = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name, Progress(options.runs, unit="run") as progress:
        folder = Path(name)
        scene = Scene(folder, make_model(folder, n_layer=2, n_embd=16, n_head=2))
        expected = {mode: scene.run(_made(folder / mode), mode, []).to_its_end() for mode in MODES_WITH_CODECS}
        for seed in range(options.seed, options.seed + options.runs):
            mode, outcome = scene.run_at_random(_made(folder / str(seed)), seed)
            faults.update(outcome.struck)
            if (outcome.adapter, outcome.losses) != (expected[mode].adapter, expected[mode].losses):
                differing.append(seed)
            progress.advance(f"{faults.total()} faults, {len(differing)} runs differ")
    kinds = ", ".join(f"{count} {kind}" for kind, count in faults.most_common())
    print(f"{options.runs} runs from seed {options.seed}, {time.monotonic() - started:.0f} s")
    print(f"{faults.total()} faults: {kinds}")
    print(f"runs whose adapter or losses differ from the undisturbed run's: {len(differing)} {differing or ''}")
    return 1 if differing else 0


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


if __name__ == "__main__":
    sys.exit(main())
