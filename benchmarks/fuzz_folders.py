"""
What strangers give us, mutated, in its long form: models, tokenizers, adapters, exported folders, settings, invitations, data.

Each mutant either works or ends in an error that the programs turn into one sentence, within seconds, and takes no memory. What
was found is in the tests of whatever was wrong.
"""

import argparse
import ctypes
import faulthandler
import gc
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

import harness  # first: it finds the tests' modules
from fuzz import resident

from edge_client.generation import process_memory

MUTANTS, WARM = 100_000, 2_000
MEMORY = 2 << 30
"""Bytes that a process may take beside what it has at the beginning."""
SECONDS_BETWEEN_LINES = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--mutants", type=int, default=MUTANTS, help="all processes together")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="default: the time, and printed")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="make this one mutant again, and see its traceback")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    if options.only is not None:
        again(options.seed, options.only)
    else:
        fuzz(options.mutants, options.seed)


def fuzz(mutants: int, seed: int) -> None:
    processes = os.cpu_count() or 1
    began = time.monotonic()
    print(f"{mutants:,} mutants, seed {seed}", flush=True)
    outcomes: Counter[str] = Counter()
    memory = []
    with tempfile.TemporaryDirectory(dir=_quick_disk()) as scratch:
        shares = [range(number, mutants, processes) for number in range(processes)]
        with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
            work = [pool.submit(fuzz_here, seed, share, Path(scratch, str(share.start))) for share in shares]
            try:
                for done in as_completed(work):
                    results, before, after = done.result()
                    outcomes += results
                    memory.append(f"{before / 1e6:.0f} -> {after / 1e6:.0f} MB")
            except BrokenProcessPool:
                last = [(Path(scratch, str(share.start)) / "number").read_text() for share in shares]
                sys.exit(f"a process has ended; seed {seed}, and one of the mutants {', '.join(last)}: see --only")
    took = time.monotonic() - began
    rows = [[*name.split(": "), f"{count:,}"] for name, count in sorted(outcomes.items())]
    print("\n" + harness.markdown(["mutated", "what became of it", "mutants"], rows))
    total = sum(outcomes.values())
    defects = sum(count for name, count in outcomes.items() if name.startswith("A DEFECT"))
    print(f"\n{total:,} mutants in {took:.0f} s, {total / took:,.0f} a second; memory of each process {', '.join(memory)}")
    if defects:
        sys.exit(f"{defects:,} mutants ended otherwise than in a sentence")


def fuzz_here(seed: int, numbers: range, scratch: Path) -> tuple[Counter[str], int, int]:
    """In this process; what became of them, and resident bytes before and after."""
    log = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # bars, and what libraries write
        os.dup2(nowhere, stream)
    faulthandler.enable(log)
    from folder_mutation import FolderMutator, Judge

    scratch.mkdir()
    judge = Judge(scratch, log)
    resource.setrlimit(resource.RLIMIT_AS, ((process_memory("VmSize") or 0) + MEMORY, resource.RLIM_INFINITY))
    before, last_said = settled(), time.monotonic()
    for done, number in enumerate(numbers):
        (scratch / "number").write_text(str(number))
        if done == WARM:  # what is allocated once, is by now
            before = settled()
        if time.monotonic() - last_said > SECONDS_BETWEEN_LINES:
            last_said = time.monotonic()
            os.write(log, f"{done:,} of {len(numbers):,}; {resident() / 1e6:.0f} MB\n".encode())
        try:
            judge.judge(FolderMutator(seed, number))
        except Exception as error:
            judge.outcomes[f"A DEFECT: {type(error).__name__}, first seen with --seed {seed} --only {number}"] += 1
    return judge.outcomes, before, settled()


def settled() -> int:
    """Resident bytes once all that is free has been given back; the allocator of its own accord keeps 200 MB of it."""
    gc.collect()
    with suppress(OSError, AttributeError):  # it is glibc's
        ctypes.CDLL(None).malloc_trim(0)
    return resident()


def again(seed: int, number: int) -> None:
    from folder_mutation import FolderMutator, Judge

    with tempfile.TemporaryDirectory() as scratch:
        judge = Judge(Path(scratch))
        judge.judge(FolderMutator(seed, number))
        print(*judge.outcomes)


def _quick_disk() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


if __name__ == "__main__":
    main()
