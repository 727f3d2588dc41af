"""
One training step of GPT-2 small's shape on E2E batches of 8, LoRA r=4 on c_attn, in one process and split over loopback.

(a) transformers + PEFT in one process, padded to the longest row   (b) the split pair, a server and an edge process

Rounds are interleaved and medians compared, because the machine's speed drifts: a round of (a) runs while (b) waits for its
next batch, and the other way round.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import torch

BATCH_SIZE, RANK, LEARNING_RATE = 8, 4, 2e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--cut-layer", type=int, default=3)
    parser.add_argument("--micro-batches", type=int, default=1, help="more than 1 pay where the sides do not share their cores")
    options = parser.parse_args()
    pairs = harness.e2e_rows("train", slice(0, BATCH_SIZE * options.rounds))
    with tempfile.TemporaryDirectory() as scratch:
        model = harness.make_gpt2_small(Path(scratch))
        tokens = count_tokens(model, pairs)
        dtypes = ["float32", *(["bfloat16"] if has_bfloat16() else [])]
        racers: dict[str, Iterator[float]] = {"transformers + PEFT, one process": centralised(model, pairs)}
        for dtype in dtypes:
            racers[f"split pair, {dtype}"] = split(model, pairs, dtype, options, Path(scratch))
        seconds: dict[str, list[float]] = {name: [] for name in racers}
        for _ in range(options.rounds):
            for name, racer in racers.items():
                seconds[name].append(next(racer))
        report(seconds, tokens)
        for racer in racers.values():
            racer.close()  # type: ignore[attr-defined]


def centralised(model: Path, pairs: list[tuple[str, str]]) -> Iterator[float]:
    """Seconds of each step."""
    import reference
    from peft import LoraConfig, get_peft_model

    samples = reference.encode(pairs, model)
    config = LoraConfig(r=RANK, lora_alpha=32, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    whole: Any = get_peft_model(reference.load_base(model), config)
    optimiser = torch.optim.AdamW((p for p in whole.parameters() if p.requires_grad), lr=LEARNING_RATE)
    for start in range(0, len(samples), BATCH_SIZE):
        began = time.perf_counter()
        reference.mean_loss(whole, samples[start : start + BATCH_SIZE]).backward()
        optimiser.step()
        optimiser.zero_grad()
        yield time.perf_counter() - began


def split(model: Path, pairs: list[tuple[str, str]], dtype: str, options: argparse.Namespace, scratch: Path) -> Iterator[float]:
    """Seconds of each step: the server is a process, the edge is this one, which asks only when it is its turn."""
    from edge_client import EdgeClient

    data = harness.write_rows(scratch / "rows.txt", pairs)
    settings = {
        "model": str(model),
        "run_dir": str(scratch / dtype),
        "steps": len(pairs) // BATCH_SIZE,
        "cut_layer": options.cut_layer,
        "micro_batches": options.micro_batches,
    }
    server, url = harness.start_server({**settings, "lora_rank": RANK, "dtype": dtype})
    with EdgeClient(
        url, engine="torch", model=str(model), data=data, batch_size=BATCH_SIZE, shuffle=False, dtype=dtype
    ) as client:
        client.start()
        steps = client.train()
        for _ in range(settings["steps"]):  # type: ignore[call-overload]
            began = time.perf_counter()
            next(steps)
            yield time.perf_counter() - began
    server.join()


def count_tokens(model: Path, pairs: list[tuple[str, str]]) -> int:
    import reference

    return sum(len(tokens) for tokens, _ in reference.encode(pairs, model))


def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices faster than float32 ones."""
    from split_model import choose_dtype

    return choose_dtype("auto", torch.device("cpu"))[0] == "bfloat16"


def report(seconds: dict[str, list[float]], tokens: int) -> None:
    baseline, *_ = (statistics.median(values) for values in seconds.values())
    rows = []
    for name, values in seconds.items():
        median = statistics.median(values)
        rate = tokens / len(values) / median
        rows.append(
            [name, f"{median:.2f}", f"{min(values):.2f} - {max(values):.2f}", f"{rate:.0f}", f"{baseline / median:.2f} x"]
        )
    print(harness.markdown(["", "seconds a step, median", "range", "tokens/s", "against the first"], rows))
    print(
        f"\n{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}; bfloat16 pays here: {has_bfloat16()}"
    )


if __name__ == "__main__":
    main()
