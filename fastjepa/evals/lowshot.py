"""Few labels: a share of each class, or a published list of images; logistic regression on frozen features, or fine-tuning."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastjepa.data.sources import Source
from fastjepa.errors import UserError
from fastjepa.evals.finetune import FinetuneOptions, finetune_accuracy
from fastjepa.evals.held_out import labels_of
from fastjepa.evals.images import watched
from fastjepa.evals.inputs import Split, provenance
from fastjepa.evals.linear import standardise
from fastjepa.evals.request import EvalRequest
from fastjepa.evals.scoring import (
    LABELLED_DRAW,
    Features,
    Result,
    check_labels,
    choose_setting,
    places_in_class,
    score_predictions,
)
from fastjepa.rng import SPLIT_STREAM, generator

CS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1e3)
ITERATIONS = 1000


@dataclass(frozen=True)
class LowshotOptions:
    """The labelled images, and the method that learns from them."""

    method: Literal["logistic", "finetune"] = "logistic"  # regression on frozen features, or fine-tuning
    fraction: float = 0.01  # share of each class, drawn by the request's seed
    split_file: str | Path | None = None  # in its place a list of images, such as SimCLR's 1percent.txt of ImageNet
    c: float | None = None  # of logistic: the inverse regularisation; None: chosen on training images
    finetune: FinetuneOptions = FinetuneOptions()  # of finetune


def fraction_of(source: Source, fraction: float, seed: int) -> np.ndarray:
    """Draw a share of each class by `seed`, rounded, at least one image; return rising rows."""
    if not 0 < fraction <= 1:
        raise UserError(f"--fraction {fraction:g}: give a share above 0 and at most 1, such as 0.01")
    y = labels_of(source)
    order = generator(seed, SPLIT_STREAM, LABELLED_DRAW).permutation(len(y))
    order = order[y[order] >= 0]
    wanted = np.maximum(1, np.round(fraction * np.bincount(y[order])))
    return np.sort(order[places_in_class(y[order]) < wanted[y[order]]])


def listed_images(source: Source, file: str | Path) -> np.ndarray:
    """Return rising rows of the images whose names stand in `file`, one a line, as names or as paths' ends (class/name.jpg).

    UserError for a name that no image has, or several have.
    """
    try:
        names = [line.strip().strip("/") for line in Path(file).read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as a list of image names ({error})") from error
    if not names:
        raise UserError(f"{file}: names no images; write one a line")
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
            raise UserError(f"{file}: {name}: {count or 'no'} images of the training split have this name; {remedy}")
    return np.array(sorted({found[name][0] for name in names}))


def logistic_accuracy(train: Features, test: Features, classes: int, seed: int = 0, c: float | None = None) -> Result:
    """Measure scikit-learn's L2-regularised logistic regression on centred features of mean square 1.

    Without `c`, the best of CS on a fifth of the training images is taken; the test images never take part in the choice.
    """
    check_labels(train, test, classes)

    def attempt(fit: Tensor, held: Tensor) -> dict[float, Tensor]:
        x, x_held = standardise(train.x[fit], train.x[held])
        return {c: _predict_classes(x, train.y[fit], x_held, c) for c in watched(CS, "logistic regression")}

    validation_accuracy = None
    if c is None:
        c, validation_accuracy = choose_setting(train.y, 5, seed, attempt, remedy=", or give --c")
    x, x_test = standardise(train.x, test.x)
    return score_predictions(_predict_classes(x, train.y, x_test, c), train, test, {"c": c}, validation_accuracy)


def _predict_classes(x: Tensor, y: Tensor, queries: Tensor, c: float) -> Tensor:
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise UserError("logistic regression needs scikit-learn; run: pip install 'fastjepa[eval]'") from error
    fitted = LogisticRegression(C=c, max_iter=ITERATIONS).fit(x.numpy(), y.numpy())
    return torch.from_numpy(fitted.predict(queries.numpy()))


def _check_method(options: LowshotOptions, layers: str) -> None:
    """Raise UserError for options of the other method."""
    if options.method == "logistic":
        odd = [name for name, value in dataclasses.asdict(options.finetune).items() if value is not None]
    else:
        odd = ["c"] * (options.c is not None) + ["layers"] * (layers != "last")
    if odd:
        other = f"has no use for {', '.join(odd)}: leave it out, or choose the other method"
        raise UserError(f"--method {options.method} {other}")


def evaluate_lowshot(request: EvalRequest, options: LowshotOptions = LowshotOptions()) -> dict[str, Any]:
    """Learn from few labels and return the row that `fastjepa eval lowshot` prints; `n_train` of the request plays no part."""
    _check_method(options, request.layers)
    train, test = dataclasses.replace(request, n_train=None).splits()
    if options.split_file is None:
        rows, share = fraction_of(train.source, options.fraction, request.seed), {"fraction": options.fraction}
    else:
        rows, share = listed_images(train.source, options.split_file), {"split_file": str(options.split_file)}
    splits, subject = (Split(train.data, train.name, train.source, rows), test), request.subject()
    if options.method == "logistic":
        features = subject.features(request.encoder, splits, request.layers)
        result = logistic_accuracy(*features, len(train.source.classes), request.seed, options.c)
        used = {"layers": request.layers}
    else:
        encoder = subject.encoder(request.encoder, splits[0])
        result, used = finetune_accuracy(subject, encoder, splits, options.finetune, request.seed)
    said = {"probe": "lowshot", "protocol": options.method, **share, **used}
    return provenance(subject, request.encoder, splits, request.seed) | said | result.to_dict()
