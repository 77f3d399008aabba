"""A frozen teacher: the encoder of another run or file, whose features are a run's targets (`meta.teacher`)."""

import hashlib
import json
from pathlib import Path

from fastjepa.errors import CheckpointError, ConfigError, UserError
from fastjepa.weights.pretrained import FILE_KEYS, PretrainedEncoder, shown_grid
from fastjepa.weights.read import load_encoder


def read_teacher(path: str, grid: tuple[int, int], channels: int) -> PretrainedEncoder:
    """Read the encoder that `meta.teacher` names, in fp32 on the CPU.

    Args:
        grid: (rows, columns) of patches of the run that learns from it.
        channels: of that run's images.

    Raises:
        ConfigError: it is not there, is no encoder that can be read, or cannot see what the run sees.
    """
    if not Path(path).expanduser().exists():
        raise ConfigError(f"meta.teacher: {path} is not there; name a run, a checkpoint or a file of weights")
    try:
        teacher = load_encoder(path)
    except (UserError, CheckpointError) as error:
        raise ConfigError(f"meta.teacher: {error}") from error
    if teacher.channels != channels:
        raise ConfigError(f"meta.teacher: {path} takes images of {teacher.channels} channels, and data.channels is {channels}; "
                          "make them equal")  # fmt: skip
    if teacher.grid != grid and not teacher.fixed_positions:
        own, ours = shown_grid(teacher.grid), shown_grid(grid)
        raise ConfigError(f"meta.teacher: {path} has learned positions of {own} patches, and crops are cut into {ours} here; "
                          f"set data.crop_size and mask.patch_size to {own} patches")  # fmt: skip
    return teacher


def place_on_grid(teacher: PretrainedEncoder, grid: tuple[int, int]) -> list[str]:
    """Give a teacher the positions of a run's grid, made once; return a sentence for the user where its own were others."""
    own = teacher.grid
    if own == grid:
        return []
    teacher.chose_positions = True
    if not teacher.form.rotary:
        teacher.pos_embed = teacher.positions(grid)[None]
    teacher.grid, (rows, columns) = grid, grid
    teacher.image_size = rows * teacher.patch_size, columns * teacher.patch_size
    height, width = teacher.image_size
    return [f"the teacher sees {height}x{width} pixels with the positions of {shown_grid(grid)} patches; it was trained on "
            f"{shown_grid(own)}"]  # fmt: skip


def teacher_shape(teacher: PretrainedEncoder) -> tuple[int, int, int, int, int]:
    """Return what `meta.teacher_shape` says of a teacher: width, blocks, heads, width of its MLPs, patch size in pixels."""
    form = teacher.form
    return form.embed_dim, form.depth, form.num_heads, form.mlp_hidden, form.patch_size


def hash_of_weights(encoder: PretrainedEncoder) -> str:
    """Return the SHA-256 of all that an encoder's features depend on: its weights in fp32, by name, and its form.

    One encoder has one hash in whatever kind of file it lies.
    """
    form = {name: value for name, value in encoder.form.to_dict().items() if name not in ("which", "origin", *FILE_KEYS)}
    found = hashlib.sha256(json.dumps(form, sort_keys=True).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.float().contiguous().numpy())
    return found.hexdigest()
