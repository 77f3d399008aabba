"""The attentive probe (V-JEPA, Bardes et al. 2024): one cross-attention block with a learned query over frozen patch features.

AdamW with learning rate 1e-3 and weight decay 1e-3 for 20 epochs, as published. Not published are our batches of 256, the
cosine to 0, and that there is no augmentation. Nothing is chosen unless several learning rates are given, and then on
training images.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastjepa.evals.inputs import provenance
from fastjepa.evals.patch_features import PatchFeatures, patch_features_of
from fastjepa.evals.request import EvalRequest
from fastjepa.evals.scoring import Result, check_labels
from fastjepa.evals.supervised import SupervisedTask, TrainingPlace, supervised_accuracy


@dataclass(frozen=True)
class AttentiveOptions:
    """Training of the attentive probe."""

    lrs: Sequence[float] = (1e-3,)  # of several, the best on a sixth of the training images is taken
    weight_decay: float = 1e-3
    epochs: int = 20
    batch: int = 256


class AttentiveProbe(nn.Module):
    """A query that attends to all patches, an MLP, both beside a residual, and a linear layer.

    Args:
        dim: width of the features and of the probe.
        heads: heads of the attention.
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
        """Return logits (b, C) of patch features (b, N, D)."""
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
    options: AttentiveOptions,
    place: TrainingPlace,
) -> Result:
    """Measure the accuracy of an attentive probe of `heads` heads on `test`."""
    check_labels(train, test, classes)
    dim = next(iter(train.read(torch.arange(1), 1, "width"))).shape[-1]

    def build(lr: float) -> tuple[nn.Module, torch.optim.Optimizer]:
        probe = AttentiveProbe(dim, heads, classes).to(place.device)
        return probe, torch.optim.AdamW(probe.parameters(), lr=lr, weight_decay=options.weight_decay)

    def inputs(rows: Tensor, epoch: int | None) -> Iterable[Tensor]:
        return train.read(rows, options.batch, "validation" if epoch is None else f"epoch {epoch + 1} of {options.epochs}")

    def test_inputs() -> Iterable[Tensor]:
        return test.read(torch.arange(len(test.y)), options.batch, "test")

    task = SupervisedTask(train, test, build, inputs, test_inputs, options.epochs, options.batch, place.dtype)
    return supervised_accuracy(task, options.lrs, place.seed, place.states)


def evaluate_attentive(request: EvalRequest, options: AttentiveOptions = AttentiveOptions()) -> dict[str, Any]:
    """Train the attentive probe of one encoder and return the row that `fastjepa eval attentive` prints.

    Patch features are kept in bf16 where they fit on the disk. Interrupted, the same call goes on after its last epoch.
    """
    splits, subject = request.splits(), request.subject()
    encoder = subject.encoder(request.encoder, splits[0])
    course = dataclasses.asdict(options) | {"lrs": list(options.lrs)}
    key = {"probe": "attentive", "seed": request.seed} | course | subject.encoder_key(encoder) | splits[0].key
    classes, heads = len(splits[0].source.classes), subject.config.encoder_shape[2]
    train, test = (patch_features_of(subject, encoder, split) for split in splits)
    with subject.unfinished(key) as states:
        place = TrainingPlace(request.seed, subject.device, subject.dtype, states)
        result = attentive_accuracy(train, test, classes, heads, options, place)
    said = {"probe": "attentive", "layers": "last", "protocol": "v-jepa", **course}
    return provenance(subject, request.encoder, splits, request.seed) | said | result.to_dict()
