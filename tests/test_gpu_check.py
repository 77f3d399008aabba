"""`make gpu-check` tried without a card: all of it at toy size, so that none of it is found broken on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_check  # noqa: E402

OPS = {path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks" / "ops").glob("bench_*.py")}


def test_no_speed_is_reported_by_a_run_whose_checks_fail(monkeypatch: pytest.MonkeyPatch):
    run = gpu_check.Run(dry=True, seconds=60)
    ran = []

    def step(name: str, *command: str, **environment: str) -> bool:
        ran.append(name)
        run.steps[name] = {"passed": name != "paths", "seconds": 0, "output": ""}
        return run.steps[name]["passed"]

    monkeypatch.setattr(run, "step", step)
    gpu_check.check(run)
    assert ran[:2] == ["tests", "paths"] and not any(name.startswith("bench_") for name in ran)
    assert not run.measurements
    assert any(entry["what"] == "benches" and "no speed" in entry["reason"] for entry in run.not_measured)


def test_a_step_that_takes_too_long_fails_and_the_rest_is_not_measured(tmp_path: Path):
    run = gpu_check.Run(dry=True, seconds=0)
    assert not run.step("slow", sys.executable, "-c", "import time; time.sleep(30)")
    assert "out of time" in run.steps["slow"]["output"]
    gpu_check.measure(run, tmp_path / "bench_any.py", "pytest")
    assert run.not_measured == [{"what": "bench_any", "reason": "the time was over"}]


def test_without_a_card_it_says_so():
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu_check.py"], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": "kernels:."},
    )  # fmt: skip
    assert done.returncode == 1 and "--dry-run" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)  # two minutes of work, on machines that do other things too
def test_all_of_it_runs_dry(tmp_path: Path):
    file = tmp_path / "result.json"
    command = ["make", "gpu-check", f"PYTHON={sys.executable}", f"ARGS=--dry-run --minutes 25 --output {file}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    report = json.loads(file.read_text())
    assert report["passed"] and report["dry_run"] and report["card"] == "cpu"
    assert {"torch", "triton", "python", "cuda"} <= report["versions"].keys()
    for op in OPS:
        mine = [info for info in report["measurements"] if info["op"] == op]
        assert {"eager", "compiled", "ours"} <= {info["provider"] for info in mine}
        assert all(info["p20_s"] <= info["median_s"] <= info["p80_s"] and info["rounds"] > 1 for info in mine)
        assert all("share_of_copy" in info or "share_of_gemm" in info for info in mine)
    assert all(entry["what"] and entry["reason"] for entry in report["not_measured"])
    assert any("flash-attn" in entry["what"] for entry in report["not_measured"])
