"""Weighted k-nearest neighbours on L2-normalised features (Wu et al. 2018, temperature 0.1): no training at all."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastjepa.errors import UserError
from fastjepa.evals.images import watched
from fastjepa.evals.scoring import Features, Result, check_labels, choose_setting, score_predictions

NEIGHBOUR_COUNTS = (10, 20, 50, 100, 200)
TEMPERATURE = 0.1
QUERIES_A_BLOCK, BANK_A_BLOCK = 1024, 16384  # rows of one block of similarities: 64 MB


@dataclass(frozen=True)
class Neighbours:
    """The vote of the k nearest: each weighs exp(cosine / temperature)."""

    k: int | None = None  # None: the best of NEIGHBOUR_COUNTS on a fifth of the training images
    temperature: float = TEMPERATURE


def knn_accuracy(
    train: Features,
    test: Features,
    classes: int,
    seed: int = 0,
    device: str | torch.device = "cpu",
    vote: Neighbours = Neighbours(),
) -> Result:
    """Classify `test` by its neighbours in `train`; where k is chosen, the test images never take part in the choice."""
    check_labels(train, test, classes)
    k, temperature = vote.k, vote.temperature
    if k is not None and not 0 < k <= len(train.y):
        raise UserError(f"k = {k} neighbours among {len(train.y)} training images: choose 1 to {len(train.y)}")
    if temperature <= 0:
        raise UserError(f"temperature {temperature}: choose one above 0")

    def attempt(fit: Tensor, held: Tensor) -> dict[int, Tensor]:
        ks = tuple(k for k in NEIGHBOUR_COUNTS if k <= len(fit)) or (len(fit),)
        bank = Features(train.x[fit], train.y[fit])
        return dict(zip(ks, _query_blocks(bank, train.x[held], classes, ks, device, temperature), strict=True))

    validation_accuracy = None
    if k is None:
        k, validation_accuracy = choose_setting(train.y, 5, seed, attempt, remedy=", or give `eval knn` --k")
    predicted = _query_blocks(train, test.x, classes, (k,), device, temperature)[0]
    return score_predictions(predicted, train, test, {"k": k, "temperature": temperature}, validation_accuracy)


def knn_classify(
    bank: Features,
    queries: Tensor,
    classes: int,
    ks: tuple[int, ...],
    device: str | torch.device = "cpu",
    temperature: float = TEMPERATURE,
) -> Tensor:
    """Return classes (len(ks), n) int64 of `queries` (n, D) for every k of rising `ks`.

    Votes weigh exp(cosine / temperature).
    """
    blocks = nearest_rows(bank.x, queries, ks[-1], device)
    return torch.cat([_votes(cosines / temperature, bank.y[rows], classes, ks) for cosines, rows in blocks], dim=1)


def _query_blocks(bank: Features, queries: Tensor, *args) -> Tensor:
    blocks = watched(queries.split(QUERIES_A_BLOCK), "neighbours")
    return torch.cat([knn_classify(bank, block, *args) for block in blocks], dim=1)


def nearest_rows(bank: Tensor, queries: Tensor, k: int, device: str | torch.device = "cpu") -> Iterator[tuple[Tensor, Tensor]]:
    """Yield cosine similarities (q, k), falling, and bank rows (q, k) of the k nearest, block by block of queries, on the host.

    The similarities of one block of queries and one block of the bank are all that is ever held.
    """
    bank = normalize(bank.to(device), dim=1)
    for block in queries.split(QUERIES_A_BLOCK):
        block = normalize(block.to(device), dim=1)
        best, rows = _nearest_in(bank[:BANK_A_BLOCK], block, k)
        # The best of the blocks so far and of the next one are ranked together; `place` points into both, side by side.
        for start in range(BANK_A_BLOCK, len(bank), BANK_A_BLOCK):
            more, more_rows = _nearest_in(bank[start : start + BANK_A_BLOCK], block, k)
            best, place = torch.cat([best, more], dim=1).topk(min(k, best.shape[1] + more.shape[1]), dim=1)
            rows = torch.cat([rows, more_rows + start], dim=1).gather(1, place)
        yield best.cpu(), rows.cpu()


def _nearest_in(bank: Tensor, block: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return (block @ bank.T).topk(min(k, len(bank)), dim=1)


def _votes(similarity: Tensor, labels: Tensor, classes: int, ks: tuple[int, ...]) -> Tensor:
    """Return the winning classes (len(ks), q); the votes of a larger k add to those of the smaller one."""
    weight = (similarity - similarity[:, :1]).exp()  # relative to the nearest: low temperatures would overflow
    votes, start, winners = weight.new_zeros(len(weight), classes), 0, []
    for k in ks:
        votes.scatter_add_(1, labels[:, start:k], weight[:, start:k])
        winners.append(votes.argmax(dim=1))
        start = k
    return torch.stack(winners)
