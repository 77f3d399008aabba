"""Readers of an encoder of any kind: a run, an official file, timm, transformers or safetensors."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from fastjepa.checkpoint.directory import find_checkpoint
from fastjepa.checkpoint.restore import load_networks
from fastjepa.checkpoint.state import read_state
from fastjepa.errors import UserError
from fastjepa.model.positions import POSITIONS, Positions
from fastjepa.weights.hub_folders import Loaded, folder_kind, read_folder, read_lone_encoder, read_tensors
from fastjepa.weights.official import load_official, official_networks, recorded_config
from fastjepa.weights.pretrained import (
    EncoderForm,
    PretrainedEncoder,
    Shape,
    bare_names,
    check_weights,
    encoder_of_weights,
    shown_grid,
)

NETWORK_OF = {"target": "target_encoder", "context": "encoder"}
TORCH_FILES = (".pth", ".pt", ".tar", ".bin")


def load_encoder(
    path: str | Path,
    which: str | None = None,
    positions: Positions | None = None,
    grid: tuple[int, int] | None = None,
) -> PretrainedEncoder:
    """Load the encoder in a run, checkpoint, `.pth.tar`, `.safetensors` file, or timm, transformers or fastjepa folder.

    Args:
        which: target or context; default: the target encoder where there is a choice, else the one there is.
        positions: those of images of another size: computed, interpolated (bicubically, as transformers does for a folder of
            its own, else as timm does) or scaled; default: computed, and a warning says it.
        grid: (rows, columns) of patches, where a file does not say them.

    Returns:
        An encoder with `forward_features(images)`: (b, C, H, W) -> (b, N, D), frozen, fp32, on the CPU; its `which`
        says which encoder it is.
    """
    if positions not in (None, *POSITIONS):
        raise UserError(f"positions {positions!r}: choose one of {', '.join(POSITIONS)}")
    loaded = read_weights(path, which, grid)
    return encoder_of_weights(loaded.form, loaded.tensors, positions, interpolates_as_timm(path))


def interpolates_as_timm(path: str | Path) -> bool:
    """Tell whether positions of `path` are interpolated with timm's antialiasing: not those of a transformers folder."""
    return weights_kind(Path(path).expanduser()) != "transformers"


def read_weights(path: str | Path, which: str | None = None, shape: Shape = None) -> Loaded:
    """Read what `load_encoder` makes a module of; the tensors of most files are read as they are used.

    Args:
        which: as in `load_encoder`.
        shape: the form of weights that do not say theirs, its `which` and `origin` play no part; or their grid alone.

    Raises:
        UserError, CheckpointError: nothing readable, another encoder than asked for, or one that is no I-JEPA encoder.
    """
    path = Path(path).expanduser()
    if which not in (None, *NETWORK_OF):
        raise UserError(f"which {which!r}: an encoder is the target or the context encoder")
    found = weights_kind(path)
    if found == "run":
        loaded = read_run(path, which, shape)
    elif found == "meta":
        loaded = read_official(path, which, shape)
    elif found == "weights":
        tensors, about = read_tensors(path)
        named = {f"{network}.safetensors": {"which": name} for name, network in NETWORK_OF.items()}  # of our checkpoints
        loaded = read_lone_encoder(path, tensors, about or named.get(path.name, {}), which, shape, path.name)
    else:
        loaded = read_folder(path, which, shape)
    check_weights(loaded.form, loaded.tensors, str(path))
    if isinstance(shape, tuple) and loaded.form.grid != shape:
        raise UserError(f"{path}: has a grid of {shown_grid(loaded.form.grid)} patches, not {shown_grid(shape)}; leave it out")
    return loaded


def weights_kind(path: Path) -> str:
    """Return what `path` is by its name and config.json: run, meta, weights, fastjepa, timm or transformers."""
    if not path.is_file():
        return folder_kind(path) or "run"  # whose reader refuses what it is not
    if path.suffix == ".safetensors":
        return "weights"
    if path.suffix in TORCH_FILES:
        return "meta"
    raise UserError(f"{path}: not a file of weights; give a .safetensors, .pth.tar, .pth, .pt or .bin file, or a folder")


def is_foreign_weights(path: str | Path) -> bool:
    """Tell whether `path` is a file of weights or a model folder, rather than a run or checkpoint of this trainer."""
    return weights_kind(Path(path).expanduser()) != "run"


def starting_networks(path: str | Path) -> dict[str, dict[str, Tensor]]:
    """Return {network: weights} of anything that training can start from; an encoder alone is "encoder", whichever it is."""
    path = Path(path).expanduser()
    found = weights_kind(path)
    if found in ("run", "weights"):
        return {name: bare_names(tensors, str(path)) for name, tensors in load_networks(path).items()}
    if found == "meta":
        return official_networks(load_official(path))
    return {"encoder": read_weights(path).tensors}


def chosen_encoder(path: Path, networks: Mapping[str, dict[str, Tensor]], which: str | None) -> tuple[str, dict[str, Tensor]]:
    """Choose an encoder of a checkpoint's networks: return its name, target or context, and its weights."""
    held = [name for name in NETWORK_OF if NETWORK_OF[name] in networks]
    if not held or (which and which not in held):
        raise UserError(f"{path}: holds {' and '.join(networks)}, and not the {NETWORK_OF[which or 'target']} asked for")
    chosen = which or held[0]
    return chosen, networks[NETWORK_OF[chosen]]


def read_run(path: Path, which: str | None, shape: Shape) -> Loaded:
    """Read an encoder of a run (its latest checkpoint) or of a checkpoint."""
    found = find_checkpoint(path)
    chosen, tensors = chosen_encoder(found, load_networks(found), which)
    origin = f"fastjepa run, step {read_state(found)['step']}"
    form = shape if isinstance(shape, EncoderForm) else EncoderForm.of_config(recorded_config(found))
    return Loaded(replace(form, which=chosen, origin=origin), tensors, [])


def read_official(path: Path, which: str | None, shape: Shape) -> Loaded:
    """Read an encoder of a `.pth.tar` file, or the one network that a file of weights holds."""
    contents = load_official(path)
    said = contents.get("fastjepa", {})
    if said.get("lone"):
        return read_lone_encoder(path, contents["encoder"], {}, which, shape, path.name)
    chosen, tensors = chosen_encoder(path, official_networks(contents), which)
    if said:
        return Loaded(replace(EncoderForm.from_dict(said["form"], str(path)), which=chosen), tensors, [])
    origin = f"{path.name}, official format, epoch {contents.get('epoch', 'unknown')}"
    return read_lone_encoder(path, tensors, {"which": chosen}, chosen, shape, origin)
