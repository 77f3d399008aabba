"""Encoders in and out: this trainer's runs, Meta's `.pth.tar`, timm's ViTs, transformers' IJepaModel, and files of weights.

Names inside are those of the official code and of timm. Every way in says which encoder it found, and every way out
records it: the target encoder, which the paper evaluates, or the context encoder.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import yaml
from safetensors import SafetensorError
from torch import Tensor

from fastjepa import checkpoint, model_folder, official, pretrained
from fastjepa.checkpoint import CheckpointError
from fastjepa.config import Config, ConfigError
from fastjepa.model_folder import Loaded, lone
from fastjepa.pretrained import EPS, Form, PretrainedEncoder

NETWORK = {"target": "target_encoder", "context": "encoder"}
TORCH_FILES = (".pth", ".pt", ".tar", ".bin")
FOLDERS = {
    "fastjepa": model_folder.write_fastjepa,
    "timm": model_folder.write_timm,
    "transformers": model_folder.write_transformers,
}


def load_encoder(path: str | Path, which: str | None = None, config: Config | None = None) -> PretrainedEncoder:
    """The encoder in a run, checkpoint, `.pth.tar`, `.safetensors` file, or timm, transformers or fastjepa folder.

    Args:
        which: target or context; default: the target encoder where there is a choice, else the one there is.
        config: the shape, for weights that do not say theirs.

    Returns:
        An encoder with `forward_features(images)`: (b, C, H, W) -> (b, N, D), frozen, fp32, on the CPU; its `which`
        says which encoder it is.
    """
    loaded = read(path, which, config)
    return pretrained.assemble(loaded.form, loaded.tensors)


def read(path: str | Path, which: str | None = None, config: Config | None = None) -> Loaded:
    """As `load_encoder`, but only what a module would be made of; the tensors of most files are read as they are used.

    Raises:
        ConfigError, CheckpointError: nothing readable, another encoder than asked for, or one that is no I-JEPA encoder.
    """
    path = Path(path).expanduser()
    if which not in (None, *NETWORK):
        raise ConfigError(f"which {which!r}: an encoder is the target or the context encoder")
    found = kind(path)
    if found == "run":
        loaded = read_run(path, which, config)
    elif found == "meta":
        loaded = read_meta(path, which, config)
    elif found == "weights":
        tensors, about = model_folder.read_tensors(path)
        named = {f"{network}.safetensors": {"which": name} for name, network in NETWORK.items()}  # of our checkpoints
        loaded = lone(path, tensors, about or named.get(path.name, {}), which, config, path.name)
    else:
        loaded = model_folder.read(path, which, config)
    pretrained.check(loaded.form, loaded.tensors, str(path))
    return loaded


def kind(path: Path) -> str:
    """run, meta, weights, fastjepa, timm or transformers."""
    if not path.is_file():
        return model_folder.kind(path) or "run"  # whose reader refuses what it is not
    if path.suffix == ".safetensors":
        return "weights"
    if path.suffix in TORCH_FILES:
        return "meta"
    raise ConfigError(f"{path}: not a file of weights; give a .safetensors, .pth.tar, .pth, .pt or .bin file, or a folder")


def is_foreign(path: str | Path) -> bool:
    """Whether `path` is a file of weights or a model folder, rather than a run or checkpoint of this trainer."""
    return kind(Path(path).expanduser()) != "run"


def networks(path: str | Path) -> dict[str, dict[str, Tensor]]:
    """{network: weights} of anything that training can start from; an encoder alone is "encoder", whichever it is."""
    path = Path(path).expanduser()
    found = kind(path)
    if found in ("run", "weights"):
        return checkpoint.load_networks(path)
    if found == "meta":
        return official.networks(official.load(path))
    return {"encoder": read(path).tensors}


def one_of(path: Path, networks: Mapping[str, dict[str, Tensor]], which: str | None) -> tuple[str, dict[str, Tensor]]:
    """Which encoder of a checkpoint it is, and its weights."""
    held = [name for name in NETWORK if NETWORK[name] in networks]
    if not held or (which and which not in held):
        raise ConfigError(f"{path}: holds {' and '.join(networks)}, and not the {NETWORK[which or 'target']} asked for")
    chosen = which or held[0]
    return chosen, networks[NETWORK[chosen]]


def read_run(path: Path, which: str | None, config: Config | None) -> Loaded:
    found = checkpoint.find(path)
    chosen, tensors = one_of(found, checkpoint.load_networks(found), which)
    origin = f"fastjepa run, step {checkpoint.read_state(found)['step']}"
    return Loaded(Form.of_config(config or official.recorded(found), chosen, origin), tensors, [])


def read_meta(path: Path, which: str | None, config: Config | None) -> Loaded:
    contents = official.load(path)
    said = contents.get("fastjepa", {})
    if said.get("lone"):
        return lone(path, contents["encoder"], {}, which, config, path.name)
    chosen, tensors = one_of(path, official.networks(contents), which)
    if said:
        return Loaded(replace(Form.from_dict(said["form"], str(path)), which=chosen), tensors, [])
    about = {"which": chosen}
    return lone(path, tensors, about, chosen, config, f"{path.name}, official format, epoch {contents.get('epoch', 'unknown')}")


def convert(src: str | Path, dst: str | Path, to: str, which: str | None = None, config: Config | None = None,
            steps_per_epoch: int | None = None, dynamic: bool = False) -> tuple[list[str], list[str]]:  # fmt: skip
    """Write what `src` holds at `dst`, which must not exist yet, as `to`: a name of FOLDERS, meta, run, onnx or pt2.

    Args:
        which: target or context; default: as in `read`; to meta: all networks there are, and with them the optimizer.
        config: the shape, for weights that do not say theirs; to run: what is trained on.
        steps_per_epoch: to run, and to meta from a run that does not say it.
        dynamic: to onnx and pt2: images of any size that is a multiple of the patch.

    Returns:
        The encoders written (target, context or both), and notes: where they came from, what was left out.
    """
    src, dst = Path(src).expanduser(), Path(dst).expanduser()
    if os.path.lexists(dst):
        raise ConfigError(f"{dst}: exists already; remove it or choose another name")
    if to == "meta" and which is None and kind(src) in ("run", "meta"):
        contents = official.from_run(src, steps_per_epoch) if kind(src) == "run" else official.load(src)
        if not contents.get("fastjepa", {}).get("lone"):
            publish(dst, lambda path: official.write(path, contents))
            return [which for which, name in NETWORK.items() if name in contents], official.notes(contents, src)
    if to == "run":
        adopt(src, dst, config, steps_per_epoch)
        return list(NETWORK), [f"from {src}; continue with fastjepa train --config YAML --output {dst}"]
    form, tensors, left_out = read(src, which, config)
    publish(dst, lambda path: write(path, to, form, tensors, dynamic))
    return [form.which], [f"from {form.origin}", *([f"left out: {', '.join(left_out)}"] if left_out else [])]


def adopt(src: Path, dst: Path, config: Config | None, steps_per_epoch: int | None) -> None:
    """A run directory at `dst` that continues an official checkpoint."""
    if config is None or steps_per_epoch is None:
        raise ConfigError("--to run needs --config, the YAML of the training, and --steps-per-epoch, images / global batch")
    if kind(src) != "meta":
        raise ConfigError(f"{src}: only an official .pth.tar holds a training to go on with; for weights use train --init")

    def make(run: Path) -> None:
        record = {"config": config.to_dict(), "steps_per_epoch": steps_per_epoch}
        official.adopt(src, run / "checkpoints", steps_per_epoch, record, config.logging.write_tag)
        (run / "config.yaml").write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))

    publish(dst, make)


def write(path: Path, to: str, form: Form, tensors: dict[str, Tensor], dynamic: bool = False) -> None:
    """One encoder as `to`."""
    if to in FOLDERS:
        FOLDERS[to](path, form, tensors)
    elif to == "meta":
        if form.layer_norm_eps != EPS or form.which not in NETWORK:
            unfit = f"layer norm eps {form.layer_norm_eps}, not {EPS}" if form.which in NETWORK else "no word on which it is"
            raise ConfigError(f"{form.origin}: an encoder with {unfit} is no official one; pass --which, or use --to fastjepa")
        official.write(path, {NETWORK[form.which]: tensors, "fastjepa": {"form": form.to_dict()}})
    else:
        from fastjepa import export

        export.write(path, to, pretrained.assemble(form, tensors), dynamic)


def publish(dst: Path, write) -> None:
    """Call `write` with a path in a hidden folder beside `dst`, then move what lies there into place, or leave nothing."""
    dst.parent.mkdir(parents=True, exist_ok=True)
    hidden = dst.parent / f".{dst.name}.{os.getpid()}"
    hidden.mkdir()
    try:
        write(hidden / dst.name)
        for made in sorted(hidden.iterdir(), reverse=True):  # NAME.data, which an ONNX file may need, before NAME
            os.replace(made, dst.parent / made.name)
    except SafetensorError as error:
        raise CheckpointError(f"{dst}: could not be written ({' '.join(str(error).split())}); is the disk full?") from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
