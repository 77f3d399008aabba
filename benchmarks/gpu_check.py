"""All checks and measurements of the kernels that need a card: `make gpu-check PYTHON=python3`, in under 10 minutes.

The tests of the ops run natively, then each op whole under torch.compile and from a replayed CUDA graph, then under
compute-sanitizer where it is installed. Then come whole training steps with the official cut and packed, the benches of the
ops, the loaders, and I-JEPA beside MAE and iBOT. No speed is reported by a run whose tests fail. The result is a JSON file,
also printed as tables: versions, commit, every measurement, and the reason for each that is missing. It needs torch, triton,
pytest, pytest-benchmark and timm, no installation and no network; a measurement that needs more is left out without it.
`--dry-run` does the same at toy size on a CPU, in Triton's interpreter.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import results

ROOT = Path(__file__).resolve().parent.parent
MARKERS = "markers=gpu: needs a CUDA device\n    slow: takes more than about five seconds\n    long: takes minutes"
PYTEST = (sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(ROOT), "-p", "no:cacheprovider", "-q",
          "--tb=short", "-o", MARKERS)  # fmt: skip
KEPT = 4000  # characters of the output of a step
REFUSED = 2  # exit code of a benchmark that says why it cannot run
MASKS = {"parity": "batch_min", "packed": "none"}  # contexts cut as the official code does, or whole
STEPS = {  # model: images a step, and the further keys of the published recipe
    "vit_small": ("128",),
    "vit_base": ("128",),
    "vit_large": ("128", "meta.pred_depth=12"),
    "vit_huge": ("128", "meta.pred_depth=12", "mask.patch_size=14"),
}
TINY = ("--device", "cpu", "--size", "64", "--batch", "2", "mask.patch_size=8", "mask.min_keep=0", "runtime.threads=1")
TOY_STEP = ("--model", "vit_tiny", *TINY, "--dtype", "fp32", "--rounds", "2", "meta.depth=2", "meta.pred_depth=1")
TOY_HOURS = ("--models", "vit_tiny", *TINY, "--dtype", "fp32", "--rounds", "2", "--methods", "ijepa")
TOY_DATA = (*TINY, "--images", "8", "--rounds", "1", "--seconds", "0.1", "--workers", "0", "--sources", "folder")
HOURS = ("--device", "cuda", "--models", "vit_base")
VARIANTS = ("packed,same", "compile,graph,fp8")  # columns of gpu_hours.py that take turns


class CheckRun:
    """The steps so far, and the time that is left for those to come."""

    def __init__(self, dry: bool, seconds: float):
        self.dry, self.end = dry, time.monotonic() + seconds
        self.steps, self.rows, self.not_measured = {}, [], []
        self.environment = os.environ | {"PYTHONPATH": f"{ROOT / 'kernels'}{os.pathsep}{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"}
        if dry:
            self.environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}

    @property
    def passed(self) -> bool:
        return all(step["passed"] for step in self.steps.values())

    def step(self, name: str, *command: str, may_refuse: bool = False, **environment: str) -> str:
        """Run a command, keep whether it passed, its seconds and the end of its output, and return its standard output.

        A command that may refuse, and does or lacks a package, is no failure but not measured; neither is one whose time
        is over before it begins.
        """
        if time.monotonic() > self.end:
            self.skip(name, "the time was over")
            return ""
        print(f"== {name}", flush=True)
        begun, left = time.monotonic(), max(self.end - time.monotonic(), 1)
        try:
            done = subprocess.run(command, cwd=ROOT, env=self.environment | environment, timeout=left, capture_output=True,
                                  text=True, errors="replace")  # fmt: skip
            passed, out, told = done.returncode == 0, done.stdout, done.stdout + done.stderr
            last = (done.stderr.strip().splitlines() or [""])[-1]
            if may_refuse and (done.returncode == REFUSED or last.startswith("ModuleNotFoundError")):
                self.skip(name, last)
                return ""
        except subprocess.TimeoutExpired as error:
            passed, out, told = False, "", f"{(error.stdout or b'').decode(errors='replace')}\nout of time after {left:.0f} s"
        self.steps[name] = {"passed": passed, "seconds": round(time.monotonic() - begun, 1), "output": told[-KEPT:]}
        print(told.strip().rpartition("\n")[2] if passed else told[-KEPT:], flush=True)
        return out if passed else ""

    def keep(self, rows: list[dict], gaps: list[dict]) -> None:
        self.rows += rows
        self.not_measured += gaps

    def skip(self, what: str, reason: str) -> None:
        print(f"== {what}: not measured: {reason}", flush=True)
        self.not_measured.append({"what": what, "reason": reason})


def check_and_measure(run: CheckRun) -> None:
    chosen = ("-k", "registered or says or wants") if run.dry else ()  # CI runs the others by themselves
    run.step("tests", *PYTEST, "--confcutdir", "tests/ops", "-m", "not gpu" if run.dry else "", *chosen, "tests/ops")
    run.step("paths", sys.executable, __file__, "--paths")
    if sanitizer := shutil.which("compute-sanitizer"):
        command = (sanitizer, "--error-exitcode", "1", sys.executable, __file__, "--paths", "--plain")
        run.step("compute-sanitizer", *command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    else:
        run.skip("compute-sanitizer", "it is not installed")
    if not run.passed:
        run.skip("benches", "a check failed, and no speed is reported by a run whose checks fail")
        return
    for model, arguments in list(STEPS.items())[: 1 if run.dry else None]:
        full = ("--device", "cuda", "--dtype", "bf16", "--rounds", "8", "--model", model, "--batch", *arguments)
        for masks, cut in MASKS.items():
            run_benchmark(run, "step", {"masks": masks}, *(TOY_STEP if run.dry else full), f"mask.truncate={cut}")
    for bench in sorted((ROOT / "benchmarks" / "ops").glob("bench_*.py")):
        run_bench(run, bench)
    run_benchmark(run, "data", {}, *(TOY_DATA if run.dry else ("--device", "cuda", "--workers", "8", "--batch", "128")))
    for columns in VARIANTS[: 1 if run.dry else None]:
        run_benchmark(run, "gpu_hours", {}, *(TOY_HOURS if run.dry else HOURS), "--columns", columns)


def run_benchmark(run: CheckRun, name: str, about: dict[str, str], *arguments: str) -> None:
    """Keep the rows of benchmarks/<name>.py."""
    script, what = str(ROOT / "benchmarks" / f"{name}.py"), " ".join([name, *about.values(), *arguments])
    if out := run.step(what, sys.executable, script, *arguments, "--json", may_refuse=True):
        rows, gaps = results.rows_and_gaps(json.loads(out.strip().rpartition("\n")[2]))
        run.keep([{"part": name, **about, **row} for row in rows], gaps)


def run_bench(run: CheckRun, bench: Path) -> None:
    """Keep the results of one file of benches, which pytest-benchmark writes."""
    with tempfile.TemporaryDirectory() as folder:
        file, toy = Path(folder) / "bench.json", ("--toy",) if run.dry else ()
        outside = str(bench.parent.parent)
        run.step(bench.stem, *PYTEST, str(bench), "--confcutdir", outside, f"--benchmark-json={file}", *toy)
        if file.is_file() and file.stat().st_size:
            run.keep(*results.rows_and_gaps(json.loads(file.read_text())))


def check_paths(plain: bool) -> None:
    """Insist that every op and its gradient are the same plainly, under torch.compile as one graph, and from a CUDA graph."""
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
    """Return the result of the op and its gradients."""
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
    """Replay a CUDA graph once, captured after a call to warm up; changes of the inputs are undone before."""
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


def result_tables(report: dict[str, Any]) -> str:
    """Return all measurements, a table a part."""
    parts = [(one["name"], results.measured_rows(one["rows"])) for one in results.parts_of(report)]
    return "\n\n".join("\n".join([f"== {name}", *results.rows_table(rows)]) for name, rows in parts)


def card_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on a CPU; writes nothing without --output")
    parser.add_argument("--output", type=Path, help="file to write (default benchmarks/results/<card>-<date>.json)")
    parser.add_argument("--minutes", type=float, default=10, help="a measurement is left out after that (default 10)")
    parser.add_argument("--paths", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.paths:
        check_paths(asked.plain)
        return
    if not asked.dry_run and card_name() == "cpu":
        sys.exit("gpu-check: there is no CUDA device here; --dry-run tries everything on a CPU")
    run = CheckRun(asked.dry_run, 60 * asked.minutes)
    check_and_measure(run)
    about = results.certificate(["python", "benchmarks/gpu_check.py", *sys.argv[1:]])
    card = "cpu" if asked.dry_run else card_name()
    name = f"{re.sub(r'[^a-z0-9]+', '-', card.lower()).strip('-')}-{about['date'][:10]}"
    report = {"name": name, **about, "card": card, "dry_run": asked.dry_run, "passed": run.passed, "steps": run.steps}
    report |= {"rows": run.rows, "not_measured": run.not_measured}
    file = asked.output or results.RESULTS / f"{name}.json"
    if asked.output or not asked.dry_run:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(report, indent=1) + "\n")
        print(f"== {file}")
    failed = [name for name, step in run.steps.items() if not step["passed"]]
    print(result_tables(report))
    print(f"== {len(run.rows)} measurements, {len(run.not_measured)} not measured")
    if failed:
        sys.exit(f"gpu-check: failed: {', '.join(failed)}; the output of each is above")


if __name__ == "__main__":
    main()
