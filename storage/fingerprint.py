"""
The 32 hex digits by which both sides of a run see that they have the same model and the same tokenizer. PROTOCOL.md, "Hello",
says what is digested.
"""

__all__ = ["fingerprint", "part_that_differs"]

MODEL_DIGITS, TOKENIZER_DIGITS = 16, 16


def fingerprint(model_digest: str, tokenizer_digest: str) -> str:
    """The fingerprint of a model, given the two SHA-256 digests in hex."""
    return model_digest[:MODEL_DIGITS] + tokenizer_digest[:TOKENIZER_DIGITS]


def part_that_differs(fingerprint: str, other: str) -> str:
    """Of two fingerprints that differ: "tokenizer" if they are of one model with two tokenizers, else "model"."""
    return "tokenizer" if fingerprint[:MODEL_DIGITS] == other[:MODEL_DIGITS] else "model"
