"""The packer: the masks of a run, drawn as functions of (seed, step, slot) and packed as its objective reads them."""

from dataclasses import dataclass

import numpy as np

from fastjepa.masks.distances import visible_weights
from fastjepa.masks.draw import draw_masks, draw_seen
from fastjepa.masks.layouts import Masking, Slots
from fastjepa.masks.pack import ContextRows, pack
from fastjepa.masks.packed import Blocks, Packed, PaddingBudget


@dataclass(frozen=True)
class Packer:
    """Masks and rows of any slots of any step."""

    masking: Masking

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
        return self.pack_drawn(draw_masks(self.masking, step, slots, total), step, slots, images, budget, progress)

    def pack_drawn(
        self,
        drawn: tuple[np.ndarray, np.ndarray],
        step: int,
        slots: range,
        images: int | None = None,
        budget: PaddingBudget | None = None,
        progress: float = 1.0,
    ) -> tuple[Packed, Packed, Blocks]:
        """Return the same of masks that are `drawn`: contexts (b, K, N) and targets (b, R, N)."""
        rows = self.rows(step, slots, *drawn, progress)
        return pack(*drawn, images, self.masking.packing, budget, rows)

    def rows(self, step: int, slots: range, context: np.ndarray, target: np.ndarray, progress: float = 1.0) -> ContextRows:
        """Return how the predictor meets the context rows of the masks (b, K, N) and (b, R, N) of some slots of a step."""
        seen, visible, use = None, None, self.masking.use
        if use.share < 1:
            drawn = Slots(self.masking.seed, step, slots.start, slots.stop, self.masking.mask.share == "batch")
            seen = draw_seen(context, use.share, use.repeats, drawn)
        if use.visible_weight:
            visible = visible_weights(target, self.masking.grid, use.weight(progress))
        return ContextRows(seen, visible)
