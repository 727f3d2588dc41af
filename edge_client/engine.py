"""
What computes a device's part of the model, as the training needs it.

`OnnxEngine` and `TorchEngine` are two; another one needs these methods and nothing else of this package.
"""

from typing import Protocol

from protocol import Array, Tensors

from .data import Batch

__all__ = ["Engine"]


class Engine(Protocol):
    """
    The embeddings, the blocks before the cut and their LoRA matrices. Between a `forward` and its `backward` it keeps what the
    backward pass needs, for several micro-batches at once.

    Shapes: N is the number of a batch's tokens, all sequences one under the other; d is the model's width. Floats are in the
    run's precision (`RunSettings.precision`). Matrices are named as in PEFT folders; A is (rank, inputs), B is (outputs, rank).

    The same calls give the same bits: dropout is a function of its seed.
    """

    @property
    def num_adapter_elements(self) -> int:
        """Numbers in all LoRA matrices of this part."""

    # A step

    def begin_step(self) -> None:
        """Forget the activations and gradients of a step that was interrupted."""

    def forward(self, batch: Batch, dropout_seed: int) -> Array:
        """
        Activations at the cut, (N, d). Several calls may precede their `backward`.

        Raises:
            TrainingDiverged: they are not finite.
            ModelError: they are not finite without the adapter either.
        """

    def backward(self, gradient: Array) -> None:
        """
        Add to the gradients of the LoRA matrices.

        Args:
            gradient: (N, d), of the micro-batch's summed loss at the activations of the earliest `forward` that had no
                `backward`; in nats per unit of activation.

        Raises:
            RuntimeError: there is no such `forward`.
        """

    def end_step(self, labelled_tokens: int) -> None:
        """Divide the gradients by the number of labelled tokens of all clients: they become those of the mean loss."""

    def take_step(self, learning_rate: float) -> None:
        """
        Update the adapter by AdamW with the step's gradients. For rounds of several steps, as the three methods below.

        Raises:
            RuntimeError: in rounds of one step the server does that.
        """

    def state(self) -> Tensors:
        """The adapter and AdamW's moments, to be given to `restore`. The names are the engine's own."""

    def restore(self, state: Tensors) -> None:
        """
        Go on as if the step after which `state` was called had just been taken.

        Raises:
            AdapterError: it is another part's.
        """

    def forget(self) -> None:
        """Let AdamW begin anew; the adapter stays."""

    # The adapter

    def gradients(self) -> Tensors:
        """By matrix."""

    def adapter(self) -> Tensors:
        """The matrices themselves; they may change with the engine's."""

    def load_adapter(self, tensors: Tensors) -> None:
        """
        Raises:
            AdapterError: they are not this part's matrices.
        """

    # The head, in runs whose labels stay on the device

    def losses_and_gradient(self, hidden: Array, labels: Array) -> tuple[Array, Array]:
        """
        The head and the losses at the rows that have a label, smoothed as the run says. Logits of a few rows exist at a time,
        never of all.

        Args:
            hidden: (M, d) hidden states behind the final norm, as the server has sent them; M may be 0.
            labels: (M,) int32, the tokens that follow.

        Returns:
            Each row's loss in nats, (M,), and the gradient of their sum at ``hidden``, (M, d).

        Raises:
            TrainingDiverged: one of them is not finite.
        """

    def losses(self, hidden: Array, labels: Array) -> Array:
        """
        The losses alone, of held-out texts, never smoothed; arguments as of `losses_and_gradient`.

        Raises:
            TrainingDiverged: one is not finite.
        """

    # Held-out texts

    def infer(self, batch: Batch) -> Array:
        """
        Activations at the cut, (N, d), without dropout and without anything kept for a `backward`.

        Raises:
            TrainingDiverged, ModelError: as `forward`.
        """
