"""benchmarks/results.py: results are kept with their birth certificates, and RESULTS.md is what they make of themselves."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import results

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"

ABOUT = {
    "name": "toy",
    "command": "python benchmarks/toy.py --json",
    "commit": "0123456789abcdef",
    "changed_files": 1,
    "date": "2026-11-24T12:00:00+00:00",
    "machine": {"cpu": "A Processor", "cores": 2, "threads": 2},
    "versions": {"python": "3.11", "torch": "2.14"},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(results, "DOCUMENT", tmp_path / "RESULTS.md")
    monkeypatch.setattr(results, "README", tmp_path / "README.md")
    results.README.write_text("before\n<!-- results -->\nold\n<!-- end -->\nafter\n")
    return tmp_path / "results"


def printing(text: str) -> list[str]:
    return ["python", "-c", f"print('noise'); print({text!r})"]


def kept(folder: Path, output: object) -> dict:
    path = results.save_result("toy", printing(json.dumps(output)))
    assert path == folder / "toy.json"
    return json.loads(path.read_text())


def test_a_result_has_a_birth_certificate(folder: Path):
    found = kept(folder, {"rows": [{"ms": 1.5}], "not_measured": [{"what": "a card", "reason": "there is none"}]})
    assert set(results.KEYS) | {"not_measured"} == found.keys()
    head = subprocess.run(["git", "-c", "safe.directory=*", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert found["commit"] == head.stdout.strip()
    assert found["command"].startswith("python -c")
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]", found["date"])
    assert found["machine"]["cores"] >= 1 and found["machine"]["cpu"]
    assert {"python", "torch"} <= found["versions"].keys()
    assert found["rows"] == [{"ms": 1.5}]


def test_it_is_found_again(folder: Path):
    found = kept(folder, [{"ms": 1.5}])
    assert results.read_results(folder) == [found]
    assert results.main(["write"]) == 0
    assert results.DOCUMENT.read_text() == results.results_document([found])


def test_a_benchmark_may_write_a_file(folder: Path, tmp_path: Path):
    file = tmp_path / "made.json"
    command = ["python", "-c", f"open({str(file)!r}, 'w').write('[{{\"ms\": 2.0}}]')"]
    assert results.main(["save", "toy", "--file", str(file), "--", *command]) == 0
    assert json.loads((folder / "toy.json").read_text())["rows"] == [{"ms": 2.0}]


def test_an_old_file_is_not_taken_for_a_new_one(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "made.json"
    file.write_text("[]")
    assert results.main(["save", "toy", "--file", str(file), "--", "python", "-c", "pass"]) == 2
    assert "printed no JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, command, named",
    [
        ("toy", ["python", "-c", "print('[]'); raise SystemExit(3)"], "ended with 3"),
        ("toy", ["python", "-c", "print('words')"], "printed no JSON; add --json"),
        ("a/b", ["python", "-c", "print('[]')"], "'a/b': name a result with letters"),
        ("toy", ["no_such_program_anywhere"], "no_such_program_anywhere"),
    ],
)
def test_nothing_is_kept_of_a_failure(
    folder: Path, name: str, command: list[str], named: str, capsys: pytest.CaptureFixture[str]
):
    assert results.main(["save", name, "--", *command]) == 2
    assert named in capsys.readouterr().err
    assert not list(folder.glob("*.json"))


def test_rows_of_what_the_benchmarks_print():
    gap = {"what": "c", "reason": "no card"}
    assert results.rows_and_gaps([{"zero": 1}]) == ([{"zero": 1}], [])
    assert results.rows_and_gaps({"rows": [{"a": 1}], "not_measured": [gap]}) == ([{"a": 1}], [gap])
    assert results.rows_and_gaps({"model": "a", "errors": {}}) == ([{"model": "a", "errors": {}}], [])


def test_rows_of_pytest_benchmark():
    info = {"op": "ema", "provider": "ours", "median_s": 0.002, "p20_s": 0.001, "p80_s": 0.003, "rounds": 15}
    absent = {"name": "test_b", "extra_info": {"not_measured": "it runs on CUDA alone"}}
    rows, gaps = results.rows_and_gaps({"benchmarks": [{"name": "test_a[ours]", "extra_info": info}, absent]})
    assert rows == [
        {"benchmark": "test_a[ours]", "n": 15, "ms": {"median": 2.0, "p20": 1.0, "p80": 3.0}, "op": "ema", "provider": "ours"}
    ]
    assert gaps == [{"what": "test_b", "reason": "it runs on CUDA alone"}]


def test_a_row_is_read_as_text():
    row = {
        "images_per_s": 12.3456, "p20": 12.0, "p80": 13.0, "mfu": 0.65432, "peak_bytes": 3 * 2**20, "accuracy": None,
        "epochs_published": True, "phases": {"target": 466.4, "ema": 11.0}, "size": [64, 64], "n": 10, "what": "a|b",
    }  # fmt: skip
    assert results.flatten(row) == {
        "images/s": "12.3 (12 to 13)", "mfu": "0.654", "peak MiB": "3", "accuracy": "", "epochs published": "yes",
        "phases: target": "466", "phases: ema": "11", "size": "64 x 64", "n": "10", "what": "a\\|b",
    }  # fmt: skip
    assert results.flatten({"ms": 5.0, "p20": 4.0, "p80": 6.0}) == {"ms": "5 (4 to 6)"}


def test_the_document():
    """A value that all of at least three rows share is said once; estimates have a table of their own."""
    rows = [{"model": "a", "dtype": "bf16", "ms": float(number)} for number in (1, 2, 3)]
    guess = {"estimate": True, "model": "b", "hours": 139.0, "arithmetic": "2 x 3"}
    text = results.results_document([ABOUT | {"rows": [*rows, guess], "not_measured": [{"what": "c", "reason": "no card"}]}])
    measured, estimates = text.split("## Estimates")
    assert "In every row: model a, dtype bf16.\n\n| ms |\n| --- |\n| 1 |\n| 2 |\n| 3 |\n\nNot measured: c: no card." in measured
    assert "`python benchmarks/toy.py --json`" in measured
    about = "2026-11-24, commit 0123456789 and 1 changed file  \n2 cores of A Processor, 2 threads  \npython 3.11, torch 2.14"
    assert about in measured
    assert "139" not in measured
    assert "| b | 139 | 2 x 3 |" in estimates
    assert results.results_document([]) == results.INTRODUCTION + "\n"


def test_what_is_projected_from_a_rate_is_an_estimate():
    row = {"method": "mae", "images_per_s": 4.0, "p20": 3.0, "p80": 5.0, "mfu": 0.5, "epochs": 1600, "hours": 9.0,
           "arithmetic": "1600 x 4"}  # fmt: skip
    measured, estimates = results.results_document([ABOUT | {"rows": [row]}]).split("## Estimates")
    assert measured.endswith("| method | images/s | mfu |\n| --- | --- | --- |\n| mae | 4 (3 to 5) | 0.5 |\n\n")
    assert estimates.endswith("| mae | 4 | 1600 | 9 | 1600 x 4 |\n")


def test_a_file_of_gpu_check_is_a_result_for_each_part(tmp_path: Path):
    rows = [{"part": "step", "ms": 2.0}, {"op": "ema", "ms": 0.5}]
    gap = {"what": "c", "reason": "no card"}
    checked = ABOUT | {"name": "nvidia-h100", "card": "NVIDIA H100", "steps": {}, "rows": rows, "not_measured": [gap]}
    (tmp_path / "nvidia-h100.json").write_text(json.dumps(checked))
    text = results.results_document(results.read_results(tmp_path))
    assert "### nvidia-h100: step" in text and "### nvidia-h100: ema" in text and text.count("no card") == 1


@pytest.mark.parametrize("wrong, named", [("{", "is not JSON"), ("[]", "has no name"), ('{"name": "x"}', "has no command")])
def test_a_stray_file_is_an_error(folder: Path, wrong: str, named: str, capsys: pytest.CaptureFixture[str]):
    folder.mkdir()
    (folder / "stray.json").write_text(wrong)
    assert results.main(["write"]) == 2
    assert "stray.json" in (said := capsys.readouterr().err) and named in said


def test_the_committed_document_is_that_of_the_committed_results():
    assert (BENCHMARKS / "RESULTS.md").read_text() == results.results_document(results.read_results(BENCHMARKS / "results"))


def make(*arguments: str) -> str:
    return subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_the_readmes_table_is_that_of_the_committed_results():
    table = results.headline(results.read_results(results.RESULTS))
    assert f"<!-- results -->\n{table}<!-- end -->" in results.README.read_text()


def test_the_headline_is_put_between_its_marks(folder: Path):
    """And nothing else of the README changes; results that are not of the headline are left out."""
    ours = {"mfu": 0.68, "peak_bytes": 2**30, "ratio": {"median": 1.15, "p20": 1.12, "p80": 1.17}}
    result = ABOUT | {"name": "step_vit_small", "command": "python x", "rows": [ours, {"mfu": 0.65, "peak_bytes": 2**31}]}
    folder.mkdir()
    for one in (result, ABOUT | {"rows": []}):
        (folder / f"{one['name']}.json").write_text(json.dumps(one))
    assert results.main(["write"]) == 0
    before, mark, head, _, row, *after = results.README.read_text().splitlines()
    assert (before, mark, head) == ("before", "<!-- results -->", "| what | result | command |")
    assert after == ["<!-- end -->", "after"]
    assert "1.15 (1.12 to 1.17) times its images/s; 68% of the measured GEMM rate against 65%; 1024 against 2048 MiB" in row


def spread(median: float) -> dict[str, float]:
    return {"median": median, "p20": median - 0.1, "p80": median + 0.1}


def test_the_peers_of_the_largest_model_are_in_the_headline():
    """Rows of ours are not; a peer that takes twice our memory leaves us half of its."""
    compared = {"peer": "lightly", "ratio": spread(1.3), "ratio_at_equal_flops": spread(1.2), "memory_ratio": 2.0}
    rows = [{"model": "vit_tiny"} | compared, {"model": "vit_small", "peer": "fastjepa"}, {"model": "vit_small"} | compared]
    said = "lightly: 1.3 (1.2 to 1.4) times its images/s, 0.5 of its memory, 1.2 at equal FLOPs"
    assert results.peers_headline(rows) == said


def test_loaders_in_the_headline_are_compared_with_torchvisions():
    rows = [{"loader": "torch", "source": "shards", "images_per_s": spread(700.0), "ratio_to_torchvision": spread(1.3)},
            {"loader": "torchvision", "source": "folder", "images_per_s": spread(540.0)}]  # fmt: skip
    assert results.loaders_headline(rows) == "ours (shards) 700, 1.3 times; torchvision (folder) 540"


def test_make_bench_runs_every_bench():
    """Names are stable: they are the files' and the parameters'."""
    benches = {str(path.relative_to(ROOT)) for path in BENCHMARKS.rglob("bench_*.py")}
    for target in ("bench", "bench-compare"):
        assert benches == set(re.findall(r"benchmarks/\S*bench_\w+\.py", make(target)))
    assert "benchmarks/ops/bench_ema_update.py" in benches
    assert "--benchmark-compare-fail=median:10%" in make("bench-compare", "BENCH_LIMIT=10%")


def bench(store: Path, *arguments: str) -> subprocess.CompletedProcess:
    chosen = ["--toy", "--device=cpu", "-k", "ours or foreach_lerp", f"--benchmark-storage=file://{store}"]
    command = [sys.executable, "-m", "pytest", str(BENCHMARKS / "ops/bench_ema_update.py"), *chosen, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_a_bench_that_became_slower_fails(tmp_path: Path):
    done = bench(tmp_path, "--benchmark-autosave")
    assert done.returncode == 0, done.stdout
    (saved,) = tmp_path.glob("*/*.json")
    found = json.loads(saved.read_text())
    assert [one["name"] for one in found["benchmarks"]] == ["test_ema_update[torch._foreach_lerp_]", "test_ema_update[ours]"]
    assert found["machine_info"]["measured_on"]["versions"].keys() >= {"python", "torch"}
    for one in found["benchmarks"]:
        assert one["stats"]["median"] == one["extra_info"]["median_s"] > 0
        one["stats"]["median"] *= 0.001 if "ours" in one["name"] else 1000
    saved.write_text(json.dumps(found))
    done = bench(tmp_path, "--benchmark-compare", "--benchmark-compare-fail=median:25%")
    assert done.returncode == 1, done.stdout
    said = done.stdout + done.stderr
    assert set(re.findall(r"^\s*(test_.+?) \(.*RegressionCheck", said, re.MULTILINE)) == {"test_ema_update[ours]"}
