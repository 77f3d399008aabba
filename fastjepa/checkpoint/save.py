"""Checkpoints: complete or invisible, verified before anything is touched, and never pickled.

    <root>/<tag>-<step:08d>/
        encoder.safetensors  predictor.safetensors  target_encoder.safetensors
        optimizer.safetensors   "<network>.<parameter>.exp_avg", ".exp_avg_sq" and ".step"
        state.json              step, counters, bad files, and the record of what made them
        manifest.json           size and SHA-256 of every other file

Everything is written and fsynced in a hidden directory that one rename publishes, so a kill or a full disk at any
moment leaves the earlier checkpoints as they were and nothing half-written under a checkpoint's name. Ranks that share
a state write a file each in place of each of the four (see `shard_files`), and the rename comes after every rank's fsync.
Either kind resumes on any number of ranks, sharded or not.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fastjepa.checkpoint.directory import (
    MANIFEST,
    complete_checkpoints,
    discard_checkpoint,
    hidden_name,
    publish_checkpoint,
    settle_files,
    step_of,
    sweep_leftovers,
)
from fastjepa.checkpoint.shard_files import shard_name, write_shard_file
from fastjepa.checkpoint.state import STATE_FILE, TrainState, optimized_parameters
from fastjepa.engine.adamw import moment_names
from fastjepa.engine.shards import OPTIMIZER, Shards
from fastjepa.errors import CheckpointError, UserError
from fastjepa.files import fsync
from fastjepa.ranks.collectives import gather_objects, rank_count, text_of_main, this_rank


def save_checkpoint(root: str | Path, state: TrainState, tag: str = "jepa", keep_last: int = 2) -> Path:
    """Write `<root>/<tag>-<step>` and drop all but the newest `keep_last` complete ones up to it; every rank takes part.

    A step that is already there, complete and equal, is left alone; otherwise it is replaced.

    Raises:
        UserError: a name that is no plain file name, or nothing to keep.
        CheckpointError: it could not be written (a full disk), on every rank; the earlier checkpoints are untouched.
    """
    if keep_last < 1:
        raise UserError(f"logging.keep_last: {keep_last} must be at least 1")
    if not tag or "/" in tag or tag.startswith("."):
        raise UserError(f"logging.write_tag: {tag!r} must be a plain file name")
    root, main = Path(root), this_rank() == 0
    final = root / f"{tag}-{state.step:08d}"
    files = {} if state.shards or not main else _tensors(state)
    hidden = Path(text_of_main(str(hidden_name(final))))
    try:
        _on_all_ranks(final, lambda: _begin(root, hidden) if main else None)
        listed = _on_all_ranks(
            final, lambda: _write_shards(hidden, state.shards) if state.shards else _write_whole(hidden, files)
        )
        _on_all_ranks(final, lambda: _finish(hidden, final, state, listed) if main else None)
    finally:
        if main:
            shutil.rmtree(hidden, ignore_errors=True)
    if main:
        for old in [path for path in complete_checkpoints(root, tag) if step_of(path) <= state.step][:-keep_last]:
            discard_checkpoint(old)
    return final


def _on_all_ranks(final: Path, action: Callable[[], Any]) -> list[Any]:
    """Return what each rank's action returned; where one of them failed, raise the same CheckpointError on all."""
    result = reason = None
    try:
        result = action()
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    done = gather_objects((result, reason))
    if failed := next((reason for _, reason in done if reason), None):
        raise CheckpointError(
            f"{final}: could not be written ({failed}); free some space or choose another --output (earlier ones are intact)"
        )
    return [result for result, _ in done]


def _tensors(state: TrainState) -> dict[str, dict[str, Tensor]]:
    """Return {file: {name: tensor}} of a state that this rank has whole."""
    files = {name: network.state_dict() for name, network in state.networks.items()}
    files[OPTIMIZER] = {}
    expected = moment_names(state.optimizer)
    for name, parameter in optimized_parameters(state).items():
        moments, known = state.optimizer.state.get(parameter, {}), expected[parameter]
        if moments and set(moments) != set(known):
            raise CheckpointError(f"{name}: optimizer state {sorted(moments)} is not {sorted(known)}; use AdamW or MuonAdamW")
        files[OPTIMIZER] |= {f"{name}.{moment}": tensor for moment, tensor in moments.items()}
        if "step" in moments:  # parameters may share one counter, which safetensors refuses
            files[OPTIMIZER][f"{name}.step"] = moments["step"].clone()
    return {file: {name: tensor.detach().contiguous() for name, tensor in tensors.items()} for file, tensors in files.items()}


def _state_json(state: TrainState) -> str:
    names = ("step", "skipped", "skipped_in_row", "bad_files", "record")
    return json.dumps({name: getattr(state, name) for name in names}, indent=1)


def _begin(root: Path, hidden: Path) -> None:
    """Make the hidden directory, and delete what killed writers have left."""
    root.mkdir(parents=True, exist_ok=True)
    sweep_leftovers(root)
    hidden.mkdir()


def _write_whole(directory: Path, files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Any]]:
    """Write whole tensors to the disk; return the files' entries in the manifest."""
    for name, tensors in files.items():
        save_file(dict(tensors), directory / f"{name}.safetensors")
    return settle_files(directory / f"{name}.safetensors" for name in files)


def _write_shards(directory: Path, shards: Shards) -> dict[str, dict[str, Any]]:
    """Write this rank's pieces to the disk; return the files' entries in the manifest."""
    rank, world = this_rank(), rank_count()
    files = {group: directory / shard_name(group, rank, world) for group in shards.forms()}
    for group, mine in shards.pieces().items():
        write_shard_file(files[group], mine, rank)
    return settle_files(files.values())


def _finish(hidden: Path, final: Path, state: TrainState, listed: list[dict[str, dict[str, Any]]]) -> None:
    """Write the state and, last, the manifest; then publish all by one rename."""
    (hidden / STATE_FILE).write_text(_state_json(state))
    entries = {name: entry for part in (*listed, settle_files([hidden / STATE_FILE])) for name, entry in sorted(part.items())}
    (hidden / MANIFEST).write_text(json.dumps({"files": entries}, indent=1))
    fsync(hidden / MANIFEST)
    fsync(hidden)
    publish_checkpoint(hidden, final)
