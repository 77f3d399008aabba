"""MAE (He et al., 2022) made of lightly's and timm's parts: 75 % of patches masked, an 8 x 512 decoder, normalised pixels."""

import torch
import torch.nn.functional as F
import vit
from torch import Tensor, nn
from work import synthetic_images

from fastjepa.config.schema import Config
from fastjepa.model.vit import sincos_positions

MASKED, WIDTH, DEPTH, HEADS = 0.75, 512, 8, 16  # the decoder of the paper, for every encoder


class Decoder(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        modules, _ = vit.import_libraries()
        self.embed = nn.Linear(config.encoder_shape[0], WIDTH)
        rows, columns = config.grid
        self.decoder = modules.MaskedVisionTransformerDecoderTIMM(rows * columns, WIDTH, DEPTH, HEADS)
        self.pixels = nn.Linear(WIDTH, config.data.channels * config.mask.patch_size**2)

    def forward(self, features: Tensor, keep: Tensor, masked: Tensor) -> Tensor:
        """features: (B, 1 + K, D) of the tokens keep -> (B, M, p p C) for the tokens masked; 0 is the class token."""
        from lightly.models import utils

        x = utils.repeat_token(self.decoder.mask_token, (len(features), self.decoder.sequence_length))
        x = self.decoder(utils.set_at_index(x, keep, self.embed(features).type_as(x)))
        return self.pixels(utils.get_at_index(x, masked))


class Mae(nn.Module):
    """MAE; call it with a batch of `draw` for the outputs that `loss` compares."""

    averaged = None  # nothing follows the weights

    def __init__(self, config: Config, device: torch.device):
        super().__init__()
        self.patch = config.mask.patch_size
        positions = sincos_positions(config.encoder_shape[0], config.grid)
        self.encoder = vit.backbone(config, positions=F.pad(positions, (0, 0, 1, 0)))
        self.predictor = Decoder(config)
        self.networks = self.encoder, self.predictor
        self.encoder.mask_token.requires_grad_(False)  # lightly's, which nothing here uses
        self.to(device)

    @staticmethod
    def draw(config: Config, device: torch.device, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return (B, C, H, W) images, (B, 1 + K) tokens kept, the class token first, and (B, M) tokens masked."""
        from lightly.models import utils

        images, (rows, columns) = synthetic_images(config, number, config.data.batch_size), config.grid
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.runtime.seed + number)
            keep, masked = utils.random_token_mask((len(images), 1 + rows * columns), mask_ratio=MASKED)
        return images.to(device), keep.to(device), masked.to(device)

    def forward(self, images: Tensor, keep: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        from lightly.models import utils

        prediction = self.predictor(self.encoder(images, idx_keep=keep), keep, masked)
        patches = utils.get_at_index(utils.patchify(images, self.patch), masked - 1)
        return prediction, utils.normalize_mean_var(patches, dim=-1)

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(prediction.float(), target)
