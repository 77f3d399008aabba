"""gather_tokens: the context patches of a batch, 109 of 256 an image as the official masks leave them before the cut."""

import torch
from protocol import Inputs, Setting, beside_ours, nbytes
from torch import Tensor

from fastjepa_kernels import gather_tokens, gather_tokens_ref


def torch_gather(x: Tensor, idx: Tensor) -> Tensor:
    """Gather by an int64 index as wide as the features, as the official code does."""
    return torch.gather(x, 0, idx.long()[:, None].expand(-1, x.shape[1]))


PROVIDERS = beside_ours(gather_tokens, gather_tokens_ref, {"torch.gather": torch_gather, "indexing": lambda x, idx: x[idx]})


def make_inputs(setting: Setting) -> Inputs:
    images, width = setting.pick(cuda=(128, 1280), cpu=(64, 768), toy=(1, 96))
    x, idx = setting.randn(images * 256, width), setting.some(images * 256, images * 109)
    kept = x[: len(idx)]
    return Inputs((x, idx), [x], forward=nbytes(kept, kept, idx), backward=nbytes(kept, x, idx))


def test_gather_tokens(direction: str, bench):
    bench(make_inputs, direction)
