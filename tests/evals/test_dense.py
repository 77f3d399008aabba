"""Dense heads and scores: as scikit-learn and torchmetrics give them, perfect on perfect features, chance on shuffled ones."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsRegressor
from torch.nn.functional import interpolate
from torchmetrics.classification import MulticlassJaccardIndex

from fastjepa.errors import UserError
from fastjepa.evals.dense import heads
from fastjepa.evals.dense.heads import (
    DenseRecipe,
    Examples,
    PatchNeighbours,
    draw_bank,
    enlarged_maps,
    fit_ridge,
    linear_predictor,
    neighbour_predictor,
    patch_moments,
    solve_ridge,
)
from fastjepa.evals.dense.table import ShownPredictions, count_predictions, measured_constant, scores_of
from fastjepa.evals.dense.tasks import DenseTask, Depth, Normals, Segmentation
from fastjepa.evals.patch_features import held_patches

TASKS = {"segmentation": Segmentation(4, ignored=255), "depth": Depth(1000), "normals": Normals()}
NOTHING_SHOWN = ("row", ShownPredictions([], []))


def label_images(name: str, count: int, side: int, seed: int) -> np.ndarray:
    """Label images whose every pixel is drawn by itself; a tenth of them has no value."""
    random = np.random.default_rng(seed)
    if name == "normals":
        vectors = random.normal(size=(count, side, side, 3))
        vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
        return np.round(255 * (vectors + 1) / 2).astype(np.uint8)
    none = random.random((count, side, side)) < 0.1
    if name == "depth":
        return np.where(none, 0, random.integers(500, 5000, none.shape)).astype(np.uint16)
    return np.where(none, 255, random.integers(0, 4, none.shape)).astype(np.uint8)


def examples(task: DenseTask, stored: np.ndarray, x: torch.Tensor, patch: int) -> Examples:
    return Examples(held_patches(x), stored, task, patch, torch.device("cpu"))


def noise(count: int, patches: int, dim: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, patches, dim, generator=torch.Generator().manual_seed(seed))


def test_neighbours_are_those_of_scikit_learn():
    """A regression of class shares by cosine, weighted by exp(cosine / temperature)."""
    stored, x = label_images("segmentation", 20, 8, 0), noise(20, 16)
    data, settings = examples(TASKS["segmentation"], stored, x, 2), PatchNeighbours(200, 7, 0.1)
    bank, values = draw_bank(data, settings.bank, 3)
    assert len(bank) == 200 and torch.allclose(values.sum(dim=1), torch.ones(200))
    weights = lambda distance: np.exp((1 - distance) / settings.temperature)  # noqa: E731
    other = KNeighborsRegressor(7, metric="cosine", weights=weights, algorithm="brute").fit(bank, values)
    queries = noise(5, 16, seed=1)
    found = neighbour_predictor(data, settings, 3)(queries)
    expected = other.predict(queries.flatten(0, 1).numpy())
    np.testing.assert_allclose(found.flatten(0, 1).numpy(), expected, atol=1e-5)


def test_a_bank_holds_the_shares_of_its_patches_pixels():
    """And no patch of which no pixel counts."""
    stored, x = label_images("segmentation", 3, 4, 0), torch.arange(12.0).view(3, 4, 1)
    stored[1, :2, :2] = 255
    bank, values = draw_bank(examples(TASKS["segmentation"], stored, x, 2), 100, 0)
    assert bank[:, 0].int().tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11]
    for number, shares in zip(bank[:, 0].int().tolist(), values, strict=True):
        picture, place = divmod(number, 4)
        top, left = 2 * (place // 2), 2 * (place % 2)
        pixels = stored[picture, top : top + 2, left : left + 2].ravel()
        counts = np.bincount(pixels[pixels != 255], minlength=4)
        assert shares.tolist() == pytest.approx((counts / counts.sum()).tolist())


@pytest.mark.parametrize("name", ["depth", "normals"])
def test_the_linear_layer_of_numbers_is_the_ridge_of_scikit_learn(name: str):
    """On the mean of each patch's pixels, a patch counting as often as it has pixels with a value."""
    task, stored, x = TASKS[name], label_images(name, 30, 8, 0), noise(30, 16)
    data = examples(task, stored, x, 2)
    values, weight = task.patch_values(task.truth(stored), data.patch)
    rows = x.flatten(0, 1).double()
    moments = patch_moments(data, torch.arange(30), "all")
    found, bias = solve_ridge(moments, task.channels, 0.01)
    mean = (weight.flatten()[:, None] * rows).sum(dim=0) / weight.sum()
    penalty = 0.01 * float((weight.flatten()[:, None] * (rows - mean) ** 2).sum(dim=0).mean())
    other = Ridge(alpha=penalty).fit(rows, values.flatten(0, 1).double(), sample_weight=weight.flatten().double())
    np.testing.assert_allclose(found.T, np.atleast_2d(other.coef_), atol=1e-6)
    np.testing.assert_allclose(bias, other.intercept_, atol=1e-6)


def test_the_penalty_is_the_one_that_held_out_pictures_choose(monkeypatch: pytest.MonkeyPatch):
    """Few pictures of noise in many dimensions ask for the largest; the answer in the features for the smallest."""
    stored = label_images("depth", 12, 4, 0)
    assert fit_ridge(examples(TASKS["depth"], stored, noise(12, 16, 64), 1), 0)[1] == {"penalty": heads.RIDGE_GRID[-1]}
    answer = TASKS["depth"].truth(stored).flatten(1)[..., None]
    assert fit_ridge(examples(TASKS["depth"], stored, answer, 1), 0)[1] == {"penalty": heads.RIDGE_GRID[0]}


def test_the_linear_layer_of_classes_is_the_logistic_regression_of_scikit_learn():
    """Where a patch is a pixel, both fit the same loss."""
    x, mixing = noise(60, 16, 4), noise(1, 4, 4, seed=5)[0]
    drawn = (x @ mixing).softmax(dim=2).flatten(0, 1).multinomial(1, generator=torch.Generator().manual_seed(0))
    stored = drawn.view(60, 4, 4).numpy().astype(np.uint8)
    predict, _ = linear_predictor(
        examples(TASKS["segmentation"], stored, x, 1), DenseRecipe((0.1,), 0.0, steps=300, batch=60), 0
    )
    other = LogisticRegression(C=1e6, tol=1e-8).fit(x.flatten(0, 1), drawn[:, 0])
    found = predict(x).flatten(0, 1).softmax(dim=1).numpy()
    np.testing.assert_allclose(found, other.predict_proba(x.flatten(0, 1)), atol=0.02)


def test_maps_are_enlarged_as_torch_does():
    values = noise(2, 6, 3)
    maps = values.transpose(1, 2).unflatten(2, (2, 3))
    for size in ((8, 12), (5, 7), (2, 3)):
        expected = interpolate(maps, size=size, mode="bilinear")
        torch.testing.assert_close(enlarged_maps(values, (2, 3), size), expected)


def test_scores_of_class_maps_made_by_hand():
    """Class 0: 2 right, 1 wrongly given; 1: 1 right, 1 missed; 2 is given once and never there; 3 plays no part."""
    task = Segmentation(4, ignored=255)
    truth, predicted = torch.tensor([[0, 0, 1], [1, 3, -1]]), torch.tensor([[0, 0, 1], [0, 2, 2]])
    truth[1, 1] = 0
    counts = task.counts(predicted, truth)
    found = task.score(counts)
    # class 0: 2 / (2 + 1 given wrongly + 1 missed), class 1: 1 / 2, class 2: 0 / 1
    assert float(found["miou"]) == pytest.approx((2 / 4 + 1 / 2 + 0) / 3)
    assert float(found["accuracy"]) == pytest.approx(3 / 5)
    assert float(found["miou"]) == pytest.approx(float(MulticlassJaccardIndex(4, ignore_index=-1)(predicted, truth)))


def test_scores_of_several_pictures_are_those_of_all_their_pixels():
    task = Segmentation(4, ignored=255)
    truth = task.truth(label_images("segmentation", 5, 6, 0))
    predicted = task.truth(label_images("segmentation", 5, 6, 1)).clamp(min=0)
    summed = task.score(sum(task.counts(p, t) for p, t in zip(predicted, truth, strict=True)))
    assert float(summed["miou"]) == pytest.approx(float(MulticlassJaccardIndex(4, ignore_index=-1)(predicted, truth)))


def test_scores_of_depths_and_normals_made_by_hand():
    depth = Depth(1000)
    truth = depth.truth(np.array([[[1000, 2000], [4000, 0]]], np.uint16))[0]
    found = depth.score(depth.counts(torch.tensor([[[1.5, 2.0], [4.4, 9.0]]]), truth))
    assert float(found["rmse"]) == pytest.approx(((0.25 + 0 + 0.16) / 3) ** 0.5)
    assert float(found["absrel"]) == pytest.approx((0.5 + 0 + 0.1) / 3) and float(found["delta"]) == pytest.approx(2 / 3)
    normals = Normals()
    stored = np.array([[[255, 128, 128], [128, 255, 128]], [[128, 128, 255], [128, 128, 128]]], np.uint8)  # x, y, z, nothing
    truth = normals.truth(stored[None])[0]
    predicted = normals.predict(torch.tensor([1.0, 1.0, 0.0])[:, None, None].expand(3, 2, 2))
    found = normals.score(normals.counts(predicted, truth))
    assert float(found["angle"]) == pytest.approx((45 + 45 + 90) / 3, abs=0.5)


def measured(name: str, train: np.ndarray, test: np.ndarray, x: torch.Tensor, x_test: torch.Tensor) -> dict:
    """Scores of both heads and of the constant, where a patch is a pixel."""
    task, recipe = TASKS[name], DenseRecipe((0.1,), 0.0, steps=150, batch=30)
    data, truth = examples(task, train, x, 1), list(task.truth(test))
    both = {"knn": neighbour_predictor(data, PatchNeighbours(2000, 5, 0.02), 0), "linear": linear_predictor(data, recipe, 0)[0]}
    counts = count_predictions(data, held_patches(x_test), truth, both, NOTHING_SHOWN)
    found = {head: scores_of(task, one, 0) for head, one in counts.items()}
    return found | {"constant": measured_constant(data, truth, 0)}


def answers(name: str, stored: np.ndarray) -> torch.Tensor:
    """The label itself as features (n, pixels, F), of cosines that tell any two labels apart."""
    if name == "segmentation":
        return torch.eye(5)[torch.from_numpy(stored.clip(max=4).astype(np.int64))].flatten(1, 2)
    truth = TASKS[name].truth(stored).flatten(2).transpose(1, 2)
    return truth if name == "normals" else torch.cat([truth, torch.ones_like(truth)], dim=2)


@pytest.mark.parametrize("name", TASKS)
def test_a_feature_that_is_the_label_gives_all_and_shuffled_labels_chance(name: str):
    train, test = label_images(name, 40, 8, 0), label_images(name, 20, 8, 1)
    perfect = measured(name, train, test, answers(name, train), answers(name, test))
    for score, about in TASKS[name].scores.items():
        slack = {"rmse": 0.02, "absrel": 0.01, "angle": 3.0}.get(score, 0)  # a bank has no twin of every depth or vector
        assert perfect["knn"][score]["value"] == pytest.approx(about.best, abs=slack)
        assert perfect["linear"][score]["value"] == pytest.approx(about.best, abs={"angle": 0.1}.get(score, 1e-4))
    order = np.random.default_rng(0).permutation(train.size // train.shape[-1] if name == "normals" else train.size)
    flat = train.reshape(len(order), -1)[order].reshape(train.shape)
    shuffled = measured(name, flat, test, answers(name, train), answers(name, test))
    for score, about in TASKS[name].scores.items():
        chance, slack = (
            shuffled["constant"][score],
            {"accuracy": 0.06, "miou": 0.12, "rmse": 0.15, "angle": 5.0}.get(score, 0.15),
        )
        for head in ("knn", "linear"):
            gain = (shuffled[head][score]["value"] - chance["value"]) * (1 if about.best else -1)
            assert gain < slack, (head, score)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Pictures whose accuracies differ: of 200 samples of 40 pictures, about 95 % of intervals hold the true one."""
    random, task, covered = np.random.default_rng(0), Segmentation(2), 0
    for _ in range(200):
        right = random.binomial(100, random.uniform(0.4, 1.0, 40))
        counts = torch.zeros(40, 2, 3, dtype=torch.float64)  # every pixel is of class 0
        counts[:, 0, 0], counts[:, 0, 2], counts[:, 1, 1] = (
            torch.from_numpy(v.astype(float)) for v in (right, 100 - right, 100 - right)
        )
        low, high = scores_of(task, counts.flatten(1), 0)["accuracy"]["ci95"]
        covered += low <= 0.7 <= high
    assert 180 <= covered <= 198


def test_what_cannot_be_fitted_is_said():
    stored = np.zeros((12, 4, 4), np.uint16)
    with pytest.raises(UserError, match="no pixel of the training label images has a value"):
        fit_ridge(examples(TASKS["depth"], stored, noise(12, 16), 1), 0)
    with pytest.raises(UserError, match="--k 30: the bank holds 16 patches"):
        neighbour_predictor(examples(TASKS["normals"], label_images("normals", 1, 4, 0), noise(1, 16), 1), PatchNeighbours(), 0)
    with pytest.raises(UserError, match="5 training pictures"):
        fit_ridge(examples(TASKS["depth"], stored[:5], noise(5, 16), 1), 0)
