"""target_loss: predictions of 4 target blocks of 45 patches an image against the target encoder's normalised rows."""

import pytest
import torch.nn.functional as F
from protocol import DIRECTIONS, Load, Setting, compiled, nbytes
from torch import Tensor

from fastjepa_kernels.target_loss import target_loss, target_loss_ref


def normalise_then_gather(prediction: Tensor, features: Tensor, idx: Tensor, weight: Tensor) -> Tensor:
    """The official order: every feature row normalised, the blocks taken, one mean over all."""
    target = F.layer_norm(features, features.shape[-1:])[idx]
    return F.smooth_l1_loss(prediction, target)


PROVIDERS = {
    "eager": target_loss_ref,
    "compiled": compiled(target_loss_ref),
    "official order": normalise_then_gather,
    "ours": target_loss,
}


def load(setting: Setting) -> Load:
    images, width = setting.pick(cuda=(128, 1280), cpu=(32, 768), toy=(1, 96))
    features, queries = setting.randn(images * 256, width), images * 180
    prediction, idx = setting.randn(queries, width), setting.some(images * 256, queries)
    weight = setting.randn(queries).float().abs()
    return Load(
        (prediction, features, idx, weight), [prediction],
        forward=nbytes(prediction, features[:queries], idx, weight),
        backward=nbytes(prediction, prediction, prediction, weight),  # the gradient written, then scaled by what is above
    )  # fmt: skip


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_target_loss(provider: str, direction: str, bench):
    bench(PROVIDERS[provider], load, direction)
