"""
Runs of a tiny model that are disturbed at random, each compared with the run that nobody disturbed.

    python benchmarks/disturbed_runs.py --runs 200 --seed 0
    python benchmarks/disturbed_runs.py --runs 200 --quorum
    python benchmarks/disturbed_runs.py --runs 200 --engine onnxruntime

A seed decides what happens in a run: kills of the server and of both devices (SIGKILL, at a message that they send or receive,
up to two of each), and up to six faults of the link between them. See tests/chaos.py and tests/disturbance.py.

With a quorum a step goes on without whoever is 30 ms late. Who that is the clock decides, and so the adapter; what is looked at
then is that everybody ends well, and that no step is lost or taken twice.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from chaos import ALL_MODES, DEVICES, Scene

from terminal import Progress


def main() -> int:
    from conftest import make_model  # loads transformers, which the runs' processes, that import this file too, must not

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the first run; the others count on from it")
    parser.add_argument("--quorum", action="store_true", help="go on without whoever is late")
    parser.add_argument("--engine", choices=DEVICES, default="torch", help="of the devices; onnxruntime's fetch their part")
    options = parser.parse_args()
    faults: Counter[str] = Counter()
    differing: list[int] = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name, Progress(options.runs, unit="run") as progress:
        folder = Path(name)
        scene = Scene(folder, make_model(folder, n_layer=2, n_embd=16, n_head=2))
        expected = {mode: scene.run(_made(folder / mode), mode, [], engine=options.engine).to_its_end() for mode in ALL_MODES}
        for seed in range(options.seed, options.seed + options.runs):
            more = {"quorum": 1, "step_deadline": 0.03} if options.quorum else {}
            mode, outcome = scene.run_at_random(_made(folder / str(seed)), seed, engine=options.engine, **more)
            faults.update(outcome.struck)
            if not options.quorum and (outcome.adapter, outcome.losses) != (expected[mode].adapter, expected[mode].losses):
                differing.append(seed)
            progress.advance(f"seed {seed}, {faults.total()} faults, {len(differing)} runs differ")
    kinds = ", ".join(f"{count} {kind}" for kind, count in faults.most_common())
    print(f"{options.runs} runs from seed {options.seed}, {time.monotonic() - started:.0f} s")
    print(f"{faults.total()} faults: {kinds}")
    if options.quorum:
        print("all ended well, with every step once")
    else:
        print(f"runs whose adapter or losses differ from the undisturbed run's: {len(differing)} {differing or ''}")
    return 1 if differing else 0


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


if __name__ == "__main__":
    sys.exit(main())
