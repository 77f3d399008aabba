"""`make gpu-check` tried without a card: all of it at toy size, so that none of it is found broken on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import decode  # noqa: E402
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
    assert not run.measurements and "decode" not in ran
    assert not any(name.startswith(("step", "data", "gpu_hours")) for name in ran)
    assert any(entry["what"] == "benches" and "no speed" in entry["reason"] for entry in run.not_measured)


def test_a_step_that_takes_too_long_fails_and_the_rest_is_not_measured(tmp_path: Path):
    run = gpu_check.Run(dry=True, seconds=0)
    assert not run.step("slow", sys.executable, "-c", "import time; time.sleep(30)")
    assert "out of time" in run.steps["slow"]["output"]
    gpu_check.measure(run, tmp_path / "bench_any.py", "pytest")
    assert run.not_measured == [{"what": "bench_any", "reason": "the time was over"}]


def test_a_benchmark_that_refuses_is_not_measured_and_says_why():
    run = gpu_check.Run(dry=True, seconds=120)
    gpu_check.benchmark(run, "step", {"masks": "parity"}, "--rounds", "0")
    assert run.passed and not run.measurements
    assert run.not_measured[0]["what"] == "step parity --rounds 0"
    assert run.not_measured[0]["reason"] == "benchmarks/step.py: --rounds 0: time at least one round"


@pytest.mark.parametrize(
    ("script", "passed", "reason"),
    [("import lightlier", True, "No module named 'lightlier'"), ("print(1 / 0)", False, None)],
)
def test_a_package_that_is_not_there_is_a_gap_and_any_other_error_a_failure(script, passed, reason, tmp_path, monkeypatch):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "gpu_hours.py").write_text(script)
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    run = gpu_check.Run(dry=True, seconds=60)
    gpu_check.benchmark(run, "gpu_hours", {})
    assert run.passed == passed and not run.measurements
    assert [one["reason"] for one in run.not_measured] == ([f"ModuleNotFoundError: {reason}"] if reason else [])


def test_what_was_measured_is_printed_a_table_a_part():
    rows = [{"part": "step", "masks": "parity", "ms": 2.0}, {"op": "ema_update", "median_s": 0.5}, {"part": "step", "ms": 3.0}]
    shown = gpu_check.tables({"measurements": rows, "not_measured": []})
    assert shown.index("gpu-check: step") < shown.index("gpu-check: ema_update")
    assert "| parity | 2 |" in shown and "| ema_update | 0.5 |" in shown


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch):
    """A call that measures a few images, which `eaten` estimates need not be drawn for."""
    monkeypatch.setattr(decode, "eaten", lambda: [{"model": "toy", "utilisation": 0.5, "images_per_s_estimate": 10.0}])
    return lambda: decode.measure(torch.device("cpu"), rounds=2, seconds=0.05, distinct=8, batch=4)


def test_decoders_are_measured_against_what_training_eats(toy):
    found = toy()
    assert [one["provider"] for one in found["measurements"]] == list(decode.PROVIDERS) and found["not_measured"] == []
    for one in found["measurements"]:
        assert 0 < one["images_per_s"]["p20"] <= one["images_per_s"]["median"] <= one["images_per_s"]["p80"]
        assert one["feeds"][0]["times"] == pytest.approx(one["images_per_s"]["median"] / 10)


def test_both_decoders_show_the_boxes():
    work, cpu = decode.Work.make(4, 4), torch.device("cpu")
    theirs = torch.stack(next(decode.torchvision(work, cpu)))
    ours = next(decode.dali(work, cpu))
    assert ours.shape == theirs.shape == (4, 3, 224, 224)
    assert (ours.int() - theirs.int()).abs().float().mean() < 0.5
    assert [image.shape for image in next(decode.torchvision(work, cpu, cropped=False))] == [(3, 375, 500)] * 4


def test_a_decoder_that_is_not_there_is_not_measured(toy, monkeypatch: pytest.MonkeyPatch):
    packages = {"dali": "nvidia.daly", "torchvision": "torchvisionary", "torchvision, decode alone": "torchvision"}
    with_typos = {name: (packages[name], opened) for name, (_, opened) in decode.PROVIDERS.items()}
    monkeypatch.setattr(decode, "PROVIDERS", with_typos)
    found = toy()
    assert [one["provider"] for one in found["measurements"]] == ["torchvision, decode alone"]
    assert found["not_measured"] == [
        {"what": "decode, dali", "reason": "nvidia.daly is not installed"},
        {"what": "decode, torchvision", "reason": "torchvisionary is not installed"},
    ]


def test_a_decoder_that_fails_says_why(toy, monkeypatch: pytest.MonkeyPatch):
    def broken(work, device):
        raise RuntimeError("built without\n nvJPEG")

    monkeypatch.setattr(decode, "PROVIDERS", {"torchvision": ("torchvision", broken)})
    assert toy()["not_measured"] == [{"what": "decode, torchvision", "reason": "built without nvJPEG"}]


def test_what_training_eats_is_an_estimate_of_its_flops():
    """Near the figures of a trainer at 35 % (ViT-S) and 60 % (ViT-H) of an H100's products: 7,000 and 770 images/s."""
    eats = {(one["model"], one["utilisation"]): one["images_per_s_estimate"] for one in decode.eaten()}
    assert eats["ViT-S/16", 0.35] == pytest.approx(7000, rel=0.2) and eats["ViT-H/14", 0.6] == pytest.approx(770, rel=0.2)
    assert eats["ViT-B/16", 0.6] == pytest.approx(eats["ViT-B/16", 0.35] * 0.6 / 0.35)


def test_decoding_needs_only_what_a_bare_machine_has():
    """torch, and what timm brings: torchvision, numpy, pillow, pyyaml."""
    code = "import sys, decode; decode.eaten(); next(decode.dali(decode.Work.make(1, 1), __import__('torch').device('cpu'))); "
    code += "print(*sys.modules)"
    path = os.pathsep.join(map(str, (ROOT / "benchmarks", ROOT / "kernels", ROOT)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "yaml" in loaded and not loaded & {"rich", "deepspeed", "lightly", "pyarrow", "webdataset", "tensorboard"}, (
        done.stderr
    )


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
    parts = {(info.get("part"), info.get("masks")) for info in report["measurements"]}
    assert parts == {(None, None), ("step", "parity"), ("step", "packed"), ("data", None), ("gpu_hours", None)}
    ops = [info for info in report["measurements"] if "part" not in info]
    decoded = [info for info in ops if info["op"] == "decode"]
    assert [info["provider"] for info in decoded] == list(decode.PROVIDERS) and all(len(info["feeds"]) == 6 for info in decoded)
    for op in OPS:
        mine = [info for info in ops if info["op"] == op]
        assert {"eager", "compiled", "ours"} <= {info["provider"] for info in mine}
        assert all(info["p20_s"] <= info["median_s"] <= info["p80_s"] and info["rounds"] > 1 for info in mine)
        assert all("share_of_copy" in info or "share_of_gemm" in info for info in mine)
    assert all(entry["what"] and entry["reason"] for entry in report["not_measured"])
    assert any("flash-attn" in entry["what"] for entry in report["not_measured"])
