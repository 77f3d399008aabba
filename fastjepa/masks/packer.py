"""The packer: the masks of a run, drawn as functions of (seed, step, slot) and packed as its objective reads them."""

from dataclasses import dataclass

import numpy as np

from fastjepa.config.schema import Config, MaskConfig
from fastjepa.masks.distances import visible_weights
from fastjepa.masks.draw import draw_masks, draw_seen
from fastjepa.masks.layouts import Grid, Slots
from fastjepa.masks.pack import ContextRows, pack
from fastjepa.masks.packed import Blocks, Packed, PaddingBudget
from fastjepa.masks.packings import PerBlockPacking, packing_of


@dataclass(frozen=True)
class ContextUse:
    """Use of a context by the predictor, where that is not all of it, once, unpredicted."""

    share: float = 1.0  # of a context's patches that a draw shows
    repeats: int = 1  # draws of a context
    visible_weight: float = 0.0  # of the loss on visible patches, at the end of its rise; 0: they are not predicted
    visible_rise: tuple[float, float] = (0.0, 0.0)  # shares of the run between which that weight rises from 0

    def weight(self, progress: float) -> float:
        """Return the weight of the loss on visible patches when this share of the run is over.

        Example: a weight of 0.5 that rises from 0.1 to 0.2 is 0 up to a tenth of the run, 0.25 at 0.15, 0.5 from 0.2 on.
        """
        start, end = self.visible_rise
        risen = (progress - start) / (end - start) if end > start else float(progress >= end)
        return self.visible_weight * min(max(risen, 0.0), 1.0)


@dataclass(frozen=True)
class Packer:
    """Masks and rows of any slots of any step."""

    mask: MaskConfig
    grid: Grid
    seed: int
    packing: PerBlockPacking
    use: ContextUse = ContextUse()

    def packed(
        self,
        step: int,
        slots: range,
        total: int,
        images: int | None = None,
        budget: PaddingBudget | None = None,
        progress: float = 1.0,
    ) -> tuple[Packed, Packed, Blocks]:
        """Return the packed masks of some slots of a step whose global batch has `total`, as `pack` does.

        `progress` is the share of the run that is over, for a weight that rises; images and budget are as in `pack`.
        """
        context, target = draw_masks(self.mask, self.grid, self.seed, step, slots, total)
        return pack(context, target, images, self.packing, budget, self.rows(step, slots, context, target, progress))

    def rows(self, step: int, slots: range, context: np.ndarray, target: np.ndarray, progress: float = 1.0) -> ContextRows:
        """Return how the predictor meets the context rows of the masks (b, K, N) and (b, R, N) of some slots of a step."""
        seen, visible, use = None, None, self.use
        if use.share < 1:
            drawn = Slots(self.seed, step, slots.start, slots.stop, self.mask.share == "batch")
            seen = draw_seen(context, use.share, use.repeats, drawn)
        if use.visible_weight:
            visible = visible_weights(target, self.grid, use.weight(progress))
        return ContextRows(seen, visible)


def packer_of(config: Config) -> Packer:
    """Return the packer of a config."""
    meta, loss = config.meta, config.loss
    use = ContextUse(meta.predictor_context, meta.predictor_repeats, loss.visible_weight, loss.visible_rise)
    return Packer(config.mask, config.grid, config.runtime.seed, packing_of(meta.predictor, loss.target), use)
