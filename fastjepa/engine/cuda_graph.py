"""A micro-batch's forward and backward as one CUDA graph: one launch where there were thousands.

A graph replays the same kernels on the same memory. So its batch, loss, target features and gradients stay where they were
captured, and micro-batches have the shapes of the budget; one that has not runs as it would without a graph, and is counted.
Optimizer and average stay outside: they are a few launches, queued while the graph runs, with learning rate, decay and
momentum of the step, which a graph would freeze.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from fastjepa.engine.tally import StepTally
from fastjepa.errors import ConfigError
from fastjepa.loader.batch import Batch
from fastjepa.masks.packed import PackedSize, PaddingBudget

WARM_UP_RUNS = 3  # runs before the capture: kernels are compiled, tables made and libraries given their workspaces


def check_cuda_graph(device: torch.device, way: str, ranks: int, zero: str | int) -> None:
    """Raise ConfigError where a run cannot be captured; `way` is the attention that runs, `zero` is runtime.zero."""
    if device.type != "cuda":
        raise ConfigError("runtime.cuda_graph: needs a CUDA device; switch it off")
    if ranks > 1 or zero not in ("auto", 0):
        raise ConfigError(
            "runtime.cuda_graph: captures no exchange of ranks; run on one rank with runtime.zero 0, or switch it off"
        )
    if way == "xformers":
        raise ConfigError(
            "runtime.cuda_graph: not with xformers, which makes masks on the host; set runtime.attention to another"
        )


class EagerRuns:
    """Eager runs: the body of the loop over micro-batches runs for each of them."""

    def over(self, batches: Iterable[Batch], tally: StepTally) -> Iterator[Batch]:
        """Yield every micro-batch to the body of the loop, and count what it noted in the tally."""
        for batch in batches:
            yield batch
            tally.count(batch)

    def logged(self) -> dict[str, float]:
        """Return the values of a line of the log that are its own."""
        return {}


class CudaGraph(EagerRuns):
    """A CUDA graph of the body of the loop: captured on the first micro-batch of the budget's size, replayed from then on.

    The body must do all of its work on the device, from the batch that it is given to the gradients of `parameters` and
    to the tally's loss and features; the last are overwritten by the next replay. With one micro-batch a step a replay
    writes the gradients, with several it adds to them, as the engine leaves them in place and zeroes them after every step.
    """

    def __init__(self, budget: PaddingBudget, parameters: Sequence[nn.Parameter], micro_batches: int):
        self.budget, self.parameters, self.adds = budget, parameters, micro_batches > 1
        self.graph: torch.cuda.CUDAGraph | None = None
        self.replayed = self.uncaptured = 0

    def over(self, batches: Iterable[Batch], tally: StepTally) -> Iterator[Batch]:
        """Yield the micro-batches that are over the budget, and those that are captured; replay the others."""
        for batch in batches:
            if padded_size(batch) != self.budget.size:
                self.uncaptured += 1
                yield batch
            else:
                if self.graph is None:
                    yield from self._captured(batch, tally)
                self._replay(batch, tally)
            tally.count(batch)

    def logged(self) -> dict[str, float]:
        """Return how many micro-batches of this run had a place in the graph, and how many were over the budget."""
        return {"replayed": self.replayed, "uncaptured": self.uncaptured}

    def _replay(self, batch: Batch, tally: StepTally) -> None:
        for static, given in zip(self.batch.tensors(), batch.tensors(), strict=True):
            static.copy_(given, non_blocking=True)
        self.graph.replay()
        self.replayed += 1
        tally.part, tally.features = self.results

    def _captured(self, batch: Batch, tally: StepTally) -> Iterator[Batch]:
        """Yield a copy of the batch for each warm-up run and for the capture; earlier gradients of the step are kept."""
        self.batch = batch.clone()
        kept = [p.grad for p in self.parameters]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_RUNS):
                yield self.batch
                for p in self.parameters:
                    p.grad = None
        torch.cuda.current_stream().wait_stream(side)
        if self.adds:
            for p, grad in zip(self.parameters, kept, strict=True):
                p.grad = torch.zeros_like(p) if grad is None else grad
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            yield self.batch
        self.graph, self.results = graph, (tally.part, tally.features)


def padded_size(batch: Batch) -> PackedSize:
    """Return the size that a micro-batch is padded to; of one that is not padded its own, which is no budget's."""
    context, queries, sequences = batch.context, batch.blocks.queries, batch.blocks.sequences
    rows: tuple[Tensor, ...] = (context.idx, batch.target.idx, queries.idx, sequences.idx)
    return PackedSize(*map(len, rows), context.max_len, queries.max_len, sequences.max_len)
