"""Fine-tuning of the whole encoder on labels, all of them or few.

The published recipe (paper, appendix A.2): AdamW, 50 epochs, batch 512, cosine to 0, learning rate 3e-5, weight decay 0.05
(0.4 from ViT-H up), layer decay 0.75, label smoothing 0.1, RandAugment after a random resized crop and a flip; no mixup,
cutmix, erasing or drop path. The classifier is a linear layer, zero at the start, on the mean over patches. Ours, because
nothing smaller than a ViT-L is published: learning rate 1e-3 below width 768, and blocks of a 25th of the images where
they are fewer than 12,800, so that an epoch keeps the 25 steps of 1 % of ImageNet.
"""

import copy
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastjepa.data.prepare.processes import console
from fastjepa.errors import ConfigError
from fastjepa.evals.augment import Augment
from fastjepa.evals.images import EvalImages, MeanStd, normalise_pixels
from fastjepa.evals.inputs import Split, Subject, open_splits, open_subject, provenance
from fastjepa.evals.scoring import Features, Result, check_labels
from fastjepa.evals.supervised import SupervisedTask, supervised_accuracy
from fastjepa.model.vit import choose_attention, use_attention
from fastjepa.weights.encoders import Which

FINETUNE_EPOCHS, FINETUNE_BATCH, LR_STEPS, LAYER_DECAY, LABEL_SMOOTHING = 50, 512, 25, 0.75, 0.1
CPU_IMAGES = 250_000  # that a training sees on a CPU when --epochs is left out: minutes, not days


class Classifier(nn.Module):
    """An encoder, its patches averaged, and a linear layer."""

    def __init__(self, encoder: nn.Module, classes: int, mean_std: MeanStd):
        super().__init__()
        self.encoder, self.mean_std = encoder.requires_grad_(True), mean_std
        self.head = nn.Linear(encoder.embed_dim, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """(b, C, H, W) uint8 -> logits (b, classes)"""
        return self.head(self.encoder.features(normalise_pixels(images, self.mean_std)).mean(dim=1))

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """What timm's layer decay asks for: the patch embedding is layer 0, block i is i + 1, norm and head share the last."""
        return {"stem": r"^encoder\.patch_embed", "blocks": r"^encoder\.blocks\.(\d+)"}


def layer_decayed_adamw(classifier: Classifier, lr: float, weight_decay: float, layer_decay: float) -> torch.optim.AdamW:
    """Each layer's learning rate is `layer_decay` times that of the one above; biases and 1-d parameters are not decayed."""
    try:
        from timm.optim import param_groups_layer_decay
    except ImportError as error:
        raise ConfigError("fine-tuning needs timm; run: pip install 'fastjepa[eval]'") from error
    groups = param_groups_layer_decay(classifier, weight_decay=weight_decay, layer_decay=layer_decay)
    return torch.optim.AdamW([group | {"lr": lr * group["lr_scale"]} for group in groups], lr=lr)


def finetune_accuracy(
    subject: Subject,
    encoder: nn.Module,
    splits: tuple[Split, Split],
    seed: int = 0,
    lrs: Sequence[float] | None = None,
    weight_decay: float | None = None,
    layer_decay: float | None = None,
    epochs: int | None = None,
    batch: int | None = None,
) -> tuple[Result, dict[str, Any]]:
    """Fine-tune copies of `encoder` on the training split: the result, and the setting it was reached with.

    Args:
        lrs, weight_decay, layer_decay, epochs, batch: None for the recipe's, see above; of several learning rates, one is
            chosen on a sixth of the training images.
    """
    train, test = splits
    setting = finetune_recipe(encoder.embed_dim, len(train.rows), subject.device, lrs, weight_decay, epochs, batch)
    setting["layer_decay"] = LAYER_DECAY if layer_decay is None else layer_decay
    channels, mean_std = subject.config.data.channels, subject.config.mean_std
    train_images, test_images = (EvalImages(split.source, subject.size, channels, split.rows) for split in splits)
    labelled = [Features(torch.empty(len(images), 0), images.labels()) for images in (train_images, test_images)]
    check_labels(*labelled, len(train.source.classes))
    use_attention(encoder, choose_attention("auto", subject.device, subject.dtype))

    def build(lr: float) -> tuple[nn.Module, torch.optim.Optimizer]:
        copied = copy.deepcopy(encoder)
        classifier = Classifier(copied, len(train.source.classes), mean_std).to(subject.device)
        return classifier, layer_decayed_adamw(classifier, lr, setting["weight_decay"], setting["layer_decay"])

    def inputs(places: Tensor, epoch: int | None) -> Iterable[Tensor]:
        view = None if epoch is None else Augment(seed, epoch, rand_augment=True)
        images = EvalImages(train.source, subject.size, channels, train.rows[places.numpy()], view)
        about = "validation" if epoch is None else f"epoch {epoch + 1} of {setting['epochs']}"
        return classifier_device(subject.device, images.batches(setting["batch"], about=about))

    task = SupervisedTask(
        *labelled, build, inputs,
        lambda: classifier_device(subject.device, test_images.batches(setting["batch"], about="test")),
        setting["epochs"], setting["batch"], subject.dtype, LABEL_SMOOTHING,
    )  # fmt: skip
    key = {"probe": "finetune", "seed": seed} | setting | subject.encoder_key(encoder) | train.key
    with subject.unfinished(key) as states:
        return supervised_accuracy(task, setting["lrs"], seed, states), setting


def classifier_device(device: torch.device, blocks: Iterable[Tensor]) -> Iterable[Tensor]:
    return (block.to(device) for block in blocks)


def finetune_recipe(
    dim: int,
    n: int,
    device: torch.device,
    lrs: Sequence[float] | None,
    weight_decay: float | None,
    epochs: int | None,
    batch: int | None,
) -> dict[str, Any]:
    """The setting for an encoder of width `dim` and `n` training images, what is None filled in."""
    if epochs is None:
        epochs = FINETUNE_EPOCHS if device.type != "cpu" else max(1, min(FINETUNE_EPOCHS, CPU_IMAGES // n))
        if epochs < FINETUNE_EPOCHS:
            console.print(f"on a CPU: {epochs} epochs in place of the published {FINETUNE_EPOCHS}; --epochs says otherwise")
    return {
        "lrs": list(lrs or ((3e-5 if dim >= 768 else 1e-3),)),
        "weight_decay": (0.4 if dim >= 1280 else 0.05) if weight_decay is None else weight_decay,
        "epochs": epochs,
        "batch": batch or min(FINETUNE_BATCH, math.ceil(n / LR_STEPS)),
    }


def evaluate_finetune(
    checkpoint: str | Path,
    data: str,
    encoder: Which = "target",
    n_train: int | None = None,
    n_test: int | None = None,
    device: str = "auto",
    cache: bool = True,
    seed: int = 0,
    *,
    image_size: int | None = None,
    **setting: Any,
) -> dict[str, Any]:
    """Fine-tuning on all labels: what `fastjepa eval finetune` prints; arguments and row as of `table.run`, and `finetune`.

    Interrupted, the same call goes on after the last epoch that was finished.
    """
    splits = open_splits(data, n_train, n_test, seed)
    subject = open_subject(checkpoint, device, cache, image_size)
    result, used = finetune_accuracy(subject, subject.encoder(encoder, splits[0]), splits, seed=seed, **setting)
    said = {"probe": "finetune", "protocol": "finetune", **used}
    return provenance(subject, encoder, splits, seed) | said | result.to_dict()
