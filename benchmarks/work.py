"""The step of the trainer, and batches to take it on: synthetic images with the masks that a run draws."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastjepa.config.schema import Config
from fastjepa.engine.plain import PlainEngine
from fastjepa.engine.precision import COMPUTE_DTYPES
from fastjepa.engine.schedule import Schedule
from fastjepa.loader.batch import Batch
from fastjepa.masks.check import check_masks
from fastjepa.masks.draw import draw_masks
from fastjepa.masks.layouts import Masking
from fastjepa.masks.packer import Packer
from fastjepa.plan.flops import flops_of_packed
from fastjepa.plan.plan import workload_of
from fastjepa.ranks.world import join_world
from fastjepa.run.build import apply_process_settings, build_networks, build_objective, build_runs, placed_teacher
from fastjepa.run.step import Step

STEPS_PER_EPOCH = 1000  # of the schedules here; only their pace depends on it


@dataclass(frozen=True)
class Work:
    """One global batch, as every contender sees it."""

    images: Tensor  # (B, C, H, W) fp32
    context_mask: np.ndarray  # (B, K, N) bool
    target_mask: np.ndarray  # (B, R, N) bool

    @classmethod
    def draw(cls, config: Config, device: torch.device, number: int, group: int | None = None) -> "Work":
        """Draw the batch of a step; its contexts are cut to the shortest of `group` images (default: of the batch)."""
        batch = config.data.batch_size
        drawn = draw_masks(Masking.of(config), number, range(batch), group or batch)
        return cls(synthetic_images(config, number, batch).to(device), *drawn)

    def packed(self, config: Config, pad: bool = True) -> list[Batch]:
        """Return the trainer's micro-batches, on the host but for their images; for a CUDA graph they are padded."""
        images = len(self.images)
        room = workload_of(config).padding_budget(images) if pad and config.runtime.cuda_graph else None
        found, packer = [], Packer(Masking.of(config))
        for start in range(0, images, config.micro_batch):
            part = slice(start, start + config.micro_batch)
            drawn = self.context_mask[part], self.target_mask[part]
            rows = packer.pack_drawn(drawn, 0, range(part.start, part.stop), images, room)
            found.append(Batch(self.images[part], *rows, bad=()))
        return found

    def flops_per_image(self, config: Config) -> float:
        """Return the FLOPs of this package's step on the batch, without padding, by `fastjepa.plan.flops`."""
        parts = [flops_of_packed(workload_of(config), b.context, b.target, b.blocks) for b in self.packed(config, pad=False)]
        return float(np.mean([part.total for part in parts]))

    def indices(self, mask: np.ndarray) -> list[Tensor]:
        """(B, M, N) -> M tensors (B, length) of patch indices in raster order, each mask cut to the shortest."""
        shortest = int(mask.sum(axis=2).min())
        kept = mask & (np.cumsum(mask, axis=2) <= shortest)
        return [torch.from_numpy(np.nonzero(one)[1].reshape(len(mask), shortest)).to(self.images.device)
                for one in kept.transpose(1, 0, 2)]  # fmt: skip


class TrainerStep:
    """The trainer's own networks, engine, average and step, at the schedule's first values."""

    def __init__(self, config: Config, device: torch.device):
        config, teacher = placed_teacher(config, device)
        self.config, self.device = config, device
        self.jepa, self.target_encoder = build_networks(config, device)
        self.engine = PlainEngine(self.jepa, 1, config.data.batch_size // config.micro_batch, config.runtime.cuda_graph)
        self.average = self.engine.follow(self.target_encoder)
        objective = build_objective(config, self.engine, self.target_encoder, join_world(config.runtime.device), teacher)
        parts = self.engine, self.average, objective, COMPUTE_DTYPES[config.runtime.dtype]
        self.step = Step(*parts, build_runs(config, self.engine))
        self.now = Schedule(config.optimization, STEPS_PER_EPOCH)(0)

    def take(self, batches: Iterable[Batch]) -> Tensor:
        """Take one optimizer step over its micro-batches; return the loss, on the device."""
        return self.step(batches, self.now)[0].loss


def synthetic_images(config: Config, number: int, count: int, side: int | None = None) -> Tensor:
    """Return (count, C, H, W) fp32 images on the host; they are the same for the same seed and number."""
    generator = torch.Generator().manual_seed(config.runtime.seed + number)
    height, width = (side, side) if side else config.image_size
    return torch.randn(count, config.data.channels, height, width, generator=generator)


def prepare_device(config: Config, group: int) -> torch.device:
    """Check that masks can be drawn for `group` images, apply the settings of the process, and return the device."""
    device = join_world(config.runtime.device).device
    check_masks(Masking.of(config), group)
    apply_process_settings(config)
    torch.manual_seed(config.runtime.seed)
    return device


def mlp_shapes(config: Config) -> list[tuple[int, int, int]]:
    """Return (rows, in, out) of the first mlp layers of encoder and predictor over the whole images of a batch.

    With the large square product they are the shapes whose best rate is the ceiling of a step.
    """
    dim, _, _, mlp_ratio = config.encoder_shape
    tokens, narrow = config.data.batch_size * config.grid[0] * config.grid[1], config.meta.pred_emb_dim
    return [(tokens, dim, round(dim * mlp_ratio)), (tokens, narrow, 4 * narrow)]
