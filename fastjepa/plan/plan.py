"""What a config needs on N GPUs: memory by part and ZeRO stage, hours, and what the interconnect carries. All estimates.

Memory is memory.py's count, hours are FLOPs over a stated share of a card's peak, and a collective over w ranks is taken
to be a ring: of B bytes, each rank sends (w - 1) / w B in a gather or a reduce-scatter and twice that in an all-reduce.
"""

from collections.abc import Sequence
from dataclasses import replace

from fastjepa.config.schema import Config
from fastjepa.plan.flops import flops_per_image
from fastjepa.plan.memory import (
    FP32_BYTES,
    ZERO_STAGES,
    NetworkSizes,
    activation_bytes,
    buffer_bytes,
    copied_bytes,
    live_parameters,
    network_sizes,
    row_counts,
    state_bytes,
)

# Dense peaks of NVIDIA's data sheets (SXM), FLOP/s.
CARD_PEAKS = {"h100": {"bf16": 989e12, "fp32": 67e12}, "a100": {"bf16": 312e12, "fp32": 19.5e12}}
IMAGENET_IMAGES = 1_281_167  # images of ImageNet-1k's training set
RESERVED_SHARE = 0.1  # of a card's memory: what memory.py does not count
GPUS_A_MACHINE = 8  # GPUs that NVLink joins
# Bytes/s that a GPU sends, assumed: NVLink of an H100, and a 400 Gb/s InfiniBand port of its own for every GPU.
NVLINK_RATE, INFINIBAND_RATE = 450e9, 400e9 / 8
TRAFFIC_GPUS = (8, 16, 32, 64, 128, 256, 512)
TOTAL_BATCH = 2048  # the paper's


def plan_run(
    config: Config,
    gpus: int,
    gpu_memory: float = 80.0,
    stages: Sequence[int] = ZERO_STAGES,
    card: str = "h100",
    utilisation: float = 0.4,
    images: int = IMAGENET_IMAGES,
) -> dict:
    """Memory a GPU in bytes, by part and stage; what fits; the hours; and the stage to use, with the reason.

    Args:
        gpus: ranks, one a GPU.
        gpu_memory: of a GPU, in GB (1e9 bytes); RESERVE of it is kept free.
        stages: the ZeRO stages to lay side by side.
        card, utilisation: FLOP/s are this share of the card's dense peak in runtime.dtype.
        images: of an epoch.
    """
    config = config_on_card(config)
    usable = (1 - RESERVED_SHARE) * gpu_memory * 1e9
    size, cost = network_sizes(config), _Costs(config, gpus)
    needs = {stage: _stage_needs(config, size, cost, gpus, stage, usable) for stage in stages}
    stage, why = recommend_stage(needs, gpus, config.micro_batch)
    per_image = flops_per_image(config, config.data.batch_size * gpus)
    peak = CARD_PEAKS[card][config.runtime.dtype]
    hours = per_image * images * config.optimization.epochs / (gpus * peak * utilisation) / 3600
    return {
        "model": config.meta.model_name, "gpus": gpus, "dtype": config.runtime.dtype, "micro_batch": config.micro_batch,
        "gpu_memory": gpu_memory * 1e9, "usable": usable, "stages": needs,
        "flops_per_image": per_image, "card": card, "peak_flops": peak, "utilisation": utilisation,
        "images_per_epoch": images, "epochs": config.optimization.epochs, "hours": hours, "gpu_hours": hours * gpus,
        "recommended_stage": stage, "why": why,
    }  # fmt: skip


def config_on_card(config: Config) -> Config:
    """The config as the cards run it: `runtime.dtype: auto` is bf16 there."""
    dtype = "fp32" if config.runtime.dtype == "fp32" else "bf16"
    return replace(config, runtime=replace(config.runtime, dtype=dtype))


class _Costs:
    """Activation bytes of a micro-batch, (kept, checkpointed); masks are drawn once for each size."""

    def __init__(self, config: Config, gpus: int):
        self.config, self.gpus, self.known = config, gpus, {}

    def __call__(self, micro_batch: int) -> tuple[int, int]:
        if micro_batch not in self.known:
            count = activation_bytes(self.config, row_counts(self.config, micro_batch, self.gpus))
            self.known[micro_batch] = count.saved + count.loss, count.checkpointed + count.loss
        return self.known[micro_batch]


def _stage_needs(config: Config, size: NetworkSizes, cost: _Costs, gpus: int, stage: int, usable: float) -> dict:
    dtype = config.runtime.dtype
    fixed = state_bytes(size, dtype, gpus, stage) | buffer_bytes(size, dtype, stage)
    saved, checkpointed = cost(config.micro_batch)
    state = sum(fixed.values())
    largest = [largest_micro_batch(config.data.batch_size, lambda m, i=i: cost(m)[i] <= usable - state) for i in (0, 1)]
    return fixed | {
        "activations": saved,
        "total": state + saved,
        "activations_checkpointed": checkpointed,
        "total_checkpointed": state + checkpointed,
        "fits": state + saved <= usable,
        "fits_checkpointed": state + checkpointed <= usable,
        "largest_micro_batch": largest[0],
        "largest_micro_batch_checkpointed": largest[1],
    }


def largest_micro_batch(batch: int, fits) -> int:
    """The largest divisor of `batch` for which `fits`; 0 where none does."""
    return next((m for m in range(batch, 0, -1) if batch % m == 0 and fits(m)), 0)


def recommend_stage(needs: dict[int, dict], gpus: int, micro_batch: int) -> tuple[int | None, str]:
    """(the stage to use, None where no image fits; one sentence why): the lowest that fits, from 1 for several ranks."""
    order = [stage for stage in needs if gpus == 1 or stage] or list(needs)
    for stage in order:
        if needs[stage]["fits"]:
            return stage, f"ZeRO-{stage}: {_stage_reason(stage, gpus, micro_batch)}."
    for stage in order:
        if needs[stage]["fits_checkpointed"]:
            return (
                stage,
                f"ZeRO-{stage} with runtime.checkpoint_activations=true: {micro_batch} images a forward fit no other way.",
            )
    for stage in order:
        if largest := needs[stage]["largest_micro_batch"]:
            return stage, f"ZeRO-{stage} with runtime.micro_batch={largest}: {micro_batch} images a forward fit at no stage."
    for stage in order:
        if largest := needs[stage]["largest_micro_batch_checkpointed"]:
            smaller = f"runtime.micro_batch={largest} runtime.checkpoint_activations=true"
            return stage, f"ZeRO-{stage} with {smaller}: {micro_batch} images a forward fit at no stage."
    return None, "No stage holds a single image; use more GPUs, larger ones, or offload."


def _stage_reason(stage: int, gpus: int, micro_batch: int) -> str:
    if stage == 0 and gpus == 1:
        return "it fits, and a single rank has nothing to shard"
    if stage == 1:
        return "it fits, and shards moments, EMA and master weights while every rank still computes from whole parameters"
    return f"the lowest stage here that holds {micro_batch} images a forward"


def bytes_sent(size: NetworkSizes, dtype: str, gpus: int, stage: int, micro_batches: int = 1) -> dict[str, float]:
    """Bytes each rank sends in an optimizer step, by what is sent; gradients and parameters travel in fp32.

    Stages 0 to 2 all-reduce gradients (DeepSpeed reduces whole buckets even where a rank wants its part alone), stage 3
    reduce-scatters them; stages 2 and 3 do so for every micro-batch. Stages 1 and 2 gather the parameters once a step,
    after it; stage 3 gathers small ones once a step, the others for every forward, and those it could not keep alive
    (memory.alive) for the backward too. From stage 1 on the target network's copy is gathered once a step.
    """
    share, exchanges = (gpus - 1) / gpus, micro_batches if stage > 1 else 1
    large = size.trained - size.small
    gathered = size.small + micro_batches * (2 * large - live_parameters(size))
    return {
        "gradients": share * FP32_BYTES * size.trained * exchanges * (1 if stage == 3 else 2),
        "parameters": share * FP32_BYTES * (0, size.trained, size.trained, gathered)[stage],
        "target_copy": share * copied_bytes(size, dtype) if stage else 0.0,
    }


def traffic_rows(
    config: Config, gpus: Sequence[int] = TRAFFIC_GPUS, card: str = "h100", utilisation: float = 0.4
) -> list[dict[str, float]]:
    """A row for each number of GPUs and stage: bytes sent a step, seconds they take, and when they bind.

    `binding_batch`: images a GPU and step whose FLOPs take as long as the bytes. Fewer, and the interconnect decides,
    however well the two overlap. `images`: a GPU's share of TOTAL_BATCH; `binds`: whether that is fewer; `exposed`: the
    share of such a step that is spent sending where nothing overlaps. One micro-batch a step; latency is not counted.
    """
    config = config_on_card(config)
    size = network_sizes(config)
    seconds_per_image = flops_per_image(config) / (CARD_PEAKS[card][config.runtime.dtype] * utilisation)
    rows = []
    for count in gpus:
        for stage in ZERO_STAGES:
            parts = bytes_sent(size, config.runtime.dtype, count, stage)
            total = sum(parts.values())
            seconds = total / (NVLINK_RATE if count <= GPUS_A_MACHINE else INFINIBAND_RATE)
            binding, images = seconds / seconds_per_image, TOTAL_BATCH / count
            rows.append(
                {"gpus": count, "stage": stage, **parts, "total": total, "seconds": seconds, "binding_batch": binding,
                 "images": images, "binds": images < binding, "exposed": binding / (binding + images)}
            )  # fmt: skip
    return rows
