"""iBOT (Zhou et al., 2022) of lightly's and timm's parts, with its multi-crop: 2 views of 224 and 10 of 96 pixels an image.

A teacher, the average of the student, sees both large views; the student sees them masked, and the small ones whole. One
head serves class and patch tokens, with 8192 prototypes (the settings of the published ViT-S/16).
"""

import contextlib
import random
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import vit
from torch import Tensor, nn

from fastjepa.config.schema import Config

GLOBAL, LOCAL, LOCAL_PATCHES = 2, 10, 6  # views an image, and the side of a small one in patches: 96 pixels
HIDDEN, BOTTLENECK, PROTOTYPES = 2048, 256, 8192
DROP_PATH, TEACHER_TEMPERATURE, CLIP = 0.1, 0.07, 3.0


class Views(NamedTuple):
    images: Tensor  # (2 B, C, S, S), view major
    local: Tensor  # (10 B, C, s, s)
    mask: Tensor  # (2 B, 1 + N) bool, the class token never
    rows: Tensor  # (M,) the masked among the 2 B (1 + N) tokens


class Network(nn.Module):
    """A ViT and the head that its class and masked patch tokens share."""

    def __init__(self, config: Config, norm_last_layer: bool, whole: bool):
        super().__init__()
        modules, _ = vit.parts()
        self.whole = whole
        self.encoder = vit.backbone(config, views=True)
        dim = config.encoder_shape[0]
        self.head = modules.DINOProjectionHead(dim, HIDDEN, BOTTLENECK, PROTOTYPES, norm_last_layer=norm_last_layer)

    def forward(self, images: Tensor, rows: Tensor | None = None, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(B, C, S, S) -> (B, P) logits of the class tokens and (M, P) of the tokens `rows`, if any."""
        x = self.encoder(images, mask=mask)
        if rows is None:
            return self.head(x[:, 0]), None
        if self.whole:
            logits = self.head(x)
            return logits[:, 0], logits.flatten(0, 1)[rows]
        return self.head(x[:, 0]), self.head(x.flatten(0, 1)[rows])


class Ibot(nn.Module):
    """Call it with a batch of `draw` for the outputs that `loss` compares."""

    def __init__(self, config: Config, device: torch.device, whole: bool = False):
        """`whole` gives every token of the large views to the head, masked or not, as the official code does."""
        super().__init__()
        from lightly.loss import DINOLoss, IBOTPatchLoss
        from lightly.models import utils

        self.student, self.teacher = Network(config, False, whole), Network(config, True, whole).requires_grad_(False)
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
        """Half of the large views masked in blocks, 10 to 50 % of each; views are images of their own: nothing is learned."""
        from lightly.models import utils

        count, side = config.data.batch_size, LOCAL_PATCHES * config.mask.patch_size
        images = vit.images(config, number, GLOBAL * count)
        with seeded(config.runtime.seed + number):
            blocks = utils.random_block_mask((len(images), *config.grid))  # (2 B, rows, columns)
        mask = torch.cat((torch.zeros(len(images), 1, dtype=torch.bool), blocks.flatten(1)), dim=1)
        drawn = Views(images, vit.images(config, number, LOCAL * count, side), mask, mask.flatten().nonzero().flatten())
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

    @staticmethod
    def handle(gradients: Iterable[Tensor]) -> None:
        """What the official loop does with gradients: each is clipped by itself, after its norm was read."""
        for gradient in gradients:
            if (excess := CLIP / (gradient.norm().item() + 1e-6)) < 1:
                gradient.mul_(excess)

    @staticmethod
    def flops(config: Config, batch: Views, whole: bool = False) -> float:
        """FLOPs per image of a training step."""
        dim, depth, _, mlp_ratio = config.encoder_shape
        patches, small = batch.mask.shape[1] - 1, LOCAL_PATCHES**2
        large = vit.blocks(depth, dim, mlp_ratio, GLOBAL, 1 + patches)
        local = vit.blocks(depth, dim, mlp_ratio, LOCAL, 1 + small)
        masked = GLOBAL * patches if whole else len(batch.rows) / config.data.batch_size
        head = [vit.linear(tokens, dim, HIDDEN) + vit.linear(tokens, HIDDEN, HIDDEN) + vit.linear(tokens, HIDDEN, BOTTLENECK)
                + vit.linear(tokens, BOTTLENECK, PROTOTYPES) for tokens in (GLOBAL + masked, LOCAL)]  # fmt: skip
        embed = 3 * vit.embedding(config, GLOBAL * patches) + 2 * vit.embedding(config, LOCAL * small)
        return embed + (1 + 3) * (large + head[0]) + 3 * (local + head[1])


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's own random numbers, which lightly's block masks are drawn from, and its state afterwards as it was."""
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)
