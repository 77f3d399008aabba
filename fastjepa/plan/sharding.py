"""The ZeRO stage of a run: plain DDP where the model fits the memory of a rank, else the lowest stage that fits."""

from collections.abc import Mapping
from typing import NamedTuple

from fastjepa.errors import ConfigError
from fastjepa.loss.normalizations import BatchNormalization
from fastjepa.plan.memory import FP32_BYTES, ZERO_STAGES, activation_bytes, network_sizes, row_counts, tensor_bytes
from fastjepa.plan.workload import Workload

RESERVED_SHARE = 0.1  # of a rank's memory: what plan.memory does not count
STAGE_NAMES = ("plain DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3")


class ZeroChoice(NamedTuple):
    """The stage that `runtime.zero: auto` takes."""

    stage: int
    fits: bool  # whether the run is expected to fit the memory at this stage
    why: str  # one sentence


def choose_zero_stage(work: Workload, ranks: int, memory: int) -> ZeroChoice:
    """Choose the stage for a run of `work` on so many ranks with `memory` bytes each; its dtype is fp32 or bf16.

    Where no stage fits it is the one that needs the least: what a rank needs is an estimate, and the run may still fit.
    """
    kept = activation_bytes(work, row_counts(work, work.micro_batch, ranks))
    activations = kept.held(work.checkpointed)
    size, usable = network_sizes(work.shape, work.muon), usable_bytes(memory)
    needs = {
        stage: sum(tensor_bytes(size, work.dtype, ranks, stage).values()) + activations
        for stage in possible_stages(work, ranks)
    }
    stage = lowest_stage({stage: need <= usable for stage, need in needs.items()})
    fits = stage is not None
    stage = stage if fits else min(needs, key=lambda stage: needs[stage])
    words = _fitting_words(stage, needs, usable) if fits else _lacking_words(needs[stage], usable, work)
    named = STAGE_NAMES[stage] if ranks > 1 else "one rank shards nothing"
    return ZeroChoice(stage, fits, f"runtime.zero: auto is {stage} ({named}): {words}")


def check_step_targets(work: Workload, ranks: int, stage: int, memory: int) -> None:
    """Raise ConfigError where the targets of a whole step, which `loss.normalize: batch` keeps where a step has several
    micro-batches, do not fit the `memory` bytes of a rank beside the rest.
    """
    if work.pieces == 1 or not isinstance(work.normalization, BatchNormalization):
        return
    count, shape = row_counts(work, work.micro_batch, ranks), work.shape
    kept = FP32_BYTES * work.pieces * count.target * shape.target_layers * shape.target_dim
    rest = sum(tensor_bytes(network_sizes(shape, work.muon), work.dtype, ranks, stage).values())
    usable = usable_bytes(memory) - rest
    if kept > usable:
        raise ConfigError(
            f"loss.normalize: batch keeps the targets of a whole step, about {_gigabytes(kept)} GB where "
            f"{_gigabytes(max(usable, 0))} are left; take running, fewer images a step (data.batch_size) or more ranks"
        )


def possible_stages(work: Workload, ranks: int) -> tuple[int, ...]:
    """Return the stages that a run can take: one rank has nothing to shard, Muon needs whole matrices, and stage 3 cannot be
    compiled.
    """
    if ranks == 1 or work.muon:
        return ZERO_STAGES[:1]
    return ZERO_STAGES[:3] if work.compiled else ZERO_STAGES


def usable_bytes(memory: float) -> float:
    """Return the bytes that the counted tensors of a rank may fill of its memory."""
    return (1 - RESERVED_SHARE) * memory


def lowest_stage(holds: Mapping[int, object]) -> int | None:
    """Return the lowest stage whose value is true; None where there is none."""
    return min((stage for stage, held in holds.items() if held), default=None)


def _fitting_words(stage: int, needs: Mapping[int, float], usable: float) -> str:
    below = f", where {STAGE_NAMES[stage - 1]} needs {_gigabytes(needs[stage - 1])}" if stage else ""
    return f"about {_gigabytes(needs[stage])} of the {_gigabytes(usable)} GB that a rank may fill are needed{below}"


def _lacking_words(need: float, usable: float, work: Workload) -> str:
    checkpointing = "" if work.checkpointed else ", set runtime.checkpoint_activations=true"
    return (
        f"about {_gigabytes(need)} GB are needed, more than the {_gigabytes(usable)} GB that a rank may fill; lower "
        f"runtime.micro_batch{checkpointing} or take more ranks if memory runs out"
    )


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f}" if count >= 1e9 else f"{count / 1e9:.2f}"


def recommend_stage(needs: Mapping[int, Mapping], ranks: int, work: Workload) -> tuple[int | None, str]:
    """Return the stage to use, None where no image fits, and one sentence why; `needs` is as `plan_run` returns it.

    It is the lowest stage that holds the work as it is, which is what a run with `runtime.zero: auto` takes; else the
    lowest that holds it with checkpointed activations, with smaller micro-batches, or with both.
    """
    stages = [stage for stage in needs if stage in possible_stages(work, ranks)] or list(needs)
    images, own = work.micro_batch, "_checkpointed" if work.checkpointed else ""
    checkpointing = "" if own else " runtime.checkpoint_activations=true"

    def lowest(key: str) -> int | None:
        return lowest_stage({stage: needs[stage][key] for stage in stages})

    if (stage := lowest("fits" + own)) is not None:
        return stage, f"{STAGE_NAMES[stage]} (runtime.zero={stage}): {_stage_reason(stage, ranks, images)}."
    if (stage := lowest("fits_checkpointed")) is not None:
        return stage, f"{STAGE_NAMES[stage]} with{checkpointing}: {images} images a forward fit no other way."
    for end, added in ((own, ""), ("_checkpointed", checkpointing)):
        if (stage := lowest("largest_micro_batch" + end)) is not None:
            changed = f"runtime.micro_batch={needs[stage]['largest_micro_batch' + end]}{added}"
            return stage, f"{STAGE_NAMES[stage]} with {changed}: {images} images a forward fit at no stage."
    return None, "No stage holds a single image; use more GPUs, larger ones, or offload."


def _stage_reason(stage: int, ranks: int, images: int) -> str:
    if stage == 0:
        return "it fits, and " + ("sharding would send more" if ranks > 1 else "a single rank has nothing to shard")
    return f"the lowest stage here that holds {images} images a forward"
