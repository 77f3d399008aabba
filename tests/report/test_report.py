"""The report of a run: what it reads, what it says, what it says of what is missing; the page itself: test_report_page."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastjepa.cli.main import main
from fastjepa.config.schema import Config
from fastjepa.errors import UserError
from fastjepa.report.charts import TABLE_LINES, reading_charts, readings_table, thinned_points
from fastjepa.report.evaluations import evaluation_tables, paper_row
from fastjepa.report.page import render_page, setting_rows, write_page
from fastjepa.report.recorded_run import read_metrics, read_recorded_run
from tests.support.images import write_idx_pairs
from tests.support.reports import write_run

pytestmark = pytest.mark.xdist_group("report")  # one run serves all

TOY = ["meta.embed_dim=32", "meta.depth=4", "meta.num_heads=2", "meta.pred_emb_dim=24", "data.batch_size=8",
       "runtime.dtype=fp32", "runtime.device=cpu", "loss.regularizer=none", "logging.every=1", "optimization.epochs=4",
       "optimization.warmup=0"]  # fmt: skip
COUNTS = {"n_train": 1, "n_test": 1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A real run, evaluated: eight steps of the demo's config, made small."""
    root = tmp_path_factory.mktemp("report")
    patch = pytest.MonkeyPatch()
    patch.setenv("FASTJEPA_DATA", str(root))
    write_idx_pairs(root / "fashion-mnist", count=24)
    run = root / "runs" / "toy"
    assert main(["train", "--config", "demo", "--output", str(run), "--max-steps", "8", *TOY]) == 0
    assert main(["eval", "table", "--checkpoint", str(run), "--data", "fashion-mnist", "--n-train", "24"]) == 0
    yield run
    patch.undo()


def words(page: str) -> str:
    """Return what a page says: its text without style and scripts."""
    return " ".join(re.sub(r"<style>.*?</style>|<script.*?</script>|<[^>]*>", " ", page, flags=re.DOTALL).split())


points = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300).map(lambda ys: list(enumerate(ys)))


@given(points, st.integers(2, 20).map(lambda half: 2 * half))
def test_a_thinned_curve_keeps_its_ends_and_extremes(curve, limit):
    thinned = thinned_points(curve, limit)
    assert len(thinned) <= max(limit, 4) and thinned == sorted(set(thinned)) and set(thinned) <= set(curve)
    assert (thinned[0], thinned[-1]) == (curve[0], curve[-1])
    for extreme in (min, max):
        assert extreme(y for _, y in thinned) == extreme(y for _, y in curve)


def test_the_table_of_a_chart_has_the_latest_value_up_to_each_step():
    long, short = [(step, float(step)) for step in range(0, 101, 10)], [(15, 1.5), (25, 2.5)]
    assert readings_table([long, short], ".1f")[:5] == [
        ["0", "0.0", "–"], ["10", "10.0", "–"], ["15", "10.0", "1.5"], ["20", "20.0", "1.5"], ["25", "20.0", "2.5"],
    ]  # fmt: skip
    assert readings_table([long, short], ".1f")[-1] == ["100", "100.0", "–"]
    assert len(readings_table([[(step, 0.0) for step in range(1000)]], "g")) == TABLE_LINES


def test_a_line_being_written_is_no_line_and_a_damaged_one_is_counted(tmp_path: Path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo\n[3]\n{"loss": 1}\n{"step": 5, "loss": 1.0}\n{"step": 6, "loss"')
    entries, torn = read_metrics(file)
    assert ([entry["step"] for entry in entries], torn) == ([1, 5], 3)


def test_the_page_of_a_real_run_says_what_the_run_says(trained: Path):
    page = render_page([trained])
    said, last = words(page), json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"loss {last['loss']:.4f}" in said and "step 8 of 12 (67%)" in said and "embed_dim 32" in said
    assert page.count("<img ") == 2 and page.count("data:image/png;base64,") == 2  # masks and principal components
    found = json.loads((trained / "evaluation.json").read_text())
    for name, row in found["rows"].items():
        assert f"{name} {100 * row['knn']['accuracy']:.1f} ±" in said
    assert found["verdict"][0] in said and "The paper gives no number for fashion-mnist." in said
    assert Config().to_dict().keys() <= {key.partition(".")[0] for key, *_ in setting_rows([read_recorded_run(trained)])}


def test_the_command_writes_one_file_that_loads_nothing(trained: Path, capsys):
    assert main(["report", str(trained)]) in (None, 0)
    file = Path(capsys.readouterr().out.strip())
    assert file == trained / "report.html" and {path.name for path in trained.glob(".*")} <= {".run-lock"}
    page = file.read_text()
    assert len(page) < 1_000_000
    outside = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)|url\(|@import""", outside)
    assert "default-src 'none'" in page and "connect-src 'none'" in page


def test_a_checkpoint_means_its_run(trained: Path):
    assert read_recorded_run(next((trained / "checkpoints").iterdir())).path == trained.resolve()


def test_skipped_steps_and_bad_files_are_shown(trained: Path, tmp_path: Path):
    """Skips have a chart only where there were some."""
    names = {chart["name"] for chart in reading_charts([read_recorded_run(trained)])}
    assert {"loss", "lr", "ema_momentum", "images_per_s"} <= names and "skipped" not in names
    run = write_run(tmp_path / "run", [{"step": 1, "loss": None, "skipped": 1}, {"step": 2, "loss": 0.5, "skipped": 2}])
    charts = {chart["name"]: chart for chart in reading_charts([read_recorded_run(run)])}
    assert charts["skipped"]["group"] == "Trouble" and charts["loss"]["lost"] == 1
    assert "1 value that was not finite left out" in words(render_page([run], pictures=False))


def test_a_reading_that_was_made_once_is_a_number_and_no_chart(tmp_path: Path):
    entries = [{"step": 1, "loss": 1.0, "knn": 0.512, "lidar": 3.25}, {"step": 50, "loss": 0.5, "knn": 0.9}]
    entries += [{"step": 90, "loss": 0.4, "knn": 0.79}]
    more, once = write_run(tmp_path / "more", entries), write_run(tmp_path / "once", entries[:1])
    page = render_page([once], pictures=False)
    assert 'class="plot"' not in page and page.count('class="numbers"') == 3 and '"charts": []' in page
    assert "online k-NN 51.2% at step 1" in words(page) and "LiDAR Rank of what" in words(page)
    page = render_page([more], pictures=False)
    assert "online k-NN 79.0% at step 90; highest 90.0% at step 50" in words(page)
    assert page.count('class="plot"') == 2 and page.count('class="numbers"') == 1 and "3.2 at step 1" in words(page)
    both = words(render_page([more, once], pictures=False))
    assert "more: 3.2 at step 1; once: 3.2 at step 1" in both and "51.2% at step 1" in both


def with_bad_files(trained: Path, run: Path, names: list[str]) -> Path:
    """A copy of a run that met files of these names."""
    shutil.copytree(trained, run)
    state = next((run / "checkpoints").glob("*/state.json"))
    was, now = state.read_text(), state.read_text().replace('"bad_files": []', f'"bad_files": {json.dumps(names)}')
    state.write_text(now)
    listed = state.with_name("manifest.json")
    listed.write_text(listed.read_text().replace(f'"bytes": {len(was)}', f'"bytes": {len(now)}'))
    return run


def test_undecodable_files_are_named(trained: Path, tmp_path: Path):
    run = with_bad_files(trained, tmp_path / "run", ["broken & torn.jpg"])
    assert "1 undecodable file broken &amp; torn.jpg" in words(render_page([run], pictures=False))


def test_names_that_are_no_text_are_shown(trained: Path, tmp_path: Path, capsys):
    """Names of files are bytes, of any encoding: those of bad files, of the data and of the run itself."""
    run = with_bad_files(trained, tmp_path / os.fsdecode(b"run\xe9"), [os.fsdecode(b"/set/caf\xe9.jpg"), "/set/a\nb.jpg"])
    record = json.loads((run / "run.json").read_text())
    record["config"]["data"]["source"] = os.fsdecode(b"/set\xff")
    (run / "run.json").write_text(json.dumps(record))
    assert main(["report", str(run), "--no-pictures"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/run\\udce9/report.html\n"
    page = words((run / "report.html").read_text())
    assert "2 undecodable files /set/caf\\udce9.jpg /set/a b.jpg" in page and "/set\\udcff" in page


@pytest.mark.parametrize("nothing", [{}, {"metrics.jsonl": ""}, {"metrics.jsonl": '{"step": 1, "lo'}])
def test_a_run_that_has_just_begun(tmp_path: Path, nothing: dict[str, str]):
    run = write_run(tmp_path / "run", [])
    (run / "metrics.jsonl").unlink()
    for name, text in nothing.items():
        (run / name).write_text(text)
    said = words(render_page([run]))
    assert "no step was logged yet" in said and "No step was logged yet: there is nothing to draw." in said
    assert "run was not evaluated yet" in said and "could not be drawn: no checkpoint was written yet" in said


def test_what_comes_from_a_run_is_escaped(tmp_path: Path):
    """Names, settings, readings, versions and results cannot become markup, nor end the script that holds the data."""
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    entries = [{"step": 1, "loss": 1.0, evil: 2.0}]
    changed = {"data": {"source": evil}}
    run = write_run(tmp_path / "<img src=x onerror=alert(1)>", entries, changed, versions={evil: evil}, machine=evil)
    names = {"probe": evil, "encoder": evil, "data": evil, "step": evil}
    result = {"accuracy": 0.5, "ci95": [0.4, 0.6], **names, **COUNTS}
    (run / "knn.json").write_text(json.dumps(result))
    page, clean = render_page([run], pictures=False), write_run(tmp_path / "clean", [{"step": 1, "loss": 1.0, "other": 2.0}])
    (clean / "knn.json").write_text(json.dumps(result | dict.fromkeys(names, "x")))
    assert "alert(1)" in page
    for tag in ("<script", "</script", "<img"):
        assert page.count(tag) == render_page([clean], pictures=False).count(tag)


def test_several_runs_are_compared(tmp_path: Path):
    entries = [{"step": step, "loss": 1 / step} for step in range(1, 30)]
    runs = [write_run(tmp_path / name, entries, {"optimization": {"lr": lr}}) for name, lr in (("a", 0.001), ("b", 0.002))]
    differing = [row for row in setting_rows([read_recorded_run(run) for run in runs]) if row[2]]
    assert differing == [("optimization.lr", ["0.001", "0.002"], True)]
    (loss,) = reading_charts([read_recorded_run(run) for run in runs])
    assert [curve["run"] for curve in loss["curves"]] == [0, 1] and "a from 1.0000 at step 1 to 0.0345 at step 29" in loss[
        "summary"
    ]
    assert "Settings that differ" in render_page(runs, pictures=False)


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path):
    runs = [write_run(tmp_path / parent / "run", [{"step": 1, "loss": 1.0}]) for parent in ("a", "b")]
    said = words(render_page(runs, pictures=False))
    assert str(runs[0]) in said and str(runs[1]) in said


def test_the_papers_numbers_stand_beside(tmp_path: Path):
    run = write_run(tmp_path / "run", [])
    result = {"accuracy": 0.5, "ci95": [0.4, 0.6]}
    row = {"encoder": "target", "data": "/data/cifar100", "knn": result, "linear": result, "linear_bn": result,
           "paper": {"I-JEPA H/14": 87.5}}  # fmt: skip
    (run / "transfer.json").write_text(json.dumps({"rows": [row, row | {"data": "own", "paper": None}]}))
    (made,) = evaluation_tables(read_recorded_run(run))
    assert made["head"][-1] == "I-JEPA H/14 (paper)"
    assert [[cell["text"] for cell in cells] for _, cells in made["rows"]] == [["50.0 ± 10.0"] * 3 + [p] for p in ("87.5", "–")]
    assert paper_row("/data/CIFAR-100")["MAE H/14"] == 77.3 and paper_row("fashion-mnist") == {}


def test_mistakes_are_one_sentence(tmp_path: Path, capsys):
    run = write_run(tmp_path / "run", [{"step": 1, "loss": 1.0}])
    (run / "odd.json").write_text('{"rows": [1]}')
    for arguments, sentence in (
        ([tmp_path / "none"], "no run directory"),
        ([run], "odd.json: not as `fastjepa eval` writes it"),
        ([run, "--output", tmp_path], "is a directory; pass --output FILE.html"),
        ([run, "--output", run / "run.json" / "x.html"], "x.html: cannot be written (Not a directory); give another place"),
    ):
        assert main(["report", *map(str, arguments)]) == 2
        said = capsys.readouterr().err.strip()
        assert sentence in said and "\n" not in said


def test_a_page_that_cannot_be_made_leaves_the_old_one(tmp_path: Path):
    run = write_run(tmp_path / "run", [{"step": 1, "loss": 1.0}])
    write_page([run], run / "report.html", pictures=False)
    before = (run / "report.html").read_text()
    (run / "run.json").write_text("{")
    with pytest.raises(UserError, match="run.json: not JSON"):
        write_page([run], run / "report.html", pictures=False)
    assert (run / "report.html").read_text() == before
