"""target_loss: predictions of 4 target blocks of 45 patches an image against the target encoder's normalised rows."""

import torch.nn.functional as F
from protocol import Inputs, Setting, beside_ours, nbytes
from torch import Tensor

from fastjepa_kernels.target_loss import target_loss, target_loss_ref


def normalise_then_gather(prediction: Tensor, features: Tensor, idx: Tensor, weight: Tensor) -> Tensor:
    """Normalise every feature row, take the blocks, and take one mean over all: the official order."""
    target = F.layer_norm(features, features.shape[-1:])[idx]
    return F.smooth_l1_loss(prediction, target)


PROVIDERS = beside_ours(target_loss, target_loss_ref, {"official order": normalise_then_gather})


def make_inputs(setting: Setting) -> Inputs:
    images, width = setting.pick(cuda=(128, 1280), cpu=(32, 768), toy=(1, 96))
    features, queries = setting.randn(images * 256, width), images * 180
    prediction, idx = setting.randn(queries, width), setting.some(images * 256, queries)
    weight = setting.randn(queries).float().abs()
    return Inputs(
        (prediction, features, idx, weight), [prediction],
        forward=nbytes(prediction, features[:queries], idx, weight),
        backward=nbytes(prediction, prediction, prediction, weight),  # the gradient written, then scaled by what is above
    )  # fmt: skip


def test_target_loss(direction: str, bench):
    bench(make_inputs, direction)
