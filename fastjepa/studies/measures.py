"""Measures of a study: the numbers of a row that its table shows, and the one that arms are ranked by."""

from typing import Any, NamedTuple


class Measure(NamedTuple):
    """Number that arms are compared by: a column of a study's table."""

    key: str  # the place in a row: probe.knn.accuracy is row["probe"]["knn"]["accuracy"]
    title: str
    about: str = ""  # said below the table
    factor: float = 100.0  # from the row's number to the table's
    form: str = ".1f"
    spread: bool = True  # whether the standard deviation over seeds is shown

    def of(self, row: dict[str, Any]) -> float | None:
        """Return the number as it is shown; None where the row has none."""
        found = looked_up(row, self.key)
        return None if found is None else self.factor * found


def looked_up(row: dict[str, Any], key: str) -> Any:
    """Return what lies at a key of names with dots between; None where there is no such place."""
    found: Any = row
    for name in key.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found


class Measures(NamedTuple):
    """All columns of a table, the one that arms are ranked by, and where a row says on how many images it rests."""

    columns: tuple[Measure, ...]
    ranked: Measure
    tested: str
    unit: str  # of the numbers without an `about`
    over_minutes: tuple[Measure, ...]  # drawn against the length of training, a panel each


KNN = Measure("probe.knn.accuracy", "k-NN")
BN_LINEAR = Measure("probe.linear_bn.accuracy", "BN + linear")  # its features are conditioned alike
OF_IMAGES = Measures(
    (KNN, Measure("probe.linear.accuracy", "linear"), BN_LINEAR,
     Measure("probe.effective_rank", "rank", "effective rank of the features", 1, spread=False),
     Measure("shares.common", "common", "what all tokens share of their energy, layer-normalised as targets are, in %",
             form=".0f", spread=False)),
    BN_LINEAR, "probe.linear_bn.n_test", "Accuracy in %", (KNN, BN_LINEAR))  # fmt: skip
DENSE_LINEAR = Measure(
    "dense.segmentation.linear.miou.value", "segmentation: linear", "mean intersection over union of shapes, in %"
)
OF_PIXELS = Measures(
    (Measure("dense.segmentation.knn.miou.value", "segmentation: k-NN"), DENSE_LINEAR,
     Measure("dense.depth.knn.rmse.value", "depth: k-NN", factor=1, form=".2f"),
     Measure("dense.depth.linear.rmse.value", "depth: linear", "root mean square error, in the scene's units", 1, ".2f"),
     Measure("counting.accuracy", "counting", "accuracy of the number of objects, on the whole test split, in %")),
    DENSE_LINEAR, "dense.segmentation.n_test", "", (DENSE_LINEAR,))  # fmt: skip
