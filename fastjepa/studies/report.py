"""Report of a study from its rows: a table as text and Markdown, a plot, and sentences on which arm leads and by how much."""

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

from fastjepa.errors import UserError
from fastjepa.files import atomic_path, write_atomic
from fastjepa.studies.arm import Arm
from fastjepa.studies.measures import BN_LINEAR, Measure, looked_up
from fastjepa.studies.scaling import law_figure, law_in_words, law_points

FEW_SEEDS = 3  # with fewer seeds an arm shows a lead, not a result
IMAGES_EFFORT = ("images", "TFLOP", "min")  # heads of what an arm cost, in a study of equal images or FLOPs
MINUTES_EFFORT = ("images", "CPU ms an image", "CPU min")  # in one of equal minutes, which are counted by the base's pace


class ArmResult(NamedTuple):
    """Rows of an arm, one a seed, taken together."""

    arm: Arm
    rows: list[dict[str, Any]]
    ranked: Measure = BN_LINEAR  # what arms are ranked by

    @property
    def scores(self) -> list[float]:
        """The number that arms are ranked by, with each seed."""
        return [self.ranked.of(row) for row in self.rows]

    def mean(self, name: str) -> float:
        """Return the mean of a number over the seeds."""
        return statistics.fmean(row[name] for row in self.rows)

    def effort(self, counted: bool) -> list[str]:
        """Return the cells of what the arm cost, under MINUTES_EFFORT or IMAGES_EFFORT; the mean over its seeds."""
        images = f"{self.mean('images'):,.0f}"
        if not counted:
            return [images, f"{self.mean('flops') / 1e12:.1f}", f"{self.mean('seconds') / 60:.1f}"]
        cost = f"{60_000 * self.minutes / self.mean('images'):.1f}" if self.mean("images") else ""
        return [images, cost, f"{self.minutes:.1f}"]

    @property
    def minutes(self) -> float:
        """The mean over the seeds of the counted minutes; of a row without a pace, those that its steps took."""
        paced = (row["images"] / row["pace"] if row.get("pace") else row["cpu_seconds"] for row in self.rows)
        return statistics.fmean(paced) / 60

    def cells(self, columns: Sequence[Measure], counted: bool) -> list[str]:
        """Return the cells of the arm's row in the table, after its name."""
        seeds = str(len(self.rows)) + (" *" if len(self.rows) < FEW_SEEDS else "")
        return [seeds, *(measure_cell(one, self.rows) for one in columns), *self.effort(counted), paper_cell(self.arm)]


def measure_cell(measure: Measure, rows: Iterable[dict[str, Any]]) -> str:
    """Return the mean of a measure over the rows that have it, and its spread where it is shown; empty where none has it."""
    values = [value for row in rows if (value := measure.of(row)) is not None]
    return mean_and_spread(values if measure.spread else [statistics.fmean(values)], measure.form) if values else ""


def paper_cell(arm: Arm) -> str:
    """Return the paper's number; empty where it has none."""
    return "" if arm.paper is None else f"{arm.paper:.1f}"


def mean_and_spread(values: Sequence[float], form: str) -> str:
    """Return the mean and, of two values or more, their standard deviation."""
    return f"{statistics.fmean(values):{form}}" + (f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else "")


def arm_results(arms: Iterable[Arm], rows: Iterable[dict[str, Any]], ranked: Measure = BN_LINEAR) -> list[ArmResult]:
    """Return the rows of each arm together, in the order of the arms; an arm may have none."""
    by_arm: dict[str, list] = {arm.name: [] for arm in arms}
    for row in rows:
        by_arm[row["arm"]].append(row)
    return [ArmResult(arm, by_arm[arm.name], ranked) for arm in arms]


def table_heads(study: Any) -> list[str]:
    """Return the heads of the table's columns."""
    effort = MINUTES_EFFORT if study.minutes else IMAGES_EFFORT
    return ["", "arm", "seeds", *(measure.title for measure in study.measures.columns), *effort, "paper"]


def table_rows(study: Any, found: list[ArmResult]) -> list[list[str]]:
    """Return the table's body, a line for every arm that has rows; a group is named in its first line alone."""
    present = [result for result in found if result.rows]
    groups = ["", *(result.arm.group for result in present)]
    shown = study.measures.columns, study.minutes is not None
    return [
        ["" if result.arm.group == before else result.arm.group, result.arm.name, *result.cells(*shown)]
        for before, result in zip(groups, present, strict=False)
    ]


def footnote(study: Any, found: list[ArmResult]) -> str:
    """Return the paragraph that says what the numbers are."""
    few = any(0 < len(result.rows) < FEW_SEEDS for result in found)
    lead = f" * fewer than {FEW_SEEDS} seeds: a lead, not a result." if few else ""
    tests = sorted({looked_up(row, study.measures.tested) for result in found for row in result.rows})
    noise = f", each on {tests[0]:,} test images" if len(tests) == 1 else ""
    effort = "min: minutes of training steps, on a machine that did other work too"
    if study.minutes:
        pace = f"of a core on which the base trains on {study.base_pace:.0f} images/s"
        effort = f"CPU ms and min: {pace}, by what an image costs beside the base's in alternating trials"
    about = [f"{measure.title}: {measure.about}" for measure in study.measures.columns if measure.about]
    unit = f"{study.measures.unit}, mean" if study.measures.unit else "Mean"
    return "; ".join([f"{unit} ± standard deviation over seeds{noise}", *about, f"{effort}.{lead} Paper: {study.paper}."])


def group_leads(found: list[ArmResult]) -> list[str]:
    """Return a sentence for each group of two arms or more: which leads, and whether by more than noise.

    The first arm is the base where it changes nothing; it then competes in every group.
    """
    present = [result for result in found if result.rows]
    base = [result for result in present[:1] if result.arm == Arm(result.arm.name, result.arm.group, paper=result.arm.paper)]
    groups: dict[str, list[ArmResult]] = {}
    for result in present:
        groups.setdefault(result.arm.group, []).append(result)
    together = {name: members if base[0] in members else base + members for name, members in groups.items()} if base else groups
    return [lead_sentence(name, members) for name, members in together.items() if len(members) > 1]


def lead_sentence(group: str, members: list[ArmResult]) -> str:
    """Compare the first two arms of a group on the seeds that both have, so that none leads by a lucky choice of seeds.

    The second is found among the rows of the first one's seeds.
    """
    leader, *others = ranked_arms(members)
    rivals = [rival for other in others if (rival := on_shared_seeds(other, leader)[0]).rows]
    if not rivals:
        return f"{group}: {leader.arm.name} has no seed that another arm has."
    first, second = ranked_arms(on_shared_seeds(leader, ranked_arms(rivals)[0]))
    gap = statistics.fmean(first.scores) - statistics.fmean(second.scores)
    said = f"{group}: {first.arm.name} leads {second.arm.name} by {gap:.1f} points"
    if len(first.rows) < 2:
        return f"{said}, of one seed: nothing can be said of the spread."
    error = math.sqrt(sum(statistics.variance(result.scores) / len(result.rows) for result in (first, second)))
    return f"{said}, {'more' if gap > 2 * error else 'not more'} than twice its standard error ({error:.2f})."


def ranked_arms(members: Iterable[ArmResult]) -> list[ArmResult]:
    """Return arms by falling mean accuracy."""
    return sorted(members, key=lambda result: -statistics.fmean(result.scores))


def on_shared_seeds(*pair: ArmResult) -> list[ArmResult]:
    """Return two arms with the rows of the seeds that both have; in an unfinished sweep one may have more seeds."""
    seeds = set.intersection(*({row["seed"] for row in result.rows} for result in pair))
    return [result._replace(rows=[row for row in result.rows if row["seed"] in seeds]) for result in pair]


def show_study(study: Any, found: list[ArmResult], console: Console) -> None:
    """Print the table and the sentences."""
    table = Table(*table_heads(study), title=study.title, caption=footnote(study, found), box=None)
    for row in table_rows(study, found):
        table.add_row(*row)
    console.print(table)
    for sentence in conclusions(found):
        console.print(sentence, highlight=False)


def conclusions(found: list[ArmResult]) -> list[str]:
    """Return the sentences below the table."""
    missing = [result.arm.name for result in found if not result.rows]
    return [*group_leads(found), *law_sentences(found), *([f"Not run yet: {'; '.join(missing)}."] if missing else [])]


def law_sentences(found: list[ArmResult]) -> list[str]:
    """Return the sentence on the power law through a study of sizes; none where fewer than four points lie on it."""
    points = law_points([row for result in found for row in result.rows])
    return law_in_words(*points) if len(points[0]) > 3 else []


def study_markdown(study: Any, found: list[ArmResult]) -> str:
    """Return the table, the paragraph on its numbers, and the sentences, as Markdown."""
    heads = table_heads(study)
    body = ["| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *table_rows(study, found))]
    return "\n".join([*body, "", footnote(study, found), "", *(f"- {sentence}" for sentence in conclusions(found))])


def study_plot(study: Any, found: list[ArmResult], files: Iterable[Path]) -> None:
    """Write the plot: every seed a dot and every arm's mean a bar; for a study of sizes, error against FLOPs and time."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(f"the plot needs matplotlib ({error}); pip install 'fastjepa[studies]'") from error
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "fastjepa"  # the same rows, the same file
    present = [result for result in found if result.rows]
    sizes = any(result.arm.group.startswith("size") for result in present)
    figure = law_figure(present) if sizes else dot_figure(study, present)
    for file in files:
        with atomic_path(file) as hidden:
            figure.savefig(hidden, dpi=130, bbox_inches="tight", metadata={"Date": None} if file.suffix == ".svg" else None)


def dot_figure(study: Any, present: list[ArmResult]) -> Any:
    """Draw a row for each arm: its seeds, their span and their mean, a colour a group."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys(result.arm.group for result in present))
    curves = curves_over_minutes(present) if study.minutes else {}
    measures = study.measures.over_minutes if curves else ()
    figure = Figure(figsize=(8 + 4 * len(measures), 1.2 + 0.28 * len(present)))
    ratios = (2, *(1 for _ in measures))
    axes, *panels = figure.subplots(1, len(ratios), squeeze=False, width_ratios=ratios)[0]
    for panel, measure in zip(panels, measures, strict=True):
        draw_curves(panel, curves, measure)
    if panels:
        panels[0].legend(loc="upper left", bbox_to_anchor=(0, -0.1), fontsize="small", frameon=False)
    for place, result in enumerate(present):
        values, colour = result.scores, colormaps["tab10"](groups.index(result.arm.group) % 10)
        axes.plot([min(values), max(values)], [place, place], color=colour, linewidth=1)
        axes.plot(values, [place] * len(values), "o", color=colour, alpha=0.5, markersize=5)
        axes.plot([statistics.fmean(values)], [place], "|", color=colour, markersize=16, markeredgewidth=2)
    axes.set_yticks(range(len(present)), [f"{result.arm.name} ({len(result.rows)})" for result in present])
    axes.axvline(statistics.fmean(present[0].scores), color="#bbb", linewidth=1, zorder=0)
    axes.invert_yaxis()
    axes.grid(axis="x", color="#eee")
    axes.set_xlabel(f"{present[0].ranked.title}, %: a dot a seed, | their mean; in brackets the number of seeds")
    axes.set_title(study.title, loc="left")
    return figure


def curves_over_minutes(present: list[ArmResult]) -> dict[str, list[ArmResult]]:
    """Return {name: results by rising length} of the arms that were trained for several lengths of time.

    They are told by method and overrides; the name is that of the arm of length 1.
    """
    families: dict[tuple, list[ArmResult]] = {}
    for result in present:
        families.setdefault((result.arm.method, result.arm.overrides), []).append(result)
    several = [sorted(family, key=lambda result: result.arm.length) for family in families.values() if len(family) > 1]
    return {next((r.arm.name for r in family if r.arm.length == 1), family[0].arm.name): family for family in several}


def draw_curves(axes: Any, curves: dict[str, list[ArmResult]], measure: Measure) -> None:
    """Draw a measure against CPU minutes, a line for each arm that was trained for several lengths, and a dot a seed."""
    for name, family in curves.items():
        of_seeds = [(result.minutes, [measure.of(row) for row in result.rows]) for result in family]
        (line,) = axes.plot([at for at, _ in of_seeds], [statistics.fmean(values) for _, values in of_seeds], "-", label=name)
        for at, values in of_seeds:
            axes.plot([at] * len(values), values, "o", color=line.get_color(), alpha=0.5, markersize=5)
    lengths = sorted({float(f"{result.minutes:.2g}") for family in curves.values() for result in family})
    axes.set(xscale="log", xlabel="CPU minutes of training", ylabel=f"{measure.title}, %")
    axes.set_xticks(lengths, [f"{minutes:g}" for minutes in lengths])
    axes.minorticks_off()
    axes.grid(color="#eee")


def write_study(study: Any, name: str, found: list[ArmResult], folder: Path) -> list[Path]:
    """Write <name>.json (the rows), .md (the table), .svg and .png into `folder`, and return them; no plot without rows.

    Rows that the file holds already and that were not asked for, of other seeds or budgets, stay in it.
    """
    files = [folder / f"{name}.{suffix}" for suffix in ("json", "md", "svg", "png")]
    rows = [row for result in found for row in result.rows]
    kept = json.loads(files[0].read_text()) if files[0].is_file() else []
    asked = {row["hash"] for row in rows}
    write_atomic(files[0], json.dumps([*rows, *(row for row in kept if row["hash"] not in asked)], indent=1) + "\n")
    write_atomic(files[1], study_markdown(study, found) + "\n")
    if rows:
        study_plot(study, found, files[2:])
    return files if rows else files[:2]


def picture_markdown(files: Iterable[Path], page: Path) -> str:
    """Return the Markdown that shows the plot among the files on a page; empty where there is none."""
    return "".join(f"![{file.stem}]({os.path.relpath(file, page.parent)})\n\n" for file in files if file.suffix == ".svg")


def page_block(page: Path, name: str) -> re.Match[str]:
    """Return the block between the lines `<!-- study: name -->` and `<!-- end -->` of a page; UserError where it has none."""
    try:
        found = re.search(rf"(?<=<!-- study: {name} -->\n).*?(?=<!-- end -->)", page.read_text(), re.DOTALL)
    except OSError as error:
        raise UserError(f"{page}: cannot be read ({error.strerror}); give a Markdown page") from error
    if not found:
        raise UserError(
            f"{page}: has no block `<!-- study: {name} -->` ... `<!-- end -->`; add these two lines where the table belongs"
        )
    return found


def fill_page(page: Path, name: str, text: str) -> None:
    """Put `text` into the page's block of a study."""
    block = page_block(page, name)
    write_atomic(page, f"{block.string[: block.start()]}{text}\n{block.string[block.end() :]}")
