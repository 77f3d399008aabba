"""The predictor: a narrow transformer from context features to target features."""

import torch
from torch import Tensor, nn

from fastjepa.masks.packed import Blocks, Packed
from fastjepa.model.moments import RunningMoments
from fastjepa.model.vit import Block, init_weights, run_block, sincos_positions


class Predictor(nn.Module):
    """Narrow transformer from context features and masked positions to target features (paper, section 3)."""

    def __init__(self, grid: tuple[int, int], embed_dim: int, dim: int, depth: int, num_heads: int,
                 target_dim: int | None = None):  # fmt: skip
        """Build it; `target_dim` is the width of what is predicted, by default the encoder's."""
        super().__init__()
        self.checkpointed = False
        self.target_moments: RunningMoments | None = None  # of the targets, where they are standardised by them
        self.predictor_embed = nn.Linear(embed_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("predictor_pos_embed", sincos_positions(dim, grid))  # (1, N, P)
        self.predictor_blocks = nn.ModuleList(Block(dim, num_heads, 4.0) for _ in range(depth))
        self.predictor_norm = nn.LayerNorm(dim, eps=1e-6)
        self.predictor_proj = nn.Linear(dim, target_dim or embed_dim)
        self.apply(init_weights)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, features: Tensor, context: Packed, blocks: Blocks) -> Tensor:
        """Map features (T, D) of the context rows to predictions (Q, D) of the target rows, in the official order."""
        positions = self.predictor_pos_embed[0]
        seen = self.predictor_embed(features) + positions.index_select(0, context.idx % len(positions))
        table = torch.cat((seen, positions + self.mask_token[0]))  # (T + N, P): every distinct row, once
        last, everything = len(self.predictor_blocks) - 1, len(blocks.queries.idx) == len(blocks.sequences.idx)
        x = table
        for i, block in enumerate(self.predictor_blocks):
            queries = blocks.queries if i == last and not everything else None
            repeats = (blocks.order, blocks.starts) if i == 0 else None
            x = run_block(block, self.checkpointed, x, blocks.sequences, queries, repeats)
        return self.predictor_proj(self.predictor_norm(x))
