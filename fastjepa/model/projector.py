"""Pooled features and the projector between them and a regularizer."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastjepa.errors import UserError
from fastjepa.masks.packed import Packed

PROJECTOR_PREFIX = "projector."  # of its parameters among the predictor's


def pool_sequences(features: Tensor, sequences: Packed) -> Tensor:
    """Return the fp32 mean of each sequence: (T, D) -> (S, D).

    Example: rows 1, 3, 5 with cu_seqlens 0, 2, 3 belong to sequences 0, 0, 1 and have the means 2, 5.
    """
    lengths = sequences.cu_seqlens.diff()
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=features.device), lengths, output_size=len(features))
    sums = features.new_zeros(len(lengths), features.shape[1], dtype=torch.float32).index_add(0, owner, features.float())
    return sums / lengths[:, None]


def build_projector(dim: int, widths: Sequence[int]) -> nn.Module:
    """Return lightly's MLP from (S, dim) to (S, widths[-1]): layer norm and ReLU after each linear layer but the last.

    With two equal hidden widths it is the local head of VICRegL (Bardes et al., 2022). LeJEPA's head has batch norm there,
    whose statistics would be those of a micro-batch of one rank.
    """
    try:
        from lightly.models.modules.heads import ProjectionHead
    except ImportError as error:
        raise UserError("loss.projector: needs lightly; pip install 'fastjepa[lightly]', or leave it out") from error
    *hidden, last = zip((dim, *widths), widths, strict=False)
    return ProjectionHead([*((a, b, nn.LayerNorm(b), nn.ReLU()) for a, b in hidden), (*last, None, None)])


def without_projector(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a predictor that predictions need."""
    return {name: tensor for name, tensor in weights.items() if not name.startswith(PROJECTOR_PREFIX)}
