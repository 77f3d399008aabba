"""Weighted k-nearest neighbours on L2-normalised features (Wu et al. 2018, temperature 0.1): no training at all."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastjepa.errors import ConfigError
from fastjepa.evals.images import watched
from fastjepa.evals.scoring import Features, Result, check_labels, score_predictions, validation_split

NEIGHBOUR_COUNTS = (10, 20, 50, 100, 200)
TEMPERATURE = 0.1
QUERIES_A_BLOCK, BANK_A_BLOCK = 1024, 16384  # rows of one block of similarities: 64 MB


def knn_accuracy(
    train: Features,
    test: Features,
    classes: int,
    k: int | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    temperature: float = TEMPERATURE,
) -> Result:
    """Classify `test` by its neighbours in `train`.

    Without `k`, the best of KS on a fifth of the training images is taken; the test images never take part in the choice.
    """
    check_labels(train, test, classes)
    if k is not None and not 0 < k <= len(train.y):
        raise ConfigError(f"k = {k} neighbours among {len(train.y)} training images: choose 1 to {len(train.y)}")
    if temperature <= 0:
        raise ConfigError(f"temperature {temperature}: choose one above 0")
    validation_accuracy = None
    if k is None:
        k, validation_accuracy = choose_k(train, classes, seed, device, temperature)
    predicted = _query_blocks(train, test.x, classes, (k,), device, temperature)[0]
    return score_predictions(predicted, train, test, {"k": k, "temperature": temperature}, validation_accuracy)


def choose_k(
    train: Features,
    classes: int,
    seed: int = 0,
    device: str | torch.device = "cpu",
    temperature: float = TEMPERATURE,
) -> tuple[int, float]:
    """The k of KS that does best on a fifth of the training images, and its accuracy there."""
    fit, held = validation_split(train.y, 5, seed)
    bank = Features(train.x[fit], train.y[fit])
    ks = tuple(k for k in NEIGHBOUR_COUNTS if k <= len(fit)) or (len(fit),)
    predicted = _query_blocks(bank, train.x[held], classes, ks, device, temperature)
    accuracy = (predicted == train.y[held]).double().mean(dim=1)
    best = int(accuracy.argmax())
    return ks[best], float(accuracy[best])


def knn_classify(
    bank: Features,
    queries: Tensor,
    classes: int,
    ks: tuple[int, ...],
    device: str | torch.device = "cpu",
    temperature: float = TEMPERATURE,
) -> Tensor:
    """Classes (len(ks), n) int64 of `queries` (n, D) for every k of rising `ks`: votes weigh exp(cosine / temperature)."""
    blocks = nearest_rows(bank.x, queries, ks[-1], device)
    return torch.cat([_votes(cosines / temperature, bank.y[rows], classes, ks) for cosines, rows in blocks], dim=1)


def _query_blocks(bank: Features, queries: Tensor, *args) -> Tensor:
    return torch.cat(
        [knn_classify(bank, block, *args) for block in watched(queries.split(QUERIES_A_BLOCK), "neighbours")], dim=1
    )


def nearest_rows(bank: Tensor, queries: Tensor, k: int, device: str | torch.device = "cpu") -> Iterator[tuple[Tensor, Tensor]]:
    """Cosine similarities (q, k), falling, and bank rows (q, k) of the k nearest, a block of queries at a time, on the host.

    The similarities of one block of queries and one block of the bank are all that is ever held.
    """
    bank = normalize(bank.to(device), dim=1)
    for block in queries.split(QUERIES_A_BLOCK):
        block = normalize(block.to(device), dim=1)
        best, rows = _nearest_in(bank[:BANK_A_BLOCK], block, k)
        for start in range(BANK_A_BLOCK, len(bank), BANK_A_BLOCK):
            more, more_rows = _nearest_in(bank[start : start + BANK_A_BLOCK], block, k)
            best, place = torch.cat([best, more], dim=1).topk(min(k, best.shape[1] + more.shape[1]), dim=1)
            rows = torch.cat([rows, more_rows + start], dim=1).gather(1, place)
        yield best.cpu(), rows.cpu()


def _nearest_in(bank: Tensor, block: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return (block @ bank.T).topk(min(k, len(bank)), dim=1)


def _votes(similarity: Tensor, labels: Tensor, classes: int, ks: tuple[int, ...]) -> Tensor:
    """(len(ks), q) winning classes; the votes of a larger k add to those of the smaller one."""
    weight = (similarity - similarity[:, :1]).exp()  # relative to the nearest: low temperatures would overflow
    votes, start, winners = weight.new_zeros(len(weight), classes), 0, []
    for k in ks:
        votes.scatter_add_(1, labels[:, start:k], weight[:, start:k])
        winners.append(votes.argmax(dim=1))
        start = k
    return torch.stack(winners)
