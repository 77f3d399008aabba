"""gather_tokens: the context patches of a batch, 109 of 256 an image as the official masks leave them before the cut."""

import pytest
import torch
from protocol import DIRECTIONS, Load, Setting, compiled, nbytes
from torch import Tensor

from fastjepa_kernels import gather_tokens, gather_tokens_ref


def torch_gather(x: Tensor, idx: Tensor) -> Tensor:
    """The official code's way: an int64 index as wide as the features."""
    return torch.gather(x, 0, idx.long()[:, None].expand(-1, x.shape[1]))


PROVIDERS = {
    "eager": gather_tokens_ref,
    "compiled": compiled(gather_tokens_ref),
    "torch.gather": torch_gather,
    "indexing": lambda x, idx: x[idx],
    "ours": gather_tokens,
}


def load(setting: Setting) -> Load:
    images, width = setting.pick(cuda=(128, 1280), cpu=(64, 768), toy=(1, 96))
    x, idx = setting.randn(images * 256, width), setting.some(images * 256, images * 109)
    kept = x[: len(idx)]
    return Load((x, idx), [x], forward=nbytes(kept, kept, idx), backward=nbytes(kept, x, idx))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_gather_tokens(provider: str, direction: str, bench):
    bench(PROVIDERS[provider], load, direction)
