"""
The 32 hex digits by which both sides of a run see that they have the same model and the same tokenizer. PROTOCOL.md, "Hello",
says what is digested.
"""

__all__ = ["FINGERPRINT", "NO_MODEL", "fingerprint", "model_number", "part_that_differs"]

FINGERPRINT = "[0-9a-f]{32}"
"""As a regular expression."""
MODEL_DIGITS, TOKENIZER_DIGITS = 16, 16
NUMBER_DIGITS = 7
"""Of hex, as many as there are in 31 bits."""
NO_MODEL = 1
"""What stands for `model_number` in the files of versions that wrote none."""


def fingerprint(model_digest: str, tokenizer_digest: str) -> str:
    """The fingerprint of a model, given the two SHA-256 digests in hex."""
    return model_digest[:MODEL_DIGITS] + tokenizer_digest[:TOKENIZER_DIGITS]


def model_number(fingerprint: str) -> int:
    """What an .onnx_adapter can say of the model that it was made for: its format has room for 31 bits."""
    return int(fingerprint[:NUMBER_DIGITS], 16)


def part_that_differs(fingerprint: str, other: str) -> str:
    """Of two fingerprints that differ: "tokenizer" if they are of one model with two tokenizers, else "model"."""
    return "tokenizer" if fingerprint[:MODEL_DIGITS] == other[:MODEL_DIGITS] else "model"
