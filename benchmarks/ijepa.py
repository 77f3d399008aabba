"""I-JEPA on timm's ViT: dense batches, every block finished for every token, as the official code has it.

The parameter names are those of `fastjepa.model`, so that weights go from one to the other.
"""

import numpy as np
import torch
import torch.nn.functional as F
import vit
from torch import Tensor, nn
from work import Work

from fastjepa.config.schema import Config
from fastjepa.masks.draw import draw_masks
from fastjepa.masks.layouts import Masking
from fastjepa.model.vit import init_weights, sincos_positions
from fastjepa.plan.flops import official_flops
from fastjepa.plan.plan import workload_of

GROUP = 128  # the official batch of a GPU: that many images share a cut, however few of them are measured
TRIED = 64


def draw_work(config: Config, device: torch.device, number: int) -> Work:
    """Draw a batch whose contexts are cut to the shortest of GROUP images (more, where the batch has more)."""
    return Work.draw(config, device, number, group=-(-config.data.batch_size // GROUP) * GROUP)


def typical_batches(config: Config, count: int) -> list[int]:
    """Return the numbers of the `count` batches, among the first TRIED, whose FLOPs are nearest the mean of them all.

    Masks differ in size from step to step, and so do the FLOPs.
    """
    drawn = [draw_masks(Masking.of(config), n, range(1), GROUP) for n in range(TRIED)]
    cost = np.array([official_flops(workload_of(config), *(mask.sum(axis=2).mean() for mask in pair)).total for pair in drawn])
    return np.argsort(np.abs(cost - cost.mean()), kind="stable")[:count].tolist()


class Predictor(nn.Module):
    """fastjepa.model.Predictor over whole sequences, of timm's blocks."""

    def __init__(self, config: Config):
        super().__init__()
        _, vision_transformer = vit.import_libraries()
        dim, _, heads, _ = config.encoder_shape
        width, heads = config.meta.pred_emb_dim, config.meta.pred_num_heads or heads
        self.predictor_embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("predictor_pos_embed", sincos_positions(width, config.grid))
        self.predictor_blocks = nn.Sequential(
            *(vision_transformer.Block(width, heads, qkv_bias=True, norm_layer=vit.NORM) for _ in range(config.meta.pred_depth))
        )
        self.predictor_norm = vit.NORM(width)
        self.predictor_proj = nn.Linear(width, dim)
        self.apply(init_weights)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, features: Tensor, context: Tensor, blocks: Tensor) -> Tensor:
        """features: (B, L, D) of the patches context (B, L); blocks: (R, B, K) -> (R * B, K, D), block major."""
        positions = self.predictor_pos_embed[0]
        seen = self.predictor_embed(features) + positions[context]
        asked = (self.mask_token + positions[blocks.flatten(0, 1)]).to(seen.dtype)  # (R * B, K, P)
        x = torch.cat((seen.repeat(len(blocks), 1, 1), asked), dim=1)
        x = self.predictor_norm(self.predictor_blocks(x))
        return self.predictor_proj(x[:, seen.shape[1] :])


class IJepa(nn.Module):
    """I-JEPA; call it with a batch of `draw` for the outputs that `loss` compares."""

    def __init__(self, config: Config, device: torch.device):
        super().__init__()
        positions = sincos_positions(config.encoder_shape[0], config.grid)
        self.encoder = vit.backbone(config, class_token=False, positions=positions)
        self.predictor = Predictor(config)
        self.target_encoder = vit.backbone(config, class_token=False, positions=positions).requires_grad_(False)
        self.target_encoder.load_state_dict(self.encoder.state_dict())
        self.encoder.mask_token.requires_grad_(False)  # lightly's, which nothing here uses
        self.networks = self.encoder, self.predictor, self.target_encoder
        self.averaged = self.target_encoder, self.encoder
        self.to(device)

    @staticmethod
    def draw(config: Config, device: torch.device, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return (B, C, H, W) images, (B, L) context and (R, B, K) target patches, both in raster order."""
        drawn = draw_work(config, device, number)
        (context,), blocks = drawn.indices(drawn.context_mask), drawn.indices(drawn.target_mask)
        return drawn.images, context, torch.stack(blocks)

    def forward(self, images: Tensor, context: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            target = self.target_encoder(images)
        prediction = self.predictor(self.encoder(images, idx_keep=context), context, blocks)
        wanted = blocks.flatten(0, 1)[:, :, None].expand(-1, -1, target.shape[2])
        return prediction, F.layer_norm(target.float(), target.shape[2:]).repeat(len(blocks), 1, 1).gather(1, wanted)

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.smooth_l1_loss(prediction.float(), target)
