"""scatter_tokens: the un-shuffle of MAE's decoder, a quarter of 256 tokens placed, mask tokens elsewhere, positions added."""

import torch
from protocol import Inputs, Setting, beside_ours, nbytes
from torch import Tensor

from fastjepa_kernels import scatter_tokens, scatter_tokens_ref


def mae_unshuffle(x: Tensor, idx: Tensor, num_rows: int, fill: Tensor, positions: Tensor) -> Tensor:
    """Concatenate mask tokens, then gather once by the inverse of the shuffle, as MAE does."""
    blank = torch.ones(num_rows, dtype=torch.bool, device=idx.device)
    blank[idx] = False
    order = torch.cat((idx.long(), blank.nonzero_static(size=num_rows - len(idx))[:, 0]))
    tokens = torch.cat((x, fill.to(x.dtype).expand(num_rows - len(idx), -1)))
    tokens = torch.gather(tokens, 0, order.argsort()[:, None].expand(-1, x.shape[1]))
    return (tokens.view(-1, *positions.shape) + positions).flatten(0, 1)


PROVIDERS = beside_ours(scatter_tokens, scatter_tokens_ref, {"MAE un-shuffle": mae_unshuffle})


def make_inputs(setting: Setting) -> Inputs:
    images, width = setting.pick(cuda=(256, 512), cpu=(64, 512), toy=(1, 96))
    rows = images * 256
    x, idx = setting.randn(rows // 4, width), setting.some(rows, rows // 4)
    fill, positions = setting.randn(width), setting.randn(256, width)
    written = x[:1].expand(rows, -1)
    return Inputs(
        (x, idx, rows, fill, positions), [x, fill],
        forward=nbytes(x, idx, fill, positions, written), backward=nbytes(written, x, idx, fill),
    )  # fmt: skip


def test_scatter_tokens(direction: str, bench):
    bench(make_inputs, direction)
