"""
Does a split run learn what centralised LoRA learns? gpt2-mini on E2E NLG, the paper's three contiguous thirds of train.txt.

Three edge processes and a server, each a program of its own; then transformers + PEFT in one process on the same union batches,
from the same initial adapter. Perplexity of valid.txt, token-weighted, and greedy continuations of ten of its prompts.
"""

import argparse
import tempfile
import time
from pathlib import Path

import harness
import reference
import torch
from tqdm import tqdm

from split_model import (
    EdgePart,
    LoraConfig,
    PretrainedModel,
    ServerPart,
    continue_greedily,
    initial_adapter,
    load_adapter,
    save_adapter,
)
from storage import load_tokenizer

BATCH_SIZE, CUT_LAYER, LEARNING_RATE, SEED = 8, 3, 2e-3, 0
THIRD = 14_020
LORA = LoraConfig(rank=8, alpha=32.0, targets=("c_attn",))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--valid-every", type=int, default=1, help="use every n-th row of valid.txt")
    options = parser.parse_args()
    base = harness.shared("models/gpt2-mini")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        thirds = [harness.e2e_rows("train", slice(i * THIRD, (i + 1) * THIRD)) for i in range(3)]
        files = [harness.write_rows(scratch / f"third-{i}.txt", rows) for i, rows in enumerate(thirds)]
        valid = harness.e2e_rows("valid", slice(None, None, options.valid_every))
        start = scratch / "start"
        config = PretrainedModel(base).config
        save_adapter(start, initial_adapter(config, LORA, SEED), config, LORA, str(base))

        began = time.perf_counter()
        before, split_after = run_split(base, scratch, files, harness.write_rows(scratch / "valid.txt", valid), options.steps)
        split_seconds = time.perf_counter() - began
        began = time.perf_counter()
        central_after = run_centralised(base, start, files, valid, options.steps)
        central_seconds = time.perf_counter() - began

        difference = split_after / central_after - 1
        rows = [
            ["before", f"{before:.3f}", "", ""],
            ["centralised LoRA, transformers + PEFT", f"{central_after:.3f}", f"{central_seconds:.0f}", ""],
            ["split, a server and three clients", f"{split_after:.3f}", f"{split_seconds:.0f}", f"{difference:+.4%}"],
        ]
        print(harness.markdown(["after " + f"{options.steps} steps of 3 x 8", "perplexity", "seconds", "difference"], rows))
        print(
            "\n"
            + "\n".join(
                f"- {prompt.strip()} → {text}"
                for prompt, text in continuations(base, scratch / "run", valid[:: max(1, len(valid) // 10)][:10])
            )
        )


def run_split(base: Path, scratch: Path, files: list[Path], valid: Path, steps: int) -> tuple[float, float]:
    """Perplexity before and after."""
    training = f"--steps {steps} --lr {LEARNING_RATE} --cut-layer {CUT_LAYER} --dtype float32 --seed {SEED}"
    # The evaluation rows go to one client only; its perplexity is of the whole split model.
    run = harness.SplitRun(
        base, scratch / "run", files, training, f"--batch-size {BATCH_SIZE} --dtype float32", f"--eval-data {valid}"
    )
    return harness.perplexities(run.wait()[0])


def run_centralised(base: Path, start: Path, files: list[Path], valid: list[tuple[str, str]], steps: int) -> float:
    """Perplexity after training on the batches that the clients drew."""
    names = [f"client-{number}" for number in range(len(files))]
    union = harness.union_batches(files, names, base, batch_size=BATCH_SIZE, steps=steps, seed=SEED)
    progress = tqdm(union, desc="centralised", disable=None)
    _, _, trained = reference.train(base, start, progress, dtype=torch.float32, lr=LEARNING_RATE)
    return reference.perplexity(trained, reference.encode(valid, base))


def continuations(base: Path, run_dir: Path, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    model, tokenizer = PretrainedModel(base), load_tokenizer(base)
    adapter = load_adapter(run_dir / "adapter", model.config, LORA)
    placed = {"weight_dtype": torch.float32, "device": torch.device("cpu")}
    edge, server = EdgePart(model, CUT_LAYER, LORA, **placed), ServerPart(model, CUT_LAYER, LORA, **placed)  # type: ignore[arg-type]
    for part in (edge, server):
        part.load_adapter({name: adapter[name] for name in part.matrices()})
    end = model.config.end_token
    found = []
    for prompt, _ in pairs:
        ids = continue_greedily(edge, server, [*tokenizer.encode(prompt.strip()).ids, end], end, limit=60)
        found.append((prompt, tokenizer.decode(ids).strip()))
    return found


if __name__ == "__main__":
    main()
