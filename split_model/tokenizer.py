"""GPT-2's byte-level BPE, without transformers."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from .errors import ModelError

__all__ = ["load_tokenizer"]

END_OF_TEXT = "<|endoftext|>"


def load_tokenizer(folder: Path) -> Tokenizer:
    """
    From a model's tokenizer.json, or its vocab.json and merges.txt.

    Raises:
        ModelError: the folder has neither, or they cannot be read.
    """
    whole, vocabulary, merges = folder / "tokenizer.json", folder / "vocab.json", folder / "merges.txt"
    try:
        if whole.is_file():
            tokenizer = Tokenizer.from_file(str(whole))
            # Some files keep the settings of their last batch.
            tokenizer.no_padding()
            tokenizer.no_truncation()
            return tokenizer
        if vocabulary.is_file() and merges.is_file():
            tokenizer = Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
            tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
            tokenizer.add_special_tokens([END_OF_TEXT])
            return tokenizer
    except Exception as error:  # the library raises bare Exception for whatever is wrong with a file
        raise ModelError(f"{folder}: the tokenizer cannot be read: {error}") from None
    raise ModelError(f"{folder} has no tokenizer: neither tokenizer.json nor vocab.json and merges.txt")
