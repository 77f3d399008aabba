"""k-NN and linear probes beside scikit-learn's and lightly's: `python benchmarks/evals.py --n-train 5000`.

All take the same features, of `--classes` Gaussian classes, in turns; the accuracy stands beside the time, as the probes are
not the same algorithm. Our probe at its default trains 24 heads and chooses among them on images kept out; scikit-learn's
logistic regression is one head, and so is the row `one head`.
"""

import argparse
import sys
from collections.abc import Callable

import numpy as np
import timing
import torch
from options import make_parser, run_script
from timing import Spread
from torch import Tensor
from torch.nn.functional import normalize

from fastjepa.cli.options import positive_int
from fastjepa.errors import UserError
from fastjepa.evals.knn import QUERIES_A_BLOCK, TEMPERATURE, Neighbours, knn_accuracy
from fastjepa.evals.linear import Recipe, linear_accuracy
from fastjepa.evals.scoring import Features

K = 20
EXAMPLES = """examples:
  python benchmarks/evals.py --n-train 5000 --n-test 1000 --json"""


def gaussian_classes(options: argparse.Namespace) -> tuple[Features, Features]:
    """Draw training and test features around the same means; probes of them are neither perfect nor at chance."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(options.classes, options.width, generator=generator)
    sets, noise = [], options.width**0.5 / 3
    for count in (options.n_train, options.n_test):
        y = torch.arange(count) % options.classes
        sets.append(Features(means[y] + noise * torch.randn(count, options.width, generator=generator), y))
    return sets[0], sets[1]


def contenders(train: Features, test: Features, classes: int) -> dict[tuple[str, str], Callable[[int], float]]:
    """Return {(evaluation, library): its accuracy}; each is called with the number of a round."""
    try:
        from lightly.utils.benchmarking.knn import knn_predict
        from sklearn.linear_model import LogisticRegression
        from sklearn.neighbors import KNeighborsClassifier
    except ImportError as error:
        raise UserError(f"the peers of our evaluations are missing ({error}); pip install 'fastjepa[bench,eval]'") from error

    def lightly_knn() -> Tensor:
        bank = normalize(train.x).T
        found = [knn_predict(x, bank, train.y, classes, K, TEMPERATURE) for x in normalize(test.x).split(QUERIES_A_BLOCK)]
        return torch.cat(found)[:, 0]

    def sklearn(model) -> Tensor:
        return torch.from_numpy(model.fit(train.x.numpy(), train.y.numpy()).predict(test.x.numpy()))

    def accuracy(predicted: Tensor) -> float:
        return float((predicted == test.y).double().mean())

    one_head, vote = Recipe(lrs=(0.1,), weight_decays=(0.0,)), lambda distance: np.exp((1 - distance) / TEMPERATURE)
    return {
        ("k-NN", "fastjepa"): lambda n: knn_accuracy(train, test, classes, vote=Neighbours(K)).accuracy,
        ("k-NN", "lightly"): lambda n: accuracy(lightly_knn()),
        ("k-NN", "scikit-learn"): lambda n: accuracy(sklearn(KNeighborsClassifier(K, weights=vote, metric="cosine"))),
        ("linear", "fastjepa"): lambda n: linear_accuracy(train, test, classes).accuracy,
        ("linear", "fastjepa, one head"): lambda n: linear_accuracy(train, test, classes, recipe=one_head).accuracy,
        ("linear", "scikit-learn"): lambda n: accuracy(sklearn(LogisticRegression(max_iter=1000))),
    }


def measure_asked(options: argparse.Namespace) -> list[dict]:
    torch.set_num_threads(options.threads or torch.get_num_threads())
    runs, reached = contenders(*gaussian_classes(options), options.classes), {}
    keep = {name: lambda n, name=name, run=run: reached.update({name: run(n)}) for name, run in runs.items()}
    seconds = timing.interleave(keep, options.rounds, torch.device("cpu"))
    rows = []
    for (evaluation, library), taken in seconds.items():
        row = {"evaluation": evaluation, "library": library, "n": len(taken), "accuracy": reached[evaluation, library]}
        row |= {"ms": Spread.of([1000 * s for s in taken])._asdict()}
        if library != "fastjepa":
            row |= {"ratio": timing.paired_ratio(seconds[evaluation, "fastjepa"], taken)._asdict()}
        rows.append(row | {"train": options.n_train, "test": options.n_test, "width": options.width})
    return rows


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser("Time k-NN and linear probes beside other libraries'.", EXAMPLES, threads=None, rounds=5)
    for name, default in (("n-train", 5000), ("n-test", 1000), ("classes", 100), ("width", 384)):
        parser.add_argument(f"--{name}", type=positive_int, default=default, help=f"default {default}")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return run_script("evals.py", parse_options(argv), measure_asked)


if __name__ == "__main__":
    sys.exit(main())
