"""`make gpu-check` tried without a card: all of it at toy size, so that none of it is found broken on one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu_check
import pytest
import results

ROOT = Path(__file__).resolve().parents[2]
OPS = {path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks" / "ops").glob("bench_*.py")}


@pytest.mark.parametrize(
    ("part", "checks"), [("ops", ["tests", "paths"]), ("steps", ["definitions"]), ("data", ["definitions"])]
)
def test_no_speed_is_reported_by_a_run_whose_checks_fail(part, checks, monkeypatch: pytest.MonkeyPatch):
    run, ran = gpu_check.CheckRun(dry=True, seconds=60), []

    def step(name: str, *command: str, **environment: str) -> str:
        ran.append(name)
        run.steps[name] = {"passed": name != checks[-1], "seconds": 0, "output": ""}
        return ""

    monkeypatch.setattr(run, "step", step)
    gpu_check.check_and_measure(run, [part])
    assert ran in (checks, [*checks, "compute-sanitizer"]) and not run.rows
    assert any(entry["what"] == "measurements" and "no speed" in entry["reason"] for entry in run.not_measured)


def test_what_is_worth_most_comes_first(monkeypatch: pytest.MonkeyPatch):
    run, ran = gpu_check.CheckRun(dry=False, seconds=60), []
    monkeypatch.setattr(run, "step", lambda name, *command, **options: ran.append(name.split(" --")[0]) or "")
    gpu_check.check_and_measure(run)
    assert [name for name in ran if name.startswith("step")][:2] == ["step vit_huge parity", "step vit_huge packed"]
    kinds = [name.split()[0].partition("_")[0] for name in ran if name != "compute-sanitizer"]
    assert list(dict.fromkeys(kinds)) == ["tests", "paths", "step", "bench", "gpu", "data"]
    assert {name.removeprefix("bench_") for name in ran if name.startswith("bench_")} == OPS


def test_a_step_that_takes_too_long_fails_and_the_rest_is_not_measured(tmp_path: Path):
    run = gpu_check.CheckRun(dry=True, seconds=0.5)
    assert not run.step("slow", sys.executable, "-c", "import time; time.sleep(30)")
    assert "out of time" in run.steps["slow"]["output"] and not run.passed
    gpu_check.run_bench(run, tmp_path / "bench_any.py")
    assert run.not_measured == [{"what": "bench_any", "reason": "the time was over"}]


STOPPED = """
import os, sys
import gpu_check
def measure(run, parts):
    run.keep([{"part": "step", "model": "vit_small", "ms": 2.5}], [])
    run.step("endless", sys.executable, "-c", f"import subprocess; subprocess.run(['sleep', '61.{os.getpid()}'])")
gpu_check.check_and_measure = measure
gpu_check.main()
"""


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_wherever_it_is_stopped_it_tells_what_was_measured(sent, tmp_path: Path):
    """The step that runs ends with all that it has started, and nothing waits for it."""
    file, paths = tmp_path / "found.json", f"{ROOT / 'benchmarks'}{os.pathsep}{ROOT}"
    run = subprocess.Popen([sys.executable, "-c", STOPPED, "--dry-run", "--part", "steps", "--output", str(file)], text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": paths})  # fmt: skip
    said = [next(run.stdout)]
    while "== endless" not in said[-1]:
        said.append(next(run.stdout))
    assert "| vit_small | 2.5 |" in "".join(said)  # told when it is measured
    started = ["pgrep", "-f", rf"sleep 61\.{run.pid}$"]  # by this run, not by another one of this test
    until = time.monotonic() + 20
    while subprocess.run(started, capture_output=True).returncode:
        assert time.monotonic() < until
        time.sleep(0.05)
    run.send_signal(sent)
    out, errors = run.communicate(timeout=20)
    assert run.returncode == 1 and f"stopped by {sent.name}" in errors
    assert "| vit_small | 2.5 |" in out and "1 measurements" in out
    report = json.loads(file.read_text())
    assert report["rows"] and report["not_measured"][-1] == {"what": "the rest", "reason": f"stopped by {sent.name}"}
    assert subprocess.run(started, capture_output=True).returncode == 1


def test_a_row_of_a_card_stands_beside_its_prediction():
    predictions = results.read_predictions()
    run = gpu_check.CheckRun(dry=True, seconds=60)
    run.predictions = predictions
    row = {"part": "step", "model": "vit_huge", "masks": "parity", "images_per_s": 700.0}
    run.keep([row, row | {"gflop_per_image": 2 * 663.0}, {"part": "step", "ms": 1.0}], [])
    assert [one.get("predicted") for one in run.rows] == [pytest.approx(770, rel=0.01), pytest.approx(385, rel=0.01), None]


def test_every_row_that_a_card_will_fill_has_a_prediction():
    rows = json.loads((results.RESULTS / "predictions.json").read_text())["rows"]
    by_part = {part: [row for row in rows if row.get("part") == part] for part in ("step", "gpu_hours", "data", None)}
    cases = {(model, masks) for model in gpu_check.STEPS for masks in gpu_check.MASKS}
    assert {(row["model"], row["masks"]) for row in by_part["step"]} == cases
    asked = {(model, column) for model, columns in gpu_check.HOURS for column in columns.split(",")}
    assert {(row["model"], row["column"]) for row in by_part["gpu_hours"]} == asked and by_part["data"]
    assert {row["op"] for row in by_part[None]} == OPS == set(gpu_check.BENCHES)
    assert all(row["estimate"] and row["predicted"] > 0 and row["arithmetic"] for row in rows)


@pytest.mark.parametrize(
    ("script", "passed", "reason"),
    [
        ("import lightlier", True, "ModuleNotFoundError: No module named 'lightlier'"),
        ("import sys; sys.exit(print('benchmarks/x.py: no', file=sys.stderr) or 2)", True, "benchmarks/x.py: no"),
        ("print(1 / 0)", False, None),
        ("print('noise'); print('[{\"ms\": 1.5}]')", True, None),
    ],
)
def test_what_cannot_run_here_is_a_gap_and_any_other_error_a_failure(script, passed, reason, tmp_path, monkeypatch):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "gpu_hours.py").write_text(script)
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    run = gpu_check.CheckRun(dry=True, seconds=60)
    gpu_check.run_benchmark(run, "gpu_hours", {"masks": "parity"})
    assert run.passed == passed
    assert run.rows == ([{"part": "gpu_hours", "masks": "parity", "ms": 1.5}] if "noise" in script else [])
    assert [one["reason"] for one in run.not_measured] == ([reason] if reason else [])


def test_what_was_measured_is_printed_a_table_a_part():
    rows = [{"part": "step", "masks": "parity", "ms": 2.0}, {"op": "ema_update", "ms": 0.5}, {"part": "step", "ms": 3.0}]
    shown = gpu_check.result_tables({"name": "h100", "rows": rows, "not_measured": []})
    assert shown.index("h100: step") < shown.index("h100: ema_update")
    assert "| parity | 2 |" in shown and "| ema_update | 0.5 |" in shown


def test_without_a_card_it_says_so():
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu_check.py"], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": "kernels:."},
    )  # fmt: skip
    assert done.returncode == 1 and "--dry-run" in done.stderr


@pytest.mark.long
@pytest.mark.timeout(1800)  # two minutes of work, on machines that do other things too
def test_all_of_it_runs_dry(tmp_path: Path):
    file = tmp_path / "result.json"
    command = ["make", "gpu-check", f"PYTHON={sys.executable}", f"ARGS=--dry-run --minutes 25 --output {file}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    report = json.loads(file.read_text())
    assert report["passed"] and report["dry_run"] and report["card"] == "cpu"
    assert {"torch", "triton", "python"} <= report["versions"].keys()
    parts = {(row.get("part"), row.get("masks")) for row in report["rows"]}
    assert parts == {(None, None), ("step", "parity"), ("step", "packed"), ("data", None), ("gpu_hours", None)}
    ops = [row for row in report["rows"] if "part" not in row]
    for op in OPS:
        mine = [row for row in ops if row["op"] == op]
        assert {"eager", "compiled", "ours"} <= {row["provider"] for row in mine}
        assert all(row["ms"]["p20"] <= row["ms"]["median"] <= row["ms"]["p80"] and row["n"] > 1 for row in mine)
        assert all("share_of_copy" in row or "share_of_gemm" in row for row in mine)
    assert all(entry["what"] and entry["reason"] for entry in report["not_measured"])
    assert any("flash-attn" in entry["what"] for entry in report["not_measured"])
