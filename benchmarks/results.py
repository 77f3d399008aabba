"""Results with their birth certificates: `save` runs a benchmark and keeps what it printed, `write` makes RESULTS.md of all.

A result is one JSON file of benchmarks/results/: name, command, commit, changed_files, date, machine, versions, rows, and
not_measured. Rows are dicts. Rows with `estimate: true` were not measured and have a table of their own; so have the
projections from the rate of a row with `arithmetic`. The `p20` and `p80` of a `median` stand beside it, as numbers of the
row or in a dict of the three.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "benchmarks" / "RESULTS.md"
PACKAGES = ("torch", "triton", "deepspeed", "timm", "lightly", "torchvision", "pillow", "simplejpeg",
            "nvidia-dali-cuda130", "flash-attn", "xformers", "pytest-benchmark", "spdl", "webdataset",
            "scikit-learn")  # fmt: skip
KEYS = ("name", "command", "commit", "changed_files", "date", "machine", "versions", "rows")
SPREAD = {"median", "p20", "p80"}
PROJECTED = ("epochs", "epochs_published", "hours", "accuracy", "hours_per_point", "arithmetic")  # of rates, not measured
PROJECTED_OF = ("method", "model", "column", "device", "images_per_s")
IDENTITY = ("part", "model", "masks", "method", "column", "source", "loader", "workers", "benchmark")  # of a card's rows
CONSTANT = 3  # rows from which on a column that never changes is said once, above the table
INTRODUCTION = """# Results

Made by `make results` from the files in `benchmarks/results/`; do not edit. Each table names the command that it repeats, the
commit and how many files differed from it, the machine and the versions; n is the number of timed rounds, a spread is p20 to
p80, and ratios are medians of the rounds' ratios. `python benchmarks/results.py save NAME -- COMMAND ... --json` adds one."""
README = ROOT / "README.md"
BLOCK = re.compile(r"(<!-- results -->\n).*?(<!-- end -->)", re.DOTALL)
CAVEAT = "Nobody ran these to their end: the arithmetic is in each row."
EXAMPLES = """examples:
  python benchmarks/results.py save step_vit_small -- python benchmarks/step.py --device cpu --rounds 16 --json
  python benchmarks/results.py save ops --file /tmp/ops.json -- python -m pytest benchmarks/ops/bench_ema_update.py \\
      --device cpu --benchmark-json=/tmp/ops.json
  python benchmarks/results.py write"""


class ResultError(ValueError):
    """A result that cannot be kept or read; the message is one sentence that says which and what to do."""


def certificate(command: Sequence[str]) -> dict[str, Any]:
    """Return the facts without which a number is not believed: command, commit, changes since, date, machine, versions."""
    git = ("git", "-c", "safe.directory=*", "-C", str(ROOT))
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    return {
        "command": shlex.join(command), "commit": commit.stdout.strip() or "unknown",
        "changed_files": len(changed.stdout.splitlines()), "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": machine_facts(), "versions": package_versions(),
    }  # fmt: skip


def machine_facts() -> dict[str, Any]:
    import torch

    listed = Path("/proc/cpuinfo")
    cpu = re.search(r"^model name\s*: (.+)$", listed.read_text() if listed.is_file() else "", re.MULTILINE)
    found = {"cpu": cpu.group(1) if cpu else platform.processor() or platform.machine(), "cores": len(os.sched_getaffinity(0)),
             "threads": torch.get_num_threads()}  # fmt: skip
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"card": properties.name, "card_gib": round(properties.total_memory / 2**30, 1)}
    return found


def package_versions() -> dict[str, str]:
    import torch

    found = {"python": platform.python_version()} | ({"cuda": torch.version.cuda} if torch.cuda.is_available() else {})
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def save_result(name: str, command: Sequence[str], file: Path | None = None) -> Path:
    """Run a benchmark and keep its JSON, which it prints last or writes to `file`; ResultError where it fails or has none."""
    if not re.fullmatch(r"\w+", name):
        raise ResultError(f"{name!r}: name a result with letters, digits and _ alone")
    about = certificate(command)
    if file:
        file.unlink(missing_ok=True)
    program = [sys.executable] if command[0] == "python" else [command[0]]  # the certificate's versions are this Python's
    done = subprocess.run([*program, *command[1:]], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise ResultError(f"{about['command']}: ended with {done.returncode}; nothing is kept of a benchmark that fails")
    text = file.read_text() if file and file.is_file() else done.stdout.strip().rpartition("\n")[2]
    try:
        output = json.loads(text)
    except json.JSONDecodeError as error:
        raise ResultError(f"{about['command']}: printed no JSON; add --json, or name its file with --file") from error
    rows, gaps = rows_and_gaps(output)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"name": name, **about, "rows": rows, "not_measured": gaps}, indent=1) + "\n")
    return path


def rows_and_gaps(output: Any) -> tuple[list[dict], list[dict]]:
    """Return the rows of the output of a benchmark, and what it could not measure with the reasons.

    The output is a list of rows, a dict with `rows`, the file of pytest-benchmark, or one row. Our benches put their own
    statistics into the extra_info of pytest-benchmark.
    """
    if isinstance(output, list):
        return output, []
    if "benchmarks" not in output:
        return output.get("rows", [output]), output.get("not_measured", [])
    rows, gaps = [], []
    for name, info in ((one["name"], dict(one["extra_info"])) for one in output["benchmarks"]):
        if "not_measured" in info:
            gaps.append({"what": name, "reason": info["not_measured"]})
            continue
        ms = {key: 1000 * info.pop(f"{key}_s") for key in ("median", "p20", "p80")}
        rows.append({"benchmark": name, "n": info.pop("rounds"), "ms": ms, **info})
    return rows, gaps


def read_results(folder: Path) -> list[dict]:
    """Read the results of a folder by name; ResultError for any other JSON file. A result of gpu_check.py is one a part."""
    results = []
    for path in sorted(folder.glob("*.json")):
        try:
            found = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ResultError(f"{path}: is not JSON ({error}); save the result again") from error
        missing = [key for key in KEYS if not isinstance(found, dict) or key not in found]
        if missing:
            raise ResultError(f"{path}: has no {missing[0]}; save it with `python benchmarks/results.py save`")
        results += parts_of(found) if "steps" in found or found["name"] == "predictions" else [found]
    return results


def parts_of(checked: dict) -> list[dict]:
    """Split the result or the predictions of gpu_check.py into one a part (step, data) or op; the last one has the gaps."""
    parts: dict[str, list[dict]] = {}
    for row in checked["rows"]:
        parts.setdefault(row.get("part") or row["op"], []).append({key: value for key, value in row.items() if key != "part"})
    found = [checked | {"name": f"{checked['name']}: {part}", "rows": rows, "not_measured": []} for part, rows in parts.items()]
    return [*found[:-1], *({**last, "not_measured": checked["not_measured"]} for last in found[-1:])]


def read_predictions(file: Path = RESULTS / "predictions.json") -> dict[tuple, dict]:
    """Return the predictions of benchmarks/predictions.py by the values of IDENTITY of the rows that they are for."""
    rows = json.loads(file.read_text())["rows"] if file.is_file() else []
    return {tuple(row.get(key) for key in IDENTITY): row for row in rows}


def with_prediction(row: dict, predictions: dict[tuple, dict]) -> dict:
    """Return a measured row with the number that was predicted for it, at the FLOPs of the masks that it drew."""
    found = predictions.get(tuple(row.get(key) for key in IDENTITY))
    if not found:
        return row
    drawn = found["gflop_per_image"] / row["gflop_per_image"] if "gflop_per_image" in found.keys() & row.keys() else 1.0
    return row | {"predicted": found["predicted"] * drawn}


def results_document(results: Sequence[dict]) -> str:
    """Return the text of RESULTS.md."""
    parts = [INTRODUCTION]
    for title, chosen in (("## Measured", measured_rows), (f"## Estimates\n\n{CAVEAT}", estimated_rows)):
        sections = [result_section(result, rows) for result in results if (rows := chosen(result["rows"]))]
        parts += [title, *sections] if sections else []
    return "\n\n".join(parts) + "\n"


def measured_rows(rows: Iterable[dict]) -> list[dict]:
    """Return the measured rows, without the projections from their rates."""
    return [{key: value for key, value in row.items() if "arithmetic" not in row or key not in PROJECTED}
            for row in rows if not row.get("estimate")]  # fmt: skip


def estimated_rows(rows: Iterable[dict]) -> list[dict]:
    """Return the rows of estimates and of projections, with their arithmetic."""
    return [{key: value for key, value in row.items() if key in (*PROJECTED_OF, *PROJECTED) or row.get("estimate") and
             key != "estimate"} for row in rows if "arithmetic" in row or row.get("estimate")]  # fmt: skip


def result_section(result: dict, rows: list[dict]) -> str:
    head = [f"### {result['name']}", "", f"`{result['command']}`", "", "  \n".join(certificate_lines(result)), ""]
    gaps = [f"{one['what']}: {one['reason']}" for one in result.get("not_measured", ())]
    return "\n".join([*head, *rows_table(rows), *(["", "Not measured: " + "; ".join(gaps) + "."] if gaps else [])])


def certificate_lines(result: dict) -> Iterator[str]:
    changed, at = result["changed_files"], result["machine"]
    files = f" and {changed} changed file{'s' if changed != 1 else ''}" if changed else ""
    yield f"{result['date'][:10]}, commit {result['commit'][:10]}{files}"
    yield ", ".join([*([at["card"]] if "card" in at else []), *([f"{at['cores']} cores of {at['cpu']}"] if "cpu" in at else []),
                     *([f"{at['threads']} thread{'s' if at['threads'] != 1 else ''}"] if "threads" in at else [])])  # fmt: skip
    yield ", ".join(f"{name} {number}" for name, number in result["versions"].items() if number != "not installed")


def flatten(row: dict, prefix: str = "") -> dict[str, str]:
    """Return {column: text}; p20 and p80 that stand beside a rate belong to it."""
    row, found = dict(row), {}
    rate = next((key for key in ("images_per_s", "ms") if key in row), None)
    if rate and {"p20", "p80"} <= row.keys():
        row[rate] = {"median": row[rate], "p20": row.pop("p20"), "p80": row.pop("p80")}
    for key, value in row.items():
        name = prefix + key.replace("_", " ").replace("images per s", "images/s").replace("gflop", "GFLOP")
        if isinstance(value, dict) and value.keys() >= SPREAD:
            found[name] = spread_text(value)
        elif isinstance(value, dict):
            found |= flatten(value, name + ": ")
        elif key.endswith("_bytes") and isinstance(value, int):
            found[name.removesuffix("bytes") + "MiB"] = f"{value / 2**20:.0f}"
        else:
            found[name] = value_text(value)
    return found


def spread_text(value: dict[str, float | None]) -> str:
    if value["median"] is None:
        return ""
    return f"{value_text(value['median'])} ({value_text(value['p20'])} to {value_text(value['p80'])})"


def value_text(value: Any) -> str:
    """Return three digits of a number, more where it is larger; nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    if isinstance(value, list):
        return (" x " if len(value) <= 2 else ", ").join(map(value_text, value))  # a size, or values along an axis
    return str(value).replace("|", "\\|")


def shared_values(rows: list[dict[str, str]]) -> tuple[dict[str, str], list[str]]:
    """Return what all rows share, where there are enough rows, and the names of the other columns in order of appearance."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    same = {name: rows[0][name] for name in names if len(rows) >= CONSTANT and len({row.get(name, "") for row in rows}) == 1}
    return {name: value for name, value in same.items() if value}, [name for name in names if name not in same]


def rows_table(rows: list[dict]) -> list[str]:
    """Return the lines of a Markdown table, and above it what every row has in common."""
    flat = [flatten(row) for row in rows]
    same, columns = shared_values(flat)
    said = "In every row: " + ", ".join(f"{name} {value}" for name, value in same.items()) + "."
    return [*([said, ""] if same else []), *markdown_table(columns, flat)]


def markdown_table(columns: Iterable[str], rows: list[dict[str, str]]) -> list[str]:
    columns = list(columns)
    head = [" | ".join(columns), " | ".join("---" for _ in columns)]
    return [f"| {line} |" for line in (*head, *(" | ".join(row.get(name, "") for name in columns) for row in rows))]


def headline(results: Sequence[dict]) -> str:
    """Return the table of the README: what each result named in HEADLINE comes to, and its command."""
    kept = {result["name"]: result for result in results}
    rows = [{"what": what, "result": said(kept[name]["rows"]), "command": f"`{kept[name]['command']}`"}
            for name, (what, said) in HEADLINE.items() if name in kept]  # fmt: skip
    return "\n".join(markdown_table(("what", "result", "command"), rows)) + "\n"


def official_headline(rows: list[dict]) -> str:
    ours, theirs = rows
    rates = f"{ours['mfu']:.0%} of the measured GEMM rate against {theirs['mfu']:.0%}"
    memory = f"{ours['peak_bytes'] / 2**20:.0f} against {theirs['peak_bytes'] / 2**20:.0f} MiB"
    return f"{spread_text(ours['ratio'])} times its images/s; {rates}; {memory}"


def methods_headline(rows: list[dict]) -> str:
    """Say images/s by method and column; the `naive` column is left to RESULTS.md."""
    return "; ".join(
        f"{row['method']} {row['column']} {flatten(row)['images/s']}" for row in rows
        if row["model"] == rows[-1]["model"] and row["column"] in ("packed", "same")
    )  # fmt: skip


def updates_headline(rows: list[dict]) -> str:
    """Say the milliseconds of ours, of torch's loop and of torch's fastest calls."""
    shown = ("ours", "torch._foreach_lerp_", "torch fused + foreach", "for loop", "torch for loops")
    return "; ".join(f"{row['op']} {row['provider']} {spread_text(row['ms'])} ms" for row in rows if row["provider"] in shown)


def peers_headline(rows: list[dict]) -> str:
    """Say how far ours is ahead of each peer, of the largest model, in images/s, in FLOP/s and in memory."""
    compared = [row for row in rows if row["model"] == rows[-1]["model"] and "ratio" in row]
    return "; ".join(
        f"{row['peer']}: {spread_text(row['ratio'])} times its images/s, {value_text(1 / row['memory_ratio'])} of its memory, "
        f"{value_text(row['ratio_at_equal_flops']['median'])} at equal FLOPs"
        for row in compared
    )


def loaders_headline(rows: list[dict]) -> str:
    """Say images/s of each loader, files and shards apart, and the ratio to torchvision's."""
    return "; ".join(
        f"{'ours' if row['loader'] == 'torch' else row['loader']} ({row['source']}) {value_text(row['images_per_s']['median'])}"
        + (f", {value_text(row['ratio_to_torchvision']['median'])} times" if "ratio_to_torchvision" in row else "")
        for row in rows
    )


HEADLINE = {  # result: its description, and the function that sums up its rows
    "step_vit_small": ("a ViT-S/16 step at 224, batch 16, bf16, beside the official code's at equal work", official_headline),
    "step_vit_small_fp32": ("the same in fp32", official_headline),
    "gpu_hours_cpu": ("images/s of I-JEPA, MAE and iBOT, ViT-S/16 at 224, batch 8", methods_headline),
    "peers_cpu": ("a ViT-S/16 step at 224, batch 8, fp32, beside other I-JEPA code", peers_headline),
    "loaders_2_workers": ("images/s of JPEGs to 224 by 2 workers, and times torchvision's DataLoader", loaders_headline),
    "ema": ("averaging the weights of a ViT-B/16 in fp32, alone and with AdamW in one call", updates_headline),
}


def main(argv: list[str] | None = None) -> int:
    about, shape = "Keep benchmark results and write RESULTS.md.", argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=about, epilog=EXAMPLES, formatter_class=shape)
    commands = parser.add_subparsers(dest="verb", required=True)
    saving = commands.add_parser("save", help="run a benchmark and keep what it prints", usage="%(prog)s NAME -- COMMAND ...")
    saving.add_argument("name", help="of benchmarks/results/NAME.json, which is replaced")
    saving.add_argument("--file", type=Path, help="the file the benchmark writes its JSON to, in place of its output")
    commands.add_parser("write", help="make benchmarks/RESULTS.md and README.md's table of benchmarks/results/*.json")
    argv = sys.argv[1:] if argv is None else argv
    end = argv.index("--") if "--" in argv else len(argv)
    asked, command = parser.parse_args(argv[:end]), argv[end + 1 :]
    try:
        if asked.verb == "save":
            if not command:
                parser.error("save: give the benchmark's command after --")
            print(save_result(asked.name, command, asked.file))
        else:
            results = read_results(RESULTS)
            DOCUMENT.write_text(results_document(results))
            README.write_text(BLOCK.sub(lambda found: found[1] + headline(results) + found[2], README.read_text()))
            print(DOCUMENT, README)
    except (ResultError, OSError) as error:
        print(f"benchmarks/results.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
