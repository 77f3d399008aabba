"""The state of a run at a step, and the names under which a checkpoint stores it."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastjepa.engine.muon import MuonAdamW
from fastjepa.engine.shards import Shards
from fastjepa.errors import CheckpointError

STATE_FILE = "state.json"


@dataclass
class TrainState:
    """The whole of a run at a step; hyperparameters are functions of the step and so no part of it."""

    step: int
    networks: dict[str, nn.Module]  # by the names in model.jepa.NETWORKS, unwrapped
    optimizer: torch.optim.Optimizer | MuonAdamW  # its state per parameter: `moment_names`
    skipped: int = 0
    skipped_in_row: int = 0
    bad_files: list[str] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)  # config, versions, threads, world: see `record_differences`
    shards: Shards | None = None  # where ranks share the state: their parts, in place of the tensors above


def read_state(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint's step, skipped, skipped_in_row, bad_files and record, without touching any tensor."""
    return json.loads((Path(path) / STATE_FILE).read_text())


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
