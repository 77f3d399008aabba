"""Tables of a run's evaluations, from the JSON that `fastjepa eval` left in its directory; the paper's numbers beside."""

from pathlib import Path
from typing import Any

from fastjepa.errors import UserError
from fastjepa.evals.dense.table import HEAD_NAMES, in_units
from fastjepa.evals.published import PAPER_COLUMNS, PUBLISHED, published_for
from fastjepa.evals.table import PROBE_NAMES, in_percent
from fastjepa.report.recorded_run import RecordedRun

Cell = dict[str, Any]  # {"text": words, "share": length of the bar behind them in [0, 1], or None}
Row = tuple[str, list[Cell], dict[str, float]]  # (name, cells, {method: the paper's accuracy})


def evaluation_tables(run: RecordedRun) -> list[dict[str, Any]]:
    """Return the tables of `eval table`, `eval transfer` and `eval ... --json > RUN/NAME.json`.

    Each is {title, head, rows: [(name, cells)], said: sentences below it}. UserError for a file that is not as they write it.
    """
    tables = []
    for stem, found in run.results.items():
        try:
            several = found.values() if stem == "dense" and "rows" not in found else (found,)
            tables += [evaluation_table(stem, one) for one in several if {"rows", "accuracy"} & one.keys()]
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            problem = f"{run.path / stem}.json: not as `fastjepa eval` writes it ({error!r}); write it anew or move it away"
            raise UserError(problem) from error
    return tables


def evaluation_table(stem: str, found: dict[str, Any]) -> dict[str, Any]:
    """Return the table of one file of results."""
    rows = found.get("rows")
    if "constant" in found:
        return dense_table_of(found)
    if isinstance(rows, dict):
        return encoders_table(found)
    return transfer_table(rows) if isinstance(rows, list) else single_table(stem, found)


def encoders_table(found: dict[str, Any]) -> dict[str, Any]:
    """Return the table of `eval table`: encoders and baselines; the paper's numbers stand beside the target encoder."""
    paper = paper_row(found["data"])
    said = [*found["verdict"], image_counts(found), *([] if paper else [f"The paper gives no number for {found['data']}."])]
    rows = [
        (
            name,
            [*probe_cells(row), plain_cell(f"{row['effective_rank']:.1f}")],
            paper if name == "target encoder" else {},
        )
        for name, row in found["rows"].items()
    ]
    return table_beside_paper(f"{found['data']}: encoders and baselines", [*PROBE_NAMES.values(), "effective rank"], rows, said)


def dense_table_of(found: dict[str, Any]) -> dict[str, Any]:
    """Return the table of `eval dense`: chance, raw patches and encoders, by neighbours and by a linear layer."""
    head = [f"{name}: {score['title']}" for name in HEAD_NAMES.values() for score in found["scores"].values()]
    each = {"constant": dict.fromkeys(HEAD_NAMES, found["constant"])} | found["rows"]
    rows = [(name, [cell for kind in HEAD_NAMES for cell in dense_cells(found, row[kind])]) for name, row in each.items()]
    layers = "last layer" if found["layers"] == "last" else f"layers {', '.join(map(str, found['layers']))}"
    said = [image_counts(found), "Constant: always the most frequent class, or the mean, of the training pictures."]
    return {
        "title": f"{found['data']}: {found['task']} of pixels, {layers}",
        "unit": "",
        "head": head,
        "rows": rows,
        "said": said,
    }


def dense_cells(found: dict[str, Any], scores: dict[str, Any]) -> list[Cell]:
    """Return the scores of one head with half of their intervals; those of which 1 is best have a bar."""
    about = found["scores"]
    return [plain_cell(in_units(about[name], one)) | {"share": float(one["value"]) if about[name]["best"] == 1 else None}
            for name, one in scores.items()]  # fmt: skip


def transfer_table(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the table of `eval transfer`: a row for each data set."""
    shown = [(Path(row["data"]).name, probe_cells(row), row["paper"] or {}) for row in rows]
    return table_beside_paper(f"Transfer of the {rows[0]['encoder']} encoder", list(PROBE_NAMES.values()), shown, [])


def single_table(stem: str, found: dict[str, Any]) -> dict[str, Any]:
    """Return the table of any other evaluation: one row."""
    chance = [f"Always the most frequent answer: {found['chance']:.1%}."] if "chance" in found else []
    name = f"{found['probe']}, {found['encoder']} encoder, step {found['step']}"
    row = (name, [accuracy_cell(found)], found.get("paper") or paper_row(found["data"]))
    return table_beside_paper(f"{found['data']}: {stem}", ["accuracy"], [row], [image_counts(found), *chance])


def table_beside_paper(title: str, head: list[str], rows: list[Row], said: list[str]) -> dict[str, Any]:
    """Return the table with a column more for each of the paper's methods that a row has a number of."""
    methods = list(dict.fromkeys(name for _, _, paper in rows for name in paper))
    body = [
        (name, cells + [plain_cell(f"{paper[m]:.1f}" if m in paper else "–") for m in methods]) for name, cells, paper in rows
    ]
    return {
        "title": title,
        "head": head + [f"{method} (paper)" for method in methods],
        "rows": body,
        "said": said,
        "unit": ", accuracy in %",
    }


def probe_cells(row: dict[str, Any]) -> list[Cell]:
    """Return the accuracies of the three probes."""
    return [accuracy_cell(row[probe]) for probe in PROBE_NAMES]


def accuracy_cell(result: dict[str, Any]) -> Cell:
    """Return an accuracy with half of its 95 % interval, and a bar of its length."""
    return plain_cell(in_percent(result)) | {"share": float(result["accuracy"])}


def plain_cell(words: str) -> Cell:
    """Return a cell without a bar."""
    return {"text": words, "share": None}


def image_counts(found: dict[str, Any]) -> str:
    """Return the sentence that says how many images an evaluation used, and what ± means."""
    return f"{found['n_train']} training and {found['n_test']} test images; ± is half the 95 % interval."


def paper_row(data: str) -> dict[str, float]:
    """Return {method: accuracy in %} of the paper for a data set of this name; empty where it has none."""
    known = next((p for entry in PUBLISHED.values() if (p := published_for(data, entry.classes))), None)
    return {name: getattr(known, field) for name, field in PAPER_COLUMNS.items()} if known else {}
