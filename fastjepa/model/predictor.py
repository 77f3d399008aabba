"""The predictor: a narrow transformer from context features to target features."""

import torch
from torch import Tensor, nn

from fastjepa.masks.packed import Blocks, Packed
from fastjepa.model.moments import RunningMoments
from fastjepa.model.rotary import Rotation, grid_rotation
from fastjepa.model.vit import OFFICIAL_FORM, Block, NetworkForm, PredictorShape, init_weights, run_block, sincos_positions


class Predictor(nn.Module):
    """Narrow transformer from context features and masked positions to target features (paper, section 3)."""

    def __init__(self, grid: tuple[int, int], embed_dim: int, shape: PredictorShape, target_dim: int | None = None,
                 form: NetworkForm = OFFICIAL_FORM):  # fmt: skip
        """Build it; `target_dim` is the width of what is predicted, by default the encoder's."""
        super().__init__()
        dim, depth, num_heads = shape
        self.grid, self.checkpointed, self.form = grid, False, form
        self.target_moments: RunningMoments | None = None  # of the targets, where they are standardised by them
        self.predictor_embed = nn.Linear(embed_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        if not form.rotary:
            self.register_buffer("predictor_pos_embed", sincos_positions(dim, grid))  # (1, N, P)
        self.predictor_blocks = nn.ModuleList(Block(dim, num_heads, 4.0, form.qk_norm) for _ in range(depth))
        self.predictor_norm = nn.LayerNorm(dim, eps=1e-6)
        self.predictor_proj = nn.Linear(dim, target_dim or embed_dim)
        self.projector: nn.Module = nn.Identity()  # of pooled features, for a regularizer; the forward has no use for it
        self.apply(init_weights)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, features: Tensor, context: Packed, blocks: Blocks) -> Tensor:
        """Map features (T, D) of the context rows to predictions (Q, D) of the target rows, in the official order."""
        x, rotation = self.table(features, context)  # (T + N, P): every distinct row, once
        last, everything = len(self.predictor_blocks) - 1, len(blocks.queries.idx) == len(blocks.sequences.idx)
        for i, block in enumerate(self.predictor_blocks):
            queries = blocks.queries if i == last and not everything else None
            repeats = (blocks.order, blocks.starts) if i == 0 else None
            x = run_block(block, self.checkpointed, x, blocks.sequences, queries, repeats, rotation)
            if rotation is not None and i == 0:
                rotation = rotation.of_rows(blocks.sequences.idx)
        return self.predictor_proj(self.predictor_norm(x))

    def table(self, features: Tensor, context: Packed) -> tuple[Tensor, Rotation | None]:
        """Return the distinct rows of the sequences: T of the context, then N masked ones, and the rotation of either.

        With rotary positions the masked rows are all the mask token: their places are in the rotation alone.
        """
        patches = self.grid[0] * self.grid[1]
        place, seen, masked = context.idx % patches, self.predictor_embed(features), self.mask_token[0]
        if self.form.rotary:
            rotation = grid_rotation(self.predictor_blocks[0].attn.head_dim, self.grid, features.device)
            place = torch.cat((place, torch.arange(patches, dtype=place.dtype, device=place.device)))
            return torch.cat((seen, masked.expand(patches, -1))), rotation.of_rows(place)
        positions = self.predictor_pos_embed[0]
        return torch.cat((seen + positions.index_select(0, place), positions + masked)), None
