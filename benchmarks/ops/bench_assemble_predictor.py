"""assemble_predictor: the packed predictor input of a batch, 4 target blocks of 45 patches, contexts of 109."""

import pytest
import torch
from protocol import DIRECTIONS, Load, Setting, compiled, nbytes
from torch import Tensor

from fastjepa_kernels.assemble_predictor import assemble_predictor, assemble_predictor_ref
from fastjepa_kernels.gather_tokens import occurrences


def two_gathers(context: Tensor, context_idx: Tensor, positions: Tensor, mask_token: Tensor, idx: Tensor, repeats) -> Tensor:
    """As a trainer writes it: the table of contexts and mask tokens, indexed."""
    table = torch.cat((context + positions[context_idx], positions + mask_token))
    return table[idx]


PROVIDERS = {
    "eager": assemble_predictor_ref,
    "compiled": compiled(assemble_predictor_ref),
    "indexing": two_gathers,
    "ours": assemble_predictor,
}


def load(setting: Setting) -> Load:
    images, width = setting.pick(cuda=(128, 384), cpu=(64, 384), toy=(1, 96))
    rows, blocks, patches = images * 109, 4, images * 45
    context, positions, mask_token = setting.randn(rows, width), setting.randn(256, width), setting.randn(width)
    context_idx = torch.cat([setting.some(256, 109) for _ in range(images)])
    pieces = []
    for _ in range(blocks):
        targets = torch.randint(256, (patches,), generator=setting.generator, device=setting.device)
        pieces += [torch.arange(rows, device=setting.device), rows + targets]
    idx = torch.cat(pieces).int()
    out = context[:1].expand(len(idx), -1)
    return Load(
        (context, context_idx, positions, mask_token, idx, occurrences(idx, rows + 256)), [context, mask_token],
        forward=nbytes(context, context_idx, positions, mask_token, idx, out), backward=nbytes(out, context, mask_token, idx),
    )  # fmt: skip


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_assemble_predictor(provider: str, direction: str, bench):
    bench(PROVIDERS[provider], load, direction)
