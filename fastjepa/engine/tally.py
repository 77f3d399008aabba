"""A tally of a step: what its micro-batches leave for the log. Nothing in it is read from the device."""

from torch import Tensor

from fastjepa.loader.batch import Batch


class StepTally:
    """The loss of a step and the features of its last micro-batch."""

    loss: Tensor | float = 0.0  # 0-dim, on the device: the sum over micro-batches, which is this rank's mean
    part: Tensor | float = 0.0  # 0-dim: the loss of the last micro-batch
    features: Tensor | None = None  # (U, D) features whose collapse is to be seen
    context_tokens = 0.0  # mean length of a context mask
    target_tokens = 0.0  # mean rows that a sequence predicts: those of a target block, or of what else is predicted at once

    def note(self, loss: Tensor, features: Tensor) -> None:
        """Note a micro-batch's loss and features."""
        self.part, self.features = loss.detach(), features.detach()

    def count(self, batch: Batch) -> None:
        """Add what was noted for a micro-batch to the step's."""
        self.loss = self.loss + self.part
        self.context_tokens, self.target_tokens = batch.context.mean_len, batch.blocks.queries.mean_len
