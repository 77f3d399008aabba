"""The encoders of a run, for evaluation."""

from pathlib import Path
from typing import Literal

from torch import nn

from fastjepa.checkpoint.directory import complete_checkpoints, find_checkpoint
from fastjepa.checkpoint.restore import load_networks
from fastjepa.checkpoint.state import read_state
from fastjepa.config.load import config_from_dict, load_config
from fastjepa.config.schema import Config
from fastjepa.errors import ConfigError
from fastjepa.model.jepa import build_pair
from fastjepa.weights.read import NETWORK_OF, is_foreign_weights, load_encoder, read_weights

Which = Literal["target", "context", "random"]


def read_config(path: Path) -> Config:
    """The config a checkpoint was trained with, that of a run directory without one yet, or what others' weights imply."""
    if is_foreign_weights(path):
        return read_weights(path).form.config()
    written = path / "config.yaml"
    if written.is_file() and not complete_checkpoints(path / "checkpoints", tag=None):
        return load_config(written)
    found = find_checkpoint(path)
    record = read_state(found)["record"]
    return (
        config_from_dict(record["config"], f"{found}/state.json")
        if "config" in record
        else load_config(found.parent.parent / "config.yaml")
    )


def load_run_encoder(path: str | Path, which: Which = "target", config: Config | None = None) -> nn.Module:
    """An encoder of a checkpoint or run directory (its latest), or of another's weights, frozen, on the CPU.

    Args:
        which: the target encoder (what the paper evaluates), the context encoder, or one with the run's seed, untrained.
        config: default: the one the checkpoint was trained with.
    """
    path = Path(path)
    if which != "random" and is_foreign_weights(path):
        return load_encoder(path, which)
    config = config or read_config(path)
    _, encoder = build_pair(config)
    if which != "random":
        try:
            encoder.load_state_dict(load_networks(path)[NETWORK_OF[which]])
        except RuntimeError as error:
            reason = str(error).split("\n")[1].strip()
            raise ConfigError(f"{path}: its {NETWORK_OF[which]} does not fit its config: {reason}") from error
    return encoder.eval().requires_grad_(False)


def check_encoder_input(encoder: nn.Module, size: tuple[int, int], channels: int) -> None:
    """ConfigError when `encoder` cannot take (channels, *size) images."""
    _, takes, height, width = encoder.get_parameter("patch_embed.proj.weight").shape
    if takes != channels:
        raise ConfigError(f"the encoder takes {takes}-channel images, not {channels}: set data.channels to {takes}")
    if size[0] % height or size[1] % width:
        raise ConfigError(
            f"images of {size[0]}x{size[1]} pixels do not divide into {height}x{width} patches: choose a multiple"
        )
