"""Few labels: a share of each class, or a published list of images; logistic regression on frozen features, or fine-tuning."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastjepa.data.sources import Source
from fastjepa.errors import ConfigError
from fastjepa.evals.features import Layers
from fastjepa.evals.finetune import finetune_accuracy
from fastjepa.evals.images import watched
from fastjepa.evals.inputs import Split, open_splits, open_subject, provenance
from fastjepa.evals.linear import standardise
from fastjepa.evals.scoring import LABELLED_DRAW, Features, Result, check_labels, score_predictions, validation_split
from fastjepa.rng import SPLIT_STREAM, generator
from fastjepa.weights.encoders import Which

CS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1e3)
ITERATIONS = 1000


def fraction_of(source: Source, fraction: float, seed: int) -> np.ndarray:
    """Rising rows of a share of each class, rounded, at least one image; drawn by `seed`."""
    if not 0 < fraction <= 1:
        raise ConfigError(f"--fraction {fraction:g}: give a share above 0 and at most 1, such as 0.01")
    y = _labels_of(source)
    order = generator(seed, SPLIT_STREAM, LABELLED_DRAW).permutation(len(y))
    by_class = order[np.argsort(y[order], kind="stable")]
    counts = np.bincount(y)
    rank = np.arange(len(y)) - np.repeat(np.cumsum(counts) - counts, counts)
    wanted = np.maximum(1, np.round(fraction * counts))
    return np.sort(by_class[rank < np.repeat(wanted, counts)])


def listed_images(source: Source, file: str | Path) -> np.ndarray:
    """Rising rows of the images whose names stand in `file`, one a line, as file names or as paths' ends (class/name.jpg).

    ConfigError for a name that no image has, or several have.
    """
    try:
        names = [line.strip().strip("/") for line in Path(file).read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read as a list of image names ({error})") from error
    if not names:
        raise ConfigError(f"{file}: names no images; write one a line")
    deepest = max(name.count("/") for name in names) + 1
    found: dict[str, list[int]] = {}
    for row in range(len(source)):
        parts = source.name(row).split("/")
        for depth in range(1, deepest + 1):
            found.setdefault("/".join(parts[-depth:]), []).append(row)
    for name in names:
        if len(found.get(name, ())) != 1:
            count = len(found.get(name, ()))
            remedy = "write them as class/name" if count else "is it a list of this data set?"
            raise ConfigError(f"{file}: {name}: {count or 'no'} images of the training split have this name; {remedy}")
    return np.array(sorted({found[name][0] for name in names}))


def logistic_accuracy(
    train: Features,
    test: Features,
    classes: int,
    seed: int = 0,
    c: float | None = None,
) -> Result:
    """Accuracy of scikit-learn's L2-regularised logistic regression on centred features of mean square 1.

    Without `c`, the best of CS on a fifth of the training images; the test images never take part in the choice.
    """
    check_labels(train, test, classes)
    validation_accuracy = None
    if c is None:
        c, validation_accuracy = choose_c(train, seed)
    x, x_test = standardise(train.x, test.x, batch_norm=False)
    return score_predictions(_predict_classes(x, train.y, x_test, c), train, test, {"c": c}, validation_accuracy)


def choose_c(train: Features, seed: int) -> tuple[float, float]:
    """The C of CS that does best on a fifth of the training images, and its accuracy there."""
    rows, held = _labelled_split(train.y, seed)
    x, x_held = standardise(train.x[rows], train.x[held], batch_norm=False)
    predicted = torch.stack([_predict_classes(x, train.y[rows], x_held, c) for c in watched(CS, "logistic regression")])
    accuracy = (predicted == train.y[held]).double().mean(dim=1)
    best = int(accuracy.argmax())
    return CS[best], float(accuracy[best])


def _labelled_split(y: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    try:
        return validation_split(y, 5, seed)
    except ConfigError as error:
        raise ConfigError(f"{error}, or give --c") from error


def _predict_classes(x: Tensor, y: Tensor, queries: Tensor, c: float) -> Tensor:
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ConfigError("logistic regression needs scikit-learn; run: pip install 'fastjepa[eval]'") from error
    fitted = LogisticRegression(C=c, max_iter=ITERATIONS).fit(x.numpy(), y.numpy())
    return torch.from_numpy(fitted.predict(queries.numpy()))


def _labels_of(source: Source) -> np.ndarray:
    found = [source.label(row) for row in range(len(source))]
    if None in found:
        raise ConfigError(f"{source.name(found.index(None))}: has no label; put the images into one folder per class")
    return np.array(found, dtype=np.int64)


def _check_method(method: str, layers: str, c: float | None, setting: dict[str, Any]) -> None:
    """ConfigError for what the other method takes."""
    odd = [name for name, value in setting.items() if value is not None] if method == "logistic" else []
    if method == "finetune":
        odd = ["c"] * (c is not None) + ["layers"] * (layers != "last")
    if odd:
        raise ConfigError(f"--method {method} has no use for {', '.join(odd)}: leave it out, or choose the other method")


def evaluate_lowshot(
    checkpoint: str | Path,
    data: str,
    encoder: Which = "target",
    n_test: int | None = None,
    device: str = "auto",
    cache: bool = True,
    seed: int = 0,
    *,
    method: Literal["logistic_accuracy", "finetune_accuracy"] = "logistic",
    fraction: float = 0.01,
    split_file: str | Path | None = None,
    layers: Layers = "last",
    image_size: int | None = None,
    c: float | None = None,
    **setting: Any,
) -> dict[str, Any]:
    """Few labels: what `fastjepa eval lowshot` prints; arguments and row as of `table.run`.

    Args:
        method: "logistic", regression on frozen features, or "finetune"; `c` is of the one, `setting` of the other.
        fraction: share of each class, drawn by `seed`; or
        split_file: a list of images, such as SimCLR's 1percent.txt of ImageNet.
    """
    _check_method(method, layers, c, setting)
    train, test = open_splits(data, None, n_test, seed)
    rows = fraction_of(train.source, fraction, seed) if split_file is None else listed_images(train.source, split_file)
    splits = Split(train.data, train.name, train.source, rows), test
    subject = open_subject(checkpoint, device, cache, image_size)
    if method == "logistic":
        features = subject.features(encoder, splits, layers)
        result, used = logistic_accuracy(*features, len(train.source.classes), seed, c), {"layers": layers}
    else:
        result, used = finetune_accuracy(subject, subject.encoder(encoder, splits[0]), splits, seed=seed, **setting)
    share = {"fraction": fraction} if split_file is None else {"split_file": str(split_file)}
    said = {"probe": "lowshot", "protocol": method, **share, **used}
    return provenance(subject, encoder, splits, seed) | said | result.to_dict()
