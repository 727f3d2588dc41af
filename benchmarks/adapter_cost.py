"""
What an adapter that can be exchanged costs, against the same adapter merged. GPT-2 small's shape with random weights, rank 8, a
prompt of 256 tokens, 64 new ones, two threads.

    python benchmarks/adapter_cost.py --rounds 9

Both models are open in one process and continue in turn; a round's ratio is of its two neighbours in time.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import harness  # first: it finds the tests' modules
import numpy as np
import reference

from edge_client import Generator
from export import export_onnx
from terminal import Progress

PRECISIONS = ("fp32", "q8", "q4")
TARGETS = {"c_attn": ["c_attn"], "all four layers of a block": ["c_attn", "c_proj", "c_fc"]}
PROMPT_TOKENS, NEW_TOKENS = 256, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = folder / "base"
        base.mkdir()
        harness.make_gpt2_small(base)
        for title, targets in TARGETS.items():
            adapter = reference.make_adapter(base, folder / title, rank=8, targets=targets)
            for kept in (False, True):
                output = folder / f"{title} {kept}"
                export_onnx(str(base), output, adapter=adapter, precisions=PRECISIONS, keep_adapter=kept)
            for precision in PRECISIONS:
                both = [Generator(folder / f"{title} {kept}", precision=precision, num_threads=2) for kept in (False, True)]
                seconds = race(both, options.rounds, f"{title}, {precision}")
                merged, kept_apart = (statistics.median(column) * 1000 for column in zip(*seconds, strict=True))
                cost = statistics.median(apart / whole for whole, apart in seconds) - 1
                rows.append([title, precision, f"{merged:.2f}", f"{kept_apart:.2f}", f"{cost:+.1%}"])
    print(harness.markdown(["adapter in", "precision", "merged, ms a token", "kept apart, ms a token", "cost"], rows))


def race(generators: list[Generator], rounds: int, what: str) -> list[list[float]]:
    """Seconds a token of each, by round; the first round warms up."""
    with Progress(rounds + 1, unit="round") as progress:
        seconds = []
        for seed in range(rounds + 1):
            seconds.append([decode(generator, seed) for generator in generators])
            progress.advance(f"{what}: {seconds[-1][0] * 1000:.2f} and {seconds[-1][1] * 1000:.2f} ms a token")
    return seconds[1:]


def decode(generator: Generator, seed: int) -> float:
    """Seconds a token, from the first new one to the last."""
    prompt = np.random.default_rng(seed).integers(1000, 50000, PROMPT_TOKENS).tolist()
    tokens = generator.tokens(prompt, max_new_tokens=NEW_TOKENS)
    next(tokens)
    began = time.perf_counter()
    count = sum(1 for _ in tokens)
    if not count:
        raise RuntimeError("the continuation has ended with its first token")
    return (time.perf_counter() - began) / count


if __name__ == "__main__":
    main()
