"""Checkpoints: complete or invisible, verified before anything is touched, and never pickled.

    <root>/<tag>-<step:08d>/
        encoder.safetensors  predictor.safetensors  target_encoder.safetensors
        optimizer.safetensors   "<network>.<parameter>.exp_avg", ".exp_avg_sq" and ".step"
        state.json              step, counters, bad files, and the record of what made them
        manifest.json           size and SHA-256 of every other file

Everything is written and fsynced in a hidden directory that one rename publishes, so a kill or a full disk at any
moment leaves the earlier checkpoints as they were and nothing half-written under a checkpoint's name. Ranks that share
a state write a file each in place of each of the four (see `pieces`), and the rename comes after every rank's fsync.
Either kind resumes on any number of ranks, sharded or not.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastjepa import distributed, pieces
from fastjepa.config import ConfigError
from fastjepa.ema import ShardedAverage
from fastjepa.engine import ShardedEngine
from fastjepa.manifest import (
    MANIFEST,
    CheckpointError,
    complete,
    discard,
    find,
    fsync,
    hidden_name,
    latest,
    listing,
    publish,
    settle,
    step_of,
    sweep,
    verify,
)
from fastjepa.pieces import Form, Piece, Stored

__all__ = ["CheckpointError", "Shards", "TrainState", "complete", "differences", "find", "latest", "load_networks",
           "read_state", "restore", "save", "verify"]  # fmt: skip

NETWORKS = ("encoder", "predictor", "target_encoder")
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
STATE, OPTIMIZER = "state.json", "optimizer"


@dataclass
class TrainState:
    """All that a run is at a step; hyperparameters are functions of the step and so no part of it."""

    step: int
    networks: dict[str, nn.Module]  # "encoder", "predictor", "target_encoder", unwrapped
    optimizer: torch.optim.Optimizer  # AdamW: step, exp_avg and exp_avg_sq per parameter
    skipped: int = 0
    skipped_in_row: int = 0
    bad_files: list[str] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)  # config, versions, threads, world: see `differences`
    shards: "Shards | None" = None  # where ranks share the state: their parts, in place of the tensors above


class Shards:
    """A sharded engine and average, as checkpoints see them: this rank's part of every group of tensors."""

    def __init__(self, engine: ShardedEngine, average: ShardedAverage, networks: Mapping[str, nn.Module]):
        self.engine, self.average = engine, average
        self.fixed = {group: _buffers(network) for group, network in networks.items()}

    def pieces(self) -> dict[str, dict[str, Piece]]:
        """{group: {name: piece}} of what this rank has."""
        found = {group: {name: Piece.all_of(tensor) for name, tensor in fixed.items()} for group, fixed in self.fixed.items()}
        for name, piece in self.engine.masters().items():
            network, _, parameter = name.partition(".")
            found[network][parameter] = piece
        found["target_encoder"] |= self.average.pieces()
        return found | {OPTIMIZER: self.engine.moments()}

    def forms(self) -> dict[str, dict[str, Form]]:
        """{group: {name: form}} of the whole state."""
        found = {group: _forms(fixed) for group, fixed in self.fixed.items()} | {OPTIMIZER: {}}
        for name, shape in self.engine.shapes.items():
            network, _, parameter = name.partition(".")
            found[network][parameter] = "F32", shape
            if network == "encoder":
                found["target_encoder"][parameter] = "F32", shape
            found[OPTIMIZER] |= {f"{name}.{moment}": ("F32", () if moment == "step" else shape) for moment in MOMENTS}
        return found

    def refresh(self, written: Mapping[str, Mapping[str, Piece]]) -> None:
        """Make the networks agree with pieces, those of `pieces`, that were written from outside."""
        self.engine.refresh(written[OPTIMIZER])
        self.average.publish()


def _buffers(network: nn.Module) -> dict[str, Tensor]:
    parameters = dict(network.named_parameters())
    return {name: tensor for name, tensor in network.state_dict().items() if name not in parameters}


def save(root: str | Path, state: TrainState, tag: str = "jepa", keep_last: int = 2) -> Path:
    """Write `<root>/<tag>-<step>` and drop all but the newest `keep_last` complete ones up to it; every rank takes part.

    A step that is already there, complete and equal, is left alone; otherwise it is replaced.

    Raises:
        CheckpointError: it could not be written (a full disk), on every rank; the earlier checkpoints are untouched.
    """
    if keep_last < 1:
        raise ConfigError(f"logging.keep_last: {keep_last} must be at least 1")
    if not tag or "/" in tag or tag.startswith("."):
        raise ConfigError(f"logging.write_tag: {tag!r} must be a plain file name")
    root, main = Path(root), distributed.rank() == 0
    final = root / f"{tag}-{state.step:08d}"
    files = {} if state.shards or not main else _tensors(state)
    hidden = Path(distributed.from_main(str(hidden_name(final))))
    try:
        _together(final, lambda: _begin(root, hidden) if main else None)
        listed = _together(final, lambda: _write_shards(hidden, state.shards) if state.shards else _write(hidden, files))
        _together(final, lambda: _finish(hidden, final, state, listed) if main else None)
    finally:
        if main:
            shutil.rmtree(hidden, ignore_errors=True)
    if main:
        for old in [path for path in complete(root, tag) if step_of(path) <= state.step][:-keep_last]:
            discard(old)
    return final


def _together(final: Path, action: Callable[[], Any]) -> list[Any]:
    """What each rank's action returned; where one of them failed, the same CheckpointError on all."""
    result = reason = None
    try:
        result = action()
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    done = distributed.gather((result, reason))
    if failed := next((reason for _, reason in done if reason), None):
        raise CheckpointError(
            f"{final}: could not be written ({failed}); free some space or choose another --output (earlier ones are intact)"
        )
    return [result for result, _ in done]


def read_state(path: str | Path) -> dict[str, Any]:
    """state.json: step, skipped, skipped_in_row, bad_files and record, without touching any tensor."""
    return json.loads((Path(path) / STATE).read_text())


def restore(path: str | Path, state: TrainState) -> TrainState:
    """Verify `path` and copy it, bit for bit, into the networks, optimizer and counters of `state`; returns `state`.

    `state.record` keeps describing this run. An optimizer that has not stepped yet is given its state.

    Raises:
        CheckpointError: damage, or a name, shape or dtype that differs; nothing has been modified then.
    """
    path = Path(path)
    _verify_together(path)
    saved = read_state(path)
    _fill(path, state.shards) if state.shards else _replace(path, state)
    for name in ("step", "skipped", "skipped_in_row", "bad_files"):
        setattr(state, name, saved[name])
    return state


def _verify_together(path: Path) -> None:
    """`verify`, each rank taking its share of the files."""
    problem = None
    try:
        listed = sorted(listing(path) or ())
        verify(path, listed[distributed.rank() :: distributed.size()] if listed else None)
    except CheckpointError as error:
        problem = str(error)
    if problem := next(filter(None, distributed.gather(problem)), None):
        raise CheckpointError(problem)


def _replace(path: Path, state: TrainState) -> None:
    """The whole tensors of `state` from a checkpoint of either kind."""
    parameters = _optimized(state)
    targets = {name: network.state_dict() for name, network in state.networks.items()}
    stored = {name: _group(path, name) for name in (*targets, OPTIMIZER)}
    moments = _moments(state, parameters, stored[OPTIMIZER])
    for name, expected in (*targets.items(), (OPTIMIZER, moments)):
        _agree(path / f"{name}.safetensors", _forms(stored[name]), _forms(expected))
    with torch.no_grad():
        for name, tensors in (*targets.items(), (OPTIMIZER, moments)):
            for key, tensor in tensors.items():
                tensor.copy_(stored[name][key])
    for name, parameter in parameters.items():
        kept = {moment: moments[f"{name}.{moment}"] for moment in MOMENTS if f"{name}.{moment}" in moments}
        # Assigned only now, so that a mismatch has changed nothing.
        state.optimizer.state[parameter].update(kept) if kept else state.optimizer.state.pop(parameter, None)


def _fill(path: Path, shards: Shards) -> None:
    """This rank's pieces from a checkpoint of either kind; moments that an unstepped optimizer did not have are zero."""
    mine = shards.pieces()
    with ExitStack() as stack:
        stored = {group: stack.enter_context(Stored(path, group)) for group in mine}
        for group, expected in shards.forms().items():
            there = stored[group].forms
            unstepped = group == OPTIMIZER and not there
            _agree(path / f"{group}.safetensors", expected if unstepped else there, expected)
        with torch.no_grad():
            for group, named in mine.items():
                for name, piece in named.items():
                    stored[group].fill(name, piece) if name in stored[group].forms else piece.tensor.zero_()
    shards.refresh(mine)


def _group(path: Path, name: str) -> dict[str, Tensor]:
    with Stored(path, name) as stored:
        return {key: stored.read(key) for key in stored.forms}


def _forms(tensors: Mapping[str, Tensor]) -> dict[str, Form]:
    return {name: Piece.all_of(tensor).form for name, tensor in tensors.items()}


def load_networks(path: str | Path) -> dict[str, dict[str, Tensor]]:
    """{network: {parameter: CPU tensor}} of a checkpoint, a run directory (its latest) or one .safetensors file.

    In a single file, names either all start with "encoder.", "predictor." or "target_encoder.", or belong to the
    network the file is named after, or else to the encoder.
    """
    path = Path(path)
    if path.is_dir():
        path = find(path)
        verify(path, [file for file in listing(path) or () if file.partition(".")[0].partition("-")[0] in NETWORKS])
        return {name: _group(path, name) for name in NETWORKS}
    tensors = _read(path)
    if not all(name.partition(".")[0] in NETWORKS for name in tensors):
        return {path.stem if path.stem in NETWORKS else "encoder": tensors}
    networks: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        network, _, parameter = name.partition(".")
        networks.setdefault(network, {})[parameter] = tensor
    return networks


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """One line per entry in which two records differ, such as "threads: 2 in the checkpoint, 4 now"."""
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


def _optimized(state: TrainState) -> dict[str, nn.Parameter]:
    """The optimizer's parameters by "<network>.<parameter>"; indices would change with the order of the groups."""
    names = {p: f"{network}.{name}" for network, module in state.networks.items() for name, p in module.named_parameters()}
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    for p in parameters:
        if p not in names:
            raise CheckpointError(
                f"the optimizer holds a parameter {tuple(p.shape)} of no saved network; add its network to the state"
            )
    return {names[p]: p for p in parameters}


def _tensors(state: TrainState) -> dict[str, dict[str, Tensor]]:
    files = {name: network.state_dict() for name, network in state.networks.items()}
    files[OPTIMIZER] = {}
    for name, parameter in _optimized(state).items():
        moments = state.optimizer.state.get(parameter, {})
        if moments and set(moments) != set(MOMENTS):
            raise CheckpointError(f"{name}: optimizer state {sorted(moments)} is not AdamW's {sorted(MOMENTS)}; use AdamW")
        files[OPTIMIZER] |= {f"{name}.{moment}": tensor for moment, tensor in moments.items()}
        if moments:  # parameters may share one counter, which safetensors refuses
            files[OPTIMIZER][f"{name}.step"] = moments["step"].clone()
    return {file: {name: tensor.detach().contiguous() for name, tensor in tensors.items()} for file, tensors in files.items()}


def _moments(state: TrainState, parameters: dict[str, nn.Parameter], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that the stored moments go into, made where the optimizer has none; a parameter never stepped has none."""
    hosted = {
        p: group.get("fused") or group.get("capturable") for group in state.optimizer.param_groups for p in group["params"]
    }
    moments = {}
    for name, p in parameters.items():
        if not any(f"{name}.{moment}" in stored for moment in MOMENTS):
            continue
        present = state.optimizer.state.get(p, {})
        for moment in MOMENTS:
            if moment in present:
                moments[f"{name}.{moment}"] = present[moment]
            elif moment == "step":  # AdamW counts on the host unless it is fused or capturable
                moments[f"{name}.step"] = torch.zeros((), dtype=torch.float32, device=p.device if hosted[p] else "cpu")
            else:
                moments[f"{name}.{moment}"] = torch.zeros_like(p, requires_grad=False)
    return moments


def _agree(file: Path, stored: Mapping[str, Form], expected: Mapping[str, Form]) -> None:
    def form(forms: Mapping[str, Form], name: str) -> str:
        if name not in forms:
            return "absent"
        dtype, shape = forms[name]
        return f"{str(pieces.DTYPES[dtype])[6:]} {shape}"

    for name in [*expected, *(name for name in stored if name not in expected)]:
        if (there := form(stored, name)) != (here := form(expected, name)):
            raise CheckpointError(
                f"{file}: {name} is {there} in the checkpoint and {here} in this run; "
                f"resume with the configuration it was made with, or start afresh in another --output"
            )


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{file}: not a readable safetensors file ({' '.join(str(error).split())}); give one that is"
        ) from error


def _state_json(state: TrainState) -> str:
    names = ("step", "skipped", "skipped_in_row", "bad_files", "record")
    return json.dumps({name: getattr(state, name) for name in names}, indent=1)


def _begin(root: Path, hidden: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    sweep(root)
    hidden.mkdir()


def _write(directory: Path, files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Any]]:
    """Every file, on disk; returns their entries in the manifest."""
    for name, tensors in files.items():
        save_file(dict(tensors), directory / f"{name}.safetensors")
    return settle(directory / f"{name}.safetensors" for name in files)


def _write_shards(directory: Path, shards: Shards) -> dict[str, dict[str, Any]]:
    rank, world = distributed.rank(), distributed.size()
    files = {group: directory / pieces.shard_name(group, rank, world) for group in shards.forms()}
    for group, mine in shards.pieces().items():
        pieces.write(files[group], mine, rank)
    return settle(files.values())


def _finish(hidden: Path, final: Path, state: TrainState, listed: list[dict[str, dict[str, Any]]]) -> None:
    """The state and the manifest, last, and one rename."""
    (hidden / STATE).write_text(_state_json(state))
    entries = {name: entry for part in (*listed, settle([hidden / STATE])) for name, entry in sorted(part.items())}
    (hidden / MANIFEST).write_text(json.dumps({"files": entries}, indent=1))
    fsync(hidden / MANIFEST)
    fsync(hidden)
    publish(hidden, final)
