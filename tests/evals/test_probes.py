"""Probes that measure what they say, and choose without the test set; the statistics they share."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from timm.optim import Lars
from torchmetrics.classification import MulticlassAccuracy

from fastjepa.errors import UserError
from fastjepa.evals import knn, linear
from fastjepa.evals.knn import Neighbours, knn_accuracy, knn_classify
from fastjepa.evals.linear import MIN_STEPS, MOMENTUM, PROTOCOLS, Recipe, fit_heads, linear_accuracy, moments, prepare_features
from fastjepa.evals.lowshot import logistic_accuracy
from fastjepa.evals.scoring import (
    CLASS_SHARE,
    PROBE_DRAW,
    TEST_DRAW,
    TRAIN_DRAW,
    Features,
    Result,
    score_predictions,
    stratified_subset,
    subset,
    validation_split,
    wilson_interval,
)
from fastjepa.rng import SPLIT_STREAM, generator
from tests.support.features import blobs


def shuffled(data: Features, seed: int = 5) -> Features:
    return Features(data.x, data.y[torch.randperm(len(data.y), generator=torch.Generator().manual_seed(seed))])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fifth of the probe's steps, where a test compares probes with each other."""
    monkeypatch.setattr(linear, "MIN_STEPS", 200)


@pytest.mark.parametrize(
    "hits, n, low, high",
    [(8, 10, 0.49016, 0.94331), (0, 10, 0.0, 0.27753), (10, 10, 0.72247, 1.0), (8400, 10000, 0.83268, 0.84706)],
)
def test_wilson_interval_has_its_known_values(hits: int, n: int, low: float, high: float):
    """scipy.stats.binomtest(hits, n).proportion_ci(method="wilson")."""
    assert wilson_interval(hits, n) == pytest.approx([low, high], abs=1e-5)


@given(st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_holds_the_share_and_stays_in_bounds(pair: tuple[int, int]):
    hits, n = pair
    low, high = wilson_interval(hits, n)
    assert 0 <= low <= hits / n <= high <= 1


@given(st.lists(st.integers(0, 5), min_size=1, max_size=200), st.integers(2, 10), st.integers(0, 3))
def test_validation_split_parts_every_class(labels: list[int], every: int, seed: int):
    y, counts = torch.tensor(labels), np.bincount(labels)
    if counts.max() < every:
        with pytest.raises(UserError, match="more training images"):
            validation_split(y, every, seed)
        return
    fit, held = validation_split(y, every, seed)
    assert sorted([*fit.tolist(), *held.tolist()]) == list(range(len(labels)))
    assert np.bincount(y[held], minlength=len(counts)).tolist() == (counts // every).tolist()


@given(st.integers(1, 300), st.integers(1, 400), st.integers(0, 3))
def test_subset_takes_at_most_that_many_and_keeps_the_order(total: int, count: int, seed: int):
    rows = subset(count, total, seed, TRAIN_DRAW)
    assert len(rows) == min(count, total) and np.all(np.diff(rows) > 0) and rows[-1] < total
    assert np.array_equal(subset(None, total, seed, TRAIN_DRAW), np.arange(total))


def test_subset_does_not_take_the_first_images():
    """Folders are sorted by class: the first thousand images may all be of one class."""
    rows = subset(100, 1000, 0, TRAIN_DRAW)
    assert 300 < rows.mean() < 700 and not np.array_equal(rows, subset(100, 1000, 0, TEST_DRAW))


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(1, 400), st.integers(0, 3))
def test_a_stratified_subset_gives_each_class_its_share_up_to_six_and_one_at_least(sizes: list[int], count: int, seed: int):
    y = np.repeat(7 * np.arange(len(sizes)), sizes)
    if count < min(len(sizes), len(y)):
        with pytest.raises(UserError, match=f"each class needs one: use {len(sizes)} or more"):
            stratified_subset(count, y, seed, TRAIN_DRAW)
        return
    rows = stratified_subset(count, y, seed, TRAIN_DRAW)
    assert len(rows) == min(count, len(y)) and np.all(np.diff(rows) > 0)
    drawn, due = np.bincount(y[rows] // 7, minlength=len(sizes)), np.clip(count * np.array(sizes) // len(y), 1, CLASS_SHARE)
    assert np.all(drawn >= 1) and (due.sum() > count or np.all(drawn >= np.minimum(due, sizes)))
    plain = subset(count, len(y), seed, TRAIN_DRAW)
    if np.all(np.bincount(y[plain] // 7, minlength=len(sizes)) >= np.minimum(due, sizes)):
        assert np.array_equal(rows, plain), "a random draw that has enough of each class is kept"


@pytest.mark.parametrize("n", [2000, 10000])
def test_large_subsets_of_balanced_classes_are_those_that_are_drawn_at_random(n: int):
    """As before classes counted: 10,000 of Fashion-MNIST are the images of the README's table."""
    y = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 6000))
    assert np.array_equal(stratified_subset(n, y, 0, TRAIN_DRAW), subset(n, 60000, 0, TRAIN_DRAW))


def test_small_subsets_of_many_classes_have_as_many_of_each():
    y = np.repeat(np.arange(1000), 13)
    for count in (1000, 3000, 6000):
        assert np.bincount(y[stratified_subset(count, y, 0, TRAIN_DRAW)]).tolist() == [count // 1000] * 1000
    with pytest.raises(UserError, match="999 training images of 1000 classes"):
        stratified_subset(999, y, 0, TRAIN_DRAW)


@pytest.mark.parametrize(
    "train, test, classes, message",
    [
        ([1, 1, 1], [1], 2, "at least two"),
        ([0, 1], [2], 3, "test class 2 has no training image"),
        ([0, 3], [0], 2, "label 3 in data of 2 classes"),
        ([], [0], 2, "needs both"),
    ],
)
def test_labels_that_cannot_be_compared_are_refused(train: list[int], test: list[int], classes: int, message: str):
    sets = [Features(torch.zeros(len(y), 2), torch.tensor(y, dtype=torch.int64)) for y in (train, test)]
    for probe in (knn_accuracy, linear_accuracy):
        with pytest.raises(UserError, match=message):
            probe(*sets, classes)


def vote(train: Features, query: torch.Tensor, classes: int, k: int) -> int:
    """Weighted k-NN of one sample, in float64 and in words."""
    cosine = lambda a, b: float(a @ b) / (float(a.norm()) * float(b.norm()))  # noqa: E731
    scored = sorted(((cosine(x, query), int(y)) for x, y in zip(train.x.double(), train.y, strict=True)), reverse=True)
    votes = [0.0] * classes
    for similarity, label in scored[:k]:
        votes[label] += math.exp(similarity / 0.1)
    return votes.index(max(votes))


@pytest.mark.parametrize("k", [1, 7, 60])
def test_knn_equals_a_loop_over_samples(monkeypatch: pytest.MonkeyPatch, k: int):
    monkeypatch.setattr(knn, "QUERIES_A_BLOCK", 16)
    monkeypatch.setattr(knn, "BANK_A_BLOCK", 23)  # several uneven blocks, k on either side of one
    train, test = blobs(100, spread=1.5), blobs(50, spread=1.5, seed=1)
    expected = [vote(train, query.double(), 4, k) for query in test.x]
    assert knn_classify(train, test.x, 4, (k,))[0].tolist() == expected
    hits = sum(a == b for a, b in zip(expected, test.y.tolist(), strict=True))
    result = knn_accuracy(train, test, 4, vote=Neighbours(k))
    assert result.accuracy == hits / 50 and result.ci95 == wilson_interval(hits, 50) and result.chosen["k"] == k


@pytest.mark.parametrize("k, temperature", [(1, 0.1), (20, 0.1), (200, 0.1), (20, 1.0)])
def test_knn_equals_scikit_learn(k: int, temperature: float):
    train, test = blobs(400, spread=1.5), blobs(200, spread=1.5, seed=1)
    votes = lambda distance: np.exp((1 - distance) / temperature)  # noqa: E731
    other = KNeighborsClassifier(k, weights=votes, metric="cosine", algorithm="brute")
    expected = other.fit(train.x.double().numpy(), train.y.numpy()).predict(test.x.double().numpy())
    found = knn_classify(train, test.x, 4, (k,), temperature=temperature)[0]
    assert found.tolist() == expected.tolist()
    assert knn_accuracy(train, test, 4, vote=Neighbours(k, temperature)).accuracy == float((expected == test.y.numpy()).mean())


def test_knn_takes_any_temperature_above_zero():
    """exp(1 / 0.001) is beyond fp32; as the temperature falls, the nearest alone decides."""
    train, test = blobs(200, spread=1.5), blobs(50, spread=1.5, seed=1)
    cold = knn_classify(train, test.x, 4, (20,), temperature=1e-6)
    assert torch.equal(cold, knn_classify(train, test.x, 4, (1,)))
    with pytest.raises(UserError, match="temperature 0"):
        knn_accuracy(train, test, 4, vote=Neighbours(temperature=0))


def test_accuracy_equals_torchmetrics():
    train, test = blobs(200), blobs(150, spread=2.0, seed=1)
    predicted = knn_classify(train, test.x, 4, (10,))[0]
    metric = MulticlassAccuracy(num_classes=4, average="micro")
    assert score_predictions(predicted, train, test, {}, None).accuracy == pytest.approx(
        float(metric(predicted, test.y)), abs=1e-7
    )


def test_knn_answers_for_several_k_at_once_as_for_each_alone():
    train, test = blobs(300, spread=2.0), blobs(80, spread=2.0, seed=1)
    together = knn_classify(train, test.x, 4, (1, 10, 200))
    alone = torch.cat([knn_classify(train, test.x, 4, (k,)) for k in (1, 10, 200)])
    assert torch.equal(together, alone) and not torch.equal(alone[0], alone[2])


def test_knn_does_not_see_the_length_of_features():
    train, test = blobs(200, spread=1.0), blobs(50, spread=1.0, seed=1)
    longer = Features(train.x * torch.linspace(0.1, 50, 200)[:, None], train.y)
    assert torch.equal(knn_classify(train, test.x, 4, (10,)), knn_classify(longer, test.x, 4, (10,)))


def test_knn_refuses_more_neighbours_than_images():
    with pytest.raises(UserError, match="k = 41 neighbours among 40"):
        knn_accuracy(blobs(40), blobs(8), 4, vote=Neighbours(41))
    assert knn_accuracy(blobs(40), blobs(8), 4).chosen["k"] <= 32  # the grid shrinks to what the fitting images allow


def test_linear_probe_separates_what_is_separable():
    result = linear_accuracy(blobs(600), blobs(300, seed=1), 4)
    assert result.accuracy > 0.99 and result.n_train == 600 and result.n_test == 300


def lars(train: Features, test: Features, classes: int) -> Result:
    """The ImageNet protocol, its batch and rates to the measure of small data."""
    recipe = dataclasses.replace(PROTOCOLS["imagenet"], batch=256, lrs=(0.1, 30.0))
    return linear_accuracy(train, test, classes, recipe=recipe)


@pytest.mark.parametrize("probe", [knn_accuracy, linear_accuracy, lars, logistic_accuracy])
def test_permuted_labels_leave_chance(probe, quick: None):
    """Chance is 0.25; the bound is five standard deviations at 800 test images."""
    result = probe(shuffled(blobs(800, spread=100.0)), blobs(800, spread=100.0, seed=1), 4)  # no clusters: images err alone
    assert abs(result.accuracy - 0.25) < 0.08


@pytest.mark.parametrize("name", ["tiny", "huge", "collapsed", "one dead dimension"])
def test_linear_probe_does_not_depend_on_the_scale_of_features(name: str, quick: None):
    change = {
        "tiny": lambda x: x * 1e-9,
        "huge": lambda x: x * 1e6,
        "collapsed": lambda x: x * 1e-3 + 10,  # all but constant, as the features of a network that is sinking
        "one dead dimension": lambda x: torch.cat([x, torch.full_like(x[:, :1], 0.1)], dim=1),
    }[name]
    train, test = blobs(600, spread=1.0), blobs(300, spread=1.0, seed=1)
    healthy = linear_accuracy(train, test, 4)
    changed = linear_accuracy(Features(change(train.x), train.y), Features(change(test.x), test.y), 4)
    assert abs(changed.accuracy - healthy.accuracy) < 0.01 and healthy.accuracy > 0.7


@pytest.mark.parametrize("batch_norm", [True, False])
def test_standardise_uses_training_statistics_and_silences_rounding(batch_norm: bool):
    train, other = blobs(500).x * torch.arange(1, 9) + 3, blobs(100, seed=1).x
    dead = torch.full((1,), 0.1)
    x, y = (torch.cat([x, dead.expand(len(x), 1)], 1) for x in (train, other))
    mean, reciprocal = moments(x, batch_norm)
    x, y = (x - mean) * reciprocal, (y - mean) * reciprocal
    spread = train.std(0, correction=0)
    scale = spread if batch_norm else (spread.square().sum() / 9).sqrt()
    assert torch.allclose(x[:, :8], (train - train.mean(0)) / scale, atol=1e-4)
    assert torch.allclose(y[:, :8], (other - train.mean(0)) / scale, atol=1e-4)
    assert x[:, 8].abs().max() == 0 and y[:, 8].abs().max() == 0


def test_batch_norm_mends_features_of_unequal_scale(quick: None):
    train, test = blobs(600, spread=1.0), blobs(300, spread=1.0, seed=1)
    noise = 1e4 * torch.randn(900, 1, generator=torch.Generator().manual_seed(0))
    noisy = [Features(torch.cat((f.x, n), 1), f.y) for f, n in ((train, noise[:600]), (test, noise[600:]))]
    plain, mended = (linear_accuracy(*noisy, 4, recipe=Recipe(batch_norm=flag)).accuracy for flag in (False, True))
    assert mended > 0.7 > plain


def test_heads_trained_together_equal_heads_trained_alone_by_torch():
    """The closed-form batched SGD against autograd and torch.optim.SGD, head by head, a diverging one among them."""
    data, grid = blobs(90, spread=1.0), [(0.1, 0.0), (1e3, 1e3), (0.03, 0.1)]
    weight, bias = fit_heads(data.x, data.y, 4, grid, seed=3)
    total = MIN_STEPS
    assert not weight.view(8, 3, 4)[:, 1].isfinite().all()
    for head in (0, 2):
        lr, decay = grid[head]
        alone = torch.nn.Linear(8, 4)
        torch.nn.init.zeros_(alone.weight), torch.nn.init.zeros_(alone.bias)
        groups = [{"params": [alone.weight], "weight_decay": decay}, {"params": [alone.bias], "weight_decay": 0.0}]
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=MOMENTUM)
        for step in range(total):  # 90 images are one batch
            for group in optimizer.param_groups:
                group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / total))
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(alone(data.x), data.y).backward()
            optimizer.step()
        assert torch.allclose(weight.view(8, 3, 4)[:, head], alone.weight.T, atol=1e-4)
        assert torch.allclose(bias.view(3, 4)[head], alone.bias, atol=1e-4)


def test_linear_heads_reach_the_optimum_that_scikit_learn_finds():
    """The same objective: mean cross-entropy + decay / 2 |w|^2 is C = 1 / (decay n) there."""
    data, queries = blobs(250, spread=1.5), blobs(300, spread=1.5, seed=1).x
    for decay in (0.01, 0.1):
        weight, bias = fit_heads(data.x, data.y, 4, [(0.1, decay)], seed=0)
        other = LogisticRegression(C=1 / (decay * 250), tol=1e-8, max_iter=1000).fit(data.x.numpy(), data.y.numpy())
        assert np.allclose(weight.T - weight.mean(dim=1), other.coef_, atol=2e-3)
        ours = (queries @ weight + bias).softmax(dim=1).numpy()
        assert np.allclose(ours, other.predict_proba(queries.numpy()), atol=2e-3)


@pytest.mark.parametrize("protocol", ["imagenet", "cifar100"])
def test_published_heads_trained_together_equal_heads_trained_alone(protocol: str):
    """LARS of timm and Nesterov SGD of torch, head by head, on two views in turn, with the published drops."""
    recipe = dataclasses.replace(PROTOCOLS[protocol], batch=40, epochs=8, drops=(3, 6))
    views, y = torch.stack([blobs(90).x, blobs(90, seed=1).x]), blobs(90).y
    grid = [(0.5, 0.0), (0.05, 0.1)] if protocol == "cifar100" else [(100.0, 0.0), (30.0, 5.0)]  # LARS: a thousandth of |w|
    weight, bias = fit_heads(views, y, 4, grid, seed=3, recipe=recipe)
    for head, (lr, decay) in enumerate(grid):
        alone = torch.nn.Linear(8, 4)
        alone.weight.data = 0.01 * torch.randn(8, 4, generator=torch.Generator().manual_seed(3)).T
        torch.nn.init.zeros_(alone.bias)
        groups = [{"params": [alone.weight], "weight_decay": decay}, {"params": [alone.bias], "weight_decay": 0.0}]
        own = {"always_adapt": True} if protocol == "imagenet" else {"nesterov": True}
        optimizer = (Lars if protocol == "imagenet" else torch.optim.SGD)(groups, lr=lr, momentum=0.9, **own)
        for epoch in range(8):
            for group in optimizer.param_groups:
                group["lr"] = lr * 40 / 256 * (1, 0.1, 0.01)[(epoch >= 3) + (epoch >= 6)]
            for rows in torch.from_numpy(generator(3, SPLIT_STREAM, PROBE_DRAW + epoch).permutation(90)).split(40):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(alone(views[epoch % 2, rows]), y[rows]).backward()
                optimizer.step()
        assert torch.allclose(weight.view(8, 2, 4)[:, head], alone.weight.T, atol=1e-5)
        assert torch.allclose(bias.view(2, 4)[head], alone.bias, atol=1e-5)


def test_published_linear_heads_see_features_as_they_come():
    """And batch norm + linear does not: the paper's two heads."""
    train, test = blobs(100), blobs(30, seed=1).x
    recipe = PROTOCOLS["places205"]
    x, other = prepare_features(train, test, recipe)
    assert torch.equal(x[0], train.x) and torch.equal(other, test)
    x, _ = prepare_features(train, test, dataclasses.replace(recipe, batch_norm=True))
    assert torch.allclose(x[0].std(dim=0, correction=0), torch.ones(8), atol=1e-5)


def test_a_grid_of_one_is_not_chosen_and_keeps_every_image(capsys: pytest.CaptureFixture):
    result = linear_accuracy(blobs(60), blobs(40, seed=1), 4, recipe=PROTOCOLS["cifar100"])
    assert result.validation_accuracy is None and result.chosen == {"lr": 0.01, "weight_decay": 5e-4}
    assert "60 training images make 28 steps" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("probe", [knn_accuracy, linear_accuracy, lars, logistic_accuracy])
def test_test_labels_do_not_touch_the_choice(probe, quick: None):
    """Wrong test labels change the accuracy and nothing else."""
    train, test = blobs(400, spread=1.2), blobs(200, spread=1.2, seed=1)
    right, wrong = probe(train, test, 4), probe(train, shuffled(test), 4)
    assert right.chosen == wrong.chosen and right.validation_accuracy == wrong.validation_accuracy
    assert right.accuracy > wrong.accuracy + 0.2


@pytest.mark.parametrize("probe", [knn_accuracy, linear_accuracy, logistic_accuracy])
def test_images_that_choose_are_not_fitted(probe, quick: None):
    """In 500 dimensions every probe knows by heart what it was fitted on, whatever its labels."""
    train, test = (Features(torch.randn(n, 500, generator=torch.Generator().manual_seed(n)), blobs(n).y) for n in (300, 100))
    assert probe(train, train, 4).accuracy > 0.9
    assert probe(train, test, 4).validation_accuracy < 0.5  # chance is 0.25, of 50 or 60 images


@pytest.mark.parametrize("probe", [knn_accuracy, linear_accuracy])
def test_same_seed_same_result(probe, quick: None):
    train, test = blobs(300, spread=1.2), blobs(200, spread=1.2, seed=1)
    assert probe(train, test, 4, seed=1) == probe(train, test, 4, seed=1)
    assert set(probe(train, test, 4).to_dict()) >= {"accuracy", "ci95", "n_train", "n_test", "chosen"}
