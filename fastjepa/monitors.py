"""Collapse seen while it happens: readings of the target encoder's features, and the warnings they give rise to.

Two kinds of readings go to the log. Every `logging.monitor_every` steps the features a step has made anyway are
measured (`spread`, `effective_rank`). Every `logging.probe_every` steps the target encoder sees a fixed set of images:
their RankMe, LiDAR and, where there are labels, an online k-NN. When to look is a function of the step, whatever was
resumed; only the rank that writes the log looks, and nothing here talks between ranks.
"""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastjepa import flops, precision
from fastjepa.config import Config, ConfigError
from fastjepa.data import TRIES, crop_box
from fastjepa.decode_torch import DecodeError, crop, decode
from fastjepa.evals.features import fit_to
from fastjepa.evals.knn import classify
from fastjepa.evals.result import Features
from fastjepa.schedule import Now, Schedule
from fastjepa.sources import Source, open_source

RANK_ROWS = 2048
EPSILON, DELTA = 1e-7, 1e-4  # of RankMe and LiDAR; of LiDAR's within-class covariance
BANK, QUERIES, NEIGHBOURS = 1024, 512, 20  # images the k-NN may look at, images it must classify, votes
VIEWS = 8  # of an image, for LiDAR
INITIAL_STD = 0.02  # of every weight matrix
READINGS = ("feature_std", "effective_rank", "image_std", "image_rank", "lidar", "knn")


def spread(features: Tensor) -> float:
    """(T, D) -> mean over channels of the standard deviation over tokens; 0 when every token has the same features."""
    return float(features.float().std(dim=0, unbiased=False).mean())


def effective_rank(features: Tensor) -> float:
    """(T, D) -> exp of the entropy of the normalised singular values, from 1 to min(T, D).

    RankMe (Garrido et al., 2023): p_k = s_k / sum(s) + 1e-7, features not centred. Of more than 2048 tokens, 2048
    evenly spaced ones are used. 0 for all-zero features, NaN for features that are not finite.
    """
    rows = features.detach()
    if len(rows) > RANK_ROWS:
        rows = rows[torch.arange(RANK_ROWS, device=rows.device) * len(rows) // RANK_ROWS]
    rows = rows.double()
    # Through the smaller Gram matrix: in float64 as exact as this needs, and several times faster than an SVD.
    gram = rows @ rows.T if rows.shape[0] < rows.shape[1] else rows.T @ rows
    if not bool(gram.isfinite().all()):
        return math.nan
    return _entropy_rank(torch.linalg.eigvalsh(gram).clamp_min(0).sqrt())


def lidar(features: Tensor, delta: float = DELTA) -> float:
    """(n, q, D), q views of each of n images -> exp of the entropy of the LDA eigenvalues, from 1 to min(n - 1, D).

    LiDAR (Thilak et al., 2024): images are the classes of a linear discriminant analysis, views their members. With
    S_b = mean of (m_i - m)(m_i - m)^T over images and S_w = mean of (x - m_i)(x - m_i)^T over views, plus delta * I, it
    is RankMe's entropy over the eigenvalues of S_w^-1/2 S_b S_w^-1/2. Directions in which the views of one image differ
    as much as images do count little. 0 when all images have the same features, NaN for features that are not finite.
    """
    x = features.detach().double()
    if not bool(x.isfinite().all()):
        return math.nan
    centres = x.mean(dim=1)  # (n, D)
    inside = (x - centres[:, None]).flatten(0, 1)
    between = (centres - centres.mean(dim=0)) / math.sqrt(len(x))
    within = inside.T @ inside / len(inside) + delta * torch.eye(x.shape[2], dtype=x.dtype, device=x.device)
    # B S_w^-1 B^T has the eigenvalues wanted, those that are not zero, in n x n instead of D x D.
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(within), between.T, upper=False)  # (D, n)
    return _entropy_rank(torch.linalg.eigvalsh(whitened.T @ whitened).clamp_min(0))


def _entropy_rank(values: Tensor) -> float:
    total = values.sum()
    if float(total) == 0:
        return 0.0
    p = values / total + EPSILON
    return float((-(p * p.log()).sum()).exp())


@dataclass(frozen=True)
class Probe:
    """The images that every probe of a run looks at, uint8 on the host, and what its k-NN knows of them."""

    bank: Tensor  # (m, C, H, W) training images as an evaluation sees them
    bank_labels: Tensor | None  # (m,) int64; None: no k-NN
    queries: Tensor  # (k, C, H, W)
    query_labels: Tensor | None
    views: Tensor  # (n, q, C, H, W) training crops
    about: str  # where the k-NN's images come from, for the user

    def read(self, encoder: nn.Module, config: Config, device: torch.device) -> dict[str, float]:
        """The readings `image_std`, `image_rank`, `lidar` and, with labels, `knn` (accuracy)."""
        bank, queries = (encode(encoder, images, config, device) for images in (self.bank, self.queries))
        views = encode(encoder, self.views.flatten(0, 1), config, device)
        found = {
            "image_std": spread(bank),
            "image_rank": effective_rank(bank),
            "lidar": lidar(views.unflatten(0, self.views.shape[:2])),
        }
        if self.bank_labels is None:
            return found
        if not bool(bank.isfinite().all() and queries.isfinite().all()):
            return found | {"knn": math.nan}
        known = Features(bank.cpu(), self.bank_labels)
        classes = int(torch.cat((self.bank_labels, self.query_labels)).max()) + 1
        predicted = classify(known, queries.cpu(), classes, (min(NEIGHBOURS, len(bank)),), device)[0]
        return found | {"knn": float((predicted == self.query_labels).double().mean())}


@torch.no_grad()
def encode(encoder: nn.Module, images: Tensor, config: Config, device: torch.device) -> Tensor:
    """(b, C, H, W) uint8 -> (b, D) fp32 on the device: the mean over patches, computed in the run's own dtype."""
    pooled = [torch.empty(0, config.encoder_shape[0], device=device)]
    with precision.autocast(config, device):
        for block in images.split(config.micro_batch) if len(images) else ():
            # Not through __call__: a compiled network would be compiled once more for images without masks.
            rows = encoder.forward(block.to(device))
            pooled.append(rows.view(len(block), -1, rows.shape[1]).float().mean(dim=1))
    return torch.cat(pooled)


def gather_probe(config: Config, source: Source) -> Probe:
    """Choose and decode a run's probe images: a function of (config, source). Files that cannot be read are passed over."""
    order = shuffled(config, source)
    labelled = len(source.classes) >= 2
    held = held_out(config, source) if labelled else None
    bank = _readable(source, order[: bank_size(source)], config)
    others = shuffled(config, held)[:QUERIES] if held else order[len(order) - query_size(source) :]
    queries = _readable(held or source, others, config) if labelled else {}
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


def _as_evaluated(images: dict[int, Tensor], config: Config) -> Tensor:
    blank = torch.empty(0, config.data.channels, *config.image_size, dtype=torch.uint8)
    return torch.cat([blank, *(fit_to(image, config.image_size)[None] for image in images.values())])


def shuffled(config: Config, source: Source) -> np.ndarray:
    return np.random.default_rng(config.runtime.seed).permutation(len(source))


def held_out(config: Config, source: Source) -> Source | None:
    """The val or test split of the run's data, where there is one with the same classes."""
    try:
        held = open_source(config.data, "val")
    except ConfigError:
        return None
    return held if held.classes == source.classes else None


def bank_size(source: Source) -> int:
    return min(BANK, max(1, len(source) - query_size(source)))


def query_size(source: Source) -> int:
    """Images the k-NN classifies; of training images, where there is no other split, a third at most."""
    return min(QUERIES, len(source) // 3) if len(source.classes) >= 2 else 0


def lidar_size(config: Config, source: Source) -> int:
    """Images whose views LiDAR compares; with VIEWS of each, the within-class covariance has full rank."""
    return min(max(64, config.encoder_shape[0] // 4), len(source))


def _readable(source: Source, rows: np.ndarray, config: Config) -> dict[int, Tensor]:
    """The images (C, h, w) of those rows that can be read; read in rising order, as files lie."""
    found = {}
    for row in sorted(map(int, rows)):
        try:
            found[row] = decode(source.read(row), config.data.channels)
        except (DecodeError, OSError):
            continue  # the loader counts it and says so
    return found


def _views(image: Tensor, row: int, config: Config) -> Tensor:
    """(q, C, H, W): training crops of an image, as the loader draws them."""
    uniforms = np.random.default_rng([config.runtime.seed, row]).random((VIEWS, 4 * TRIES + 1)).tolist()
    boxes = [crop_box(*image.shape[1:], config.data.crop_scale, numbers) for numbers in uniforms]
    flips = [config.data.use_horizontal_flip and numbers[-1] < 0.5 for numbers in uniforms]
    return torch.stack([crop(image, box, config.image_size, flip) for box, flip in zip(boxes, flips, strict=True)])


def probe_period(config: Config, source: Source, total_steps: int, flops_per_image: float) -> int:
    """Steps between probes; 0: none. `logging.probe_every`, or as often as `logging.monitor_budget` allows, by FLOPs.

    A probe costs one rank the forward passes of its images while the others wait, a step the work on one rank's batch.
    Probes then fall on logged steps, never more often than every `logging.monitor_every` ones, besides that at step 1.
    """
    logging = config.logging
    if logging.probe_every is not None:
        return logging.probe_every
    images = bank_size(source) + query_size(source) + VIEWS * lidar_size(config, source)
    steps = images * flops.encoder(config) / (config.data.batch_size * flops_per_image)  # what a probe costs
    affordable = int(logging.monitor_budget * total_steps / steps)
    if not logging.monitor_every or affordable < 2:
        return 0
    wanted = max(logging.monitor_every, total_steps / (affordable - 1))
    return math.ceil(wanted / logging.every) * logging.every


class Sign(NamedTuple):
    """A reading that must not fall below `floor` times its value at the start."""

    name: str
    floor: float
    meaning: str


SIGNS = (
    Sign("feature_std", 0.25, "complete collapse, every patch is getting the same features"),
    Sign("image_std", 0.25, "complete collapse, every image is getting the same features"),
    Sign("effective_rank", 0.5, "dimensional collapse, the features are shrinking to a few directions"),
    Sign("lidar", 0.5, "dimensional collapse, few directions tell images apart"),
)
JUMP = 2.0  # a loss this many times all of the three readings before
STILL = 0.01  # k-NN accuracy above that at the start which is none
SHORT_MEMORY = 10  # steps: a target encoder that averages fewer follows the context encoder at once
BIG_STEP = 0.25  # Adam moves a weight by about the learning rate a step: this share of its initial size is much


def alarms(history: Sequence[Mapping[str, float]], now: Now, config: Config, warmup_steps: float = 0) -> list[str]:
    """Sentences for what the last of the readings confirms: the step, what was seen, the likely cause, the key to turn.

    Every kind warns at its second bad reading in a row and not again until it has recovered, so one odd batch never
    warns and a long collapse warns once. Readings that are not finite are bad.

    Args:
        history: readings by name, and `step` and `loss`, in the order they were taken; a name may be missing in some.
        now: the schedules' values, of which the likely cause is read.
        warmup_steps: until when a k-NN may stand where it stood at the start.
    """
    if not history:
        return []
    last, found = history[-1], []
    for sign in SIGNS:
        start, *values = series(history, sign.name) or [0.0]
        bad = [not value >= sign.floor * start for value in values]
        if sign.name in last and start > 0 and confirmed(bad):
            share = f"{values[-1] / start:.0%} of its value at the start, {start:.3g}"
            found.append(f"{sign.meaning} ({sign.name} {values[-1]:.3g}, {share}); {remedy(history, now, config)}")
    if "knn" in last and confirmed(stagnant(history, warmup_steps)):
        start = series(history, "knn")[0]
        found.append(f"stagnation, a k-NN on the features finds {last['knn']:.1%} after the warm-up, {start:.1%} at the "
                     f"start: nothing is learned; {remedy(history, now, config, stuck=True)}")  # fmt: skip
    if confirmed(jumps(series(history, "loss"))):
        found.append(f"the loss jumped to {last['loss']:.3g} and stayed; the steps are too large: lower optimization.lr "
                     f"(now {now.lr:.2g}) or raise optimization.warmup")  # fmt: skip
    return [f"step {last['step']}: {sentence}" for sentence in found]


def series(history: Iterable[Mapping[str, float]], name: str) -> list[float]:
    """All readings of that name; NaN where one was not finite."""
    return [math.nan if entry[name] is None else entry[name] for entry in history if name in entry]


def confirmed(bad: Sequence[bool]) -> bool:
    """Whether the last reading is the second bad one in a row."""
    return list(bad[-2:]) == [True, True] and list(bad[-3:]) != [True] * 3


def stagnant(history: Sequence[Mapping[str, float]], warmup_steps: float) -> list[bool]:
    probed = [entry for entry in history if "knn" in entry]
    start, *later = series(probed, "knn")
    steps = [entry["step"] for entry in probed[1:]]
    enough = min(start + STILL, 1 - STILL)  # what is classified without an error cannot be done better
    return [not knn > enough for step, knn in zip(steps, later, strict=True) if step > warmup_steps]


def jumps(losses: Sequence[float]) -> list[bool]:
    """Of each loss from the fourth on, whether it lies above JUMP times all of the three before the jump, or is not finite."""
    bad: list[bool] = []
    for i in range(3, len(losses)):
        before = i - 1 if bad and bad[-1] else i  # a jump that lasts is measured from where it began
        bad.append(not losses[i] <= JUMP * max(losses[max(0, before - 3) : before]))
    return bad


def remedy(history: Sequence[Mapping[str, float]], now: Now, config: Config, stuck: bool = False) -> str:
    """The likely cause of a collapse and the key to turn, by what can be told apart: momentum, learning rate, objective."""
    memory = 1 / max(1 - now.ema_momentum, 1e-9)  # steps
    if memory < SHORT_MEMORY:
        return (f"the target encoder follows the context encoder within {memory:.0f} steps: raise optimization.ema "
                f"(now {now.ema_momentum:.3g}) to 0.99 or more")  # fmt: skip
    peak = config.optimization.lr
    if peak > BIG_STEP * INITIAL_STD or any(jumps(series(history, "loss"))):
        return f"the steps are too large: lower optimization.lr (peak {peak:.2g}) or raise optimization.warmup"
    if config.loss.regularizer == "none":
        return "set loss.regularizer=vicreg, lower optimization.lr or raise optimization.ema"
    if stuck:
        return "train longer (optimization.epochs), or raise optimization.lr"
    return "raise loss.regularizer_weight, lower optimization.lr or raise optimization.ema"


class Monitor:
    """Takes the readings of a run on the rank that writes its log.

    Args:
        history: the entries of a resumed run's log, () for a new one.
        flops_per_image: FLOPs of training on one image, which decide how often a probe is affordable.
    """

    def __init__(self, config: Config, source: Source, target_encoder: nn.Module, schedule: Schedule,
                 history: Iterable[Mapping[str, float]], flops_per_image: float):  # fmt: skip
        self.config, self.source, self.encoder, self.schedule = config, source, target_encoder, schedule
        self.history = [dict(entry) for entry in history if not entry.keys().isdisjoint(READINGS)]
        self.period = probe_period(config, source, schedule.total_steps, flops_per_image)
        self.warmup_steps = config.optimization.warmup * schedule.steps_per_epoch
        self.seconds, self.probe = 0.0, None
        self._start = time.perf_counter()

    def due(self, step: int) -> bool:
        return self._monitors(step) or self._probes(step)

    def look(self, step: int, target: Tensor, loss: Tensor, now: Now) -> tuple[dict[str, float], list[str]]:
        """Take the readings that are due after `step` steps: what to log, by name, and what to tell the user.

        Args:
            target: (U, D) target features of the last micro-batch.
            loss: 0-dim, of this step.
        """
        if target.is_cuda:
            torch.cuda.synchronize(target.device)  # the steps still under way are no cost of the readings
        start, found, notes = time.perf_counter(), {}, []
        if self._monitors(step):
            found |= {"feature_std": spread(target), "effective_rank": effective_rank(target)}
        if self._probes(step):
            if self.probe is None:
                self.probe = gather_probe(self.config, self.source)
                notes.append(f"probes at step 1 and every {self.period}: {self.probe.about}")
            found |= self.probe.read(self.encoder, self.config, target.device)
        self.history.append({"step": step, "loss": float(loss), **found})
        notes += [f"warning: {sentence}" for sentence in alarms(self.history, now, self.config, self.warmup_steps)]
        self.seconds += time.perf_counter() - start
        found["monitor_share"] = self.seconds / (time.perf_counter() - self._start)
        return found, notes

    def _monitors(self, step: int) -> bool:
        return self._falls(step, self.config.logging.monitor_every)

    def _probes(self, step: int) -> bool:
        return self._falls(step, self.period)

    def _falls(self, step: int, every: int) -> bool:
        """At step 1 and at multiples of `every`, but for those that would share the first logged line with step 1."""
        return every > 0 and (step == 1 or step % every == 0 and step > self.config.logging.every)
