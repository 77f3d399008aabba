"""The monitor: readings of the target encoder's features while a run goes on, and the warnings they give rise to.

Two kinds of readings go to the log. Every `logging.monitor_every` steps the features a step has made anyway are
measured (`feature_std`, `effective_rank`). Every `logging.probe_every` steps the target encoder sees a fixed set of images:
their RankMe, LiDAR and, where there are labels, an online k-NN. When to look is a function of the step, whatever was
resumed; only the rank that writes the log looks, and nothing here talks between ranks.
"""

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fastjepa.config.schema import Config
from fastjepa.data.crops import CROP_TRIES, crop_box, crop_image, fit_to
from fastjepa.data.decode_pillow import DecodeError, decode_image
from fastjepa.data.sources import Source, open_source
from fastjepa.engine.precision import COMPUTE_DTYPES, autocast_of
from fastjepa.engine.schedule import Schedule, StepSettings
from fastjepa.errors import UserError
from fastjepa.evals.collapse import effective_rank, feature_std, lidar
from fastjepa.evals.knn import knn_classify
from fastjepa.evals.scoring import Features
from fastjepa.monitoring.alarms import collapse_alarms
from fastjepa.plan.flops import encoder_flops

BANK_IMAGES, QUERY_IMAGES, NEIGHBOURS = 1024, 512, 20  # images the k-NN may look at, images it must classify, votes
LIDAR_VIEWS = 8  # of an image, for LiDAR
READING_NAMES = ("feature_std", "effective_rank", "image_std", "image_rank", "lidar", "knn")


@dataclass(frozen=True)
class Probe:
    """Images that every probe of a run looks at, uint8 on the host, and what its k-NN knows of them."""

    bank: Tensor  # (m, C, H, W) training images as an evaluation sees them
    bank_labels: Tensor | None  # (m,) int64; None: no k-NN
    queries: Tensor  # (k, C, H, W)
    query_labels: Tensor | None
    views: Tensor  # (n, q, C, H, W) training crops
    about: str  # where the k-NN's images come from, for the user

    def read(self, encoder: nn.Module, config: Config, device: torch.device) -> dict[str, float]:
        """Take the readings `image_std`, `image_rank`, `lidar` and, with labels, `knn` (accuracy)."""
        bank, queries = (encode_images(encoder, images, config, device) for images in (self.bank, self.queries))
        views = encode_images(encoder, self.views.flatten(0, 1), config, device)
        found = {
            "image_std": feature_std(bank),
            "image_rank": effective_rank(bank),
            "lidar": lidar(views.unflatten(0, self.views.shape[:2])),
        }
        if self.bank_labels is None:
            return found
        if not bool(bank.isfinite().all() and queries.isfinite().all()):
            return found | {"knn": math.nan}
        known = Features(bank.cpu(), self.bank_labels)
        classes = int(torch.cat((self.bank_labels, self.query_labels)).max()) + 1
        predicted = knn_classify(known, queries.cpu(), classes, (min(NEIGHBOURS, len(bank)),), device)[0]
        return found | {"knn": float((predicted == self.query_labels).double().mean())}


@torch.no_grad()
def encode_images(encoder: nn.Module, images: Tensor, config: Config, device: torch.device) -> Tensor:
    """Map (b, C, H, W) uint8 to (b, D) fp32 on the device: the mean over patches, computed in the run's own dtype."""
    pooled = [torch.empty(0, config.encoder_shape[0], device=device)]
    with autocast_of(COMPUTE_DTYPES[config.runtime.dtype], device):
        for block in images.split(config.micro_batch) if len(images) else ():
            # Not through __call__: a compiled network would be compiled once more for images without masks.
            rows = encoder.forward(block.to(device))
            pooled.append(rows.view(len(block), -1, rows.shape[1]).float().mean(dim=1))
    return torch.cat(pooled)


def gather_probe(config: Config, source: Source) -> Probe:
    """Choose and decode a run's probe images: a function of (config, source). Files that cannot be read are passed over."""
    order = shuffled_rows(config, source)
    labelled = len(source.classes) >= 2
    held = held_out_source(config, source) if labelled else None
    bank = _readable(source, order[: bank_size(source)], config)
    others = shuffled_rows(config, held)[:QUERY_IMAGES] if held else order[len(order) - query_size(source) :]
    queries = _readable(held or source, others, config) if labelled else {}
    known, queries = _labelled(bank, source), _labelled(queries, held or source)
    labelled = labelled and bool(known and queries)
    bank = known if labelled else bank
    viewed = _readable(source, order[: lidar_size(config, source)], config)
    about = f"a k-NN of {len(queries)} {'val or test' if held else 'other training'} images"
    return Probe(
        _as_evaluated(bank, config),
        torch.tensor([source.label(row) for row in bank]) if labelled else None,
        _as_evaluated(queries, config),
        torch.tensor([(held or source).label(row) for row in queries]) if labelled else None,
        torch.stack([_views(image, row, config) for row, image in viewed.items()]),
        about if labelled else "no k-NN, for the data has no labels",
    )


def _labelled(images: dict[int, Tensor], source: Source) -> dict[int, Tensor]:
    """Return the images that have a label: of a Parquet file some rows may have none."""
    return {row: image for row, image in images.items() if source.label(row) is not None}


def _as_evaluated(images: dict[int, Tensor], config: Config) -> Tensor:
    blank = torch.empty(0, config.data.channels, *config.image_size, dtype=torch.uint8)
    return torch.cat([blank, *(fit_to(image, config.image_size)[None] for image in images.values())])


def shuffled_rows(config: Config, source: Source) -> np.ndarray:
    return np.random.default_rng(config.runtime.seed).permutation(len(source))


def held_out_source(config: Config, source: Source) -> Source | None:
    """Return the val or test split of the run's data, where there is one with the same classes."""
    try:
        held = open_source(config.data, "val")
    except UserError:
        return None
    return held if held.classes == source.classes else None


def bank_size(source: Source) -> int:
    return min(BANK_IMAGES, max(1, len(source) - query_size(source)))


def query_size(source: Source) -> int:
    """Return the number of images that the k-NN classifies; of training images, where there is no other split, a third at
    most.
    """
    return min(QUERY_IMAGES, len(source) // 3) if len(source.classes) >= 2 else 0


def lidar_size(config: Config, source: Source) -> int:
    """Return the number of images whose views LiDAR compares; with LIDAR_VIEWS of each, the within-class covariance has full
    rank.
    """
    return min(max(64, config.encoder_shape[0] // 4), len(source))


def _readable(source: Source, rows: np.ndarray, config: Config) -> dict[int, Tensor]:
    """Return the images (C, h, w) of those rows that can be read; read in rising order, as files lie."""
    found = {}
    for row in sorted(map(int, rows)):
        try:
            found[row] = decode_image(source.read(row), config.data.channels)
        except (DecodeError, OSError):
            continue  # the loader counts it and says so
    return found


def _views(image: Tensor, row: int, config: Config) -> Tensor:
    """Return training crops of an image, as the loader draws them: (q, C, H, W)."""
    uniforms = np.random.default_rng([config.runtime.seed, row]).random((LIDAR_VIEWS, 4 * CROP_TRIES + 1)).tolist()
    boxes = [crop_box(*image.shape[1:], config.data.crop_scale, numbers) for numbers in uniforms]
    flips = [config.data.use_horizontal_flip and numbers[-1] < 0.5 for numbers in uniforms]
    return torch.stack([crop_image(image, box, config.image_size, flip) for box, flip in zip(boxes, flips, strict=True)])


def probe_period(config: Config, source: Source, total_steps: int, flops_per_image: float) -> int:
    """Return the steps between probes, 0 for none: `logging.probe_every`, or as often as `logging.monitor_budget` allows, by
    FLOPs.

    A probe costs one rank the forward passes of its images while the others wait, a step the work on one rank's batch.
    Probes then fall on logged steps, never more often than every `logging.monitor_every` ones, besides that at step 1.
    """
    logging = config.logging
    if logging.probe_every is not None:
        return logging.probe_every
    images = bank_size(source) + query_size(source) + LIDAR_VIEWS * lidar_size(config, source)
    steps = images * encoder_flops(config) / (config.data.batch_size * flops_per_image)  # what a probe costs
    affordable = int(logging.monitor_budget * total_steps / steps)
    if not logging.monitor_every or affordable < 2:
        return 0
    wanted = max(logging.monitor_every, total_steps / (affordable - 1))
    return math.ceil(wanted / logging.every) * logging.every


class Monitor:
    """Readings of a run, taken on the rank that writes its log.

    Args:
        history: the entries of a resumed run's log, () for a new one.
        flops_per_image: FLOPs of training on one image, which decide how often a probe is affordable.
    """

    def __init__(self, config: Config, source: Source, target_encoder: nn.Module, schedule: Schedule,
                 history: Iterable[Mapping[str, float]], flops_per_image: float):  # fmt: skip
        self.config, self.source, self.encoder, self.schedule = config, source, target_encoder, schedule
        self.history = [dict(entry) for entry in history if not entry.keys().isdisjoint(READING_NAMES)]
        self.period = probe_period(config, source, schedule.total_steps, flops_per_image)
        self.warmup_steps = config.optimization.warmup * schedule.steps_per_epoch
        self.seconds, self.probe = 0.0, None
        self._start = time.perf_counter()

    def due(self, step: int) -> bool:
        return self._monitors(step) or self._probes(step)

    def look(self, step: int, target: Tensor, loss: Tensor, now: StepSettings) -> tuple[dict[str, float], list[str]]:
        """Take the readings that are due after `step` steps: what to log, by name, and what to tell the user.

        Args:
            target: (U, D) target features of the last micro-batch.
            loss: 0-dim, of this step.
        """
        if target.is_cuda:
            torch.cuda.synchronize(target.device)  # the steps still under way are no cost of the readings
        start, found, notes = time.perf_counter(), {}, []
        if self._monitors(step):
            found |= {"feature_std": feature_std(target), "effective_rank": effective_rank(target)}
        if self._probes(step):
            if self.probe is None:
                self.probe = gather_probe(self.config, self.source)
                notes.append(f"probes at step 1 and every {self.period}: {self.probe.about}")
            found |= self.probe.read(self.encoder, self.config, target.device)
        self.history.append({"step": step, "loss": float(loss), **found})
        notes += [f"warning: {sentence}" for sentence in collapse_alarms(self.history, now, self.config, self.warmup_steps)]
        self.seconds += time.perf_counter() - start
        found["monitor_share"] = self.seconds / (time.perf_counter() - self._start)
        return found, notes

    def _monitors(self, step: int) -> bool:
        return self._falls(step, self.config.logging.monitor_every)

    def _probes(self, step: int) -> bool:
        return self._falls(step, self.period)

    def _falls(self, step: int, every: int) -> bool:
        """Return whether something falls due: at step 1 and at multiples of `every`, but for those that would share the first
        logged line with step 1.
        """
        return every > 0 and (step == 1 or step % every == 0 and step > self.config.logging.every)
