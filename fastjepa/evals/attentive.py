"""The attentive probe (V-JEPA, Bardes et al. 2024): one cross-attention block with a learned query over frozen patch features.

AdamW with learning rate 1e-3 and weight decay 1e-3 for 20 epochs, as published. Ours: batches of 256, a cosine to 0, and no
augmentation. Nothing is chosen unless several learning rates are given, and then on training images.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastjepa.evals.inputs import open_splits, open_subject, provenance
from fastjepa.evals.patch_features import PatchFeatures, patch_features_of
from fastjepa.evals.scoring import Result, check_labels
from fastjepa.evals.supervised import SupervisedTask, TrainedStates, supervised_accuracy
from fastjepa.weights.encoders import Which

PROBE_LR, PROBE_WEIGHT_DECAY, PROBE_EPOCHS, PROBE_BATCH = 1e-3, 1e-3, 20, 256


class AttentiveProbe(nn.Module):
    """A query attends to all patches, an MLP follows, both beside a residual; then a linear layer.

    Args:
        dim: width of the features and of the probe.
        heads: of the attention.
    """

    def __init__(self, dim: int, heads: int, classes: int):
        super().__init__()
        self.query = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.norm1 = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.head = nn.Linear(dim, classes)

    def forward(self, patches: Tensor) -> Tensor:
        """(b, N, D) -> logits (b, C)"""
        seen = self.norm1(patches.to(self.query.dtype))
        query = self.query.expand(len(patches), -1, -1)
        pooled = query + self.attention(query, seen, seen, need_weights=False)[0]  # (b, 1, D)
        pooled = pooled + self.mlp(self.norm2(pooled))
        return self.head(pooled[:, 0])


def attentive_accuracy(
    train: PatchFeatures,
    test: PatchFeatures,
    classes: int,
    heads: int,
    seed: int = 0,
    device: str | torch.device = "cpu",
    lrs: Sequence[float] = (PROBE_LR,),
    weight_decay: float = PROBE_WEIGHT_DECAY,
    epochs: int = PROBE_EPOCHS,
    batch: int = PROBE_BATCH,
    dtype: torch.dtype = torch.float32,
    states: TrainedStates = lambda name: None,
) -> Result:
    """Accuracy of an attentive probe of `heads` heads on `test`."""
    check_labels(train, test, classes)
    dim = next(iter(train.read(torch.arange(1), 1, "width"))).shape[-1]

    def build(lr: float) -> tuple[nn.Module, torch.optim.Optimizer]:
        probe = AttentiveProbe(dim, heads, classes).to(device)
        return probe, torch.optim.AdamW(probe.parameters(), lr=lr, weight_decay=weight_decay)

    def inputs(rows: Tensor, epoch: int | None):
        return train.read(rows, batch, "validation" if epoch is None else f"epoch {epoch + 1} of {epochs}")

    task = SupervisedTask(train, test, build, inputs, lambda: test.read(torch.arange(len(test.y)), batch, "test"),
                           epochs, batch, dtype)  # fmt: skip
    return supervised_accuracy(task, lrs, seed, states)


def evaluate_attentive(
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
    lrs: Sequence[float] = (PROBE_LR,),
    weight_decay: float = PROBE_WEIGHT_DECAY,
    epochs: int = PROBE_EPOCHS,
    batch: int = PROBE_BATCH,
) -> dict[str, Any]:
    """The attentive probe of one encoder: what `fastjepa eval attentive` prints; arguments and row as of `table.run`.

    Patch features are kept in bf16 where they fit on the disk. Interrupted, the same call goes on after its last epoch.
    """
    splits = open_splits(data, n_train, n_test, seed)
    subject = open_subject(checkpoint, device, cache, image_size)
    network = subject.encoder(encoder, splits[0])
    course = {"lrs": list(lrs), "weight_decay": weight_decay, "epochs": epochs, "batch": batch}
    key = {"probe": "attentive", "seed": seed} | course | subject.encoder_key(network) | splits[0].key
    classes, heads = len(splits[0].source.classes), subject.config.encoder_shape[2]
    train, test = (patch_features_of(subject, network, split) for split in splits)
    with subject.unfinished(key) as states:
        result = attentive_accuracy(
            train, test, classes, heads, seed, subject.device, dtype=subject.dtype, states=states, **course
        )
    said = {"probe": "attentive", "layers": "last", "protocol": "v-jepa", **course}
    return provenance(subject, encoder, splits, seed) | said | result.to_dict()
