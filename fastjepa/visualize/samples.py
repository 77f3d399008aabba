"""What a diffusion decoder draws from predictions, and how near it comes to what is hidden.

The first target block of each held-out image is asked for. The same decoder, from the same noise, is given three conditions:

    predictor   what the predictor says, given the image's context
    shuffled    what it says of the same block, given the context of another image: all it can know from the place alone
    untrained   what a predictor with the run's initial weights says, standardised by its own mean and deviation

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

from fastjepa.errors import ConfigError
from fastjepa.evals.images import EvalImages, watched
from fastjepa.evals.inputs import Split, Subject
from fastjepa.model.jepa import build_pair
from fastjepa.rng import SPLIT_STREAM, generator
from fastjepa.visualize.decoder import (
    BlockDecoder,
    BlockPredictor,
    decoder_autocast,
    diffusion_schedule,
    reduced_loss,
    standardise_conditions,
)
from fastjepa.visualize.neighbours import draw_query_masks, normalised_rows, patch_rows, prepared_networks

SAMPLE_SEEDS = 6  # samples of a block
VISITED_TIMES = 25  # of the decoder's noise levels
IMAGES_AT_ONCE = 256  # images of one forward pass
BOOTSTRAP_RESAMPLES = 2000  # of the bootstrap
SHUFFLE_DRAW, BOOTSTRAP_DRAW = 1 << 35, (1 << 35) + 1  # steps of the SPLITS stream; fastjepa/evals/result.py names the others
NOISE_DRAW = 1 << 37  # and that of the first image's noise
CONDITION_NAMES = ("predictor", "shuffled", "untrained")


@dataclass(frozen=True)
class DrawnSamples:
    """n images as the decoder draws them, (H, W) its size; all on the host, fp32 in [0, 1]."""

    images: Tensor  # (n, C, h, w) uint8, as the networks see them
    context: np.ndarray  # (n, N) bool
    block: np.ndarray  # (n, N) bool
    truth: Tensor  # (n, C, H, W)
    drawn: dict[str, Tensor]  # by what was given: (n, SEEDS, C, H, W)


def draw_samples(talk: BlockPredictor, decoder: BlockDecoder, split: Split, seed: int) -> DrawnSamples:
    """SEEDS samples of every image of `split` for each of GIVEN; masks, noise and the other images are drawn by `seed`."""
    subject, count = talk.subject, len(split.rows)
    if count < 2:
        raise ConfigError(f"{split.data}: samples are compared with those of another image; use two images or more")
    stream = EvalImages(split.source, subject.size, subject.config.data.channels, split.rows)
    images = torch.cat(list(stream.batches(IMAGES_AT_ONCE, about="images")))
    context, block = (drawn[:, 0] for drawn in draw_query_masks(subject, count, seed))
    said = {
        "predictor": talk(images, context, block),
        "shuffled": talk(images[torch.from_numpy(other_conditions(count, seed))], context, block),
        "untrained": restated_conditions(untrained_conditions(talk)(images, context, block), decoder),
    }
    drawn = {name: sample_decoder(decoder, condition, seed, f"samples, {name}") for name, condition in said.items()}
    return DrawnSamples(images, context, block, reduced_loss(images, decoder.size), drawn)


def other_conditions(count: int, seed: int) -> np.ndarray:
    """(count,) another image for each image, each once: neighbours on a random circle."""
    circle, other = generator(seed, SPLIT_STREAM, SHUFFLE_DRAW).permutation(count), np.empty(count, np.int64)
    other[circle] = np.roll(circle, 1)
    return other


def untrained_conditions(talk: BlockPredictor) -> BlockPredictor:
    """The same context encoder with the predictor that the run started from."""
    jepa, _ = build_pair(talk.subject.config)
    return replace(talk, predictor=prepared_networks(talk.subject, jepa.predictor))


def restated_conditions(condition: Tensor, decoder: BlockDecoder) -> Tensor:
    """(n, D) with the mean and deviation the decoder knows: what is wrong with them is then not their scale."""
    mean, std = standardise_conditions(condition)
    return (condition - mean) / std * decoder.std.cpu() + decoder.mean.cpu()


@torch.no_grad()
def sample_decoder(decoder: BlockDecoder, condition: Tensor, seed: int, about: str = "samples") -> Tensor:
    """(n, D) -> (n, SEEDS, C, H, W) in [0, 1] on the host; noise is a function of the seed and the image's place alone."""
    shape = SAMPLE_SEEDS, decoder.channels, *decoder.size
    drawn_for = [
        generator(seed, SPLIT_STREAM, NOISE_DRAW + i).standard_normal(shape, np.float32) for i in range(len(condition))
    ]
    noise = torch.from_numpy(np.concatenate(drawn_for))
    pairs = list(
        zip(noise.split(IMAGES_AT_ONCE), condition.repeat_interleave(SAMPLE_SEEDS, dim=0).split(IMAGES_AT_ONCE), strict=True)
    )
    device = decoder.mean.device
    drawn = [denoise_step(decoder, x.to(device), given.to(device)).cpu() for x, given in watched(pairs, about)]
    return torch.cat(drawn).view(-1, *shape)


def denoise_step(decoder: BlockDecoder, x: Tensor, condition: Tensor) -> Tensor:
    """(b, C, H, W) noise -> images in [0, 1], by DDIM without noise of its own (Song et al. 2021)."""
    scheduler = diffusion_schedule("DDIMScheduler")
    scheduler.set_timesteps(VISITED_TIMES)
    for time in scheduler.timesteps:
        with decoder_autocast(x.device):
            velocity = decoder(x, time.to(x.device).expand(len(x)), condition)
        x = scheduler.step(velocity.float(), time, x).prev_sample
    return (x.clamp(-1, 1) + 1) / 2


def sample_distances(subject: Subject, samples: DrawnSamples) -> dict[str, dict[str, np.ndarray]]:
    """{pixels, features}{what was given}: (n,) distance inside the block, a mean over an image's samples."""
    target = prepared_networks(subject, subject.encoder("target"))
    inside = mean_within(samples.block, subject.config.grid, samples.truth.shape[2:])
    hidden = torch.from_numpy(samples.block)
    true = sample_features(subject, target, samples.truth)
    found: dict[str, dict[str, np.ndarray]] = {"pixels": {}, "features": {}}
    for name, drawn in samples.drawn.items():
        apart = (drawn - samples.truth[:, None]).square().mean(dim=2)  # (n, SEEDS, H, W)
        found["pixels"][name] = average_distance(apart.mean(dim=1).flatten(1), inside.flatten(1))
        seen = sample_features(subject, target, drawn.flatten(0, 1)).view(*drawn.shape[:2], *true.shape[1:])
        found["features"][name] = average_distance((seen - true[:, None]).square().mean(dim=(1, 3)), hidden)
    return found


def average_distance(values: Tensor, counts: Tensor) -> np.ndarray:
    """(n, m) and (n, m) bool -> (n,) means of the values that count"""
    return ((values * counts).sum(dim=1) / counts.sum(dim=1)).numpy()


def mean_within(block: np.ndarray, grid: tuple[int, int], size: torch.Size) -> Tensor:
    """(n, N) bool -> (n, H, W) bool: the pixels whose middle lies in the block."""
    row, column = ((torch.arange(side) * 2 + 1) * patches // (2 * side) for side, patches in zip(size, grid, strict=True))
    return torch.from_numpy(block).view(-1, *grid)[:, row[:, None], column]


def sample_features(subject: Subject, target: torch.nn.Module, images: Tensor) -> Tensor:
    """(n, C, H, W) in [0, 1] -> (n, N, D) as the loss has them, of the images enlarged to what the networks take."""

    def parts() -> Iterator[Tensor]:
        for part in images.split(IMAGES_AT_ONCE):
            part = part if part.shape[2:] == subject.size else F.interpolate(part, subject.size, mode="bilinear")
            yield normalised_rows(patch_rows(subject, target, (part * 255).round().to(torch.uint8)))

    return torch.cat(list(parts()))


def summarise_samples(found: dict[str, dict[str, np.ndarray]], seed: int) -> dict[str, Any]:
    """{pixels, features}: mean and interval of each distance, and how much farther each baseline is, image by image."""

    def of(values: dict[str, np.ndarray]) -> dict[str, Any]:
        means = {name: bootstrap_interval(distance, seed) for name, distance in values.items()}
        farther = {name: bootstrap_interval(values[name] - values["predictor"], seed) for name in CONDITION_NAMES[1:]}
        return means | {"farther": farther}

    return {"samples": SAMPLE_SEEDS} | {measure: of(values) for measure, values in found.items()}


def bootstrap_interval(values: np.ndarray, seed: int) -> dict[str, Any]:
    """The mean and its 95 % bootstrap interval, by percentiles."""
    random = generator(seed, SPLIT_STREAM, BOOTSTRAP_DRAW)
    means = values[random.integers(0, len(values), (BOOTSTRAP_RESAMPLES, len(values)))].mean(axis=1)
    return {"mean": float(values.mean()), "ci95": np.quantile(means, [0.025, 0.975]).tolist()}
