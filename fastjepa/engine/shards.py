"""A state that ranks share, in pieces: what checkpoints write and read of a sharded engine and its average."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from fastjepa.engine.adamw import MOMENTS
from fastjepa.engine.average import ShardedAverage
from fastjepa.ranks.shard import Piece, TensorForm, forms_of

OPTIMIZER = "optimizer"  # the group of moments, beside those of the networks


class ShardedEngine(Protocol):
    """The part of a sharded engine that this file asks."""

    shapes: dict[str, tuple[int, ...]]  # of every parameter

    def masters(self) -> dict[str, Piece]: ...
    def moments(self) -> dict[str, Piece]: ...
    def refresh(self, moments: Mapping[str, Piece]) -> None: ...


class Shards:
    """A sharded engine and average, as checkpoints see them: this rank's part of every group of tensors."""

    def __init__(self, engine: ShardedEngine, average: ShardedAverage, networks: Mapping[str, nn.Module]):
        self.engine, self.average = engine, average
        self.fixed = {group: _buffers(network) for group, network in networks.items()}

    def pieces(self) -> dict[str, dict[str, Piece]]:
        """Return {group: {name: piece}} of what this rank has."""
        found = {group: {name: Piece.all_of(tensor) for name, tensor in fixed.items()} for group, fixed in self.fixed.items()}
        for name, piece in self.engine.masters().items():
            network, _, parameter = name.partition(".")
            found[network][parameter] = piece
        found["target_encoder"] |= self.average.pieces()
        return found | {OPTIMIZER: self.engine.moments()}

    def forms(self) -> dict[str, dict[str, TensorForm]]:
        """Return {group: {name: form}} of the whole state."""
        found = {group: forms_of(fixed) for group, fixed in self.fixed.items()} | {OPTIMIZER: {}}
        for name, shape in self.engine.shapes.items():
            network, _, parameter = name.partition(".")
            found[network][parameter] = "F32", shape
            if network == "encoder":
                found["target_encoder"][parameter] = "F32", shape
            found[OPTIMIZER] |= {f"{name}.{moment}": ("F32", () if moment == "step" else shape) for moment in MOMENTS}
        return found

    def refresh(self, written: Mapping[str, Mapping[str, Piece]]) -> None:
        """Make the networks agree with pieces that `pieces` returned and that were written to since."""
        self.engine.refresh(written[OPTIMIZER])
        self.average.publish()


def _buffers(network: nn.Module) -> dict[str, Tensor]:
    """Return what a network stores beside its parameters."""
    parameters = dict(network.named_parameters())
    return {name: tensor for name, tensor in network.state_dict().items() if name not in parameters}
