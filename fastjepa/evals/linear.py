"""Linear probes: every head of a learning rate x weight decay grid trained at once on cached features.

The paper's two heads: linear, which takes the features with the scales they come in, and batch norm + linear, which gives
every dimension the same. The second mends ill-conditioned features, an untrained encoder's most of all.
"""

import math

import torch
from torch import Tensor

from fastjepa.draws import SPLITS, generator
from fastjepa.evals.result import PROBE, Features, Result, check_labels, score, validation_split

LRS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
WEIGHT_DECAYS = (0.0, 1e-3, 1e-2)
BATCH, MOMENTUM = 256, 0.9
# Fewer epochs leave an untrained encoder's ill-conditioned features short of their optimum, which would flatter training.
EPOCHS, MIN_STEPS = 40, 1000


def linear(
    train: Features, test: Features, classes: int, seed: int = 0, device: str | torch.device = "cpu", batch_norm: bool = False
) -> Result:
    """Accuracy of the best linear head on `test`.

    The grid LRS x WEIGHT_DECAYS is fitted on five sixths of the training images and compared on the rest; the winner's
    setting is then fitted anew on all training images and meets the test images once.
    """
    check_labels(train, test, classes)
    chosen, validation_accuracy = choose(train, classes, seed, device, batch_norm)
    setting = [(chosen["lr"], chosen["weight_decay"])]
    x, x_test = standardise(train.x, test.x, batch_norm)
    heads = fit(x.to(device), train.y.to(device), classes, setting, seed)
    predicted = classify(heads, x_test.to(device), 1)[0].cpu()
    return score(predicted, train, test, chosen, validation_accuracy)


def choose(
    train: Features, classes: int, seed: int = 0, device: str | torch.device = "cpu", batch_norm: bool = False
) -> tuple[dict[str, float], float]:
    """The setting that does best on a sixth of the training images, and its accuracy there."""
    rows, held = validation_split(train.y, 6, seed)
    grid = [(lr, decay) for lr in LRS for decay in WEIGHT_DECAYS]
    x, x_held = standardise(train.x[rows], train.x[held], batch_norm)
    heads = fit(x.to(device), train.y[rows].to(device), classes, grid, seed)
    predicted = classify(heads, x_held.to(device), len(grid)).cpu()
    accuracy = (predicted == train.y[held]).double().mean(dim=1)
    best = int(accuracy.argmax())
    return {"lr": grid[best][0], "weight_decay": grid[best][1]}, float(accuracy[best])


def standardise(train: Tensor, other: Tensor, batch_norm: bool) -> tuple[Tensor, Tensor]:
    """Both (n, D) sets, the training mean taken out, divided by one number, or with `batch_norm` by one a dimension.

    The scale is relative, so features of any size are equal to a probe; a dimension that only holds fp32 rounding
    becomes 0 instead of noise of size 1.
    """
    mean = train.mean(dim=0, dtype=torch.float64).float()
    centred = train - mean
    std = torch.linalg.vector_norm(centred, dim=0, dtype=torch.float64) / len(train) ** 0.5
    alive = std > 1e-7 * train.abs().amax(dim=0)
    common = std if batch_norm else torch.where(alive, std, 0).square().mean().sqrt()
    scale = torch.where(alive, 1 / common, 0).float()
    return centred * scale, (other - mean) * scale


def fit(x: Tensor, y: Tensor, classes: int, grid: list[tuple[float, float]], seed: int) -> tuple[Tensor, Tensor]:
    """Train one softmax regression per (learning rate, weight decay) of `grid`, all on the same batches.

    SGD with momentum and a cosine to 0; heads start at 0 and never meet, so one that diverges spoils no other.

    Args:
        x: (n, D) fp32 standardised features.
        y: (n,) int64 classes.

    Returns:
        Weights (D, heads * classes) and biases (heads * classes,), head major.
    """
    heads = len(grid)
    lr, decay = (x.new_tensor(values).repeat_interleave(classes) for values in zip(*grid, strict=True))  # (heads * C,)
    weight, bias = x.new_zeros(x.shape[1], heads * classes), x.new_zeros(heads * classes)
    weight_step, bias_step = torch.zeros_like(weight), torch.zeros_like(bias)
    steps_per_epoch = math.ceil(len(x) / BATCH)
    epochs = max(EPOCHS, math.ceil(MIN_STEPS / steps_per_epoch))
    for epoch in range(epochs):
        order = torch.from_numpy(generator(seed, SPLITS, PROBE + epoch).permutation(len(x))).to(x.device)
        for batch, rows in enumerate(order.split(BATCH)):
            progress = (epoch * steps_per_epoch + batch) / (epochs * steps_per_epoch)
            now = lr * (-0.5 * (1 + math.cos(math.pi * progress)))
            inputs = x[rows]
            error = (inputs @ weight + bias).view(-1, heads, classes).softmax(dim=2)
            error[torch.arange(len(rows), device=x.device), :, y[rows]] -= 1
            error = error.view(-1, heads * classes)  # the gradient at the logits, times the batch
            weight_step.addmm_(inputs.T, error, beta=MOMENTUM, alpha=1 / len(rows)).addcmul_(weight, decay)
            bias_step.mul_(MOMENTUM).add_(error.mean(dim=0))
            weight.addcmul_(weight_step, now)
            bias.addcmul_(bias_step, now)
    return weight, bias


def classify(parameters: tuple[Tensor, Tensor], x: Tensor, heads: int) -> Tensor:
    """Classes (heads, n) int64 that each head gives `x` (n, D)."""
    weight, bias = parameters
    found = [(rows @ weight + bias).view(len(rows), heads, -1).argmax(dim=2) for rows in x.split(4096)]
    return torch.cat(found).T
