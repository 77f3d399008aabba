"""Starting or going on: from a checkpoint, from given weights or from scratch."""

import itertools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from torch import nn

from fastjepa.checkpoint.directory import lack_of, latest_checkpoint, named_checkpoints, verify_checkpoint
from fastjepa.checkpoint.state import STATE_FILE, read_state, record_differences
from fastjepa.errors import MACHINE_FAILED, ConfigError, LoaderError, exit_code, sentence_of
from fastjepa.model.jepa import Jepa
from fastjepa.model.projector import PROJECTOR_PREFIX, without_projector
from fastjepa.model.vit import Encoder
from fastjepa.ranks.collectives import barrier
from fastjepa.ranks.world import World
from fastjepa.weights.input_channels import adapted_encoder
from fastjepa.weights.read import TORCH_FILES, starting_networks

RUN_FILES = ("checkpoints", "metrics.jsonl", "config.yaml", "run.json", "tensorboard")  # of a run, in its directory


def checkpoint_to_resume(output: Path, tag: str, given: str | None, resume: str) -> Path | None:
    """Return the checkpoint that a run in `output` goes on from, if any.

    Args:
        tag: prefix of checkpoint names (logging.write_tag).
        given: the checkpoint in `output` that meta.read_checkpoint names. An official file counts only while there is no
            checkpoint of ours.
    """
    root = output / "checkpoints"
    if resume == "never":
        return None
    latest, named = latest_checkpoint(root, tag), Path(given or "")
    theirs = named.suffix in TORCH_FILES
    found = (latest or output / named) if theirs else root / named if given else latest
    damaged = named_checkpoints(root, tag) if found is None else []
    if damaged:
        why = f"damaged, and there is no other to resume from ({lack_of(damaged[-1])})"
        raise ConfigError(f"{damaged[-1]}: {why}; --resume never moves it aside")
    if resume == "must" and found is None:
        raise ConfigError(f"{root}: nothing to resume from; check --output or pass --resume auto")
    return found


def last_good_checkpoint(output: Path, tag: str) -> str:
    """Return the end of a sentence on a run that has stopped: which checkpoint the same command goes on from."""
    good = latest_checkpoint(output / "checkpoints", tag)
    return f"the last good checkpoint is {good}" if good else "no checkpoint was written yet"


@contextmanager
def telling_where_to_go_on(where: Callable[[], str]) -> Iterator[None]:
    """Add `where()` to the sentence of an error for which the machine is to be mended before the run goes on."""
    try:
        yield
    except (LoaderError, OSError) as error:
        if exit_code(error) != MACHINE_FAILED:
            raise
        raise LoaderError(f"{sentence_of(error, 'train')}; {where()}") from error


def resume_notes(found: Path, about: dict, init: Path | None) -> list[str]:
    """Return sentences for the user of a run that is resumed: from where, and in what it differs."""
    verify_checkpoint(found, [STATE_FILE])
    saved = read_state(found)["record"]
    check_same_teacher(saved.get("teacher"), about.get("teacher"), found)
    differs = record_differences(saved, about)
    unused = [f"--init {init} is not used: it is for runs that start"] if init else []
    return [f"resuming from {found}", *unused, *(f"differs from the run that wrote it: {line}" for line in differs)]


def check_same_teacher(before: str | None, now: str | None, found: Path) -> None:
    """Raise ConfigError where a run would go on with another teacher, told by the SHA-256 of its weights, or with none."""
    if before != now:
        raise ConfigError(f"meta.teacher: the run in {found} has learned from {teacher_words(before)}, and now there is "
                          f"{teacher_words(now)}; give the same weights (a checkpoint of a run stays as it is), or another "
                          "--output")  # fmt: skip


def teacher_words(sha256: str | None) -> str:
    """Return the words for a teacher that a sentence names by its hash."""
    return f"the teacher of SHA-256 {sha256}" if sha256 else "no teacher"


def check_teacher_path(teacher: str | None, output: Path) -> None:
    """Raise ConfigError for a teacher that lies in the output directory of the run that would learn from it."""
    if teacher and Path(teacher).expanduser().resolve().is_relative_to(output.resolve()):
        raise ConfigError(f"meta.teacher: {teacher} is in {output}, the directory of this run, which it would learn to copy; "
                          "give another --output")  # fmt: skip


def start_run(jepa: Jepa, target_encoder: Encoder, output: Path, about: dict, init: Path | None,
          world: World) -> list[str]:  # fmt: skip
    """Start from `init` or from scratch, and return sentences for the user."""
    moved = start_directory(output, about) if world.is_main else []
    barrier()
    kept = [f"an earlier run's files were moved aside: {', '.join(moved)}"] if moved else []
    if init is None:
        return [*kept, f"starting a new run in {output}"]
    parts = {"encoder": jepa.encoder, "predictor": jepa.predictor, "target_encoder": target_encoder}
    names, notes = load_initial_weights(parts, init)
    return [*kept, f"starting a new run in {output} from the weights in {init} ({', '.join(names)})", *notes]


def start_directory(output: Path, about: dict) -> list[str]:
    """Write the resolved config and the versions; what an earlier run left is moved aside, never deleted. Return its names."""
    output.mkdir(parents=True, exist_ok=True)
    moved = move_aside(output)
    (output / "config.yaml").write_text(yaml.safe_dump(about["config"], sort_keys=False))
    (output / "run.json").write_text(json.dumps(about, indent=1))
    return moved


def move_aside(output: Path) -> list[str]:
    """Rename what a run has written in `output`, and return the new names, such as metrics.until-20260102-030405.jsonl."""
    left = [output / name for name in RUN_FILES if (output / name).exists()]
    for number in itertools.count(1):
        stamp = time.strftime("until-%Y%m%d-%H%M%S") + (f"-{number}" if number > 1 else "")
        named = {path: path.with_name(f"{path.stem}.{stamp}{path.suffix}") for path in left}
        if not any(new.exists() for new in named.values()):
            break
    for path, new in named.items():
        path.rename(new)
    return [new.name for new in named.values()]


def load_initial_weights(parts: dict[str, nn.Module], init: Path) -> tuple[list[str], list[str]]:
    """Load the networks that `init` holds; a target encoder it lacks starts as the encoder, a projector anew.

    Encoders of three channels are adapted to those of the run. Return the networks' names, and sentences for the user.
    """
    given, notes = starting_networks(init), []
    if "encoder" in given:
        given.setdefault("target_encoder", given["encoder"])
    for name in given.keys() & {"encoder", "target_encoder"}:
        given[name], note = adapted_encoder(given[name], parts[name].patch_embed.proj.in_channels, str(init))
        notes = [note] if note else []
    for name in given:
        network = parts[name]
        parameters = dict(network.named_parameters())
        own = {key: value for key, value in network.state_dict().items()
               if key not in parameters or key.startswith(PROJECTOR_PREFIX)}  # fmt: skip
        try:  # positions are fixed and belong to this run's resolution, moments of targets and the projector to its objective
            network.load_state_dict(without_projector(given[name]) | own)
        except RuntimeError as error:
            reason = str(error).split("\n")[1].strip()
            raise ConfigError(f"{init}: the weights do not fit the config's {name}: {reason}") from error
    return sorted(given), notes
