"""The cut model against transformers, how checkpoints are read, and the small numerical parts."""

import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from conftest import make_model
from protocol_samples import SETTINGS
from safetensors.torch import load_file, save_file
from spoiling import change_weights
from torch.nn import functional as F
from transformers import (
    TrainingArguments,
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)
from transformers.trainer_pt_utils import LabelSmoother

from protocol import derive_seed
from protocol.settings import LR_SCHEDULES
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
from split_model.loss import BYTES_OF_LOGIT, CHUNK_ROWS, cross_entropies, rows_at_a_time, summed_cross_entropy
from split_model.packing import Packing, Places, _varlen_attn, kernel_of_packed_rows, labelled_positions
from storage import ModelError, find_model

LORA = LoraConfig(rank=2, alpha=4.0, targets=("c_attn", "c_proj", "c_fc"))
CPU = torch.device("cpu")
PLACED: dict[str, Any] = {"weight_dtype": torch.float64, "device": CPU}


def parts(folder: Path, cut_layer: int, lora: LoraConfig = LORA) -> tuple[EdgePart, ServerPart]:
    model = PretrainedModel(folder)
    return EdgePart(model, cut_layer, lora, **PLACED), ServerPart(model, cut_layer, lora, **PLACED)


def whole_logits(folder: Path, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return reference.load_base(folder, torch.float64)(input_ids=torch.tensor([tokens])).logits[0]


@pytest.mark.parametrize("cut_layer", [1, 2, 3])
def test_chained_parts_give_the_logits_of_transformers_for_every_sequence_of_a_batch(tiny_model: Path, cut_layer: int) -> None:
    edge, server = parts(tiny_model, cut_layer)
    sequences = [[5, 17, 99, 3], [42], [7, 8, 9, 10, 11, 12, 13]]
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    with torch.no_grad():
        logits = server.logits(edge(torch.tensor([t for s in sequences for t in s]), lengths), lengths)
    for found, sequence in zip(logits.split(lengths.tolist()), sequences, strict=True):
        assert torch.allclose(found, whole_logits(tiny_model, sequence), atol=1e-10)


@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "relu"])
def test_other_shapes_and_activations_are_read_from_the_configuration(tmp_path: Path, activation: str) -> None:
    folder = make_model(tmp_path, n_layer=2, n_inner=48, activation_function=activation, tie_word_embeddings=False)
    edge, server = parts(folder, 1)
    lengths = torch.tensor([5])
    with torch.no_grad():
        logits = server.logits(edge(torch.tensor([1, 2, 3, 4, 5]), lengths), lengths)
    assert torch.allclose(logits, whole_logits(folder, [1, 2, 3, 4, 5]), atol=1e-10)


def test_greedy_continuation_is_that_of_transformers(tiny_model: Path) -> None:
    edge, server = parts(tiny_model, 2)
    model = reference.load_base(tiny_model, torch.float64)
    prompt = [10, 20, 30]
    end = model.config.eos_token_id
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=end)[0, 3:].tolist()
    found = continue_greedily(edge, server, prompt, end, limit=12)
    assert found == (expected[: expected.index(end)] if end in expected else expected)


def test_summed_cross_entropy_and_its_gradient_are_torchs_over_several_chunks() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = 2 * CHUNK_ROWS + 7
    hidden = torch.randn(rows, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(50, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(50, (rows,), generator=generator)
    (expected,) = torch.autograd.grad(F.cross_entropy(hidden @ head.T, labels, reduction="sum") * 3, hidden)
    loss = summed_cross_entropy(hidden, head, labels)
    (found,) = torch.autograd.grad(loss * 3, hidden)
    assert loss.item() == pytest.approx(F.cross_entropy(hidden @ head.T, labels, reduction="sum").item(), rel=1e-12)
    assert torch.allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize(
    ("free", "unused", "rows"),
    [
        (40 << 30, 4 << 30, 8192),  # of an empty card
        (10 << 30, 0, 2048),
        (1 << 30, 9 << 30, 2048),  # what torch keeps for itself is free, too
        (1 << 30, 0, 256),
        (0, 0, 256),
    ],
)
def test_chunks_of_the_loss_take_an_eighth_of_a_cards_free_memory(
    monkeypatch: pytest.MonkeyPatch, free: int, unused: int, rows: int
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: unused + 100)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    assert rows_at_a_time.__wrapped__(torch.device("cuda", 0), 50257) == rows
    assert rows * 50257 * BYTES_OF_LOGIT <= max((free + unused) / 8, CHUNK_ROWS * 50257 * BYTES_OF_LOGIT)
    assert rows_at_a_time.__wrapped__(CPU, 50257) == CHUNK_ROWS


@pytest.mark.parametrize("smoothing", [0.1, 0.9])
def test_smoothed_cross_entropy_and_its_gradient_are_those_of_transformers(smoothing: float) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = CHUNK_ROWS + 7
    hidden = torch.randn(rows, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(50, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(50, (rows,), generator=generator)
    with_ignored = torch.cat([labels, torch.full((5,), -100)])
    logits = torch.cat([hidden, hidden[:5]]) @ head.T
    by_transformers = LabelSmoother(smoothing)({"logits": logits[None]}, with_ignored[None])
    expected = F.cross_entropy(logits, with_ignored, ignore_index=-100, label_smoothing=smoothing)
    assert expected.item() == pytest.approx(by_transformers.item(), rel=1e-6), "which adds up in float32"
    found = cross_entropies(hidden, head, labels, smoothing).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(found * 3, hidden)
    assert torch.allclose(gradient, torch.autograd.grad(expected * 3, hidden)[0], atol=1e-12)


def test_cross_entropies_are_torchs_row_by_row() -> None:
    generator = torch.Generator().manual_seed(1)
    rows = CHUNK_ROWS + 7
    hidden = torch.randn(rows, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    head, weights = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((50, 8), (rows,)))
    labels = torch.randint(50, (rows,), generator=generator)
    losses, of_torch = cross_entropies(hidden, head, labels), F.cross_entropy(hidden @ head.T, labels, reduction="none")
    assert torch.allclose(losses, of_torch, rtol=1e-12)
    found, expected = (torch.autograd.grad((each * weights).sum(), hidden)[0] for each in (losses, of_torch))
    assert torch.allclose(found, expected, atol=1e-12)


def test_packing_goes_to_the_grids_and_back() -> None:
    packing = Packing([5, 2, 4, 1], CPU)
    rows = torch.arange(1.0, 25.0).view(12, 2)
    one, two, four_and_five = packing.pad(rows)
    assert [grid.shape for grid in (one, two, four_and_five)] == [(1, 1, 2), (1, 2, 2), (2, 5, 2)]
    assert torch.equal(four_and_five[1], rows[:5])
    assert torch.equal(four_and_five[0, :4], rows[7:11])
    assert not four_and_five[0, 4:].any()
    assert torch.equal(packing.pack([one, two, four_and_five]), rows)
    assert packing.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 0]


def trained(server: ServerPart) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Losses, the gradient by the activations, and how many bytes were kept between the forward and the backward pass."""
    generator, lengths, counts = torch.Generator().manual_seed(1), [9, 4, 17, 12], [8, 3, 0, 12]
    values = {name: torch.randn(matrix.shape, generator=generator) / 10 for name, matrix in server.matrices().items()}
    server.load_adapter(values)
    activations = torch.randn(sum(lengths), 32, generator=generator, requires_grad=True)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    frozen = {buffer.untyped_storage().data_ptr() for buffer in server.buffers()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = server.losses(activations, lengths, counts, torch.arange(sum(counts)))
    losses.sum().backward()
    assert activations.grad is not None
    return losses.detach(), activations.grad, sum(size for place, size in kept.items() if place not in frozen)


def test_residual_stream_in_bfloat16_takes_a_third_less_memory_and_gives_about_the_same(tiny_model: Path) -> None:
    model, lora = PretrainedModel(tiny_model), LoraConfig(rank=2, alpha=4.0, targets=("c_attn", "c_proj", "c_fc"))
    where: dict[str, Any] = {"weight_dtype": torch.bfloat16, "device": CPU}
    usual, halved = ServerPart(model, 1, lora, **where), ServerPart(model, 1, lora, in_bfloat16=True, **where)
    (losses, gradient, kept), (found, found_gradient, fewer) = trained(usual), trained(halved)
    assert found.dtype == found_gradient.dtype == torch.float32
    assert all(matrix.dtype == matrix.grad.dtype == torch.float32 for matrix in halved.matrices().values())  # type: ignore[union-attr]
    assert torch.linalg.vector_norm(found - losses) < 1e-2 * torch.linalg.vector_norm(losses)
    assert torch.linalg.vector_norm(found_gradient - gradient) < 3e-2 * torch.linalg.vector_norm(gradient)
    for name, matrix in usual.gradients().items():
        assert torch.linalg.vector_norm(halved.gradients()[name] - matrix) < 5e-2 * torch.linalg.vector_norm(matrix)
    assert fewer < 0.7 * kept


def test_places_take_back_what_they_spread_and_both_have_the_gradients_of_indexing() -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = np.array([6, 0, 3, 4])
    places = Places(numbers, 8, CPU)
    rows, cells = (torch.randn(n, 3, generator=generator, dtype=torch.float64, requires_grad=True) for n in (4, 8))
    spread, taken = places.spread(rows), places.take(cells)
    assert torch.equal(spread, torch.zeros(8, 3, dtype=torch.float64).index_copy(0, torch.from_numpy(numbers), rows))
    assert torch.equal(taken, cells[numbers])
    assert torch.equal(places.take(spread), rows)
    assert torch.autograd.gradcheck(places.spread, rows)
    assert torch.autograd.gradcheck(places.take, cells)
    nowhere = Places(numbers[:0], 8, CPU)
    assert not nowhere.spread(nowhere.take(cells)).any()


def attention_of_packed_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int],
) -> torch.Tensor:
    """What `torch.nn.attention.varlen.varlen_attn` is documented to compute, without its kernel: (N, H, D) -> (N, H, D)."""
    assert cu_seq_q.dtype == torch.int32
    assert torch.equal(cu_seq_q, cu_seq_k)
    lengths = cu_seq_q.diff().tolist()
    assert (max(lengths), max(lengths), (-1, 0)) == (max_q, max_k, window_size)
    mixed = [
        F.scaled_dot_product_attention(*(part.transpose(0, 1) for part in parts), is_causal=True).transpose(0, 1)
        for parts in zip(*(tensor.split(lengths) for tensor in (query, key, value)), strict=True)
    ]
    return torch.cat(mixed)


def test_kernel_of_packed_rows_is_given_what_it_is_documented_to_take(monkeypatch: pytest.MonkeyPatch) -> None:
    packing, generator = Packing([5, 2, 1, 4, 9], CPU), torch.Generator().manual_seed(0)
    qkv = torch.randn(21, 3 * 16, generator=generator, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(21, 16, generator=generator, dtype=torch.float64)
    expected = packing.attend(*qkv.view(21, 6, 8).chunk(3, 1))
    expected.backward(upstream)
    expected_gradient, qkv.grad = qkv.grad, None
    monkeypatch.setattr("split_model.packing.kernel_of_packed_rows", lambda *_: attention_of_packed_rows)
    found = packing.attend(*qkv.view(21, 6, 8).chunk(3, 1))
    found.backward(upstream)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(qkv.grad, expected_gradient, rtol=1e-12, atol=1e-12)


def test_signature_of_the_kernel_of_packed_rows_is_the_one_that_is_called() -> None:
    parameters = inspect.signature(pytest.importorskip("torch.nn.attention.varlen").varlen_attn).parameters
    if "window_size" in parameters:  # else it is not used
        inspect.signature(attention_of_packed_rows).bind(*range(7), window_size=(-1, 0))
        assert list(parameters)[:7] == list(inspect.signature(attention_of_packed_rows).parameters)[:7]


def test_there_is_no_kernel_of_packed_rows_without_a_device_for_it() -> None:
    assert kernel_of_packed_rows(CPU, torch.bfloat16, 64) is None
    cuda = torch.device("cuda", 0)
    assert kernel_of_packed_rows(cuda, torch.float32, 64) is None
    assert kernel_of_packed_rows(cuda, torch.bfloat16, 60) is None
    assert kernel_of_packed_rows(cuda, torch.bfloat16, 200) is None


@pytest.mark.parametrize(
    ("capability", "is_built", "expected"), [((8, 0), True, True), ((7, 5), True, False), ((9, 0), False, False)]
)
def test_kernel_of_packed_rows_is_taken_where_torch_and_the_card_have_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], is_built: bool, expected: bool
) -> None:
    varlen_attn = pytest.importorskip("torch.nn.attention.varlen").varlen_attn
    if "window_size" not in inspect.signature(varlen_attn).parameters:
        pytest.skip("this torch's has other arguments")
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: is_built)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    cuda = torch.device("cuda", 7)
    _varlen_attn.cache_clear()
    assert kernel_of_packed_rows(cuda, torch.bfloat16, 64) == (varlen_attn if expected else None)
    _varlen_attn.cache_clear()


def test_labelled_positions_are_the_last_rows_of_each_sequence() -> None:
    assert labelled_positions([3, 2, 4], [1, 0, 3]).tolist() == [2, 6, 7, 8]


def test_shards_and_names_without_prefix_are_the_same_model(tiny_model: Path, tmp_path: Path) -> None:
    sharded, bare = tmp_path / "sharded", tmp_path / "bare"
    reference.load_base(tiny_model).save_pretrained(sharded, max_shard_size="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    bare.mkdir()
    (bare / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    for folder in (sharded, bare):
        (folder / "tokenizer.json").write_bytes((tiny_model / "tokenizer.json").read_bytes())
    tensors = load_file(tiny_model / "model.safetensors")
    masks = {"h.0.attn.bias": torch.zeros(1, 1, 4, 4)}  # old checkpoints carry them
    save_file({**{name.removeprefix("transformer."): t for name, t in tensors.items()}, **masks}, bare / "model.safetensors")
    assert len({PretrainedModel(folder).fingerprint() for folder in (tiny_model, sharded, bare)}) == 1


TABLE, HEAD = "transformer.wte.weight", "lm_head.weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_head_that_is_not_the_table_is_a_head_of_its_own(model: Path, tiny_model: Path, dtype: torch.dtype) -> None:
    """Whatever the configuration says, as in transformers."""
    change_weights(model, lambda weights: weights.update({HEAD: (weights[TABLE] + 0.3).to(dtype)}))
    assert json.loads((model / "config.json").read_text())["tie_word_embeddings"] is True
    assert PretrainedModel(model).config.tied_head is False
    assert PretrainedModel(model).fingerprint() != PretrainedModel(tiny_model).fingerprint()
    edge, server = parts(model, 2)
    lengths = torch.tensor([5])
    with torch.no_grad():
        logits = server.logits(edge(torch.tensor([1, 2, 3, 4, 5]), lengths), lengths)
    assert torch.allclose(logits, whole_logits(model, [1, 2, 3, 4, 5]), atol=1e-10)


def test_head_that_differs_in_its_last_row_alone_is_noticed(model: Path) -> None:
    def change_last_row(weights: dict[str, torch.Tensor]) -> None:
        weights[HEAD] = weights[TABLE].clone()
        weights[HEAD][-1, -1] += 1

    change_weights(model, change_last_row)
    assert PretrainedModel(model).config.tied_head is False


def test_head_and_table_without_rows_are_refused(model: Path) -> None:
    change_weights(model, lambda weights: weights.update(dict.fromkeys((TABLE, HEAD), weights[TABLE][:0])))
    with pytest.raises(ModelError, match=r"tensor 'wte.weight' has shape \[0, "):
        PretrainedModel(model)


def store_the_head_too(weights: dict[str, torch.Tensor]) -> None:
    weights[HEAD] = weights[TABLE].clone()


def store_the_head_alone(weights: dict[str, torch.Tensor]) -> None:
    weights[HEAD] = weights.pop(TABLE)


@pytest.mark.parametrize("store", [store_the_head_too, store_the_head_alone])
def test_tied_head_that_is_stored_is_the_same_model(
    model: Path, tiny_model: Path, store: Callable[[dict[str, torch.Tensor]], None]
) -> None:
    change_weights(model, store)
    assert PretrainedModel(model).config == PretrainedModel(tiny_model).config
    assert PretrainedModel(model).fingerprint() == PretrainedModel(tiny_model).fingerprint()
    assert torch.equal(whole_logits(model, [1, 2, 3]), whole_logits(tiny_model, [1, 2, 3]))
    edge, server = parts(model, 1)
    lengths = torch.tensor([3])
    with torch.no_grad():
        logits = server.logits(edge(torch.tensor([1, 2, 3]), lengths), lengths)
    assert torch.allclose(logits, whole_logits(tiny_model, [1, 2, 3]), atol=1e-10)


def test_tensors_that_are_no_part_of_the_model_are_no_part_of_its_fingerprint(model: Path, tiny_model: Path) -> None:
    change_weights(
        model, lambda weights: weights.update({"score.weight": torch.zeros(2, 32), "h.1.attn.masked_bias": torch.zeros(1)})
    )
    assert PretrainedModel(model).fingerprint() == PretrainedModel(tiny_model).fingerprint()


def test_fingerprint_knows_another_model(tiny_model: Path, tmp_path: Path) -> None:
    assert PretrainedModel(make_model(tmp_path, seed=1)).fingerprint() != PretrainedModel(tiny_model).fingerprint()


def test_tensors_are_mapped_and_not_copied(tiny_model: Path) -> None:
    table = PretrainedModel(tiny_model).tensors["wte.weight"]
    assert table.view().data_ptr() == table.view().data_ptr()


def test_hub_is_asked_only_for_the_files_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def fetch(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert find_model("distilgpt2") == tmp_path
    ((name, patterns),) = asked
    assert name == "distilgpt2"
    assert "config.json" in patterns
    assert not any(pattern.endswith((".bin", ".h5", ".msgpack", ".onnx", "*")) for pattern in patterns)


def test_hub_that_does_not_answer_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, allow_patterns: list[str]) -> str:
        raise OSError("no route to host\nand much more")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(
        ModelError, match=r"'gpt2' is no folder here, and the Hugging Face hub did not give it: no route to host$"
    ):
        find_model("gpt2")


def test_hub_is_not_asked_without_its_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelError, match=r"asked with huggingface_hub, .* not installed: pip install 'splitlora\[torch\]'$"):
        find_model("gpt2")


def test_initial_adapter_is_drawn_as_peft_draws_it(tiny_model: Path) -> None:
    config = PretrainedModel(tiny_model).config
    adapter = initial_adapter(config, LoraConfig(rank=8, targets=("c_attn",)), seed=3)
    for name, matrix in adapter.items():
        if ".lora_A." in name:
            # Kaiming-uniform with a = sqrt(5) is uniform in +- 1 / sqrt(in).
            bound = matrix.shape[1] ** -0.5
            assert matrix.abs().max() <= bound
            assert matrix.std().item() == pytest.approx(bound / 3**0.5, rel=0.15)
        else:
            assert not matrix.any()
    again = initial_adapter(config, LoraConfig(rank=8, targets=("c_attn",)), seed=3)
    assert all(torch.equal(adapter[name], again[name]) for name in adapter)


def test_adapter_folder_survives_a_round_trip_through_peft(tiny_model: Path, tmp_path: Path) -> None:
    config = PretrainedModel(tiny_model).config
    adapter = {name: torch.randn_like(matrix) for name, matrix in initial_adapter(config, LORA, seed=0).items()}
    save_adapter(tmp_path / "ours", adapter, config, LORA, str(tiny_model))
    reference.load_peft(tiny_model, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again = load_adapter(tmp_path / "theirs", config, LORA)
    assert list(again) == list(adapter)
    assert all(torch.equal(again[name], adapter[name]) for name in adapter)
    assert json.loads((tmp_path / "ours/adapter_config.json").read_text())["fan_in_fan_out"] is True


SCHEDULES = {
    "constant": lambda optimiser, warmup, total: get_constant_schedule_with_warmup(optimiser, warmup),
    "linear": get_linear_schedule_with_warmup,
    "cosine": get_cosine_schedule_with_warmup,
}


@pytest.mark.parametrize("lr_schedule", LR_SCHEDULES)
@pytest.mark.parametrize("total", [1, 4, 20, 333])
@pytest.mark.parametrize(("warmup_steps", "warmup_ratio"), [(0, 0.0), (4, 0.0), (0, 0.03), (0, 0.5)])
def test_learning_rate_is_that_of_transformers(
    lr_schedule: str, total: int, warmup_steps: int, warmup_ratio: float, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, lr=0.3, lr_schedule=lr_schedule, warmup_steps=warmup_steps, warmup_ratio=warmup_ratio)
    arguments = TrainingArguments(output_dir=str(tmp_path), warmup_steps=warmup_steps or warmup_ratio)  # a part, if below 1
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    schedule = SCHEDULES[lr_schedule](optimiser, arguments.get_warmup_steps(total), total)
    for step in range(1, total + 1):
        assert settings.learning_rate_at(step, total) == pytest.approx(schedule.get_last_lr()[0], rel=1e-15, abs=1e-18)
        optimiser.step()
        schedule.step()


def test_warm_up_is_given_as_steps_or_as_a_part_of_the_run_and_not_as_both() -> None:
    with pytest.raises(ValueError, match=r"^warmup_steps 4 and warmup_ratio 0.1 both say how long the warm-up is: give one"):
        replace(SETTINGS, warmup_steps=4, warmup_ratio=0.1)


def test_seeds_are_functions_of_all_their_parts() -> None:
    seeds = {derive_seed(*parts) for parts in [(0, "a", 1), (0, "a", 2), (0, "b", 1), (1, "a", 1)]}
    assert len(seeds) == 4
    assert derive_seed(0, "a", 1) == 3805457466603685491  # part of the contract: it decides every run
    assert all(0 <= seed < 2**63 for seed in seeds)
