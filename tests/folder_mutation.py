"""Folders, files and strings of a stranger that are nearly right, and what the programs make of them."""

import copy
import faulthandler
import json
import random
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from conftest import make_model
from device_parts import make_part
from mutation import EDGES, ByteMutator
from onnx import TensorProto
from reference import make_adapter
from usual_settings import settings

import edge_client.cli
import export.cli
import gpu_server.cli
from edge_client import Generator
from edge_client.data import Dataset, Sample, pack
from edge_client.generation import open_exported, prepare
from edge_client.onnx_engine import OnnxEngine
from edge_client.part import runtime
from edge_client.part.device_part import DevicePart
from edge_client.part.graph_inspection import OPERATORS
from export import export_onnx, merge, verify
from export.exported_model import read_manifest
from export.peft_merge import load_with_transformers
from export.run_directory import RunDirectory
from gpu_server.config import ServerConfig
from gpu_server.options import options_from_toml
from protocol.invitation import Invitation
from split_model import EdgePart, LoraConfig, PretrainedModel, load_adapter
from storage import GRAPH_FILES, HEAD_GRAPH_FILES, PART_FILE, load_tokenizer

SECONDS = 30
"""That a mutant may take, on a busy machine too."""
HOSTILE = (
    "(a|a)*b",
    "(([a-z.0-9_]+)*)*[A-Z]",
    "(",
    ".*",
    "(?P<idx>x)",
    "\\",
    "c_attn",
    "h.0.attn.c_attn",
    "wte",
    "lm_head",
    "ln_f",
)
STRANGE: list[Any] = [
    *(None, True, False, -1, 2, 3, 16, *EDGES, 0.0, -0.0, 0.5, 1e308, 1e-320, float("inf"), float("-inf"), float("nan")),
    *("", "a", "1", "../../etc/passwd", "/dev/zero", "\x1b[2J\r\n", "\u202e", "\ud800", "x" * 5000, *HOSTILE),
    *([], {}, [[]], [1, 2], ["c_attn"], {"": {}}, {"a": 1}, {"c_attn": 3}, [None], [[0, 1]], 10**400, "99999999999999999999"),
]
KEYS = {
    "config.json": (
        *("quantization_config", "auto_map", "attn_implementation", "_attn_implementation", "n_inner", "torch_dtype", "dtype"),
        *("tie_word_embeddings", "add_cross_attention", "architectures", "pruned_heads", "return_dict", "output_attentions"),
        *("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "use_cache", "is_decoder", "n_ctx", "num_labels"),
    ),
    "adapter_config.json": (
        *("use_dora", "use_rslora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters"),
        *("layer_replication", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config"),
        *("monteclora_config", "velora_config", "megatron_config", "megatron_core", "loftq_config", "eva_config"),
        *("corda_config", "lora_ga_config", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
        *("exclude_modules", "init_lora_weights", "runtime_config", "auto_mapping", "ensure_weight_tying", "revision"),
    ),
}
INITIALISATIONS = ("pissa", "pissa_niter_2", "olora", "corda", "loftq", "lora_ga", "eva", "gaussian", "orthogonal", "mica")
TOML = """model = "gpt2"
run-dir = "runs/x"
clients = 2
steps = 7
lr = 1e-4
lora_targets = ["c_attn", "c_fc"]
codec = "int8"
"""
INVITATIONS = tuple(
    Invitation(host=host, port=8765, name="kitchen", secret="A" * 43, pin=pin).text()
    for host in ("server.lan", "192.168.1.20", "::1")
    for pin in (None, "0" * 64)
)
TEXTS = {
    "data.jsonl": '{"prompt": "name : The Blue Heron", "completion": "It is a restaurant."}\n{"text": "Only a text."}\n' * 3,
    "data.csv": 'prompt,completion\n"name, quoted","It is ""good""."\nplain,yes\n' * 3,
    "data.txt": "name : The Blue Heron||It is a restaurant.\nanother||one\n" * 3,
}
RUN = {
    "run": "r",
    "fingerprint": "",
    "dtype": "float32",
    "config": {"model": "", "lora_rank": 2, "lora_alpha": 8, "lora_targets": ["c_attn"]},
}
SMALL_DEVICE = 1 << 30  # bytes
PREFIX = 8  # bytes of a safetensors file that say how long its header is


class FolderMutator(ByteMutator):
    """
    Args:
        seed, number: the same mutant for the same two, whatever was made before.
    """

    def __init__(self, seed: int, number: int) -> None:
        super().__init__(random.Random(f"{seed} {number}"))

    def text(self, data: bytes) -> bytes:
        """Of bytes that are text: changed anywhere, nested without end, cut, with a mark before it, or seldom as it was."""
        what = self.random.randrange(12)
        if what in (3, 4):
            return data
        if what == 0:
            return data[: self.random.randrange(len(data) + 1)]
        if what == 1:
            return self.random.choice((b"\xef\xbb\xbf" + data, data.decode("utf-8", "replace").encode("utf-16")))
        if what == 2:
            place = self.random.randrange(len(data) + 1)
            return data[:place] + self.random.choice((b"[", b'{"a":', b"(")) * 100_000 + data[place:]
        return self.mutated(data)

    def json(self, data: bytes, keys: Sequence[str] = ()) -> bytes:
        """Of JSON: mostly with other values, so that it is still JSON."""
        if self.random.random() < 0.15:
            return self.text(data)
        value = json.loads(data)
        for _ in range(self.random.choice((1, 1, 1, 2, 4))):
            if keys and self.random.random() < 0.5:
                value[self.random.choice(keys)] = self._strange()
            else:
                self._change_something(value)
        return json.dumps(value).encode()

    def _change_something(self, container: Any) -> None:
        while True:
            keys = list(container) if isinstance(container, dict) else list(range(len(container)))
            if not keys:
                return
            key = self.random.choice(keys)
            inner = container[key]
            if not isinstance(inner, dict | list) or not inner or self.random.random() < 0.2:
                break
            container = inner
        what = self.random.randrange(8)
        if what == 0:
            del container[key]
        elif what == 1 and isinstance(container, dict):
            container[self.random.choice(("later", "\x1b[0m", "", *HOSTILE))] = self._strange()
        elif what == 2 and isinstance(container, list):
            container.append(copy.deepcopy(inner))
        elif what == 3 and type(inner) is int:
            container[key] = inner * self.random.choice((2, -1, 10**6)) + self.random.choice((0, 1, -1))
        else:
            container[key] = self._strange()

    def _strange(self) -> Any:
        return copy.deepcopy(self.random.choice(STRANGE))

    def tensors(self, data: bytes) -> bytes:
        """Of safetensors: another header, another length of it, or other bytes in it or behind it."""
        length = int.from_bytes(data[:PREFIX], "little")
        header, values = data[PREFIX : PREFIX + length], data[PREFIX + length :]
        what = self.random.randrange(6)
        if what == 0:
            return self.mutated(data)
        if what == 1:
            return data[: self.random.randrange(len(data))]
        if what == 2:  # numbers: NaN, infinities, and what else bytes can be
            changed = bytearray(values)
            place = self.random.randrange(len(changed) // 4) * 4
            changed[place : place + 4] = self.random.choice(
                (b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f", b"\1\0\0\0")
            )
            return data[: PREFIX + length] + bytes(changed)
        entries = json.loads(header)
        if what in (3, 4):
            self._change_tensor(entries)
            header = json.dumps(entries).encode()
        elif what == 4:
            header = self.json(header)
        else:
            header = self.mutated(header)
        return len(header).to_bytes(PREFIX, "little") + header + values

    def graph(self, data: bytes) -> bytes:
        """Of an ONNX file: other nodes, edges, constants, attributes, sizes or types, mostly such as a graph can have."""
        if self.random.random() < 0.2:
            return self.mutated(data)
        model = onnx.load_from_string(data)
        for _ in range(self.random.choice((1, 1, 2, 3, 6))):
            self._change_graph(model.graph)
        return bytes(model.SerializeToString())

    def _change_graph(self, graph: onnx.GraphProto) -> None:
        choose = self.random.choice
        node, computed = choose(graph.node), [name for node in graph.node for name in node.output]
        names = [*(value.name for value in graph.input), *(tensor.name for tensor in graph.initializer), *computed]
        what = self.random.randrange(7)
        if what == 0:
            node.op_type = choose(list(OPERATORS))
        elif what == 1:
            node.input[self.random.randrange(len(node.input))] = choose(names)
        elif what == 2 and graph.initializer:
            tensor = choose(graph.initializer)
            if tensor.data_type == TensorProto.INT64:
                numbers = onnx.numpy_helper.to_array(tensor).copy()
                numbers.flat[self.random.randrange(numbers.size)] = choose((0, 1, -1, 3, 31, 2**20, 2**31 - 1))
                tensor.raw_data = numbers.tobytes()
            else:
                tensor.raw_data = self.mutated(tensor.raw_data)
        elif what == 3 and node.attribute:
            attribute = choose(node.attribute)
            if attribute.type == onnx.AttributeProto.FLOAT:
                attribute.f = choose((0.0, -1.0, 1e38, float("nan")))
            elif attribute.type == onnx.AttributeProto.INT:
                attribute.i = choose((0, 1, 2, -1, 7, 2**20, 2**31 - 1))
            elif attribute.ints:
                attribute.ints[self.random.randrange(len(attribute.ints))] = choose((0, 1, 2, -1, 7, 2**20))
        elif what == 4:
            tensor_type = choose([*graph.input, *graph.output]).type.tensor_type
            if tensor_type.shape.dim and self.random.random() < 0.7:
                choose(tensor_type.shape.dim).dim_value = choose((1, 2, 8, 4096, 2**20))
            else:
                tensor_type.elem_type = choose((TensorProto.FLOAT, TensorProto.INT8, TensorProto.INT64, TensorProto.FLOAT16))
        elif what == 5:
            graph.output.add().CopyFrom(choose(graph.output))
            graph.output[-1].name = choose(names)
        else:
            del graph.node[self.random.randrange(len(graph.node))]
            graph.node.add().CopyFrom(node)

    def _change_tensor(self, entries: dict[str, Any]) -> None:
        name = self.random.choice([name for name in entries if name != "__metadata__"])
        entry = entries[name]
        what = self.random.randrange(4)
        if what == 0:
            other = {"transformer.": "", "lora_A": "lora_B", "c_attn": "c_proj", "h.0": "h.1", "weight": "bias"}
            old = self.random.choice(list(other))
            entries[name.replace(old, other[old])] = entries.pop(name)
        elif what == 1:
            entry["dtype"] = self.random.choice(
                ("F16", "BF16", "F64", "I32", "F8_E4M3", "F8_E8M0", "F4", "BOOL", "C64", "U64", "X")
            )
        elif what == 2:
            entry["shape"] = self.random.choice((entry["shape"][::-1], [*entry["shape"], 1], [], [0, 5], [2**40, 2**40], [-1]))
        else:
            del entries[name]


class Judge:
    """
    Programs, and folders as they should be, one of which is made nearly right and given back.

    Any exception that the program would not turn into a sentence gets out. What takes longer than `SECONDS` ends the process.

    Args:
        log: takes the traceback of where it was then.
    """

    def __init__(self, scratch: Path, log: int = 2) -> None:
        self._log = log
        self.outcomes: Counter[str] = Counter()
        self._scratch, self._out = scratch, scratch / "out"
        torch.manual_seed(0)
        runtime.most_memory = lambda: SMALL_DEVICE
        self._model, self._exported, self._kept = scratch / "model", scratch / "exported", scratch / "kept"
        self._model.mkdir()
        make_model(self._model, n_layer=2, n_embd=16, n_head=2, n_positions=16)
        self._adapter = make_adapter(self._model, scratch / "adapter", targets=["c_attn"], rank=2)
        export_onnx(str(self._model), self._exported, precisions=["q8"])
        for _ in prepare(open_exported(self._exported)):
            pass
        export_onnx(str(self._model), self._kept, precisions=["fp32"], adapter=self._adapter, keep_adapter=True)
        self._base = PretrainedModel(self._model)
        self._run_settings = settings(labels="device", lora_targets=("c_attn", "c_proj"), lora_dropout=0.1)
        self._part = make_part(scratch / "part", self._model, self._run_settings, "int8")
        self._tokenizer, self._config = load_tokenizer(self._model), self._base.config
        self._run = scratch / "run"
        self._run.mkdir()
        RUN["fingerprint"], RUN["config"]["model"] = self._base.fingerprint(), str(self._model)  # type: ignore[index]
        (self._run / "run.json").write_text(json.dumps({**RUN, "adapter": {"step": 3, "of": 3}}))
        shutil.copytree(self._adapter, self._run / "adapter")
        vocabulary = json.loads((self._model / "tokenizer.json").read_text())["model"]
        self._two_files = scratch / "two"
        self._two_files.mkdir()
        (self._two_files / "vocab.json").write_text(json.dumps(vocabulary["vocab"]))
        merges = (pair if isinstance(pair, str) else " ".join(pair) for pair in vocabulary["merges"])
        (self._two_files / "merges.txt").write_text("".join(f"{pair}\n" for pair in ("#version: 0.2", *merges)))
        edge, ours = edge_client.cli, export.cli._errors_of_users()
        self.kinds: dict[str, tuple[Callable[[FolderMutator], None], tuple[type[Exception], ...]]] = {
            "base model's configuration": (self._base_config, (*ours, *edge._errors_of_train())),
            "base model's tensors": (self._base_tensors, (*ours, *edge._errors_of_train())),
            "tokenizer": (self._tokenizer_files, edge._errors_of_train()),
            "adapter's configuration": (self._adapter_config, ours),
            "adapter's tensors": (self._adapter_tensors, ours),
            "run.json": (self._run_json, ours),
            "exported folder": (self._exported_folder, (*ours, *edge._errors_of_generate())),
            "part's graphs": (self._part_graphs, edge._errors_of_train()),
            "part's description and weights": (self._part_files, edge._errors_of_train()),
            "TOML": (self._toml, gpu_server.cli._errors_of_users()),
            "invitation": (self._invitation, edge._errors_of_train()),
            "data file": (self._data, edge._errors_of_train()),
        }
        self.weights: list[float] = [3, 3, 3, 4, 3, 1, 4, 4, 2, 1, 1, 2]

    def judge(self, mutator: FolderMutator) -> str:
        """Make a mutant and see what comes of it; gives its kind."""
        kind = mutator.random.choices(list(self.kinds), self.weights)[0]
        run, expected = self.kinds[kind]
        faulthandler.dump_traceback_later(SECONDS, exit=True, file=self._log)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                run(mutator)
            outcome = "works"
        except expected as error:
            outcome = type(error).__name__ if str(error) else "an error without a word"
        finally:
            faulthandler.cancel_dump_traceback_later()
        self.outcomes[f"{kind}: {outcome}"] += 1
        return kind

    def _base_config(self, mutator: FolderMutator) -> None:
        path = self._model / "config.json"
        with changed(path, mutator.json(path.read_bytes(), KEYS["config.json"])):
            self._use_base(mutator)

    def _base_tensors(self, mutator: FolderMutator) -> None:
        path = self._model / "model.safetensors"
        with changed(path, mutator.tensors(path.read_bytes())):
            self._use_base(mutator)

    def _use_base(self, mutator: FolderMutator) -> None:
        what = mutator.random.randrange(4)
        if what == 0:
            with torch.no_grad():
                load_with_transformers(PretrainedModel(self._model))(input_ids=torch.ones(1, 4, dtype=torch.long))
        elif what == 1:
            base = PretrainedModel(self._model)
            base.fingerprint()
            part = EdgePart(
                base, 1, LoraConfig(rank=2, targets=("c_attn",)), weight_dtype=torch.float32, device=torch.device("cpu")
            )
            part(torch.tensor([1, 2, 3]), torch.tensor([3]))
        else:
            merge(str(self._model), self._out, overwrite=True)

    def _tokenizer_files(self, mutator: FolderMutator) -> None:
        folder, name = mutator.random.choice(
            [(self._model, "tokenizer.json"), (self._two_files, "vocab.json"), (self._two_files, "merges.txt")]
        )
        path = folder / name
        data = path.read_bytes()
        with changed(path, mutator.text(data) if name == "merges.txt" else mutator.json(data)):
            if mutator.random.random() < 0.1:
                merge(str(self._model), self._out, overwrite=True)
            tokenizer = load_tokenizer(folder)
            tokenizer.decode(tokenizer.encode("The Blue Heron<|endoftext|> is good.").ids)

    def _adapter_config(self, mutator: FolderMutator) -> None:
        path = self._adapter / "adapter_config.json"
        data = mutator.json(path.read_bytes(), KEYS["adapter_config.json"])
        if mutator.random.random() < 0.1:
            data = json.dumps(
                {**json.loads(path.read_bytes()), "init_lora_weights": mutator.random.choice(INITIALISATIONS)}
            ).encode()
        with changed(path, data):
            self._use_adapter(mutator)

    def _adapter_tensors(self, mutator: FolderMutator) -> None:
        path = self._adapter / "adapter_model.safetensors"
        with changed(path, mutator.tensors(path.read_bytes())):
            self._use_adapter(mutator)

    def _use_adapter(self, mutator: FolderMutator) -> None:
        if mutator.random.random() < 0.2:
            load_adapter(self._adapter, self._config, LoraConfig(rank=2, alpha=8, targets=("c_attn",)))
        elif mutator.random.random() < 0.1:
            export_onnx(
                str(self._model), self._out, adapter=self._adapter, precisions=["q8"], keep_adapter=True, overwrite=True
            )
        else:
            merge(str(self._model), self._out, adapter=self._adapter, overwrite=True)

    def _run_json(self, mutator: FolderMutator) -> None:
        path = self._run / "run.json"
        with changed(path, mutator.json(path.read_bytes())):
            RunDirectory(self._run).adapter(self._base, self._out)

    def _exported_folder(self, mutator: FolderMutator) -> None:
        folder = mutator.random.choice((self._exported, self._kept))
        graphs = [*folder.glob("onnx/*"), *folder.glob("prepared/*"), *folder.glob("*.onnx_adapter")]
        path = mutator.random.choice([folder / "splitlora.json", folder / "tokenizer.json", *graphs])
        data = path.read_bytes()
        data = mutator.json(data) if path.suffix == ".json" else mutator.mutated(data)
        with changed(path, data):
            if mutator.random.random() < 0.02:
                verify(folder)
            elif mutator.random.random() < 0.3:
                read_manifest(folder)
            else:
                Generator(folder, num_threads=1).text("The", max_new_tokens=3)

    def _part_graphs(self, mutator: FolderMutator) -> None:
        path = self._part / mutator.random.choice((*GRAPH_FILES, *HEAD_GRAPH_FILES))
        with changed(path, mutator.graph(path.read_bytes())):
            self._use_part()

    def _part_files(self, mutator: FolderMutator) -> None:
        path = self._part / mutator.random.choice((PART_FILE, "embedding.safetensors", "block-0.safetensors"))
        data = path.read_bytes()
        with changed(path, mutator.json(data) if path.suffix == ".json" else mutator.tensors(data)):
            self._use_part()

    def _use_part(self) -> None:
        engine = OnnxEngine(DevicePart(self._part), self._run_settings)
        batch = pack([Sample(np.arange(length + 1, dtype=np.int32), 1) for length in (3, 1, 4)])
        engine.infer(batch)
        engine.begin_step()
        activations = engine.forward(batch, 1)
        engine.backward(activations)
        engine.losses_and_gradient(activations, batch.tokens)
        engine.losses(activations, batch.tokens)

    def _toml(self, mutator: FolderMutator) -> None:
        path = self._scratch / "run.toml"
        path.write_bytes(mutator.text(TOML.encode()))
        ServerConfig.from_options(options_from_toml(path)).settings()

    def _invitation(self, mutator: FolderMutator) -> None:
        text = mutator.text(mutator.random.choice(INVITATIONS).encode()).decode("utf-8", "surrogateescape")
        invitation = Invitation.parse(text)
        assert Invitation.parse(invitation.text()) == invitation

    def _data(self, mutator: FolderMutator) -> None:
        name = mutator.random.choice(list(TEXTS))
        path = self._scratch / name
        data = TEXTS[name].encode()
        if name == "data.jsonl" and mutator.random.random() < 0.5:
            lines = data.splitlines()
            lines[mutator.random.randrange(len(lines))] = mutator.json(lines[0])
            path.write_bytes(b"\n".join(lines))
        else:
            path.write_bytes(mutator.text(data))
        data_set = Dataset.load(path, self._tokenizer, 0, 16)
        data_set.batch(1, 2, (1,))


@contextmanager
def changed(path: Path, data: bytes) -> Iterator[None]:
    """The file with other content; then as it was."""
    before = path.read_bytes()
    path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(before)
