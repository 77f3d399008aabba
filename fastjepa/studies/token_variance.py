"""Parts of the energy of token features: the part that all tokens share, that a place has, that an image has, and the rest.

A predictor meets a target that all tokens have in common, or that is a function of the place alone, without a look at the
context. The share of these two parts says how much of the loss teaches nothing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjepa.data.pixels import normalise_pixels
from fastjepa.evals.images import EvalImages
from fastjepa.evals.inputs import Split, Subject, Which

VARIANCE_IMAGES, VARIANCE_BATCH = 1000, 250  # images that count, and images of one forward pass


def variance_shares(tokens: Tensor) -> dict[str, float]:
    """Return the shares of the mean square of (B, N, D) features, layer-normalised as in the loss; they add up to 1.

    common: the mean over images and places. position, image: what a place, an image adds to it. local: the rest.
    The four parts are orthogonal, so their squares add up: where one image has the numbers 3 and 1 at two places, common is
    2 and position +1 and -1, with shares of 4 / 5 and 1 / 5.
    """
    tokens = F.layer_norm(tokens.double(), tokens.shape[2:])
    common, place, image = tokens.mean(dim=(0, 1)), tokens.mean(dim=0), tokens.mean(dim=1)
    parts = {"common": common, "position": place - common, "image": image - common,
             "local": tokens - place - image[:, None] + common}  # fmt: skip
    energy = {name: float(part.square().sum(dim=-1).mean()) for name, part in parts.items()}
    return {name: value / sum(energy.values()) for name, value in energy.items()}


@torch.inference_mode()
def token_variance(subject: Subject, which: Which, split: Split) -> dict[str, float]:
    """Return the shares of an encoder's features of the split's first VARIANCE_IMAGES images, seen whole.

    Where a split lies in class folders, these are of few classes.
    """
    encoder, config = subject.encoder(which).to(subject.device), subject.config
    stream = EvalImages(split.source, subject.size, subject.pixels, split.rows[:VARIANCE_IMAGES])
    blocks = (
        normalise_pixels(pixels.to(subject.device), config.mean_std)
        for pixels in stream.batches(VARIANCE_BATCH, about="tokens")
    )
    return variance_shares(torch.cat([encoder(block).unflatten(0, (len(block), -1)) for block in blocks]).cpu())
