"""Closed-form memory of a training step on one rank: tensors that the engine holds between steps, and that autograd saves.

Bytes of tensors. Not counted: the CUDA context, allocator rounding, the batch itself, workspaces, the short-lived tensors
of the target network's forward, of a backward and of an optimizer step, and the regularizer's term.
"""

from dataclasses import astuple, dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from fastjepa.engine.deepspeed_config import BUCKET_ELEMENTS
from fastjepa.loss.normalizations import LossSize
from fastjepa.masks.packed import Blocks, Packed
from fastjepa.masks.packer import Packer
from fastjepa.model.jepa import NetworkShape
from fastjepa.plan.workload import Workload

ZERO_STAGES = (0, 1, 2, 3)
FP32_BYTES = 4
# What DeepSpeed does unless its options say otherwise (runtime/zero/config.py of 0.19.8), in elements.
SMALL_PARAMETER = int(1e5)  # stage3_param_persistence_threshold: ZeRO-3 keeps parameters of at most as many elements whole
REUSE_DISTANCE = int(1e9)  # stage3_max_reuse_distance: and the others, where the next use is less than this away


@dataclass(frozen=True)
class NetworkSizes:
    """Elements of the trained networks' parameters."""

    trained: int  # encoder and predictor
    encoder: int  # the encoder alone, which the target network averages
    matrices: int  # the encoder's matrices, which the target network takes in runtime.dtype; norms and biases stay fp32
    squares: int  # with a second moment: all but the hidden matrices of Muon
    linear: int  # weights of linear layers: autograd keeps their bf16 copies from the forward to the backward
    small: int  # in tensors of at most SMALL_PARAMETER elements
    groups: tuple[tuple[int, ...], ...]  # of each tensor, by the groups of `build_adamw`: DeepSpeed shards each group
    teacher: tuple[int, int] = (0, 0)  # in the matrices of a frozen teacher, and in its 1-d parameters


def network_sizes(shape: NetworkShape, muon: bool = False) -> NetworkSizes:
    """Count the parameters of networks of that shape, without making them; `muon` steps the hidden matrices.

    A teacher's norms of queries and keys, and the scale of its tanh, where it has them, are not counted.
    """
    (dim, depth, heads, mlp_ratio), (narrow, pred_depth, pred_heads) = shape.encoder, shape.predictor
    patch = shape.patch_values * dim
    encoder, vectors = _layers([patch], [dim], dim, depth, round(dim * mlp_ratio))
    vectors = vectors + [dim] * (shape.form.norm == "dyntanh")  # the scale inside of the tanh
    predictor, narrow_vectors = _layers([narrow, dim * narrow], [narrow], narrow, pred_depth, 4 * narrow)
    if shape.form.qk_norm:  # a scale and a bias each, as long as a head
        vectors, narrow_vectors = vectors + 4 * depth * [dim // heads], narrow_vectors + 4 * pred_depth * [narrow // pred_heads]
    out = shape.predicted_dim
    widths = (dim, *shape.projector)  # whose layers have a norm each, and the last one a bias
    projector, scales = [a * b for a, b in pairwise(widths)], [h for h in shape.projector[:-1] for _ in range(2)]
    predictor = [*predictor, narrow * out, *projector]
    narrow_vectors = [*narrow_vectors, out, *scales, *shape.projector[-1:]]
    groups = tuple(map(tuple, (encoder, predictor, vectors, narrow_vectors)))
    counts = [count for group in groups for count in group]
    linear = sum(encoder) - patch + sum(predictor) - narrow
    teacher = ((), ())
    if shape.teacher:
        (dim, depth, _, mlp_ratio), side = shape.teacher
        teacher = _layers([shape.channels * side**2 * dim], [dim], dim, depth, round(dim * mlp_ratio))
    return NetworkSizes(
        trained=sum(counts),
        encoder=sum(encoder) + sum(vectors),
        matrices=sum(encoder),
        squares=sum(counts) - (linear if muon else 0),
        linear=linear,
        small=sum(count for count in counts if count <= SMALL_PARAMETER),
        groups=groups,
        teacher=(sum(teacher[0]), sum(teacher[1])),
    )


def _layers(first: list[int], bias: list[int], dim: int, depth: int, hidden: int) -> tuple[list[int], list[int]]:
    """Return the elements of each matrix, and of each 1-d parameter, of a network of `depth` blocks and a last norm."""
    matrices = [3 * dim * dim, dim * dim, dim * hidden, hidden * dim]  # qkv, proj, fc1, fc2
    vectors = [dim, dim, 3 * dim, dim, dim, dim, hidden, dim]  # norm1, the biases of qkv and proj, norm2, those of the mlp
    return first + depth * matrices, bias + depth * vectors + [dim, dim]


def state_bytes(size: NetworkSizes, dtype: str, gpus: int, stage: int) -> dict[str, int]:
    """Return the bytes each rank holds for the model, by part; shards are counted without their padding.

    All parameters are fp32, with bf16 compute too. The EMA's shards are held in fp32. They are sent in the dtype of the
    target network's copy, from their place in it; but at stage 3, which cuts every tensor by itself, from beside it: a bf16
    shard is then held once more, and an fp32 one counts for itself. ZeRO-1 shards moments, EMA and the fp32 master weights
    that it keeps beside the parameters; ZeRO-2 the gradients too, but whole tensors where a shard begins or ends in them;
    ZeRO-3 gradients and parameters, except small ones, which it holds whole beside their shards. Gradients are whole at
    stages 0 and 1 while micro-batches add to them. A frozen teacher is whole on every rank, its matrices in `dtype`.

    Args:
        dtype: runtime.dtype, fp32 or bf16: what the target network's copy is made in. At stage 0 it computes from its EMA.
        gpus: ranks.
        stage: ZeRO's, 0 to 3.
    """
    whole, sharded = FP32_BYTES * size.trained, FP32_BYTES * size.trained // gpus
    narrow = 0 if dtype == "fp32" else 2 * size.matrices
    inside = stage < 3 or gpus == 1  # an EMA shard in the copy's own dtype lies in it
    matrices, vectors = size.teacher
    doubled = FP32_BYTES * (size.encoder if dtype == "fp32" else size.encoder - size.matrices) if inside else 0
    return {
        "parameters": whole if stage < 3 else sharded + (FP32_BYTES * size.small if gpus > 1 else 0),
        "gradients": whole if stage < 2 else FP32_BYTES * touched_elements(size, gpus) if stage == 2 else sharded,
        "moments": FP32_BYTES * (size.trained + size.squares) // (gpus if stage else 1),
        "master_weights": 0 if stage < 1 else sharded,
        "ema": FP32_BYTES * size.encoder if stage < 1 else (FP32_BYTES * size.encoder + (0 if inside else narrow)) // gpus,
        "target_copy": 0 if stage < 1 else copied_bytes(size, dtype) - doubled // gpus,
        "teacher": compute_width(dtype) * matrices + FP32_BYTES * vectors,
    }


def touched_elements(size: NetworkSizes, gpus: int) -> int:
    """Return the elements of the tensors that a rank's shards reach into, on the rank where they are most.

    A group of tensors of 6, 3 and 3 elements is cut for 2 ranks into elements 0 to 5 and 6 to 11: rank 0 reaches into the
    first tensor alone (6), rank 1 into the others (6). Tensors of 4, 5 and 3 are 9 (4 + 5) on rank 0 and 8 (5 + 3) on rank 1.
    """
    per_rank = np.zeros(gpus, dtype=np.int64)
    for group in size.groups:
        ends, shard = np.cumsum(group), -(-sum(group) // gpus)
        for start, end in zip(ends - group, ends, strict=True):
            per_rank[start // shard : (end - 1) // shard + 1] += end - start
    return int(per_rank.max())


def buffer_bytes(size: NetworkSizes, dtype: str, stage: int) -> dict[str, int]:
    """Return the bytes each rank holds inside a step beside its states and activations.

    `autocast_copies`: the bf16 weights of linear layers, which the backward reads again. `communication_buffers`: the
    bucket that gradients are reduced from (DDP's hold the gradients themselves) and, at stage 3, the gathered parameters
    that are alive at once, at the end of the forward; all in fp32.
    """
    communication = 0 if stage == 0 else BUCKET_ELEMENTS + (live_parameters(size) if stage == 3 else 0)
    return {
        "autocast_copies": 0 if dtype == "fp32" else 2 * size.linear,
        "communication_buffers": FP32_BYTES * communication,
    }


def tensor_bytes(size: NetworkSizes, dtype: str, gpus: int, stage: int) -> dict[str, int]:
    """Return the bytes of all that a rank holds in a step but activations, by part."""
    return state_bytes(size, dtype, gpus, stage) | buffer_bytes(size, dtype, stage)


def live_parameters(size: NetworkSizes) -> int:
    """Return the elements that ZeRO-3 has gathered at the end of the forward.

    A layer is used again after twice what follows it, forward and backward, so those stay whole that are followed by less
    than half of REUSE_DISTANCE.
    """
    return min(size.trained - size.small, REUSE_DISTANCE // 2)


def copied_bytes(size: NetworkSizes, dtype: str) -> int:
    """Return the bytes of the target network's whole copy."""
    return compute_width(dtype) * size.matrices + FP32_BYTES * (size.encoder - size.matrices)


def compute_width(dtype: str) -> int:
    """Return the bytes of a number in runtime.dtype, fp32 or bf16."""
    return {"fp32": FP32_BYTES, "bf16": 2}[dtype]


@dataclass(frozen=True)
class RowCounts:
    """Counts of the packed rows of one micro-batch."""

    context: int  # of all contexts
    target: int  # that the target network finishes
    sequences: int  # of the predictor's sequences
    queries: int  # that the predictor finishes
    pooled: int = 0  # contexts, a row each to the projector

    @classmethod
    def of(cls, context: Packed, target: Packed, blocks: Blocks) -> "RowCounts":
        """Count the rows of what `pack` returned."""
        contexts = len(context.cu_seqlens) - 1
        return cls(len(context.idx), len(target.idx), len(blocks.sequences.idx), len(blocks.queries.idx), contexts)


def row_counts(work: Workload, micro_batch: int, gpus: int = 1, steps: int = 4) -> RowCounts:
    """Return the most rows a micro-batch has in the first `steps` steps, each count by itself, with the run's own masks.

    With runtime.cuda_graph they are those of its budget, which the graph holds; a micro-batch beside it needs as much again.
    """
    total = work.batch_size * gpus
    if work.padded:
        size = work.padding_budget(total, micro_batch).size
        return RowCounts(size.context, size.target, size.sequences, size.queries)
    packer = Packer(work.masking)
    found = [RowCounts.of(*packer.packed(step, range(micro_batch), total)) for step in range(steps)]
    return RowCounts(*(max(counts) for counts in zip(*map(astuple, found), strict=True)))


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes of a micro-batch's activations, summed over layers."""

    saved: int  # by autograd, from the forward to the backward
    checkpointed: int  # the same with runtime.checkpoint_activations: what is kept, and one block at a time made anew
    loss: int  # targets, predictions and their gradient

    def held(self, checkpointed: bool) -> int:
        """Return the bytes that a micro-batch holds at most, with runtime.checkpoint_activations or without."""
        return (self.checkpointed if checkpointed else self.saved) + self.loss


def activation_bytes(work: Workload, count: RowCounts) -> ActivationBytes:
    """Count what the trained networks save for their backward, with attention that keeps its scores on chip.

    Such attention (flash, varlen, xformers, short; sdpa where sequences have one length) saves q, k, v, its output and
    a logsumexp for each row and head. The way `matmul` saves scores too, `sdpa` padding for ragged sequences. The residual
    stream, inputs of norms, is fp32; inputs of matrix products have runtime.dtype. Index tensors belong to the batch.
    """
    shape, e = work.shape, compute_width(work.dtype)
    dim, narrow = shape.encoder[0], shape.predictor[0]
    patches = count.context * shape.patch_values * e
    features = _norm_bytes(count.context, dim) + count.context * dim * e  # the last norm, and the input of predictor_embed
    if shape.form.norm == "dyntanh":  # saves its tanh in place of a mean and a deviation
        features += count.context * (dim - 2) * FP32_BYTES
    ends = patches + features + _norm_bytes(count.queries, narrow) + count.queries * narrow * e  # and those of predictor_proj
    layers = blocks_bytes(work, count)
    inputs = sum(kept for kept, _ in layers)
    loss = count.target * shape.target_layers * shape.target_dim * FP32_BYTES + 2 * count.queries * shape.predicted_dim * e
    size = LossSize(count.queries, shape.predicted_dim, count.target, shape.target_layers, shape.target_dim, e, work.pieces)
    loss += work.normalization.extra_bytes(size)
    ends += projector_bytes(shape, count.pooled, e)
    saved = ends + sum(inside for _, inside in layers)
    return ActivationBytes(saved, ends + inputs + max(inside - kept for kept, inside in layers), loss)


def blocks_bytes(work: Workload, count: RowCounts) -> list[tuple[int, int]]:
    """Return (bytes of its input, bytes it saves, its input among them) of every block of the two networks."""
    (dim, depth, heads, mlp_ratio), e = work.shape.encoder, compute_width(work.dtype)
    narrow, pred_depth, pred_heads = work.shape.predictor
    table, sequences, queries = count.context + work.shape.tokens, count.sequences, count.queries
    norms = qk_norm_bytes if work.shape.form.qk_norm else lambda *block: 0
    rows = BlockRows(count.context, count.context, count.context)
    inside = block_bytes(dim, heads, mlp_ratio, rows, e) + norms(rows, dim, heads, e)
    found = [(count.context * dim * FP32_BYTES, inside)] * depth
    for i in range(pred_depth):
        read = table if i == 0 else sequences
        rows = BlockRows(read, sequences, queries if i == pred_depth - 1 else sequences)
        inside = block_bytes(narrow, pred_heads, 4.0, rows, e) + norms(rows, narrow, pred_heads, e)
        found.append((read * narrow * FP32_BYTES, inside))
    return found


def projector_bytes(shape: NetworkShape, rows: int, e: int) -> int:
    """Return the bytes that the projector saves: the input of each linear layer and of each norm, and in fp32 the output of
    each ReLU, which in fp32 is an input.
    """
    hidden = shape.projector[:-1]
    inputs = (shape.encoder[0], *hidden) if shape.projector else ()
    outputs = hidden if e < FP32_BYTES else ()
    return rows * (sum(inputs) * e + sum(outputs) * FP32_BYTES) + sum(_norm_bytes(rows, width) for width in hidden)


def qk_norm_bytes(rows: "BlockRows", dim: int, heads: int, e: int) -> int:
    """Return the bytes that the norms of queries and keys save: their inputs in fp32, in fp32 the values beside them too, and
    a mean and a deviation a row and head.
    """
    normed = (rows.read if rows.read != rows.keys else rows.queries) + rows.read
    return FP32_BYTES * (normed * (dim + 2 * heads) + (rows.read * dim if e == FP32_BYTES else 0))


class BlockRows(NamedTuple):
    """Rows of a transformer block: those it reads, attends over (keys) and finishes (queries)."""

    read: int
    keys: int
    queries: int


def block_bytes(dim: int, heads: int, mlp_ratio: float, rows: BlockRows, e: int) -> int:
    """Return the bytes that a block saves; `e` bytes are a number in runtime.dtype.

    Where it reads distinct rows (the predictor's first block), q, k and v are gathered in one tensor after the projection;
    where it reads its keys and finishes fewer, the rows to query are gathered before.
    """
    (read, keys, queries), hidden = rows, round(dim * mlp_ratio)
    qkv = 3 * keys * dim * e
    if queries < keys:
        qkv = qkv + queries * dim * e if read != keys else 2 * keys * dim * e + 2 * queries * dim * e
    attention = _norm_bytes(read, dim) + read * dim * e + qkv + queries * (dim * e + heads * FP32_BYTES)
    mlp = _norm_bytes(queries, dim) + queries * (dim + 2 * hidden) * e
    return attention + mlp


def _norm_bytes(rows: int, dim: int) -> int:
    """Return the bytes that a layer norm saves: its input, a mean and a deviation, in fp32."""
    return rows * (dim + 2) * FP32_BYTES
