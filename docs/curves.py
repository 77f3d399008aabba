"""Readings of runs side by side, as an SVG: `python docs/curves.py PICTURE.svg RUN/metrics.jsonl [...]`."""

import json
import math
import sys
from html import escape
from pathlib import Path

PANELS = {"loss": "loss", "feature_std": "feature spread", "effective_rank": "effective rank",
          "ema_distance": "distance of the average (log)", "knn": "k-NN accuracy"}  # fmt: skip
LOGARITHMIC = {PANELS["ema_distance"]}  # whose heights are those of log(1 + value)
COLOURS = ("#1f6fb4", "#d9541e", "#3a923a", "#8c5aa8")
WIDTH, HEIGHT, GAP = 250, 170, 46  # pixels: a panel's size, and the space around it

Points = list[tuple[float, float]]


def points(metrics: Path, reading: str) -> Points:
    """Return (step, value) of every line of metrics.jsonl that has the reading as a number."""
    entries = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [(entry["step"], entry[reading]) for entry in entries if entry.get(reading) is not None]


def panel(left: float, title: str, curves: list[Points]) -> str:
    """Return the SVG of one reading of every run over the steps; both axes go from 0 to the largest value."""
    across = max((x for curve in curves for x, _ in curve), default=1)
    high = max((y for curve in curves for _, y in curve), default=1) or 1
    height = (lambda y: HEIGHT * math.log1p(y) / math.log1p(high)) if title in LOGARITHMIC else lambda y: y / high * HEIGHT
    parts = [f'<g transform="translate({left},{GAP})">',
             f'<path d="M0 0V{HEIGHT}H{WIDTH}" fill="none" stroke="#888"/>',
             f'<text x="0" y="-12" font-weight="bold">{escape(title)}</text>',
             f'<text x="-6" y="8" text-anchor="end">{high:{".3g" if high < 1000 else ".0f"}}</text>',
             f'<text x="-6" y="{HEIGHT}" text-anchor="end">0</text>',
             f'<text x="{WIDTH}" y="{HEIGHT + 18}" text-anchor="end">step {across:g}</text>']  # fmt: skip
    for curve, colour in zip(curves, COLOURS, strict=False):
        line = " ".join(f"{x / across * WIDTH:.1f},{HEIGHT - height(y):.1f}" for x, y in curve)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
    return "\n".join([*parts, "</g>"])


def svg(runs: list[Path]) -> str:
    """Return an SVG with a panel for each of PANELS that a run has; at most four runs, each with a colour and a name."""
    names = [path.parent.name if path.stem == "metrics" else path.stem for path in runs]
    panels = {title: curves for reading, title in PANELS.items() if any(curves := [points(path, reading) for path in runs])}
    width, height = len(panels) * (WIDTH + GAP) + GAP, HEIGHT + 2 * GAP + 20
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13">',
             f'<rect width="{width}" height="{height}" fill="#fff"/>']  # fmt: skip
    for number, (title, curves) in enumerate(panels.items()):
        parts.append(panel(GAP + number * (WIDTH + GAP), title, curves))
    for number, (name, colour) in enumerate(zip(names, COLOURS, strict=False)):
        parts.append(f'<text x="{GAP + 130 * number}" y="{height - 10}" fill="{colour}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    Path(sys.argv[1]).write_text(svg([Path(name) for name in sys.argv[2:]]))
