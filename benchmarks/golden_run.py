"""
Does another version of this project say the same, to the byte, and learn the same, to the bit?

    python benchmarks/golden_run.py record FOLDER     with the version that is known to be right
    python benchmarks/golden_run.py compare FOLDER    with the one that has changed

Several small runs, with real sockets: every message that either side sends is hashed as it goes out, and the adapter is hashed
at the end. Of a message only what the clock decides is made constant before. FOLDER holds a text file for each run, so that a
difference is found by `diff`. Sums depend on the processor and its number of threads: record and compare on one machine.
"""

import argparse
import hashlib
import os
import sys
import threading
import uuid
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from edge_client import EdgeClient  # noqa: E402
from gpu_server import GpuServer  # noqa: E402
from protocol import Message, Seconds, Session, identity  # noqa: E402

MODEL = str(ROOT / "examples" / "base_model")
CONSTANT = {"seconds": Seconds(), "queue_seconds": 0.0, "compute_seconds": 0.0, "checkpoint": 0}
"""What messages tell of time, and of how far the disk has come."""
SAMPLES = {"a": 18, "b": 11}
CASES: dict[str, dict[str, Any]] = {
    "summed gradients": {"steps": 5, "micro_batches": 2},
    "averaged adapters": {"epochs": 2, "aggregate_every": 3, "micro_batches": 2, "lr_schedule": "linear"},
    "dropout": {"steps": 3, "lora_dropout": 0.2, "lora_targets": ("c_attn", "c_fc")},
    "int8 that is left": {"steps": 6, "codec": "int8", "check_codec_every": 2, "codec_tolerance": 1e-9, "micro_batches": 3},
    "delta": {"epochs": 3, "codec": "delta"},
    "delta in long rounds": {"epochs": 2, "codec": "delta", "aggregate_every": 2, "micro_batches": 2},
    "labels on the device": {"steps": 4, "labels": "device", "codec": "int8", "micro_batches": 2},
    "a device comes back": {"steps": 6, "micro_batches": 2},
    "a device comes back in a long round": {"steps": 8, "aggregate_every": 3, "micro_batches": 2},
}


class Hung(Exception):
    """Stands for the death of a device."""


def listen(said: dict[str, list[str]]) -> Callable[[Session, Message], bytes]:
    """Replaces `Session.send`: notes what is sent, by sender and client."""
    send = Session.send

    def noting(session: Session, message: Message) -> bytes:
        told = {name: value for name, value in CONSTANT.items() if hasattr(message, name)}
        data = send(session, replace(message, **told) if told else message)
        hello = session._agreed.hello
        kind, number, micro_batch = identity(message)
        line = f"{kind.__name__} {number} {micro_batch} {len(data)} {hashlib.sha256(data).hexdigest()}"
        said[f"{session.side.value} {hello.name if hello else '?'}"].append(line)
        return data

    return noting


def run(case: str, folder: Path) -> list[str]:
    """Lines: what was said, by whom, and the adapter that came of it."""
    said: defaultdict[str, list[str]] = defaultdict(list)
    uuid.uuid4 = lambda: uuid.UUID(int=7)  # type: ignore[assignment]  # the run's name
    unchanged, Session.send = Session.send, listen(said)  # type: ignore[method-assign]
    texts = (ROOT / "examples" / "restaurants" / "client-0.jsonl").read_text(encoding="utf-8").splitlines()

    def take_part(name: str, url: str, killed_after: int | None) -> None:
        data = folder / f"{name}.jsonl"
        count = SAMPLES[name]
        data.write_text("\n".join(texts[:count] if name == "a" else texts[-count:]) + "\n", encoding="utf-8")
        options: dict[str, Any] = {
            "model": MODEL,
            "data": data,
            "eval_data": data,
            "batch_size": 4,
            "max_length": 48,
            "name": name,
            "device": "cpu",
            "engine": "torch",
            "dtype": "float32",
            "state_dir": folder / "state",
            "give_up_after": 60,
        }
        try:
            with EdgeClient(url, **options) as client:
                for step in client.train():
                    if step.number == killed_after:
                        raise Hung
                client.perplexity()
        except Hung:
            take_part(name, url, None)

    try:
        usual = {"device": "cpu", "dtype": "float32", "micro_batches": 1, "check_codec_every": 0}
        server = GpuServer(model=MODEL, clients=2, run_dir=str(folder / "run"), port=0, **{**usual, **CASES[case]})
        with server:
            killed_after = {"a": 4 if "comes back" in case else None, "b": None}
            devices = [threading.Thread(target=take_part, args=(name, server.url, killed_after[name])) for name in SAMPLES]
            for device in devices:
                device.start()
            losses = [f"loss {step.number} {step.loss.hex()} {step.codec} {step.tokens}" for step in server.train()]
            for device in devices:
                device.join()
    finally:
        Session.send = unchanged  # type: ignore[method-assign]
    adapter = server.adapter_folder / "adapter_model.safetensors"
    lines = [f"{who}: {line}" for who in sorted(said) for line in said[who]]
    return [*lines, *losses, f"adapter {hashlib.sha256(adapter.read_bytes()).hexdigest()}"]


def main() -> int:
    parser = argparse.ArgumentParser(description="Record what runs say and learn, or compare it with what was recorded.")
    parser.add_argument("do", choices=("record", "compare"))
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    differ = 0
    for case in CASES:
        with TemporaryDirectory() as folder:
            lines = run(case, Path(folder))
        path = options.folder / f"{case.replace(' ', '-')}.txt"
        text = "\n".join(lines) + "\n"
        if options.do == "record":
            path.write_text(text, encoding="utf-8")
            state = "recorded"
        else:
            same = path.read_text(encoding="utf-8") == text
            differ += not same
            state = "the same" if same else "DIFFERENT"
            if not same:
                path.with_suffix(".now").write_text(text, encoding="utf-8")
        print(f"{case:<40} {len(lines):>5} lines  {state}", flush=True)
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
