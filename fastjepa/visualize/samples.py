"""Samples that a diffusion decoder draws from predictions, and how near they come to what is hidden.

The first target block of each held-out image is asked for. The same decoder, from the same noise, is given three conditions:

    predictor   the prediction of the block from the image's context
    shuffled    the prediction of the same block from the context of another image: all that the place alone tells
    untrained   the prediction of a predictor with the run's initial weights, standardised by its own mean and deviation

A sample's distance to the truth counts the block alone: as pixels (mean squared error on [0, 1]), and as features (that of
the target encoder's layer-normalised patch features of the whole drawn image, as in the loss). Intervals are bootstrapped
over images; each image counts once, with the mean over its samples.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastjepa.errors import UserError
from fastjepa.evals.images import EvalImages, watched
from fastjepa.evals.inputs import Split, Subject
from fastjepa.model.jepa import build_pair
from fastjepa.rng import SPLIT_STREAM, generator
from fastjepa.visualize.decoder import (
    BlockDecoder,
    BlockPredictor,
    decoder_autocast,
    diffusion_schedule,
    mean_and_deviation,
    reduced_images,
)
from fastjepa.visualize.neighbours import draw_query_masks, normalised_rows, patch_rows, prepared_network

SAMPLE_SEEDS = 6  # samples of a block
VISITED_TIMES = 25  # noise levels that a sample goes through, of the decoder's 1000
IMAGES_AT_ONCE = 256  # images of one forward pass
BOOTSTRAP_RESAMPLES = 2000
# Steps of SPLIT_STREAM; fastjepa/evals/scoring.py lists the others. Image i has its noise from step NOISE_DRAW + i.
SHUFFLE_DRAW, BOOTSTRAP_DRAW, NOISE_DRAW = 1 << 35, (1 << 35) + 1, 1 << 37
CONDITION_NAMES = ("predictor", "shuffled", "untrained")


@dataclass(frozen=True)
class DrawnSamples:
    """Samples for n images, fp32 in [0, 1] and (H, W) as the decoder draws them; all on the host."""

    images: Tensor  # (n, C, h, w) uint8, as the networks see them
    context: np.ndarray  # (n, N) bool
    block: np.ndarray  # (n, N) bool
    truth: Tensor  # (n, C, H, W)
    drawn: dict[str, Tensor]  # {condition: (n, SAMPLE_SEEDS, C, H, W)}


def draw_samples(predict: BlockPredictor, decoder: BlockDecoder, split: Split, seed: int) -> DrawnSamples:
    """Draw SAMPLE_SEEDS samples of every image of `split` for each condition; `seed` decides masks, noise and other images."""
    subject, count = predict.subject, len(split.rows)
    if count < 2:
        raise UserError(f"{split.data}: samples are compared with those of another image; use two images or more")
    stream = EvalImages(split.source, subject.size, subject.pixels, split.rows)
    images = torch.cat(list(stream.batches(IMAGES_AT_ONCE, about="images")))
    context, block = (drawn[:, 0] for drawn in draw_query_masks(subject, count, seed))
    conditions = {
        "predictor": predict(images, context, block),
        "shuffled": predict(images[torch.from_numpy(other_images(count, seed))], context, block),
        "untrained": rescaled_conditions(untrained_predictor(predict)(images, context, block), decoder),
    }
    drawn = {name: sample_decoder(decoder, condition, seed, f"samples, {name}") for name, condition in conditions.items()}
    return DrawnSamples(images, context, block, reduced_images(images, decoder.size), drawn)


def other_images(count: int, seed: int) -> np.ndarray:
    """Return (count,) another image for each image, each taken once: the next one on a random circle."""
    circle, other = generator(seed, SPLIT_STREAM, SHUFFLE_DRAW).permutation(count), np.empty(count, np.int64)
    other[circle] = np.roll(circle, 1)
    return other


def untrained_predictor(predict: BlockPredictor) -> BlockPredictor:
    """Return the same context encoder with the predictor that the run started from."""
    jepa, _ = build_pair(predict.subject.config)
    return replace(predict, predictor=prepared_network(predict.subject, jepa.predictor))


def rescaled_conditions(condition: Tensor, decoder: BlockDecoder) -> Tensor:
    """Give conditions (n, D) the mean and deviation that the decoder knows, so that they are not wrong by scale alone."""
    mean, std = mean_and_deviation(condition)
    return (condition - mean) / std * decoder.std.cpu() + decoder.mean.cpu()


@torch.no_grad()
def sample_decoder(decoder: BlockDecoder, condition: Tensor, seed: int, about: str = "samples") -> Tensor:
    """Draw (n, SAMPLE_SEEDS, C, H, W) in [0, 1] on the host from conditions (n, D).

    The noise is a function of the seed and the image's place alone.
    """
    shape, device = (SAMPLE_SEEDS, decoder.channels, *decoder.size), decoder.mean.device
    noise = [generator(seed, SPLIT_STREAM, NOISE_DRAW + i).standard_normal(shape, np.float32) for i in range(len(condition))]
    repeated = condition.repeat_interleave(SAMPLE_SEEDS, dim=0)  # (n, D) -> (n * SAMPLE_SEEDS, D), a row for each sample
    parts = (torch.from_numpy(np.concatenate(noise)).split(IMAGES_AT_ONCE), repeated.split(IMAGES_AT_ONCE))
    pairs = list(zip(*parts, strict=True))
    drawn = [denoise(decoder, x.to(device), given.to(device)).cpu() for x, given in watched(pairs, about)]
    return torch.cat(drawn).view(-1, *shape)


def denoise(decoder: BlockDecoder, x: Tensor, condition: Tensor) -> Tensor:
    """Turn noise (b, C, H, W) into images in [0, 1], by DDIM without noise of its own (Song et al. 2021)."""
    scheduler = diffusion_schedule("DDIMScheduler")
    scheduler.set_timesteps(VISITED_TIMES)
    for time in scheduler.timesteps:
        with decoder_autocast(x.device):
            velocity = decoder(x, time.to(x.device).expand(len(x)), condition)
        x = scheduler.step(velocity.float(), time, x).prev_sample
    return (x.clamp(-1, 1) + 1) / 2


def sample_distances(subject: Subject, samples: DrawnSamples) -> dict[str, dict[str, np.ndarray]]:
    """Return {"pixels" or "features": {condition: (n,) distance inside the block, a mean over an image's samples}}."""
    target = prepared_network(subject, subject.encoder("target"))
    inside = pixels_of_block(samples.block, subject.config.grid, samples.truth.shape[2:])
    hidden = torch.from_numpy(samples.block)
    true = sample_features(subject, target, samples.truth)
    found: dict[str, dict[str, np.ndarray]] = {"pixels": {}, "features": {}}
    for name, drawn in samples.drawn.items():
        apart = (drawn - samples.truth[:, None]).square().mean(dim=2)  # (n, SEEDS, H, W)
        found["pixels"][name] = mean_where(apart.mean(dim=1).flatten(1), inside.flatten(1))
        seen = sample_features(subject, target, drawn.flatten(0, 1)).view(*drawn.shape[:2], *true.shape[1:])
        found["features"][name] = mean_where((seen - true[:, None]).square().mean(dim=(1, 3)), hidden)
    return found


def mean_where(values: Tensor, counts: Tensor) -> np.ndarray:
    """Return the (n,) means of the values (n, m) where `counts` (n, m) bool is True."""
    return ((values * counts).sum(dim=1) / counts.sum(dim=1)).numpy()


def pixels_of_block(block: np.ndarray, grid: tuple[int, int], size: torch.Size) -> Tensor:
    """Return (n, H, W) bool, the pixels whose middle lies in the block (n, N) bool.

    Pixel i of H has its middle at (2 i + 1) / (2 H): of 4 pixels over 3 patches, patches 0 1 1 2.
    """
    row, column = ((torch.arange(side) * 2 + 1) * patches // (2 * side) for side, patches in zip(size, grid, strict=True))
    return torch.from_numpy(block).view(-1, *grid)[:, row[:, None], column]


def sample_features(subject: Subject, target: torch.nn.Module, images: Tensor) -> Tensor:
    """Return features (n, N, D), normalised as in the loss, of images (n, C, H, W) in [0, 1] enlarged to the run's size."""

    def parts() -> Iterator[Tensor]:
        for part in images.split(IMAGES_AT_ONCE):
            part = part if part.shape[2:] == subject.size else F.interpolate(part, subject.size, mode="bilinear")
            yield normalised_rows(patch_rows(subject, target, (part * 255).round().to(torch.uint8)))

    return torch.cat(list(parts()))


def summarise_samples(found: dict[str, dict[str, np.ndarray]], seed: int) -> dict[str, Any]:
    """Return mean and interval of each distance, and how much farther each baseline is, compared image by image."""

    def of(values: dict[str, np.ndarray]) -> dict[str, Any]:
        means = {name: bootstrap_interval(distance, seed) for name, distance in values.items()}
        farther = {name: bootstrap_interval(values[name] - values["predictor"], seed) for name in CONDITION_NAMES[1:]}
        return means | {"farther": farther}

    return {"samples": SAMPLE_SEEDS} | {measure: of(values) for measure, values in found.items()}


def bootstrap_interval(values: np.ndarray, seed: int) -> dict[str, Any]:
    """Return the mean and its 95 % bootstrap interval, by percentiles."""
    random = generator(seed, SPLIT_STREAM, BOOTSTRAP_DRAW)
    means = values[random.integers(0, len(values), (BOOTSTRAP_RESAMPLES, len(values)))].mean(axis=1)
    return {"mean": float(values.mean()), "ci95": np.quantile(means, [0.025, 0.975]).tolist()}
