"""The I-JEPA loss (paper, equation 1): the distance of predictions to normalised targets, a mean over images."""

from torch import Tensor

from fastjepa.loss.normalizations import NORMALIZATIONS, LayerNormalization, Target
from fastjepa.masks.packed import Blocks


def jepa_loss(
    prediction: Tensor,
    target: Target,
    blocks: Blocks,
    kind: str = "smooth_l1",
    normalization: LayerNormalization = NORMALIZATIONS["layer"],
) -> Tensor:
    """Return the mean over images of the mean over (context mask, target block) of the mean distance to the target.

    Args:
        prediction: (Q, D) predictor output, any float dtype; computed on in fp32. (Q, L D) of L layers.
        target: (U, D) targets, or those of each layer, as an object of `loss.targets` gives them.
        blocks: says which target row each prediction is of, and its weight.
        kind: smooth_l1 (beta 1, the official code) or l2 (the paper).
        normalization: what the targets are normalised by, an object of `loss.normalizations`.

    Returns:
        fp32 scalar.
    """
    return normalization.loss(prediction, target, blocks, kind)
