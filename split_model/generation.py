"""Text from both parts in one process: for a look at a run's result. Deployment goes through ONNX."""

from collections.abc import Sequence

import torch

from .parts import EdgePart, ServerPart

__all__ = ["continue_greedily"]


@torch.no_grad()
def continue_greedily(edge: EdgePart, server: ServerPart, prompt: Sequence[int], end_token: int, limit: int) -> list[int]:
    """The most likely continuation of ``prompt``, at most ``limit`` tokens and without the end token."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + limit:
        logits = server.logits(edge(tokens, [len(tokens)]), [len(tokens)])
        token = int(logits[-1].argmax())
        if token == end_token:
            break
        tokens.append(token)
    return tokens[len(prompt) :]
