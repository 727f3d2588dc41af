"""
Attacks, in their long form: mutated frames through the decoder, the session and the federation; parts of models that are nearly
right, handed over to devices; and then a live server.

The only exception that a frame may cause is RemoteProtocolError; of a part, an error that splitlora-edge turns into a sentence.
What was found is in tests/test_attacks.py.
"""

import argparse
import logging
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import harness  # first: it finds the tests' modules

from edge_client.generation import process_memory

if TYPE_CHECKING:
    from attacks import Trial

FRAMES, SECONDS, CHUNK = 1_500_000, 200.0, 2_000
DEVICES, SECONDS_OF_DEVICES = 2_000, 40.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--frames", type=int, default=FRAMES, help="through the decoder, all processes together")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="after which the frames end, however many there were")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="default: the time, and printed")
    options = parser.parse_args()
    fuzz(options.frames, options.seconds, options.seed)
    hand_over(DEVICES, SECONDS_OF_DEVICES, options.seed)
    attack(options.seed)


def hand_over(devices: int, seconds: float, seed: int) -> None:
    """Devices that come to a hostile server for their part, one after the other."""
    from hostile_server import Ambush

    logging.disable()  # devices say what they fetch again
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as scratch:
        ambush = Ambush(Path(scratch))
        with ambush.server.listening() as url:
            for number in range(devices):
                if time.monotonic() > end:
                    break
                try:
                    ambush.lay(url, seed, number)
                except Exception as error:
                    raise RuntimeError(f"seed {seed}, device {number}") from error
    logging.disable(logging.NOTSET)
    rows = [[*outcome.split(": "), f"{count:,}"] for outcome, count in sorted(ambush.outcomes.items())]
    print("\n" + harness.markdown(["what a server makes nearly right", "what became of it", "devices"], rows))


def fuzz(frames: int, seconds: float, seed: int) -> None:
    """Frames through the decoder and what is behind it, on all cores."""
    processes = os.cpu_count() or 1
    began = time.monotonic()
    work = [(seed * 1000 + number, frames // processes, seconds) for number in range(processes)]
    print(f"{frames:,} frames, seeds {', '.join(str(seed) for seed, _, _ in work)}", flush=True)
    made: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    memory = []
    # A process that fails ends the benchmark with its traceback, and with the frame.
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for levels, results, before, after in pool.imap_unordered(fuzz_here, work):
            made += levels
            outcomes += results
            memory.append((before, after))
    took = time.monotonic() - began
    total = sum(outcomes.values())
    for title, counts in (("how it was made", made), ("what became of it", outcomes)):
        print("\n" + harness.markdown([title, "frames"], [[name, f"{count:,}"] for name, count in counts.most_common()]))
    grown = ", ".join(f"{before / 1e6:.1f} -> {after / 1e6:.1f} MB" for before, after in memory)
    print(f"\n{total:,} frames in {took:.0f} s, {total / took:,.0f} a second; resident memory of each process {grown}")


def fuzz_here(work: tuple[int, int, float]) -> tuple[Counter[str], Counter[str], int, int]:
    """In this process; what was made, what became of it, and resident bytes before and after."""
    from mutation import Judge, Mutator

    seed, frames, seconds = work
    mutator, judge = Mutator(seed), Judge(seed)
    made: Counter[str] = Counter()
    end = time.monotonic() + seconds
    last_said, before = time.monotonic(), 0
    for number in range(frames):
        if number % CHUNK == 0:
            now = time.monotonic()
            if number == 10 * CHUNK:  # what is allocated once, is by now
                before = resident()
            if now > end:
                break
            if now - last_said > 10:
                last_said = now
                print(f"seed {seed}: {number:,} of {frames:,} frames", file=sys.stderr, flush=True)
        level, frame = mutator.frame()
        made[level] += 1
        try:
            judge.judge(frame)
        except Exception as error:
            raise RuntimeError(f"seed {seed}, frame {number}, {level}: {frame.hex()}") from error
    return made, judge.outcomes, before, resident()


def attack(seed: int) -> None:
    """The attacks of the tests, more of each, against servers in processes of their own."""
    from attacks import TRIALS, TRIALS_OF_LABELS_ON_DEVICE

    besiege(seed, "server", TRIALS)
    besiege(seed, "device", TRIALS_OF_LABELS_ON_DEVICE)


def besiege(seed: int, labels: str, trials: Mapping[str, "Trial"]) -> None:
    """One server, whose clients keep their labels or do not."""
    from attacks import besieged

    rows = []
    with tempfile.TemporaryDirectory() as scratch, besieged(Path(scratch), seed, labels) as siege:
        before = siege.resident
        for name, trial in trials.items():
            print(f"{name} ...", file=sys.stderr, flush=True)
            began = time.monotonic()
            suffered = siege.suffer(trial.attack, trial.long)
            what = ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(suffered.counts.items()))
            grown = [f"{num_bytes / 1e6:+.1f}" for num_bytes in (suffered.grown[0], suffered.grown[-1])]
            rows.append([name, what, suffered.honest_steps, f"{time.monotonic() - began:.0f}", *grown])
        files, after = siege.server.open_files() - siege.open_files, siege.server.resident()
    header = [f"attack, labels on the {labels}", "what became of it", "honest steps", "s", "MB more, first half", "second half"]
    print("\n" + harness.markdown(header, rows))
    print(
        f"\nThe server's resident memory: {before / 1e6:.0f} MB before, {after / 1e6:.0f} after; {files:+} files and sockets."
    )


def resident() -> int:
    """Bytes, of this process."""
    found = process_memory("VmRSS")
    assert found is not None
    return found


if __name__ == "__main__":
    main()
