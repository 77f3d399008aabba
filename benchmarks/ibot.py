"""iBOT (Zhou et al., 2022) from lightly's and timm's parts with multi-crop: 2 views of 224 and 10 of 96 pixels an image.

A teacher, the average of the student, sees both large views; the student sees them masked, and the small ones whole. One
head serves class and patch tokens, with 8192 prototypes (the settings of the published ViT-S/16).
"""

import random
from typing import NamedTuple

import torch
import vit
from torch import Tensor, nn
from work import synthetic_images

from fastjepa.config.schema import Config

GLOBAL, LOCAL, LOCAL_PATCHES = 2, 10, 6  # views an image, and the side of a small one in patches: 96 pixels
HIDDEN, BOTTLENECK, PROTOTYPES = 2048, 256, 8192
DROP_PATH, TEACHER_TEMPERATURE = 0.1, 0.07


class Views(NamedTuple):
    images: Tensor  # (2 B, C, S, S), view major
    local: Tensor  # (10 B, C, s, s)
    mask: Tensor  # (2 B, 1 + N) bool, the class token never
    rows: Tensor  # (M,) the masked among the 2 B (1 + N) tokens


class Network(nn.Module):
    """A ViT and the head that its class and masked patch tokens share."""

    def __init__(self, config: Config, norm_last_layer: bool):
        super().__init__()
        modules, _ = vit.import_libraries()
        self.encoder = vit.backbone(config, views=True)
        dim = config.encoder_shape[0]
        self.head = modules.DINOProjectionHead(dim, HIDDEN, BOTTLENECK, PROTOTYPES, norm_last_layer=norm_last_layer)

    def forward(self, images: Tensor, rows: Tensor | None = None, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(B, C, S, S) -> (B, P) logits of the class tokens and (M, P) of the tokens `rows`, if any."""
        x = self.encoder(images, mask=mask)
        if rows is None:
            return self.head(x[:, 0]), None
        return self.head(x[:, 0]), self.head(x.flatten(0, 1)[rows])


class Ibot(nn.Module):
    """iBOT; call it with a batch of `draw` for the outputs that `loss` compares."""

    def __init__(self, config: Config, device: torch.device):
        super().__init__()
        from lightly.loss import DINOLoss, IBOTPatchLoss
        from lightly.models import utils

        self.student, self.teacher = Network(config, False), Network(config, True).requires_grad_(False)
        self.teacher.load_state_dict(self.student.state_dict())
        utils.update_drop_path_rate(self.student.encoder.vit, DROP_PATH, mode="linear")
        self.networks = self.student, self.teacher
        self.encoder, self.predictor = self.student.encoder, self.student.head  # as the optimizer groups them
        self.averaged, self.grid = (self.teacher, self.student), config.grid
        self.class_loss = DINOLoss(PROTOTYPES, teacher_temp=TEACHER_TEMPERATURE)
        self.patch_loss = IBOTPatchLoss(PROTOTYPES, teacher_temp=TEACHER_TEMPERATURE)
        self.to(device)

    @staticmethod
    def draw(config: Config, device: torch.device, number: int) -> Views:
        """Draw views, half of the large ones masked in blocks of 10 to 50 %.

        Every view is an image of its own, as nothing is to be learned from them.
        """
        from lightly.models import utils

        count, side = config.data.batch_size, LOCAL_PATCHES * config.mask.patch_size
        images = synthetic_images(config, number, GLOBAL * count)
        state = random.getstate()
        random.seed(config.runtime.seed + number)  # lightly draws block masks by Python's own random numbers
        blocks = utils.random_block_mask((len(images), *config.grid))  # (2 B, rows, columns)
        random.setstate(state)
        mask = torch.cat((torch.zeros(len(images), 1, dtype=torch.bool), blocks.flatten(1)), dim=1)
        drawn = Views(images, synthetic_images(config, number, LOCAL * count, side), mask, mask.flatten().nonzero().flatten())
        return Views(*(tensor.to(device) for tensor in drawn))

    def forward(self, images: Tensor, local: Tensor, mask: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            teacher = self.teacher(images, rows)
        student = self.student(images, rows, mask)
        small, _ = self.student(local)
        return *teacher, torch.cat((student[0], small)), student[1], mask

    def loss(self, teacher: Tensor, teacher_patches: Tensor, student: Tensor, student_patches: Tensor, mask: Tensor) -> Tensor:
        between = self.class_loss(list(teacher.float().chunk(GLOBAL)), list(student.float().chunk(GLOBAL + LOCAL)))
        within = self.patch_loss(teacher_patches.float(), student_patches.float(), mask[:, 1:].unflatten(1, self.grid))
        return between + within
