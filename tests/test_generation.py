"""Text from an exported folder, held to transformers' own generate; and everything that such a folder can lack."""

import json
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import make_model, shared_path
from family_models import make_talking_model
from family_tokenizers import MARKERS, SYSTEM, TALK
from spoiling import change_manifest, foreign_graph, move_out
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel
from transformers.generation.logits_process import TopPLogitsWarper

from edge_client import ExportedModelError, GenerationError, Generator, Sampling
from edge_client.cli import main
from edge_client.data import Dataset, Form
from edge_client.generation import open_exported
from edge_client.generation.generator import choose_precision
from export import export_onnx
from export.cli import main as export_main
from split_model import LoraConfig, PretrainedModel, initial_adapter, save_adapter
from storage import ChatTemplate, load_tokenizer

pytestmark = pytest.mark.usefixtures("few_texts")

ATTENTIONS = ("gqa", "attn23", "ops")


@pytest.fixture(scope="session")
def exported(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, in every precision that a device is made for."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    export_onnx(str(tiny_model), folder, precisions=("fp32", "q8", "q4"))
    return folder


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    """The same, to be spoilt."""
    return Path(shutil.copytree(exported, tmp_path / "model"))


def expected_tokens(model: Path, prompts: Sequence[Sequence[int]], max_new_tokens: int, **options: Any) -> list[list[int]]:
    """What transformers continues the prompts with, greedily and without the end token."""
    reference = GPT2LMHeadModel.from_pretrained(model, dtype=torch.float32).eval()
    end = options.setdefault("eos_token_id", reference.config.eos_token_id)
    longest = max(map(len, prompts))
    ids = torch.tensor([[end] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    output = reference.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=end, **options
    )
    continuations = output[:, longest:].tolist()
    return [tokens[: tokens.index(end)] if end in tokens else tokens for tokens in continuations]


def random_prompts(count: int, longest: int) -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(1, 600, random.integers(1, longest)).tolist() for _ in range(count)]


# Parity


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_greedy_tokens_are_those_of_transformers(tiny_model: Path, tmp_path: Path, attention: str) -> None:
    export_onnx(str(tiny_model), tmp_path / "model", precisions=("fp32",), attention=attention)
    generator = Generator(tmp_path / "model", precision="fp32")
    prompts = random_prompts(12, longest=40)
    for prompt, expected in zip(prompts, expected_tokens(tiny_model, prompts, 16), strict=True):
        assert list(generator.tokens(prompt, max_new_tokens=16)) == expected


def test_fifty_greedy_texts_are_those_of_transformers(tmp_path: Path) -> None:
    model = shared_path("models/gpt2-mini")
    lines = shared_path("data/e2e/valid.txt").read_text(encoding="utf-8").splitlines()[::90][:50]
    export_onnx(str(model), tmp_path / "model", precisions=("fp32",))
    generator = Generator(tmp_path / "model")
    prompts = [line.split("||")[0] for line in lines]
    expected = expected_tokens(model, [generator.encode(prompt) for prompt in prompts], 20)
    assert len(prompts) == 50
    for prompt, tokens in zip(prompts, expected, strict=True):
        assert generator.text(prompt, max_new_tokens=20) == generator.tokenizer.decode(tokens).removeprefix(" ")
    for prompt, tokens in zip(prompts[:5], expected[:5], strict=True):
        assert generator.text(f"{prompt}<|endoftext|>", raw=True, max_new_tokens=20) == generator.tokenizer.decode(tokens)


def test_continuation_ends_with_the_context(tiny_model: Path, exported: Path) -> None:
    prompt = np.random.default_rng(1).integers(1, 600, 230).tolist()
    tokens = list(Generator(exported, precision="fp32").tokens(prompt, max_new_tokens=100))
    assert len(tokens) == 256 - 230
    assert [tokens] == expected_tokens(tiny_model, [prompt], 26)


def test_continuation_ends_with_the_text(tiny_model: Path, copied: Path) -> None:
    prompt = [5, 6, 7]
    (unlimited,) = expected_tokens(tiny_model, [prompt], 30)
    end = next(token for token in unlimited[5:] if token not in unlimited[:5])
    change_manifest(copied, end_token=end)
    tokens = list(Generator(copied, precision="fp32").tokens(prompt, max_new_tokens=30))
    assert [tokens] == expected_tokens(tiny_model, [prompt], 30, eos_token_id=end) == [unlimited[: unlimited.index(end)]]


def test_continuation_ends_with_any_of_the_tokens_that_end_a_text(tiny_model: Path, copied: Path) -> None:
    prompt = [5, 6, 7]
    (unlimited,) = expected_tokens(tiny_model, [prompt], 30)
    first, second = sorted(set(unlimited), key=unlimited.index)[3:5]
    change_manifest(copied, end_token=second, stop_tokens=[599, first])
    tokens = list(Generator(copied, precision="fp32").tokens(prompt, max_new_tokens=30))
    assert tokens == unlimited[: unlimited.index(first)]


def test_every_text_starts_afresh(exported: Path) -> None:
    generator = Generator(exported, precision="q8")
    first = generator.text("The Wrestlers is", max_new_tokens=12)
    generator.text("something else, and longer than that one was", max_new_tokens=20)
    assert generator.text("The Wrestlers is", max_new_tokens=12) == first


@pytest.mark.parametrize("raw", [False, True])
def test_empty_prompt_begins_a_text(exported: Path, raw: bool) -> None:
    generator = Generator(exported, precision="fp32")
    assert generator.encode("", raw=raw) == generator.encode("<|endoftext|>", raw=raw) == [generator.model.end_token]


@pytest.mark.parametrize("prompt", ["The Wrestlers is", " in spaces\t", "", "ends in one<|endoftext|>", "naïve café"])
def test_prompt_is_encoded_as_training_encodes_that_of_a_pair(exported: Path, tmp_path: Path, prompt: str) -> None:
    generator = Generator(exported, precision="fp32")
    (tmp_path / "pair.jsonl").write_text(json.dumps({"prompt": prompt.removesuffix("<|endoftext|>"), "completion": "a text"}))
    data = Dataset.load(tmp_path / "pair.jsonl", generator.tokenizer, generator.model.end_token, 256)
    (sample,) = data.samples
    assert generator.encode(prompt) == sample.tokens[: len(sample.tokens) - sample.num_labels].tolist()


def test_raw_text_is_continued_as_it_stands(exported: Path) -> None:
    generator = Generator(exported, precision="fp32")
    text = " two spaces  "
    assert generator.encode(text, raw=True) == generator.tokenizer.encode(text, add_special_tokens=False).ids


def test_completion_begins_without_the_space_that_training_puts_before_it(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = Generator(exported, precision="fp32")
    tokens = generator.encode("  a", raw=True)
    monkeypatch.setattr(generator, "tokens", lambda *_, **__: iter(tokens))
    assert (generator.text("x"), generator.text("x", raw=True)) == (" a", "  a")


# Conversations


@pytest.fixture(scope="session")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with a tokenizer that begins texts, and a chat template."""
    model = make_talking_model(tmp_path_factory.mktemp("talking"), "Llama 2", MARKERS)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "eos_token_id": [2, 5]}))
    export_onnx(str(model), model / "exported", precisions=("fp32",))
    return model


@pytest.mark.parametrize("begins", [[], [SYSTEM]], ids=["user", "system"])
def test_messages_are_given_as_transformers_gives_them_and_as_training_did(
    talking: Path, tmp_path: Path, begins: list[dict[str, str]]
) -> None:
    generator, reference = Generator(talking / "exported"), AutoTokenizer.from_pretrained(talking)
    messages = [*begins, *TALK[:3]]
    given = generator.encode(messages)
    assert given == reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [*messages, TALK[3]]}))
    form = Form(template=ChatTemplate.find(talking), loss_on="completion")
    (sample,) = Dataset.load(tmp_path / "a.jsonl", load_tokenizer(talking), 2, 256, form=form).samples
    assert given == sample.tokens[: len(sample.tokens) - sample.num_labels].tolist()
    loaded = AutoModelForCausalLM.from_pretrained(talking, dtype=torch.float32).eval()
    ids = torch.tensor([given])
    output = loaded.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, pad_token_id=0)
    expected = output[0, len(given) :].tolist()
    assert list(generator.tokens(given, max_new_tokens=12)) == [token for token in expected if token not in (2, 5)]


@pytest.mark.parametrize("entry", [{"prompt": "a pub", "completion": "b"}, {"text": "a pub"}])
def test_text_begins_as_the_tokenizer_begins_it(talking: Path, tmp_path: Path, entry: dict[str, str]) -> None:
    generator, raw = Generator(talking / "exported"), "text" in entry
    (tmp_path / "a.jsonl").write_text(json.dumps(entry))
    (sample,) = Dataset.load(tmp_path / "a.jsonl", load_tokenizer(talking), 2, 256).samples
    given = generator.encode("a pub", raw=raw)
    assert given == sample.tokens[: len(given)].tolist()
    assert given[0] == 1
    assert generator.encode("", raw=True) == [1]


def test_program_answers_by_the_chat_template(talking: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(talking / "exported")
    assert main(["generate", folder, "--chat", "A pub?", "--system", "You know pubs.", "--max-new-tokens", "6"]) == 0
    messages = [SYSTEM, {"role": "user", "content": "A pub?"}]
    assert capsys.readouterr().out == Generator(folder).text(messages, max_new_tokens=6) + "\n"
    assert main(["generate", folder, "--prompt", "A pub?", "--system", "x"]) == 1
    assert "--system is the beginning of a conversation: give what the user says with --chat" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("messages", "template", "reason"),
    [
        (TALK[:1], None, "has no chat template, so the model takes no messages: give a prompt, or a raw text"),
        (TALK[:1], "{{ raise_exception('only tools') }}", "does not take these messages: only tools"),
        (TALK[:1], "{% for %}", "the chat template cannot be read: "),
        (["hi"], MARKERS, "message 1 is 'hi'; it should have a role and a content"),
        ([{"role": "user", "content": None}], MARKERS, "it should have a role and a content"),
        ([{"role": "user", "content": "\ud800"}], MARKERS, "the prompt is not UTF-8: '\\ud800' is not a character"),
    ],
)
def test_messages_that_cannot_be_answered_are_refused(copied: Path, messages: Any, template: str | None, reason: str) -> None:
    if template is not None:
        (copied / "chat_template.jinja").write_text(template)
    with pytest.raises((GenerationError, ExportedModelError), match=re.escape(reason)):
        Generator(copied, precision="fp32").text(messages)


# Streaming


def test_streamed_pieces_are_the_whole_text_and_cut_no_character(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Generator(exported, precision="fp32")
    text = "naïve café → 10 €, 東京 🎉 done"
    tokens = generator.encode(text, raw=True)
    assert len(tokens) > len(text), "characters of several tokens are the point"
    monkeypatch.setattr(generator, "tokens", lambda *_, **__: iter(tokens))
    pieces = list(generator.stream("x"))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_streamed_nonsense_is_the_whole_text_too(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Generator(exported, precision="fp32")
    random = np.random.default_rng(0)
    for _ in range(200):  # of bytes that are no UTF-8, or that end within a character
        tokens = random.integers(0, 600, random.integers(1, 30)).tolist()
        monkeypatch.setattr(generator, "tokens", lambda *_, tokens=tokens, **__: iter(tokens))
        assert "".join(generator.stream("x", raw=True)) == generator.tokenizer.decode(tokens)


def test_byte_that_fits_no_character_fails_nothing_and_repeats_nothing(talking: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Generator(talking / "exported")
    for rest in ("a", "<0xA9>", ""):
        names = ["a", "<0xC3>", "<0xA9>", "<0xC3>", *filter(None, [rest])]
        tokens = [generator.tokenizer.token_to_id(name) for name in names]
        monkeypatch.setattr(generator, "tokens", lambda *_, tokens=tokens, **__: iter(tokens))
        expected = {"a": "a\u00e9\ufffda", "<0xA9>": "a\u00e9\u00e9", "": "a\u00e9\ufffd"}[rest]
        assert generator.text("x", raw=True) == expected


def test_a_piece_comes_before_the_next_token_is_computed(exported: Path) -> None:
    generator = Generator(exported, precision="fp32")
    next(generator.stream("The Wrestlers is", max_new_tokens=50))
    assert generator.speed.new_tokens == 1


# Sampling


def test_same_seed_gives_the_same_text_and_another_seed_another(exported: Path) -> None:
    generator = Generator(exported, precision="q8")
    texts = [generator.text("The", sampling=Sampling(temperature=1.0, seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_samples_come_from_transformers_nucleus_in_its_proportions() -> None:
    logits = np.random.default_rng(3).normal(0, 1, 50).astype(np.float32)
    kept = TopPLogitsWarper(0.8)(torch.zeros(1, 1), torch.from_numpy(logits)[None] / 0.7)[0]
    expected = kept.softmax(-1).numpy()
    assert 3 < np.count_nonzero(expected) < 40
    sampling, random = Sampling(temperature=0.7, top_p=0.8), np.random.default_rng(0)
    counts = np.bincount([sampling.choose(logits, random) for _ in range(4000)], minlength=50)
    assert set(counts.nonzero()[0]) <= set(expected.nonzero()[0])
    assert np.abs(counts / 4000 - expected).max() < 4 * (0.25 / 4000) ** 0.5  # four standard deviations of the worst


def test_small_temperature_and_small_nucleus_are_greedy() -> None:
    logits = np.random.default_rng(3).normal(0, 2, 50).astype(np.float32)
    for sampling in (Sampling(temperature=1e-4), Sampling(temperature=1.0, top_p=1e-6)):
        assert sampling.choose(logits, np.random.default_rng(0)) == logits.argmax()


# What is chosen, and what is said


def test_automatic_precision_is_eight_bits_unless_memory_is_short(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_exported(exported)
    sizes = {name: files.num_bytes for name, files in model.precisions.items()}
    assert sizes["q4"] < sizes["q8"] < sizes["fp32"]
    for room, expected in ((10**12, "q8"), (None, "q8"), (3 * sizes["q4"] + 1, "q4"), (1, "q4")):
        monkeypatch.setattr("edge_client.generation.generator.available_memory", lambda room=room: room)
        precision, reason = choose_precision(model)
        assert precision == expected, reason
        assert ("memory" in reason) == (expected == "q4")


@pytest.mark.parametrize("stream", [True, False])
def test_command_prints_the_text_and_says_how_fast_it_was(
    exported: Path, capsys: pytest.CaptureFixture[str], stream: bool
) -> None:
    command = ["generate", str(exported), "--prompt", "The Wrestlers is", "--max-new-tokens", "9"]
    assert main([*command, *(["--stream"] if stream else [])]) == 0
    said = capsys.readouterr()
    assert said.out == Generator(exported, precision="q8").text("The Wrestlers is", max_new_tokens=9) + "\n"
    assert "precision q8: " in said.err
    assert "9 tokens, " in said.err
    assert "tokens/s" in said.err
    assert "peak memory" in said.err


def test_generating_imports_neither_torch_nor_transformers_nor_export(exported: Path) -> None:
    check = (
        "import sys; from edge_client.cli import main\n"
        f"status = main(['generate', {str(exported)!r}, '--prompt', 'The', '--max-new-tokens', '2'])\n"
        "heavy = {'torch', 'transformers', 'export', 'onnx', 'safetensors', 'websockets'} & sys.modules.keys()\n"
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_missing_onnxruntime_is_one_sentence(exported: Path) -> None:
    check = (
        "import sys; sys.modules['onnxruntime'] = None; from edge_client.cli import main\n"
        f"sys.exit(main(['generate', {str(exported)!r}, '--prompt', 'The']))"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("splitlora-edge: generating needs onnxruntime, which is not installed")
    assert done.stderr.endswith(": pip install splitlora\n")


# Preparing


def test_prepared_weights_give_the_same_text(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {name: Generator(copied, precision=name).text("The Wrestlers is") for name in ("q8", "q4")}
    assert main(["prepare", str(copied)]) == 0
    assert "prepared" in capsys.readouterr().err
    for name, text in before.items():
        generator = Generator(copied, precision=name)
        assert generator.preparation == "prepared"
        assert generator.text("The Wrestlers is") == text
    assert not list((copied / "prepared").glob("*.onnx")), "other programs would take them for the model"


@pytest.mark.parametrize("key", ["processor", "onnxruntime"])
def test_what_was_prepared_elsewhere_is_not_used(copied: Path, key: str) -> None:
    assert main(["prepare", str(copied)]) == 0
    note = copied / "prepared/prepared.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | {key: "another"}))
    generator = Generator(copied, precision="q8")
    assert f"prepared for {key} another" in generator.preparation
    assert generator.text("The")


def spoil_nothing(folder: Path) -> None:
    shutil.rmtree(folder / "prepared")


def spoil_size(folder: Path) -> None:
    (folder / "prepared/q8-0.prepared_data").write_bytes(b"")


def spoil_graph(folder: Path) -> None:
    (folder / "prepared/q8-0.prepared").unlink()


def spoil_note(folder: Path) -> None:
    (folder / "prepared/prepared.json").write_text("[]")


def spoil_note_without_end(folder: Path) -> None:
    (folder / "prepared/prepared.json").write_text("[" * 100_000)


def spoil_source(folder: Path) -> None:
    path = folder / "onnx/model_quantized.onnx_data"
    path.write_bytes(path.read_bytes())


@pytest.mark.parametrize("spoil", [spoil_nothing, spoil_size, spoil_graph, spoil_note, spoil_note_without_end, spoil_source])
def test_what_was_prepared_of_something_else_is_not_used(copied: Path, spoil: Callable[[Path], None]) -> None:
    assert main(["prepare", str(copied)]) == 0
    spoil(copied)
    generator = Generator(copied, precision="q8")
    assert generator.preparation != "prepared"
    assert generator.text("The")


def test_preparing_on_a_full_disk_names_the_disk_and_leaves_nothing(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A limit of the size of files stands for the disk: onnxruntime's writing fails, and the graph is as good as ever."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        assert main(["prepare", str(copied)]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert re.search(
        r"prepared cannot be written: prepared weights of q8 take more than [\d,]+ bytes, [\d,]+ are free", sentence
    )
    assert not list(copied.glob("prepared*"))
    overwritten_graph(copied)
    assert main(["prepare", str(copied)]) == 1
    assert "model_quantized.onnx cannot be loaded by onnxruntime" in capsys.readouterr().err


def test_float_weights_need_no_preparation(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = json.loads((copied / "splitlora.json").read_text())
    change_manifest(copied, precisions={"fp32": manifest["precisions"]["fp32"]})
    assert main(["prepare", str(copied)]) == 1
    assert "neither q8 nor q4" in capsys.readouterr().err
    assert not (copied / "prepared").exists()


# Adapters and parts


def make_adapter(folder: Path, model: Path, *, seed: int, **settings: Any) -> Path:
    """A PEFT folder whose adapter changes what is said."""
    lora = LoraConfig(**{"rank": 4, "alpha": 32.0, "targets": ("c_attn",), **settings})
    config = PretrainedModel(model).config
    adapter = initial_adapter(config, lora, seed)
    generator = torch.Generator().manual_seed(seed)
    for name in adapter:
        if ".lora_B." in name:
            adapter[name].normal_(generator=generator)
    save_adapter(folder, adapter, config, lora, str(model))
    return folder


def test_adapter_that_is_put_in_says_what_the_merged_model_says(tiny_model: Path, tmp_path: Path) -> None:
    texts, files = [], []
    for seed in (1, 2):
        adapter = make_adapter(tmp_path / f"adapter-{seed}", tiny_model, seed=seed)
        export_onnx(str(tiny_model), tmp_path / f"merged-{seed}", adapter=adapter, precisions=("fp32",))
        export_onnx(str(tiny_model), tmp_path / f"kept-{seed}", adapter=adapter, precisions=("fp32",), keep_adapter=True)
        texts.append(Generator(tmp_path / f"merged-{seed}").text("The Wrestlers is"))
        files.append(tmp_path / f"kept-{seed}/adapter.onnx_adapter")
    generator = Generator(tmp_path / "kept-1")
    assert generator.text("The Wrestlers is") == texts[0] != texts[1]
    generator.use_adapter(files[1])
    assert generator.text("The Wrestlers is") == texts[1]
    generator.use_adapter(files[0])
    assert generator.text("The Wrestlers is") == texts[0]


def test_command_takes_another_adapter(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (1, 2):
        adapter = make_adapter(tmp_path / f"adapter-{seed}", tiny_model, seed=seed)
        export_onnx(str(tiny_model), tmp_path / f"kept-{seed}", adapter=adapter, precisions=("q8",), keep_adapter=True)
    file = tmp_path / "kept-2/adapter.onnx_adapter"
    assert main(["prepare", str(tmp_path / "kept-1")]) == 0
    assert main(["generate", str(tmp_path / "kept-1"), "--prompt", "The Wrestlers is", "--adapter", str(file)]) == 0
    assert capsys.readouterr().out == Generator(tmp_path / "kept-2").text("The Wrestlers is") + "\n"


def test_adapter_that_does_not_fit_is_refused_and_leaves_the_other_in(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "wide").mkdir()
    wide = make_model(tmp_path / "wide", n_embd=64)
    folders = {}
    for name, model, settings in (
        ("first", tiny_model, {}),
        ("other-targets", tiny_model, {"targets": ("c_attn", "c_fc")}),
        ("other-model", wide, {}),
    ):
        adapter = make_adapter(tmp_path / f"adapter-{name}", model, seed=1, **settings)
        folders[name] = tmp_path / name
        export_onnx(str(model), folders[name], adapter=adapter, precisions=("fp32",), keep_adapter=True)
    nonsense = tmp_path / "nonsense.onnx_adapter"
    nonsense.write_bytes(b"nonsense" * 100)
    generator = Generator(folders["first"])
    text = generator.text("The Wrestlers is")
    for path, sentence in (
        (folders["other-targets"] / "adapter.onnx_adapter", "for which these graphs have no room"),
        (folders["other-model"] / "adapter.onnx_adapter", "is an adapter for another base model"),
        (nonsense, "is not an adapter that onnxruntime can read"),
        (tmp_path / "missing.onnx_adapter", "no adapter file at"),
    ):
        with pytest.raises(ExportedModelError, match=sentence):
            generator.use_adapter(path)
        assert generator.text("The Wrestlers is") == text


@pytest.fixture(scope="session")
def kept(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, with an adapter that can be exchanged."""
    folder = tmp_path_factory.mktemp("kept")
    adapter = make_adapter(folder / "adapter", tiny_model, seed=1)
    export_onnx(str(tiny_model), folder / "model", adapter=adapter, precisions=("fp32", "fp16"), keep_adapter=True)
    return folder / "model"


Matrices = dict[str, np.ndarray[Any, Any]]


def changed_adapter(kept: Path, file: Path, change: Callable[[Matrices], Matrices], version: int | None = None) -> Path:
    """A file with what the folder's own adapter becomes by a change; it may also be said to be for another model."""
    own = onnxruntime.AdapterFormat.read_adapter(str(kept / "adapter.onnx_adapter"))
    matrices = change({name: np.array(value.numpy()) for name, value in own.get_parameters().items()})
    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(own.get_adapter_version())
    adapter.set_model_version(own.get_model_version() if version is None else version)
    adapter.set_parameters({name: onnxruntime.OrtValue.ortvalue_from_numpy(matrix) for name, matrix in matrices.items()})
    adapter.export_adapter(str(file))
    return file


A, B = (f"h.2.attn.c_attn.lora_{matrix}.weight" for matrix in "AB")


def converted(dtype: type[np.generic]) -> Callable[[Matrices], Matrices]:
    return lambda matrices: matrices | {B: matrices[B].astype(dtype)}


def without(name: str) -> Callable[[Matrices], Matrices]:
    return lambda matrices: {key: matrix for key, matrix in matrices.items() if key != name}


def multiplied(factor: float) -> Callable[[Matrices], Matrices]:
    return lambda matrices: matrices | {A: matrices[A] * np.float32(factor)}


def with_a_value(value: float) -> Callable[[Matrices], Matrices]:
    return lambda matrices: matrices | {A: np.full_like(matrices[A], value)}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (converted(np.float16), f"holds {B} as tensor(float16), and the graph takes tensor(float)"),
        (converted(np.float64), f"holds {B} as tensor(double), and the graph takes tensor(float)"),
        (without(A), f"has {B} without {A}"),
        (without(B), f"has {A} without {B}"),
        (lambda matrices: matrices | {B: matrices[B][:3]}, "has h.2.attn.c_attn.rank "),
        (lambda matrices: matrices | {A: matrices[A][:, :0], B: matrices[B][:0]}, "does not fit"),
        (lambda matrices: matrices | {A: matrices[A][:5]}, "does not fit [32, "),
        (
            lambda matrices: matrices | {"x\n\x1b[2J": matrices[A]},
            r'adapts "x\n\u001b[2J", for which these graphs have no room',
        ),
        (lambda _: {}, "has no matrices"),
        (with_a_value(np.nan), f"{A} has values that are not finite numbers"),
        (with_a_value(-np.inf), f"{A} has values that are not finite numbers"),
    ],
)
def test_adapter_that_cannot_be_computed_is_refused_and_leaves_the_other_in(
    kept: Path, tmp_path: Path, change: Callable[[Matrices], Matrices], sentence: str
) -> None:
    file = changed_adapter(kept, tmp_path / "changed.onnx_adapter", change)
    generator = Generator(kept, precision="fp32")
    text = generator.text("The Wrestlers is")
    with pytest.raises(ExportedModelError) as caught:
        generator.use_adapter(file)
    assert str(caught.value).startswith(str(file))
    assert sentence in str(caught.value)
    assert "export" in str(caught.value)
    assert generator.text("The Wrestlers is") == text


def test_adapter_of_fewer_layers_and_of_other_ranks_is_used(kept: Path, tmp_path: Path) -> None:
    def change(matrices: Matrices) -> Matrices:
        rest = {name: matrix for name, matrix in matrices.items() if not name.startswith("h.0.")}
        return rest | {A: np.repeat(matrices[A], 2, axis=1), B: np.repeat(matrices[B], 2, axis=0)}

    generator = Generator(kept, precision="fp32")
    text = generator.text("The Wrestlers is")
    generator.use_adapter(changed_adapter(kept, tmp_path / "changed.onnx_adapter", change))
    assert generator.text("The Wrestlers is") != text


def test_adapter_for_another_model_of_the_same_shape_is_refused(kept: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = make_model(tmp_path / "other", seed=3)
    adapter = make_adapter(tmp_path / "adapter", other, seed=1)
    export_onnx(str(other), tmp_path / "out", adapter=adapter, precisions=("fp32",), keep_adapter=True)
    generator = Generator(kept, precision="fp32")
    text = generator.text("The Wrestlers is")
    found, wanted = (json.loads((folder / "splitlora.json").read_text())["base"] for folder in (tmp_path / "out", kept))
    with pytest.raises(ExportedModelError) as caught:
        generator.use_adapter(tmp_path / "out/adapter.onnx_adapter")
    assert "adapter.onnx_adapter is an adapter for another base model" in str(caught.value)
    for base in (found, wanted):
        assert f"with {base['fingerprint'][:7]}" in str(caught.value)
    assert generator.text("The Wrestlers is") == text


def test_adapter_of_a_version_that_named_no_model_is_used(kept: Path, tmp_path: Path) -> None:
    file = changed_adapter(kept, tmp_path / "old.onnx_adapter", dict, version=1)
    text = Generator(kept, precision="fp32", adapter=file).text("The Wrestlers is")
    assert text == Generator(kept, precision="fp32").text("The Wrestlers is")
    with pytest.raises(ExportedModelError, match="another base model"):
        Generator(kept, precision="fp32", adapter=changed_adapter(kept, tmp_path / "no.onnx_adapter", dict, version=2))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_two_parts_say_what_the_whole_says(tiny_model: Path, tmp_path: Path, attention: str) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    export_onnx(str(tiny_model), whole, precisions=("fp32", "q8"), attention=attention)
    export_onnx(str(tiny_model), parts, precisions=("fp32", "q8"), attention=attention, split=1)
    assert len(open_exported(parts).precisions["fp32"].graphs) == 2
    for precision in ("fp32", "q8"):
        expected = Generator(whole, precision=precision).text("The Wrestlers is")
        assert Generator(parts, precision=precision).text("The Wrestlers is") == expected
    assert main(["prepare", str(parts)]) == 0
    generator = Generator(parts, precision="q8")
    assert generator.preparation == "prepared"
    assert generator.text("The Wrestlers is") == expected


# Faults


def no_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def no_manifest(folder: Path) -> None:
    (folder / "splitlora.json").unlink()


def broken_manifest(folder: Path) -> None:
    (folder / "splitlora.json").write_text('{"format": 1, "kind"')


def list_for_a_manifest(folder: Path) -> None:
    (folder / "splitlora.json").write_text("[]")


def later_format(folder: Path) -> None:
    change_manifest(folder, format=2)


def other_kind(folder: Path) -> None:
    change_manifest(folder, kind="image classifier")


def no_context(folder: Path) -> None:
    path = folder / "splitlora.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "context"}))


def nonsense_for_a_number(folder: Path) -> None:
    change_manifest(folder, context="long")


def path_outside(folder: Path) -> None:
    graph = "../outside.onnx"
    change_manifest(folder, precisions={"q8": {"graph": graph, "bytes": {graph: 1}}})


def graph_elsewhere(folder: Path) -> None:
    move_out(folder / "onnx/model_quantized.onnx")


def tokenizer_elsewhere(folder: Path) -> None:
    move_out(folder / "tokenizer.json")


def no_graph(folder: Path) -> None:
    (folder / "onnx/model_quantized.onnx").unlink()


def half_copied(folder: Path) -> None:
    path = folder / "onnx/model_quantized.onnx_data"
    path.write_bytes(path.read_bytes()[:-1])


def overwritten_graph(folder: Path) -> None:
    path = folder / "onnx/model_quantized.onnx"
    path.write_bytes(b"\xff" * path.stat().st_size)


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def tokenizer_that_fails_on_a_text(folder: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="nowhere"))
    (folder / "tokenizer.json").write_text(tokenizer.to_str())


def other_tokenizer(folder: Path) -> None:
    change_manifest(folder, vocabulary_size=20)


def kind_that_is_a_list(folder: Path) -> None:
    change_manifest(folder, kind=[1])


def adapter_with_an_endless_name(folder: Path) -> None:
    change_manifest(folder, adapter="x" * 5000)


def graph_with_an_endless_name(folder: Path) -> None:
    change_manifest(folder, precisions={"q8": {"graph": "x" * 5000, "bytes": {"x" * 5000: 1}}})


def names_that_are_no_text(folder: Path) -> None:
    path = folder / "onnx/model_quantized.onnx"
    path.write_bytes(path.read_bytes().replace(b"past_key_values.0.key", b"past_key_values.0.k\xff\xff"))


def no_precisions(folder: Path) -> None:
    change_manifest(folder, precisions={})


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (no_folder, "no folder at"),
        (no_manifest, "is not an exported model: no splitlora.json"),
        (broken_manifest, "cannot be read"),
        (list_for_a_manifest, "splitlora.json is not a JSON object but []"),
        (later_format, "has format 2; this splitlora reads format 1"),
        (other_kind, 'is of the kind "image classifier"'),
        (no_context, '"context" is missing'),
        (nonsense_for_a_number, 'splitlora.json: context is "long"; a whole number is expected'),
        (path_outside, '"../outside.onnx" is outside the folder'),
        (graph_elsewhere, "model_quantized.onnx leads out of its folder by a link"),
        (tokenizer_elsewhere, "tokenizer.json leads out of its folder by a link"),
        (lambda folder: change_manifest(folder, end_token=10**20), "end_token, vocabulary_size and context cannot be 1000"),
        (lambda folder: change_manifest(folder, context=-1), "end_token, vocabulary_size and context cannot be 0, 600 and -1"),
        (no_graph, "model_quantized.onnx is missing: the folder is incomplete"),
        (half_copied, "model_quantized.onnx_data has"),
        (overwritten_graph, "model_quantized.onnx cannot be loaded by onnxruntime"),
        (no_tokenizer, "tokenizer.json is missing: the folder is incomplete"),
        (broken_tokenizer, "tokenizer.json cannot be read"),
        (tokenizer_that_fails_on_a_text, "the tokenizer cannot be used: "),
        (other_tokenizer, "the tokenizer is of another model"),
        (no_precisions, "has no precision that is known here"),
        (kind_that_is_a_list, "is of the kind [1]"),
        (adapter_with_an_endless_name, "has its adapter merged"),
        (graph_with_an_endless_name, "xxx is missing: the folder is incomplete"),
        (names_that_are_no_text, "the graph is not one of a language model: 'utf-8' codec can't decode"),
        (lambda folder: foreign_graph(folder, "q8", "onnx/model_quantized.onnx"), "the model cannot be computed: "),
    ],
)
def test_unusable_folder_is_one_sentence(
    copied: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], None], sentence: str
) -> None:
    spoil(copied)
    assert main(["generate", str(copied), "--prompt", "The Wrestlers is"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert sentence in said.err.splitlines()[-1]
    assert "Traceback" not in said.err


def test_overflow_names_the_precision_and_another_one(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every weight fits half precision, and the logits do not: the first token of all would seem the most likely, always."""
    model = GPT2LMHeadModel.from_pretrained(tiny_model)
    model.transformer.ln_f.weight.data[:] = 6e4
    model.transformer.wte.weight.data *= 10
    model.save_pretrained(tmp_path / "large")
    shutil.copy(tiny_model / "tokenizer.json", tmp_path / "large")
    export_onnx(str(tmp_path / "large"), tmp_path / "out", precisions=["fp32", "fp16"])
    assert main(["generate", str(tmp_path / "out"), "--prompt", "The", "--precision", "fp16"]) == 1
    assert "out computes no numbers in fp16, which they overflow: try --precision fp32" in capsys.readouterr().err
    assert main(["generate", str(tmp_path / "out"), "--prompt", "The", "--precision", "fp32"]) == 0
    assert export_main(["verify", str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    assert re.search(r"fp16 .* nan .* BEYOND TOLERANCE|fp16 .* inf .* BEYOND TOLERANCE", said.out)
    assert "out computes no numbers in fp16, which they overflow: use another precision" in said.err
    model.transformer.ln_f.bias.data[3] = 7e4
    model.save_pretrained(tmp_path / "large")
    assert (
        export_main(["onnx", "--model", str(tmp_path / "large"), "--output", str(tmp_path / "no"), "--precision", "fp16"]) == 1
    )
    assert "ln_f.bias has values too large for fp16; leave fp16 out of --precision" in capsys.readouterr().err


def test_adapter_that_overflows_float32_is_named(kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = changed_adapter(kept, tmp_path / "huge.onnx_adapter", multiplied(1e38))
    assert main(["generate", str(kept), "--prompt", "The", "--precision", "fp32", "--adapter", str(file)]) == 1
    said = capsys.readouterr().err
    assert f"model computes no numbers in fp32: the model or the adapter {file} is broken; export it again" in said


def test_overflow_where_half_precision_is_all_there_is_asks_for_another_export(
    kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(kept, tmp_path / "half"))
    change_manifest(folder, precisions={"fp16": json.loads((folder / "splitlora.json").read_text())["precisions"]["fp16"]})
    file = changed_adapter(kept, tmp_path / "large.onnx_adapter", multiplied(1e6))
    assert main(["generate", str(folder), "--prompt", "The", "--adapter", str(file)]) == 1
    assert "computes no numbers in fp16, which they overflow: export it with --precision fp32" in capsys.readouterr().err


@pytest.mark.parametrize(("precision", "weights"), [("fp32", "model.onnx_data"), ("q8", "model_quantized.onnx_data")])
def test_broken_weights_are_not_called_an_overflow(
    copied: Path, capsys: pytest.CaptureFixture[str], precision: str, weights: str
) -> None:
    """What q8 and q4 quantise is weights: they compute in float32, and no precision has larger numbers."""
    file = copied / "onnx" / weights
    file.write_bytes(b"\xff" * file.stat().st_size)  # as float32, no numbers
    assert main(["generate", str(copied), "--prompt", "The", "--precision", precision]) == 1
    said = capsys.readouterr().err
    assert f"model computes no numbers in {precision}: the model is broken; export it again" in said
    assert export_main(["verify", str(copied)]) == 1
    assert f"model computes no numbers in {precision}: its files are broken; export it again" in capsys.readouterr().err


def test_precision_that_was_not_exported_is_named(exported: Path) -> None:
    with pytest.raises(ExportedModelError, match="was exported without fp16; there is fp32, q8, q4"):
        Generator(exported, precision="fp16")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--temperature", "-1"], "temperature must be 0 or more, got -1.0"),
        (["--temperature", "nan"], "temperature must be 0 or more, got nan"),
        (["--top-p", "0"], "top-p must be above 0 and at most 1, got 0.0"),
        (["--top-p", "1.5"], "top-p must be above 0 and at most 1, got 1.5"),
        (["--seed", "-3"], "seed must be 0 or more, got -3"),
        (["--max-new-tokens", "0"], "max-new-tokens must be at least 1, got 0"),
        (["--prompt", "x " * 300], "the prompt has"),
        (["--prompt", "half \udce9"], "the prompt is not UTF-8"),
        (["--adapter", "missing.onnx_adapter"], "has its adapter merged"),
    ],
)
def test_unusable_setting_is_one_sentence(
    exported: Path, capsys: pytest.CaptureFixture[str], flags: list[str], sentence: str
) -> None:
    assert main(["generate", str(exported), "--prompt", "The", *flags]) == 1
    assert sentence in capsys.readouterr().err.splitlines()[-1]


def test_setting_is_refused_when_it_is_given_and_not_at_the_first_token() -> None:
    with pytest.raises(GenerationError, match="top-p"):
        Sampling(top_p=2.0)
