"""The state of a run at a step, and the names under which a checkpoint stores it."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastjepa.engine.average import ShardedAverage
from fastjepa.engine.zero import ZeroEngine
from fastjepa.errors import CheckpointError
from fastjepa.ranks.shard import Piece, TensorForm

NETWORKS = ("encoder", "predictor", "target_encoder")  # of a run; the names of their files in a checkpoint
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
STATE_FILE, OPTIMIZER = "state.json", "optimizer"


@dataclass
class TrainState:
    """The whole of a run at a step; hyperparameters are functions of the step and so no part of it."""

    step: int
    networks: dict[str, nn.Module]  # by the names in NETWORKS, unwrapped
    optimizer: torch.optim.Optimizer  # AdamW: step, exp_avg and exp_avg_sq per parameter
    skipped: int = 0
    skipped_in_row: int = 0
    bad_files: list[str] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)  # config, versions, threads, world: see `record_differences`
    shards: "Shards | None" = None  # where ranks share the state: their parts, in place of the tensors above


class Shards:
    """A sharded engine and average, as checkpoints see them: this rank's part of every group of tensors."""

    def __init__(self, engine: ZeroEngine, average: ShardedAverage, networks: Mapping[str, nn.Module]):
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


def read_state(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint's step, skipped, skipped_in_row, bad_files and record, without touching any tensor."""
    return json.loads((Path(path) / STATE_FILE).read_text())


def forms_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorForm]:
    """Return the dtype and shape of each tensor."""
    return {name: Piece.all_of(tensor).form for name, tensor in tensors.items()}


def record_differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Return a line for each entry in which two records differ, such as "threads: 2 in the checkpoint, 4 now"."""
    before, now = dict(_leaves(saved)), dict(_leaves(current))
    return [
        f"{name}: {before.get(name, 'nothing')} in the checkpoint, {now.get(name, 'nothing')} now"
        for name in [*before, *(name for name in now if name not in before)]
        if name not in before or name not in now or before[name] != now[name]
    ]


def _leaves(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:  # JSON knows no tuples
            yield f"{prefix}{name}", list(value) if isinstance(value, tuple) else value


def optimized_parameters(state: TrainState) -> dict[str, nn.Parameter]:
    """Return the optimizer's parameters by "<network>.<parameter>"; indices would change with the order of the groups."""
    names = {p: f"{network}.{name}" for network, module in state.networks.items() for name, p in module.named_parameters()}
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    for p in parameters:
        if p not in names:
            raise CheckpointError(
                f"the optimizer holds a parameter {tuple(p.shape)} of no saved network; add its network to the state"
            )
    return {names[p]: p for p in parameters}
