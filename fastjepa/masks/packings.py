"""Variants of packing: which rows the predictor and the target network see of an image's target blocks and contexts."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ContextUse:
    """Use of a context by the predictor, where that is not all of it, once, unpredicted."""

    share: float = 1.0  # of a context's patches that a draw shows
    repeats: int = 1  # draws of a context
    visible_weight: float = 0.0  # of the loss on visible patches, at the end of its rise; 0: they are not predicted
    visible_rise: tuple[float, float] = (0.0, 0.0)  # shares of the run between which that weight rises from 0

    def weight(self, progress: float) -> float:
        """Return the weight of the loss on visible patches when this share of the run is over.

        Example: a weight of 0.5 that rises from 0.1 to 0.2 is 0 up to a tenth of the run, 0.25 at 0.15, 0.5 from 0.2 on.
        """
        start, end = self.visible_rise
        risen = (progress - start) / (end - start) if end > start else float(progress >= end)
        return self.visible_weight * min(max(risen, 0.0), 1.0)

    def seen(self, context: float) -> float:
        """Return the patches that a draw shows of a context of so many."""
        return context if self.share == 1 else max(1.0, round(self.share * context))


class PerBlockPacking:
    """The paper's: the predictor sees a context once for every target block, the target network sees whole images."""

    def predicted(self, target_mask: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the blocks that are predicted, (b, R', N) bool of the target blocks (b, R, N), and what a patch counts.

        (b, N) is the share of a patch in the mean of its image; None stands for one over the length of its block.
        """
        return target_mask, None

    def finished(self, target_mask: np.ndarray) -> np.ndarray | None:
        """Return the rows (b, N) bool that the target network finishes of whole images, or None where it sees blocks alone."""
        return target_mask.any(axis=1)

    def predictor_sequences(self, blocks: int) -> int:
        """Return how many sequences the predictor makes of one context, of an image with so many target blocks."""
        return blocks

    def target_sequences(self, blocks: int) -> int:
        """Return how many sequences the target network makes of one image."""
        return 1

    def predicted_tokens(self, block: float, union: float) -> float:
        """Return the length of what is predicted at once, given that of a block and of the union of an image's blocks."""
        return block

    def finished_tokens(self, block: float, union: float) -> float:
        """Return the rows that the target network finishes of each of its sequences, given the same."""
        return union

    def target_tokens(self, finished: np.ndarray, tokens: int) -> np.ndarray:
        """Return how many patches each sequence of the target network holds, given the rows it finishes of each."""
        return np.full(len(finished), tokens)


class JointPacking(PerBlockPacking):
    """A joint predictor: it sees a context once, with the patches of all target blocks, each patch once.

    A patch weighs what it does in all blocks together: the mean over blocks of one over the block's length.
    Example: blocks {0, 1} and {1, 2, 3, 4} give 0 the weight 1/4, 1 the weight 1/4 + 1/8, and 2, 3, 4 the weight 1/8.
    """

    def predicted(self, target_mask: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        lengths = target_mask.sum(axis=2, keepdims=True)  # (b, R, 1)
        return target_mask.any(axis=1, keepdims=True), (target_mask / np.maximum(lengths, 1)).mean(axis=1)

    def predictor_sequences(self, blocks: int) -> int:
        return 1

    def predicted_tokens(self, block: float, union: float) -> float:
        return union


class SeparatePacking(PerBlockPacking):
    """Targets of the masked input: the target network sees every target block by itself, as a sequence of its own."""

    def finished(self, target_mask: np.ndarray) -> np.ndarray | None:
        return None

    def target_sequences(self, blocks: int) -> int:
        return blocks

    def finished_tokens(self, block: float, union: float) -> float:
        return block

    def target_tokens(self, finished: np.ndarray, tokens: int) -> np.ndarray:
        return finished


PER_BLOCK, JOINT, SEPARATE = PerBlockPacking(), JointPacking(), SeparatePacking()


def packing_of(predictor: str, target: str) -> PerBlockPacking:
    """Return the packing for `meta.predictor` and `loss.target`; the config refuses joint together with input."""
    if predictor == "joint":
        return JOINT
    return SEPARATE if target == "input" else PER_BLOCK
