"""patchify_tokens: uint8 images to the normalised rows of the context's patches, 109 of 256 an image."""

import pytest
import torch
import torch.nn.functional as F
from protocol import Inputs, Setting, beside_ours, nbytes
from torch import Tensor

from fastjepa_kernels.gather_tokens import gather_tokens_ref
from fastjepa_kernels.patchify_tokens import patchify_tokens, patchify_tokens_ref


def normalise_and_unfold(images: Tensor, idx: Tensor, mean: Tensor, std: Tensor, patch_size: int, dtype: torch.dtype) -> Tensor:
    """Normalise all pixels in fp32, unfold all patches and take the visible ones, as a trainer writes it."""
    pixels = (images.float() / 255 - mean[:, None, None]) / std[:, None, None]
    rows = F.unfold(pixels, patch_size, stride=patch_size).transpose(1, 2).flatten(0, 1)
    return gather_tokens_ref(rows, idx).to(dtype)


PROVIDERS = beside_ours(patchify_tokens, patchify_tokens_ref, {"unfold": normalise_and_unfold})
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


def make_inputs(setting: Setting, patch_size: int, layout: str) -> Inputs:
    images, side = setting.pick(cuda=(256, 16), cpu=(32, 16), toy=(1, 4))
    shape = (images, 3, side * patch_size, side * patch_size)
    pixels = torch.randint(256, shape, generator=setting.generator, device=setting.device).to(torch.uint8)
    pixels = pixels.contiguous(memory_format=LAYOUTS[layout])
    idx = setting.some(images * side**2, images * (side**2 * 109 // 256))
    mean, std = (setting.randn(3, dtype=torch.float32).abs() + 0.5 for _ in range(2))
    values = len(idx) * 3 * patch_size**2
    moved = values * (1 + torch.empty((), dtype=setting.dtype).element_size()) + nbytes(idx)
    return Inputs((pixels, idx, mean, std, patch_size, setting.dtype), forward=moved)


@pytest.mark.parametrize("patch_size", [14, 16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_patchify_tokens(layout: str, patch_size: int, bench):
    bench(lambda setting: make_inputs(setting, patch_size, layout), "forward")
