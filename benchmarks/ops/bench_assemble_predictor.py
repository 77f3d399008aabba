"""assemble_predictor: the packed predictor input of a batch, 4 target blocks of 45 patches, contexts of 109."""

import torch
from protocol import Inputs, Setting, beside_ours, nbytes
from torch import Tensor

from fastjepa_kernels.assemble_predictor import assemble_predictor, assemble_predictor_ref
from fastjepa_kernels.gather_tokens import occurrences


def two_gathers(context: Tensor, context_idx: Tensor, positions: Tensor, mask_token: Tensor, idx: Tensor, repeats) -> Tensor:
    """Index the table of contexts and mask tokens, as a trainer writes it."""
    table = torch.cat((context + positions[context_idx], positions + mask_token))
    return table[idx]


PROVIDERS = beside_ours(assemble_predictor, assemble_predictor_ref, {"indexing": two_gathers})


def make_inputs(setting: Setting) -> Inputs:
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
    return Inputs(
        (context, context_idx, positions, mask_token, idx, occurrences(idx, rows + 256)), [context, mask_token],
        forward=nbytes(context, context_idx, positions, mask_token, idx, out), backward=nbytes(out, context, mask_token, idx),
    )  # fmt: skip


def test_assemble_predictor(direction: str, bench):
    bench(make_inputs, direction)
