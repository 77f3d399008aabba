"""Return to a checkpoint: it is verified first, then copied bit for bit into networks and optimizer."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fastjepa.checkpoint.directory import find_checkpoint, manifest_entries, verify_checkpoint
from fastjepa.checkpoint.shard_files import StoredGroup
from fastjepa.checkpoint.state import TrainState, optimized_parameters, read_state
from fastjepa.engine.adamw import moment_names
from fastjepa.engine.shards import OPTIMIZER, Shards
from fastjepa.errors import CheckpointError
from fastjepa.model.jepa import NETWORKS
from fastjepa.ranks.collectives import gather_objects, rank_count, this_rank
from fastjepa.ranks.shard import SAFETENSORS_DTYPES, TensorForm, forms_of


def restore_checkpoint(path: str | Path, state: TrainState) -> TrainState:
    """Verify `path` and copy it, bit for bit, into the networks, optimizer and counters of `state`; returns `state`.

    `state.record` keeps describing this run. An optimizer that has not stepped yet is given its state.

    Raises:
        CheckpointError: damage, or a name, shape or dtype that differs; nothing has been modified then.
    """
    path = Path(path)
    _verify_together(path)
    saved = read_state(path)
    _fill_pieces(path, state.shards) if state.shards else _copy_whole(path, state)
    for name in ("step", "skipped", "skipped_in_row", "bad_files"):
        setattr(state, name, saved[name])
    return state


def _verify_together(path: Path) -> None:
    """Verify a checkpoint, each rank its share of the files: of 7 files rank 1 of 3 reads the second and the fifth."""
    problem = None
    try:
        listed = sorted(manifest_entries(path) or ())
        verify_checkpoint(path, listed[this_rank() :: rank_count()] if listed else None)
    except CheckpointError as error:
        problem = str(error)
    if problem := next(filter(None, gather_objects(problem)), None):
        raise CheckpointError(problem)


def _copy_whole(path: Path, state: TrainState) -> None:
    """Copy the whole tensors of `state` from a checkpoint of either kind."""
    parameters = optimized_parameters(state)
    targets = {name: network.state_dict() for name, network in state.networks.items()}
    stored = {name: _read_group(path, name) for name in (*targets, OPTIMIZER)}
    moments = _moment_targets(state, parameters, stored[OPTIMIZER])
    for name, expected in (*targets.items(), (OPTIMIZER, moments)):
        _check_forms(path / f"{name}.safetensors", forms_of(stored[name]), forms_of(expected))
    with torch.no_grad():
        for name, tensors in (*targets.items(), (OPTIMIZER, moments)):
            for key, tensor in tensors.items():
                tensor.copy_(stored[name][key])
    known = moment_names(state.optimizer)
    for name, parameter in parameters.items():
        kept = {moment: moments[f"{name}.{moment}"] for moment in known[parameter] if f"{name}.{moment}" in moments}
        # Assigned only now, so that a mismatch has changed nothing.
        state.optimizer.state[parameter].update(kept) if kept else state.optimizer.state.pop(parameter, None)


def _fill_pieces(path: Path, shards: Shards) -> None:
    """Fill this rank's pieces from a checkpoint of either kind; moments that an unstepped optimizer did not have are zero."""
    mine = shards.pieces()
    with ExitStack() as stack:
        stored = {group: stack.enter_context(StoredGroup(path, group)) for group in mine}
        for group, expected in shards.forms().items():
            there = stored[group].forms
            unstepped = group == OPTIMIZER and not there
            _check_forms(path / f"{group}.safetensors", expected if unstepped else there, expected)
        with torch.no_grad():
            for group, named in mine.items():
                for name, piece in named.items():
                    stored[group].fill(name, piece) if name in stored[group].forms else piece.tensor.zero_()
    shards.refresh(mine)


def _read_group(path: Path, name: str) -> dict[str, Tensor]:
    with StoredGroup(path, name) as stored:
        return {key: stored.read(key) for key in stored.forms}


def load_networks(path: str | Path) -> dict[str, dict[str, Tensor]]:
    """Read {network: {parameter: CPU tensor}} of a checkpoint, a run directory (its latest) or one .safetensors file.

    In a single file, names either all start with "encoder.", "predictor." or "target_encoder.", or belong to the
    network the file is named after, or else to the encoder.
    """
    path = Path(path)
    if path.is_dir():
        path = find_checkpoint(path)
        verify_checkpoint(
            path, [file for file in manifest_entries(path) or () if file.partition(".")[0].partition("-")[0] in NETWORKS]
        )
        return {name: _read_group(path, name) for name in NETWORKS}
    tensors = _read_safetensors(path)
    if not all(name.partition(".")[0] in NETWORKS for name in tensors):
        return {path.stem if path.stem in NETWORKS else "encoder": tensors}
    networks: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        network, _, parameter = name.partition(".")
        networks.setdefault(network, {})[parameter] = tensor
    return networks


def _moment_targets(state: TrainState, parameters: dict[str, nn.Parameter], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that stored moments go into, made where the optimizer has none; none for a parameter never stepped."""
    hosted = {
        p: group.get("fused") or group.get("capturable") for group in state.optimizer.param_groups for p in group["params"]
    }
    moments, known = {}, moment_names(state.optimizer)
    for name, p in parameters.items():
        if not any(f"{name}.{moment}" in stored for moment in known[p]):
            continue
        present = state.optimizer.state.get(p, {})
        for moment in known[p]:
            if moment in present:
                moments[f"{name}.{moment}"] = present[moment]
            elif moment == "step":  # AdamW counts on the host unless it is fused or capturable
                moments[f"{name}.step"] = torch.zeros((), dtype=torch.float32, device=p.device if hosted[p] else "cpu")
            else:
                moments[f"{name}.{moment}"] = torch.zeros_like(p, requires_grad=False)
    return moments


def _check_forms(file: Path, stored: Mapping[str, TensorForm], expected: Mapping[str, TensorForm]) -> None:
    """Raise CheckpointError for the first tensor that is missing, not expected, or of another dtype or shape."""

    def form(forms: Mapping[str, TensorForm], name: str) -> str:
        if name not in forms:
            return "absent"
        dtype, shape = forms[name]
        return f"{str(SAFETENSORS_DTYPES[dtype])[6:]} {shape}"

    for name in [*expected, *(name for name in stored if name not in expected)]:
        if (there := form(stored, name)) != (here := form(expected, name)):
            raise CheckpointError(
                f"{file}: {name} is {there} in the checkpoint and {here} in this run; "
                f"resume with the configuration it was made with, or start afresh in another --output"
            )


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{file}: not a readable safetensors file ({' '.join(str(error).split())}); give one that is"
        ) from error
