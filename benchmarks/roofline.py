"""What each part of a training step must at least take on this machine: its FLOPs at the GEMM rate, or its bytes at copying's.

FLOPs are those of `fastjepa.flops`. Bytes are the least that eager PyTorch moves, in which no tensor stays in a cache:

- a forward writes every tensor that `fastjepa.memory` says the blocks save for the backward, and reads each once;
- a backward reads them once, and writes and reads the gradient of each;
- weights are read once a pass and micro-batch; bf16 autocast also writes and reads their copies; gradients are written;
- loss: target features and predictions are read, the gradient of the predictions written;
- optimizer: reads gradients (twice: the check that they are finite), weights and two moments, and writes the last three;
- EMA: reads the average and the weights, and writes the average.
"""

from collections.abc import Iterable, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timing
import torch
from timing import Ceiling

from fastjepa.config.schema import Config
from fastjepa.engine.precision import compute_dtype
from fastjepa.errors import ConfigError
from fastjepa.masks.packed import Blocks, Packed
from fastjepa.plan.flops import flops_of_packed
from fastjepa.plan.memory import (
    FP32_BYTES,
    BlockRows,
    RowCounts,
    activation_bytes,
    block_bytes,
    blocks_bytes,
    compute_width,
    network_sizes,
)

Micro = tuple[Packed, Packed, Blocks]  # context, target, blocks: what packing.pack returns
NETWORK_PARTS = ("target forward", "context forward", "context backward", "predictor forward", "predictor backward")
OPTIMIZER_PASSES, EMA_PASSES = 8, 3  # over fp32 tensors of the size of the weights


class Work(NamedTuple):
    flops: float
    moved: float  # bytes


class Machine(NamedTuple):
    """The rates that bound a part."""

    gemm: float  # FLOP/s, of the best of the step's own products and a large square one
    copy: float  # bytes/s, read and written

    @classmethod
    def measured(cls, config: Config, micro: Micro, device: torch.device) -> "Machine":
        (dim, _, _, mlp_ratio), narrow = config.encoder_shape, config.meta.pred_emb_dim
        tokens, sequences = config.micro_batch * int(np.prod(config.grid)), len(micro[2].sequences.idx)
        shapes = [(tokens, dim, round(dim * mlp_ratio)), (sequences, narrow, 4 * narrow), timing.square(device)]
        ceiling = Ceiling(shapes, compute_dtype(config), device)
        ceiling(0)
        return cls(ceiling.rates[0], timing.copy_rate(device))


def bound(work: Work, machine: Machine) -> tuple[str, float]:
    """Which rate bounds a part, GEMM or memory, and the seconds it must at least take."""
    times = {"GEMM": work.flops / machine.gemm, "memory": work.moved / machine.copy}
    return max(times.items(), key=lambda one: one[1])


def works(config: Config, micros: Sequence[Micro], steps: int) -> dict[str, Work]:
    """The work of a step's parts, as the mean over the `steps` steps that these micro-batches are of."""
    found = [of_micro_batch(config, *micro) for micro in micros]
    mean = {part: Work(*(np.array([one[part] for one in found]).sum(axis=0) / steps).tolist()) for part in found[0]}
    size = network_sizes(config)
    optimizer, ema = OPTIMIZER_PASSES * FP32_BYTES * size.trained, EMA_PASSES * FP32_BYTES * size.encoder
    return mean | {"optimizer": Work(0.0, optimizer), "EMA": Work(0.0, ema)}


def of_micro_batch(config: Config, context: Packed, target: Packed, blocks: Blocks) -> dict[str, Work]:
    images = len(target.cu_seqlens) - 1
    spent = [images * part for part in astuple(flops_of_packed(config, context, target, blocks))]
    rows, size = RowCounts.of(context, target, blocks), network_sizes(config)
    everything, seen, predicted = activations(config, rows, images)
    encoder, predictor = weights(config, size.encoder), weights(config, size.trained - size.encoder)
    moved = (
        2 * everything + encoder[0],
        2 * seen + encoder[0],
        3 * seen + encoder[1],
        2 * predicted + predictor[0],
        3 * predicted + predictor[1],
    )
    loss = activation_bytes(config, rows).loss
    return dict(zip(NETWORK_PARTS, map(Work, spent, moved), strict=True)) | {"loss": Work(0.0, loss)}


def activations(config: Config, rows: RowCounts, images: int) -> tuple[int, int, int]:
    """Bytes that the blocks of target network, context encoder and predictor hold between their products."""
    (dim, depth, heads, mlp_ratio), e = config.encoder_shape, compute_width(config.runtime.dtype)
    every = images * int(np.prod(config.grid))
    whole, last = (
        block_bytes(dim, heads, mlp_ratio, BlockRows(every, every, finished), e) for finished in (every, rows.target)
    )
    held = [inside for _, inside in blocks_bytes(config, rows)]
    return (depth - 1) * whole + last, sum(held[:depth]), sum(held[depth:])


def weights(config: Config, count: int) -> tuple[int, int]:
    """Bytes that `count` weights cost in a forward, and in a backward, which reads them and writes their gradients.

    With bf16 a copy is made (fp32 read, bf16 written) and read; its gradient is written, read and written in fp32.
    """
    return (8 * count, 10 * count) if config.runtime.dtype == "bf16" else (4 * count, 8 * count)


def canvas(file: Path):
    """An empty matplotlib figure that `file` can be written from; ConfigError where it cannot."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--picture needs matplotlib; pip install 'fastjepa[bench]'") from error
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    formats = figure.canvas.get_supported_filetypes()
    if file.suffix.removeprefix(".") not in formats:
        raise ConfigError(f"--picture {file}: its name must end with one of {', '.join(sorted(formats))}")
    return figure


def picture(rows: Iterable[dict], file: Path) -> None:
    """Beside each other: milliseconds of each part and of its bound, and the parts that multiply matrices under the roofs."""
    *rows, whole = rows
    figure = canvas(file)
    bars, roof = figure.subplots(1, 2)
    names, height = [row["part"] for row in rows], range(len(rows))
    bars.barh(height, [row["ms"]["median"] for row in rows], color="#c6d3e6", label="measured")
    bars.barh(height, [row["bound_ms"] or 0.0 for row in rows], color="#2b5a9e", height=0.4, label="bound")
    bars.set(yticks=height, yticklabels=names, xlabel="ms a step")
    bars.set_title(f"{whole['model']}, batch {whole['batch']}, {whole['dtype']}: {whole['ms']['median']:.0f} ms a step")
    bars.invert_yaxis()
    bars.legend(frameon=False)
    draw_roofs(roof, [row for row in rows if row["gflop"]], whole)
    figure.savefig(file)


def draw_roofs(axes, rows: list[dict], whole: dict) -> None:
    """log-log: FLOPs a byte against GFLOP/s."""
    intensity = [1e9 * row["gflop"] / row["moved_bytes"] for row in rows]
    reached = [1e3 * row["gflop"] / row["ms"]["median"] for row in rows]
    peak, slope = whole["gemm_gflops"], whole["copy_gb_s"]
    x = np.geomspace(min(*intensity, peak / slope) / 2, max(*intensity, peak / slope) * 2, 200)
    axes.loglog(x, np.minimum(peak, slope * x), color="#444444")
    for number, (row, flop_a_byte, rate) in enumerate(zip(rows, intensity, reached, strict=True)):
        axes.loglog(flop_a_byte, rate, "osD^v"[number % 5], color=f"C{number}", label=row["part"])
    axes.set(xlabel="FLOPs a byte", ylabel="GFLOP/s", title=f"GEMM {peak:.0f} GFLOP/s, copy {slope:.1f} GB/s")
    axes.legend(frameon=False, loc="lower center", fontsize=9)
