"""Page of `fastjepa report`: run directories as one HTML file that needs no network; Observable Plot draws its charts."""

import base64
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from fastjepa.errors import UserError
from fastjepa.files import require_writable, write_atomic
from fastjepa.report.charts import Curve, dated_number, reading_charts
from fastjepa.report.evaluations import evaluation_tables
from fastjepa.report.pictures import gather_pictures
from fastjepa.report.recorded_run import RecordedRun, read_recorded_run
from fastjepa.run.directory import run_directory

PAGE_FOLDER = Path(__file__).parent / "page"
PAGE_SCRIPTS = ("d3.min.js", "plot.min.js", "page.js")
Compared = list[tuple[str, list[str], bool]]  # (name, a cell for each run, whether they differ)


def write_page(paths: Sequence[Path], file: Path, pictures: bool = True, bands: Sequence[int] | None = None) -> None:
    """Write the page that `render_page` returns; it is there whole or not at all.

    Bytes of names that are not UTF-8 are shown as \\udcff.
    """
    if file.is_dir():
        raise UserError(f"{file}: is a directory; pass --output FILE.html")
    require_writable(file)
    write_atomic(file, render_page(paths, pictures, bands).encode(errors="backslashreplace"))


def render_page(paths: Sequence[Path], pictures: bool = True, bands: Sequence[int] | None = None) -> str:
    """Return the HTML of these runs; `bands` show images in pictures that are drawn anew."""
    names = unique_names([run_directory(path).name for path in paths], paths)
    runs, now = [read_recorded_run(path, name) for path, name in zip(paths, names, strict=True)], time.time()
    charts = reading_charts(runs)
    drawn = [{key: one[key] for key in ("id", "title", "form", "curves")} for one in charts if not one["numbers"]]
    return page_template().render(
        runs=runs,
        made=time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(now)),
        facts=[row for row in compared_runs([run_facts(run, now) for run in runs]) if set(row[1]) != {"–"}],
        charts=charts,
        groups=list(dict.fromkeys(one["group"] for one in charts)),
        evaluations=[(run, evaluation_tables(run)) for run in runs],
        pictures=[(run, *(gather_pictures(run, bands) if pictures else ([], None))) for run in runs],
        settings=setting_rows(runs),
        versions=environment_rows(runs),
        data={"runs": names, "charts": drawn},
        scripts=page_scripts(),
        hashes=" ".join(f"'sha256-{content_digest(script)}'" for script in page_scripts()),
        style=(PAGE_FOLDER / "page.css").read_text(),
    )


@cache
def page_template() -> Any:
    """Return the template. It escapes whatever comes from a run; style and scripts, this package's own, go in as they are."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(PAGE_FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).get_template("page.html")


@cache
def page_scripts() -> list[str]:
    """Return the scripts of the page, in the order they run."""
    return [(PAGE_FOLDER / name).read_text() for name in PAGE_SCRIPTS]


def content_digest(script: str) -> str:
    """Return the name of a script in the page's content security policy, which lets no other run."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def unique_names(names: Sequence[str], paths: Sequence[Path]) -> list[str]:
    """Return the directories' names; where two are the same, the paths as they were given."""
    return list(names) if len(set(names)) == len(names) else [str(path) for path in paths]


def run_facts(run: RecordedRun, now: float) -> dict[str, str]:
    """Return {fact: its value in words}; a dash where the directory does not say."""

    def summary(reading: str, form: str, of: Callable[[list[float]], float] = lambda values: values[-1]) -> str:
        found = [value for _, value in run.values(reading)]
        return format(of(found), form) if found else "–"

    return {
        "state": run_state(run, now),
        "time in steps": step_time(run),
        "network": network_in_words(run),
        "data": run.setting("data", "source") or run.setting("data", "image_folder") or "–",
        "images a step": str(images_a_step(run) or "–"),
        "loss": summary("loss", ".4f"),
        "effective rank": summary("effective_rank", ".1f"),
        "online k-NN": last_and_highest(run.values("knn"), ".1%"),
        "images a second, median": summary("images_per_s", ".1f", statistics.median),
        "MFU, median": summary("mfu", ".1%", statistics.median),
        "peak memory, GiB": summary("memory_gib", ".2f", max),
        "skipped steps": summary("skipped", ".0f"),
        "undecodable files": str(len(run.bad_files)) if run.checkpoint else "–",
    }


def last_and_highest(curve: Curve, form: str) -> str:
    """Return the last and the highest value of a curve with their steps, the one value of a point, a dash for none."""
    if not curve:
        return "–"
    last, highest = dated_number(*curve[-1], form), max(curve, key=lambda point: point[1])
    return last if highest[1] == curve[-1][1] else f"{last}; highest {dated_number(*highest, form)}"


def network_in_words(run: RecordedRun) -> str:
    """Return the network's name, sizes, patches and images; a dash where no file says."""
    sizes = (f"{key} {run.setting('meta', key)}" for key in ("embed_dim", "depth", "num_heads") if run.setting("meta", key))
    pixels = f"patches of {run.setting('mask', 'patch_size')} px in images of {run.setting('data', 'crop_size')} px"
    return ", ".join([name, *sizes, pixels]) if (name := run.setting("meta", "model_name")) else "–"


def run_state(run: RecordedRun, now: float) -> str:
    """Return how far the run is, and how long ago it last wrote its log."""
    if not run.entries:
        return "no step was logged yet"
    if run.total and run.step >= run.total:
        return f"finished, {run.step} steps"
    minutes = (now - (run.path / "metrics.jsonl").stat().st_mtime) / 60
    ago = "less than a minute" if minutes < 1 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.0f} h"
    return f"step {run.step}{f' of {run.total} ({run.step / run.total:.0%})' if run.total else ''}, last heard of {ago} ago"


def images_a_step(run: RecordedRun) -> int | None:
    """Return the images of an optimizer step, over all ranks; None where no file says."""
    return (run.setting("data", "batch_size") or 0) * run.record.get("world", 1) or None


def step_time(run: RecordedRun) -> str:
    """Return the time spent in steps, without evaluations and checkpoints, as the logged rates add up to it."""
    rates = [(step, rate) for step, rate in run.values("images_per_s") if rate > 0]
    starts = [0, *(step for step, _ in rates)]
    # Each rate holds for the steps since the entry before: 10 steps at 2 images/s, one image a step, are 5 seconds.
    waits = sum((step - start) / rate for (step, rate), start in zip(rates, starts, strict=False))
    minutes, seconds = divmod(round(waits * (images_a_step(run) or 0)), 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min {seconds:02} s" if waits else "–"


def setting_rows(runs: Sequence[RecordedRun]) -> Compared:
    """Return section.key and its value in each run, in the order of the first config that has it."""
    flat = [{f"{section}.{key}": json.dumps(value) for section, keys in run.record.get("config", {}).items()
             for key, value in keys.items()} for run in runs]  # fmt: skip
    return compared_runs(flat)


def environment_rows(runs: Sequence[RecordedRun]) -> Compared:
    """Return software, machine, ranks, threads and decoder of each run."""
    about = ("machine", "world", "threads", "decoder")
    return compared_runs([{**run.record.get("versions", {}), **{key: run.record[key] for key in about if key in run.record}}
                     for run in runs])  # fmt: skip


def compared_runs(columns: list[dict[str, Any]]) -> Compared:
    """Return a row for each name that a run has, a dash where another run has it not."""
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [(name, [str(column.get(name, "–")) for column in columns]) for name in names]
    return [(name, cells, len(set(cells)) > 1) for name, cells in rows]
