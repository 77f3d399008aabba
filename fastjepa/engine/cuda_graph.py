"""A micro-batch's forward and backward as one CUDA graph: one launch where there were thousands.

A graph replays the same kernels on the same memory. So its batch, loss, target features and gradients stay where they were
captured, and micro-batches have the shapes of the budget; one that has not runs as it would without a graph, and is counted.
Optimizer and average stay outside: they are a few launches, queued while the graph runs, with learning rate, decay and
momentum of the step, which a graph would freeze.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastjepa.config.schema import Config
from fastjepa.errors import ConfigError
from fastjepa.loader.batch import Batch
from fastjepa.masks.packed import PackedSize, PaddingBudget

MicroStep = Callable[[Batch], tuple[Tensor, Tensor]]  # forward and backward: the loss and the target features, both detached
WARM_UP_RUNS = 3  # runs before the capture: kernels are compiled, tables made and libraries given their workspaces


def check_cuda_graph(config: Config, device: torch.device, way: str, ranks: int) -> None:
    """ConfigError where the run cannot be captured; `way` is the attention that runs."""
    if device.type != "cuda":
        raise ConfigError("runtime.cuda_graph: needs a CUDA device; switch it off")
    if ranks > 1 or config.runtime.zero not in ("auto", 0):
        raise ConfigError(
            "runtime.cuda_graph: captures no exchange of ranks; run on one rank with runtime.zero 0, or switch it off"
        )
    if way == "xformers":
        raise ConfigError(
            "runtime.cuda_graph: not with xformers, which makes masks on the host; set runtime.attention to another"
        )


class CudaGraph:
    """Call it with a micro-batch, as what it captures; results are overwritten by the next call.

    `parameters` gather gradients: with one micro-batch a step a replay writes them, with several it adds to them, as the
    engine leaves them in place and zeroes them after every step.
    """

    def __init__(self, learn: MicroStep, budget: PaddingBudget, parameters: Sequence[nn.Parameter], micro_batches: int):
        self.learn, self.budget, self.parameters, self.adds = learn, budget, parameters, micro_batches > 1
        self.graph: torch.cuda.CUDAGraph | None = None
        self.replayed = self.uncaptured = 0

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if padded_size(batch) != self.budget.size:
            self.uncaptured += 1
            return self.learn(batch)
        if self.graph is None:
            self.capture(batch)
        for static, given in zip(self.batch.tensors(), batch.tensors(), strict=True):
            static.copy_(given, non_blocking=True)
        self.graph.replay()
        self.replayed += 1
        return self.result

    def capture(self, batch: Batch) -> None:
        """Gradients of earlier micro-batches of the step are kept."""
        self.batch = batch.clone()
        kept = [p.grad for p in self.parameters]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_RUNS):
                self.learn(self.batch)
                for p in self.parameters:
                    p.grad = None
        torch.cuda.current_stream().wait_stream(side)
        if self.adds:
            for p, grad in zip(self.parameters, kept, strict=True):
                p.grad = torch.zeros_like(p) if grad is None else grad
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.result = self.learn(self.batch)
        self.graph = graph


def padded_size(batch: Batch) -> PackedSize:
    """The size it is padded to; of one that is not padded, its own: no budget's, or it would have been."""
    context, queries, sequences = batch.context, batch.blocks.queries, batch.blocks.sequences
    return PackedSize(len(context.idx), len(batch.target.idx), len(queries.idx), len(sequences.idx),
                context.max_len, queries.max_len, sequences.max_len)  # fmt: skip
