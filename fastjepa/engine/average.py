"""The target encoder: an exponential moving average of the context encoder (paper, section 3), always in fp32."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastjepa.ranks.collectives import all_gather, gather_objects, this_rank
from fastjepa.ranks.shard import Piece
from fastjepa_kernels import ema_table, ema_update_


class PairedPiece(NamedTuple):
    """A part of a weight of the encoder and of its average that a rank holds, as views of what trains."""

    online: Tensor  # (n,) fp32, of the flattened weight from `start`
    average: Tensor  # (n,) fp32
    start: int


class Average:
    """An average held by the target encoder's own fp32 parameters."""

    def __init__(self, target_encoder: nn.Module, online: nn.Module):
        self.target_encoder = target_encoder
        self.averages, self.values = list(target_encoder.parameters()), list(online.parameters())
        self.table = ema_table(self.averages, self.values) if self.averages[0].is_cuda else None

    @torch.no_grad()
    def update(self, momentum: float, finite: Tensor) -> None:
        """Move the average: average <- momentum * average + (1 - momentum) * online where `finite` holds, else not at all.

        Example: an average of 2 and a weight of 4 give 2.04 with momentum 0.98.

        `finite` is a 0-dim bool tensor on the device: a skipped step is never read back by the host. The online weights
        must be finite, which a skipped optimizer step leaves them.
        """
        ema_update_(self.averages, self.values, momentum, finite, table=self.table)

    def pairs(self) -> list[PairedPiece]:
        """Return every weight of the encoder with its average."""
        return _whole_pairs(self.values, self.averages)


class FollowedAverage:
    """An average that the engine's optimizer moves in its own pass, as PlainEngine.follow says."""

    def __init__(self, target_encoder: nn.Module, online: nn.Module):
        self.target_encoder, self.online = target_encoder, online

    def update(self, momentum: float, finite: Tensor) -> None:
        """Return at once: the step that has just been taken moved the average, with the same momentum and flag."""
        return None

    def pairs(self) -> list[PairedPiece]:
        """Return every weight of the encoder with its average."""
        return _whole_pairs(self.online.parameters(), self.target_encoder.parameters())


def _whole_pairs(values: Iterable[Tensor], averages: Iterable[Tensor]) -> list[PairedPiece]:
    pairs = zip(values, averages, strict=True)
    return [PairedPiece(value.detach().view(-1), average.detach().view(-1), 0) for value, average in pairs]


class ShardedAverage:
    """An average in pieces: each rank moves those of its fp32 master weights, and the whole is gathered once a step.

    The target encoder's matrices are in the dtype it computes in, its norms and biases in fp32, as autocast takes them:
    it computes what a whole fp32 average would.
    """

    def __init__(self, target_encoder: nn.Module, online: Mapping[str, Piece], dtype: torch.dtype):
        """`online` holds {parameter: this rank's piece of its master weight}; the average starts as the target encoder is."""
        self.target_encoder = target_encoder
        parameters = dict(target_encoder.named_parameters())
        matrices = {name: p for name, p in parameters.items() if p.ndim > 1}
        others = {name: p for name, p in parameters.items() if p.ndim <= 1}
        self.parts = [_Part(matrices, online, dtype), _Part(others, online, torch.float32)]

    @torch.no_grad()
    def update(self, momentum: float, finite: Tensor) -> None:
        """Move this rank's pieces, as Average.update does, and gather the whole."""
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
        """Return this rank's piece of the average of each parameter that it has a piece of, by name."""
        return {name: piece for part in self.parts for name, piece in part.pieces.items()}

    def pairs(self) -> list[PairedPiece]:
        """Return this rank's pieces of the encoder's master weights with their averages."""
        return [PairedPiece(value, piece.tensor, piece.start) for part in self.parts
                for value, piece in zip(part.values, part.pieces.values(), strict=True)]  # fmt: skip


class _Part:
    """Parameters that DeepSpeed shards together: this rank's averages side by side, as they are sent, `room` elements a rank.

    At stages 1 and 2 what all ranks send is, laid side by side, the parameters themselves. They then become views of it,
    and a gather brings each element to its place: no buffer is received into, none is copied from. At stage 3 every
    parameter is cut on its own, and what was received is copied out.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], online: Mapping[str, Piece], dtype: torch.dtype):
        mine = [name for name in parameters if name in online]
        extents = gather_objects([(name, online[name].start, online[name].tensor.numel()) for name in mine])
        self.room = max(sum(count for _, _, count in rank) for rank in extents)
        self.device = next(iter(parameters.values())).device  # masters that are offloaded are averaged where they are
        home = next((online[name].tensor.device for name in mine), self.device)
        self.values, counts = [online[name].tensor for name in mine], [online[name].tensor.numel() for name in mine]
        starts = [parameters[name].view(-1)[online[name].start :][:count] for name, count in zip(mine, counts, strict=True)]
        begun = torch.cat([*starts, torch.zeros(self.room - sum(counts), device=self.device)]).to(home)

        self.whole = self._laid_out(parameters, extents, dtype)  # (world * room,) or None
        rank = this_rank()
        self.own = None if self.whole is None else self.whole[rank * self.room :][: self.room]
        self.sent = torch.empty(self.room, dtype=dtype, device=home) if self.own is None or home != self.device else self.own
        self.average = self.sent if dtype == torch.float32 else torch.empty_like(self.sent, dtype=torch.float32)
        self.average.copy_(begun)
        self.averages, self.copies = (list(flat[: sum(counts)].split(counts)) for flat in (self.average, self.sent))
        self.pieces = {name: online[name]._replace(tensor=average) for name, average in zip(mine, self.averages, strict=True)}
        self.table = ema_table(self.averages, self.values, self._rounded()) if home.type == "cuda" else None

    def _laid_out(self, parameters: dict[str, nn.Parameter], extents: list, dtype: torch.dtype) -> Tensor | None:
        """Return the buffer that is gathered, its parameters views of it, where each one's pieces lie side by side in it.

        Elsewhere return None, and keep where each received piece is copied to. Example: two ranks with room for 4 share a
        of 6 elements and b of 2. Rank 0 sends a[0:4], rank 1 sends a[4:6] and b[0:2]: pieces at the places 0, 4 and 6 that
        start at 0, 4 and 0 in their parameters. Place minus start is 0 for both of a, and 6 for b, so both become views.
        """
        places = [(name, start, rank * self.room + offset, count)
                  for rank, extent in enumerate(extents) for name, start, count, offset in _offsets(extent)]  # fmt: skip
        origins = {(name, offset - start) for name, start, offset, _ in places}
        if len(origins) == len(parameters):
            whole = torch.zeros(len(extents) * self.room, dtype=dtype, device=self.device)
            for name, origin in origins:
                p = parameters[name]
                p.data = whole[origin : origin + p.numel()].view_as(p).copy_(p)
            return whole
        for p in parameters.values():
            p.data = p.to(dtype)
        self.places = [parameters[name].view(-1)[start : start + count] for name, start, _, count in places]
        self.sources = [(offset, count) for _, _, offset, count in places]
        return None

    def _rounded(self) -> list[Tensor] | None:
        return None if self.sent is self.average else self.copies

    def update(self, momentum: float, finite: Tensor) -> None:
        """Move the averages, and round them to what is sent."""
        ema_update_(self.averages, self.values, momentum, finite.to(self.average.device), self._rounded(), self.table)

    def round(self) -> None:
        """Round averages that were written from outside to what is sent."""
        self.sent.copy_(self.average)

    def gather(self) -> None:
        """Bring every rank's pieces to the target encoder."""
        if self.whole is None:
            # (world * room,), freed again: the memory of the activations has room for it.
            everyone = all_gather(self.sent.to(self.device))
            torch._foreach_copy_(self.places, [everyone[start : start + count] for start, count in self.sources])
        else:
            all_gather(self.own.copy_(self.sent), into=self.whole)


def _offsets(extent: list[tuple[str, int, int]]) -> list[tuple[str, int, int, int]]:
    """Return where each piece lies in what its rank sends: (name, start, count, offset).

    Example: pieces (a, 4, 2) and (b, 0, 2) lie at the offsets 0 and 2.
    """
    placed, offset = [], 0
    for name, start, count in extent:
        placed.append((name, start, count, offset))
        offset += count
    return placed
