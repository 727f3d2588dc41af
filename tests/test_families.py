"""Model families: their names stand in their own files, and what they give fits together."""

import re
from pathlib import Path

import pytest
from conftest import REPOSITORY

import export.families
import graphs.families
import split_model.families
from protocol.settings import TARGETS
from split_model import LoraConfig, PretrainedModel, adapter_shapes
from storage import AdapterError

PACKAGES = ("edge_client", "export", "gpu_server", "graphs", "protocol", "split_model", "storage", "terminal")
NAMES_OF_GPT2 = re.compile(
    r"\b(wte|wpe|c_attn|c_proj|c_fc|ln_1|ln_2|ln_f|lm_head|n_embd|n_layer|n_head|n_inner|n_positions|n_ctx)\b"
    r"|GPT2\w*|gpt2\w*|transformer\.(h|wte|wpe|ln_f)\b"
)
EXCEPTIONS = {
    # What may be named on the wire is fixed before either side knows the model.
    "protocol/settings.py": {"c_attn", "c_proj", "c_fc"},
    # The words and the default of the flag --lora-targets; "gpt2" as the example of a name on the hub.
    "gpu_server/config.py": {"c_attn", "c_proj", "c_fc", "gpt2"},
    "gpu_server/sdk.py": {"gpt2"},
    "edge_client/cli.py": {"gpt2"},
    "edge_client/leak/flags.py": {"gpt2"},
    "export/cli.py": {"gpt2"},
    # A class of tokenizers, which models of any family may have.
    "storage/tokenizer.py": {"GPT2", "gpt2", "GPT2Tokenizer", "GPT2TokenizerFast", "GPT2_CLASSES"},
}


def names_in(file: Path) -> set[str]:
    return {found[0] for found in NAMES_OF_GPT2.finditer(file.read_text(encoding="utf-8"))}


def test_names_of_gpt2_stand_in_files_of_its_own() -> None:
    files = [file for package in PACKAGES for file in sorted((REPOSITORY / package).rglob("*.py"))]
    found = {file.relative_to(REPOSITORY).as_posix(): names_in(file) for file in files if file.parent.name != "families"}
    assert {file: names for file, names in found.items() if names} == EXCEPTIONS


@pytest.mark.parametrize("package", ["split_model", "graphs", "export"])
def test_each_family_has_a_file_named_after_it_that_no_other_file_imports(package: str) -> None:
    folder = REPOSITORY / package / "families"
    families = {file.stem for file in folder.glob("*.py")} - {"__init__", "family"}
    assert families == set(split_model.families.FAMILIES)
    others = [file for file in (REPOSITORY / package).rglob("*.py") if file != folder / "__init__.py"]
    for family in families:
        importing = re.compile(rf"^\s*(from|import) .*\b{family}\b", re.MULTILINE)
        assert not [file for file in others if importing.search(file.read_text(encoding="utf-8"))]


def test_every_family_can_be_trained_and_exported_and_handed_to_devices() -> None:
    families = split_model.families.FAMILIES.keys()
    assert families == export.families.FAMILIES.keys() == graphs.families.FAMILIES.keys()


def test_settings_may_name_what_can_be_adapted_in_some_family(tiny_model: Path) -> None:
    """One family so far; with more of them, TARGETS is the union."""
    assert PretrainedModel(tiny_model).config.lora_targets == TARGETS


@pytest.mark.parametrize(
    ("targets", "found"), [((), "none"), (("c_attn", "q_proj"), "q_proj"), (("attn.c_attn",), "attn.c_attn")]
)
def test_target_of_another_family_is_refused_where_settings_meet_the_model(
    tiny_model: Path, targets: tuple[str, ...], found: str
) -> None:
    lora = LoraConfig(rank=2, targets=targets)
    with pytest.raises(AdapterError, match=f"^LoRA targets must be among c_attn, c_proj, c_fc; got {re.escape(found)}$"):
        adapter_shapes(PretrainedModel(tiny_model).config, lora, range(1))


def test_target_adapts_all_layers_whose_names_end_with_it(tiny_model: Path) -> None:
    """As PEFT's target_modules do."""
    shapes = adapter_shapes(PretrainedModel(tiny_model).config, LoraConfig(rank=2, targets=("c_proj",)), range(1))
    block = "base_model.model.transformer.h.0"
    assert shapes == {
        f"{block}.attn.c_proj.lora_A.weight": (2, 32),
        f"{block}.attn.c_proj.lora_B.weight": (32, 2),
        f"{block}.mlp.c_proj.lora_A.weight": (2, 128),
        f"{block}.mlp.c_proj.lora_B.weight": (32, 2),
    }
