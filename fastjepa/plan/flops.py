"""Closed-form FLOPs of one training step, per image: those of `fastjepa.model`, and those of the official code.

A multiply-add is 2 FLOPs and only matrix products count: linear layers, the patch embedding and attention's two
products; a backward pass costs twice its forward, except that images need no gradient. Recomputation (activation
checkpointing, attention backward), norms, the loss, its regularizer, optimizer and EMA are left out, as usual for MFU, and
so is the padding of runtime.cuda_graph, which is no work that anybody wants.
"""

from dataclasses import dataclass, fields

import numpy as np

from fastjepa.config.schema import Config
from fastjepa.loss.targets import TARGETS
from fastjepa.masks.packed import Blocks, Packed
from fastjepa.masks.packer import packer_of
from fastjepa.masks.packings import PerBlockPacking, packing_of

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


@dataclass(frozen=True)
class _Rows:
    """Lengths of a micro-batch's sequences, as arrays."""

    images: int
    context: np.ndarray  # (K*b,) patches of each context
    queries: np.ndarray  # (R*M*K*b,) predicted rows of each predictor sequence
    sequences: np.ndarray  # (R*M*K*b,) all rows of each predictor sequence


def count_flops(
    config: Config,
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
        config: the networks, and how many context masks and target blocks an image has.
        context_tokens: patches in a context mask, after the cut.
        target_block_tokens: patches in a target block.
        target_union: patches of an image that are in any of its target blocks.
        images: images of a forward, which share the predictor's table of positions (default: the micro-batch).
    """
    images = images or config.micro_batch
    packing, lengths = _packing(config), (target_block_tokens, target_union)
    rows = _equal_lengths(config, context_tokens, packing.predicted_tokens(*lengths), images)
    sequences = images * packing.target_sequences(config.mask.target_blocks)
    finished = packing.finished_tokens(*lengths) + (context_tokens if config.loss.visible_weight else 0)
    return _flops_of_rows(config, rows, np.full(sequences, float(finished)))


def flops_of_packed(config: Config, context: Packed, target: Packed, blocks: Blocks) -> Flops:
    """Count the FLOPs per image of this package's step on one packed micro-batch, exact for sequences of any lengths.

    Reads the tensors of `pack`; hand them over before they move to a device, or this waits for it.
    """
    lengths = _lengths(target)
    images = len(lengths) // _packing(config).target_sequences(config.mask.target_blocks)
    rows = _Rows(images, _lengths(context), _lengths(blocks.queries), _lengths(blocks.sequences))
    return _flops_of_rows(config, rows, lengths)


def flops_per_image(config: Config, total: int | None = None, steps: int = 16) -> float:
    """Count the FLOPs per image of a run: the mean over the first micro-batch of `steps` steps, with the masks it will draw.

    `total` is the number of images in a global batch, which decides who shares a cut (default: one rank's).
    """
    total = total or config.data.batch_size
    packer, slots = packer_of(config), range(config.micro_batch)
    found = (packer.packed(step, slots, total) for step in range(steps))
    return float(np.mean([flops_of_packed(config, *one).total for one in found]))


def encoder_flops(config: Config) -> float:
    """Count the FLOPs of the target encoder on one whole image, as evaluations run it, whatever the run's targets are."""
    tokens = np.array([_token_counts(config)])
    dim, depth, _, mlp_ratio = config.encoder_shape
    return _embed_flops(config, tokens.sum()) + depth * _block_flops(dim, mlp_ratio, tokens, tokens)


def official_flops(config: Config, context_tokens: float, target_block_tokens: float) -> Flops:
    """Count the FLOPs per image of the official code's step: all patches embedded, every block finished for every row.

    Its sequences are equal by construction: all contexts have `context_tokens` patches, all blocks `target_block_tokens`.
    """
    dim, depth, _, mlp_ratio = config.encoder_shape
    narrow, tokens = config.meta.pred_emb_dim, _token_counts(config)
    rows = _equal_lengths(config, context_tokens, target_block_tokens, 1)
    context, sequences = rows.context, rows.sequences
    encoder = depth * _block_flops(dim, mlp_ratio, np.array([tokens]), np.array([tokens]))
    seen = depth * _block_flops(dim, mlp_ratio, context, context)
    ends = _linear_flops(context.sum() + rows.queries.sum(), dim, narrow)
    predictor = ends + config.meta.pred_depth * _block_flops(narrow, PREDICTOR_MLP_RATIO, sequences, sequences)
    return _qkv_split_flops(1, _embed_flops(config, tokens), encoder, _embed_flops(config, tokens), seen, predictor)


def _flops_of_rows(config: Config, rows: _Rows, wanted: np.ndarray) -> Flops:
    """Count by rows; `wanted` rows are finished by the target network, of each image, or of each block it sees alone."""
    dim, depth, _, mlp_ratio = config.encoder_shape
    context = depth * _block_flops(dim, mlp_ratio, rows.context, rows.context)
    target = _target_flops(config, _packing(config).target_tokens(wanted, _token_counts(config)), wanted)
    return _qkv_split_flops(
        rows.images, *target, _embed_flops(config, rows.context.sum()), context, _predictor_flops(config, rows)
    )


def _target_flops(config: Config, tokens: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    """Count the target network's embedding and blocks over sequences of `tokens` patches; none where pixels are predicted."""
    if not TARGETS[config.loss.target].runs_network:
        return 0.0, 0.0
    dim, _, _, mlp_ratio = config.encoder_shape
    depth = config.target_depth
    blocks = (depth - 1) * _block_flops(dim, mlp_ratio, tokens, tokens) + _block_flops(dim, mlp_ratio, tokens, wanted)
    return _embed_flops(config, tokens.sum()), blocks


def _predictor_flops(config: Config, rows: _Rows) -> float:
    """Count the predictor: its first block projects a table of distinct rows, its last one finishes the queries alone."""
    dim, narrow, depth = config.encoder_shape[0], config.meta.pred_emb_dim, config.meta.pred_depth
    seen, queries, sequences = rows.context.sum(), rows.queries, rows.sequences
    ends = _linear_flops(seen, dim, narrow) + _linear_flops(
        queries.sum(), narrow, config.predicted_dim
    )  # predictor_embed, predictor_proj
    table = 3 * _linear_flops(seen + _token_counts(config), narrow, narrow)
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


def _embed_flops(config: Config, rows: float) -> float:
    return _linear_flops(rows, config.data.channels * config.mask.patch_size**2, config.encoder_shape[0])


def _qkv_split_flops(images: int, target_embed: float, target: float, embed: float, context: float, predictor: float) -> Flops:
    """Return FLOPs per image from a micro-batch's forward; the embedding's backward is its weight gradient alone."""
    forward = (target_embed + target, embed + context, embed + 2 * context, predictor, 2 * predictor)
    return Flops(*(float(part) / images for part in forward))


def _equal_lengths(config: Config, context_tokens: float, target_block_tokens: float, images: int) -> _Rows:
    contexts, meta = config.mask.num_enc_masks * images, config.meta
    sequences = contexts * _packing(config).predictor_sequences(config.mask.target_blocks) * meta.predictor_repeats
    masked = np.full(sequences, float(target_block_tokens))
    seen = context_tokens if meta.predictor_context == 1 else max(1.0, round(meta.predictor_context * context_tokens))
    queries = masked + (seen if config.loss.visible_weight else 0)
    return _Rows(images, np.full(contexts, float(context_tokens)), queries, masked + seen)


def _packing(config: Config) -> PerBlockPacking:
    return packing_of(config.meta.predictor, config.loss.target)


def _lengths(packed: Packed) -> np.ndarray:
    return packed.cu_seqlens.diff().cpu().numpy().astype(np.float64)


def _token_counts(config: Config) -> int:
    rows, columns = config.grid
    return rows * columns
