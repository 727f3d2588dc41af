"""
Data larger than memory: what the first start with it takes, and every later one. Pairs as long as E2E's, made from a seed.

Each start is a process of its own that may have 512 MB of data beyond what it has when its imports are done and its tokenizer
is read (RLIMIT_DATA), and is kept to one core. Memory is the peak of resident memory beyond the same point.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import harness

SPARE_BYTES = 512 * 2**20
BATCH_SIZE, STEPS = 8, 2000
END_TOKEN, MAX_LENGTH = 50256, 512
WORDS = 30_000
FIELDS = ("name", "Type", "food", "price", "customer rating", "area", "family friendly", "near")
COMPARED_BYTES = 20 * 10**6  # what is read whole into a list, as a file once was, to compare steps and the tokenizer alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--measure", nargs=3, metavar=("WHAT", "DATA", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        what, data, folder = options.measure
        print(json.dumps({"load": measure_load, "list": measure_list}[what](Path(data), Path(folder))))
        return
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "pairs.jsonl"
        write_pairs(path, options.megabytes * 10**6, random.Random(0))
        time.sleep(2.5)  # a file's time is believed when it is older than the coarsest clock of a file system
        first = in_a_process("load", path, Path(name) / "tokens")
        later = in_a_process("load", path, Path(name) / "tokens")
        few = Path(name) / "few.jsonl"
        with path.open("rb") as file:
            few.write_bytes(b"".join(file.readlines(min(COMPARED_BYTES, options.megabytes * 10**6))))
        listed = in_a_process("list", few, Path(name) / "few-tokens")
        e2e = in_a_process("load", harness.shared("data/e2e/train.txt"), Path(name) / "tokens")
    rows = [
        [f"first start: peak memory beyond the imports, {first['samples']:,} samples", mega(first["loaded_peak"]), "150 MB"],
        [f"... with {STEPS} batches", mega(first["peak"]), "150 MB"],
        ["first start: speed on one core", f"{first['speed']:.1f} MB/s ({first['seconds']:.0f} s)", "5 MB/s"],
        ["the same with E2E's train.txt", f"{e2e['speed']:.1f} MB/s", ""],
        ["the tokenizers library alone, on the same texts", f"{listed['tokenizer_speed']:.1f} MB/s", ""],
        ["token file, and one epoch's order", mega(first["bytes"]), ""],
        ["second start: until the first batch", f"{later['seconds']:.2f} s", "1 s"],
        [f"second start: peak memory, {STEPS} batches included", mega(later["peak"]), "150 MB"],
        ["... of which is no file's, and stays", mega(later["anonymous"]), ""],
        ["making a batch of 8", f"{later['step'] * 1e6:.0f} us", ""],
        ["... from a list of arrays in memory", f"{listed['step'] * 1e6:.0f} us", ""],
    ]
    print(harness.markdown([f"{options.megabytes} MB of JSONL", "", "at most / at least"], rows))


def mega(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.0f} MB"


def write_pairs(path: Path, num_bytes: int, seeded: random.Random) -> None:
    """Restaurants with some of E2E's fields, in about as many words; the k-th word comes 1/k as often as the first."""
    letters = "etaoinshrdlcumwfgypbvk"
    words = ["".join(seeded.choices(letters, range(len(letters), 0, -1), k=seeded.randint(2, 9))) for _ in range(WORDS)]
    weights = list(accumulate(1 / (k + 1) for k in range(WORDS)))

    def drawn() -> Iterator[str]:
        while True:
            yield from seeded.choices(words, cum_weights=weights, k=10_000)

    word, written = drawn(), 0
    with path.open("w", encoding="utf-8") as file:
        while written < num_bytes:
            fields = [field for field in FIELDS if field == "name" or seeded.random() < 0.65]
            prompt = " | ".join(f"{field} : {next(word)} {next(word)}" for field in fields)
            completion = " ".join(next(word) for _ in range(max(5, round(seeded.gauss(20, 6)))))
            written += file.write(json.dumps({"prompt": prompt, "completion": f"{completion} ."}) + "\n")


def in_a_process(what: str, data: Path, folder: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", what, str(data), str(folder)]
    core = max(os.sched_getaffinity(0))
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        check=True,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure_load(path: Path, folder: Path) -> dict[str, float]:
    import resource

    from edge_client.data import Batches, Dataset
    from edge_client.generation import process_memory
    from storage import load_tokenizer

    tokenizer = load_tokenizer(harness.shared("tokenizers/gpt2"))
    limit = (process_memory("VmData") or 0) + SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    before, anonymous = process_memory("VmRSS") or 0, process_memory("RssAnon") or 0
    began, began_cpu = time.perf_counter(), time.process_time()
    data = Dataset.load(path, tokenizer, END_TOKEN, MAX_LENGTH, folder=folder)
    loaded_cpu, loaded_peak = time.process_time() - began_cpu, process_memory("VmHWM") or 0
    batches = Batches(data=data, name="a", batch_size=BATCH_SIZE, shuffle=True, seed=0, num_parts=1)
    batches.micro_batch(1, 0)
    seconds = time.perf_counter() - began
    return {
        "samples": len(data.samples),
        "seconds": seconds,
        "speed": path.stat().st_size / 1e6 / loaded_cpu,
        "step": seconds_a_batch(batches.micro_batch),
        "loaded_peak": loaded_peak - before,
        "peak": (process_memory("VmHWM") or 0) - before,
        "anonymous": (process_memory("RssAnon") or 0) - anonymous,
        "bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
    }


def measure_list(path: Path, folder: Path) -> dict[str, float]:
    """Samples, their order and their batches as they were when all of them were in memory, and the tokenizer by itself."""
    import numpy as np

    from edge_client.data import Batch, Dataset, pack
    from edge_client.text_file import read_texts
    from storage import encode, load_tokenizer

    tokenizer = load_tokenizer(harness.shared("tokenizers/gpt2"))
    samples = Dataset.load(path, tokenizer, END_TOKEN, MAX_LENGTH, folder=folder).samples[:]
    order = list(range(len(samples)))
    random.Random(0).shuffle(order)

    def batch(step: int, part: int) -> Batch:
        (rows,) = np.array_split(np.array(order[BATCH_SIZE * (step - 1) : BATCH_SIZE * step], np.int64), 1)
        return pack([samples[row] for row in rows.tolist()])

    step = seconds_a_batch(batch)
    texts = [text for pair in read_texts(path) for text in (pair.prompt or "", f" {pair.completion}")]
    began = time.process_time()
    for start in range(0, len(texts), 1024):
        encode(tokenizer, texts[start : start + 1024])
    return {"step": step, "tokenizer_speed": path.stat().st_size / 1e6 / (time.process_time() - began)}


def seconds_a_batch(batch: Any) -> float:
    began = time.perf_counter()
    for step in range(1, STEPS + 1):
        batch(step, 0)
    return (time.perf_counter() - began) / STEPS


if __name__ == "__main__":
    main()
