"""Starting or going on: from a checkpoint, from given weights or from scratch."""

import json
import platform
import time
from pathlib import Path

import torch
import yaml
from torch import nn

from fastjepa import __version__
from fastjepa.checkpoint.directory import latest_checkpoint, verify_checkpoint
from fastjepa.checkpoint.state import STATE_FILE, read_state, record_differences
from fastjepa.config.schema import Config
from fastjepa.data.sources import Source
from fastjepa.errors import ConfigError
from fastjepa.loader.loader import decodes_with_dali
from fastjepa.model.jepa import Jepa
from fastjepa.model.vit import Encoder
from fastjepa.ranks.collectives import barrier
from fastjepa.ranks.world import World
from fastjepa.weights.read import TORCH_FILES, starting_networks


def describe_run(config: Config, world: World, source: Source) -> dict:
    """Describe a run, for a resumed one to compare with: exactness holds on one machine, with equal versions and threads."""
    versions = {"fastjepa": __version__, "torch": torch.__version__, "python": platform.python_version()}
    decoder = "dali" if decodes_with_dali(config.data.loader, config.runtime.device, source) else "torch"
    machine = torch.cuda.get_device_name() if world.device.type == "cuda" else platform.machine()
    return {
        "config": config.to_dict(),
        "versions": versions,
        "machine": machine,
        "threads": torch.get_num_threads(),
        "decoder": decoder,
        "world": world.size,
        "steps_per_epoch": len(source) // (config.data.batch_size * world.size),
    }


def checkpoint_to_resume(config: Config, output: Path, resume: str) -> Path | None:
    """Return the checkpoint that a run in `output` goes on from, if any.

    An official file (meta.read_checkpoint) counts only while there is no checkpoint of ours.
    """
    root, meta = output / "checkpoints", config.meta
    resume = "must" if meta.load_checkpoint and resume == "auto" else resume
    if resume == "never":
        return None
    latest, named = latest_checkpoint(root, config.logging.write_tag), Path(meta.read_checkpoint or "")
    theirs = named.suffix in TORCH_FILES
    found = (latest or output / named) if theirs else root / named if meta.read_checkpoint else latest
    damaged = sorted(root.glob(f"{config.logging.write_tag}-*")) if found is None else []
    if damaged:
        raise ConfigError(f"{damaged[-1]}: damaged, and there is no other to resume from; --resume never moves it aside")
    if resume == "must" and found is None:
        raise ConfigError(f"{root}: nothing to resume from; check --output or pass --resume auto")
    return found


def resume_notes(found: Path, about: dict, init: Path | None) -> list[str]:
    """Return sentences for the user of a run that is resumed: from where, and in what it differs."""
    verify_checkpoint(found, [STATE_FILE])
    differs = record_differences(read_state(found)["record"], about)
    unused = [f"--init {init} is not used: it is for runs that start"] if init else []
    return [f"resuming from {found}", *unused, *(f"differs from the run that wrote it: {line}" for line in differs)]


def start_run(jepa: Jepa, target_encoder: Encoder, output: Path, about: dict, init: Path | None,
          world: World) -> list[str]:  # fmt: skip
    """Start from `init` or from scratch, and return sentences for the user."""
    if world.is_main:
        start_directory(output, about)
    barrier()
    if init is None:
        return [f"starting a new run in {output}"]
    parts = {"encoder": jepa.encoder, "predictor": jepa.predictor, "target_encoder": target_encoder}
    return [f"starting a new run in {output} from the weights in {init} ({', '.join(load_initial_weights(parts, init))})"]


def start_directory(output: Path, about: dict) -> None:
    """Write the resolved config and the versions; checkpoints of an earlier run are moved aside, never deleted."""
    output.mkdir(parents=True, exist_ok=True)
    if (output / "checkpoints").exists():
        (output / "checkpoints").rename(output / f"checkpoints.until-{time.strftime('%Y%m%d-%H%M%S')}")
    (output / "config.yaml").write_text(yaml.safe_dump(about["config"], sort_keys=False))
    (output / "run.json").write_text(json.dumps(about, indent=1))


def load_initial_weights(parts: dict[str, nn.Module], init: Path) -> list[str]:
    """Load the networks that `init` holds; a target encoder it lacks starts as the encoder. Return their names."""
    given = starting_networks(init)
    if "encoder" in given:
        given.setdefault("target_encoder", given["encoder"])
    for name in given:
        network = parts[name]
        parameters = dict(network.named_parameters())
        own = {key: value for key, value in network.state_dict().items() if key not in parameters}
        try:  # positions are fixed and belong to this run's resolution, the moments of targets to its steps
            network.load_state_dict(given[name] | own)
        except RuntimeError as error:
            reason = str(error).split("\n")[1].strip()
            raise ConfigError(f"{init}: the weights do not fit the config's {name}: {reason}") from error
    return sorted(given)
