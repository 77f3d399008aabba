"""Everything about the kernels that only a card can tell: `make gpu-check PYTHON=python3`, in under 10 minutes.

The ops' tests run natively, then each op whole under torch.compile and from a replayed CUDA graph, then compute-sanitizer
where it is installed. Then come whole training steps with the official cut and packed, JPEGs decoded by what is installed of
DALI and torchvision, the ops' benches, the loaders, and I-JEPA beside MAE and iBOT. No speed is reported by a run whose tests
fail. The result is a JSON file, also printed as tables: versions, commit, every measurement, and what was not measured and
why. It needs torch, triton, pytest, pytest-benchmark and timm, no installation and no network; what needs more is not measured
without it. `--dry-run` does the same at toy size on a CPU, in Triton's interpreter.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import results

ROOT = Path(__file__).resolve().parent.parent
DALI = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
PACKAGES = ("torch", "triton", "pytest", "pytest-benchmark", "timm", "flash-attn", "xformers", "torchvision", *DALI)
MARKERS = "markers=gpu: needs a CUDA device\n    slow: takes more than about five seconds"
PLAIN = ("-c", os.devnull, "--rootdir", str(ROOT), "-p", "no:cacheprovider", "-q", "--tb=short", "-o", MARKERS)
KEPT = 4000  # characters of a step's output
REFUSED = 2  # exit code of a benchmark that says why it cannot run
MASKS = {"parity": "batch_min", "packed": "none"}  # contexts cut as the official code does, or whole
STEPS = {  # model: images a step, and what else the published recipe has
    "vit_small": ("128",),
    "vit_base": ("128",),
    "vit_large": ("128", "--pred-depth", "12"),
    "vit_huge": ("128", "--pred-depth", "12", "mask.patch_size=14"),
}
TINY = ("--device", "cpu", "--dtype", "fp32", "--size", "64", "--batch", "2", "mask.patch_size=8", "mask.min_keep=0")
TOY_STEP = ("--model", "vit_tiny", *TINY, "--rounds", "2", "--threads", "1", "meta.depth=2", "--pred-depth", "1")
TOY_HOURS = ("--models", "vit_tiny", *TINY, "--rounds", "2", "--threads", "1", "--methods", "ijepa")
TOY_DATA = (*TINY, "--images", "8", "--rounds", "1", "--seconds", "0.1", "--workers", "0", "--sources", "folder")


class Run:
    """The steps so far, and the time that is left for those to come."""

    def __init__(self, dry: bool, seconds: float):
        self.dry, self.end = dry, time.monotonic() + seconds
        self.steps, self.measurements, self.not_measured = {}, [], []
        self.environment = os.environ | {"PYTHONPATH": f"{ROOT / 'kernels'}{os.pathsep}{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"}
        if dry:
            self.environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}

    @property
    def passed(self) -> bool:
        return all(step["passed"] for step in self.steps.values())

    def step(self, name: str, *command: str, **environment: str) -> bool:
        print(f"== {name}", flush=True)
        begun = time.monotonic()
        try:
            done = self.call(*command, stderr=subprocess.STDOUT, **environment)
            passed, output = done.returncode == 0, done.stdout
        except subprocess.TimeoutExpired as error:
            passed, output = False, f"{(error.stdout or b'').decode(errors='replace')}\nout of time after {error.timeout:.0f} s"
        self.steps[name] = {"passed": passed, "seconds": round(time.monotonic() - begun, 1), "output": output[-KEPT:]}
        print(output[-KEPT:] if not passed else output.strip().rpartition("\n")[2], flush=True)
        return passed

    def call(self, *command: str, stderr: int = subprocess.PIPE, **environment: str) -> subprocess.CompletedProcess:
        """TimeoutExpired past the end of the run."""
        left = max(self.end - time.monotonic(), 1)
        return subprocess.run(command, cwd=ROOT, env=self.environment | environment, timeout=left, stdout=subprocess.PIPE,
                              stderr=stderr, text=True, errors="replace")  # fmt: skip

    def over(self, what: str) -> bool:
        """Whether the time was up before `what` could begin, which is then not measured."""
        if time.monotonic() < self.end:
            return False
        self.skip(what, "the time was over")
        return True

    def skip(self, what: str, reason: str) -> None:
        print(f"== {what}: not measured: {reason}", flush=True)
        self.not_measured.append({"what": what, "reason": reason})


def check(run: Run) -> None:
    pytest = (sys.executable, "-m", "pytest", *PLAIN)
    chosen = ("-k", "registered or says or wants") if run.dry else ()  # CI runs the others by themselves
    run.step("tests", *pytest, "--confcutdir", "tests/ops", "-m", "not gpu" if run.dry else "", *chosen, "tests/ops")
    run.step("paths", sys.executable, __file__, "--paths")
    if sanitizer := shutil.which("compute-sanitizer"):
        command = (sanitizer, "--error-exitcode", "1", sys.executable, __file__, "--paths", "--plain")
        run.step("compute-sanitizer", *command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    else:
        run.skip("compute-sanitizer", "it is not installed")
    if not run.passed:
        run.skip("benches", "a check failed, and no speed is reported by a run whose checks fail")
        return
    for model, arguments in STEPS.items():
        for masks, cut in MASKS.items():
            benchmark(run, "step", {"masks": masks}, *step_arguments(run.dry, model, arguments), "--truncate", cut)
        if run.dry:
            break
    decode(run)
    for bench in sorted((ROOT / "benchmarks" / "ops").glob("bench_*.py")):
        measure(run, bench, *pytest)
    benchmark(run, "data", {}, *(TOY_DATA if run.dry else ("--device", "cuda", "--workers", "8", "--batch", "128")))
    hours = TOY_HOURS if run.dry else ("--device", "cuda", "--models", "vit_base")
    benchmark(run, "gpu_hours", {}, *hours, "--columns", "packed,same")


def step_arguments(dry: bool, model: str, arguments: tuple[str, ...]) -> tuple[str, ...]:
    if dry:
        return TOY_STEP
    return ("--device", "cuda", "--dtype", "bf16", "--rounds", "8", "--model", model, "--batch", *arguments)


def benchmark(run: Run, name: str, about: dict[str, str], *arguments: str) -> None:
    """The rows of benchmarks/<name>.py; where it refuses, or lacks a package, why it is not measured."""
    what, script = " ".join([name, *about.values(), *arguments]), str(ROOT / "benchmarks" / f"{name}.py")
    if run.over(what):
        return
    print(f"== {what}", flush=True)
    begun = time.monotonic()
    try:
        done = run.call(sys.executable, script, *arguments, "--json")
    except subprocess.TimeoutExpired:
        run.skip(what, "the time was over before it ended")
        return
    last = (done.stderr.strip().splitlines() or [""])[-1]
    if done.returncode == REFUSED or last.startswith("ModuleNotFoundError"):
        run.skip(what, last)
        return
    passed = done.returncode == 0
    run.steps[what] = {"passed": passed, "seconds": round(time.monotonic() - begun, 1), "output": done.stderr[-KEPT:]}
    if not passed:
        print(done.stderr[-KEPT:], flush=True)
        return
    found = json.loads(done.stdout.strip().rpartition("\n")[2])
    run.measurements += [{"part": name, **about, **row} for row in results.rows_of(found)]
    run.not_measured += found.get("not_measured", [])


def decode(run: Run) -> None:
    if run.over("decode"):
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "decode.json"
        toy = ("--toy",) if run.dry else ()
        run.step("decode", sys.executable, str(ROOT / "benchmarks" / "decode.py"), "--output", str(file), *toy)
        found = json.loads(file.read_text()) if file.is_file() else None
    if found is None:
        run.skip("decode", "it ended without results")
        return
    run.measurements += found["measurements"]
    run.not_measured += found["not_measured"]


def measure(run: Run, bench: Path, *pytest: str) -> None:
    if run.over(bench.stem):
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bench.json"
        toy = ("--toy",) if run.dry else ()
        run.step(bench.stem, *pytest, str(bench), "--confcutdir", str(bench.parent), f"--benchmark-json={file}", *toy)
        found = json.loads(file.read_text())["benchmarks"] if file.is_file() and file.stat().st_size else []
    if not found:
        run.skip(bench.stem, "it ended without results")
    for result in found:
        info = result["extra_info"] | {"case": result["param"]}
        if reason := info.pop("not_measured", ""):
            run.not_measured.append({"what": f"{bench.stem} {info['case']}", "reason": reason})
        elif "median_s" in info:
            run.measurements.append(info)


def paths(plain: bool) -> None:
    """Every op and its gradient, called plainly, under torch.compile as one graph, and replayed from a CUDA graph: equal."""
    import torch

    import fastjepa_kernels
    from fastjepa_kernels.cases import CASES

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_default_device(device)
    fastjepa_kernels.use("triton")
    ways = {"compiled": whole_graph} | ({"CUDA graph": replayed} if device == "cuda" else {})
    for op, (make, variants) in CASES.items():
        for variant in variants if plain else variants[:1]:
            torch.manual_seed(0)
            expected = outcome(make(*variant), called)
            for way, how in {} if plain else ways.items():
                torch.manual_seed(0)
                torch.testing.assert_close(outcome(make(*variant), how), expected, msg=lambda said: f"{op}, {way}: {said}")  # noqa: B023
        print(f"{op}: {', '.join(ways) if not plain else 'plain'}", flush=True)
    if device == "cuda":
        torch.cuda.synchronize()


def outcome(case: Any, how: Callable) -> list:
    for leaf in case.leaves:
        leaf.requires_grad_()
    return [tensor.detach().clone() for tensor in (*how(case), *case.writes)]


def called(case: Any, call: Callable | None = None) -> list:
    """The op's result and its gradients."""
    import torch

    out = (call or case.call)()
    if not case.leaves:
        return [] if out is None else [out]
    return [out, *torch.autograd.grad(out, case.leaves, torch.ones_like(out))]


def whole_graph(case: Any) -> list:
    import torch

    torch._dynamo.reset()
    backend = "inductor" if torch.cuda.is_available() else "aot_eager"
    return called(case, torch.compile(case.call, fullgraph=True, backend=backend))


def replayed(case: Any) -> list:
    """Captured after a call to warm up, whose changes to the inputs are undone; then replayed once."""
    import torch

    inputs = [tensor.detach() for tensor in (*case.reads, *case.writes)]
    before = [tensor.clone() for tensor in inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        called(case)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = called(case)
    for tensor, value in zip(inputs, before, strict=True):
        tensor.copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    return out


def tables(report: dict[str, Any]) -> str:
    """All that was measured, a table a part."""
    parts = results.parts_of(report | {"name": "gpu-check"})
    return "\n\n".join("\n".join([f"== {one['name']}", *results.rows_table(results.measured(one["rows"]))]) for one in parts)


def card() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def birth_certificate(dry: bool) -> dict[str, Any]:
    import torch

    git = ("git", "-c", "safe.directory=*", "-C", str(ROOT))
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "card": "cpu" if dry else card(), "date": datetime.now().astimezone().isoformat(timespec="seconds"), "dry_run": dry,
        "command": " ".join(["python", "benchmarks/gpu_check.py", *sys.argv[1:]]),
        "commit": commit.stdout.strip() or "unknown", "changed_files": len(changed.stdout.splitlines()), "versions": versions,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on a CPU; writes nothing without --output")
    parser.add_argument("--output", type=Path, help="file to write (default benchmarks/results/<card>-<date>.json)")
    parser.add_argument("--minutes", type=float, default=10, help="what is not done by then is not measured (default 10)")
    parser.add_argument("--paths", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.paths:
        paths(asked.plain)
        return
    if not asked.dry_run and card() == "cpu":
        sys.exit("gpu-check: there is no CUDA device here; --dry-run tries everything on a CPU")
    run = Run(asked.dry_run, 60 * asked.minutes)
    check(run)
    report = birth_certificate(asked.dry_run) | {"passed": run.passed, "steps": run.steps}
    report |= {"measurements": run.measurements, "not_measured": run.not_measured}
    slug = re.sub(r"\W+", "-", report["card"].lower()).strip("-")
    file = asked.output or ROOT / "benchmarks" / "results" / f"{slug}-{report['date'][:10]}.json"
    if asked.output or not asked.dry_run:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(report, indent=1) + "\n")
        print(f"== {file}")
    failed = [name for name, step in run.steps.items() if not step["passed"]]
    print(tables(report))
    print(f"== {len(run.measurements)} measurements, {len(run.not_measured)} not measured")
    if failed:
        sys.exit(f"gpu-check: failed: {', '.join(failed)}; what each said is above")


if __name__ == "__main__":
    main()
