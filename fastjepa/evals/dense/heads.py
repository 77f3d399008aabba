"""Two ways from patch features to a picture's pixels: the neighbours of each patch in a bank, and a linear layer.

Both give K channels for each patch, which are enlarged bilinearly to pixels, as logits or shares of classes, depths or normals.

Neighbours: the memory of Balazevic et al. ("Towards In-Context Scene Understanding", NeurIPS 2023). A bank of patches of the
training pictures keeps for each the share of each class among its pixels, or their mean depth or normal. A patch gets the
mean of its k nearest by cosine, weighted by softmax(cosine / temperature). The bank is drawn evenly; theirs favours rare
classes.

Linear, segmentation: every dimension standardised, then softmax regression of all pixels on the enlarged logits, by AdamW with
a warm-up and a linear fall to 0, as DINOv2 (Oquab et al. 2023) trains it. Depth and normals: ridge regression of the mean of
each patch's pixels, which counts as often as it has pixels with a value; its solution is exact. Depth itself is regressed, in
no bins.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate

from fastjepa.errors import UserError
from fastjepa.evals.dense.tasks import NO_CLASS, DenseTask
from fastjepa.evals.knn import nearest_rows
from fastjepa.evals.patch_features import PatchReader
from fastjepa.evals.scoring import PROBE_DRAW, VALIDATION_DRAW
from fastjepa.rng import SPLIT_STREAM, generator

READ_BATCH = 64  # pictures that are read at a time
BANK_DRAW = 1 << 38  # step of SPLIT_STREAM; fastjepa/evals/scoring.py lists the others
HELD_OUT_SHARE = 6  # one training picture in so many chooses settings
RIDGE_GRID = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # penalties, as shares of the features' mean variance

Predictor = Callable[[Tensor], Tensor]  # features (b, N, D) -> (b, N, K)


@dataclass(frozen=True)
class Examples:
    """Training pictures: their patch features, and what their pixels are at the encoder's size."""

    read: PatchReader
    stored: np.ndarray  # (n, H, W) or (n, H, W, 3), as label images hold them
    task: DenseTask
    patch: int  # pixels a side
    device: torch.device

    def __len__(self) -> int:
        return len(self.stored)

    @property
    def grid(self) -> tuple[int, int]:
        """Return the rows and columns of patches."""
        return self.stored.shape[1] // self.patch, self.stored.shape[2] // self.patch

    def truth(self, rows: Tensor) -> Tensor:
        """Return what the pixels of some pictures are."""
        return self.task.truth(self.stored[rows.numpy()]).to(self.device)

    def blocks(self, rows: Tensor, about: str) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Yield rows, features (b, N, D) fp32, and values (b, N, K) and weights (b, N) of patches, block by block."""
        for block, x in zip(rows.split(READ_BATCH), self.read(rows, READ_BATCH, about), strict=True):
            yield block, x.float(), *self.task.patch_values(self.truth(block), self.patch)


@dataclass(frozen=True)
class PatchNeighbours:
    """Settings of the neighbours."""

    bank: int = 20_000  # patches, drawn of all training pictures
    k: int = 30
    temperature: float = 0.02


@dataclass(frozen=True)
class DenseRecipe:
    """Training of the linear head of segmentation."""

    lrs: Sequence[float] = (1e-3, 1e-2)  # of several, the best on held-out training pictures is taken
    weight_decay: float = 1e-4
    steps: int = 2000
    batch: int = 32
    warmup: float = 1500 / 40_000  # share of the steps

    def factor(self, step: int) -> float:
        """Return the factor of the learning rate at a step from 0: of 1000 steps, 38 of them a rise, then a fall to 0."""
        return min(1.0, (step + 1) / max(1, round(self.warmup * self.steps))) * (1 - step / self.steps)


def neighbour_predictor(examples: Examples, settings: PatchNeighbours, seed: int) -> Predictor:
    """Return the prediction by neighbours in a bank; UserError where the bank holds fewer patches than neighbours."""
    if settings.temperature <= 0:
        raise UserError(f"--temperature {settings.temperature:g}: choose one above 0")
    bank, values = draw_bank(examples, settings.bank, seed)
    if len(bank) < settings.k:
        raise UserError(
            f"--k {settings.k}: the bank holds {len(bank)} patches with a value; choose at most that many neighbours"
        )

    def predict(x: Tensor) -> Tensor:
        found = []
        for cosines, rows in nearest_rows(bank, x.float().flatten(0, 1), settings.k, examples.device):
            share = (cosines / settings.temperature).softmax(dim=1)  # (q, k)
            found.append(torch.einsum("qk,qkc->qc", share, values[rows]))
        return torch.cat(found).view(*x.shape[:2], -1)

    return predict


def draw_bank(examples: Examples, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw patches evenly of all pictures: features (m, D) on the device, values (m, K) on the host, m <= size.

    Patches without a value are left out after the draw.
    """
    patches = examples.grid[0] * examples.grid[1]
    total = len(examples) * patches
    drawn = generator(seed, SPLIT_STREAM, BANK_DRAW).permutation(total)[:size]
    chosen = torch.zeros(total, dtype=torch.bool)
    chosen[torch.from_numpy(drawn)] = True
    chosen = chosen.view(-1, patches)
    pictures = chosen.any(dim=1).nonzero()[:, 0]
    bank, values = [], []
    for block, x, found, weight in examples.blocks(pictures, "bank"):
        taken = chosen[block].to(x.device) & (weight > 0)
        bank.append(x[taken])
        values.append(found[taken].cpu())
    return torch.cat(bank), torch.cat(values)


def linear_predictor(examples: Examples, recipe: DenseRecipe, seed: int) -> tuple[Predictor, dict[str, float]]:
    """Return the prediction of a linear layer and the settings that held-out training pictures chose."""
    if examples.task.name == "segmentation":
        return fit_softmax(examples, recipe, seed)
    return fit_ridge(examples, seed)


def held_out_pictures(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Split `count` pictures by chance into those to fit on and one in HELD_OUT_SHARE to choose on; UserError for too few."""
    if count < HELD_OUT_SHARE:
        raise UserError(
            f"{count} training pictures: the linear layer needs at least {HELD_OUT_SHARE} to choose its settings on"
        )
    order = torch.from_numpy(generator(seed, SPLIT_STREAM, VALIDATION_DRAW).permutation(count))
    held = count // HELD_OUT_SHARE
    return order[held:].sort()[0], order[:held].sort()[0]


def fit_ridge(examples: Examples, seed: int) -> tuple[Predictor, dict[str, float]]:
    """Return ridge regression of patch values, its penalty chosen on held-out pictures, then fitted on all of them."""
    fit, held = (patch_moments(examples, rows, name) for rows, name in
                 zip(held_out_pictures(len(examples), seed), ("ridge", "held out"), strict=True))  # fmt: skip
    channels = examples.task.channels
    errors = {share: squared_error(held, *solve_ridge(fit, channels, share)) for share in RIDGE_GRID}
    best = min(errors, key=errors.__getitem__)
    weight, bias = (found.float().to(examples.device) for found in solve_ridge(fit + held, channels, best))
    return lambda x: x.float() @ weight + bias, {"penalty": best}


def patch_moments(examples: Examples, rows: Tensor, about: str) -> Tensor:
    """Return the sum of w z z^T over patches, fp64 (D + 1 + K, D + 1 + K): z is the features, a 1 and the values."""
    total: Tensor | None = None
    for _, x, values, weight in examples.blocks(rows, about):
        z = torch.cat([x, torch.ones_like(x[..., :1]), values], dim=2).flatten(0, 1).double()
        block = z.T @ (z * weight.flatten()[:, None])
        total = block if total is None else total + block
    return total


def solve_ridge(moments: Tensor, channels: int, share: float) -> tuple[Tensor, Tensor]:
    """Return the weights (D, K) and biases (K,) that minimise sum w |y - x W - b|^2 + penalty |W|^2, as scikit-learn's Ridge.

    The penalty is `share` of the sum of weights times the features' mean variance; the bias bears none.
    """
    dim = len(moments) - 1 - channels
    count = moments[dim, dim]
    if count == 0:
        raise UserError("no pixel of the training label images has a value; check --depth-scale, --ignore-index and the files")
    mean, target = moments[dim, :dim] / count, moments[dim, dim + 1 :] / count
    spread = moments[:dim, :dim] - count * torch.outer(mean, mean)
    shared = moments[:dim, dim + 1 :] - count * torch.outer(mean, target)
    penalty = share * spread.diagonal().mean().clamp(min=torch.finfo(spread.dtype).tiny)
    weight = torch.linalg.solve(spread + penalty * torch.eye(dim).to(spread), shared)
    return weight, target - mean @ weight


def squared_error(moments: Tensor, weight: Tensor, bias: Tensor) -> float:
    """Return the mean squared error of x W + b over the patches of `moments`."""
    # y - x W - b is z @ [-W; -b; I], so its squares sum to the trace of that transposed, times the moments, times that.
    turn = torch.cat([-weight, -bias[None], torch.eye(len(bias)).to(weight)])
    return float((turn * (moments @ turn)).sum() / moments[len(weight), len(weight)])


def fit_softmax(examples: Examples, recipe: DenseRecipe, seed: int) -> tuple[Predictor, dict[str, float]]:
    """Return softmax regression of pixels, its learning rate chosen on held-out pictures, then fitted on all of them."""
    everything, scale = torch.arange(len(examples)), feature_scale(examples)
    lr = recipe.lrs[0]
    if len(recipe.lrs) > 1:
        fit, held = held_out_pictures(len(examples), seed)
        heads = train_heads(examples, fit, scale, recipe, seed)
        losses = dict(zip(recipe.lrs, held_out_losses(examples, held, heads), strict=True))
        lr = min(losses, key=losses.__getitem__)
    ((weight, bias),) = train_heads(examples, everything, scale, replace(recipe, lrs=(lr,)), seed)
    return lambda x: x.float() @ weight + bias, {"lr": lr, "steps": recipe.steps}


def feature_scale(examples: Examples) -> tuple[Tensor, Tensor]:
    """Return the mean and the reciprocal deviation, (D,) each, of all training patches; 0 where a dimension does not vary."""
    count, total, squares = 0, 0.0, 0.0
    for x in examples.read(torch.arange(len(examples)), READ_BATCH, "scale"):
        rows = x.flatten(0, 1).double()
        count, total, squares = count + len(rows), total + rows.sum(dim=0), squares + rows.square().sum(dim=0)
    mean = total / count
    deviation = (squares / count - mean.square()).clamp(min=0).sqrt()
    alive = deviation > 1e-6 * deviation.max()
    return mean.float(), torch.where(alive, 1 / deviation, 0).float()


def train_heads(
    examples: Examples, rows: Tensor, scale: tuple[Tensor, Tensor], recipe: DenseRecipe, seed: int
) -> list[tuple[Tensor, Tensor]]:
    """Train a head for each learning rate on the same batches; return the weights (D, C) and biases (C,) on features as
    they come.
    """
    mean, factor = scale
    shape = len(mean), examples.task.channels
    heads = [tuple(torch.zeros(*size, device=examples.device, requires_grad=True) for size in (shape, shape[1:]))
             for _ in recipe.lrs]  # fmt: skip
    groups = [{"params": [part], "lr": lr, "base": lr, "weight_decay": recipe.weight_decay * (part.ndim == 2)}
              for head, lr in zip(heads, recipe.lrs, strict=True) for part in head]  # fmt: skip
    optimizer = torch.optim.AdamW(groups)
    for step, (batch, x) in enumerate(training_batches(examples, rows, recipe, seed)):
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * recipe.factor(step)
        x, truth = (x.float() - mean) * factor, examples.truth(batch)
        losses = [pixel_loss(x @ weight + bias, truth, examples.grid) for weight, bias in heads]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()  # heads never meet
        optimizer.step()
    folded = [(factor[:, None] * weight.detach(), bias.detach()) for weight, bias in heads]
    return [(weight, bias - mean @ weight) for weight, bias in folded]


def training_batches(examples: Examples, rows: Tensor, recipe: DenseRecipe, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (rows, features) of `recipe.steps` batches, in a new order each epoch."""
    left, epoch = recipe.steps, 0
    while left:
        order = torch.from_numpy(generator(seed, SPLIT_STREAM, PROBE_DRAW + epoch).permutation(len(rows)))
        batches = rows[order[: left * recipe.batch]].split(recipe.batch)
        heads = f"{len(recipe.lrs)} linear head{'s' * (len(recipe.lrs) > 1)}, {recipe.steps - left} of {recipe.steps} steps"
        yield from zip(batches, examples.read(torch.cat(batches), recipe.batch, heads), strict=True)
        left, epoch = left - len(batches), epoch + 1


def pixel_loss(logits: Tensor, truth: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the mean cross-entropy of the pixels that count, of logits (b, N, C) enlarged to the classes (b, H, W)."""
    maps = enlarged_maps(logits, grid, tuple(truth.shape[1:]))
    return cross_entropy(maps, truth, ignore_index=NO_CLASS, reduction="sum") / (truth != NO_CLASS).sum().clamp(min=1)


@torch.no_grad()
def held_out_losses(examples: Examples, rows: Tensor, heads: list[tuple[Tensor, Tensor]]) -> list[float]:
    """Return the loss of each head, a mean over batches of pictures."""
    found = [[pixel_loss(x.float() @ weight + bias, examples.truth(block), examples.grid) for weight, bias in heads]
             for block, x in zip(rows.split(READ_BATCH), examples.read(rows, READ_BATCH, "held out"), strict=True)]  # fmt: skip
    return torch.tensor(found).mean(dim=0).nan_to_num(nan=torch.inf).tolist()


def constant_value(examples: Examples) -> Tensor:
    """Return the mean (K,) of all training pixels with a value: shares of classes, a depth or a vector."""
    total, count = 0.0, 0.0
    for rows in torch.arange(len(examples)).split(READ_BATCH):
        values, weight = examples.task.patch_values(examples.truth(rows), examples.patch)
        total = total + torch.einsum("bnk,bn->k", values.double(), weight.double())
        count = count + weight.double().sum()
    if not count:
        raise UserError("no pixel of the training label images has a value; check --depth-scale, --ignore-index and the files")
    return (total / count).float()


def enlarged_maps(values: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Return maps (b, K, *size) of patch values (b, N, K), enlarged bilinearly: the centre of a patch has its own value."""
    maps = values.transpose(1, 2).unflatten(2, grid)
    rows, columns = (bilinear_matrix(new, old).to(values) for new, old in zip(size, grid, strict=True))
    return rows @ maps @ columns.T  # interpolate's own backward pass is slower


@cache
def bilinear_matrix(new: int, old: int) -> Tensor:
    """Return the matrix (new, old) that enlarges a line bilinearly: 2 values to 4 by 1, 0; 3/4, 1/4; 1/4, 3/4; 0, 1."""
    lines = torch.eye(old)[:, None, :, None]  # (old, 1, old, 1)
    return interpolate(lines, size=(new, 1), mode="bilinear")[:, 0, :, 0].T.contiguous()
