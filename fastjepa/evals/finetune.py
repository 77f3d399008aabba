"""Fine-tuning of the whole encoder on labels, all of them or few.

The published recipe (paper, appendix A.2): AdamW, 50 epochs, batch 512, cosine to 0, learning rate 3e-5, weight decay 0.05
(0.4 from ViT-H up), layer decay 0.75, label smoothing 0.1, RandAugment after a random resized crop and a flip; no mixup,
cutmix, erasing or drop path. The classifier is a linear layer, zero at the start, on the mean over patches. Nothing smaller
than a ViT-L is published, so two rules are ours: learning rate 1e-3 below width 768, and blocks of a 25th of the images
where they are fewer than 12,800, so that an epoch keeps the 25 steps of 1 % of ImageNet.
"""

import copy
import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastjepa.data.pixels import MeanStd, normalise_pixels
from fastjepa.data.prepare.processes import console
from fastjepa.errors import UserError
from fastjepa.evals.augment import Augment
from fastjepa.evals.images import EvalImages
from fastjepa.evals.inputs import Split, Subject, provenance
from fastjepa.evals.request import EvalRequest
from fastjepa.evals.scoring import Features, Result, check_labels
from fastjepa.evals.supervised import SupervisedTask, supervised_accuracy
from fastjepa.model.vit import use_auto_attention

FINETUNE_EPOCHS, FINETUNE_BATCH, MIN_EPOCH_STEPS, LAYER_DECAY, LABEL_SMOOTHING = 50, 512, 25, 0.75, 0.1
CPU_IMAGES = 250_000  # images that a training sees on a CPU when --epochs is left out: minutes, not days


@dataclass(frozen=True)
class FinetuneOptions:
    """Settings in place of the recipe's; None leaves the recipe's."""

    lrs: Sequence[float] | None = None  # of several, the best on a sixth of the training images is taken
    weight_decay: float | None = None
    epochs: int | None = None
    batch: int | None = None
    layer_decay: float | None = None


class Classifier(nn.Module):
    """An encoder, the mean over its patches, and a linear layer."""

    def __init__(self, encoder: nn.Module, classes: int, mean_std: MeanStd):
        super().__init__()
        self.encoder, self.mean_std = encoder.requires_grad_(True), mean_std
        self.head = nn.Linear(encoder.embed_dim, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (b, classes) of images (b, C, H, W) as they are decoded."""
        return self.head(self.encoder.features(normalise_pixels(images, self.mean_std)).mean(dim=1))

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Number the layers for timm's layer decay: patch embedding 0, block i is i + 1, norm and head share the last."""
        return {"stem": r"^encoder\.patch_embed", "blocks": r"^encoder\.blocks\.(\d+)"}


def layer_decayed_adamw(classifier: Classifier, lr: float, weight_decay: float, layer_decay: float) -> torch.optim.AdamW:
    """Build AdamW: each layer's learning rate is `layer_decay` times that of the one above; biases and norms do not decay."""
    try:
        from timm.optim import param_groups_layer_decay
    except ImportError as error:
        raise UserError("fine-tuning needs timm; run: pip install 'fastjepa[eval]'") from error
    groups = param_groups_layer_decay(classifier, weight_decay=weight_decay, layer_decay=layer_decay)
    return torch.optim.AdamW([group | {"lr": lr * group["lr_scale"]} for group in groups], lr=lr)


def finetune_accuracy(
    subject: Subject,
    encoder: nn.Module,
    splits: tuple[Split, Split],
    options: FinetuneOptions = FinetuneOptions(),
    seed: int = 0,
) -> tuple[Result, dict[str, Any]]:
    """Fine-tune copies of `encoder` on the training split; return the result, and the setting it was reached with."""
    train, test = splits
    setting = finetune_recipe(options, encoder.embed_dim, len(train.rows), subject.device)
    mean_std = subject.config.mean_std
    if not subject.pixels.are_pictures:
        console.print("images are no pictures of 8 bits: RandAugment moves, shears and turns them, and leaves their values")
    train_images, test_images = (EvalImages(split.source, subject.size, subject.pixels, split.rows) for split in splits)
    labelled = [Features(torch.empty(len(images), 0), images.labels()) for images in (train_images, test_images)]
    check_labels(*labelled, len(train.source.classes))
    use_auto_attention(encoder, subject.device, subject.dtype)

    def build(lr: float) -> tuple[nn.Module, torch.optim.Optimizer]:
        copied = copy.deepcopy(encoder)
        classifier = Classifier(copied, len(train.source.classes), mean_std).to(subject.device)
        return classifier, layer_decayed_adamw(classifier, lr, setting.weight_decay, setting.layer_decay)

    def inputs(places: Tensor, epoch: int | None) -> Iterable[Tensor]:
        view = None if epoch is None else Augment(seed, epoch, rand_augment=True, pixels=subject.pixels)
        images = EvalImages(train.source, subject.size, subject.pixels, train.rows[places.numpy()], view)
        about = "validation" if epoch is None else f"epoch {epoch + 1} of {setting.epochs}"
        return (block.to(subject.device) for block in images.batches(setting.batch, about))

    def test_inputs() -> Iterable[Tensor]:
        return (block.to(subject.device) for block in test_images.batches(setting.batch, "test"))

    course = setting.epochs, setting.batch, subject.dtype, LABEL_SMOOTHING
    task, used = SupervisedTask(*labelled, build, inputs, test_inputs, *course), dataclasses.asdict(setting)
    key = {"probe": "finetune", "seed": seed} | used | subject.encoder_key(encoder) | train.key
    with subject.unfinished(key) as states:
        return supervised_accuracy(task, setting.lrs, seed, states), used


def finetune_recipe(given: FinetuneOptions, dim: int, n: int, device: torch.device) -> FinetuneOptions:
    """Fill in what is None, for an encoder of width `dim` and `n` training images."""
    epochs, batch = given.epochs, given.batch or min(FINETUNE_BATCH, math.ceil(n / MIN_EPOCH_STEPS))
    if epochs is None:
        epochs = FINETUNE_EPOCHS if device.type != "cpu" else max(1, min(FINETUNE_EPOCHS, CPU_IMAGES // n))
        if epochs < FINETUNE_EPOCHS:
            console.print(f"on a CPU: {epochs} epochs in place of the published {FINETUNE_EPOCHS}; --epochs says otherwise")
    lrs = list(given.lrs or [3e-5 if dim >= 768 else 1e-3])
    weight_decay = (0.4 if dim >= 1280 else 0.05) if given.weight_decay is None else given.weight_decay
    layer_decay = LAYER_DECAY if given.layer_decay is None else given.layer_decay
    return FinetuneOptions(lrs, weight_decay, epochs, batch, layer_decay)


def evaluate_finetune(request: EvalRequest, options: FinetuneOptions = FinetuneOptions()) -> dict[str, Any]:
    """Fine-tune one encoder on all labels and return the row that `fastjepa eval finetune` prints.

    Interrupted, the same call goes on after the last epoch that was finished.
    """
    splits, subject = request.splits(), request.subject()
    result, used = finetune_accuracy(subject, subject.encoder(request.encoder, splits[0]), splits, options, request.seed)
    said = {"probe": "finetune", "protocol": "finetune", **used}
    return provenance(subject, request.encoder, splits, request.seed) | said | result.to_dict()
