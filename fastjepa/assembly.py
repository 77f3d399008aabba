"""Everything up to a run's first step: networks, engine and average, from a checkpoint, from given weights or from scratch."""

import json
import os
import platform
import time
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from torch import nn

import fastjepa
import fastjepa_kernels
from fastjepa import (
    attention,
    budget,
    checkpoint,
    data,
    distributed,
    fp8,
    graphs,
    interop,
    masks,
    model,
    official,
    precision,
)
from fastjepa import engine as engines
from fastjepa.checkpoint import TrainState
from fastjepa.config import Config, ConfigError
from fastjepa.distributed import World
from fastjepa.ema import Average, ShardedAverage
from fastjepa.engine import Engine, ShardedEngine
from fastjepa.loss import BatchRegularizer, regularizer
from fastjepa.sources import Source, open_source


class Run(NamedTuple):
    """What steps are taken with."""

    config: Config  # what it left open decided
    world: World
    source: Source
    engine: Engine | ShardedEngine
    average: Average | ShardedAverage
    state: TrainState
    notes: list[str]  # what to tell the user


def assemble(config: Config, output: Path, resume: str, init: Path | None, deepspeed_config: Path | None) -> Run:
    """Everything up to the first step; arguments as in `train`."""
    world = distributed.init(config.runtime.device, 2 * config.runtime.timeout)  # after the heartbeats, which name a rank
    config = precision.settled(config, world.device)
    settle(config)
    source = open_source(config.data)
    masks.check(config, config.data.batch_size * world.size)
    data.check(config, source, world.size)
    about = record(config, world, source)
    found = to_resume(config, output, resume)
    if found and found.suffix in interop.TORCH_FILES:
        found = official.adopt(found, output / "checkpoints", about["steps_per_epoch"], about, config.logging.write_tag)
    jepa, target_encoder = networks(config, world.device, world.size)
    notes = go_on(found, about, init) if found else start(jepa, target_encoder, output, about, init, world)
    engine = engines.build(jepa, config, world, deepspeed_config)
    average, state = averaged(engine, target_encoder, config)
    state.record = about
    if found:
        checkpoint.restore(found, state)
    notes += warnings_of(config, world.device)
    return Run(config, world, source, engine, average, state, notes)


def warnings_of(config: Config, device: torch.device) -> list[str]:
    """What to tell the user of a config that runs, but not as it could."""
    emulated = config.runtime.dtype == "bf16" and not precision.has_bf16(device)
    graph = [budget.note(config, config.data.batch_size)] if config.runtime.cuda_graph else []
    return graph + ([precision.EMULATED] if emulated else [])


def settle(config: Config) -> None:
    """Process-wide settings of a run."""
    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    use_kernels(config.runtime.kernels)
    if config.runtime.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def use_kernels(asked: str) -> None:
    """Apply `runtime.kernels`: a way for all ops, then op=way for some."""
    way, *exceptions = asked.split(",")
    pairs = [exception.partition("=")[::2] for exception in exceptions]
    try:
        fastjepa_kernels.use(way, **dict(pairs))
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"runtime.kernels: {error}") from error


def networks(config: Config, device: torch.device, ranks: int = 1) -> tuple[model.Jepa, model.Encoder]:
    """The trained pair and the target encoder, on the device, computing as `runtime` says."""
    way = check(config, device, ranks)
    pair = model.build(config)
    if config.runtime.target_fp8:
        fp8.use(pair[1])
    for network in pair:
        model.use_attention(network.to(device), way)
        if config.runtime.compile:
            network.compile(dynamic=True)
    return pair


def check(config: Config, device: torch.device, ranks: int = 1) -> str:
    """Which attention runs; ConfigError where the device cannot compute as `runtime` says."""
    way = attention.choose(config.runtime.attention, device, precision.dtype_of(config))
    if config.runtime.cuda_graph:
        graphs.check(config, device, way, ranks)
    if config.runtime.target_fp8:
        fp8.check(config, device)
    return way


def batch_regularizer(config: Config, world: World) -> BatchRegularizer | None:
    term = regularizer(config.loss, config.runtime.seed)
    pieces = config.data.batch_size // config.micro_batch
    return term and BatchRegularizer(term, pieces, distributed.all_gather, world.rank, world.size)


def record(config: Config, world: World, source: Source) -> dict:
    """What a resumed run is compared with: exactness holds on the same machine, versions and thread count."""
    versions = {"fastjepa": fastjepa.__version__, "torch": torch.__version__, "python": platform.python_version()}
    decoder = "dali" if data.decodes_with_dali(config, source) else "torch"
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


def averaged(engine: Engine, target_encoder: model.Encoder, config: Config) -> tuple[Average, TrainState]:
    """The average that follows the engine's encoder, and the state of both, at step 0."""
    jepa = engine.jepa
    parts = {"encoder": jepa.encoder, "predictor": jepa.predictor, "target_encoder": target_encoder}
    if isinstance(engine, Engine):
        return Average(target_encoder, jepa.encoder), TrainState(0, parts, engine.optimizer)
    online = {name.removeprefix("encoder."): piece for name, piece in engine.masters().items() if name.startswith("encoder.")}
    average = ShardedAverage(target_encoder, online, precision.dtype_of(config))
    return average, TrainState(0, parts, engine.optimizer, shards=checkpoint.Shards(engine, average, parts))


def to_resume(config: Config, output: Path, resume: str) -> Path | None:
    """The checkpoint that a run in `output` goes on from; an official file in `output` only while there is none of ours."""
    root, meta = output / "checkpoints", config.meta
    resume = "must" if meta.load_checkpoint and resume == "auto" else resume
    if resume == "never":
        return None
    latest, named = checkpoint.latest(root, config.logging.write_tag), Path(meta.read_checkpoint or "")
    theirs = named.suffix in interop.TORCH_FILES
    found = (latest or output / named) if theirs else root / named if meta.read_checkpoint else latest
    damaged = sorted(root.glob(f"{config.logging.write_tag}-*")) if found is None else []
    if damaged:
        raise ConfigError(f"{damaged[-1]}: damaged, and there is no other to resume from; --resume never moves it aside")
    if resume == "must" and found is None:
        raise ConfigError(f"{root}: nothing to resume from; check --output or pass --resume auto")
    return found


def go_on(found: Path, about: dict, init: Path | None) -> list[str]:
    """What to tell the user of a run that is resumed."""
    checkpoint.verify(found, [checkpoint.STATE])
    differs = checkpoint.differences(checkpoint.read_state(found)["record"], about)
    unused = [f"--init {init} is not used: it is for runs that start"] if init else []
    return [f"resuming from {found}", *unused, *(f"differs from the run that wrote it: {line}" for line in differs)]


def start(jepa: model.Jepa, target_encoder: model.Encoder, output: Path, about: dict, init: Path | None,
          world: World) -> list[str]:  # fmt: skip
    """Start from `init` or from scratch; returns what to tell the user."""
    if world.is_main:
        start_directory(output, about)
    distributed.barrier()
    if init is None:
        return [f"starting a new run in {output}"]
    parts = {"encoder": jepa.encoder, "predictor": jepa.predictor, "target_encoder": target_encoder}
    return [f"starting a new run in {output} from the weights in {init} ({', '.join(start_from(parts, init))})"]


def start_directory(output: Path, about: dict) -> None:
    """Write the resolved config and the versions; checkpoints of an earlier run are moved aside, never deleted."""
    output.mkdir(parents=True, exist_ok=True)
    if (output / "checkpoints").exists():
        (output / "checkpoints").rename(output / f"checkpoints.until-{time.strftime('%Y%m%d-%H%M%S')}")
    (output / "config.yaml").write_text(yaml.safe_dump(about["config"], sort_keys=False))
    (output / "run.json").write_text(json.dumps(about, indent=1))


def start_from(parts: dict[str, nn.Module], init: Path) -> list[str]:
    """Load the networks that `init` holds; a target encoder it lacks starts as the encoder. Returns their names."""
    given = interop.networks(init)
    if "encoder" in given:
        given.setdefault("target_encoder", given["encoder"])
    for name in given:
        network = parts[name]
        positions = {key: value for key, value in network.state_dict().items() if key.endswith("pos_embed")}
        try:  # positions are fixed and belong to this run's resolution
            network.load_state_dict(given[name] | positions)
        except RuntimeError as error:
            reason = str(error).split("\n")[1].strip()
            raise ConfigError(f"{init}: the weights do not fit the config's {name}: {reason}") from error
    return sorted(given)
