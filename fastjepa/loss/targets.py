"""What the predictor is to predict, by `loss.target`: (target encoder, micro-batch) -> (U, target_dim), without gradient.

The loss normalises it.
"""

import torch
from torch import Tensor

from fastjepa.loader.batch import Batch
from fastjepa.model.vit import Encoder
from fastjepa_kernels import patchify_tokens


def output_targets(target_encoder: Encoder, batch: Batch) -> Tensor:
    """The method: the target encoder sees the whole image; its output on the U rows that are in any target block."""
    return target_encoder(batch.images, wanted=batch.target)


def masked_input_targets(target_encoder: Encoder, batch: Batch) -> Tensor:
    """It sees the patches of one target block alone, a sequence each; its output, block by block (paper, appendix)."""
    return target_encoder(batch.images, batch.target)


def pixel_targets(target_encoder: Encoder, batch: Batch) -> Tensor:
    """The C * p * p values of each of the U patches, of normalised images, in fp32; the target encoder is not run.

    With loss.normalize layer each patch then has mean 0 and variance 1, as in MAE (He et al., 2022), with an eps of 1e-5.
    """
    embed = target_encoder.patch_embed
    mean_std = (None, None) if batch.images.is_floating_point() else (embed.mean, embed.std)
    return patchify_tokens(batch.images, batch.target.idx, *mean_std, embed.patch_size, torch.float32)


TARGETS_OF = {"output": output_targets, "input": masked_input_targets, "pixels": pixel_targets}
