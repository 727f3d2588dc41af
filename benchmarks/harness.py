"""What the benchmarks share: E2E rows, a model of GPT-2 small's shape, and whole split runs in processes of their own."""

import json
import multiprocessing
import os
import queue
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # the independent reference: transformers + PEFT

from answering import wait_until_it_answers
from ports import free_port

if TYPE_CHECKING:
    import reference

    from contestants.whole_model import WholeModel
    from edge_client.data import Dataset
    from split_model import LoraConfig

REPOSITORY = Path(__file__).parent.parent
SHARED = REPOSITORY.parent / "shared"
PROGRAMS = Path(sys.executable).parent
PROCESSES = multiprocessing.get_context("spawn")
"""Each imports the script that starts it: what takes long to import is imported by functions there."""


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        sys.exit(f"this benchmark needs {name} in a folder 'shared' beside the checkout")
    return path


def e2e_rows(split: str, rows: slice) -> list[tuple[str, str]]:
    """Prompt and completion of E2E NLG rows; ``split`` is "train" or "valid"."""
    lines = shared(f"data/e2e/{split}.txt").read_text(encoding="utf-8").splitlines()[rows]
    return [(prompt, completion) for prompt, completion in (line.split("||") for line in lines)]


def write_rows(path: Path, pairs: Sequence[tuple[str, str]]) -> Path:
    path.write_text("".join(f"{prompt}||{completion}\n" for prompt, completion in pairs), encoding="utf-8")
    return path


def rnnlg_rows(domain: str, split: str) -> list[tuple[str, str]]:
    """
    Dialogue act and a person's sentence for it, of RNNLG.

    Args:
        domain: "hotel", "laptop", "restaurant" or "tv".
        split: "train", "valid" or "test".
    """
    lines = shared(f"data/rnnlg/{domain}.{split}.json").read_text(encoding="utf-8").splitlines()
    rows = json.loads("\n".join(line for line in lines if not line.startswith("#")))
    return [(act, sentence) for act, sentence, _ in rows]


def read_rows(path: Path) -> list[tuple[str, str]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [(prompt, completion) for prompt, completion in (line.split("||") for line in lines)]


def make_gpt2_small(folder: Path, *, half: bool = False, **shape: int) -> Path:
    """
    GPT-2 small's shape and tokenizer with random weights: what a step costs does not depend on their values.

    Args:
        half: store the weights in float16.
        shape: of another one; see `GPT2Config`.
    """
    import shutil

    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(**no_dropout, **shape))
    folder.mkdir(exist_ok=True)
    (model.half() if half else model).save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(shared(f"tokenizers/gpt2/{name}"), folder / name)
    return folder


def make_smollm2(folder: Path) -> Path:
    """
    SmolLM2-135M's shape with random weights and GPT-2's tokenizer: its vocabulary is 2 % larger, and like the model's own a
    multiple of 64, since products with an odd number of columns are slow in transformers.
    """
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=30,
        hidden_size=576,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        max_position_embeddings=8192,
        vocab_size=50304,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=50256,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = ByteLevelBPETokenizer(*(str(shared(f"tokenizers/gpt2/{name}")) for name in ("vocab.json", "merges.txt")))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def whole_model(folder: Path, lora: "LoraConfig", learning_rate: float, seed: int) -> "WholeModel":
    """A model that is split nowhere, in float32 on the CPU, with a fresh adapter."""
    from contestants.whole_model import WholeModel
    from split_model import OptimiserConfig, PretrainedModel, initial_adapter

    base = PretrainedModel(folder)
    return WholeModel(base, lora, OptimiserConfig(learning_rate=learning_rate), initial_adapter(base.config, lora, seed))


def read_samples(path: Path, model: "WholeModel") -> "Dataset":
    from edge_client.data import Dataset

    return Dataset.load(path, model.base.tokenizer(), model.base.config.end_token, max_length=512)


def keep_to(cores: Iterable[int]) -> None:
    """This process on these cores, with a thread of torch for each; before torch is imported."""
    os.sched_setaffinity(0, cores)
    os.environ["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))


def start_server(settings: dict[str, Any], cores: Iterable[int] | None = None) -> tuple[Any, str]:
    """A server in a process of its own, and its URL; it ends with its run, however early that ends."""
    urls = PROCESSES.Queue()
    server = PROCESSES.Process(target=_serve, args=(settings, cores, urls), daemon=True)
    server.start()
    while server.is_alive():
        try:
            return server, urls.get(timeout=1.0)
        except queue.Empty:
            continue
    sys.exit("the server of the run did not start; what it printed says why")


def _serve(settings: dict[str, Any], cores: Iterable[int] | None, urls: Any) -> None:
    if cores is not None:
        keep_to(cores)
    from gpu_server import GpuServer, RunEndedEarly

    with GpuServer(port=0, **settings) as server:
        urls.put(server.url)
        try:
            for _ in server.train():
                pass
        except RunEndedEarly:
            pass  # a benchmark's clients leave when they have measured enough


def union_batches(
    files: Sequence[Path], names: Sequence[str], model: Path, *, batch_size: int, steps: int, seed: int
) -> "list[list[reference.Sample]]":
    """
    What the devices of a run learn from together in each step, as the reference encodes it.

    Args:
        files, names: of the devices, in the same order.
    """
    import reference

    from edge_client.data import Dataset
    from split_model import PretrainedModel

    base = PretrainedModel(model)
    datasets = [Dataset.load(file, base.tokenizer(), base.config.end_token, 512) for file in files]
    samples = [reference.encode(read_rows(file), model) for file in files]
    union = []
    for step in range(1, steps + 1):
        orders = [data.order(step, batch_size, (seed, name, "order")) for name, data in zip(names, datasets, strict=True)]
        union.append([samples[device][row] for device, order in enumerate(orders) for row in order])
    return union


class SplitRun:
    """A server and its clients, each started by its own command."""

    def __init__(
        self,
        model: Path,
        run_dir: Path,
        files: Sequence[Path],
        server_flags: str,
        edge_flags: str = "",
        first_edge_flags: str = "",
    ) -> None:
        self.run_dir = run_dir
        port = free_port()
        server = f"serve --model {model} --run-dir {run_dir} --clients {len(files)} --port {port} {server_flags}"
        self._server = self._start("splitlora-server", server)
        wait_until_it_answers(self._server, f"ws://127.0.0.1:{port}")
        self.edges = []
        for number, file in enumerate(files):
            edge = f"train --server ws://127.0.0.1:{port} --model {model} --data {file} --name client-{number} {edge_flags}"
            if number == 0:
                edge += f" {first_edge_flags}"
            self.edges.append(self._start("splitlora-edge", edge))

    def wait(self) -> list[str]:
        """What each client said; the benchmark ends if a program failed."""
        said = [edge.communicate()[1] for edge in self.edges]
        if self._server.wait() or any(edge.returncode for edge in self.edges):
            sys.exit(f"a program of the run failed:\n{''.join(said)}")
        return said

    @staticmethod
    def _start(program: str, arguments: str) -> "subprocess.Popen[str]":
        command = [str(PROGRAMS / program), *arguments.split()]
        stderr = subprocess.PIPE if program == "splitlora-edge" else subprocess.DEVNULL
        return subprocess.Popen(command, stderr=stderr, text=True, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"})


def perplexities(said: str) -> tuple[float, float]:
    """Before and after, from what a client printed."""
    before, after = (float(re.search(rf"^perplexity {when}: ([\d.]+)$", said, re.M)[1]) for when in ("before", "after"))  # type: ignore[index]
    return before, after


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
