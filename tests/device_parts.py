"""Parts of models as servers hand them over, for tests of the devices that run them."""

from pathlib import Path

from graphs import Adaptation, StoredWeights, build_part
from protocol import RunSettings
from split_model import LoraConfig, PretrainedModel, adapted_layers


def make_part(folder: Path, base: Path, settings: RunSettings, precision: str = "float32") -> Path:
    """The part of the model in ``base`` for a run of these settings, written into ``folder``, which is made."""
    model, lora = PretrainedModel(base), LoraConfig(**settings.lora())
    layers = adapted_layers(model.config, lora)
    folder.mkdir()
    build_part(
        folder,
        model.config,
        StoredWeights(model),
        cut_layer=settings.cut_layer,
        adaptation=Adaptation(layers=layers, rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout),
        precision=precision,
        fingerprint=model.fingerprint(),
        tokenizer_folder=base,
        with_head=settings.labels == "device",
    )
    return folder
