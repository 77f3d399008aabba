"""Checkpoints: complete or invisible, verified before anything is touched, and never pickled.

    <root>/<tag>-<step:08d>/
        encoder.safetensors  predictor.safetensors  target_encoder.safetensors
        optimizer.safetensors   "<network>.<parameter>.exp_avg", ".exp_avg_sq" and ".step"
        state.json              step, counters, bad files, and the record of what made them
        manifest.json           size and SHA-256 of every other file

Everything is written and fsynced in a hidden directory that one rename publishes, so a kill or a full disk at any
moment leaves the earlier checkpoints as they were and nothing half-written under a checkpoint's name.
"""

import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastjepa.config import ConfigError

NETWORKS = ("encoder", "predictor", "target_encoder")
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
MANIFEST, STATE, OPTIMIZER = "manifest.json", "state.json", "optimizer"
# A checkpoint on its way in or out is "<HIDDEN><name>@<host>@<pid>"; one that a rewrite has set aside keeps its place
# among the complete ones, under "<name><REPLACED>", until its successor is there.
HIDDEN, REPLACED = ".tmp-", ".replaced"
FOREIGN_SECONDS = 24 * 3600  # after which an unfinished directory of another machine counts as abandoned


class CheckpointError(OSError):
    """A checkpoint that cannot be written, or cannot be trusted; the message names the file and the remedy."""


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


def save(root: str | Path, state: TrainState, tag: str = "jepa", keep_last: int = 2) -> Path:
    """Write `<root>/<tag>-<step>` and drop all but the newest `keep_last` complete ones up to it; main rank only.

    A step that is already there, complete and equal, is left alone; otherwise it is replaced.

    Raises:
        CheckpointError: it could not be written (a full disk); the earlier checkpoints are untouched.
    """
    if keep_last < 1:
        raise ConfigError(f"logging.keep_last: {keep_last} must be at least 1")
    if not tag or "/" in tag or tag.startswith("."):
        raise ConfigError(f"logging.write_tag: {tag!r} must be a plain file name")
    root = Path(root)
    final = root / f"{tag}-{state.step:08d}"
    files, hidden = _tensors(state), _hidden(final)
    try:
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        _write(hidden, files, _state_json(state))
        _publish(hidden, final)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise CheckpointError(
            f"{final}: could not be written ({reason}); free some space or choose another --output (earlier ones are intact)"
        ) from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    for old in [path for path in complete(root, tag) if _step(path) <= state.step][:-keep_last]:
        _discard(old)
    return final


def complete(root: str | Path, tag: str | None = "jepa") -> list[Path]:
    """The checkpoints with a manifest whose sizes all match, by rising step; `tag` None takes any tag."""
    pattern = re.compile(rf"({'.+' if tag is None else re.escape(tag)})-(\d{{8,}})({re.escape(REPLACED)})?")
    found: dict[tuple[int, str], Path] = {}
    for path in sorted(Path(root).glob("[!.]*")):  # a name sorts before the same name with a suffix
        match = pattern.fullmatch(path.name)
        if match and _is_complete(path):
            found.setdefault((int(match[2]), match[1]), path)
    return [found[key] for key in sorted(found)]


def latest(root: str | Path, tag: str | None = "jepa") -> Path | None:
    """The complete checkpoint of the highest step, or None."""
    return next(reversed(complete(root, tag)), None)


def find(path: str | Path) -> Path:
    """The checkpoint that `path` means: itself, or the latest of a run directory or of its `checkpoints`."""
    path = Path(path)
    if (path / MANIFEST).is_file():
        return path
    for root in (path / "checkpoints", path):
        if newest := latest(root, tag=None):
            return newest
    raise CheckpointError(
        f"{path}: holds no complete checkpoint; name a run directory, a checkpoint in it or a .safetensors file"
    )


def verify(path: str | Path, names: Iterable[str] | None = None) -> None:
    """Compare size and SHA-256 of the manifest's files (or of `names` among them); CheckpointError at the first difference."""
    path = Path(path)
    listed = _manifest(path)
    if listed is None:
        raise CheckpointError(
            f"{path / MANIFEST}: missing or unreadable, so {path.name} is incomplete; use an earlier checkpoint"
        )
    for name in listed if names is None else names:
        file = path / name
        if name not in listed or not file.is_file():
            raise CheckpointError(f"{file}: expected, and not there; use an earlier checkpoint")
        expected = listed[name]
        # The size first: it tells a truncated file without reading it.
        for what, found in (("bytes", lambda file: file.stat().st_size), ("sha256", _sha256)):
            if (value := found(file)) != expected[what]:
                raise CheckpointError(
                    f"{file}: damaged, expected {what} {expected[what]} and found {value}; remove {path} to use an earlier one"
                )


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
    verify(path)
    saved, parameters = read_state(path), _optimized(state)
    targets = {name: network.state_dict() for name, network in state.networks.items()}
    verify(path, [f"{name}.safetensors" for name in (*targets, OPTIMIZER)])
    stored = {name: load_file(path / f"{name}.safetensors") for name in (*targets, OPTIMIZER)}
    moments = _moments(state, parameters, stored[OPTIMIZER])
    for name, expected in (*targets.items(), (OPTIMIZER, moments)):
        _agree(path / f"{name}.safetensors", stored[name], expected)
    with torch.no_grad():
        for name, tensors in (*targets.items(), (OPTIMIZER, moments)):
            for key, tensor in tensors.items():
                tensor.copy_(stored[name][key])
    for name, parameter in parameters.items():
        kept = {moment: moments[f"{name}.{moment}"] for moment in MOMENTS if f"{name}.{moment}" in moments}
        # Assigned only now, so that a mismatch has changed nothing.
        state.optimizer.state[parameter].update(kept) if kept else state.optimizer.state.pop(parameter, None)
    for name in ("step", "skipped", "skipped_in_row", "bad_files"):
        setattr(state, name, saved[name])
    return state


def load_networks(path: str | Path) -> dict[str, dict[str, Tensor]]:
    """{network: {parameter: CPU tensor}} of a checkpoint, a run directory (its latest) or one .safetensors file.

    In a single file, names either all start with "encoder.", "predictor." or "target_encoder.", or belong to the
    network the file is named after, or else to the encoder.
    """
    path = Path(path)
    if path.is_dir():
        path = find(path)
        verify(path, [f"{name}.safetensors" for name in NETWORKS])
        return {name: _read(path / f"{name}.safetensors") for name in NETWORKS}
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


def _agree(file: Path, stored: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    def form(tensors: Mapping[str, Tensor], name: str) -> str:
        return f"{str(tensors[name].dtype)[6:]} {tuple(tensors[name].shape)}" if name in tensors else "absent"

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


def _write(directory: Path, files: Mapping[str, Mapping[str, Tensor]], state: str) -> None:
    """Every file, on disk, the manifest last."""
    directory.mkdir()
    for name, tensors in files.items():
        save_file(dict(tensors), directory / f"{name}.safetensors")
    (directory / STATE).write_text(state)
    listed, mode = {}, (directory / STATE).stat().st_mode
    for file in sorted(directory.iterdir()):
        file.chmod(mode)  # safetensors makes files that only their owner can read
        _fsync(file)
        listed[file.name] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    (directory / MANIFEST).write_text(json.dumps({"files": listed}, indent=1))
    _fsync(directory / MANIFEST)
    _fsync(directory)


def _publish(hidden: Path, final: Path) -> None:
    aside = final.with_name(final.name + REPLACED)
    if final.exists():
        if _same(hidden, final):
            return
        if _is_complete(final):
            os.replace(final, aside)
        else:
            _discard(final)
    os.replace(hidden, final)
    _fsync(final.parent)
    _discard(aside)


def _same(new: Path, old: Path) -> bool:
    if _manifest(new) != _manifest(old):
        return False
    try:
        verify(old)
    except CheckpointError:  # damaged since: the new one takes its place
        return False
    return True


def _discard(path: Path) -> None:
    """Out of sight by one rename, then deleted: a kill half-way leaves nothing under a checkpoint's name."""
    if path.exists():
        hidden = _hidden(path.with_name("old-" + path.name))
        os.replace(path, hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def _hidden(final: Path) -> Path:
    return final.with_name(f"{HIDDEN}{final.name}@{socket.gethostname()}@{os.getpid()}")


def _sweep(root: Path) -> None:
    """Delete what writers that are no more have left, and set-aside checkpoints whose successor is there."""
    for aside in root.glob(f"*{REPLACED}"):
        if _is_complete(aside.with_name(aside.name.removesuffix(REPLACED))):
            _discard(aside)
    for path in root.glob(f"{HIDDEN}*@*@*"):
        _, host, pid = path.name.rsplit("@", 2)
        if host == socket.gethostname():
            gone = pid == str(os.getpid()) or not _alive(int(pid))
        else:
            gone = time.time() - path.stat().st_mtime > FOREIGN_SECONDS
        if gone:
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _manifest(path: Path) -> dict[str, dict[str, Any]] | None:
    try:
        return json.loads((path / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_complete(path: Path) -> bool:
    listed = _manifest(path)
    return listed is not None and all(
        (path / name).is_file() and (path / name).stat().st_size == entry["bytes"] for name, entry in listed.items()
    )


def _step(path: Path) -> int:
    return int(path.name.removesuffix(REPLACED).rpartition("-")[2])


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
