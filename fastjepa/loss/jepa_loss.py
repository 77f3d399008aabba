"""The I-JEPA loss (paper, equation 1) and the optional regularizers of the small presets."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjepa.masks.packed import Blocks
from fastjepa.ranks.collectives import mean_over_ranks
from fastjepa_kernels import target_loss


def jepa_loss(prediction: Tensor, target: Tensor, blocks: Blocks, kind: str = "smooth_l1", normalize: str = "layer") -> Tensor:
    """Mean over images of the mean over (context mask, target block) of the mean distance to the target.

    Args:
        prediction: (Q, D) predictor output, any float dtype; computed on in fp32.
        target: (U, D) targets as `targets` gives them.
        blocks: says which target row each prediction is of, and its weight.
        kind: smooth_l1 (beta 1, the official code) or l2 (the paper).
        normalize: layer (every target, without affine: the method), none, or batch, as `standardised`.

    Returns:
        fp32 scalar.
    """
    if normalize == "layer":
        return target_loss(prediction, target, blocks.target_rows, blocks.weight, kind)
    target = target.float() if normalize == "none" else standardised_targets(target.float())
    distance = F.smooth_l1_loss if kind == "smooth_l1" else F.mse_loss
    rows = distance(prediction.float(), target.index_select(0, blocks.target_rows), reduction="none").mean(dim=1)
    return (rows * blocks.weight).sum()


def standardised_targets(target: Tensor) -> Tensor:
    """(U, D) -> (U, D): every feature to mean 0 and variance 1 over the U rows of all ranks, without affine, eps 1e-5.

    Every rank must take part. The rows of a step's other micro-batches are not seen: the config refuses them.
    """
    rows = mean_over_ranks(target.new_full((), len(target)))  # a rank's, in the mean: sums are taken as means too
    centred = target - mean_over_ranks(target.sum(dim=0)) / rows
    return centred * torch.rsqrt(mean_over_ranks(centred.square().sum(dim=0)) / rows + 1e-5)
