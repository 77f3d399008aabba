"""`fastjepa report`: run directories as one HTML page that needs no network. Charts by Observable Plot, in page/."""

import base64
import hashlib
import io
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from fastjepa.errors import ConfigError, UserError
from fastjepa.evals.published import PAPER_COLUMNS, PUBLISHED, published_for
from fastjepa.evals.table import PROBE_NAMES, PROBES, in_percent
from fastjepa.files import write_atomic
from fastjepa.report.run_directory import RecordedRun, read_recorded_run, reading_charts, reading_values
from fastjepa.run.directory import run_directory

PAGE_FOLDER = Path(__file__).parent / "page"
PAGE_SCRIPTS = ("d3.min.js", "plot.min.js", "page.js")
REPORT_IMAGES = 6  # of a drawn picture
PICTURE_CAPTIONS = {
    "masks": ("Masks over images", "Each row an image: whole, what the context encoder sees, and the blocks to predict."),
    "pca": ("Principal components of patch features", "The first three as red, green and blue, for each encoder."),
    "neighbours": (
        "Nearest neighbours of predictions",
        "Blocks of other images nearest to what is predicted of a hidden one.",
    ),
    "samples": ("Samples of the predictor", "What a diffusion decoder draws from a prediction, beside the truth."),
}
Compared = list[tuple[str, list[str], bool]]  # (name, a cell for each run, whether they differ)


def write_page(paths: Sequence[Path], file: Path, pictures: bool = True) -> None:
    """The page of these runs, in `file`: there whole or not at all."""
    if file.is_dir():
        raise ConfigError(f"{file}: is a directory; pass --output FILE.html")
    write_atomic(file, render_page(paths, pictures).encode())


def render_page(paths: Sequence[Path], pictures: bool = True, live: bool = False) -> str:
    """The HTML of these runs; `live`: it asks its server for a newer one."""
    names = unique_names([run_directory(path).name for path in paths], paths)
    runs, now = [read_recorded_run(path, name) for path, name in zip(paths, names, strict=True)], time.time()
    charts = reading_charts(runs)
    drawn = [{key: one[key] for key in ("id", "title", "form", "curves")} for one in charts]
    return page_template().render(
        runs=runs,
        live=live,
        made=time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(now)),
        facts=[row for row in compared_runs([run_facts(run, now) for run in runs]) if set(row[1]) != {"–"}],
        charts=charts,
        groups=list(dict.fromkeys(one["group"] for one in charts)),
        evaluations=[(run, probe_results(run)) for run in runs],
        pictures=[(run, *(gather_pictures(run) if pictures else ([], None))) for run in runs],
        settings=setting_rows(runs),
        versions=version_lines(runs),
        data={"runs": names, "charts": drawn},
        scripts=page_scripts(),
        hashes=" ".join(f"'sha256-{content_digest(script)}'" for script in page_scripts()),
        style=(PAGE_FOLDER / "page.css").read_text(),
    )


@cache
def page_template() -> Any:
    """Whatever comes from a run is escaped by it; what goes in as it is, style and scripts, is this package's own."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(PAGE_FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).get_template("page.html")


@cache
def page_scripts() -> list[str]:
    return [(PAGE_FOLDER / name).read_text() for name in PAGE_SCRIPTS]


def content_digest(script: str) -> str:
    """As a content security policy names a script: no other runs on the page."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def unique_names(names: Sequence[str], paths: Sequence[Path]) -> list[str]:
    """Directory names; where two are the same, the paths as they were given."""
    return list(names) if len(set(names)) == len(names) else [str(path) for path in paths]


def run_facts(run: RecordedRun, now: float) -> dict[str, str]:
    """{fact: what is so, a dash where the directory does not say}."""

    def said(reading: str, form: str, of: Callable[[list[float]], float] = lambda v: v[-1]) -> str:
        found = [value for _, value in reading_values(run, reading)]
        return format(of(found), form) if found else "–"

    return {
        "state": state_line(run, now),
        "time in steps": duration_in_words(run),
        "network": network_line(run),
        "data": run.setting("data", "source") or run.setting("data", "image_folder") or "–",
        "images a step": str(images_line(run) or "–"),
        "loss": said("loss", ".4f"),
        "effective rank": said("effective_rank", ".1f"),
        "online k-NN, last and highest": f"{said('knn', '.1%')}, {said('knn', '.1%', max)}" if run.last("knn") else "–",
        "images a second, median": said("images_per_s", ".1f", statistics.median),
        "MFU, median": said("mfu", ".1%", statistics.median),
        "peak memory, GiB": said("memory_gib", ".2f", max),
        "skipped steps": said("skipped", ".0f"),
        "undecodable files": str(len(run.bad_files)) if run.checkpoint else "–",
    }


def network_line(run: RecordedRun) -> str:
    sizes = (f"{key} {run.setting('meta', key)}" for key in ("embed_dim", "depth", "num_heads") if run.setting("meta", key))
    pixels = f"patches of {run.setting('mask', 'patch_size')} px in images of {run.setting('data', 'crop_size')} px"
    return ", ".join([name, *sizes, pixels]) if (name := run.setting("meta", "model_name")) else "–"


def state_line(run: RecordedRun, now: float) -> str:
    """How far it is, and when it was last heard of."""
    if not run.entries:
        return "no step was logged yet"
    if run.total and run.step >= run.total:
        return f"finished, {run.step} steps"
    minutes = (now - (run.path / "metrics.jsonl").stat().st_mtime) / 60
    ago = "less than a minute" if minutes < 1 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.0f} h"
    return f"step {run.step}{f' of {run.total} ({run.step / run.total:.0%})' if run.total else ''}, last heard of {ago} ago"


def images_line(run: RecordedRun) -> int | None:
    """Of an optimizer step, over all ranks."""
    return (run.setting("data", "batch_size") or 0) * run.record.get("world", 1) or None


def duration_in_words(run: RecordedRun) -> str:
    """Time in steps, evaluations and checkpoints left out: what the logged rates add up to."""
    rates = [(step, rate) for step, rate in reading_values(run, "images_per_s") if rate > 0]
    starts = [0, *(step for step, _ in rates)]
    waits = sum((step - start) / rate for (step, rate), start in zip(rates, starts, strict=False))  # seconds an image
    minutes, seconds = divmod(round(waits * (images_line(run) or 0)), 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min {seconds:02} s" if waits else "–"


def setting_rows(runs: Sequence[RecordedRun]) -> Compared:
    """(section.key, its value in each run, whether they differ), in the order of the first config that has it."""
    flat = [{f"{section}.{key}": json.dumps(value) for section, keys in run.record.get("config", {}).items()
             for key, value in keys.items()} for run in runs]  # fmt: skip
    return compared_runs(flat)


def version_lines(runs: Sequence[RecordedRun]) -> Compared:
    about = ("machine", "world", "threads", "decoder")
    return compared_runs([{**run.record.get("versions", {}), **{key: run.record[key] for key in about if key in run.record}}
                     for run in runs])  # fmt: skip


def compared_runs(columns: list[dict[str, Any]]) -> Compared:
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [(name, [str(column.get(name, "–")) for column in columns]) for name in names]
    return [(name, cells, len(set(cells)) > 1) for name, cells in rows]


def probe_results(run: RecordedRun) -> list[dict[str, Any]]:
    """Tables of accuracies: what `eval table`, `eval transfer` and `eval ... --json > RUN/NAME.json` left."""
    made = []
    for stem, found in run.results.items():
        try:
            made += [probe_table(stem, found)] if {"rows", "accuracy"} & found.keys() else []
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            problem = f"{run.path / stem}.json: not as `fastjepa eval` writes it ({error!r}); write it anew or move it away"
            raise ConfigError(problem) from error
    return made


def probe_table(stem: str, found: dict[str, Any]) -> dict[str, Any]:
    """{title, head, rows [(name, cells)], said [sentences]} of one file of results."""
    rows = found.get("rows")
    return (
        encoder_rows(found)
        if isinstance(rows, dict)
        else transfer_table(rows)
        if isinstance(rows, list)
        else single_results(stem, found)
    )


def encoder_rows(found: dict[str, Any]) -> dict[str, Any]:
    """Of `eval table`: each encoder and its baselines; the paper's numbers beside the target encoder."""
    paper = paper_row(found["data"])
    said = [*found["verdict"], image_counts(found), *([] if paper else [f"The paper gives no number for {found['data']}."])]
    rows = [
        (
            name,
            [*evaluation_results(row), plain_text(f"{row['effective_rank']:.1f}")],
            paper if name == "target encoder" else {},
        )
        for name, row in found["rows"].items()
    ]
    return tabled_results(f"{found['data']}: encoders and baselines", [*PROBE_NAMES.values(), "effective rank"], rows, said)


def transfer_table(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of `eval transfer`: a row for each data set."""
    shown = [(Path(row["data"]).name, evaluation_results(row), row["paper"] or {}) for row in rows]
    return tabled_results(f"Transfer of the {rows[0]['encoder']} encoder", list(PROBE_NAMES.values()), shown, [])


def single_results(stem: str, found: dict[str, Any]) -> dict[str, Any]:
    """Of any other evaluation."""
    chance = [f"Always the most frequent answer: {found['chance']:.1%}."] if "chance" in found else []
    name = f"{found['probe']}, {found['encoder']} encoder, step {found['step']}"
    row = (name, [accuracy_cell(found)], found.get("paper") or paper_row(found["data"]))
    return tabled_results(f"{found['data']}: {stem}", ["accuracy"], [row], [image_counts(found), *chance])


def tabled_results(
    title: str, head: list[str], rows: list[tuple[str, list[dict], dict[str, float]]], said: list[str]
) -> dict[str, Any]:
    """The table with a column for each of the paper's methods that a row has a number of."""
    methods = list(dict.fromkeys(name for _, _, paper in rows for name in paper))
    body = [
        (name, cells + [plain_text(f"{paper[m]:.1f}" if m in paper else "–") for m in methods]) for name, cells, paper in rows
    ]
    return {"title": title, "head": head + [f"{method} (paper)" for method in methods], "rows": body, "said": said}


def evaluation_results(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [accuracy_cell(row[probe]) for probe in PROBES]


def accuracy_cell(result: dict[str, Any]) -> dict[str, Any]:
    return plain_text(in_percent(result)) | {"share": float(result["accuracy"])}


def plain_text(words: str) -> dict[str, Any]:
    """A cell; `share`, where there is one, is drawn as a bar behind it."""
    return {"text": words, "share": None}


def image_counts(found: dict[str, Any]) -> str:
    return f"{found['n_train']} training and {found['n_test']} test images; ± is half the 95 % interval."


def paper_row(data: str) -> dict[str, float]:
    """The paper's numbers for a data set of this name; none where it has none."""
    known = next((p for entry in PUBLISHED.values() if (p := published_for(data, entry.classes))), None)
    return {name: getattr(known, field) for name, field in PAPER_COLUMNS.items()} if known else {}


def gather_pictures(run: RecordedRun) -> tuple[list[dict[str, str]], str | None]:
    """({title, words, source} of each picture, why some are missing): those in RUN/pictures, then masks and PCA drawn anew."""
    found = {file.stem: file.read_bytes() for file in sorted((run.path / "pictures").glob("*.png"))}
    missing = None
    if not {"masks", "pca"} <= found.keys():
        try:
            if run.checkpoint is None:
                raise ConfigError("no checkpoint was written yet")
            found = draw_pictures(run.checkpoint) | found
        except (UserError, OSError) as error:
            missing = str(error)
    stems = [*(stem for stem in PICTURE_CAPTIONS if stem in found), *sorted(found.keys() - PICTURE_CAPTIONS.keys())]
    return [picture_entry(stem, found[stem]) for stem in stems], missing


def picture_entry(stem: str, content: bytes) -> dict[str, str]:
    title, words = PICTURE_CAPTIONS.get(stem, (stem, f"pictures/{stem}.png"))
    return {"title": title, "words": words, "source": f"data:image/png;base64,{base64.b64encode(content).decode()}"}


@lru_cache(maxsize=8)
def draw_pictures(checkpoint: Path) -> dict[str, bytes]:
    """Masks and principal components of IMAGES of the run's own images, as PNG; on the CPU, which the run can spare."""
    from PIL import Image

    from fastjepa.evals.inputs import open_subject
    from fastjepa.visualize.sheets import masks_sheet, open_drawn_split, pca_sheet, shown_images

    subject = open_subject(checkpoint, "cpu", cache=False)
    split = open_drawn_split(subject.config.data, "train", REPORT_IMAGES, subject.config.runtime.seed)
    shown = shown_images(subject, split, len(split.rows))
    drawn = {
        "masks": masks_sheet(subject, shown, subject.config.runtime.seed),
        "pca": pca_sheet(subject, shown),
    }
    return {name: png_uri(Image.fromarray(sheet)) for name, sheet in drawn.items()}


def png_uri(image: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue()
