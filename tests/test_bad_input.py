"""What goes wrong outside of us: one sentence and an exit status, nothing lost, no traceback; and the others go on."""

import http.server
import json
import os
import re
import shutil
import signal
import socket
import socketserver
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import protocol_samples
import pytest
import torch
from ports import free_port
from programs import arguments, program, read_until
from spoiling import change_weights, swap_two_ids
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect
from websockets.sync.server import serve

import edge_client.cli
import gpu_server.cli
from edge_client import ConnectionFailed, EdgeClient
from gpu_server import GpuServer, RunEndedEarly
from gpu_server.certificates import own_certificate
from protocol import (
    DELTA,
    PROTOCOL_VERSION,
    ActivationGradient,
    Activations,
    AdapterGradient,
    Array,
    Done,
    EdgeAdapter,
    Evaluation,
    EvaluationLoss,
    Failure,
    Goodbye,
    Hello,
    Join,
    Message,
    Ping,
    Pong,
    Seconds,
    Start,
    TrainingDiverged,
    Welcome,
    decode,
    encode,
    zstd,
)
from protocol.codecs import Coded, quantised_parts
from protocol.rounding import to_bfloat16
from protocol.settings import OFFERED
from protocol.shuffling import shuffled
from split_model import LoraConfig, PretrainedModel, initial_adapter, save_adapter
from storage import ModelError

WIDTH, VOCABULARY = 32, 600  # of the tiny model
Say = Callable[..., str]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def sentence(capsys: pytest.CaptureFixture[str]) -> Callable[[int], str]:
    """What a program said, having ended with status 1: one line, of which this is all behind its name."""

    def said(status: int) -> str:
        out, error = capsys.readouterr()
        program, _, text = error.strip().partition(": ")
        assert (status, out) == (1, "")
        assert program in ("splitlora-edge", "splitlora-server")
        assert "\n" not in text
        assert "Traceback" not in text
        return text

    return said


@pytest.fixture
def edge_says(tiny_model: Path, pairs_file: Callable[..., Path], sentence: Callable[[int], str]) -> Say:
    """Runs splitlora-edge train with what is good, and the flags given."""
    good = {"server": f"ws://127.0.0.1:{free_port()}", "model": tiny_model, "data": pairs_file("good", 3), "device": "cpu"}

    def run(**flags: Any) -> str:
        return sentence(edge_client.cli.main(["train", *arguments({**good, **flags})]))

    return run


@pytest.fixture
def server_says(tiny_model: Path, tmp_path: Path, sentence: Callable[[int], str]) -> Say:
    """Runs splitlora-server serve with what is good, and the flags given. Whatever goes wrong, no run is begun."""

    def run(**flags: Any) -> str:
        told = {**server_options(tiny_model, tmp_path / "run"), **flags}
        text = sentence(gpu_server.cli.main(["serve", *arguments(told)]))
        assert not list(tmp_path.rglob("run.json"))
        return text

    return run


def server_options(model: Path, run_dir: Path) -> dict[str, Any]:
    return {
        "model": str(model),
        "run_dir": str(run_dir),
        "steps": 2,
        "cut_layer": 1,
        "lora_rank": 2,
        "port": 0,
        "micro_batches": 1,
        "device": "cpu",
        "dtype": "float32",
    }


# Data files, and what is told of them


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text"\n', "line 2: broken JSON"),
        ("a.jsonl", b'{"text": "\xff"}', "line 1: not UTF-8"),
        ("a.jsonl", b"", "is empty"),
        ("a.csv", b"a,b\n1,2\n", 'line 1: expected "prompt" and "completion", or "text"'),
        ("a.parquet", b"PAR1", "a.parquet cannot be read: Parquet file size is 4 bytes"),
        ("a.xlsx", b"x", "data files end in .jsonl, .csv, .txt, .parquet"),
        ("a.jsonl", json.dumps({"prompt": "p, " * 500, "completion": "c"}).encode(), "no token to predict is left"),
    ],
)
@pytest.mark.parametrize("flag", ["data", "eval_data"])
def test_edge_names_a_bad_data_file(edge_says: Say, tmp_path: Path, flag: str, name: str, content: bytes, reason: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    text = edge_says(**{flag: path})
    assert text.startswith(str(path))
    assert reason in text


def test_edge_names_a_missing_data_file(edge_says: Say, tmp_path: Path) -> None:
    assert edge_says(data=tmp_path / "none.txt") == f"{tmp_path / 'none.txt'} cannot be read: No such file or directory"


@pytest.mark.parametrize(
    ("flag", "value", "text"),
    [
        ("batch_size", 0, "batch-size must be at least 1, got 0"),
        ("max_length", 1, "max-length must be at least 2 tokens, got 1"),
        ("name", "a b", "a client name is 1 to 64 of A-Z a-z 0-9 . _ - and starts with a letter or digit, got 'a b'"),
        ("name", "../x", "a client name is 1 to 64 of A-Z a-z 0-9 . _ - and starts with a letter or digit, got '../x'"),
        ("name", "x\n", "a client name is 1 to 64 of A-Z a-z 0-9 . _ - and starts with a letter or digit, got 'x\\n'"),
    ],
)
def test_edge_refuses_a_flag_that_cannot_be(edge_says: Say, flag: str, value: Any, text: str) -> None:
    assert edge_says(**{flag: value}) == text


@pytest.mark.parametrize(
    "words", [[], ["train"], ["train", "--batch-size=x"], ["serve"], ["train", "--device=tpu"], ["ping", "--data=x"]]
)
def test_edge_shows_its_usage_to_other_flags(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        edge_client.cli.main(words)
    assert capsys.readouterr().err.startswith("usage: splitlora-edge")


# Model folders


def change_end(model: Path, token: int) -> None:
    """In both files that say with which tokens a model ends."""
    change_config(model, eos_token_id=token)
    (model / "generation_config.json").unlink()


def change_config(model: Path, **changes: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))


def shorten(weights: dict[str, torch.Tensor], name: str) -> None:
    weights[name] = weights[name][:-1]


def to_float8(weights: dict[str, torch.Tensor], name: str) -> None:
    weights[name] = weights[name].to(torch.float8_e4m3fn)


def use_index(model: Path, index: Any) -> None:
    (model / "model.safetensors").rename(model / "weights.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


QUERIES = "transformer.h.0.attn.c_attn"
SPOILT_MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "no model folder at"),
    "no config": (lambda model: (model / "config.json").unlink(), "config.json is missing"),
    "broken config": (lambda model: (model / "config.json").write_text("{"), "config.json cannot be read"),
    "binary config": (lambda model: (model / "config.json").write_bytes(b"\xff"), "config.json is not UTF-8: byte 0xff at 0"),
    "config no object": (lambda model: (model / "config.json").write_text("[]"), "config.json is not a JSON object"),
    "other architecture": (lambda model: change_config(model, model_type="bert"), 'model_type is "bert"; only "gpt2", '),
    "no architecture": (lambda model: (model / "config.json").write_text("{}"), 'model_type is null; only "gpt2"'),
    "no width": (
        lambda model: (model / "config.json").write_text('{"model_type": "gpt2"}'),
        "n_embd is missing; a configuration of",
    ),
    "width no number": (lambda model: change_config(model, n_embd="wide"), 'n_embd is "wide"; a whole number from 1 to'),
    "layers a list": (lambda model: change_config(model, n_layer=[4]), "n_layer is [4]; a whole number from 1 to 10000"),
    "layers without bound": (lambda model: change_config(model, n_layer=10**9), "n_layer is 1000000000; a whole number"),
    "layers true": (lambda model: change_config(model, n_layer=True), "n_layer is true; a whole number"),
    "layers a fraction": (lambda model: change_config(model, n_layer=4.0), "n_layer is 4.0; a whole number"),
    "layers more than stored": (lambda model: change_config(model, n_layer=9999), "tensor 'h.4.ln_1.weight' is missing"),
    "vocabulary null": (lambda model: change_config(model, vocab_size=None), "vocab_size is null; a whole number"),
    "vocabulary beyond": (lambda model: change_config(model, vocab_size=10**400), "vocab_size is 1000"),
    "inner width a text": (lambda model: change_config(model, n_inner="128"), 'n_inner is "128"; a whole number'),
    "no positions": (lambda model: change_config(model, n_positions=None), "n_ctx is missing; a configuration of"),
    "end null": (lambda model: change_config(model, eos_token_id=None), "eos_token_id is null; a whole number from 0"),
    "ends": (lambda model: change_config(model, eos_token_id=[0, 1]), "eos_token_id is [0, 1]; a whole number from 0"),
    "end is a word": (lambda model: change_end(model, 300), "eos_token_id is 300, which is "),
    "epsilon a text": (
        lambda model: change_config(model, layer_norm_epsilon="1e-5"),
        'layer_norm_epsilon is "1e-5"; a positive',
    ),
    "epsilon no number": (lambda model: change_config(model, layer_norm_epsilon=float("nan")), "layer_norm_epsilon is NaN; a"),
    "tied by a word": (lambda model: change_config(model, tie_word_embeddings="no"), 'tie_word_embeddings is "no"; true or'),
    "activation null": (lambda model: change_config(model, activation_function=None), "activation_function is null; a text"),
    "two names of layers": (
        lambda model: change_config(model, num_hidden_layers=2),
        "n_layer is 4 and num_hidden_layers 2; they",
    ),
    "quantised": (
        lambda model: change_config(model, quantization_config={"a": 1}),
        'quantization_config is {"a": 1}; weights that are quantised cannot be used: take the model that they were made from',
    ),
    **{
        f"quantised by {name}": (
            lambda model, method=method: change_config(model, quantization_config={"bits": 4, "quant_method": method}),
            f"weights that are quantised by {name} cannot be used: take the model that they were made from",
        )
        for method, name in {"gptq": "GPTQ", "awq": "AWQ", "bitsandbytes": "bitsandbytes", "new": '"new"'}.items()
    },
    "quantised, in the words of old files": (
        lambda model: change_config(model, compression_config={"quant_method": "compressed-tensors"}),
        'compression_config is {"quant_method": "compressed-tensors"}; weights that are quantised by "compressed-tensors"',
    ),
    "quantised when it is loaded": (
        lambda model: change_config(model, quantization_config={"load_in_4bit": True}),
        "weights that are quantised by bitsandbytes cannot be used",
    ),
    "tokens that see what is behind": (
        lambda model: change_config(model, is_causal=False),
        "is_causal is false: tokens see what comes behind them, and what is split here only continues texts",
    ),
    "more in a block than is asked for": (
        lambda model: change_weights(
            model, lambda weights: weights.update({f"{QUERIES.rpartition('.')[0]}.q_norm.weight": torch.ones(8)})
        ),
        "asks for no tensor 'h.0.attn.q_norm.weight', and without it this is another GPT-2; correct config.json, or remove the",
    ),
    "more blocks than are asked for": (
        lambda model: change_config(model, n_layer=3),
        "asks for no tensor 'h.3.attn.c_attn.bias' (12 are like it), and without it this is another GPT-2; correct config.json",
    ),
    "weights that are pickled": (
        lambda model: (model / "model.safetensors").rename(model / "pytorch_model.bin"),
        "nor model.safetensors.index.json; pytorch_model.bin is not read: load it with transformers and save_pretrained",
    ),
    "adapter": (
        lambda model: (model / "config.json").rename(model / "adapter_config.json"),
        "has an adapter, and no model; give the model that it adapts",
    ),
    "packed matrices": (
        lambda model: change_weights(
            model, lambda weights: weights.update({f"{QUERIES}.qweight": weights.pop(f"{QUERIES}.weight")})
        ),
        "its weights are quantised: take the model they were made from",
    ),
    "another head": (
        lambda model: change_config(model, architectures=["GPT2ForSequenceClassification"]),
        'architectures is ["GPT2ForSequenceClassification"], a model that does not tell the next token; its ForCausalLM',
    ),
    "pictures": (
        lambda model: change_config(model, model_type="llava", vision_config={"image_size": 336}),
        "can be split: it takes more than text; its language model, saved as a model of its own, may be one",
    ),
    "encoder and decoder": (
        lambda model: change_config(model, model_type="t5", is_encoder_decoder=True),
        "can be split: it has an encoder, and what is split here only continues texts",
    ),
    "encoder": (
        lambda model: change_config(model, model_type="bert", architectures=["BertForMaskedLM"]),
        "can be split: it has an encoder",
    ),
    "code": (
        lambda model: change_config(model, auto_map={"AutoConfig": "a.B"}),
        "code of a folder is never run; remove the key",
    ),
    "kernel": (
        lambda model: change_config(model, _attn_implementation="somebody/kernel"),
        '_attn_implementation is "somebody/kernel"; code of others is never fetched; remove the key',
    ),
    "nested config": (lambda model: (model / "config.json").write_text("[" * 200_000), "its JSON is nested too deeply"),
    "no heads": (lambda model: change_config(model, n_head=0), "n_head is 0; a whole number from 1 to"),
    "odd heads": (lambda model: change_config(model, n_head=5), "n_embd 32 is not a multiple of n_head 5"),
    "end beyond": (
        lambda model: change_config(model, eos_token_id=50256),
        "eos_token_id 50256 is not below the vocabulary's 600 tokens; correct the file",
    ),
    "other activation": (
        lambda model: change_config(model, activation_function="swish"),
        'activation_function is "swish"; it can be gelu_new',
    ),
    "unsupported": (
        lambda model: change_config(model, add_cross_attention=True),
        "add_cross_attention is true, which is not supported",
    ),
    "unscaled attention": (
        lambda model: change_config(model, scale_attn_weights=False),
        "scale_attn_weights is false; true, the only attention that is supported, is expected",
    ),
    "no weights": (lambda model: (model / "model.safetensors").unlink(), "has no weights: neither model.safetensors nor"),
    "corrupt weights": (lambda model: (model / "model.safetensors").write_bytes(b"\xff" * 99), "cannot be read as safetensors"),
    "half the weights": (
        lambda model: (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:9000]),
        "cannot be read as safetensors",
    ),
    "no shards": (lambda model: use_index(model, {"weight_map": {}}), "names no shards, or shards outside its folder"),
    "shards no map": (lambda model: use_index(model, {"weight_map": ["a"]}), "names no shards, or shards outside its folder"),
    "shards outside": (
        lambda model: use_index(model, {"weight_map": {"wte.weight": "../model.safetensors"}}),
        "names no shards, or shards outside its folder",
    ),
    "shard above": (
        lambda model: use_index(model, {"weight_map": {"a": ".."}}),
        "names no shards, or shards outside its folder",
    ),
    "shard missing": (lambda model: use_index(model, {"weight_map": {"a": "b.safetensors"}}), "b.safetensors is missing"),
    "no tokenizer": (lambda model: (model / "tokenizer.json").unlink(), "has no tokenizer: neither tokenizer.json nor"),
    "broken tokenizer": (lambda model: (model / "tokenizer.json").write_text("{}"), "the tokenizer cannot be read"),
    "tensor missing": (
        lambda model: change_weights(model, lambda weights: weights.pop("transformer.h.2.attn.c_attn.weight")),
        "tensor 'h.2.attn.c_attn.weight' is missing; is this a complete GPT-2 checkpoint?",
    ),
    "tensor under another name": (
        lambda model: change_weights(model, lambda weights: weights.update(_w=weights.pop("transformer.wpe.weight"))),
        "tensor 'wpe.weight' is missing; is this a complete GPT-2 checkpoint?",
    ),
    "tensor under a usual other name": (
        lambda model: change_weights(
            model, lambda weights: weights.update({"model.wpe.weight": weights.pop("transformer.wpe.weight")})
        ),
        "tensor 'wpe.weight' is missing; model.safetensors has 'model.wpe.weight', a name that transformers does not read",
    ),
    "tensor twice": (
        lambda model: change_weights(model, lambda weights: weights.update({"wpe.weight": torch.zeros(256, 32)})),
        "the tensor 'wpe.weight' is there twice, as ",
    ),
    "tensor of 8 bits": (
        lambda model: change_weights(model, lambda weights: to_float8(weights, "transformer.h.1.mlp.c_fc.weight")),
        "model.safetensors: tensor 'h.1.mlp.c_fc.weight' is stored as F8_E4M3; weights can be F64, F32, F16, BF16",
    ),
    "untied head missing": (
        lambda model: change_config(model, tie_word_embeddings=False),
        "tensor 'lm_head.weight' is missing",
    ),
    "tensor of another shape": (
        lambda model: change_weights(model, lambda weights: shorten(weights, "transformer.h.3.mlp.c_fc.bias")),
        "tensor 'h.3.mlp.c_fc.bias' has shape [127], config.json asks for [128]",
    ),
    "config of another model": (
        lambda model: change_config(model, n_embd=64),
        "has shape",
    ),
}


@pytest.mark.parametrize("case", SPOILT_MODELS)
def test_edge_refuses_a_model(edge_says: Say, model: Path, case: str) -> None:
    spoil, reason = SPOILT_MODELS[case]
    spoil(model)
    text = edge_says(model=model)
    assert reason in text
    assert str(model) in text


@pytest.mark.parametrize("case", SPOILT_MODELS)
def test_server_refuses_a_model(server_says: Say, model: Path, case: str) -> None:
    spoil, reason = SPOILT_MODELS[case]
    spoil(model)
    text = server_says(model=model)
    assert reason in text
    assert str(model) in text


@pytest.mark.parametrize("name", ["no-such-model", "nobody/no-such-model", "a--b"])
def test_name_that_is_neither_folder_nor_on_the_hub_is_named(edge_says: Say, name: str) -> None:
    assert edge_says(model=name).startswith(f"{name!r} is no folder here, and the Hugging Face hub did not give it: ")


def test_file_is_no_model(edge_says: Say, model: Path) -> None:
    assert edge_says(model=model / "config.json").startswith(f"{model / 'config.json'} is a file; a model is a folder")


# Settings of the server


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"cut_layer": 0}, "cut layer must be between 1 and 3 for a model of 4 blocks, got 0"),
        ({"lora_rank": 10**8}, "LoRA rank 100000000 is more than the model's width, 32; what is added to a matrix has no"),
        ({"cut_layer": 4}, "cut layer must be between 1 and 3 for a model of 4 blocks, got 4"),
        ({"lora_rank": 0}, "lora-rank must be 1 to 2147483647, got 0"),
        ({"lora_alpha": 0}, "lora-alpha must be 1e-30 to 1e+30, got 0.0"),
        ({"lora_dropout": 1.0}, "lora-dropout must be 0 to 0.999, got 1.0"),
        ({"lora_dropout": "nan"}, "lora-dropout must be 0 to 0.999, got nan"),
        ({"lora_targets": "c_attn,q_proj"}, "LoRA targets must be among c_attn, c_proj, c_fc; got q_proj"),
        ({"lora_targets": ""}, "lora-targets must be names of layers, without dots, each once; got none"),
        (
            {"lora_targets": "c_attn,c_attn"},
            "lora-targets must be names of layers, without dots, each once; got c_attn, c_attn",
        ),
        (
            {"lora_targets": "all-linear,c_attn"},
            "lora-targets must be names of layers, without dots, each once; got all-linear, c_attn; all-linear stands alone",
        ),
        ({"steps": 0}, "steps must be 1 to 2147483647, got 0"),
        ({"epochs": 2}, "give steps or epochs, not both"),
        ({"lr": "nan"}, "lr must be 1e-30 to 1e+30, got nan"),
        ({"host": "no.such.host.invalid"}, "cannot listen on no.such.host.invalid:0"),
        ({"config": "none.toml"}, "none.toml cannot be read: No such file or directory"),
        ({"init_adapter": "none"}, "none/adapter_config.json is missing"),
    ],
)
def test_server_refuses_a_setting(server_says: Say, flags: dict[str, Any], reason: str) -> None:
    assert server_says(**flags).startswith(reason)


def test_server_names_an_unknown_key_of_the_file_and_the_nearest_known_one(server_says: Say, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("lora-rnak = 3\n")
    assert server_says(config=path) == "unknown setting 'lora_rnak'; the nearest known one is 'lora-rank'"


@pytest.mark.parametrize(
    ("rank", "changes", "reason"),
    [
        (4, {}, "r is 4, the run asks for 2"),
        (2, {"lora_alpha": 7}, "lora_alpha is 7, the run asks for 32.0"),
        (2, {"target_modules": ["c_fc"]}, 'target_modules is ["c_fc"], the run asks for ["c_attn"]'),
        (2, {"target_modules": 3}, "target_modules is 3; it must be a list of names or one regular expression"),
        (2, {"use_dora": True}, "only plain LoRA can be continued; this adapter uses use_dora"),
        (2, {"bias": "all"}, "only plain LoRA can be continued; this adapter uses bias"),
        (2, {"peft_type": "IA3"}, 'only LoRA adapters can be used; peft_type is "IA3"'),
        (2, {"init_lora_weights": "pissa"}, 'only plain LoRA can be continued; this adapter uses init_lora_weights="pissa"'),
        (2, {"layers_to_transform": 0}, "it adapts the blocks 0, the run those from 0 on"),
        (2, {"lora_alpha": float("nan")}, "lora_alpha is NaN; it must be a finite number"),
        (2, {"megatron_core": "antigravity"}, "megatron_config and megatron_core name Python code to be imported"),
    ],
)
def test_server_refuses_an_adapter_of_another_kind(
    server_says: Say, tiny_model: Path, tmp_path: Path, rank: int, changes: dict[str, Any], reason: str
) -> None:
    folder, lora = tmp_path / "adapter", LoraConfig(rank=rank, targets=("c_attn",))
    config = PretrainedModel(tiny_model).config
    save_adapter(folder, initial_adapter(config, lora, 0), config, lora, "tiny")
    values = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**values, **changes}))
    text = server_says(init_adapter=folder)
    assert str(folder) in text
    assert reason in text


@pytest.mark.parametrize("content", [None, b"", b"\xff" * 50])
def test_server_refuses_an_adapter_without_matrices(
    server_says: Say, tiny_model: Path, tmp_path: Path, content: bytes | None
) -> None:
    folder, lora = tmp_path / "adapter", LoraConfig(rank=2, targets=("c_attn",))
    config = PretrainedModel(tiny_model).config
    save_adapter(folder, initial_adapter(config, lora, 0), config, lora, "tiny")
    weights = folder / "adapter_model.safetensors"
    weights.unlink()
    if content is not None:
        weights.write_bytes(content)
    reason = "is missing" if content is None else "cannot be read: "
    assert server_says(init_adapter=folder).startswith(f"{weights} {reason}")


def test_server_refuses_an_adapter_of_another_model(server_says: Say, tiny_model: Path, tmp_path: Path) -> None:
    folder, lora = tmp_path / "adapter", LoraConfig(rank=2, targets=("c_attn",))
    config = PretrainedModel(tiny_model).config
    adapter = initial_adapter(config, lora, 0)
    save_adapter(folder, dict(list(adapter.items())[2:]), config, lora, "tiny")
    assert "h.0.attn.c_attn.lora_A.weight is missing, unknown or of another shape" in server_says(init_adapter=folder)


def test_server_names_a_port_in_use_and_begins_no_run(server_says: Say) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        text = server_says(port=port)
    assert text.startswith(f"cannot listen on 127.0.0.1:{port}: ")
    assert "in use" in text
    assert text.endswith("choose another --port or --host")


def test_server_leaves_a_run_that_is_there_as_it_is(tiny_model: Path, tmp_path: Path, sentence: Callable[[int], str]) -> None:
    run_dir = tmp_path / "run"
    (run_dir / "adapter").mkdir(parents=True)
    for name in ("run.json", "metrics.jsonl", "adapter/adapter_config.json"):
        (run_dir / name).write_text(f"{name} of long ago")
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run_dir.rglob("*") if path.is_file()}
    text = sentence(gpu_server.cli.main(["serve", *arguments(server_options(tiny_model, run_dir))]))
    assert text == f"{run_dir} holds a run already; go on with it by --resume, or choose another --run-dir"
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run_dir.rglob("*") if path.is_file()} == before


def test_server_refuses_a_run_directory_that_is_a_file(server_says: Say, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("precious")
    assert server_says(run_dir=path) == f"run directory {path} cannot be written: File exists"
    assert path.read_text() == "precious"


def test_server_refuses_a_run_directory_it_cannot_write(server_says: Say, tmp_path: Path) -> None:
    (tmp_path / "run" / ".lock").mkdir(parents=True)  # stands for a full or a read-only disk
    assert server_says() == f"run directory {tmp_path / 'run'} cannot be written: Is a directory"


def test_server_that_cannot_write_the_adapter_does_not_end_well(
    tiny_model: Path,
    tmp_path: Path,
    pairs_file: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    returned: Callable[[type, str], threading.Event],
) -> None:
    run_dir, port, listening = tmp_path / "run", free_port(), returned(GpuServer, "__enter__")
    run_dir.mkdir()
    (run_dir / "adapter").write_text("")  # stands for a disk that fills up during the run
    flags = {**server_options(tiny_model, run_dir), "port": port}
    with ThreadPoolExecutor(1) as background:
        status = background.submit(gpu_server.cli.main, ["serve", *arguments(flags)])
        assert listening.wait(timeout=60)
        url = f"ws://127.0.0.1:{port}"
        with (
            pytest.raises(ConnectionError),
            EdgeClient(url, engine="torch", model=str(tiny_model), data=pairs_file("a", 3), give_up_after=0.1) as client,
        ):
            list(client.train())  # the run could go on once there is room again: the device is not dismissed
        assert status.result() == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    mended = "when that is mended, --resume goes on with its run"
    assert last == f"splitlora-server: run directory {run_dir} cannot be written: File exists; {mended}"


# Servers


@pytest.fixture(params=["train", "ping"])
def says_of_server(request: pytest.FixtureRequest, edge_says: Say, sentence: Callable[[int], str]) -> Callable[[str], str]:
    """What splitlora-edge train, and splitlora-edge ping, say of a server."""
    if request.param == "train":
        return lambda url: edge_says(server=url)
    return lambda url: sentence(edge_client.cli.main(["ping", f"--server={url}"]))


def test_edge_names_a_server_that_is_not_there(says_of_server: Callable[[str], str]) -> None:
    url = f"ws://127.0.0.1:{free_port()}"
    assert says_of_server(url) == f"no server at {url}: Connection refused; is splitlora-server running there?"


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "127.0.0.1:8765", "ws://", "ws://127.0.0.1:99999", "ws://[::1", ""])
def test_edge_names_an_address_that_is_no_websocket(says_of_server: Callable[[str], str], url: str) -> None:
    assert says_of_server(url) == f"{url} is not the address of a server; one looks like ws://192.168.1.20:8765"


def test_edge_says_that_it_is_not_enrolled_where_no_authority_vouches(
    says_of_server: Callable[[str], str], tmp_path: Path
) -> None:
    context = own_certificate(tmp_path / "server").server_context()
    with serve(lambda _: None, "127.0.0.1", 0, ssl=context) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"wss://127.0.0.1:{server.socket.getsockname()[1]}"
        try:
            text = says_of_server(url)
        finally:
            server.shutdown()
            thread.join()
    assert text.startswith(f"this device is not enrolled at {url}, and the server's certificate is not an authority's (")
    assert text.endswith("enrol it with splitlora-edge join and what splitlora-server enrol NAME prints")


def test_ping_does_not_wait_for_ever_for_a_silent_server() -> None:
    heard, over = threading.Event(), threading.Event()

    def handler(connection: Any) -> None:
        connection.recv()
        heard.set()
        over.wait(timeout=60)

    with serve(handler, "127.0.0.1", 0, close_timeout=0.1) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        try:
            with pytest.raises(edge_client.ConnectionFailed, match=r"is silent: no answer within 0\.2 s"):
                edge_client.ping(url, within=0.2)
            assert heard.is_set()
        finally:
            over.set()
            server.shutdown()
            thread.join()


def test_edge_names_a_plain_http_server(says_of_server: Callable[[str], str]) -> None:
    class Quiet(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with tcp_server(Quiet) as port:
        assert says_of_server(f"ws://127.0.0.1:{port}").startswith(f"no server at ws://127.0.0.1:{port}: ")


@pytest.mark.parametrize("greeting", [b"", b"SSH-2.0-OpenSSH_9.6\r\n", b"\x00" * 2000])
def test_edge_names_a_server_of_something_else(says_of_server: Callable[[str], str], greeting: bytes) -> None:
    class Other(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(4096)
            self.request.sendall(greeting)

    with tcp_server(Other) as port:
        assert says_of_server(f"ws://127.0.0.1:{port}").startswith(f"no server at ws://127.0.0.1:{port}: ")


@contextmanager
def tcp_server(handler: type[socketserver.BaseRequestHandler]) -> Iterator[int]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def packed(version: int, kind: str, **fields: Any) -> bytes:
    return zstd.compress(msgpack.packb([version, kind, fields]))


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"rubbish", "not a message"),
        (b"", "not a message"),
        ("a text", "got a text frame; messages are binary"),
        (packed(PROTOCOL_VERSION + 1, "Pong"), f"peer speaks protocol version {PROTOCOL_VERSION + 1}, this side speaks"),
        (packed(PROTOCOL_VERSION, "Pong"), "Pong.software is missing"),
        (packed(PROTOCOL_VERSION, "Nonsense"), "unknown kind of message"),
        (encode(EdgeAdapter(step=1, tensors={})), "server sent EdgeAdapter while"),
        (encode(Ping()), "server sent Ping while"),
    ],
)
def test_edge_names_what_a_server_answers_wrongly(
    says_of_server: Callable[[str], str], answer: bytes | str, reason: str
) -> None:
    def handler(connection: Any) -> None:
        connection.recv()
        connection.send(answer)

    with serve(handler, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        try:
            text = says_of_server(url)
        finally:
            server.shutdown()
            thread.join()
    assert url in text
    assert reason in text


def test_edge_names_a_server_that_hangs_up(edge_says: Say, sentence: Callable[[int], str]) -> None:
    with serve(lambda connection: connection.recv(), "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        lost = f"the connection to {url} was lost: "
        try:
            assert sentence(edge_client.cli.main(["ping", f"--server={url}"])).startswith(lost)
            # It was reached once, so the device comes back until it is told to give up: before it has waited at all.
            text = edge_says(server=url, give_up_after=0.01)
            assert text.startswith(lost)
            assert text.endswith("; gave up after 0.01 s")
        finally:
            server.shutdown()
            thread.join()


# Hostile clients, beside an honest one


class Hostile:
    """A client that says what it likes."""

    def __init__(self, url: str) -> None:
        self.stack = ExitStack()
        self.socket = self.stack.enter_context(connect(url, compression=None, max_size=None, proxy=None))

    def say(self, words: Message | bytes | str) -> None:
        self.socket.send(words if isinstance(words, bytes | str) else encode(words))

    def hear(self, kind: Any = Failure) -> Any:
        heard = decode(self.socket.recv(timeout=30), 2**26)
        assert isinstance(heard, kind), heard
        return heard

    def hang_up(self) -> None:
        """As a device that loses power: no closing handshake, and not even a FIN."""
        self.socket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.socket.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> "Hostile":
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()


def batch(**changes: Any) -> Activations:
    """What is right in step 1, after a Join of batches of 2 x 4 rows, and the changes given."""
    right = {
        "step": 1,
        "micro_batch": 0,
        "seconds": Seconds(),
        "samples": None,
        "exact": None,
        "lengths": ints(4, 3),
        "label_counts": ints(2, 1),
        "labels": ints(1, 2, 3),
        "values": np.ones((7, WIDTH), np.float32),
    }
    message = object.__new__(Activations)  # its own checks left out
    vars(message).update({**right, **changes})
    return message


def ints(*values: int) -> Array:
    return np.array(values, np.int32)


def floats(rows: int, width: int = WIDTH, value: float = 1.0, dtype: Any = np.float32) -> Array:
    return np.full((rows, width), value, dtype)


def bomb() -> bytes:
    """A zstd frame that announces 100 bytes and holds a million."""
    frame = bytearray(zstd.compress(bytes(2**20)))
    assert frame[4] & 0b11100000 == 0b10100000  # one segment, a size of four bytes
    frame[5:9] = struct.pack("<I", 100)
    return bytes(frame)


def unannounced() -> bytes:
    return zstd.compress(bytes(2**20), options={zstd.CompressionParameter.content_size_flag: 0})


@dataclass
class Run:
    """A server, and an honest client that it has welcomed."""

    server: GpuServer
    honest: EdgeClient
    background: Executor
    steps: "Future[list[int]] | None" = None

    def train(self) -> "Future[list[int]]":
        """Let the honest client take part, to the run's end; the numbers of its steps."""
        if self.steps is None:
            self.steps = self.background.submit(lambda: [step.number for step in self.honest.train()])
        return self.steps


@contextmanager
def a_run(model: Path, tmp_path: Path, data: Path, *, clients: int, **options: Any) -> Iterator[Run]:
    """A run of two steps. Whatever happens in the block, at its end the honest client finishes it."""
    told = {**server_options(model, tmp_path / "run"), "clients": clients, **options}
    with ThreadPoolExecutor(1) as background, GpuServer(**told) as server:
        with EdgeClient(
            server.url, engine="torch", model=str(model), data=data, name="honest", batch_size=2, dtype="float32"
        ) as honest:
            run = Run(server, honest, background)
            yield run
            assert run.train().result() == [1, 2]
        assert [record.number for record in server.train()] == [1, 2]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


@contextmanager
def joined(run: Run, fingerprint: str) -> Iterator[Hostile]:
    """A hostile client that has joined as it should, batches of 2 x 4 rows: with the honest one, the run has started."""
    while True:
        with Hostile(run.server.url) as hostile:
            hostile.say(Hello(name="hostile", fingerprint=fingerprint, codecs=OFFERED))
            if isinstance(hostile.hear(Welcome | Failure), Failure):
                continue  # one refused before has not left quite yet
            hostile.say(Join(num_samples=4, batch_size=2, longest=4))
            run.honest.start()
            assert hostile.hear(Start).step == 0
            yield hostile
            try:
                hostile.say(Goodbye())  # a lost connection would keep the place
            except ConnectionClosed:
                pass  # refused, as it should be
            return


FINGERPRINT = "0" * 32
UNASKED: dict[str, tuple[Message | bytes | str, str]] = {
    "rubbish": (b"rubbish", "not a message"),
    "nothing": (b"", "not a message"),
    "text frame": ("hello", "got a text frame; messages are binary"),
    "other version": (packed(PROTOCOL_VERSION + 1, "Hello", name="x"), f"protocol version {PROTOCOL_VERSION + 1}, this side"),
    "unknown kind": (packed(PROTOCOL_VERSION, "Nonsense"), "unknown kind of message"),
    "field missing": (packed(PROTOCOL_VERSION, "Hello", name="x"), "Hello.fingerprint is missing"),
    "bad name": (packed(PROTOCOL_VERSION, "Hello", name="../x", fingerprint=FINGERPRINT), "Hello: a client name is 1 to 64"),
    "out of turn": (Join(num_samples=1, batch_size=1, longest=1), "client sent Join while new"),
    "not its to say": (Pong(software="x", run="x", clients=1, joined=1, step=1), "client sent Pong while new"),
    "early batch": (batch(), "client sent Activations while new"),
    "bomb": (bomb(), "not a message"),
    "huge frame": (zstd.compress(bytes(2**27)), f"message of {2**27} bytes exceeds the limit of 65536 bytes"),
    "frame of unknown size": (unannounced(), "does not announce its size"),
}


@pytest.mark.parametrize("case", UNASKED)
def test_client_that_says_what_it_may_not_is_refused_and_the_other_goes_on(
    tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path], case: str
) -> None:
    words, reason = UNASKED[case]
    with a_run(tiny_model, tmp_path, pairs_file("honest", 3), clients=1) as run, Hostile(run.server.url) as hostile:
        hostile.say(words)
        assert reason in hostile.hear().reason


def change_ids(model: Path) -> None:
    path = model / "tokenizer.json"
    whole = json.loads(path.read_text())
    swap_two_ids(whole)
    path.write_text(json.dumps(whole))


@pytest.fixture
def fingerprint(tiny_model: Path) -> str:
    return PretrainedModel(tiny_model).fingerprint()


@pytest.mark.parametrize(
    ("what", "change"),
    [("model", lambda model: change_config(model, layer_norm_epsilon=1e-4)), ("tokenizer", change_ids)],
)
def test_client_with_another_model_or_tokenizer_is_refused_with_both_fingerprints(
    tiny_model: Path,
    model: Path,
    tmp_path: Path,
    pairs_file: Callable[..., Path],
    edge_says: Say,
    fingerprint: str,
    what: str,
    change: Callable[[Path], None],
) -> None:
    change(model)
    with a_run(tiny_model, tmp_path, pairs_file("honest", 3), clients=2) as run:
        text = edge_says(server=run.server.url, model=model)
        assert f"refuses: the {what} of " in text
        assert f"use the same base {what} on both sides" in text
        assert fingerprint in text
        assert PretrainedModel(model).fingerprint() in text
        with joined(run, fingerprint):
            pass


def test_client_with_a_name_in_use_is_told_so_until_it_gives_up(
    tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path], edge_says: Say
) -> None:
    with a_run(tiny_model, tmp_path, pairs_file("honest", 3), clients=1) as run:
        text = edge_says(server=run.server.url, name="honest", give_up_after=0.1)
        assert "refuses for now: the name honest is in use by a device that is connected" in text
        assert text.endswith("(and wants to be asked again in 10 s); gave up after 0.1 s")


def test_client_too_many_is_refused(tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path], edge_says: Say) -> None:
    with a_run(tiny_model, tmp_path, pairs_file("honest", 3), clients=1) as run:
        assert edge_says(server=run.server.url, name="late").endswith("refuses: the run is full: it takes 1 device (--clients)")


@pytest.mark.parametrize(
    ("join", "reason"),
    [
        ({"longest": 257}, "sequences are up to 257 tokens long, and the model has 256 positions; choose a smaller"),
        ({"batch_size": 100, "longest": 100}, "choose a smaller --batch-size or --max-length"),
        ({"num_samples": 2**53}, "at most 2147483647 can be"),
    ],
)
def test_client_that_brings_too_much_is_refused_and_leaves_its_place(
    tiny_model: Path,
    tmp_path: Path,
    pairs_file: Callable[..., Path],
    fingerprint: str,
    join: dict[str, int],
    reason: str,
) -> None:
    options = {"steps": None, "epochs": 1, "max_batch_tokens": 300}
    with a_run(tiny_model, tmp_path, pairs_file("honest", 4), clients=2, **options) as run:
        with Hostile(run.server.url) as hostile:
            hostile.say(Hello(name="greedy", fingerprint=fingerprint))
            hostile.hear(Welcome)
            hostile.say(Join(**{"num_samples": 1, "batch_size": 1, "longest": 1, **join}))
            assert reason in hostile.hear().reason
        with joined(run, fingerprint):
            pass


MISFITS: dict[str, tuple[Message | bytes | str, str]] = {
    "rubbish": (b"rubbish", "not a message"),
    "text frame": ("hello", "got a text frame; messages are binary"),
    "bomb": (bomb(), "not a message"),
    "out of turn": (Hello(name="again", fingerprint=FINGERPRINT), "client sent Hello while ready"),
    "other width": (batch(values=floats(7, 31)), "values are 31 wide, the model is 32"),
    "other dtype": (batch(values=floats(7, dtype=np.float64)), "Activations.values is float64; this run is in float32"),
    "integers for values": (
        packed(PROTOCOL_VERSION, "Activations", step=1, seconds={}, lengths=[1], label_counts=[1], labels=[1], values=1),
        "Activations.lengths: expected a tensor",
    ),
    "not a number": (batch(values=floats(7, value=float("nan"))), "Activations.values: has NaN or infinite values"),
    "codec in an exact run": (encode(batch(), "int8"), "a tensor in int8, which was not agreed on; agreed are exact"),
    "infinite": (batch(values=floats(7, value=float("-inf"))), "Activations.values: has NaN or infinite values"),
    "step ahead": (batch(step=2), "expected Activations of step 1, micro-batch 0, got Activations of step 2, micro-batch 0"),
    "adapter first": (
        AdapterGradient(step=1, seconds=Seconds(), tensors={}),
        "expected Activations of step 1, micro-batch 0, got AdapterGradient of step 1",
    ),
    "done first": (Done(step=2), "expected Activations of step 1, micro-batch 0, got Done of step 2"),
    "lengths beside the rows": (batch(lengths=ints(4, 4)), "lengths add up to 8, values have 7 rows"),
    "more rows": (
        batch(lengths=ints(3, 3, 3), label_counts=ints(1, 1, 1), values=floats(9)),
        "the batch has 9 rows; at most 8 were announced",
    ),
    "more sequences": (
        batch(lengths=ints(1, 1, 1), label_counts=ints(1, 1, 1), values=floats(3)),
        "the batch has 3 sequences; at most 2 were announced",
    ),
    "longer sequence": (
        batch(lengths=ints(7), label_counts=ints(3)),
        "a sequence has 7 tokens; at most 4 were announced",
    ),
    "far more rows": (batch(lengths=ints(4, 4000), values=floats(4004)), "exceeds the limit of"),
    "label beyond": (
        batch(labels=ints(1, 2, VOCABULARY)),
        f"a label is {VOCABULARY}; this model's tokens are 0 to {VOCABULARY - 1}",
    ),
    "label below": (batch(labels=ints(-1, 2, 3)), "a label is -1; this model's tokens are"),
    "more labels": (batch(labels=ints(1, 2, 3, 4)), "label counts add up to 3, got 4 labels"),
    "label counts beyond": (batch(label_counts=ints(5, 1)), "label counts between 0 and the length"),
    "evaluation of another width": (
        Evaluation(index=0, lengths=ints(1), label_counts=ints(1), labels=ints(1), values=floats(1, 5)),
        "values are 5 wide, the model is 32",
    ),
}


def of_scale(scale: int) -> bytes:
    """A batch in int8 with another scale in its first row, bfloat16 as its bits."""
    whole = Coded.of(floats(7), "int8")
    scales = bytearray(whole.parts[3])
    scales[0], scales[7] = scale % 256, scale // 256
    values = msgpack.ExtType(2, msgpack.packb(["int8", [7, WIDTH], *whole.parts[:3], bytes(scales), whole.parts[4]]))
    return protocol_samples.frame_of("Activations", {**protocol_samples.plain(batch()), "values": values})


CODED_MISFITS: dict[str, tuple[bytes, str]] = {
    "another codec": (encode(batch(), "coarse"), "a tensor in coarse, which was not agreed on"),
    "scale of zero": (of_scale(0), "Activations.values: a scale of int8 is not a positive number"),
    "negative scale": (of_scale(0xBF80), "a scale of int8 is not a positive number"),
    "scale that is no number": (of_scale(0x7FC0), "a scale of int8 is not a positive number"),
    "infinite scale": (of_scale(0x7F80), "a scale of int8 is not a positive number"),
    "values beyond all sense": (encode(batch(values=floats(7, value=1e30)), "int8"), "training has diverged"),
    "other width": (encode(batch(values=floats(7, 31)), "int8"), "values are 31 wide, the model is 32"),
    "far more rows": (encode(batch(lengths=ints(4, 4000), values=floats(4004)), "int8"), "exceeds the limit of"),
}


@pytest.mark.parametrize("case", CODED_MISFITS)
def test_client_whose_codes_make_no_sense_is_dropped_and_the_other_goes_on(
    tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path], fingerprint: str, case: str
) -> None:
    data, reason = CODED_MISFITS[case]
    with (
        a_run(tiny_model, tmp_path, pairs_file("honest", 3), clients=2, codec="int8") as run,
        joined(run, fingerprint) as hostile,
    ):
        hostile.say(data)
        assert reason in hostile.hear().reason


def test_client_that_builds_on_what_is_not_kept_is_dropped_and_the_other_goes_on(
    tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path], fingerprint: str
) -> None:
    """A change since step 7 of its first sequence; the second is new."""
    fresh = quantised_parts(floats(3), "int8", None)
    parts = [shuffled(ints(7, 0)), *fresh, b"", b"", shuffled(to_bfloat16(np.ones(1, np.float32)))]
    words = batch(samples=ints(0, 1), values=Coded(DELTA, (7, WIDTH), parts))
    with (
        a_run(tiny_model, tmp_path, pairs_file("honest", 3), clients=2, codec="delta") as run,
        joined(run, fingerprint) as hostile,
    ):
        hostile.say(encode(words))
        assert "a change of sample 0 since step 7, which is not in the cache" in hostile.hear().reason


@pytest.mark.parametrize("case", MISFITS)
def test_client_whose_message_does_not_fit_the_run_is_dropped_and_the_other_goes_on(
    tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path], fingerprint: str, case: str
) -> None:
    words, reason = MISFITS[case]
    with (
        a_run(tiny_model, tmp_path, pairs_file("honest", 3), clients=2) as run,
        joined(run, fingerprint) as hostile,
    ):
        hostile.say(words)
        assert reason in hostile.hear().reason


def edge_tensors(**changes: Any) -> dict[str, Array]:
    prefix = "base_model.model.transformer.h.0.attn.c_attn.lora_"
    right = {f"{prefix}A.weight": floats(2), f"{prefix}B.weight": floats(3 * WIDTH, 2)}
    return {**right, **{f"{prefix}{matrix}.weight": value for matrix, value in changes.items()}}


BAD_GRADIENTS: dict[str, tuple[Message, str]] = {
    "none": (AdapterGradient(step=1, seconds=Seconds(), tensors={}), "is none, expected [2, 32]"),
    "other shape": (
        AdapterGradient(step=1, seconds=Seconds(), tensors=edge_tensors(A=floats(4))),
        "lora_A.weight' is [4, 32], expected [2, 32]",
    ),
    "one more": (
        AdapterGradient(step=1, seconds=Seconds(), tensors=edge_tensors(C=floats(2))),
        "lora_C.weight' is [2, 32], expected none",
    ),
    "other dtype": (
        AdapterGradient(step=1, seconds=Seconds(), tensors=edge_tensors(A=floats(2, dtype=np.float64))),
        "is float64; this run is in float32",
    ),
    "not a number": (
        AdapterGradient(step=1, seconds=Seconds(), tensors=edge_tensors(A=floats(2, value=float("nan")))),
        "has NaN or infinite values",
    ),
    "of another step": (
        AdapterGradient(step=2, seconds=Seconds(), tensors=edge_tensors()),
        "expected AdapterGradient of step 1, got AdapterGradient of step 2",
    ),
    "a batch instead": (batch(step=2), "expected AdapterGradient of step 1, got Activations of step 2, micro-batch 0"),
}


@pytest.mark.parametrize("case", BAD_GRADIENTS)
def test_client_with_a_bad_gradient_is_dropped_in_the_middle_of_a_step_and_the_other_goes_on(
    tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path], fingerprint: str, case: str
) -> None:
    words, reason = BAD_GRADIENTS[case]
    with (
        a_run(tiny_model, tmp_path, pairs_file("honest", 3), clients=2) as run,
        joined(run, fingerprint) as hostile,
    ):
        run.train()
        hostile.say(batch())
        assert hostile.hear(ActivationGradient).values.shape == (7, WIDTH)
        hostile.say(words)
        assert reason in hostile.hear().reason
        assert run.train().result() == [1, 2]


@pytest.mark.parametrize("moment", ["before its batch", "after its batch", "after its gradient", "after a step"])
@pytest.mark.parametrize("politely", [True, False])
def test_client_that_leaves_in_the_middle_does_not_stop_the_others(
    tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path], fingerprint: str, moment: str, politely: bool
) -> None:
    with (
        a_run(tiny_model, tmp_path, pairs_file("honest", 3), clients=2, quorum=1, step_deadline=1.0, linger=0.1) as run,
        joined(run, fingerprint) as hostile,
    ):
        run.train()
        if moment != "before its batch":
            hostile.say(batch())
        if moment in ("after its gradient", "after a step"):
            hostile.hear(ActivationGradient)
        if moment == "after a step":
            hostile.say(AdapterGradient(step=1, seconds=Seconds(), tensors=edge_tensors()))
            hostile.hear(EdgeAdapter)
        if politely:
            hostile.say(Goodbye())
        else:
            hostile.hang_up()
        hostile.socket.close()
        assert run.train().result() == [1, 2]


def test_evaluation_of_a_hostile_client_changes_nothing(
    tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path], fingerprint: str
) -> None:
    with (
        a_run(tiny_model, tmp_path, pairs_file("honest", 3), clients=2) as run,
        joined(run, fingerprint) as hostile,
    ):
        hostile.say(Evaluation(index=7, lengths=ints(2), label_counts=ints(2), labels=ints(1, 2), values=floats(2)))
        first = hostile.hear(EvaluationLoss)
        hostile.say(Evaluation(index=8, lengths=ints(2), label_counts=ints(2), labels=ints(1, 2), values=floats(2)))
        assert (first.index, hostile.hear(EvaluationLoss).summed_loss) == (7, first.summed_loss)


# Training that diverges


@pytest.mark.parametrize("aggregate_every", [1, 2])
def test_training_that_diverges_ends_the_edge_with_one_sentence(
    tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path], capsys: pytest.CaptureFixture[str], aggregate_every: int
) -> None:
    options = {**server_options(tiny_model, tmp_path / "run"), "lr": 1e30, "steps": 20, "aggregate_every": aggregate_every}
    with GpuServer(**options) as server:
        flags = {"server": server.url, "model": tiny_model, "data": pairs_file("a", 9), "device": "cpu"}
        assert edge_client.cli.main(["train", *arguments(flags)]) == 1
        with pytest.raises(RunEndedEarly, match="all devices have left the run after step"):
            list(server.train())
    introduction, text = capsys.readouterr().err.strip().splitlines()
    assert introduction.endswith("the run waits for 1 device")
    assert text.startswith("splitlora-edge: ")
    assert re.search(r"in step \d+ this device's activations are no longer finite numbers; try a lower --lr", text)


def test_values_that_are_too_large_are_refused_and_the_others_go_on(
    tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path], fingerprint: str
) -> None:
    with (
        a_run(tiny_model, tmp_path, pairs_file("honest", 3), clients=2) as run,
        joined(run, fingerprint) as hostile,
    ):
        hostile.say(batch(values=floats(7, value=3e38)))
        assert hostile.hear(Failure).reason == (
            "hostile sent activations of step 1 with values up to 3e+38; beyond 1e+06 training has diverged: try a lower --lr "
            "on the server"
        )


def test_loss_that_is_no_number_ends_the_run_and_everybody_is_told_why(
    tiny_model: Path, tmp_path: Path, fingerprint: str
) -> None:
    with GpuServer(**{**server_options(tiny_model, tmp_path / "run"), "lr": 1e30}) as server, Hostile(server.url) as hostile:
        hostile.say(Hello(name="stubborn", fingerprint=fingerprint))
        hostile.hear(Welcome)
        hostile.say(Join(num_samples=4, batch_size=2, longest=4))
        adapter = hostile.hear(Start).adapter
        values = np.random.default_rng(0).standard_normal((7, WIDTH)).astype(np.float32)
        hostile.say(batch(values=values))
        hostile.hear(ActivationGradient)
        # A gradient of zero leaves the edge as it is; the server's own part is thrown far off by its step.
        hostile.say(AdapterGradient(step=1, seconds=Seconds(), tensors={name: 0 * value for name, value in adapter.items()}))
        hostile.hear(EdgeAdapter)
        hostile.say(batch(step=2, values=values))
        told = hostile.hear(Failure).reason
        with pytest.raises(TrainingDiverged) as caught:
            list(server.train())
    assert str(caught.value) == told
    assert told.endswith("try a lower --lr")


def set_in(weights: dict[str, torch.Tensor], name: str, value: float) -> None:
    weights[name].view(-1)[-1] = value


BROKEN_BASES = {
    "device": (
        "transformer.h.0.mlp.c_fc.weight",
        float("nan"),
        "activations",
        "its tensor 'h.0.mlp.c_fc.weight' has such values",
    ),
    "server": ("transformer.h.3.ln_2.bias", float("inf"), "losses", "its tensor 'h.3.ln_2.bias' has such values"),
    "server's head": ("transformer.wte.weight", float("nan"), "losses", "its tensor 'wte.weight' has such values"),
    "too large": ("transformer.ln_f.weight", 3e38, "losses", "its weights are too large for the precision"),
}


@pytest.mark.parametrize("case", BROKEN_BASES)
def test_base_model_that_gives_no_numbers_is_named_before_the_first_update(
    model: Path, tmp_path: Path, pairs_file: Callable[..., Path], capsys: pytest.CaptureFixture[str], case: str
) -> None:
    name, value, what, reason = BROKEN_BASES[case]
    change_weights(model, lambda weights: set_in(weights, name, value))
    with GpuServer(**server_options(model, tmp_path / "run")) as server:
        flags = {"server": server.url, "engine": "torch", "model": model, "data": pairs_file("a", 3), "dtype": "float32"}
        assert edge_client.cli.main(["train", *arguments(flags)]) == 1
        if case != "device":
            with pytest.raises(ModelError, match="the base model itself"):
                list(server.train())
    said = capsys.readouterr().err
    assert f"the base model itself, without an adapter, gives {what} that are not finite numbers: {reason}; take" in said
    assert "step 1/" not in said
    assert "Traceback" not in said


# Ctrl-C


def interrupt(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """Exit status, and what was said after the signal."""
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    return process.returncode, said


def test_ctrl_c_keeps_the_run_and_its_client_tries_to_come_back(
    tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path]
) -> None:
    flags = {**server_options(tiny_model, tmp_path / "run"), "steps": 10**6}
    with program("gpu_server", "serve", *arguments(flags)) as process:
        url = read_until(process, "listening on").split()[2]
        with EdgeClient(url, engine="torch", model=str(tiny_model), data=pairs_file("a", 3), give_up_after=0.1) as client:
            steps = client.train()
            next(steps)
            status, said = interrupt(process)
            assert (status, said.splitlines()[-1]) == (130, "splitlora-server: interrupted")
            assert "Traceback" not in said
            assert "--resume goes on from there" in said
            with pytest.raises(ConnectionFailed, match=r"gave up after 0\.1 s"):
                list(steps)


def test_ctrl_c_ends_an_edge_that_waits_and_its_place_is_free_again(
    tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path], fingerprint: str
) -> None:
    with a_run(tiny_model, tmp_path, pairs_file("honest", 3), clients=2) as run:
        flags = {"server": run.server.url, "model": tiny_model, "data": pairs_file("a", 3), "device": "cpu"}
        with program("edge_client", "train", *arguments(flags)) as process:
            read_until(process, "the run waits for 2 devices")
            assert interrupt(process) == (130, "splitlora-edge: interrupted\n")
        with joined(run, fingerprint):
            pass
