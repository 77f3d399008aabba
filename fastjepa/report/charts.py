"""Readings of runs as charts: curves of at most some hundred points, and a table below each."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from fastjepa.report.recorded_run import RecordedRun

CHART_POINTS, TABLE_LINES = 600, 20  # at most, of a curve and of the table below a chart

Curve = list[tuple[int, float]]  # (step, value), by rising step


class ChartedReading(NamedTuple):
    """A reading of metrics.jsonl and how it is shown."""

    name: str
    title: str
    group: str
    form: str  # format of its values, one that Python and D3 read alike
    words: str


CHARTED_READINGS = [ChartedReading(*row) for row in (
    ("loss", "Loss", "Learning", ".4f", "Alone it shows nothing: a collapsed network predicts its target perfectly."),
    ("effective_rank", "Effective rank of patch features", "Learning", ".1f", "Under half of its start: collapse."),
    ("feature_std", "Spread of patch features", "Learning", ".3f", "Under a quarter of its start: all patches look alike."),
    ("ema_distance", "Distance from encoder to target encoder", "Learning", ".1f", "In updates; near 0: it follows at once."),
    ("knn", "Online k-NN accuracy", "Learning", ".1%", "Of some hundred images: a pulse, not a result."),
    ("image_rank", "Effective rank of image features", "Learning", ".1f", "As for patches, over images."),
    ("image_std", "Spread of image features", "Learning", ".3f", "As for patches, over images."),
    ("lidar", "LiDAR", "Learning", ".1f", "Rank of what tells images apart whatever the crop."),
    ("regularizer", "Regularizer", "Learning", ".4f", "The variance-covariance term, its weight applied."),
    ("lr", "Learning rate", "Schedules", ".2e", "A function of the step."),
    ("ema_momentum", "Momentum of the target encoder", "Schedules", ".4f", "How slowly the target encoder follows."),
    ("weight_decay", "Weight decay", "Schedules", ".3f", "A function of the step."),
    ("context_tokens", "Patches a context", "Schedules", ".1f", "Mean over the masks of a micro-batch."),
    ("target_tokens", "Patches a target block", "Schedules", ".1f", "Mean over the blocks of a micro-batch."),
    ("images_per_s", "Images a second", "Speed", ".1f", "All ranks together, without evaluations and checkpoints."),
    ("mfu", "Model FLOP utilisation", "Speed", ".1%", "Of the matrix-product rate that was measured on the same device."),
    ("memory_gib", "Peak memory, GiB", "Speed", ".2f", "Of the first rank: allocated on a GPU, resident on a CPU."),
    ("monitor_share", "Time spent on the monitors", "Speed", ".1%", "Share of the run so far."),
    ("skipped", "Skipped steps", "Trouble", ".0f", "Steps whose gradients were not finite; they changed nothing."),
)]  # fmt: skip


def reading_charts(runs: Sequence[RecordedRun]) -> list[dict[str, Any]]:
    """Return a chart for each reading that a run has, readings without a title last.

    Skipped steps have a chart only where there were some.
    """
    known = {reading.name for reading in CHARTED_READINGS} | {"step", "epoch"}
    names = dict.fromkeys(name for run in runs for entry in run.entries for name in entry)
    others = [ChartedReading(name, name, "Other readings", ".4~g", "") for name in names if name not in known]
    charts = (reading_chart(reading, runs) for reading in [*CHARTED_READINGS, *others])
    return [one for one in charts if one["curves"] and (one["name"] != "skipped" or any(run.last("skipped") for run in runs))]


def reading_chart(reading: ChartedReading, runs: Sequence[RecordedRun]) -> dict[str, Any]:
    """Return the curves of one reading, a sentence that sums them up, their table, and how many values were not finite.

    Where no run has the reading at two steps there is nothing to draw: `numbers` says its values.
    """
    shown = [(number, curve) for number, run in enumerate(runs) if (curve := run.values(reading.name))]
    spans = (f"{runs[number].name} from {shown_number(curve[0][1], reading.form)} at step {curve[0][0]} to "
             f"{shown_number(curve[-1][1], reading.form)} at step {curve[-1][0]}" for number, curve in shown)  # fmt: skip
    entries = [entry for run in runs for entry in run.entries]
    not_finite = reading.name != "mfu" and sum(entry.get(reading.name, 0) is None for entry in entries)
    return reading._asdict() | {
        "id": f"chart-{reading.name}",
        "summary": f"{reading.title}: {'; '.join(spans)}",
        "numbers": []
        if any(len(curve) > 1 for _, curve in shown)
        else [dated_number(*curve[0], reading.form) for _, curve in shown],
        "curves": [{"run": number, "points": thinned_points(curve)} for number, curve in shown],
        "lost": int(not_finite),  # the log writes null for them, and for an MFU that was not measured
        "table": readings_table([curve for _, curve in shown], reading.form),
        "columns": [runs[number].name for number, _ in shown],
    }


def thinned_points(points: Sequence[tuple[float, float]], limit: int = CHART_POINTS) -> list[tuple[float, float]]:
    """Keep at most `limit` (even, at least 4) points: the ends, and the lowest and highest of equal stretches between them.

    10 points at limit 6 have (6 - 2) / 2 = 2 stretches, points 1 to 4 and 5 to 8, and keep two of each.
    """
    if len(points) <= limit:
        return list(points)
    inner, stretches = points[1:-1], limit // 2 - 1
    kept = {0, len(points) - 1}
    for i in range(stretches):
        stretch = range(i * len(inner) // stretches, (i + 1) * len(inner) // stretches)
        kept |= {1 + pick(stretch, key=lambda j: inner[j][1]) for pick in (min, max)}
    return [points[i] for i in sorted(kept)]


def shown_number(value: float, form: str) -> str:
    """Format a value as the chart does; Python does not know D3's `~`."""
    return format(value, form.replace("~", ""))


def dated_number(step: int, value: float, form: str) -> str:
    """Return a value and its step in words."""
    return f"{shown_number(value, form)} at step {step}"


def readings_table(curves: list[Curve], form: str) -> list[list[str]]:
    """Return at most TABLE_LINES evenly chosen steps, each with every curve's latest value up to it.

    Before a curve begins and after it ends stands a dash.
    """
    steps = sorted({step for curve in curves for step, _ in curve})
    count = min(TABLE_LINES, len(steps))
    chosen = [steps[i * (len(steps) - 1) // max(1, count - 1)] for i in range(count)]
    return [[str(step), *(value_at(curve, step, form) for curve in curves)] for step in chosen]


def value_at(curve: Curve, step: int, form: str) -> str:
    """Return the latest value of a curve up to a step; a dash where the step lies outside the curve."""
    past = [value for x, value in curve if x <= step]
    return shown_number(past[-1], form) if past and step <= curve[-1][0] else "–"
