"""Linear probes: every head of a learning rate x weight decay grid trained at once on cached features.

The paper has two heads: linear, which takes the features with the scales they come in, and batch norm + linear, which gives
every dimension the same scale. The second mends ill-conditioned features, an untrained encoder's most of all.

The published recipes (paper, appendix A.2; VISSL's configs) train on a new augmented view of each image in every epoch, in
bicubic crops, with a batch norm that follows the batch. Here features are cached: one view, the plain one, or `--views N`
of which epochs take turns; crops are bilinear; batch norm is the mean and deviation of the training features, its affine
part left to the linear layer. Published results choose the best head on the test images; here a share of the training
images chooses.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastjepa.data.prepare.processes import console
from fastjepa.evals.images import watched
from fastjepa.evals.scoring import PROBE_DRAW, Features, Result, check_labels, choose_setting, score_predictions
from fastjepa.rng import SPLIT_STREAM, generator

LRS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
WEIGHT_DECAYS = (0.0, 1e-3, 1e-2)
SGD_BATCH, MOMENTUM = 256, 0.9
# Fewer epochs leave an untrained encoder's ill-conditioned features short of their optimum, which would flatter training.
SGD_EPOCHS, MIN_STEPS = 40, 1000
TRUST = 0.001  # the trust coefficient of LARS (You et al. 2017)


@dataclass(frozen=True)
class Recipe:
    """Training of the heads of a grid, lrs x weight_decays."""

    lrs: tuple[float, ...] = LRS
    weight_decays: tuple[float, ...] = WEIGHT_DECAYS
    batch: int = SGD_BATCH
    epochs: int | None = None  # None: SGD_EPOCHS, or what makes MIN_STEPS steps
    drops: tuple[int, ...] | None = None  # epochs from which the learning rate is a tenth; None: a cosine to 0
    published: bool = False  # features as they come, heads from N(0, 0.01), lr for a batch of 256 and in proportion
    nesterov: bool = False
    lars: bool = False
    batch_norm: bool = False  # every dimension of the features is scaled by itself

    def length(self, n: int) -> tuple[int, int, int]:
        """Return (epochs, steps of an epoch, batch) for n images."""
        batch = min(self.batch, n)
        steps = math.ceil(n / batch)
        return self.epochs or max(SGD_EPOCHS, math.ceil(MIN_STEPS / steps)), steps, batch

    def factor(self, progress: float, epochs: int) -> float:
        """Return the factor of the learning rate after a share `progress` of the training."""
        if self.drops is None:
            return 0.5 * (1 + math.cos(math.pi * progress))
        return 0.1 ** sum(progress >= drop / epochs for drop in self.drops)


PROTOCOLS = {
    "default": Recipe(),
    # The learning rates are those of the paper and of VISSL's ViT-H config together.
    "imagenet": Recipe((0.001, 0.01, 0.05, 0.1), (0.0, 5e-4), 16384, 50, (15, 30, 45), published=True, lars=True),
    "cifar100": Recipe((0.01,), (5e-4,), 256, 28, (8, 16, 24), published=True, nesterov=True),
    "places205": Recipe((0.01,), (5e-4,), 256, 14, (4, 8, 12), published=True, nesterov=True),
    "inat18": Recipe((0.01,), (5e-4,), 256, 84, (24, 48, 72), published=True, nesterov=True),
}


def linear_accuracy(
    train: Features,
    test: Features,
    classes: int,
    seed: int = 0,
    device: str | torch.device = "cpu",
    recipe: Recipe = PROTOCOLS["default"],
) -> Result:
    """Measure the accuracy of the best linear head on `test`.

    The recipe's grid is fitted on five sixths of the training images and compared on the rest; the winner's setting is then
    fitted anew on all training images and meets the test images once. A grid of one needs no comparison.
    """
    check_labels(train, test, classes)
    epochs, steps, _ = recipe.length(len(train.y))
    if epochs * steps < MIN_STEPS:
        console.print(f"{len(train.y)} training images make {epochs * steps} steps of this protocol, which was made for more: "
                      "its heads may be far from trained")  # fmt: skip

    def classify(train: Features, other: Tensor, grid: list[tuple[float, float]]) -> Tensor:
        x, x_other = prepare_features(train, other, recipe)
        heads = fit_heads(x.to(device), train.y.to(device), classes, grid, seed, recipe)
        return linear_classify(heads, x_other.to(device), len(grid)).cpu()

    def attempt(fit: Tensor, held: Tensor) -> dict[tuple[float, float], Tensor]:
        fitting = Features(train.x[fit], train.y[fit], tuple(view[fit] for view in train.views))
        return dict(zip(grid, classify(fitting, train.x[held], grid), strict=True))

    grid = [(lr, decay) for lr in recipe.lrs for decay in recipe.weight_decays]
    remedy = ", or give `eval linear` one --lr and one --weight-decay"
    best, validation_accuracy = (grid[0], None) if len(grid) == 1 else choose_setting(train.y, 6, seed, attempt, remedy)
    chosen = {"lr": best[0], "weight_decay": best[1]}
    return score_predictions(classify(train, test.x, [best])[0], train, test, chosen, validation_accuracy)


def prepare_features(train: Features, other: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Return the inputs of heads, (V, n, D) of V training views and (m, D) of others.

    They are standardised by the training images' moments, but for the published heads without batch norm.
    """
    several = torch.stack(train.views or (train.x,))
    if recipe.published and not recipe.batch_norm:
        return several, other
    mean, scale = moments(train.x, recipe.batch_norm)
    return (several - mean) * scale, (other - mean) * scale


def standardise(train: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Take the training mean out of both (n, D) sets and divide them by one number, the training images' deviation."""
    mean, scale = moments(train, batch_norm=False)
    return (train - mean) * scale, (other - mean) * scale


def moments(train: Tensor, batch_norm: bool) -> tuple[Tensor, Tensor]:
    """Return the mean and the reciprocal scale, (D,) each, of features (n, D); with `batch_norm` each dimension has its own.

    Features that differ by a factor alone are equal to a probe after this. A dimension that only holds fp32 rounding becomes
    0 instead of noise of size 1.
    """
    mean = train.mean(dim=0, dtype=torch.float64).float()
    std = torch.linalg.vector_norm(train - mean, dim=0, dtype=torch.float64) / len(train) ** 0.5
    alive = std > 1e-7 * train.abs().amax(dim=0)
    common = std if batch_norm else torch.where(alive, std, 0).square().mean().sqrt()
    return mean, torch.where(alive, 1 / common, 0).float()


def fit_heads(
    x: Tensor,
    y: Tensor,
    classes: int,
    grid: list[tuple[float, float]],
    seed: int,
    recipe: Recipe = PROTOCOLS["default"],
) -> tuple[Tensor, Tensor]:
    """Train one softmax regression per (learning rate, weight decay) of `grid`, all on the same batches.

    SGD or LARS with momentum; heads never meet, so one that diverges spoils no other. Biases are not decayed.

    Args:
        x: (n, D) fp32 features, or (V, n, D) of V views, of which epochs take turns.
        y: (n,) int64 classes.

    Returns:
        Weights (D, heads * classes) and biases (heads * classes,), head major.
    """
    x = x if x.ndim == 3 else x[None]
    heads, (_, n, dim) = len(grid), x.shape
    epochs, steps, batch = recipe.length(n)
    lr, decay = (x.new_tensor(values).repeat_interleave(classes) for values in zip(*grid, strict=True))  # (heads * C,)
    lr = lr * (batch / 256) if recipe.published else lr
    weight, bias = _initial_heads(dim, classes, heads, seed, recipe).to(x), x.new_zeros(1, heads * classes)
    weight_step, bias_step = torch.zeros_like(weight), torch.zeros_like(bias)
    for epoch in watched(range(epochs), f"{heads} linear head{'s' if heads > 1 else ''}"):
        order = torch.from_numpy(generator(seed, SPLIT_STREAM, PROBE_DRAW + epoch).permutation(n)).to(x.device)
        for number, rows in enumerate(order.split(batch)):
            now = lr * recipe.factor((epoch * steps + number) / (epochs * steps), epochs)
            inputs = x[epoch % len(x), rows]
            # The gradient of the cross-entropy at the logits is softmax - one-hot, for every head the same one-hot.
            error = (inputs @ weight + bias).view(-1, heads, classes).softmax(dim=2)
            error[torch.arange(len(rows), device=x.device), :, y[rows]] -= 1
            error = error.view(-1, heads * classes) / len(rows)
            slope, bias_slope = inputs.T @ error, error.sum(dim=0, keepdim=True)
            _decay_gradient(slope, weight, decay, heads, recipe.lars)
            _decay_gradient(bias_slope, bias, torch.zeros_like(decay), heads, recipe.lars)
            _move_heads(weight, slope, weight_step, now, recipe.nesterov)
            _move_heads(bias, bias_slope, bias_step, now, recipe.nesterov)
    return weight, bias[0]


def _initial_heads(dim: int, classes: int, heads: int, seed: int, recipe: Recipe) -> Tensor:
    """Return weights (D, heads * C): zeros or, as published and as LARS needs, the same draws from N(0, 0.01) for all heads."""
    if not recipe.published:
        return torch.zeros(dim, heads * classes)
    drawn = torch.randn(dim, classes, generator=torch.Generator().manual_seed(seed))
    return 0.01 * drawn.repeat(1, heads)


def _decay_gradient(gradient: Tensor, value: Tensor, decay: Tensor, heads: int, lars: bool) -> None:
    """Add the weight decay (heads * C,) of values (rows, heads * C) to their gradient in place; LARS scales it by head."""
    trust = _trust_ratio(value, gradient, decay, heads) if lars else None
    gradient.addcmul_(value, decay)
    if trust is not None:
        gradient *= trust


def _move_heads(value: Tensor, gradient: Tensor, velocity: Tensor, lr: Tensor, nesterov: bool) -> None:
    """Take one step of SGD with momentum in place; lr (heads * C,) is per column. `gradient` is used up."""
    # velocity = momentum * velocity + gradient; Nesterov moves by gradient + momentum * velocity.
    velocity.mul_(MOMENTUM).add_(gradient)
    value.addcmul_(gradient.add_(velocity, alpha=MOMENTUM) if nesterov else velocity, -lr)


def _trust_ratio(value: Tensor, gradient: Tensor, decay: Tensor, heads: int) -> Tensor:
    """Return the factor of LARS, (heads * C,): TRUST |w| / (|g| + decay |w|) of each head, 1 where either is 0."""
    size, slope = (torch.linalg.vector_norm(t.view(len(t), heads, -1), dim=(0, 2)) for t in (value, gradient))
    ratio = TRUST * size / (slope + size * decay.view(heads, -1)[:, 0] + 1e-8)
    return torch.where((size > 0) & (slope > 0), ratio, 1.0).repeat_interleave(len(decay) // heads)


def linear_classify(parameters: tuple[Tensor, Tensor], x: Tensor, heads: int) -> Tensor:
    """Return the classes (heads, n) int64 that each head gives `x` (n, D)."""
    weight, bias = parameters
    found = [(rows @ weight + bias).view(len(rows), heads, -1).argmax(dim=2) for rows in x.split(4096)]
    return torch.cat(found).T
