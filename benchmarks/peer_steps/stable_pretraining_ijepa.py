"""stable-pretraining's I-JEPA, as its `stable_pretraining.methods.IJEPA` documents it: forward, loss, AdamW, teacher.

The library has Lightning drive these calls; here a plain loop does, which is no slower. It draws its masks in its forward
pass, one set of blocks a batch. Their sizes differ from draw to draw: seeds of the mean cost are taken, as for our masks.
"""

import torch
from peer_process import Request
from peer_steps.loop import PeerStep, adamw
from stable_pretraining.methods import IJEPA
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

TRIED = 64


class StablePretrainingStep(PeerStep):
    def __init__(self, request: Request):
        super().__init__(request)
        shape = request.shape
        vit = VisionTransformer(
            img_size=shape["size"], patch_size=shape["patch"], embed_dim=shape["width"], depth=shape["depth"],
            num_heads=shape["heads"], mlp_ratio=shape["mlp_ratio"], num_classes=0,
        )  # fmt: skip
        parts = {"predictor_embed_dim": shape["predictor_width"], "predictor_depth": shape["predictor_depth"]}
        self.model = IJEPA(vit, **parts, num_targets=len(request.batches[0][2]), ema_decay_start=self.momentum).to(self.device)
        self.optimizer, self.seeds = adamw([self.model], request), self.typical_seeds(shape)

    def typical_seeds(self, shape: dict) -> list[int]:
        """Return a seed a batch, of TRIED: those whose tokens, times the products of their network, cost nearest the mean."""
        encoder, predictor = (shape[f"{part}depth"] * shape[f"{part}width"] ** 2 for part in ("", "predictor_"))
        side, costs = shape["size"] // shape["patch"], []
        for seed in range(TRIED):
            torch.manual_seed(seed)
            drawn = self.model.masking(torch.zeros(1, side * side, 1), side, side)
            context, targets = drawn.context_idx.shape[1], drawn.target_idx.shape[1]
            costs.append(context * (encoder + predictor) + targets * predictor)
        cost = torch.tensor(costs, dtype=torch.float64)
        return (cost - cost.mean()).abs().argsort(stable=True)[: len(self.batches)].tolist()

    def loss(self, number: int) -> Tensor:
        torch.manual_seed(self.seeds[number % len(self.seeds)])
        return self.model(self.batch(number)[0]).loss

    def follow(self) -> None:
        self.model.encoder.update_teacher()


build = StablePretrainingStep
