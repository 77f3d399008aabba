"""Building a run up to its first step: networks, engine and average."""

import dataclasses
import os
import platform
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import fastjepa_kernels
from fastjepa import __version__
from fastjepa.checkpoint.restore import restore_checkpoint
from fastjepa.checkpoint.state import TrainState
from fastjepa.config.schema import Config
from fastjepa.data.sources import Source, open_source
from fastjepa.engine.average import Average, ShardedAverage
from fastjepa.engine.cuda_graph import CudaGraph, EagerRuns, check_cuda_graph
from fastjepa.engine.deepspeed_config import deepspeed_settings
from fastjepa.engine.plain import PlainEngine
from fastjepa.engine.precision import COMPUTE_DTYPES, EMULATED_BF16, autocast_of, has_bf16, settle_dtype
from fastjepa.engine.schedule import warmup_notes
from fastjepa.engine.zero import ZeroEngine
from fastjepa.errors import ConfigError, UserError
from fastjepa.loader.batch import Batch
from fastjepa.loader.loader import check_loader, decodes_with_dali
from fastjepa.loss.normalizations import Target
from fastjepa.loss.objective import Objective, choose_objective, over_micro_batches
from fastjepa.loss.regularizers import BatchRegularizer, NoRegularizer, regularizer_term
from fastjepa.masks.check import check_masks
from fastjepa.masks.layouts import Masking
from fastjepa.model.fp8 import check_fp8, use_fp8
from fastjepa.model.jepa import Jepa, build_pair
from fastjepa.model.vit import Encoder, choose_attention, use_attention
from fastjepa.plan.padding_cost import padding_note
from fastjepa.plan.plan import settle_teacher, workload_of
from fastjepa.plan.sharding import check_step_targets, choose_zero_stage
from fastjepa.ranks.collectives import gather_objects
from fastjepa.ranks.memory import rank_memory_bytes
from fastjepa.ranks.world import World, join_world
from fastjepa.run.resume import check_teacher_path, checkpoint_to_resume, resume_notes, start_run
from fastjepa.weights.official import adopt_training
from fastjepa.weights.pretrained import PretrainedEncoder
from fastjepa.weights.read import TORCH_FILES
from fastjepa.weights.teacher import hash_of_weights, place_on_grid


class Run(NamedTuple):
    """A run before its next step: the parts that steps are taken with."""

    config: Config  # what it left open decided
    world: World
    source: Source
    engine: PlainEngine | ZeroEngine
    average: Average | ShardedAverage
    state: TrainState
    objective: Objective
    notes: list[str]  # what to tell the user


def build_run(config: Config, output: Path, resume: str, init: Path | None, deepspeed_config: Path | None) -> Run:
    """Build a run up to its next step; arguments as in `train`. Every rank takes part."""
    world = join_world(config.runtime.device, 2 * config.runtime.timeout)  # after the heartbeats, which name a rank
    dtype = settle_dtype(config.runtime.dtype, world.device)
    config = dataclasses.replace(config, runtime=dataclasses.replace(config.runtime, dtype=dtype))
    apply_process_settings(config)
    check_teacher_path(config.meta.teacher, output)
    config, teacher = settle_teacher(config)
    source = open_source(config.data.address)
    check_masks(Masking.of(config), config.data.batch_size * world.size)
    check_loader(config, source, world.size)
    about = describe_run(config, world, source, teacher)
    resume = "must" if config.meta.load_checkpoint and resume == "auto" else resume
    found = checkpoint_to_resume(output, config.logging.write_tag, config.meta.read_checkpoint, resume)
    if found and found.suffix in TORCH_FILES:
        found = adopt_training(found, output / "checkpoints", about["steps_per_epoch"], about, config.logging.write_tag)
    jepa, target_encoder = build_networks(config, world.device, world.size)
    told = place_teacher(teacher, config, world.device)
    notes = resume_notes(found, about, init) if found else start_run(jepa, target_encoder, output, about, init, world)
    stage, reason = zero_stage(config, world)
    engine = build_engine(jepa, config, world, stage, deepspeed_config)
    average = engine.follow(target_encoder)
    networks = {"encoder": jepa.encoder, "predictor": jepa.predictor, "target_encoder": target_encoder}
    state = TrainState(0, networks, engine.optimizer, record=about, shards=engine.shards(average, networks))
    if found:
        restore_checkpoint(found, state)
    notes += reason + told + run_warnings(config, world.device)
    check_step_targets(workload_of(config), world.size, stage, rank_memory_bytes(world.device))
    objective = build_objective(config, engine, average.target_encoder, world, teacher)
    return Run(config, world, source, engine, average, state, objective, notes)


def describe_run(config: Config, world: World, source: Source, teacher: PretrainedEncoder | None = None) -> dict:
    """Describe a run, for a resumed one to compare with: exactness holds on one machine, with equal versions and threads."""
    versions = {"fastjepa": __version__, "torch": torch.__version__, "python": platform.python_version()}
    decoder = "dali" if decodes_with_dali(config, source) else "torch"
    machine = torch.cuda.get_device_name() if world.device.type == "cuda" else platform.machine()
    return {
        "config": config.to_dict(),
        "versions": versions,
        "machine": machine,
        "threads": torch.get_num_threads(),
        "decoder": decoder,
        "world": world.size,
        "steps_per_epoch": len(source) // (config.data.batch_size * world.size),
    } | ({"teacher": hash_on_ranks(teacher)} if teacher else {})


def hash_on_ranks(teacher: PretrainedEncoder) -> str:
    """Return the SHA-256 of a teacher's weights; ConfigError where ranks have read different ones."""
    found = gather_objects(hash_of_weights(teacher))
    if len(set(found)) > 1:
        raise ConfigError(f"meta.teacher: ranks read different weights, of SHA-256 {', '.join(found)}; give all one file")
    return found[0]


def zero_stage(config: Config, world: World) -> tuple[int, list[str]]:
    """Return the ZeRO stage, the same on every rank, and what to tell the user of one that was chosen: it is not obvious."""
    if config.runtime.zero != "auto":
        return config.runtime.zero, []
    choice = choose_zero_stage(workload_of(config), world.size, rank_memory_bytes(world.device))
    return choice.stage, [choice.why] if world.size > 1 or not choice.fits else []


def run_warnings(config: Config, device: torch.device) -> list[str]:
    """Return sentences for the user of a config that runs, but not as it could."""
    emulated = config.runtime.dtype == "bf16" and not has_bf16(device)
    graph = [padding_note(workload_of(config), config.data.batch_size)] if config.runtime.cuda_graph else []
    return graph + ([EMULATED_BF16] if emulated else []) + attention_notes(config, device) + warmup_notes(config.optimization)


def attention_notes(config: Config, device: torch.device) -> list[str]:
    """Return a sentence for each network whose attention `auto` finds no library for, where a card has some."""
    if device.type != "cuda" or config.runtime.attention != "auto" or config.runtime.dtype == "fp32":
        return []
    rows = zip(AttentionWays._fields, attention_ways(config, device), config.head_dims, strict=True)
    return [padded_note(network, way, head_dim) for network, way, head_dim in rows if way in PADDED_WAYS]


def padded_note(network: str, way: str, head_dim: int) -> str:
    """Return the sentence on a network whose attention pads."""
    return (
        f"the {network}'s attention runs in {way}, which pads its sequences to the longest: no library that could do without "
        f"is here for heads of {head_dim} channels; `fastjepa doctor` says which libraries are"
    )


def apply_process_settings(config: Config) -> None:
    """Apply the settings that hold for the whole process: threads, kernels, deterministic algorithms."""
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


def build_networks(config: Config, device: torch.device, ranks: int = 1) -> tuple[Jepa, Encoder]:
    """Return the trained pair and the target encoder, on the device, computing as `runtime` says."""
    ways = check_compute(config, device, ranks)
    pair = build_pair(config)
    if config.runtime.target_fp8:
        use_fp8(pair[1])
    for network in pair:
        use_attention(network.to(device), ways.encoder)
    use_attention(pair[0].predictor, ways.predictor)
    if config.runtime.compile:
        for network in pair:
            network.compile(dynamic=True)
    return pair


def place_teacher(teacher: PretrainedEncoder | None, config: Config, device: torch.device) -> list[str]:
    """Bring a teacher to the device, computing as `runtime` says on the run's grid; return sentences for the user.

    Its matrices are in the dtype that autocast would bring them to at every forward, norms and biases in fp32.
    """
    if teacher is None:
        return []
    runtime, dtype, head_dim = config.runtime, COMPUTE_DTYPES[config.runtime.dtype], teacher.blocks[0].attn.head_dim
    notes = place_on_grid(teacher, config.grid)
    way = choose_attention(runtime.attention, device, dtype, head_dim, config.grid[0] * config.grid[1])
    if device.type == "cuda" and runtime.attention == "auto" and runtime.dtype != "fp32" and way in PADDED_WAYS:
        notes.append(padded_note("teacher", way, head_dim))
    if runtime.cuda_graph:
        check_cuda_graph(device, way, 1, runtime.zero)
    use_attention(teacher.to(device), way)
    for parameter in teacher.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.to(dtype)
    if config.runtime.compile:
        teacher.compile(dynamic=True)
    return notes


def placed_teacher(config: Config, device: torch.device) -> tuple[Config, PretrainedEncoder | None]:
    """Return the config with the shape of its teacher, and the teacher on the device; None where the config names none."""
    config, teacher = settle_teacher(config)
    place_teacher(teacher, config, device)
    return config, teacher


class AttentionWays(NamedTuple):
    """The implementation that each network's attention runs in."""

    encoder: str  # of the target encoder too
    predictor: str


PADDED_WAYS = ("sdpa", "matmul")  # whose ragged sequences are padded to the longest


def attention_ways(config: Config, device: torch.device) -> AttentionWays:
    """Return what `runtime.attention` means for each network: their heads differ, and no sequence is longer than an image."""
    dtype, longest = COMPUTE_DTYPES[config.runtime.dtype], config.grid[0] * config.grid[1]
    ways = (choose_attention(config.runtime.attention, device, dtype, head_dim, longest) for head_dim in config.head_dims)
    return AttentionWays(*ways)


def check_compute(config: Config, device: torch.device, ranks: int = 1) -> AttentionWays:
    """Return which attention runs; raise ConfigError where the device cannot compute as `runtime` says."""
    ways = attention_ways(config, device)
    if config.runtime.cuda_graph:
        for way in ways:
            check_cuda_graph(device, way, ranks, config.runtime.zero)
    if config.runtime.target_fp8:
        check_fp8(device, config.runtime.dtype)
    return ways


def build_engine(jepa: Jepa, config: Config, world: World, stage: int, given: Path | None = None) -> PlainEngine | ZeroEngine:
    """Build the engine of a ZeRO stage: 0 is torch alone, with DistributedDataParallel on several ranks.

    Args:
        stage: what `runtime.zero` says, or what was chosen where it is auto.
        given: a user's file with DeepSpeed's own options, for stages 1 to 3.
    """
    scale, muon = config.optimization.pred_lr_scale, config.optimization.optimizer == "muon"
    pieces = config.data.batch_size // config.micro_batch
    if stage == 0:
        if given:
            raise UserError(f"--deepspeed_config {given}: runtime.zero 0 runs without DeepSpeed; set it to 1, 2 or 3")
        return PlainEngine(jepa, world.size, pieces, config.runtime.cuda_graph, scale, muon)
    if stage == 3 and config.runtime.compile:
        raise ConfigError(
            "runtime.compile: not with runtime.zero 3, whose gathers a compiler cannot see; switch one of them off"
        )
    settings = deepspeed_settings(config.micro_batch, pieces, config.runtime.dtype, stage, given)
    return ZeroEngine(jepa, settings, world, scale)


def build_objective(
    config: Config, engine: PlainEngine | ZeroEngine, target_encoder: Encoder, world: World, teacher: Encoder | None
) -> Objective:
    """Return the objective; a regularizer looks at the whole batch with the engine's features, of every rank, and so does a
    normalisation over the batch with the targets.

    Args:
        teacher: what `place_teacher` has placed; None where the config names none.
    """

    def pooled(batch: Batch) -> Tensor:
        """Return the pooled features (S, D) of a micro-batch, without gradient."""
        with autocast_of(COMPUTE_DTYPES[config.runtime.dtype], world.device):
            return engine.pooled(batch.images, batch.context, batch.blocks)

    loss, seed = config.loss, config.runtime.seed
    term = regularizer_term(loss.regularizer, loss.regularizer_weight, loss.covariance_weight, seed, world.device)
    pieces = config.data.batch_size // config.micro_batch
    regularizer = BatchRegularizer(term, pieces, world, pooled) if term else NoRegularizer()
    objective = choose_objective(loss, regularizer, engine.jepa.predictor.target_moments, teacher)
    if loss.normalize != "batch" or pieces == 1:
        return objective

    @torch.no_grad()
    def targets(batch: Batch) -> Target:
        """Return the targets of a micro-batch."""
        with autocast_of(COMPUTE_DTYPES[config.runtime.dtype], world.device):
            return objective.targets(target_encoder, batch)

    return over_micro_batches(objective, loss.layers == "mean", targets)


def build_runs(config: Config, engine: PlainEngine) -> EagerRuns:
    """Return how the body of the loop over micro-batches is run: eagerly, or as a CUDA graph."""
    if not config.runtime.cuda_graph:
        return EagerRuns()
    return CudaGraph(workload_of(config).padding_budget(config.data.batch_size), engine.parameters, engine.micro_batches)
