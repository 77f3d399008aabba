"""Conversion of encoders between this trainer's runs, Meta's `.pth.tar`, timm, transformers' IJepaModel and files of weights.

Names inside are those of the official code and of timm. Every way in says which encoder it found, and every way out
records it: the target encoder, which the paper evaluates, or the context encoder.
"""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml
from safetensors import SafetensorError
from torch import Tensor

from fastjepa.config.load import load_config
from fastjepa.config.schema import Config
from fastjepa.errors import CheckpointError, UserError
from fastjepa.files import atomic_path, require_writable
from fastjepa.model.positions import Positions
from fastjepa.weights.hub_folders import write_fastjepa, write_timm, write_transformers
from fastjepa.weights.official import adopt_training, load_official, official_contents, official_notes, write_official
from fastjepa.weights.pretrained import (
    LAYER_NORM_EPS,
    EncoderForm,
    PretrainedEncoder,
    encoder_of_weights,
    require_official_attention,
    shown_grid,
)
from fastjepa.weights.read import NETWORK_OF, interpolates_as_timm, read_weights, weights_kind

EXPORTS = ("onnx", "pt2")
FOLDER_WRITERS = {"fastjepa": write_fastjepa, "timm": write_timm, "transformers": write_transformers}


@dataclass(frozen=True)
class Conversion:
    """The form that weights are converted to, and what they do not say of themselves."""

    to: str  # a name of FOLDER_WRITERS, meta, run, onnx or pt2
    which: str | None = None  # target or context; None: as in `load_encoder`; to meta: all networks, and the optimizer
    config: Path | None = None  # YAML: the shape of weights that do not say theirs; to run: the training
    steps_per_epoch: int | None = None  # to run, and to meta from a run that does not say it
    dynamic: bool = False  # to onnx and pt2: images of any size that is a multiple of the patch
    positions: Positions | None = None  # of other sizes than the encoder's own, where `dynamic`; None: the default
    grid: tuple[int, int] | None = None  # (rows, columns) of patches of weights that do not say theirs


def convert_weights(src: str | Path, dst: str | Path, wanted: Conversion) -> tuple[list[str], list[str]]:
    """Write what `src` holds at `dst`, which must not exist yet.

    Returns:
        The encoders written (target, context or both), and notes: where they came from, what was left out.
    """
    src, dst, to = Path(src).expanduser(), Path(dst).expanduser(), wanted.to
    check_wanted(wanted)
    config = load_config(wanted.config) if wanted.config else None
    if os.path.lexists(dst):
        raise UserError(f"{dst}: exists already; remove it or choose another name")
    require_writable(dst)
    if to == "meta" and wanted.which is None and weights_kind(src) in ("run", "meta"):
        contents = official_contents(src, wanted.steps_per_epoch) if weights_kind(src) == "run" else load_official(src)
        if not contents.get("fastjepa", {}).get("lone"):
            publish_path(dst, lambda path: write_official(path, contents))
            return [which for which, name in NETWORK_OF.items() if name in contents], official_notes(contents, src)
    if to == "run":
        adopt_official(src, dst, config, wanted.steps_per_epoch)
        return list(NETWORK_OF), [f"from {src}; continue with fastjepa train --config YAML --output {dst}"]
    shape = EncoderForm.of_config(config) if config else wanted.grid
    form, tensors, left_out = read_weights(src, wanted.which, shape)
    if to in EXPORTS:
        encoder = encoder_of_weights(form, tensors, wanted.positions, interpolates_as_timm(src))
        publish_path(dst, lambda path: export_encoder(path, to, encoder, wanted.dynamic))
    else:
        publish_path(dst, lambda path: write_encoder(path, to, form, tensors))
    dynamic = wanted.dynamic and not form.rotary
    told = [f"other sizes than {shown_grid(form.grid)} patches: {encoder.other_positions} positions"] if dynamic else []
    return [form.which], [f"from {form.origin}", *told, *([f"left out: {', '.join(left_out)}"] if left_out else [])]


def adopt_official(src: Path, dst: Path, config: Config | None, steps_per_epoch: int | None) -> None:
    """Write a run directory at `dst` that continues an official checkpoint."""
    if config is None or steps_per_epoch is None:
        raise UserError("--to run needs --config, the YAML of the training, and --steps-per-epoch, images / global batch")
    if weights_kind(src) != "meta":
        raise UserError(f"{src}: only an official .pth.tar holds a training to go on with; for weights use train --init")

    def make(run: Path) -> None:
        record = {"config": config.to_dict(), "steps_per_epoch": steps_per_epoch}
        adopt_training(src, run / "checkpoints", steps_per_epoch, record, config.logging.write_tag)
        (run / "config.yaml").write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))

    publish_path(dst, make)


def check_wanted(wanted: Conversion) -> None:
    """Raise UserError for options that do not go together."""
    if wanted.dynamic and wanted.to not in EXPORTS:
        raise UserError(f"--dynamic is for --to {' and '.join(EXPORTS)}; other formats take any size by themselves")
    if wanted.positions and not wanted.dynamic:
        raise UserError("--positions says what --dynamic gives images of other sizes: add --dynamic, or leave it out")
    if wanted.grid and wanted.config:
        raise UserError("--grid and --config both say how patches lie; give one of them")


def write_encoder(path: Path, to: str, form: EncoderForm, tensors: dict[str, Tensor]) -> None:
    """Write the weights of one encoder as `to`: a name of FOLDER_WRITERS, or meta."""
    if to == "meta":
        require_official_attention(form, "the official code")
    if form.norm != "layer" and to in ("timm", "transformers", "meta"):
        raise UserError(
            f"{form.origin}: its last norm is a tanh (loss.normalize dyntanh), which {to} has not; use --to fastjepa"
        )
    if to in FOLDER_WRITERS:
        FOLDER_WRITERS[to](path, form, tensors)
        return
    if form.layer_norm_eps != LAYER_NORM_EPS or form.which not in NETWORK_OF:
        other_eps = f"layer norm eps {form.layer_norm_eps}, not {LAYER_NORM_EPS}"
        unfit = other_eps if form.which in NETWORK_OF else "no word on which it is"
        raise UserError(f"{form.origin}: an encoder with {unfit} is no official one; pass --which, or use --to fastjepa")
    write_official(path, {NETWORK_OF[form.which]: tensors, "fastjepa": {"form": form.to_dict()}})


def export_encoder(path: Path, to: str, encoder: PretrainedEncoder, dynamic: bool) -> None:
    """Write an encoder as a program: onnx or pt2."""
    from fastjepa.weights.export import write_export

    write_export(path, to, encoder, dynamic)


def publish_path(dst: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a path of the name of `dst` in a hidden folder, then move what lies there into place, or leave nothing.

    The name is the final one already, for torch writes it into the file, and an ONNX file that of its NAME.data.
    """
    dst.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{dst.name}.", dir=dst.parent) as folder:
        try:
            write(Path(folder) / dst.name)
        except SafetensorError as error:
            raise CheckpointError(f"{dst}: could not be written ({' '.join(str(error).split())}); is the disk full?") from error
        for made in sorted(Path(folder).iterdir(), reverse=True):  # NAME.data, which NAME may need, before NAME
            with atomic_path(dst.parent / made.name) as hidden:
                os.replace(made, hidden)
