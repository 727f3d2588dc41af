"""
One training step on E2E batches of 8, LoRA r=4 on what PEFT adapts by default, in one process and split over loopback.

(a) transformers + PEFT in one process, padded to the longest row   (b) the split pair, a server and an edge process

Both in both precisions, on random weights of a model's shape. Rounds are interleaved and medians compared,
because the machine's speed drifts: a round of (a) runs while (b) waits for its next batch, and the other way round.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import torch

from split_model.products import bfloat16_pays

BATCH_SIZE, RANK, LEARNING_RATE = 8, 4, 2e-4
SHAPES = {"gpt2": harness.make_gpt2_small, "smollm2-135m": harness.make_smollm2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="gpt2")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--cut-layer", type=int, default=3)
    parser.add_argument("--micro-batches", type=int, default=1, help="more than 1 pay where the sides do not share their cores")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    options = parser.parse_args()
    pairs = harness.e2e_rows("train", slice(0, BATCH_SIZE * options.rounds))
    with tempfile.TemporaryDirectory() as scratch:
        model = SHAPES[options.shape](Path(scratch) / "model")
        tokens = count_tokens(model, pairs)
        racers: dict[tuple[str, str], Iterator[float]] = {}
        for dtype in options.dtypes:
            racers["transformers + PEFT, one process", dtype] = centralised(model, pairs, dtype)
            racers["split pair", dtype] = split(model, pairs, dtype, options, Path(scratch))
        seconds: dict[tuple[str, str], list[float]] = {name: [] for name in racers}
        for _ in range(options.rounds):
            for name, racer in racers.items():
                seconds[name].append(next(racer))
        report(seconds, tokens)
        rows = tokens // options.rounds
        shares = {dtype: share_of_mm(model, rows, getattr(torch, dtype)) for dtype in options.dtypes}
        for racer in racers.values():
            racer.close()  # type: ignore[attr-defined]
    pays, why = bfloat16_pays()
    print(f"\n{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}; bfloat16 pays: {pays}, {why}")
    for dtype, share in shares.items():
        print(f"products with the blocks' matrices in {dtype}: {share:.0%} of the rate of torch.mm on the same shapes")


def centralised(model: Path, pairs: list[tuple[str, str]], dtype: str) -> Iterator[float]:
    """Seconds of each step. The base model is in ``dtype``, and its adapter in float32, as PEFT has it and as ours is."""
    import reference
    from peft import LoraConfig, get_peft_model

    from split_model import PretrainedModel

    samples = reference.encode(pairs, model)
    family = PretrainedModel(model).config.family
    config = LoraConfig(
        r=RANK,
        lora_alpha=32,
        target_modules=list(family.usual_targets),
        fan_in_fan_out=family.stores_in_out,
        task_type="CAUSAL_LM",
    )
    whole: Any = get_peft_model(reference.load_base(model, getattr(torch, dtype)), config)
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


def share_of_mm(model: Path, rows: int, dtype: torch.dtype) -> float:
    """
    The rate of `frozen_linear` to that of `torch.mm` in the same dtype: of both directions of all products
    of all blocks but the first, one block after the other as in a step, since no cache holds the matrices of them all.
    """
    from split_model import LoraConfig, PretrainedModel, ServerPart
    from split_model.products import frozen_linear

    base = PretrainedModel(model)
    lora = LoraConfig(targets=base.config.lora_targets)
    part = ServerPart(base, 1, lora, weight_dtype=dtype, device=torch.device("cpu"), with_head=False)
    matrices = [layer.matrix for block in part.blocks for layer in block.layers.values()]  # (in, out)
    given = {width: torch.randn(rows, width) for matrix in matrices for width in matrix.shape}
    rounded = {width: x.to(dtype) for width, x in given.items()}

    def ours() -> None:
        for matrix in matrices:
            inputs, outputs = matrix.shape
            frozen_linear(given[inputs], matrix.T)
            frozen_linear(given[outputs], matrix)

    def of_torch() -> None:
        for matrix in matrices:
            inputs, outputs = matrix.shape
            torch.mm(rounded[inputs], matrix)
            torch.mm(rounded[outputs], matrix.T)

    seconds: dict[Callable[[], None], list[float]] = {ours: [], of_torch: []}
    with torch.no_grad():
        for _ in range(6):
            for multiply, measured in seconds.items():
                began = time.perf_counter()
                multiply()
                measured.append(time.perf_counter() - began)
    return min(seconds[of_torch]) / min(seconds[ours])


def report(seconds: dict[tuple[str, str], list[float]], tokens: int) -> None:
    rows = []
    peers = {dtype: statistics.median(values) for (name, dtype), values in seconds.items() if name != "split pair"}
    for (name, dtype), values in seconds.items():
        median = statistics.median(values)
        rate = tokens / len(values) / median
        spread = f"{min(values):.2f} - {max(values):.2f}"
        rows.append([name, dtype, f"{median:.2f}", spread, f"{rate:.0f}", f"{peers[dtype] / median:.2f} x"])
    print(harness.markdown(["", "", "seconds a step, median", "range", "tokens/s", "against the peer in this precision"], rows))


if __name__ == "__main__":
    main()
