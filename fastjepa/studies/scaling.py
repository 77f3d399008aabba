"""Study of accuracy against FLOPs and hours over model size, share of the data and epochs, with the power law through it.

Targets are normalised over the batch, which of all single changes learns most on small data: the study asks how that scales.
"""

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastjepa.errors import UserError
from fastjepa.studies.arm import Arm
from fastjepa.studies.small_data import OVER_THE_BATCH

SCALING_PAPER = "none at this scale"

SCALING_SIZES = {
    "S": ("meta.embed_dim=48", "meta.depth=3", "meta.num_heads=2", "meta.pred_emb_dim=24"),
    "M": (),
    "L": ("meta.embed_dim=96", "meta.depth=6", "meta.num_heads=3", "meta.pred_emb_dim=48"),
}
SCALING_ARMS = tuple(
    Arm(f"{size}, {fraction:.0%} of the data, budget x {length:g}", f"size {size}",
        (*OVER_THE_BATCH, *overrides), length=length, fraction=fraction)
    for size, overrides in SCALING_SIZES.items() for fraction, length in ((1.0, 0.5), (1.0, 1.0), (1.0, 2.0), (0.1, 1.0))
)  # fmt: skip


def scaling_law(flops: np.ndarray, floor: float, scale: float, exponent: float) -> np.ndarray:
    """Return the error as a share after `flops`: a power of them above a floor."""
    return floor + scale * (flops / 1e12) ** -exponent


def fit_law(flops: Sequence[float], error: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Fit by least squares; return (floor, scale, exponent) and the residuals, in the order of the points."""
    try:
        from scipy.optimize import curve_fit
    except ImportError as missing:
        raise UserError(f"the fitted curve needs scipy ({missing}); pip install 'fastjepa[studies]'") from missing
    x, y = np.asarray(flops, float), np.asarray(error, float)
    found, _ = curve_fit(scaling_law, x, y, p0=(0.5 * y.min(), 0.5, 0.2), bounds=((0, 0, 0), (1, np.inf, 5)), max_nfev=20_000)
    return found, y - scaling_law(x, *found)


def law_points(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[float], list[float]]:
    """Return (labels, FLOPs, errors as shares) of this study's rows that saw all of the data."""
    taken = [row for row in rows if row["study"] == "scaling" and row["fraction"] == 1]
    return ([f"{row['arm']}, seed {row['seed']}" for row in taken], [row["flops"] for row in taken],
            [1 - row["probe"]["linear_bn"]["accuracy"] for row in taken])  # fmt: skip


def law_in_words(labels: list[str], flops: list[float], error: list[float]) -> list[str]:
    """Return the sentence that says the law and how far each point is from it."""
    (floor, scale, exponent), residuals = fit_law(flops, error)
    formula = f"error = {floor:.3f} + {scale:.3f} (FLOPs / 1e12)^-{exponent:.3f}"
    listed = "; ".join(f"{label} {100 * rest:+.1f}" for label, rest in zip(labels, residuals, strict=True))
    root = 100 * float(np.sqrt(np.mean(residuals**2)))
    return [f"Fitted to the arms with all of the data: {formula}; residuals in points, root mean square {root:.1f}: {listed}."]


def law_figure(results: Sequence[Any]) -> Any:
    """Plot error against FLOPs, with the law, and against time of steps: a colour a size, hollow for a tenth of the data."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    picture = Figure(figsize=(10, 4.2))
    panels = picture.subplots(1, 2, sharey=True)
    colours = dict(zip(SCALING_SIZES, ("C0", "C1", "C2"), strict=True))
    for result in results:
        colour = colours[result.arm.name.partition(",")[0]]
        error = 100 - statistics.fmean(result.scores)
        for axes, x in zip(panels, (result.mean("flops") / 1e12, result.mean("seconds") / 60), strict=True):
            axes.plot(x, error, "o", color=colour, markerfacecolor=colour if result.arm.fraction == 1 else "none")
    _, flops, error = law_points([row for result in results for row in result.rows])
    if len(flops) > 3:
        x = np.geomspace(min(flops), max(flops))
        panels[0].plot(x / 1e12, 100 * scaling_law(x, *fit_law(flops, error)[0]), color="#888", zorder=0)
    keys = [Line2D([], [], color=colour, marker="o", linestyle="", label=f"size {size}") for size, colour in colours.items()]
    keys += [Line2D([], [], color="#444", marker="o", linestyle="", markerfacecolor="none", label="a tenth of the data"),
             Line2D([], [], color="#888", label="fitted to all of the data")]  # fmt: skip
    panels[0].legend(handles=keys)
    for axes, name in zip(panels, ("TFLOP", "minutes of steps, as measured"), strict=True):
        axes.set(xscale="log", xlabel=name)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(color="#eee")
    panels[0].set_ylabel("error of BN + linear, %")
    return picture
