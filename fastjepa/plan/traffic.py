"""Bytes that the interconnect carries in a step, and when they bind. All estimates.

A collective over w ranks is taken to be a ring: of B bytes, each rank sends (w - 1) / w B in a gather or a reduce-scatter
and twice that in an all-reduce.
"""

from collections.abc import Sequence

from fastjepa.plan.memory import FP32_BYTES, ZERO_STAGES, NetworkSizes, copied_bytes, live_parameters

GPUS_A_MACHINE = 8  # GPUs that NVLink joins
# Bytes/s that a GPU sends, assumed: NVLink of an H100, and a 400 Gb/s InfiniBand port of its own for every GPU.
NVLINK_RATE, INFINIBAND_RATE = 450e9, 400e9 / 8
TRAFFIC_GPUS = (8, 16, 32, 64, 128, 256, 512)
TOTAL_BATCH = 2048  # the paper's


def bytes_sent(size: NetworkSizes, dtype: str, gpus: int, stage: int, micro_batches: int = 1) -> dict[str, float]:
    """Return the bytes each rank sends in an optimizer step, by what is sent; gradients and parameters travel in fp32.

    Stages 0 to 2 all-reduce gradients (DeepSpeed reduces whole buckets even where a rank wants its part alone), stage 3
    reduce-scatters them; stages 2 and 3 do so for every micro-batch. Stages 1 and 2 gather the parameters once a step,
    after it; stage 3 gathers small ones once a step, the others for every forward, and those it could not keep alive
    (`live_parameters`) for the backward too. From stage 1 on the target network's copy is gathered once a step.

    Example: 1,000,000 parameters on 4 ranks at stage 0: each sends 2 * 3/4 * 4 bytes of every gradient, 6 MB.
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
    size: NetworkSizes, dtype: str, seconds_per_image: float, gpus: Sequence[int] = TRAFFIC_GPUS
) -> list[dict[str, float]]:
    """Return a row for each number of GPUs and stage: bytes sent a step, seconds they take, and when they bind.

    `binding_batch`: images a GPU and step whose FLOPs take as long as the bytes. Fewer, and the interconnect decides,
    however well the two overlap. `images`: a GPU's share of TOTAL_BATCH; `binds`: whether that is fewer; `exposed`: the
    share of such a step that is spent sending where nothing overlaps. One micro-batch a step; latency is not counted.

    Args:
        dtype: runtime.dtype, fp32 or bf16.
        seconds_per_image: seconds that a GPU computes on an image.
    """
    rows = []
    for count in gpus:
        for stage in ZERO_STAGES:
            parts = bytes_sent(size, dtype, count, stage)
            total = sum(parts.values())
            seconds = total / (NVLINK_RATE if count <= GPUS_A_MACHINE else INFINIBAND_RATE)
            binding, images = seconds / seconds_per_image, TOTAL_BATCH / count
            rows.append(
                {"gpus": count, "stage": stage, **parts, "total": total, "seconds": seconds, "binding_batch": binding,
                 "images": images, "binds": images < binding, "exposed": binding / (binding + images)}
            )  # fmt: skip
    return rows
