"""
What continues a prompt in `export_speed.py`: one contestant, in a process of its own, which prints its figures as JSON.

    python export_contestants.py NAME PATH THREADS

Each is an iterator of tokens: the first comes when the prompt has been read. Every engine has a batch of one. Of one thread,
seconds are those in which it had a processor, which other programs hardly lengthen.
"""

import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

PROMPT_TOKENS, NEW_TOKENS, CAPACITY = 256, 64, 1024
ORDINARY = range(1000, 49_000)
"""Tokens that every raced model has, and that are no control tokens."""
Continue = Callable[[list[int]], Iterator[int]]
Clock = Callable[[], float]


def main() -> None:
    name, path, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    clock = time.process_time if threads == 1 else time.perf_counter
    if name == "bandwidth":
        with disturbance() as disturbed:
            found = read_bandwidth(threads, clock)
        print(json.dumps({"bytes_per_second": found, **disturbed}))
        return
    load = CONTESTANTS[name](path, threads)
    before, began = memory("RssAnon"), clock()
    continue_prompt = load()
    seconds, loaded = clock() - began, memory("RssAnon")
    measure(continue_prompt, 0, clock)  # warms up
    with disturbance() as disturbed:
        speeds = [measure(continue_prompt, seed, clock) for seed in range(1, 4)]
    print(
        json.dumps(
            {
                "load_seconds": seconds,
                "load_anonymous": loaded - before,
                "prefill": statistics.median(prefill for prefill, _ in speeds),
                "decode": statistics.median(decode for _, decode in speeds),
                "peak": memory("VmHWM"),
                **disturbed,
            }
        )
    )


def measure(continue_prompt: Continue, seed: int, clock: Clock) -> tuple[float, float]:
    """Tokens a second of the prompt, and of what follows."""
    prompt = np.random.default_rng(seed).integers(ORDINARY.start, ORDINARY.stop, PROMPT_TOKENS).tolist()
    began = clock()
    tokens = continue_prompt(prompt)
    next(tokens)
    first = clock()
    count = sum(1 for _, _ in zip(range(NEW_TOKENS - 1), tokens, strict=False))
    last = clock()
    assert count == NEW_TOKENS - 1, "the continuation has ended early"
    return PROMPT_TOKENS / (first - began), count / (last - first)


def exported(precision: str) -> Callable[[Path, int], Callable[[], Continue]]:
    def contestant(folder: Path, threads: int) -> Callable[[], Continue]:
        from edge_client.generation import open_exported
        from edge_client.generation.decoder import Decoder
        from edge_client.generation.prepared import PACKED, find_prepared

        name = precision.removesuffix(" prepared")
        model = open_exported(folder)
        graphs = find_prepared(model, name).graphs if name != precision else model.require(name).graphs
        assert graphs is not None, "splitlora-edge prepare has not been here"
        configuration = {} if name in PACKED else {"session.disable_prepacking": "1"}

        def load() -> Continue:
            return decoded(Decoder(graphs, shares_buffer=True, configuration=configuration, num_threads=threads))

        return load

    return contestant


def foreign(path: Path, threads: int) -> Callable[[], Continue]:
    """Another exporter's graph, run as ours are: keys and values stay where they are and are not copied to numpy."""
    from edge_client.generation.decoder import Decoder

    return lambda: decoded(Decoder([path], shares_buffer=False, num_threads=threads))


def decoded(decoder: Any) -> Continue:
    def continue_prompt(prompt: list[int]) -> Iterator[int]:
        decoder.clear(CAPACITY)
        pending = prompt
        while True:
            pending = [int(decoder.extend(pending).argmax())]
            yield pending[0]

    return continue_prompt


def transformers(folder: Path, threads: int) -> Callable[[], Continue]:
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    torch.set_num_threads(threads)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(AutoConfig.from_pretrained(folder))]  # imported before time is taken

    def load() -> Continue:
        model = model_class.from_pretrained(folder, dtype=torch.float32).eval()

        @torch.inference_mode()
        def continue_prompt(prompt: list[int]) -> Iterator[int]:
            pending, cache = torch.tensor([prompt]), None
            while True:
                output = model(pending, past_key_values=cache, use_cache=True, logits_to_keep=1)
                pending, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
                yield int(pending)

        return continue_prompt

    return load


def ctranslate2(folder: Path, threads: int) -> Callable[[], Continue]:
    from ctranslate2 import Generator

    words = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))

    def load() -> Continue:
        generator = Generator(str(folder), device="cpu", intra_threads=threads, inter_threads=1)

        def continue_prompt(prompt: list[int]) -> Iterator[int]:
            limits = {"max_length": NEW_TOKENS, "min_length": NEW_TOKENS, "sampling_topk": 1}
            for step in generator.generate_tokens([words[token] for token in prompt], **limits):
                yield step.token_id

        return continue_prompt

    return load


def llama_cpp(path: Path, threads: int) -> Callable[[], Continue]:
    from llama_cpp import Llama

    def load() -> Continue:
        numbers = {"n_threads": threads, "n_threads_batch": threads}
        llama = Llama(str(path), n_ctx=CAPACITY, n_batch=512, verbose=False, **numbers)
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


def read_bandwidth(threads: int, clock: Clock) -> float:
    """Bytes a second that are read from memory, the best of many sums of a gigabyte."""
    import torch

    torch.set_num_threads(threads)
    numbers = torch.ones(2**28)

    def seconds() -> float:
        began = clock()
        numbers.sum()
        return clock() - began

    return numbers.nbytes / min(seconds() for _ in range(10))


@contextmanager
def disturbance() -> Iterator[dict[str, float]]:
    """Afterwards it gives "disturbance": the share of the processors that other programs had meanwhile."""
    found: dict[str, float] = {}
    began, busy, own = time.perf_counter(), busy_seconds(), time.process_time()
    yield found
    seconds, busy, own = time.perf_counter() - began, busy_seconds() - busy, time.process_time() - own
    found["disturbance"] = max(0.0, busy - own) / seconds / (os.cpu_count() or 1)


def busy_seconds() -> float:
    """What all processors together have worked since the start, for whomever."""
    user, nice, system, _idle, _wait, interrupts, soft, steal, *_ = map(int, Path("/proc/stat").read_text().split()[1:11])
    return (user + nice + system + interrupts + soft + steal) / os.sysconf("SC_CLK_TCK")


def memory(field: str) -> int:
    """Bytes of this process, as Linux counts them."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
