"""lightly's I-JEPA, in the order of its examples/pytorch/ijepa.py.

The example's IJEPAPredictor.from_vit_encoder is made for a width of 768 alone, so the predictor is IJEPAPredictorTIMM, of
the same library, which takes the width that is asked for.
"""

import copy

import torch
from lightly.models import utils
from lightly.models.modules import IJEPAPredictorTIMM
from lightly.models.modules.ijepa import IJEPABackbone
from peer_process import Request
from peer_steps.loop import PeerStep, adamw
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer


class LightlyStep(PeerStep):
    def __init__(self, request: Request):
        super().__init__(request)
        shape, (width, heads) = request.shape, (request.shape["width"], request.shape["heads"])
        vit = VisionTransformer(
            image_size=shape["size"], patch_size=shape["patch"], num_layers=shape["depth"], num_heads=heads,
            hidden_dim=width, mlp_dim=round(width * shape["mlp_ratio"]),
        )  # fmt: skip
        self.encoder = IJEPABackbone.from_vit(vit).to(self.device)
        self.predictor = IJEPAPredictorTIMM(
            num_patches=(shape["size"] // shape["patch"]) ** 2, depth=shape["predictor_depth"], mlp_dim=width,
            predictor_embed_dim=shape["predictor_width"], num_heads=heads,
        ).to(self.device)  # fmt: skip
        self.target_encoder = copy.deepcopy(self.encoder)
        self.criterion = nn.SmoothL1Loss()
        self.optimizer = adamw([self.encoder, self.predictor], request)

    def loss(self, number: int) -> Tensor:
        images, context, blocks = self.batch(number)
        masks_enc, masks_pred = [context], list(blocks)
        z = self.predictor(self.encoder(images, masks_enc), masks_enc, masks_pred)
        with torch.no_grad():
            h = self.target_encoder(images)
            h = F.layer_norm(h, (h.size(-1),))
            h = utils.apply_masks(h, masks_pred)
            h = utils.repeat_interleave_batch(h, len(images), repeat=len(masks_enc))
        return self.criterion(z, h)

    @torch.no_grad()
    def follow(self) -> None:
        for param_q, param_k in zip(self.encoder.parameters(), self.target_encoder.parameters(), strict=True):
            param_k.data.mul_(self.momentum).add_((1.0 - self.momentum) * param_q.detach().data)


build = LightlyStep
