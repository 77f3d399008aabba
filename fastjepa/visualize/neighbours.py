"""Nearest neighbours of predictions: the blocks of a data set nearest to a predicted block, and how the true block ranks.

A query is the first target block of a held-out image: given the image's context, the predictor gives a row of features for
each of the block's patches. A candidate is a block of the same shape anywhere in another image, as the target encoder sees
that image whole, its patches normalised as in the run's loss. Their distance is the paper's loss (equation 1): the squared
error, patch by patch, as a mean over the block. Predictions are compared as they are, not pooled.

The true block is ranked among CANDIDATE_BLOCKS blocks of other images drawn at random, once at any place and once at its own
place: features know where they lie, so only the second rank shows that the prediction knows the image.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from fastjepa.data.pixels import normalise_pixels
from fastjepa.engine.precision import autocast_of
from fastjepa.errors import UserError
from fastjepa.evals.images import EvalImages
from fastjepa.evals.inputs import Split, Subject
from fastjepa.evals.scoring import Z95, wilson_interval
from fastjepa.loss.normalizations import standardised_layers
from fastjepa.masks.check import check_masks
from fastjepa.masks.draw import draw_masks
from fastjepa.masks.layouts import Masking
from fastjepa.masks.pack import pack
from fastjepa.model.jepa import network_form
from fastjepa.model.predictor import Predictor
from fastjepa.model.projector import without_projector
from fastjepa.model.vit import use_auto_attention
from fastjepa.rng import SPLIT_STREAM, generator
from fastjepa.weights.read import starting_networks
from fastjepa_kernels.target_loss import layers_of

CANDIDATE_BLOCKS = 99  # random blocks a true one is ranked among, where the data has as many other images
RECALL_AT = (1, 5)  # of recall@k
BLOCK_BATCH = 64  # images of one forward pass
ROW_NORMALIZATIONS: dict[str, Callable[[Tensor], Tensor]] = {  # by loss.normalize, (U, D) -> (U, D)
    "layer": lambda rows: layer_norm(rows, rows.shape[-1:]),
    "none": lambda rows: rows,
    "batch": lambda rows: standardised_layers([[rows]])[0][0],
}
RIVAL_DRAWS = 1 << 34  # step of SPLIT_STREAM for query 0; fastjepa/evals/scoring.py lists the others


@dataclass(frozen=True)
class Queries:
    """Q held-out images, a hidden block of each, and the prediction of it; all on the host."""

    images: Tensor  # (Q, C, H, W) uint8
    context: np.ndarray  # (Q, N) bool: the patches that the context encoder sees
    block: np.ndarray  # (Q, N) bool: the patches that are predicted
    predicted: list[Tensor]  # Q of (L, D) fp32
    true: Tensor  # (Q,) distance of the true block


@dataclass(frozen=True)
class BankDistances:
    """Distances of each query to every block of a bank of n images; P places of the grid hold a block of the query's shape."""

    apart: list[Tensor]  # Q of (n, P) fp32
    own: np.ndarray  # (Q, n) bool: images of the bank that are the query's own
    places: tuple[np.ndarray, ...]  # Q of (P, L) int64: the patches of each place
    homes: tuple[int, ...]  # Q: which of the P is the query's own place


@dataclass(frozen=True)
class Neighbours:
    """The k nearest blocks of each query, at most one an image, and the rank of the true one; all on the host."""

    distance: Tensor  # (Q, k) fp32, rising
    row: Tensor  # (Q, k) int64: the image, as a row of the bank
    block: np.ndarray  # (Q, k, N) bool
    rank: dict[str, Tensor]  # {"anywhere", "same_place"}: (Q,) fp64 from 1; a tie counts half
    candidates: int  # random blocks that the true one was ranked among


def prepared_network(subject: Subject, network: nn.Module) -> nn.Module:
    """Return the network frozen, on the subject's device, with the attention that runs there."""
    use_auto_attention(network, subject.device, subject.dtype)
    return network.to(subject.device).eval().requires_grad_(False)


@contextmanager
def frozen_compute(subject: Subject) -> Iterator[None]:
    """Compute without gradients, in the subject's dtype."""
    with torch.inference_mode(), autocast_of(subject.dtype, subject.device):
        yield


def patch_rows(subject: Subject, encoder: nn.Module, images: Tensor) -> Tensor:
    """Return (b, N, D) fp32 features of whole images (b, C, H, W) uint8, on the subject's device."""
    with frozen_compute(subject):
        return encoder.features(normalise_pixels(images.to(subject.device), subject.config.mean_std)).float()


def target_rows(subject: Subject, encoder: nn.Module, images: Tensor) -> Tensor:
    """Return (b, N, D) fp32 on the host: what the run's loss asks of its predictor for each patch of whole images (b, C, H, W).

    It is a layer's rows, normalised as `loss.normalize` says, or the average of several layers, normalised again. With batch
    the moments are those of the images given, where the loss has those of a step.
    """
    loss = subject.config.loss
    layers, normalised = loss.target_layers, ROW_NORMALIZATIONS[loss.normalize]
    with frozen_compute(subject):
        pixels = normalise_pixels(images.to(subject.device), subject.config.mean_std)
        found = layers_of(encoder(pixels, layers=None if layers == "last" else layers))
        rows = [normalised(layer.float()) for layer in found]
        wanted = rows[0] if len(rows) == 1 else normalised(sum(rows) / len(rows))
    return wanted.view(len(images), -1, wanted.shape[1]).cpu()


def load_predictor(subject: Subject) -> nn.Module:
    """Return the predictor, on the CPU; UserError where the weights hold none, or not both encoders beside it."""
    networks = starting_networks(subject.path)
    if missing := [name for name in ("predictor", "encoder", "target_encoder") if not networks.get(name)]:
        raise UserError(f"{subject.path}: holds no {missing[0]}, which predictions need; give a run, its checkpoint or an "
                        "official .pth.tar, or ask with --what for masks,pca alone")  # fmt: skip
    weights, config = without_projector(networks["predictor"]), subject.config
    loss = config.loss
    own = config.meta.teacher is None and loss.target != "pixels" and config.predicted_dim == config.encoder_shape[0]
    if not own or loss.normalize not in ROW_NORMALIZATIONS:
        raise UserError(f"{subject.path}: its predictor learned something else than one row of target features a patch, with "
                        "which these pictures compare; ask with --what for masks,pca alone")  # fmt: skip
    depth = len({name.split(".")[1] for name in weights if name.startswith("predictor_blocks.")})
    heads = config.meta.pred_num_heads or config.encoder_shape[2]
    shape = len(weights["mask_token"][0, 0]), depth, heads
    predictor = Predictor(config.grid, config.encoder_shape[0], shape, form=network_form(config))
    try:
        predictor.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).split("\n")[1].strip()
        raise UserError(f"{subject.path}: its predictor does not fit its config: {reason}") from error
    return predictor


def translated_rows(block: np.ndarray, grid: tuple[int, int]) -> tuple[np.ndarray, int]:
    """Return (P, L) int64, the L patches of a block (N,) bool at each place where it lies whole, and which of the P is its own.

    On a grid of 2 rows and 3 columns the block of patches 1 and 2 has P = 4 places, 01 12 34 45, and its own is number 1.
    """
    rows, cols = np.divmod(np.flatnonzero(block), grid[1])
    top, left = rows.min(), cols.min()
    tops, lefts = np.arange(grid[0] - np.ptp(rows)), np.arange(grid[1] - np.ptp(cols))
    moved = (tops[:, None, None] + rows - top) * grid[1] + lefts[:, None] + cols - left  # (tops, lefts, L)
    return moved.reshape(-1, len(rows)), int(top * len(lefts) + left)


def block_distances(predicted: Tensor, places: np.ndarray, features: Tensor) -> Tensor:
    """Return the (n, P) mean squared errors of a prediction (L, D) against each place (P, L) of images (n, N, D).

    Each patch of an image meets each predicted row once, by |x - y|^2 = |x|^2 + |y|^2 - 2 x y; a place then adds up L of them.
    """
    products = features @ predicted.T  # (n, N, L)
    apart = features.square().sum(dim=2, keepdim=True) + predicted.square().sum(dim=1) - 2 * products
    return apart[:, torch.from_numpy(places), torch.arange(len(predicted))].mean(dim=2) / predicted.shape[1]


def predict_blocks(subject: Subject, split: Split, seed: int) -> Queries:
    """Predict the first target block of every image of `split` from its first context; masks are drawn by `seed`."""
    context, block = (drawn[:, 0] for drawn in draw_query_masks(subject, len(split.rows), seed))
    predictor, encoder, target = (
        prepared_network(subject, network)
        for network in (load_predictor(subject), subject.encoder("context"), subject.encoder("target"))
    )
    images, predicted, true = [], [], []
    stream = EvalImages(split.source, subject.size, subject.pixels, split.rows)
    for pixels in stream.batches(BLOCK_BATCH, about="predictions"):
        part = slice(len(predicted), len(predicted) + len(pixels))
        rows = predict_features(subject, encoder, predictor, pixels, context[part], block[part])
        truth = target_rows(subject, target, pixels)
        true += [(said - whole[torch.from_numpy(hidden)]).square().mean()
                 for said, whole, hidden in zip(rows, truth, block[part], strict=True)]  # fmt: skip
        predicted += rows
        images.append(pixels)
    return Queries(torch.cat(images), context, block, predicted, torch.stack(true))


def predict_features(
    subject: Subject, encoder: nn.Module, predictor: nn.Module, pixels: Tensor, context: np.ndarray, block: np.ndarray
) -> list[Tensor]:
    """Predict one block of each image: b of (L, D) fp32 on the host.

    Args:
        pixels: (b, C, H, W) uint8.
        context: (b, N) bool, the patches that the encoder sees.
        block: (b, N) bool, the patches to predict.
    """
    seen, _, blocks = (packed.to(subject.device) for packed in pack(context[:, None], block[:, None]))
    with frozen_compute(subject):
        visible = encoder(normalise_pixels(pixels.to(subject.device), subject.config.mean_std), seen)
        rows = predictor(visible, seen, blocks).float().cpu()  # image by image: there is one mask of each kind
    return list(rows.split(block.sum(axis=1).tolist()))


def normalised_rows(features: Tensor) -> Tensor:
    """Return features (..., D) on the host, each patch layer-normalised as targets are in the loss."""
    return layer_norm(features, features.shape[-1:]).cpu()


def draw_query_masks(subject: Subject, count: int, seed: int, step: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw contexts (count, K, N) and target blocks (count, R, N) of `count` images, as the run draws its own."""
    masking = replace(Masking.of(subject.config), seed=seed)
    with warnings.catch_warnings(action="ignore"):  # warnings are about the run's batch, not about these few images
        check_masks(masking, count)
    return draw_masks(masking, step, range(count), count)


def search_blocks(subject: Subject, queries: Queries, split: Split, bank: Split, k: int, seed: int) -> Neighbours:
    """Compare every query, of the images of `split`, with every block of the images of `bank`; an image never with itself."""
    grid, count = subject.config.grid, len(bank.rows)
    names = np.array([bank.source.name(int(row)) for row in bank.rows])
    own = np.array([names == split.source.name(int(row)) for row in split.rows])  # (Q, n)
    others = int((~own).sum(axis=1).min())
    if others < k:
        raise UserError(f"{bank.data}: {k} neighbours of {others} other images cannot be had; lower --k or use more images")
    places, homes = zip(*(translated_rows(block, grid) for block in queries.block), strict=True)
    apart = [torch.empty(count, len(place)) for place in places]
    target, start = prepared_network(subject, subject.encoder("target")), 0
    stream = EvalImages(bank.source, subject.size, subject.pixels, bank.rows)
    for pixels in stream.batches(BLOCK_BATCH, about="neighbours"):
        features = target_rows(subject, target, pixels)
        for i, rows in enumerate(queries.predicted):
            apart[i][start : start + len(pixels)] = block_distances(rows, places[i], features)
        start += len(pixels)
    return nearest_blocks(queries, BankDistances(apart, own, places, homes), k, min(CANDIDATE_BLOCKS, others), seed)


def nearest_blocks(queries: Queries, bank: BankDistances, k: int, candidates: int, seed: int) -> Neighbours:
    """Find the k nearest images of each query, by their nearest block, and rank the true block among random ones."""
    shape = len(bank.apart), k
    distance, row = torch.empty(shape), torch.empty(shape, dtype=torch.int64)
    block = np.zeros((*shape, queries.block.shape[1]), bool)
    ranks: dict[str, list[float]] = {"anywhere": [], "same_place": []}
    for i, apart in enumerate(bank.apart):  # (n, P)
        best, place = apart.min(dim=1)  # of each image: its nearest block, and where that lies
        best[torch.from_numpy(bank.own[i])] = math.inf
        distance[i], row[i] = best.topk(k, largest=False)
        np.put_along_axis(block[i], bank.places[i][place[row[i]]], True, axis=1)
        random = generator(seed, SPLIT_STREAM, RIVAL_DRAWS + i)
        rival = random.permutation(np.flatnonzero(~bank.own[i]))[:candidates]
        anywhere = random.integers(0, len(bank.places[i]), candidates)
        ranks["anywhere"].append(rank_of_truth(queries.true[i], apart[rival, anywhere]))
        ranks["same_place"].append(rank_of_truth(queries.true[i], apart[rival, bank.homes[i]]))
    return Neighbours(distance, row, block, {name: torch.tensor(found).double() for name, found in ranks.items()}, candidates)


def rank_of_truth(true: Tensor, others: Tensor) -> float:
    """Return 1 where the true block is nearer than all others, 2 where one is nearer ...; a tie counts half."""
    return 1 + float((others < true).sum()) + float((others == true).sum()) / 2


def summarise_ranks(found: Neighbours) -> dict[str, Any]:
    """Return mean rank and recall@k of both ranks, each with its 95 % interval over queries and what chance gives."""
    return {"candidates": found.candidates} | {
        name: rank_statistics(ranks, found.candidates) for name, ranks in found.rank.items()
    }


def rank_statistics(ranks: Tensor, candidates: int) -> dict[str, Any]:
    """Return {mean_rank, ci95, chance, recall@k: {share, ci95, chance}} of (Q,) ranks among `candidates` + 1 blocks."""
    mean, n = float(ranks.mean()), len(ranks)
    half = Z95 * float(ranks.std()) / math.sqrt(n) if n > 1 else math.inf
    found: dict[str, Any] = {"mean_rank": mean, "ci95": [max(1.0, mean - half), min(candidates + 1.0, mean + half)],
                             "chance": (candidates + 2) / 2}  # fmt: skip
    for k in (k for k in RECALL_AT if k <= candidates):
        hits = int((ranks <= k).sum())
        found[f"recall@{k}"] = {"share": hits / n, "ci95": wilson_interval(hits, n), "chance": k / (candidates + 1)}
    return found
