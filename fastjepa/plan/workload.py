"""Workload of a run: all of a config that plans, FLOPs and bytes are counted from."""

from dataclasses import dataclass

from fastjepa.loss.normalizations import LayerNormalization
from fastjepa.loss.targets import OutputTargets
from fastjepa.masks.layouts import Masking
from fastjepa.masks.packed import PaddingBudget
from fastjepa.masks.padding import padding_budget
from fastjepa.model.jepa import NetworkShape


@dataclass(frozen=True)
class Workload:
    """Work of one rank: networks, masks, objective, the sizes of batches, and how they are computed."""

    shape: NetworkShape
    masking: Masking
    targets: OutputTargets
    normalization: LayerNormalization
    batch_size: int  # images of a rank in a step
    micro_batch: int  # images of a forward
    dtype: str  # runtime.dtype: fp32, bf16, or auto where nothing is asked that depends on it
    checkpointed: bool  # runtime.checkpoint_activations
    compiled: bool
    muon: bool  # optimization.optimizer
    padded: bool  # to one shape, for a CUDA graph
    token_budget: tuple[int, int, int] | None = None  # rows of that shape, where they are given

    @property
    def pieces(self) -> int:
        """Return the micro-batches of a step."""
        return self.batch_size // self.micro_batch

    def padding_budget(self, total: int, micro_batch: int | None = None) -> PaddingBudget:
        """Return the shape that micro-batches of a global batch of `total` images are padded to."""
        return padding_budget(self.masking, total, micro_batch or self.micro_batch, self.token_budget)
