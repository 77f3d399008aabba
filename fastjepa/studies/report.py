"""What the rows of a study say: a table as text and Markdown, a plot, and the sentence on who leads and by how much."""

import json
import math
import os
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from fastjepa.config import ConfigError
from fastjepa.evals.features import write_atomic
from fastjepa.evals.table import NAMES
from fastjepa.studies import scaling
from fastjepa.studies.arm import Arm

FEW = 3  # seeds below which an arm shows a lead, not a result
HEAD = "linear_bn"  # the probe that arms are ranked by: its features are conditioned alike
HEADS = ("", "arm", "seeds", *NAMES.values(), "rank", "common", "images", "TFLOP", "min", "paper")


class Line(NamedTuple):
    """An arm's rows taken together."""

    arm: Arm
    rows: list[dict[str, Any]]

    def values(self, probe: str) -> list[float]:
        """Of each seed, in %."""
        return [100 * row["probe"][probe]["accuracy"] for row in self.rows]

    def mean(self, name: str) -> float:
        return statistics.fmean(row[name] for row in self.rows)

    def cells(self) -> list[str]:
        if not self.rows:
            return ["0", *["" for _ in NAMES], "", "", "", "", "", paper(self.arm)]
        rank = statistics.fmean(row["probe"]["effective_rank"] for row in self.rows)
        effort = [f"{self.mean('images'):,.0f}", f"{self.mean('flops') / 1e12:.1f}", f"{self.mean('seconds') / 60:.1f}"]
        seeds = str(len(self.rows)) + (" *" if len(self.rows) < FEW else "")
        return [seeds, *(spread(self.values(p)) for p in NAMES), f"{rank:.1f}", self.common(), *effort, paper(self.arm)]

    def common(self) -> str:
        """In %, of the rows that have it."""
        found = [row["shares"]["common"] for row in self.rows if row.get("shares")]
        return f"{100 * statistics.fmean(found):.0f}" if found else ""


def paper(arm: Arm) -> str:
    return "" if arm.paper is None else f"{arm.paper:.1f}"


def spread(values: Sequence[float]) -> str:
    """Mean and, of two or more, their standard deviation."""
    return f"{statistics.fmean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def lines(arms: Iterable[Arm], rows: Iterable[dict[str, Any]]) -> list[Line]:
    by_arm: dict[str, list] = {arm.name: [] for arm in arms}
    for row in rows:
        by_arm[row["arm"]].append(row)
    return [Line(arm, by_arm[arm.name]) for arm in arms]


def cells(found: list[Line]) -> list[list[str]]:
    """The table's body; a group is named once."""
    groups = ["", *(line.arm.group for line in found)]
    return [
        ["" if line.arm.group == before else line.arm.group, line.arm.name, *line.cells()]
        for before, line in zip(groups, found, strict=False)
    ]


def footnote(study: Any, found: list[Line]) -> str:
    """What the numbers are."""
    few = f" * fewer than {FEW} seeds: a lead, not a result." if any(len(line.rows) < FEW for line in found) else ""
    tests = sorted({row["probe"][HEAD]["n_test"] for line in found for row in line.rows})
    noise = f", each on {tests[0]:,} test images" if len(tests) == 1 else ""
    return (
        f"Accuracy in %, mean ± standard deviation over seeds{noise}; rank: effective rank of the features; common: what all "
        "tokens share of their energy, layer-normalised as targets are, in %; min: minutes of training steps, on a machine "
        f"that did other work too.{few} Paper: {study.paper}."
    )


def verdict(found: list[Line]) -> list[str]:
    """Of each group that has rows, the base among them, who leads and whether the lead is more than noise."""
    present = [line for line in found if line.rows]
    base = [line for line in present[:1] if line.arm == Arm(line.arm.name, line.arm.group, paper=line.arm.paper)]
    groups: dict[str, list[Line]] = {}
    for line in present:
        groups.setdefault(line.arm.group, []).append(line)
    together = {name: members if base[0] in members else base + members for name, members in groups.items()} if base else groups
    return [lead(name, members) for name, members in together.items() if len(members) > 1]


def lead(group: str, members: list[Line]) -> str:
    """The first two of a group, compared on the seeds that both have: a seed moves all arms alike."""
    first, second = ranked(shared(*ranked(members)[:2]))
    gap = statistics.fmean(first.values(HEAD)) - statistics.fmean(second.values(HEAD))
    said = f"{group}: {first.arm.name} leads {second.arm.name} by {gap:.1f} points"
    if len(first.rows) < 2:
        return f"{said}, of one seed: nothing can be said of the spread."
    error = math.sqrt(sum(statistics.variance(line.values(HEAD)) / len(line.rows) for line in (first, second)))
    return f"{said}, {'more' if gap > 2 * error else 'not more'} than twice its standard error ({error:.2f})."


def ranked(members: Iterable[Line]) -> list[Line]:
    return sorted(members, key=lambda line: -statistics.fmean(line.values(HEAD)))


def shared(*pair: Line) -> list[Line]:
    """Two lines with the rows of the seeds that both have; a sweep runs every arm's first seed first."""
    seeds = set.intersection(*({row["seed"] for row in line.rows} for line in pair))
    return [Line(line.arm, [row for row in line.rows if row["seed"] in seeds]) for line in pair]


def show(study: Any, found: list[Line], console: Console) -> None:
    table = Table(*HEADS, title=study.title, caption=footnote(study, found), box=None)
    for row in cells(found):
        table.add_row(*row)
    console.print(table)
    for sentence in conclusions(found):
        console.print(sentence, highlight=False)


def conclusions(found: list[Line]) -> list[str]:
    return [*verdict(found), *curve(found)]


def curve(found: list[Line]) -> list[str]:
    """The power law through a study of sizes, with its residuals."""
    points = scaling.points([row for line in found for row in line.rows])
    return scaling.said(*points) if len(points[0]) > 3 else []


def markdown(study: Any, found: list[Line]) -> str:
    """The table, what its numbers are, and the sentences."""
    body = ["| " + " | ".join(row) + " |" for row in (HEADS, ["---"] * len(HEADS), *cells(found))]
    return "\n".join([*body, "", footnote(study, found), "", *(f"- {sentence}" for sentence in conclusions(found))])


def plot(study: Any, found: list[Line], files: Iterable[Path]) -> None:
    """Every seed a dot and every arm's mean a bar; or, of sizes, error against FLOPs and hours."""
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(f"the plot needs matplotlib ({error}); pip install 'fastjepa[studies]'") from error
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "fastjepa"  # the same rows, the same file
    present = [line for line in found if line.rows]
    figure = scaling.figure(present) if any(line.arm.group.startswith("size") for line in present) else dots(study, present)
    for file in files:
        figure.savefig(file, dpi=130, bbox_inches="tight", metadata={"Date": None} if file.suffix == ".svg" else None)


def dots(study: Any, present: list[Line]) -> Any:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys(line.arm.group for line in present))
    figure = Figure(figsize=(8, 1.2 + 0.28 * len(present)))
    axes = figure.subplots()
    for place, line in enumerate(present):
        values, colour = line.values(HEAD), colormaps["tab10"](groups.index(line.arm.group) % 10)
        axes.plot([min(values), max(values)], [place, place], color=colour, linewidth=1)
        axes.plot(values, [place] * len(values), "o", color=colour, alpha=0.5, markersize=5)
        axes.plot([statistics.fmean(values)], [place], "|", color=colour, markersize=16, markeredgewidth=2)
    axes.set_yticks(range(len(present)), [f"{line.arm.name} ({len(line.rows)})" for line in present])
    axes.axvline(statistics.fmean(present[0].values(HEAD)), color="#bbb", linewidth=1, zorder=0)
    axes.invert_yaxis()
    axes.grid(axis="x", color="#eee")
    axes.set_xlabel("BN + linear, %: a dot a seed, | their mean; in brackets the number of seeds")
    axes.set_title(study.title, loc="left")
    return figure


def write(study: Any, name: str, found: list[Line], folder: Path) -> list[Path]:
    """<name>.json (the rows), .md (the table), .svg and .png in `folder`."""
    files = [folder / f"{name}.{suffix}" for suffix in ("json", "md", "svg", "png")]
    rows = [row for line in found for row in line.rows]
    write_atomic(files[0], (json.dumps(rows, indent=1) + "\n").encode())
    write_atomic(files[1], (markdown(study, found) + "\n").encode())
    if rows:
        plot(study, found, files[2:])
    return files if rows else files[:2]


def picture(files: Iterable[Path], page: Path) -> str:
    """A link from the page to the plot among the files, where there is one."""
    return "".join(f"![{file.stem}]({os.path.relpath(file, page.parent)})\n\n" for file in files if file.suffix == ".svg")


def fill(page: Path, name: str, text: str) -> None:
    """Put `text` into the block of a page between `<!-- study: name -->` and `<!-- end -->`."""
    block = re.compile(rf"(<!-- study: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    old = page.read_text()
    if not block.search(old):
        raise ConfigError(
            f"{page}: has no block `<!-- study: {name} -->` ... `<!-- end -->`; add these two lines where the table belongs"
        )
    write_atomic(page, block.sub(lambda found: f"{found[1]}{text}\n{found[2]}", old).encode())
