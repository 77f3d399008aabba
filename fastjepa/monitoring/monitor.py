"""The monitor: readings of the target encoder's features while a run goes on, and the warnings they give rise to.

Two kinds of readings go to the log. Every `logging.monitor_every` steps the features a step has made anyway are
measured (`feature_std`, `effective_rank`), and how far the encoder is from its average (`ema_distance`). Probes show the
target encoder a fixed set of images: their RankMe, LiDAR and, where there are labels, an online k-NN. They fall at the
start, at the end and at least twice between. When to look is a function of the step, whatever was resumed. Only the rank
that writes the log looks; of the distance every rank measures its part.
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
from fastjepa.data.decode_pillow import DecodeError
from fastjepa.data.pixels import UnlikeError
from fastjepa.data.sources import Source
from fastjepa.engine.average import Average, FollowedAverage, ShardedAverage
from fastjepa.engine.precision import COMPUTE_DTYPES, autocast_of
from fastjepa.engine.schedule import StepSettings
from fastjepa.errors import SplitError, UserError
from fastjepa.evals.collapse import effective_rank, feature_std, lidar
from fastjepa.evals.held_out import HeldOut, label_of, open_held_out
from fastjepa.evals.knn import knn_classify
from fastjepa.evals.scoring import Features
from fastjepa.loader.loader import pixels_of
from fastjepa.model.jepa import NetworkShape
from fastjepa.monitoring.alarms import AlarmSettings, collapse_alarms
from fastjepa.monitoring.ema_distance import EmaDistance
from fastjepa.plan.flops import encoder_flops

BANK_IMAGES, QUERY_IMAGES, NEIGHBOURS = 1024, 512, 20  # images the k-NN may look at, images it must classify, votes
LIDAR_VIEWS = 8  # of an image, for LiDAR
FEWEST_PROBES, LEAST_SHARE = 4, 1 / 8  # of a run, and of those images where a run is too short for four full probes
READING_NAMES = ("feature_std", "effective_rank", "ema_distance", "image_std", "image_rank", "lidar", "knn")


@dataclass(frozen=True)
class Probe:
    """Images that every probe of a run looks at, on the host as the network takes them, and what its k-NN knows of them."""

    bank: Tensor  # (m, C, H, W) training images as an evaluation sees them
    bank_labels: Tensor  # (m,) int64; -1: none
    queries: Tensor  # (k, C, H, W); none: no k-NN
    query_labels: Tensor  # (k,) int64
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
        if not len(queries):
            return found
        if not bool(bank.isfinite().all() and queries.isfinite().all()):
            return found | {"knn": math.nan}
        labelled = self.bank_labels >= 0
        known = Features(bank.cpu()[labelled], self.bank_labels[labelled])
        classes = int(torch.cat((known.y, self.query_labels)).max()) + 1
        predicted = knn_classify(known, queries.cpu(), classes, (min(NEIGHBOURS, len(known.y)),), device)[0]
        return found | {"knn": float((predicted == self.query_labels).double().mean())}


@torch.no_grad()
def encode_images(encoder: nn.Module, images: Tensor, config: Config, device: torch.device) -> Tensor:
    """Map (b, C, H, W) as the network takes them to (b, D) fp32 on the device: the mean over patches, in the run's dtype."""
    pooled = [torch.empty(0, config.encoder_shape[0], device=device)]
    with autocast_of(COMPUTE_DTYPES[config.runtime.dtype], device):
        for block in images.split(config.micro_batch) if len(images) else ():
            # Not through __call__: a compiled network would be compiled once more for images without masks.
            rows = encoder.forward(block.to(device))
            pooled.append(rows.view(len(block), -1, rows.shape[1]).float().mean(dim=1))
    return torch.cat(pooled)


def gather_probe(config: Config, source: Source, share: float = 1.0) -> Probe:
    """Choose and decode a run's probe images, a function of (config, source, share); files that cannot be read are passed over.

    Args:
        share: of a full probe's images.
    """
    order = shuffled_rows(config, source)
    held, why_not = held_out_images(config, source)
    bank = _readable(source, order[: bank_size(source, share)], config)
    queries = _readable(*query_images(config, source, held, share), config)
    viewed = _readable(source, order[: lidar_size(config, source, share)], config)
    bank_labels, query_labels = (
        torch.tensor([label_of(where, row) for row in rows], dtype=torch.int64)
        for where, rows in ((source, bank), (held.source if held else source, queries))
    )
    about = f"a k-NN of {len(queries)} {held.name if held else 'other training'} images"
    if not queries or len(bank_labels[bank_labels >= 0].unique()) < 2:
        about, queries, query_labels = "no k-NN, for there are no labelled images of two classes", {}, query_labels[:0]
    return Probe(
        _as_evaluated(bank, config),
        bank_labels,
        _as_evaluated(queries, config),
        query_labels,
        torch.stack([_views(image, row, config) for row, image in viewed.items()]),
        f"{about} ({why_not})" if why_not else about,
    )


def held_out_images(config: Config, source: Source) -> tuple[HeldOut | None, str]:
    """Return the images that an evaluation of the run's data would test on, where there are some; else why there are none.

    Data without a held-out split need no reason.
    """
    try:
        held = open_held_out(config.data.address, source)
    except SplitError:
        return None, ""
    except UserError as error:
        return None, str(error)
    return held, "; ".join(held.notes)


def query_images(config: Config, source: Source, held: HeldOut | None, share: float) -> tuple[Source, np.ndarray]:
    """Return the images that the k-NN classifies: a source and labelled rows of it, none where there are no two classes."""
    if held is not None:
        drawn = shuffled_rows(config, held.source)
        return held.source, drawn[np.isin(drawn, held.rows)][: part_of(QUERY_IMAGES, share)]
    drawn = shuffled_rows(config, source)
    drawn = drawn[len(drawn) - query_size(source, share) :]
    return source, np.array([row for row in drawn if label_of(source, int(row)) >= 0], dtype=np.int64)


def _as_evaluated(images: dict[int, Tensor], config: Config) -> Tensor:
    pixels = pixels_of(config)
    blank = torch.empty(0, pixels.channels, *config.image_size, dtype=pixels.dtype)
    return torch.cat([blank, *(pixels.ready(fit_to(image, config.image_size))[None] for image in images.values())])


def shuffled_rows(config: Config, source: Source) -> np.ndarray:
    return np.random.default_rng(config.runtime.seed).permutation(len(source))


def part_of(images: int, share: float) -> int:
    return max(1, round(share * images))


def bank_size(source: Source, share: float = 1.0) -> int:
    return min(part_of(BANK_IMAGES, share), max(1, len(source) - query_size(source, share)))


def query_size(source: Source, share: float = 1.0) -> int:
    """Return the number of images that the k-NN classifies; of training images, where there is no other split, a third at
    most.
    """
    return min(part_of(QUERY_IMAGES, share), len(source) // 3) if len(source.classes) >= 2 else 0


def lidar_size(config: Config, source: Source, share: float = 1.0) -> int:
    """Return the number of images whose views LiDAR compares; with LIDAR_VIEWS of each, the within-class covariance of a full
    probe has full rank.
    """
    return min(part_of(max(64, config.encoder_shape[0] // 4), share), len(source))


def _readable(source: Source, rows: np.ndarray, config: Config) -> dict[int, Tensor]:
    """Return the images (C, h, w) of those rows that can be read; read in rising order, as files lie."""
    found, pixels = {}, pixels_of(config)
    for row in sorted(map(int, rows)):
        try:
            found[row] = pixels.decode(source.read(row)).image
        except (DecodeError, UnlikeError, OSError):
            continue  # the loader counts it, or ends the run, and says so
    return found


def _views(image: Tensor, row: int, config: Config) -> Tensor:
    """Return training crops of an image, cropped and mirrored as the loader does it: (q, C, H, W).

    They are not distorted, so that LiDAR means the same in runs with and without distortions.
    """
    uniforms = np.random.default_rng([config.runtime.seed, row]).random((LIDAR_VIEWS, 4 * CROP_TRIES + 1)).tolist()
    boxes = [crop_box(*image.shape[1:], config.data.crop_scale, numbers) for numbers in uniforms]
    flips = [config.data.use_horizontal_flip and numbers[-1] < 0.5 for numbers in uniforms]
    crops = [crop_image(image, box, config.image_size, flip) for box, flip in zip(boxes, flips, strict=True)]
    return pixels_of(config).ready(torch.stack(crops))


def probe_falls(step: int, last: int, every: int) -> bool:
    """Return whether a run of `last` steps is probed after `step` of them, with `logging.probe_every` at `every`, 0 for never.

    It is after the first step, the last one and all multiples of `every`; where fewer than two of these lie between, also
    at the thirds of the run. A run of 10 steps and every 100 is probed after steps 1, 4, 7 and 10; every 4, after 1, 4, 8, 10.
    """
    if every == 0:
        return False
    between = (last - 1) // every  # multiples before the last step
    even = {1 + i * (last - 1) // 3 for i in range(4)} if between < 2 else {1, last}
    return step in even or step % every == 0


@dataclass(frozen=True)
class ProbePlan:
    """Steps between probes of a run of `last` steps, and the share of a full probe's images that each looks at."""

    last: int
    every: int  # 0: no probes
    share: float = 1.0

    def due(self, step: int) -> bool:
        return probe_falls(step, self.last, self.every)

    def __str__(self) -> str:
        if self.last > 4 * self.every:
            return f"probes after step 1, every {self.every} and step {self.last}"
        thirds = {1 + i * (self.last - 1) // 3 for i in range(4)}
        steps = sorted(filter(self.due, thirds | set(range(self.every, self.last, self.every))))
        return f"probes after steps {', '.join(map(str, steps))}"


def plan_probes(config: Config, source: Source, last: int, flops_per_image: float) -> ProbePlan:
    """Return when a run that ends after step `last` is probed: by `logging.probe_every`, or as often as
    `logging.monitor_budget` allows, by FLOPs.

    A probe costs one rank the forward passes of its images while the others wait, a step the work on one rank's batch. A
    run too short for FEWEST_PROBES full ones takes as many of fewer images. Others fall on logged steps, never more often
    than every `logging.monitor_every` ones.
    """
    logging = config.logging
    if logging.probe_every is not None:
        return ProbePlan(last, logging.probe_every)
    images = bank_size(source) + query_size(source) + LIDAR_VIEWS * lidar_size(config, source)
    steps = images * encoder_flops(NetworkShape.of(config)) / (config.data.batch_size * flops_per_image)  # of a full probe
    affordable = float(logging.monitor_budget * last / steps)
    if affordable < FEWEST_PROBES + 1:
        return ProbePlan(last, last, min(1.0, max(LEAST_SHARE, affordable / FEWEST_PROBES)))
    # Two at the ends, and one at each multiple.
    wanted = max(logging.monitor_every, last / (int(affordable) - 2))
    return ProbePlan(last, math.ceil(wanted / logging.every) * logging.every)


class Monitor:
    """Readings of a run, taken on the rank that writes its log.

    Args:
        steps_per_epoch: until the epochs of the warm-up are over a k-NN may stand where it stood at the start.
        history: the entries of a resumed run's log, () for a new one.
    """

    def __init__(self, config: Config, source: Source, average: Average | FollowedAverage | ShardedAverage, plan: ProbePlan,
                 steps_per_epoch: int, history: Iterable[Mapping[str, float]]):  # fmt: skip
        self.config, self.source, self.encoder = config, source, average.target_encoder
        self.distance = EmaDistance(average, self._monitors)
        self.plan = plan
        self.history = [dict(entry) for entry in history if not entry.keys().isdisjoint(READING_NAMES)]
        warmup_steps = config.optimization.warmup * steps_per_epoch
        averaged = config.loss.target != "pixels" and config.meta.teacher is None
        self.alarms = AlarmSettings(config.optimization.lr, config.loss.regularizer != "none", warmup_steps, averaged)
        self.seconds, self.probe = 0.0, None
        self._start = time.perf_counter()

    def due(self, step: int) -> bool:
        return self._monitors(step) or self.plan.due(step)

    def look(
        self, step: int, target: Tensor, loss: Tensor, now: StepSettings, apart: Tensor | None
    ) -> tuple[dict[str, float], list[str]]:
        """Take the readings that are due after `step` steps: what to log, by name, and what to tell the user.

        Args:
            target: (U, D) target features of the last micro-batch.
            loss: 0-dim, of this step.
            apart: (2,) as EmaDistance.after returns them.
        """
        if target.is_cuda:
            torch.cuda.synchronize(target.device)  # the steps still under way are no cost of the readings
        start, found, notes = time.perf_counter(), {}, []
        if self._monitors(step):
            found |= {"feature_std": feature_std(target), "effective_rank": effective_rank(target)}
            from_average, update = apart.tolist()
            if update:  # a step that was skipped has none
                found["ema_distance"] = math.sqrt(from_average / update)
        if self.plan.due(step):
            if self.probe is None:
                self.probe = gather_probe(self.config, self.source, self.plan.share)
                notes.append(f"{self.plan}: {self.probe.about}")
            found |= self.probe.read(self.encoder, self.config, target.device)
        self.history.append({"step": step, "loss": float(loss), **found})
        notes += [f"warning: {sentence}" for sentence in collapse_alarms(self.history, now, self.alarms)]
        self.seconds += time.perf_counter() - start
        found["monitor_share"] = self.seconds / (time.perf_counter() - self._start)
        return found, notes

    def _monitors(self, step: int) -> bool:
        """Return whether features are measured: after step 1 and at multiples of `logging.monitor_every`."""
        every = self.config.logging.monitor_every
        return every > 0 and (step == 1 or step % every == 0)
