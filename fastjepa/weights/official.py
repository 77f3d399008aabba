"""Meta's `.pth.tar` checkpoints: the networks in them, and training that goes on from them or is handed over to them.

A file holds `encoder`, `predictor` and `target_encoder` (names may start with "module."), the state `opt` of an AdamW
with four groups (weights of the encoder and of the predictor, then their biases and 1-d parameters), addressed by
position, `epoch` (epochs completed), and more. The positional embeddings, never trained, are parameters there and take
a position in the first two groups. What this project writes has one key more, "fastjepa", which nobody else reads.
"""

import errno
import re
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastjepa.checkpoint.directory import find_checkpoint, verify_checkpoint
from fastjepa.checkpoint.restore import load_networks
from fastjepa.checkpoint.save import save_checkpoint
from fastjepa.checkpoint.shard_files import StoredGroup
from fastjepa.checkpoint.state import TrainState, read_state
from fastjepa.config.load import config_from_dict, load_config
from fastjepa.config.schema import Config
from fastjepa.engine.adamw import MOMENTS, build_adamw
from fastjepa.engine.schedule import Schedule
from fastjepa.engine.shards import OPTIMIZER
from fastjepa.errors import CheckpointError, UserError
from fastjepa.model.jepa import NETWORKS, build_pair
from fastjepa.weights.positions import grid_of_positions
from fastjepa.weights.pretrained import EncoderForm, bare_names

MODULE_PREFIX = "module."
OPTIMIZER_GROUPS = (("encoder", True), ("predictor", True), ("encoder", False), ("predictor", False))  # network, decayed
POSITION_NAMES = ("encoder.pos_embed", "predictor.predictor_pos_embed")


def load_official(path: str | Path) -> dict[str, Any]:
    """Return a file's contents, names without "module." and "_orig_mod."; tensors are mapped from it, read as they are used.

    Files in torch's old format, which is no zip archive, are read whole.

    A file that is one network's weights alone is given as {"encoder": weights, "fastjepa": {"lone": True}}.
    """
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch's readers of damaged files let any exception through
        if isinstance(error, MemoryError) or isinstance(error, OSError) and error.errno != errno.EINVAL:  # a cut archive's
            raise
        raise CheckpointError(f"{path}: {_why_unreadable(Path(path), str(error))}") from error
    if not isinstance(contents, Mapping):
        raise CheckpointError(f"{path}: holds a {type(contents).__name__} and no networks; give an official checkpoint")
    if not any(name in contents for name in NETWORKS):
        contents = {"encoder": contents, "fastjepa": {"lone": True}}
    return {name: _plain_value(value, path) if name in NETWORKS else value for name, value in contents.items()}


def _plain_value(network: Any, path: str | Path) -> dict[str, Tensor]:
    if not isinstance(network, Mapping) or not all(isinstance(value, Tensor) for value in network.values()):
        raise CheckpointError(f"{path}: no networks of named tensors in it; give an official checkpoint")
    return bare_names(network, str(path))


def _why_unreadable(path: Path, said: str) -> str:
    """Return why torch could not load a file, of which torch `said` the long version, and the remedy."""
    if named := re.search(r"GLOBAL (\S+)", said):
        remedy = "save the networks' state dicts in a file of their own"
        return f"not a checkpoint of tensors and numbers alone (there is a {named[1]} in it); nothing else is read, {remedy}"
    with path.open("rb") as file:
        head = file.read(8)
    if not head:
        return "an empty file; get it again"
    if head.startswith(b"PK"):
        return "cut off or damaged: the zip archive that torch makes is not whole; get it again"
    if head.startswith(b"\x80"):
        return "damaged, or no file of torch's old format; get it again, or save it again with torch.save"
    return f"not a file of torch, it begins with {head!r}; get it again"


def official_networks(contents: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Return {network: weights} of the networks that a file's contents hold."""
    return {name: contents[name] for name in NETWORKS if name in contents}


def adopt_training(
    path: str | Path, root: str | Path, steps_per_epoch: int, record: Mapping[str, Any], tag: str = "jepa"
) -> Path:
    """Turn an official file into a checkpoint of this trainer below `root`, which resumes like any other.

    Networks and moments are the file's, bit for bit. Its step is the epochs completed times `steps_per_epoch`, or what a
    file of this project says; schedules are functions of it. Every rank takes part, as in `save_checkpoint`.

    Args:
        record: that of the run to come; its config must be the file's. The file's batch and world replace those in it.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: what a run needs is not there, or does not fit; nothing has been written then.
    """
    contents = load_official(path)
    if missing := [key for key in (*NETWORKS, "opt", "epoch") if key not in contents]:
        raise CheckpointError(f"{path}: holds no {', '.join(missing)} to go on with; start from its weights with --init")
    config = config_from_dict(record["config"], str(path))
    with torch.device("meta"):
        jepa, target = build_pair(config)
    parts = {"encoder": jepa.encoder, "predictor": jepa.predictor, "target_encoder": target}
    stored = official_networks(contents)
    for name, network in parts.items():
        _check_record(path, name, stored[name], network.state_dict(), config.grid)
        network.load_state_dict(stored[name], assign=True)
    optimizer = build_adamw(jepa.encoder, jepa.predictor)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": _official_moments(path, stored, contents["opt"]), "param_groups": groups})
    step = contents.get("fastjepa", {}).get("step", contents["epoch"] * steps_per_epoch)
    state = TrainState(step, parts, optimizer, record=_its_record(contents, record, Path(path)))
    return save_checkpoint(root, state, tag, keep_last=sys.maxsize)


def _its_record(contents: Mapping[str, Any], record: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return a run's record with what the file says, so that resuming tells the differences."""
    data = dict(record["config"]["data"])
    if contents.get("batch_size"):
        data["batch_size"] = contents["batch_size"]
    world = {"world": contents["world_size"]} if contents.get("world_size") else {}
    adopted = {"file": path.name, "epoch": contents["epoch"]}
    return {**record, **world, "config": {**record["config"], "data": data}, "adopted": adopted}


def _check_record(
    path: str | Path, network: str, stored: Mapping[str, Tensor], expected: Mapping[str, Tensor], grid: tuple[int, int]
) -> None:
    for name in [*expected, *stored]:
        there, here = (tuple(t[name].shape) if name in t else "absent" for t in (stored, expected))
        if there != here:
            found = f"{network}.{name} is {there} in the file and {here} by the config"
            raise CheckpointError(f"{path}: {found}; give the YAML it was made with")
        if name.endswith("pos_embed") and (its := grid_of_positions(stored[name])) not in (None, grid):
            found = f"{network}.{name} is of {its[0]}x{its[1]} patches in the file and {grid[0]}x{grid[1]} by the config"
            raise CheckpointError(f"{path}: {found}; give the YAML it was made with")


def optimizer_order(networks: Mapping[str, Mapping[str, Tensor]], with_fixed: bool) -> list[list[str]]:
    """Return the parameters of the four groups, "<network>.<name>", in the optimizer's order.

    Args:
        with_fixed: also the positional embeddings, which are parameters in the official code.
    """
    groups = []
    for network, decayed in OPTIMIZER_GROUPS:
        names = [name for name, p in networks[network].items() if (p.ndim > 1 and "bias" not in name) == decayed]
        qualified = [f"{network}.{name}" for name in names]
        groups.append([name for name in qualified if with_fixed or name not in POSITION_NAMES])
    return groups


def _official_moments(
    path: str | Path, networks: Mapping[str, Mapping[str, Tensor]], opt: Mapping[str, Any]
) -> dict[int, dict]:
    """Return the state of a file's optimizer by the positions that parameters have in this trainer's."""
    lengths = [len(group["params"]) for group in opt["param_groups"]]
    for with_fixed in (True, False):
        theirs = optimizer_order(networks, with_fixed)
        if [len(names) for names in theirs] == lengths:
            break
    else:
        raise CheckpointError(f"{path}: an optimizer of {lengths} parameters a group does not belong to its networks")
    order = [index for group in opt["param_groups"] for index in group["params"]]
    found = {name: opt["state"][index] for index, name in zip(order, sum(theirs, []), strict=True) if index in opt["state"]}
    ours = sum(optimizer_order(networks, with_fixed=False), [])
    moments = {}
    for number, name in enumerate(ours):
        if name not in found:
            continue
        network, _, parameter = name.partition(".")
        shape, entry = networks[network][parameter].shape, found[name]
        if set(entry) != set(MOMENTS) or entry["exp_avg"].shape != shape or entry["exp_avg_sq"].shape != shape:
            raise CheckpointError(f"{path}: the optimizer state of {name} is not AdamW's for {tuple(shape)} values")
        step = torch.as_tensor(entry["step"], dtype=torch.float32).clone()  # a number in old files
        moments[number] = {"step": step, "exp_avg": entry["exp_avg"], "exp_avg_sq": entry["exp_avg_sq"]}
    return moments


def recorded_config(found: Path) -> Config:
    """Return the config that made a checkpoint of this trainer: its own record, or the run directory's."""
    record = read_state(found)["record"]
    if "config" in record:
        return config_from_dict(record["config"], f"{found}/state.json")
    return load_config(found.parent.parent / "config.yaml")


def official_contents(path: str | Path, steps_per_epoch: int | None = None) -> dict[str, Any]:
    """Return all that an official file holds, from a run (its latest checkpoint) or a checkpoint of this trainer.

    `epoch` counts completed epochs: in the middle of one the official code would repeat its beginning, while this
    trainer reads the step. The official scaler, which goes with bfloat16, starts afresh; the loss is not known.
    """
    found = find_checkpoint(path)
    networks = load_networks(found)
    verify_checkpoint(found)
    said, config = read_state(found), recorded_config(found)
    if config.meta.positions != "sincos" or config.meta.qk_norm:
        raise UserError(f"{found}: the official code has neither meta.positions rope nor meta.qk_norm; use --to fastjepa")
    if config.loss.normalize in ("running", "dyntanh"):
        raise UserError(f"{found}: loss.normalize {config.loss.normalize} has a state that the official code has not; "
                        "convert one encoder with --which, or --to fastjepa")  # fmt: skip
    if config.loss.projector:
        raise UserError(f"{found}: loss.projector has weights that the official code has not; convert one encoder with "
                        "--which, or --to fastjepa")  # fmt: skip
    ipe = steps_per_epoch or said["record"].get("steps_per_epoch")
    if not ipe:
        raise UserError(f"{found}: does not say how many steps an epoch has; pass --steps-per-epoch N")
    with torch.device("meta"):
        jepa, target = build_pair(config)
    order = {"encoder": jepa.encoder, "predictor": jepa.predictor, "target_encoder": target}
    ordered = {name: {key: networks[name][key] for key in network.state_dict()} for name, network in order.items()}
    with StoredGroup(found, OPTIMIZER) as optimizer:
        stored = {name: optimizer.read(name) for name in optimizer.forms}
    scaler = torch.amp.GradScaler("cpu").state_dict() if config.runtime.dtype == "bf16" else None
    form = EncoderForm.of_config(config, "target", f"fastjepa run, step {said['step']}")
    return ordered | {
        "opt": _optimizer(ordered, stored, Schedule(config.optimization, ipe), said["step"]),
        "scaler": scaler,
        "epoch": said["step"] // ipe,
        "loss": None,
        "batch_size": config.data.batch_size,
        "world_size": said["record"].get("world", 1),
        "lr": config.optimization.lr,
        "fastjepa": {"step": said["step"], "form": form.to_dict()},
    }


def _optimizer(
    networks: Mapping[str, Mapping[str, Tensor]], stored: Mapping[str, Tensor], schedule: Schedule, step: int
) -> dict[str, Any]:
    """Return the state dict of the official AdamW, from tensors named "<network>.<parameter>.<moment>"."""
    groups = optimizer_order(networks, with_fixed=True)
    made = torch.optim.AdamW([{"params": [torch.empty(0, device="meta") for _ in names]} for names in groups]).state_dict()
    now = schedule(max(0, step - 1))
    for group, (_, decayed) in zip(made["param_groups"], OPTIMIZER_GROUPS, strict=True):
        group |= {"lr": now.lr, "weight_decay": now.weight_decay} if decayed else {}
        group |= {} if decayed else {"lr": now.lr, "weight_decay": 0, "WD_exclude": True}
    for number, name in enumerate(sum(groups, [])):
        moments = {moment: stored[f"{name}.{moment}"] for moment in MOMENTS if f"{name}.{moment}" in stored}
        if moments:
            made["state"][number] = moments
    return made


def write_official(path: str | Path, contents: Mapping[str, Any]) -> None:
    """Save contents as the official code does, every name of a network after "module."."""
    networks = official_networks(contents).items()
    named = {key: {MODULE_PREFIX + name: tensor for name, tensor in network.items()} for key, network in networks}
    torch.save({key: named.get(key, value) for key, value in contents.items()}, path)


def official_notes(contents: Mapping[str, Any], source: str | Path) -> list[str]:
    """Return sentences that a user should read of a file made from `contents`."""
    step = contents.get("fastjepa", {}).get("step")
    told = [f"from {source}, epoch {contents.get('epoch', 'unknown')}" + (f", step {step}" if step is not None else "")]
    if "opt" not in contents:
        told.append("there was no optimizer state in it, so that no training can go on from it")
    return told
