"""
What continues a prompt in `export_speed.py`: one contestant, in a process of its own, which prints its figures as JSON.

    python export_contestants.py NAME PATH

Each is an iterator of tokens: the first comes when the prompt has been read. Every engine has two threads and a batch of one.
"""

import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

THREADS, PROMPT_TOKENS, NEW_TOKENS, CAPACITY, VOCABULARY = 2, 256, 64, 1024, 50257
Continue = Callable[[list[int]], Iterator[int]]


def main() -> None:
    name, path = sys.argv[1], Path(sys.argv[2])
    if name == "bandwidth":
        print(json.dumps({"bytes_per_second": read_bandwidth()}))
        return
    load = CONTESTANTS[name](path)
    before, began = memory("RssAnon"), time.perf_counter()
    continue_prompt = load()
    seconds, loaded = time.perf_counter() - began, memory("RssAnon")
    speeds = [measure(continue_prompt, seed) for seed in range(4)][1:]  # the first one warms up
    print(
        json.dumps(
            {
                "load_seconds": seconds,
                "load_anonymous": loaded - before,
                "prefill": statistics.median(prefill for prefill, _ in speeds),
                "decode": statistics.median(decode for _, decode in speeds),
                "peak": memory("VmHWM"),
            }
        )
    )


def measure(continue_prompt: Continue, seed: int) -> tuple[float, float]:
    """Tokens a second of the prompt, and of what follows."""
    prompt = np.random.default_rng(seed).integers(1000, 50000, PROMPT_TOKENS).tolist()
    began = time.perf_counter()
    tokens = continue_prompt(prompt)
    next(tokens)
    first = time.perf_counter()
    count = sum(1 for _, _ in zip(range(NEW_TOKENS - 1), tokens, strict=False))
    last = time.perf_counter()
    assert count == NEW_TOKENS - 1, "the continuation has ended early"
    return PROMPT_TOKENS / (first - began), count / (last - first)


def exported(precision: str) -> Callable[[Path], Callable[[], Continue]]:
    def contestant(folder: Path) -> Callable[[], Continue]:
        from edge_client.generation import open_exported
        from edge_client.generation.decoder import Decoder
        from edge_client.generation.prepared import PACKED, find_prepared

        name = precision.removesuffix(" prepared")
        model = open_exported(folder)
        graphs = find_prepared(model, name).graphs if name != precision else model.require(name).graphs
        assert graphs is not None, "splitlora-edge prepare has not been here"
        configuration = {} if name in PACKED else {"session.disable_prepacking": "1"}

        def load() -> Continue:
            return decoded(Decoder(graphs, shares_buffer=True, configuration=configuration, num_threads=THREADS))

        return load

    return contestant


def foreign(path: Path) -> Callable[[], Continue]:
    """Another exporter's graph, run as ours are: keys and values stay where they are and are not copied to numpy."""
    from edge_client.generation.decoder import Decoder

    return lambda: decoded(Decoder([path], shares_buffer=False, num_threads=THREADS))


def decoded(decoder: Any) -> Continue:
    def continue_prompt(prompt: list[int]) -> Iterator[int]:
        decoder.clear(CAPACITY)
        pending = prompt
        while True:
            pending = [int(decoder.extend(pending).argmax())]
            yield pending[0]

    return continue_prompt


def transformers(folder: Path) -> Callable[[], Continue]:
    import torch
    from transformers import GPT2LMHeadModel

    torch.set_num_threads(THREADS)

    def load() -> Continue:
        model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()

        @torch.inference_mode()
        def continue_prompt(prompt: list[int]) -> Iterator[int]:
            pending, cache = torch.tensor([prompt]), None
            while True:
                output = model(pending, past_key_values=cache, use_cache=True, logits_to_keep=1)
                pending, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
                yield int(pending)

        return continue_prompt

    return load


def ctranslate2(folder: Path) -> Callable[[], Continue]:
    from ctranslate2 import Generator

    words = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))

    def load() -> Continue:
        generator = Generator(str(folder), device="cpu", intra_threads=THREADS, inter_threads=1)

        def continue_prompt(prompt: list[int]) -> Iterator[int]:
            limits = {"max_length": NEW_TOKENS, "min_length": NEW_TOKENS, "sampling_topk": 1}
            for step in generator.generate_tokens([words[token] for token in prompt], **limits):
                yield step.token_id

        return continue_prompt

    return load


def llama_cpp(path: Path) -> Callable[[], Continue]:
    from llama_cpp import Llama

    def load() -> Continue:
        threads = {"n_threads": THREADS, "n_threads_batch": THREADS}
        llama = Llama(str(path), n_ctx=CAPACITY, n_batch=512, verbose=False, **threads)
        return lambda prompt: llama.generate(prompt, temp=0.0)

    return load


CONTESTANTS = {
    "q8": exported("q8"),
    "q8 prepared": exported("q8 prepared"),
    "q4": exported("q4"),
    "q4 prepared": exported("q4 prepared"),
    "fp32": exported("fp32"),
    "transformers": transformers,
    "foreign": foreign,
    "ctranslate2": ctranslate2,
    "llama.cpp": llama_cpp,
}


def read_bandwidth() -> float:
    """Bytes a second that two threads read from memory, the best of many sums of a gigabyte."""
    import torch

    torch.set_num_threads(THREADS)
    numbers = torch.ones(2**28)

    def seconds() -> float:
        began = time.perf_counter()
        numbers.sum()
        return time.perf_counter() - began

    return numbers.nbytes / min(seconds() for _ in range(10))


def memory(field: str) -> int:
    """Bytes of this process, as Linux counts them."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
