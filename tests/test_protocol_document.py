"""PROTOCOL.md says what the code does."""

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgpack
import numpy as np
import onnx
import pytest
import torch
from family_models import gpt2_config
from protocol_samples import SAMPLES, SETTINGS, assert_same, inflate
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import protocol
from edge_client.data import Dataset, Sample
from edge_client.token_file import Samples
from gpu_server.federation import CodecPolicy
from graphs import Adaptation
from graphs.part import write_graphs
from protocol import (
    CODECS,
    DELTA,
    EXACT,
    HANDING_OVER_BYTES,
    HANDSHAKE_BYTES,
    PROTOCOL_VERSION,
    TRANSITIONS,
    ActivationGradient,
    Activations,
    Array,
    Message,
    RunSettings,
    Seconds,
    Side,
    State,
    decode,
    delta,
    encode,
    gradient_codec,
)
from protocol.codecs import Coded
from protocol.encoding import MAX_ELEMENTS, MAX_TENSOR_ELEMENTS, MAX_TEXT
from protocol.invitation import FORM
from protocol.rounding import from_bfloat16, to_bfloat16
from protocol.settings import ABILITIES, BOUNDS, COARSE, OFFERED
from protocol.shuffling import unshuffled
from split_model import LoraConfig, ModelConfig, PretrainedModel, adapted_layers
from split_model.families import FAMILIES
from split_model.optimisation import OptimiserConfig, adamw, take_step
from split_model.rotary import Rotary
from storage import EDGE_WEIGHTS, GRAPH_FILES, HEAD_GRAPH_FILES, HEAD_WEIGHTS, PART_FILE, PartDescription
from storage.tokenizer import tokenizer_digest

DOCUMENT = (Path(__file__).parent.parent / "PROTOCOL.md").read_text(encoding="utf-8")
KINDS = {kind.__name__: kind for kind in get_args(Message)}
WORDS: dict[Any, str] = {
    int: "integer",
    float: "number",
    str: "text",
    bytes: "bytes",
    tuple[str, ...]: "list of texts",
    tuple[protocol.PartFile, ...]: "list of PartFiles",
    int | None: "integer or nil",
    protocol.messages.Floats: "floats",
    protocol.messages.CodedFloats: "coded floats",
    protocol.messages.Integers: "integers",
    protocol.messages.CodedFloats | None: "coded floats or nil",
    protocol.messages.Integers | None: "integers or nil",
    protocol.Seconds: "Seconds",
    protocol.Tensors: "map of floats",
    protocol.messages.CodedTensors: "map of coded floats",
    RunSettings: "RunSettings",
}

every_kind = pytest.mark.parametrize("kind", KINDS)


def tables(text: str, *header: str) -> list[list[list[str]]]:
    """The rows of every table with this header."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        first, _, *rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in block.splitlines()]
        if first == list(header):
            found.append(rows)
    return found


def section(kind: str) -> str:
    """What stands under the heading of a message."""
    _, _, rest = DOCUMENT.partition(f"\n### {kind}\n")
    assert rest, f"PROTOCOL.md has no section on {kind}"
    return re.split(r"^##", rest, maxsplit=1, flags=re.MULTILINE)[0]


def documented_fields(rows: list[list[str]]) -> dict[str, str]:
    return {name.strip("`"): kind for name, kind, _ in rows}


def actual_fields(kind: type) -> dict[str, str]:
    types = get_type_hints(kind, include_extras=True)
    return {field.name: WORDS[types[field.name]] for field in dataclasses.fields(kind)}


def test_it_is_about_this_version() -> None:
    assert DOCUMENT.startswith(f"# The splitlora protocol, version {PROTOCOL_VERSION}\n")


def test_its_table_of_the_conversation_is_the_programs() -> None:
    (rows,) = tables(DOCUMENT, "state", "sender", "message", "next state")
    documented: dict[tuple[State, Side, type], State] = {}
    for state, sender, message, next_state in rows:
        states = [other for other in State if other is not State.CLOSED] if state == "any but closed" else [State(state)]
        for each in states:
            assert (each, Side(sender), KINDS[message]) not in documented
            documented[each, Side(sender), KINDS[message]] = State(next_state)
    assert documented == TRANSITIONS


def test_it_has_a_section_on_every_message_in_the_programs_order() -> None:
    headings = re.findall(r"^### (\w+)$", DOCUMENT.partition("\n## Messages\n")[2], re.MULTILINE)
    assert headings == list(KINDS)


@every_kind
def test_it_lists_the_fields_of_a_message_and_their_types_in_order(kind: str) -> None:
    rows, *_ = [*tables(section(kind), "field", "type", "meaning"), []]
    assert list(documented_fields(rows).items()) == list(actual_fields(KINDS[kind]).items())


def test_it_lists_the_settings_of_a_run_and_their_types_in_order() -> None:
    _, rows = tables(section("Welcome"), "field", "type", "meaning")
    assert list(documented_fields(rows).items()) == list(actual_fields(RunSettings).items())


def test_it_lists_what_a_part_says_of_a_file_in_order() -> None:
    _, rows = tables(section("Part"), "field", "type", "meaning")
    assert list(documented_fields(rows).items()) == list(actual_fields(protocol.PartFile).items())


def test_it_lists_the_parts_of_a_clients_time_in_order() -> None:
    (rows,) = tables(section("Activations"), "part", "type", "meaning")
    assert list(documented_fields(rows).items()) == list(actual_fields(protocol.Seconds).items())


def test_it_names_the_defaults_of_fields_that_may_be_absent() -> None:
    _, settings = tables(section("Welcome"), "field", "type", "meaning")
    described = [(RunSettings, settings)]
    described += [(kind, ([*tables(section(name), "field", "type", "meaning"), []])[0]) for name, kind in KINDS.items()]
    for owner, rows in described:
        documented = {name.strip("`"): meaning.rpartition("default ")[2] for name, _, meaning in rows if "default " in meaning}
        defaults = {field.name: field.default for field in dataclasses.fields(owner)}
        actual = {name: default for name, default in defaults.items() if default is not dataclasses.MISSING}
        assert documented == {name: in_words(default) for name, default in actual.items()}, owner


def in_words(default: Any) -> str:
    return "nil" if default is None else f"{default:g}" if isinstance(default, int | float) else default or "empty"


def test_its_invitation_is_the_programs() -> None:
    assert f"\n    {FORM}\n" in DOCUMENT


@every_kind
def test_it_names_the_sender_of_a_message(kind: str) -> None:
    (side,) = {side for _, side, message in TRANSITIONS if message is KINDS[kind]}
    assert section(kind).lstrip().startswith(f"{side.value.capitalize()} to {side.peer.value}")


def test_every_type_of_a_field_is_explained() -> None:
    (rows,) = tables(DOCUMENT, "type", "in msgpack")
    assert sorted(name for name, _ in rows) == sorted(WORDS.values())


def test_it_names_the_limits() -> None:
    (rows,) = tables(DOCUMENT, "what", "limit")
    limits = [cell.removesuffix(" bytes") for _, cell in rows]
    before_start = [f"{HANDSHAKE_BYTES:,}", f"{HANDING_OVER_BYTES:,}"]
    assert limits == [*before_start, "see below", f"{MAX_ELEMENTS:,}", f"{MAX_TENSOR_ELEMENTS}", f"{MAX_TEXT:,}"]


def test_its_example_of_a_tensor_is_what_is_sent() -> None:
    ((plain, shuffled),) = re.findall(r"have the bytes `([0-9 ]+)`, and travel as `([0-9 ]+)`", DOCUMENT)
    batch = dataclasses.replace(
        SAMPLES["Activations"], labels=np.array([1, 258], np.int32), label_counts=np.array([1, 1], np.int32)
    )
    assert bytes.fromhex(plain) == batch.labels.tobytes()
    assert msgpack.packb(["int32", [2], bytes.fromhex(shuffled)]) in inflate(encode(batch))


def test_its_example_of_codes_is_what_is_sent() -> None:
    example = (
        r"the rows ([-0-9, ]+) and ([-0-9, ]+) have centres of 0, and in `coarse` the scale (\d+) and the codes `([0-9a-f ]+)`"
    )
    ((*rows, scale, codes),) = re.findall(example, DOCUMENT)
    values = np.array([[int(number) for number in row.split(",")] for row in rows], np.float32)
    *_, scales, found = Coded.of(values, COARSE).parts
    assert from_bfloat16(unshuffled(scales, np.dtype(np.uint16), (2,))).tolist() == [int(scale)] * 2
    assert found == bytes.fromhex(codes)


def test_it_names_the_codecs() -> None:
    (rows,) = tables(DOCUMENT, "codec", "parts")
    assert [name for cell, _ in rows for name in re.findall(r"`(\w+)`", cell)] == list(OFFERED)
    matrix = np.ones((2, 3), np.float32)
    for codec, row in zip(CODECS, (rows[0], rows[1], rows[1]), strict=True):
        assert len(Coded.of(matrix, codec).parts) == len(row[1].split(","))
    assert len(Coded.dithered(matrix, 1.0).parts) == len(rows[3][1].partition(";")[0].split(","))


def test_it_names_no_message_that_does_not_exist() -> None:
    named = set(re.findall(r"`([A-Z][A-Za-z]+)`", DOCUMENT))
    assert named <= {*KINDS, "PartFile", "RunSettings", "Seconds"}


def test_it_names_the_bounds_of_every_number_of_the_settings() -> None:
    (rows,) = tables(DOCUMENT, "setting", "at least", "at most")
    documented = {name.strip("`"): (float(least), float(most.partition(",")[0])) for name, least, most in rows}
    assert documented == BOUNDS
    order = [field.name for field in dataclasses.fields(RunSettings)]
    assert list(documented) == sorted(documented, key=order.index)
    numbers = {name for name, kind in actual_fields(RunSettings).items() if kind in ("integer", "number", "integer or nil")}
    assert set(documented) == numbers


def test_it_names_the_codecs_that_a_client_has_to_offer() -> None:
    (rows,) = tables(DOCUMENT, "`activation_codec`", "to be offered")
    documented = {cell.strip("`"): set(re.findall(r"`(\w+)`", offered.partition(";")[0])) for cell, offered in rows}
    for codec in (EXACT, *CODECS, DELTA):
        settings = dataclasses.replace(SETTINGS, activation_codec=codec, gradient_codec=gradient_codec(codec))
        assert documented.pop(codec) == (settings.codecs() | CodecPolicy(codec, 0.01).may_use()) - {EXACT}
    assert not documented


NEEDY: dict[str, Any] = {
    "lr_schedule": "cosine",
    "warmup_ratio": 0.5,
    "early_stopping_patience": 1,
    "final_adapter": "best",
    "label_smoothing": 0.5,
    "edge_adapter": "none",
}
"""Values that need an ability, of settings whose 1 does not or cannot be."""


def test_it_names_the_abilities_and_the_settings_that_need_them() -> None:
    (rows,) = tables(DOCUMENT, "ability", "a client that says it", "needed where")
    assert tuple(ability.strip("`") for ability, _, _ in rows) == ABILITIES
    for ability, _, where in rows:
        for name in re.findall(r"`(\w+)`", where.partition(" is ")[0].replace("one of", "")):
            changes: dict[str, Any] = {"labels": "device", "check_codec_every": 0, "warmup_steps": 0, "aggregate_every": 1}
            if name != "labels":
                changes |= {f"{kind}_clip": 1.0 for kind in ("activation", "gradient") if name == f"{kind}_noise"}
                changes |= {name: NEEDY.get(name, 1.0)}
            assert dataclasses.replace(SETTINGS, **changes).abilities() == {"device-labels", ability.strip("`")}, name
    assert SETTINGS.abilities() == set()


# The files of a part


def test_it_names_the_files_of_a_part() -> None:
    (rows,) = tables(DOCUMENT, "file", "holds")
    named = [name for cell, _ in rows for name in re.findall(r"`([\w.-]+)`", cell)]
    assert named == [
        PART_FILE,
        *GRAPH_FILES,
        *HEAD_GRAPH_FILES,
        "embedding.safetensors",
        "block-0.safetensors",
        "block-1.safetensors",
        "cut_layer",
        HEAD_WEIGHTS,
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    ]


def test_it_names_what_describes_a_part() -> None:
    (rows,) = tables(DOCUMENT, "member", "value")[1:]
    named = [name for cell, _ in rows for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(named) == sorted(field.name for field in dataclasses.fields(PartDescription))
    assert set(re.findall(r"`(\w+)`", dict(rows)["`weights`"])) == set(EDGE_WEIGHTS)


SHAPE = {
    "vocabulary_size": 3,
    "num_layers": 2,
    "width": 4,
    "num_heads": 2,
    "inner_width": 16,
    "num_positions": 4,
    "end_token": 2,
}


def options_of(config: ModelConfig) -> ModelConfig:
    """The same model with every option that graphs have inputs for."""
    rotary = Rotary(width=2, base=1e4)
    return dataclasses.replace(config, family=FAMILIES["qwen3"], rotary=rotary, is_gated=True, norm="rms", windows=(2, None))


@pytest.mark.parametrize("config", [gpt2_config(**SHAPE), options_of(gpt2_config(**SHAPE))], ids=["gpt2", "options"])
@pytest.mark.parametrize("weights", EDGE_WEIGHTS)
def test_it_names_what_goes_into_the_graphs_of_a_part_and_what_comes_out(
    tmp_path: Path, weights: str, config: ModelConfig
) -> None:
    layers = adapted_layers(config, LoraConfig(rank=1, alpha=1.0, dropout=0.5, targets=config.lora_targets))
    write_graphs(tmp_path, config, Adaptation(layers=layers, rank=1, alpha=1.0, dropout=0.5), weights, with_head=True)
    graphs = [onnx.load(tmp_path / name) for name in (*GRAPH_FILES, *HEAD_GRAPH_FILES)]
    for what, values in (
        ("input", [graph.graph.input for graph in graphs]),
        ("output", [graph.graph.output for graph in graphs]),
    ):
        (rows,) = tables(DOCUMENT, what, "type", "holds")
        documented = {
            name.replace("NAME", r"[\w.]+").replace("LAYER", r"[\w.]+"): kind
            for cell, kind, _ in rows
            for name in re.findall(r"`([\w:.]+)`", cell)
        }
        used = set()
        for value in itertools.chain(*values):
            (pattern,) = [pattern for pattern in documented if re.fullmatch(pattern, value.name)]
            used.add(pattern)
            dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name
            if documented[pattern].startswith("as it"):
                assert dtype in ("float32", weights)
            else:
                assert documented[pattern].partition(" ")[0] == dtype
        assert used == documented.keys()
    for graph in graphs:
        assert [(opset.domain, opset.version) for opset in graph.opset_import] == [("", 20)]
        assert graph.ir_version == 9
        constants = [onnx.numpy_helper.to_array(tensor).nbytes for tensor in graph.graph.initializer]
        assert max(constants, default=0) <= 1024


# Test vectors


def vectors(heading: str) -> list[bytes]:
    """The indented blocks of hexadecimal under a bold heading of the last section."""
    _, _, rest = DOCUMENT.partition("\n## Test vectors\n")[2].partition(f"\n**{heading}")
    assert rest, heading
    blocks = re.findall(r"(?:^    [0-9a-f]+\n)+", rest.partition("\n**")[0], re.MULTILINE)
    return [bytes.fromhex("".join(block.split())) for block in blocks]


def floats(*rows: tuple[float, ...]) -> Array:
    return np.array(rows, np.float32)


def integers(*values: int) -> Array:
    return np.array(values, np.int32)


MESSAGES: dict[str, Message] = {
    "From the client:": Activations(
        step=3,
        micro_batch=1,
        seconds=Seconds(edge_compute=0.5),
        lengths=integers(2, 1),
        label_counts=integers(1, 1),
        labels=integers(5, 258),
        values=floats((0.5, -2), (1, 0.25), (-0.75, 3)),
    ),
    "From the server:": ActivationGradient(
        step=3, micro_batch=1, loss=2.5, labelled_tokens=2, values=floats((0.125, 0), (-1, 2), (0.5, -0.25))
    ),
}


@pytest.mark.parametrize("heading", MESSAGES)
def test_its_vectors_of_messages_are_what_is_sent_and_understood(heading: str) -> None:
    inflated, frame = vectors(heading)
    assert inflate(frame) == inflated == inflate(encode(MESSAGES[heading]))
    assert_same(decode(frame, HANDSHAKE_BYTES), MESSAGES[heading])


def test_its_vector_of_int8_decodes_to_what_it_says() -> None:
    (payload,) = vectors("A tensor in `int8`,")
    coded = Coded.received(msgpack.unpackb(payload), HANDSHAKE_BYTES)
    assert_same(coded.decode(), floats((2, -2, 99.5), (255, -254, -100.5)))


class OneVersion:
    """A side that keeps one version of one sample."""

    is_full, newest = False, 2

    def version(self, sample: int, step: int) -> Array | None:
        kept = floats((1, 0, 2), (0, 1, -1), (2, 2, 0), (0, 0, 1))
        return to_bfloat16(kept) if (sample, step) == (4, 2) else None

    def store(self, step: int, micro_batch: int, versions: dict[int, Any]) -> None:
        self.kept = {sample: since for sample, (since, _) in versions.items()}


def test_its_vector_of_dithered_decodes_to_what_it_says() -> None:
    (payload,) = vectors("A tensor in `dithered`,")
    coded = Coded.received(msgpack.unpackb(payload), HANDSHAKE_BYTES)
    assert_same(
        coded.decode(), floats((0.4521484375, 3.6123046875), (0.1083984375, -4.6845703125), (-0.7998046875, 14.9892578125))
    )


def test_its_vector_of_delta_decodes_to_what_it_says() -> None:
    (payload,) = vectors("A tensor in `delta`,")
    coded: Any = Coded.received(msgpack.unpackb(payload), HANDSHAKE_BYTES)
    batch = {"lengths": integers(4, 1), "label_counts": integers(0, 0), "labels": integers(), "samples": integers(4, 6)}
    side: Any = OneVersion()
    arrived = delta.arrived(Activations(step=9, seconds=Seconds(), values=coded, **batch), side)
    changed = floats((1.5, -0.5, 2.25), (1, 0, -0.5), (1.5, 2.5, -0.25), (1.5, -1.5, 1.75))
    assert_same(arrived.values, np.concatenate([changed, floats((1, -2, 31.75))]))
    assert side.kept == {4: 2, 6: 0}


def json_under(heading: str) -> tuple[str, str]:
    """The indented lines of JSON under a bold heading as one line, and what follows the heading."""
    text = DOCUMENT.partition(f"\n**{heading}**")[2].partition("\n**")[0]
    return " ".join(re.findall(r"^    (.*)$", text, re.MULTILINE)), text


def fingerprint_of(folder: Path, config: ModelConfig) -> str:
    """Of a model whose elements are as the document says, with its example of a tokenizer."""
    tensors = {
        name: (np.arange(np.prod(shape)) / 8).astype(np.float32).reshape(shape) for name, shape in config.tensor_shapes.items()
    }
    save_file(tensors, folder / "model.safetensors")
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "Ġb": 1, "aĠb": 2}, merges=[("a", "Ġb")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return PretrainedModel(folder).fingerprint()


def test_its_vector_of_a_fingerprint_is_that_of_such_a_model(tmp_path: Path) -> None:
    form, text = json_under("A fingerprint")
    (digits,) = re.findall(r"over the model begins with `([0-9a-f]{32})`", text)
    config = gpt2_config(**json.loads(form))
    assert form == json.dumps(config.identity(), sort_keys=True)
    names = {"num_layers": "n_layer", "width": "n_embd", "num_heads": "n_head", "num_positions": "n_positions"}
    stored = {names[name]: value for name, value in config.identity().items() if name in names}
    stored |= {"vocab_size": config.vocabulary_size, "eos_token_id": config.end_token, "n_inner": None}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "layer_norm_epsilon": 1e-5, **stored}))
    fingerprint = fingerprint_of(tmp_path, config)
    assert fingerprint[:16] == digits[:16]
    assert f"the fingerprint is `{fingerprint}`" in text


def test_its_vector_of_a_fingerprint_with_options_is_that_of_such_a_model(tmp_path: Path) -> None:
    form, text = json_under("A fingerprint with options")
    found = json.loads(form)
    rotary, windows = Rotary(**found.pop("rotary")), tuple(found.pop("windows"))
    options = {**found, "without_bias": tuple(found["without_bias"]), "rotary": rotary, "windows": windows}
    config = ModelConfig(family=FAMILIES["mistral"], **options)
    assert form == json.dumps(config.identity(), sort_keys=True)
    settings = {"model_type": "mistral", **config.family.settings(config)}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert f"The fingerprint is `{fingerprint_of(tmp_path, config)}`" in text


def test_it_names_the_options_of_a_fingerprint_and_what_is_usual() -> None:
    (rows,), (of_rotary,) = (
        tables(DOCUMENT, what, usual, "value") for what, usual in (("option", "usually"), ("rotary", "in `default`"))
    )
    plain = gpt2_config(vocabulary_size=3, num_layers=1, width=4, num_heads=1, inner_width=8, num_positions=4, end_token=2)
    every = {each.name for each in dataclasses.fields(ModelConfig)} - {"family", "stop_tokens"}
    documented = {name: usual for cell, usual, _ in rows for name in re.findall(r"`(\w+)`", cell)}
    assert documented.keys() == every - plain.identity().keys()
    usual = {each.name: each.default for each in dataclasses.fields(ModelConfig)}
    for name, cell in documented.items():
        if not cell.startswith("`num_heads`") and not cell.startswith("`width`"):
            assert json.dumps(usual[name]) == cell.strip("`"), name
    defaults = {name: cell for names, cell, _ in of_rotary for name in re.findall(r"`(\w+)`", names)}
    assert list(defaults) == [each.name for each in dataclasses.fields(Rotary)]
    for name, value in dataclasses.asdict(Rotary(width=2, base=1e4)).items():
        assert not defaults[name] or json.dumps(value) == defaults[name].strip("`"), name


def test_its_example_of_a_shuffle_is_the_order_of_the_program() -> None:
    orders = re.findall(r"has the order `([0-9 ]+)`|the order `([0-9 ]+)`", DOCUMENT.partition("Example: with SEED 0")[2])
    documented = [[int(number) for number in (one or other).split()] for one, other in orders]
    data = Dataset(Samples.of([Sample(integers(0, 1), 1)] * 7))
    assert documented == [data.order(step, 7, (0, "a", "order")) for step in (1, 2)]


def test_its_example_of_a_tokenizer_is_what_a_fingerprint_ends_with() -> None:
    ((form, digits),) = re.findall(r"\n    (\{\"added_tokens\".*\})\n\nand ends a fingerprint with `(\w+)`", DOCUMENT)
    tokens = {token: number for number, token in json.loads(form)["vocabulary"]}
    end = max(tokens, key=tokens.__getitem__)
    tokens.pop(end)
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=[tuple(merge) for merge in json.loads(form)["merges"]]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([end])
    assert tokenizer_digest(tokenizer)[:16] == digits == hashlib.sha256(form.encode()).hexdigest()[:16]


# Written a second time, from the document alone


def words_of_mersenne_twister(key: list[int]) -> Iterator[int]:
    """32-bit numbers of MT19937, initialised by init_by_array."""
    state = [19650218]
    for i in range(1, 624):
        state.append((1812433253 * (state[-1] ^ (state[-1] >> 30)) + i) % 2**32)
    i = 1
    for n in range(624):
        state[i] = ((state[i] ^ ((state[i - 1] ^ (state[i - 1] >> 30)) * 1664525)) + key[n % len(key)] + n % len(key)) % 2**32
        i += 1
        if i == 624:
            state[0], i = state[623], 1
    for _ in range(623):
        state[i] = ((state[i] ^ ((state[i - 1] ^ (state[i - 1] >> 30)) * 1566083941)) - i) % 2**32
        i += 1
        if i == 624:
            state[0], i = state[623], 1
    state[0] = 2**31
    while True:
        for k in range(624):
            mixed = (state[k] & 2**31) | (state[(k + 1) % 624] & (2**31 - 1))
            state[k] = state[(k + 397) % 624] ^ (mixed >> 1) ^ (0x9908B0DF if mixed % 2 else 0)
        for word in list(state):
            word ^= word >> 11
            word ^= (word << 7) & 0x9D2C5680
            word ^= (word << 15) & 0xEFC60000
            yield word ^ (word >> 18)


def order_of_epoch(seed: int, name: str, epoch: int, num_samples: int) -> list[int]:
    digest = hashlib.sha256(f"{seed}/{name}/order/{epoch}".encode()).digest()
    number = int.from_bytes(digest[:8], "big") // 2
    words = words_of_mersenne_twister([number % 2**32, number >> 32] if number >> 32 else [number])
    order = list(range(num_samples))
    for i in range(num_samples - 1, 0, -1):
        j = next(upper for word in words if (upper := word >> (32 - (i + 1).bit_length())) <= i)
        order[i], order[j] = order[j], order[i]
    return order


def test_its_shuffle_is_the_programs() -> None:
    for name, num_samples in (("a", 7), ("jetson-1", 1000), ("b", 1), ("c", 64)):
        data = Dataset(Samples.of([Sample(integers(0, 1), 1)] * num_samples))
        for epoch in (0, 1, 5):
            expected = order_of_epoch(3, name, epoch, num_samples)
            assert data.order(epoch + 1, num_samples, (3, name, "order")) == expected


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warm_up", [{"warmup_steps": 3}, {"warmup_steps": 0, "warmup_ratio": 0.3}], ids=["steps", "ratio"])
def test_its_adamw_and_its_rates_are_the_programs(schedule: str, warm_up: dict[str, Any]) -> None:
    settings = dataclasses.replace(SETTINGS, lr=0.1, lr_schedule=schedule, weight_decay=0.3, **warm_up)
    generator = np.random.default_rng(0)
    p = generator.standard_normal((3, 2))
    parameter = torch.nn.Parameter(torch.from_numpy(p.copy()))
    optimiser, m, v = adamw([parameter], OptimiserConfig(**settings.optimiser())), 0 * p, 0 * p
    for step in range(1, 9):
        g = generator.standard_normal(p.shape)
        parameter.grad = torch.from_numpy(g.copy())
        take_step(optimiser, settings.learning_rate_at(step, 8))
        falling = {
            "constant": 0.1,
            "linear": 0.1 * (8 - step + 1) / max(1, 8 - 3),
            "cosine": 0.1 * (1 + np.cos(np.pi * (step - 1 - 3) / max(1, 8 - 3))) / 2,
        }
        eta = 0.1 * (step - 1) / 3 if step - 1 < 3 else falling[schedule]
        p = p - eta * 0.3 * p
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        p = p - eta * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
        assert parameter.detach().numpy() == pytest.approx(p, rel=1e-12)
