"""All checks and measurements of the kernels that need a card: `make gpu-check PYTHON=python3`, in under 10 minutes.

First come the checks: the tests of the ops, then each op under torch.compile and from a replayed CUDA graph, then under
compute-sanitizer where it is installed. What is worth most is measured first: whole training steps with the official cut and
packed, the benches of the ops, I-JEPA beside MAE and iBOT, the loaders. `--part ops|steps|hours|data` takes one of these;
all but ops begin with a short check of every op against its definition. No speed is reported by a run whose checks fail.
The result is a JSON file, also printed as tables: versions, commit, every measurement beside its prediction, and the reason
for each that is missing. Tables are printed and the file written wherever the run is stopped, by its time, SIGTERM or Ctrl-C.
It needs torch, triton, pytest, pytest-benchmark and timm, no installation and no network; a measurement that needs more is
left out without it. `--dry-run` does the same at toy size on a CPU, in Triton's interpreter.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import results

ROOT = Path(__file__).resolve().parent.parent
MARKERS = "markers=gpu: needs a CUDA device\n    slow: takes more than about five seconds\n    long: takes minutes"
PYTEST = (sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(ROOT), "-p", "no:cacheprovider", "-q",
          "--tb=short", "-o", MARKERS)  # fmt: skip
TESTS, PATHS = (*PYTEST, "--confcutdir", "tests/ops"), "tests/ops/test_paths.py"
KEPT = 4000  # characters of the output of a step
REFUSED = 2  # exit code of a benchmark that says why it cannot run
MASKS = {"parity": "batch_min", "packed": "none"}  # contexts cut as the official code does, or whole
STEPS = {  # model: the further keys of the published recipe; the first is worth most
    "vit_huge": ("meta.pred_depth=12", "mask.patch_size=14"),
    "vit_large": ("meta.pred_depth=12",),
    "vit_small": (),
    "vit_base": (),
}
BENCHES = ("adamw_ema_step", "ema_update", "varlen_attention", "short_attention", "target_loss", "assemble_predictor",
           "gather_tokens", "patchify_tokens", "scatter_tokens")  # fmt: skip
TINY = ("--device", "cpu", "--size", "64", "--batch", "2", "mask.patch_size=8", "mask.min_keep=0", "runtime.threads=1")
TOY_STEP = ("--model", "vit_tiny", *TINY, "--dtype", "fp32", "--rounds", "2", "meta.depth=2", "meta.pred_depth=1")
TOY_HOURS = ("--models", "vit_tiny", *TINY, "--dtype", "fp32", "--rounds", "2", "--methods", "ijepa")
TOY_DATA = (*TINY, "--images", "8", "--rounds", "1", "--seconds", "0.1", "--workers", "0", "--sources", "folder")
HOURS = (("vit_base", "packed,same"), ("vit_huge", "packed,compile,graph"), ("vit_base", "compile,graph,fp8"))  # take turns
PARTS = ("ops", "steps", "hours", "data")


class CheckRun:
    """The steps so far, and the time that is left for those to come."""

    def __init__(self, dry: bool, seconds: float):
        self.dry, self.end = dry, time.monotonic() + seconds
        self.steps, self.rows, self.not_measured = {}, [], []
        self.about, self.file, self.predictions = {}, None, {}
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
            code, out, errors = run_group(command, self.environment | environment, left)
            passed, told, last = code == 0, out + errors, (errors.strip().splitlines() or [""])[-1]
            if may_refuse and (code == REFUSED or last.startswith("ModuleNotFoundError")):
                self.skip(name, last)
                return ""
        except subprocess.TimeoutExpired as error:
            passed, out, told = False, "", f"{(error.stdout or b'').decode(errors='replace')}\nout of time after {left:.0f} s"
            if may_refuse:
                self.skip(name, f"out of time after {left:.0f} s")
                return ""
        self.steps[name] = {"passed": passed, "seconds": round(time.monotonic() - begun, 1), "output": told[-KEPT:]}
        print(told.strip().rpartition("\n")[2][:KEPT] if passed else told[-KEPT:], flush=True)
        self.save()
        return out if passed else ""

    def keep(self, rows: list[dict], gaps: list[dict]) -> None:
        rows = [results.with_prediction(row, self.predictions) for row in rows]
        self.rows += rows
        self.not_measured += gaps
        print("\n".join(results.rows_table(results.measured_rows(rows))), flush=True)
        self.save()

    def skip(self, what: str, reason: str) -> None:
        print(f"== {what}: not measured: {reason}", flush=True)
        self.not_measured.append({"what": what, "reason": reason})

    def begin(self, part: str | None, output: Path | None) -> None:
        """Note what the report says of every row, and where it is written after every step: SIGKILL takes one alone."""
        about = results.certificate(["python", "benchmarks/gpu_check.py", *sys.argv[1:]])
        card = "cpu" if self.dry else card_name()
        words = (re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-"), about["date"][:10], *([part] if part else []))
        self.about = {"name": "-".join(words), **about, "card": card, "dry_run": self.dry}
        self.predictions = results.read_predictions() if "H200" in card else {}
        self.file = output or (None if self.dry else results.RESULTS / f"{self.about['name']}.json")

    def report(self) -> dict[str, Any]:
        found = {"passed": self.passed, "steps": self.steps, "rows": self.rows, "not_measured": self.not_measured}
        return self.about | found

    def save(self) -> None:
        if self.file:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(json.dumps(self.report(), indent=1) + "\n")


def run_group(command: Sequence[str], environment: dict[str, str], seconds: float) -> tuple[int, str, str]:
    """Return exit code, output and errors of a command; end it with all that it has started where it is left early."""
    child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             text=True, errors="replace", start_new_session=True)  # fmt: skip
    try:
        out, errors = child.communicate(timeout=seconds)
        return child.returncode, out, errors
    except BaseException:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        raise


def check_and_measure(run: CheckRun, parts: Sequence[str] = PARTS) -> None:
    if "ops" in parts:
        check_ops(run)
    else:
        run.step("definitions", *TESTS, "-k", "definition", PATHS)
    if not run.passed:
        run.skip("measurements", "a check failed, and no speed is reported by a run whose checks fail")
        return
    for part, measure in (("steps", measure_steps), ("ops", measure_ops), ("hours", measure_hours), ("data", measure_data)):
        if part in parts:
            measure(run)


def check_ops(run: CheckRun) -> None:
    chosen = ("-k", "registered or says or wants") if run.dry else ()  # CI runs the others by themselves
    run.step("tests", *TESTS, *chosen, "tests/ops", "--ignore", PATHS)
    run.step("paths", *TESTS, *(("-m", "not gpu") if run.dry else ()), PATHS)
    if sanitizer := shutil.which("compute-sanitizer"):
        command = (sanitizer, "--error-exitcode", "1", *TESTS, "-k", "definition", PATHS)
        run.step("compute-sanitizer", *command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    else:
        run.skip("compute-sanitizer", "it is not installed")


def measure_steps(run: CheckRun) -> None:
    for model, keys in list(STEPS.items())[: 1 if run.dry else None]:
        full = ("--device", "cuda", "--dtype", "bf16", "--rounds", "8", "--model", model, "--batch", "128", *keys)
        for masks, cut in MASKS.items():
            about = {"model": model, "masks": masks}
            run_benchmark(run, "step", about, *(TOY_STEP if run.dry else full), f"mask.truncate={cut}")


def measure_ops(run: CheckRun) -> None:
    for op in BENCHES:
        run_bench(run, ROOT / "benchmarks" / "ops" / f"bench_{op}.py")


def measure_hours(run: CheckRun) -> None:
    for model, columns in HOURS[: 1 if run.dry else None]:
        full = ("--device", "cuda", "--models", model)
        run_benchmark(run, "gpu_hours", {}, *(TOY_HOURS if run.dry else full), "--columns", columns)


def measure_data(run: CheckRun) -> None:
    run_benchmark(run, "data", {}, *(TOY_DATA if run.dry else ("--device", "cuda", "--workers", "8", "--batch", "128")))


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


def result_tables(report: dict[str, Any]) -> str:
    """Return all measurements, a table a part."""
    parts = [(one["name"], results.measured_rows(one["rows"])) for one in results.parts_of(report)]
    return "\n\n".join("\n".join([f"== {name}", *results.rows_table(rows)]) for name, rows in parts)


def card_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def stop(number: int, frame: object) -> None:
    """Raise KeyboardInterrupt with the signal's name; a second signal finds the tables being printed."""
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt(signal.Signals(number).name)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", choices=PARTS, help="measure this alone, in under 9 minutes (default: all, in this order)")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on a CPU; writes nothing without --output")
    parser.add_argument("--output", type=Path, help="file to write (default benchmarks/results/<card>-<date>[-<part>].json)")
    parser.add_argument("--minutes", type=float, default=8.5, help="a measurement is left out after that (default 8.5)")
    return parser.parse_args()


def main() -> None:
    asked = parse_options()
    if not asked.dry_run and card_name() == "cpu":
        sys.exit("gpu-check: there is no CUDA device here; --dry-run tries everything on a CPU")
    run, ended = CheckRun(asked.dry_run, 60 * asked.minutes), ""
    run.begin(asked.part, asked.output)
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, stop)
    try:
        check_and_measure(run, (asked.part,) if asked.part else PARTS)
    except KeyboardInterrupt as interrupt:
        ended = f"stopped by {interrupt}"
        run.skip("the rest", ended)
    run.save()
    print(result_tables(run.report()))
    print(f"== {len(run.rows)} measurements, {len(run.not_measured)} not measured", run.file or "", flush=True)
    failed = ", ".join(name for name, step in run.steps.items() if not step["passed"])
    if failed or ended:
        sys.exit(f"gpu-check: {f'failed: {failed}' if failed else ended}; what was measured or went wrong is above")


if __name__ == "__main__":
    main()
