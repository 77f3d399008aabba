"""What token features are made of: the parts of their energy that images share, that places share, and the rest.

A predictor meets most of a target that all tokens have in common, or that is a function of the place alone, without a look
at the context; that share says how much of the loss is no lesson.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjepa.evals.images import EvalImages, normalise_pixels
from fastjepa.evals.inputs import Split, Subject, Which

VARIANCE_IMAGES, VARIANCE_BATCH = 1000, 250


def variance_shares(tokens: Tensor) -> dict[str, float]:
    """Of (B, N, D) features, normalised over D as the loss has them: shares of their mean square, which add up to 1.

    common: of the mean over images and places; position, image: of what a place, an image adds to it; local: of the rest.
    """
    tokens = F.layer_norm(tokens.double(), tokens.shape[2:])
    common, place, image = tokens.mean(dim=(0, 1)), tokens.mean(dim=0), tokens.mean(dim=1)
    parts = {"common": common, "position": place - common, "image": image - common,
             "local": tokens - place - image[:, None] + common}  # fmt: skip
    energy = {name: float(part.square().sum(dim=-1).mean()) for name, part in parts.items()}
    return {name: value / sum(energy.values()) for name, value in energy.items()}


@torch.inference_mode()
def token_variance(subject: Subject, which: Which, split: Split) -> dict[str, float]:
    """The shares of an encoder's features of the split's first IMAGES images, whole."""
    encoder, config = subject.encoder(which).to(subject.device), subject.config
    stream = EvalImages(split.source, subject.size, config.data.channels, split.rows[:VARIANCE_IMAGES])
    blocks = (
        normalise_pixels(pixels.to(subject.device), config.mean_std)
        for pixels in stream.batches(VARIANCE_BATCH, about="tokens")
    )
    return variance_shares(torch.cat([encoder(block).unflatten(0, (len(block), -1)) for block in blocks]).cpu())
