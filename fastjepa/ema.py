"""The target encoder: an exponential moving average of the context encoder (paper, section 3), always in fp32."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastjepa import distributed
from fastjepa.pieces import Piece
from fastjepa_kernels import ema_table, ema_update_


class Average:
    """The target encoder's own fp32 parameters are the average."""

    def __init__(self, target_encoder: nn.Module, online: nn.Module):
        self.target_encoder = target_encoder
        self.averages, self.values = list(target_encoder.parameters()), list(online.parameters())
        self.table = ema_table(self.averages, self.values) if self.averages[0].is_cuda else None

    @torch.no_grad()
    def update(self, momentum: float, finite: Tensor) -> None:
        """average <- momentum * average + (1 - momentum) * online where `finite` holds; nothing elsewhere.

        `finite` is a 0-dim bool tensor on the device: a skipped step is never read back by the host. The online weights
        must be finite, which a skipped optimizer step leaves them.
        """
        ema_update_(self.averages, self.values, momentum, finite, table=self.table)


class ShardedAverage:
    """Each rank averages its pieces of the engine's fp32 master weights; the target encoder is the whole, gathered once a step.

    The target encoder's matrices are in the dtype it computes in, its norms and biases in fp32, as autocast takes them:
    it computes what a whole fp32 average would.
    """

    def __init__(self, target_encoder: nn.Module, online: Mapping[str, Piece], dtype: torch.dtype):
        """`online` holds {parameter: this rank's piece of its master weight}."""
        self.target_encoder = target_encoder
        parameters = dict(target_encoder.named_parameters())
        matrices = {name for name, p in parameters.items() if p.ndim > 1}
        for name in matrices:
            parameters[name].data = parameters[name].to(dtype)
        alike = [set(parameters)] if dtype == torch.float32 else [matrices, parameters.keys() - matrices]
        self.parts = [_Part({name: p for name, p in parameters.items() if name in names}, online) for names in alike]

    @torch.no_grad()
    def update(self, momentum: float, finite: Tensor) -> None:
        """As Average.update."""
        for part in self.parts:
            part.update(momentum, finite)
            part.gather()

    @torch.no_grad()
    def publish(self) -> None:
        """Bring the target encoder up to averages that were written from outside."""
        for part in self.parts:
            part.round()
            part.gather()

    def pieces(self) -> dict[str, Piece]:
        """{parameter: this rank's piece of its average}"""
        return {name: piece for part in self.parts for name, piece in part.pieces.items()}


class _Part:
    """The parameters of one dtype: this rank's averages side by side, as they are sent."""

    def __init__(self, parameters: dict[str, nn.Parameter], online: Mapping[str, Piece]):
        mine = [name for name in parameters if name in online]
        extents = distributed.gather([(name, online[name].start, online[name].tensor.numel()) for name in mine])
        self.room = max(sum(count for _, _, count in rank) for rank in extents)  # elements a rank sends
        first = next(iter(parameters.values()))
        self.device = first.device  # of the target encoder; masters that are offloaded are averaged where they are
        home = next((online[name].tensor.device for name in mine), first.device)
        self.average = torch.zeros(self.room, device=home)
        self.sent = self.average if first.dtype == torch.float32 else self.average.to(first.dtype)
        counts = [online[name].tensor.numel() for name in mine]
        self.averages, self.copies = (list(flat[: sum(counts)].split(counts)) for flat in (self.average, self.sent))
        self.values = [online[name].tensor for name in mine]
        self.pieces = {name: online[name]._replace(tensor=average) for name, average in zip(mine, self.averages, strict=True)}
        self.places = [parameters[name].view(-1)[start : start + count] for rank in extents for name, start, count in rank]
        self.sources = [(rank * self.room + offset, count)
                        for rank, extent in enumerate(extents) for offset, count in _offsets(extent)]  # fmt: skip
        if mine:
            torch._foreach_copy_(self.averages, self.values)
        self.table = ema_table(self.averages, self.values, self._rounded()) if home.type == "cuda" else None

    def _rounded(self) -> list[Tensor] | None:
        return None if self.sent is self.average else self.copies

    def update(self, momentum: float, finite: Tensor) -> None:
        ema_update_(self.averages, self.values, momentum, finite.to(self.average.device), self._rounded(), self.table)

    def round(self) -> None:
        self.sent.copy_(self.average)

    def gather(self) -> None:
        # (world * room,), freed again: the memory of the activations has room for it.
        everyone = distributed.all_gather(self.sent.to(self.device))
        torch._foreach_copy_(self.places, [everyone[start : start + count] for start, count in self.sources])


def _offsets(extent: list[tuple[str, int, int]]) -> list[tuple[int, int]]:
    """Where each piece lies in what its rank sends: (offset, count)."""
    offsets, offset = [], 0
    for _, _, count in extent:
        offsets.append((offset, count))
        offset += count
    return offsets
