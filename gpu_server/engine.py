"""What the server asks of whatever computes."""

from typing import TYPE_CHECKING, Protocol

from protocol import Activations, Array, Evaluation, HiddenGradient, Tensors

from .federation import Aggregated, Trained

if TYPE_CHECKING:
    from split_model import Adapter

__all__ = ["Engine"]


class Engine(Protocol):
    """
    The server's part of the model, both adapters and both optimisers.

    Activations and their gradients are numpy arrays (N, d): a row for every real token of a batch, as wide as the model. All
    methods are called on one thread.
    """

    @property
    def round_end(self) -> "Adapter":
        """
        Everything to go on from, as it was when the last round ended: tensors by name. It is never changed, only replaced, so
        another thread may write it.
        """

    def train(self, step: int, total_steps: int, micro_batch: int, batches: dict[str, Activations]) -> Trained:
        """
        One forward and backward over all clients' tokens of a micro-batch together; after the step's last also the server
        part's update, which in runs with ``max_grad_norm`` waits for `aggregate`.

        Args:
            step: 1, 2, ...; with ``total_steps`` it gives the learning rate.
            micro_batch: 0, 1, ... of the step.
            batches: by client, in the order of the union batch: values (N, d).

        Returns:
            The loss and the labels of the step so far, and the losses and gradients of this micro-batch.

        Raises:
            TrainingDiverged: the loss is not finite.
            ModelError: nor is it without the adapter.
        """

    def forward(self, step: int, micro_batch: int, batches: dict[str, Activations]) -> dict[str, Array]:
        """
        The first half of `train` where devices have the labels. What the second half needs is kept, for several micro-batches;
        the first of a step forgets those of the step before.

        Args:
            step, micro_batch, batches: see `train`.

        Returns:
            By client: hidden states (M, d) behind the final norm, at the rows that have a label.

        Raises:
            TrainingDiverged: they are not finite.
            ModelError: nor are they without the adapter.
        """

    def backward(self, step: int, total_steps: int, micro_batch: int, gradients: dict[str, HiddenGradient]) -> Trained:
        """
        The second half; micro-batches come in their order. After the step's last also the server part's update, as in `train`.

        Args:
            gradients: by client: values (M, d), of its summed loss by its hidden states. Whoever is missing counts no tokens,
                and its gradient is zero. If all are, the micro-batch need not have had a `forward`.

        Returns:
            The loss and the labels of the step so far, and losses and gradients of this micro-batch for those who gave theirs.

        Raises:
            TrainingDiverged: a gradient is not finite.
        """

    def check(self, batches: list[Activations], others: list[str]) -> dict[str, float]:
        """
        By how much codecs change the loss of a micro-batch, without dropout.

        Args:
            batches: one of every client. Only those that have their values ``exact`` as well, (N, d), are compared.
            others: codecs to be tried besides the one in which the batches came.

        Returns:
            Nats per labelled token by codec; that in which the batches came is called "". Empty if nothing that is compared has
            a label.
        """

    def aggregate(self, step: int, total_steps: int, contributions: dict[str, Tensors], weights: dict[str, int]) -> Aggregated:
        """
        The edge adapter after a round. In runs with ``max_grad_norm`` both parts are updated here, by gradients whose common
        norm is no larger; a step that nobody contributes to then updates neither.

        Args:
            contributions: by client, a tensor in the shape of every LoRA matrix of the edge part: gradients to be summed where
                a round is one step, else matrices to be averaged.
            weights: labelled tokens of each client in the round, for the average.

        Raises:
            TrainingDiverged: the adapter is not finite, or the norm of the gradient is not.
        """

    def evaluate(self, batch: Evaluation) -> float:
        """
        Summed loss of a held-out batch in nats, without dropout.

        Raises:
            TrainingDiverged: it is not finite.
            ModelError: nor is it without the adapter.
        """

    def infer(self, batch: Evaluation) -> Array:
        """
        Hidden states of a held-out batch, without dropout: (M, d) behind the final norm, at the rows that have a label.

        Raises:
            TrainingDiverged: they are not finite.
            ModelError: nor are they without the adapter.
        """

    def keep_best(self) -> None:
        """The adapter of the last round's end is the best so far. From now on `round_end` has it besides."""

    def load_best(self) -> Tensors:
        """
        Let the adapter be the one that was kept last.

        Returns:
            See `edge_adapter`.
        """

    def adapter(self) -> "Adapter":
        """A copy of all LoRA matrices, edge and server: A is (r, inputs), B is (outputs, r)."""

    def edge_adapter(self) -> Tensors:
        """A copy of the edge part's LoRA matrices."""

    def restore(self, state: "Adapter") -> None:
        """
        Go back to a round's end.

        Args:
            state: what `round_end` was then.

        Raises:
            AdapterError: it is of another model or other LoRA settings.
        """
