"""Closed-form FLOPs of one training step, per image: those of `fastjepa.model`, and those of the official code.

A multiply-add is 2 FLOPs and only matrix products count: linear layers, the patch embedding and attention's two
products; a backward pass costs twice its forward, except that images need no gradient. Recomputation (activation
checkpointing, attention backward), norms, the loss, a regularizer's term, optimizer and EMA are left out, as usual for MFU,
and so is the padding of runtime.cuda_graph, which is no work that anybody wants.
"""

from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np

from fastjepa.masks.packed import Blocks, Packed
from fastjepa.masks.packer import Packer
from fastjepa.model.jepa import NetworkShape
from fastjepa.plan.workload import Workload

PREDICTOR_MLP_RATIO = 4.0


@dataclass(frozen=True)
class Flops:
    """FLOPs of training on one image, by the part of the step that spends them."""

    target_forward: float
    context_forward: float
    context_backward: float
    predictor_forward: float
    predictor_backward: float

    @property
    def total(self) -> float:
        """Return the sum of all parts."""
        return sum(getattr(self, field.name) for field in fields(self))


def muon_flops(shape: NetworkShape) -> float:
    """Return the FLOPs that Muon's products take a step, on all ranks together, whatever the batch.

    Example: a matrix of 4 x 2 is one of 2 x 4 to Muon. Each of its five steps makes a 2 x 2 product of it (2 * 2 * 4 * 2
    FLOPs), the square of that (2 * 2 * 2 * 2) and a 2 x 4 product (2 * 2 * 2 * 4): 80 FLOPs, 400 in all.
    """
    (dim, depth, _, mlp_ratio), (narrow, pred_depth, _) = shape.encoder, shape.predictor
    hidden = [(dim, depth, round(dim * mlp_ratio)), (narrow, pred_depth, round(narrow * PREDICTOR_MLP_RATIO))]
    matrices = [(narrow, dim), (narrow, shape.predicted_dim)]  # predictor_embed and predictor_proj
    for width, blocks, inner in hidden:
        matrices += blocks * [*4 * [(width, width)], *2 * [(width, inner)]]  # q, k, v, proj, fc1, fc2
    matrices += pairwise((dim, *shape.projector))
    return float(sum(5 * (4 * min(m) ** 2 * max(m) + 2 * min(m) ** 3) for m in matrices))


@dataclass(frozen=True)
class _Rows:
    """Lengths of a micro-batch's sequences, as arrays."""

    images: int
    context: np.ndarray  # (K*b,) patches of each context
    queries: np.ndarray  # (R*M*K*b,) predicted rows of each predictor sequence
    sequences: np.ndarray  # (R*M*K*b,) all rows of each predictor sequence


def count_flops(
    work: Workload,
    context_tokens: float,
    target_block_tokens: float,
    target_union: float,
    images: int | None = None,
) -> Flops:
    """Count the FLOPs per image of this package's step, for masks of equal (or mean) lengths; exact when they are equal.

    A joint predictor's only block is the union. Visible patches that are predicted are taken to be those of one context,
    all of them seen and no targets. For FLOPs a view divide by mask.num_enc_masks: all contexts of an image
    share its target pass.

    Args:
        context_tokens: patches in a context mask, after the cut.
        target_block_tokens: patches in a target block.
        target_union: patches of an image that are in any of its target blocks.
        images: images of a forward, which share the predictor's table of positions (default: the micro-batch).
    """
    images = images or work.micro_batch
    packing, lengths = work.masking.packing, (target_block_tokens, target_union)
    rows = _equal_lengths(work, context_tokens, packing.predicted_tokens(*lengths), images)
    sequences = images * packing.target_sequences(work.masking.mask.target_blocks)
    finished = packing.finished_tokens(*lengths) + (context_tokens if work.masking.use.visible_weight else 0)
    return _flops_of_rows(work, rows, np.full(sequences, float(finished)))


def flops_of_packed(work: Workload, context: Packed, target: Packed, blocks: Blocks) -> Flops:
    """Count the FLOPs per image of this package's step on one packed micro-batch, exact for sequences of any lengths.

    Reads the tensors of `pack`; hand them over before they move to a device, or this waits for it.
    """
    lengths = _lengths(target)
    masking = work.masking
    images = len(lengths) // masking.packing.target_sequences(masking.mask.target_blocks)
    rows = _Rows(images, _lengths(context), _lengths(blocks.queries), _lengths(blocks.sequences))
    return _flops_of_rows(work, rows, lengths)


def flops_per_image(work: Workload, total: int | None = None, steps: int = 16) -> float:
    """Count the FLOPs per image of a run: the mean over the first micro-batch of `steps` steps, with the masks it will draw.

    `total` is the number of images in a global batch, which decides who shares a cut (default: one rank's).
    """
    packer, slots = Packer(work.masking), range(work.micro_batch)
    found = (packer.packed(step, slots, total or work.batch_size) for step in range(steps))
    return float(np.mean([flops_of_packed(work, *one).total for one in found]))


def encoder_flops(shape: NetworkShape) -> float:
    """Count the FLOPs of the target encoder on one whole image, as evaluations run it, whatever the run's targets are."""
    tokens = np.array([shape.tokens])
    dim, depth, _, mlp_ratio = shape.encoder
    return _embed_flops(shape, tokens.sum()) + depth * _block_flops(dim, mlp_ratio, tokens, tokens)


def official_flops(work: Workload, context_tokens: float, target_block_tokens: float) -> Flops:
    """Count the FLOPs per image of the official code's step: all patches embedded, every block finished for every row.

    Its sequences are equal by construction: all contexts have `context_tokens` patches, all blocks `target_block_tokens`.
    """
    shape = work.shape
    (dim, depth, _, mlp_ratio), (narrow, pred_depth, _), tokens = shape.encoder, shape.predictor, shape.tokens
    rows = _equal_lengths(work, context_tokens, target_block_tokens, 1)
    context, sequences = rows.context, rows.sequences
    encoder = depth * _block_flops(dim, mlp_ratio, np.array([tokens]), np.array([tokens]))
    seen = depth * _block_flops(dim, mlp_ratio, context, context)
    ends = _linear_flops(context.sum() + rows.queries.sum(), dim, narrow)
    predictor = ends + pred_depth * _block_flops(narrow, PREDICTOR_MLP_RATIO, sequences, sequences)
    return _qkv_split_flops(1, _embed_flops(shape, tokens), encoder, _embed_flops(shape, tokens), seen, predictor)


def _flops_of_rows(work: Workload, rows: _Rows, wanted: np.ndarray) -> Flops:
    """Count by rows; `wanted` rows are finished by the target network, of each image, or of each block it sees alone."""
    dim, depth, _, mlp_ratio = work.shape.encoder
    context = depth * _block_flops(dim, mlp_ratio, rows.context, rows.context)
    target = _target_flops(work, work.masking.packing.target_tokens(wanted, work.shape.tokens), wanted)
    return _qkv_split_flops(
        rows.images, *target, _embed_flops(work.shape, rows.context.sum()), context, _predictor_flops(work.shape, rows)
    )


def _target_flops(work: Workload, tokens: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    """Count the embedding and blocks of the target network, or of the teacher, over sequences of `tokens` patches; none where
    pixels are predicted.
    """
    if not work.targets.runs_network:
        return 0.0, 0.0
    ((dim, _, _, mlp_ratio), patch_size), depth = work.shape.target_network, work.shape.target_depth
    blocks = (depth - 1) * _block_flops(dim, mlp_ratio, tokens, tokens) + _block_flops(dim, mlp_ratio, tokens, wanted)
    return _linear_flops(tokens.sum(), work.shape.channels * patch_size**2, dim), blocks


def _predictor_flops(shape: NetworkShape, rows: _Rows) -> float:
    """Count the predictor: its first block projects a table of distinct rows, its last one finishes the queries alone; and the
    projector, a row for each context.
    """
    dim, (narrow, depth, _) = shape.encoder[0], shape.predictor
    seen, queries, sequences = rows.context.sum(), rows.queries, rows.sequences
    ends = _linear_flops(seen, dim, narrow) + _linear_flops(
        queries.sum(), narrow, shape.predicted_dim
    )  # predictor_embed, predictor_proj
    ends += sum(_linear_flops(len(rows.context), *widths) for widths in pairwise((dim, *shape.projector)))
    table = 3 * _linear_flops(seen + shape.tokens, narrow, narrow)
    first = table + _mix_flops(narrow, PREDICTOR_MLP_RATIO, sequences, queries if depth == 1 else sequences)
    if depth == 1:
        return ends + first
    middle = (depth - 2) * _block_flops(narrow, PREDICTOR_MLP_RATIO, sequences, sequences)
    return ends + first + middle + _block_flops(narrow, PREDICTOR_MLP_RATIO, sequences, queries)


def _block_flops(dim: int, mlp_ratio: float, keys: np.ndarray, queries: np.ndarray) -> float:
    """Count a transformer block over sequences of `keys` rows that finishes `queries` rows of each."""
    qkv = 2 * _linear_flops(keys.sum(), dim, dim) + _linear_flops(queries.sum(), dim, dim)
    return qkv + _mix_flops(dim, mlp_ratio, keys, queries)


def _mix_flops(dim: int, mlp_ratio: float, keys: np.ndarray, queries: np.ndarray) -> float:
    """Count a block without its query, key and value projections: q k^T, attention times v, proj, mlp.

    Two sequences of 10 and 20 rows, of which 3 and 4 are finished, have 10 * 3 + 20 * 4 = 110 pairs of key and query.
    """
    attention = 2 * 2.0 * float(keys @ queries) * dim
    return attention + _linear_flops(queries.sum(), dim, dim) + 2 * _linear_flops(queries.sum(), dim, round(dim * mlp_ratio))


def _linear_flops(rows: float, width_in: int, width_out: int) -> float:
    return 2.0 * rows * width_in * width_out


def _embed_flops(shape: NetworkShape, rows: float) -> float:
    return _linear_flops(rows, shape.patch_values, shape.encoder[0])


def _qkv_split_flops(images: int, target_embed: float, target: float, embed: float, context: float, predictor: float) -> Flops:
    """Return FLOPs per image from a micro-batch's forward; the embedding's backward is its weight gradient alone."""
    forward = (target_embed + target, embed + context, embed + 2 * context, predictor, 2 * predictor)
    return Flops(*(float(part) / images for part in forward))


def _equal_lengths(work: Workload, context_tokens: float, target_block_tokens: float, images: int) -> _Rows:
    mask, use = work.masking.mask, work.masking.use
    contexts, seen = mask.num_enc_masks * images, use.seen(context_tokens)
    sequences = contexts * work.masking.packing.predictor_sequences(mask.target_blocks) * use.repeats
    masked = np.full(sequences, float(target_block_tokens))
    queries = masked + (seen if use.visible_weight else 0)
    return _Rows(images, np.full(contexts, float(context_tokens)), queries, masked + seen)


def _lengths(packed: Packed) -> np.ndarray:
    return packed.cu_seqlens.diff().cpu().numpy().astype(np.float64)
