"""Encoders in and out: this trainer's runs, Meta's `.pth.tar`, timm's ViTs, transformers' IJepaModel, and files of weights.

Names inside are those of the official code and of timm. Every way in says which encoder it found, and every way out
records it: the target encoder, which the paper evaluates, or the context encoder.
"""

import os
import shutil
from pathlib import Path

import yaml
from safetensors import SafetensorError
from torch import Tensor

from fastjepa.config.schema import Config
from fastjepa.errors import CheckpointError, ConfigError
from fastjepa.weights.hub_folders import write_fastjepa, write_timm, write_transformers
from fastjepa.weights.official import adopt_training, load_official, official_contents, official_notes, write_official
from fastjepa.weights.pretrained import LAYER_NORM_EPS, EncoderForm, encoder_of_weights
from fastjepa.weights.read import NETWORK_OF, read_weights, weights_kind

FOLDER_WRITERS = {
    "fastjepa": write_fastjepa,
    "timm": write_timm,
    "transformers": write_transformers,
}


def convert_weights(src: str | Path, dst: str | Path, to: str, which: str | None = None, config: Config | None = None,
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
    if to == "meta" and which is None and weights_kind(src) in ("run", "meta"):
        contents = official_contents(src, steps_per_epoch) if weights_kind(src) == "run" else load_official(src)
        if not contents.get("fastjepa", {}).get("lone"):
            publish_path(dst, lambda path: write_official(path, contents))
            return [which for which, name in NETWORK_OF.items() if name in contents], official_notes(contents, src)
    if to == "run":
        adopt_official(src, dst, config, steps_per_epoch)
        return list(NETWORK_OF), [f"from {src}; continue with fastjepa train --config YAML --output {dst}"]
    form, tensors, left_out = read_weights(src, which, config)
    publish_path(dst, lambda path: write_encoder(path, to, form, tensors, dynamic))
    return [form.which], [f"from {form.origin}", *([f"left out: {', '.join(left_out)}"] if left_out else [])]


def adopt_official(src: Path, dst: Path, config: Config | None, steps_per_epoch: int | None) -> None:
    """A run directory at `dst` that continues an official checkpoint."""
    if config is None or steps_per_epoch is None:
        raise ConfigError("--to run needs --config, the YAML of the training, and --steps-per-epoch, images / global batch")
    if weights_kind(src) != "meta":
        raise ConfigError(f"{src}: only an official .pth.tar holds a training to go on with; for weights use train --init")

    def make(run: Path) -> None:
        record = {"config": config.to_dict(), "steps_per_epoch": steps_per_epoch}
        adopt_training(src, run / "checkpoints", steps_per_epoch, record, config.logging.write_tag)
        (run / "config.yaml").write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))

    publish_path(dst, make)


def write_encoder(path: Path, to: str, form: EncoderForm, tensors: dict[str, Tensor], dynamic: bool = False) -> None:
    """One encoder as `to`."""
    if to in FOLDER_WRITERS:
        FOLDER_WRITERS[to](path, form, tensors)
    elif to == "meta":
        if form.layer_norm_eps != LAYER_NORM_EPS or form.which not in NETWORK_OF:
            unfit = (
                f"layer norm eps {form.layer_norm_eps}, not {LAYER_NORM_EPS}"
                if form.which in NETWORK_OF
                else "no word on which it is"
            )
            raise ConfigError(f"{form.origin}: an encoder with {unfit} is no official one; pass --which, or use --to fastjepa")
        write_official(path, {NETWORK_OF[form.which]: tensors, "fastjepa": {"form": form.to_dict()}})
    else:
        from fastjepa.weights.export import write_export

        write_export(path, to, encoder_of_weights(form, tensors), dynamic)


def publish_path(dst: Path, write) -> None:
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
