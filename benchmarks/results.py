"""Results with their birth certificates: `save` runs a benchmark and keeps what it printed, `write` makes RESULTS.md of all.

A result is one JSON file of benchmarks/results/: name, command, commit, changed_files, date, machine, versions, rows, and
not_measured. Rows are dicts; those with `estimate: true` were not measured and go to a table of their own, and so does what
a row with `arithmetic` projects from its rate. A `median` has its `p20` and `p80` beside it, as numbers of the row or in a
dict of the three.
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
PACKAGES = ("torch", "triton", "deepspeed", "timm", "lightly", "torchvision", "pillow", "nvidia-dali-cuda130", "flash-attn")
KEYS = ("name", "command", "commit", "changed_files", "date", "machine", "versions", "rows")
TABLES = ("rows", "measurements", "alone", "under_step")  # keys under which benchmarks print their rows
SPREAD = {"median", "p20", "p80"}
PROJECTED = ("epochs", "epochs_published", "hours", "accuracy", "hours_per_point", "arithmetic")  # of rates, not measured
PROJECTED_OF = ("method", "model", "column", "device", "images_per_s")
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
    """What a number needs to be believed: command, commit, changes since, date, machine and versions."""
    git = ("git", "-c", "safe.directory=*", "-C", str(ROOT))
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    return {
        "command": shlex.join(command), "commit": commit.stdout.strip() or "unknown",
        "changed_files": len(changed.stdout.splitlines()), "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": machine(), "versions": versions(),
    }  # fmt: skip


def machine() -> dict[str, Any]:
    import torch

    cpu = re.search(r"^model name\s*: (.+)$", read("/proc/cpuinfo"), re.MULTILINE)
    found = {"cpu": cpu.group(1) if cpu else platform.processor() or platform.machine(), "cores": len(os.sched_getaffinity(0)),
             "threads": torch.get_num_threads()}  # fmt: skip
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"card": properties.name, "card_gib": round(properties.total_memory / 2**30, 1)}
    return found


def read(path: str) -> str:
    return Path(path).read_text() if Path(path).is_file() else ""


def versions() -> dict[str, str]:
    import torch

    found = {"python": platform.python_version()} | ({"cuda": torch.version.cuda} if torch.cuda.is_available() else {})
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def save(name: str, command: Sequence[str], file: Path | None = None) -> Path:
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
    result = {"name": name, **about, "rows": rows_of(output)}
    if isinstance(output, dict):
        result |= {"not_measured": [*output.get("not_measured", ()), *(absent(one) for one in output.get("benchmarks", ())
                                                                       if "not_measured" in one["extra_info"])]}  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def rows_of(output: Any) -> list[dict]:
    """The rows of what a benchmark printed: a list, a dict with one of TABLES, pytest-benchmark's file, or one row."""
    if isinstance(output, list):
        return output
    if "benchmarks" in output:
        return [row_of(one) for one in output["benchmarks"] if "not_measured" not in one["extra_info"]]
    tables = [(key, output[key]) for key in TABLES if key in output]
    if len(tables) > 1:
        return [{"measured": key} | row for key, table in tables for row in table]
    if tables:
        return tables[0][1]
    if "reference" in output:  # step.py's: the official code's row after ours
        output = dict(output)
        theirs, ratio = output.pop("reference"), output.pop("ratio")
        return [{"contender": "fastjepa"} | output | {"ratio": ratio}, {"contender": "official"} | theirs]
    return [output]


def row_of(benchmark: dict) -> dict:
    """Of one of pytest-benchmark's results; the benches put their own statistics into extra_info."""
    info = dict(benchmark["extra_info"])
    stats = {"median": info.pop("median_s", None), "p20": info.pop("p20_s", None), "p80": info.pop("p80_s", None)}
    return {"benchmark": benchmark["name"], "n": info.pop("rounds", None),
            "ms": {key: None if value is None else 1000 * value for key, value in stats.items()}, **info}  # fmt: skip


def absent(benchmark: dict) -> dict[str, str]:
    return {"what": benchmark["name"], "reason": benchmark["extra_info"]["not_measured"]}


def load(folder: Path) -> list[dict]:
    """The results of a folder by name; files of gpu_check.py are read as results too. ResultError for any other file."""
    results = []
    for path in sorted(folder.glob("*.json")):
        try:
            found = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ResultError(f"{path}: is not JSON ({error}); save the result again") from error
        if isinstance(found, dict) and "measurements" in found and "card" in found:
            results += parts_of(found | {"name": path.stem, "machine": {"card": found["card"]}})
            continue
        missing = [key for key in KEYS if not isinstance(found, dict) or key not in found]
        if missing:
            raise ResultError(f"{path}: has no {missing[0]}; save it with `python benchmarks/results.py save`")
        results.append(found)
    return results


def parts_of(checked: dict) -> list[dict]:
    """The result of gpu_check.py as one result a part (steps, data, ...) or op; what was not measured stands with the last."""
    parts: dict[str, list[dict]] = {}
    for row in checked["measurements"]:
        parts.setdefault(row.get("part") or row["op"], []).append({key: value for key, value in row.items() if key != "part"})
    found = [checked | {"name": f"{checked['name']}: {part}", "rows": rows, "not_measured": []} for part, rows in parts.items()]
    if found:
        found[-1]["not_measured"] = checked["not_measured"]
    return found


def document(results: Sequence[dict]) -> str:
    """RESULTS.md."""
    kinds = {
        "Measured": measured,
        "Estimates": lambda rows: [projection(row) for row in rows if "arithmetic" in row or row.get("estimate")],
    }
    parts = [INTRODUCTION]
    for title, chosen in kinds.items():
        found = [(result, rows) for result in results if (rows := chosen(result["rows"]))]
        if found:
            parts += [f"## {title}", *([CAVEAT] if title == "Estimates" else [])]
            parts += [section(result, rows) for result, rows in found]
    return "\n\n".join(parts) + "\n"


def measured(rows: Iterable[dict]) -> list[dict]:
    return [without(row, PROJECTED) for row in rows if not row.get("estimate")]


def without(row: dict, keys: Iterable[str]) -> dict:
    """A row as it was measured: what was projected from it is an estimate."""
    return {key: value for key, value in row.items() if "arithmetic" not in row or key not in keys}


def projection(row: dict) -> dict:
    """What an estimate is of, and its arithmetic."""
    if row.get("estimate"):
        return without(row, ("estimate",))
    return {key: row[key] for key in (*PROJECTED_OF, *PROJECTED) if key in row}


def section(result: dict, rows: list[dict]) -> str:
    lines = [f"### {result['name']}", "", f"`{result['command']}`", "", "  \n".join(about(result)), "", *rows_table(rows)]
    gaps = [f"{one['what']}: {one['reason']}" for one in result.get("not_measured", ())]
    return "\n".join([*lines, *(["", "Not measured: " + "; ".join(gaps) + "."] if gaps else [])])


def about(result: dict) -> Iterator[str]:
    changed, at = result["changed_files"], result["machine"]
    files = f" and {changed} changed file{'s' if changed != 1 else ''}" if changed else ""
    yield f"{result['date'][:10]}, commit {result['commit'][:10]}{files}"
    yield ", ".join([*([at["card"]] if "card" in at else []), *([f"{at['cores']} cores of {at['cpu']}"] if "cpu" in at else []),
                     *([f"{at['threads']} thread{'s' if at['threads'] != 1 else ''}"] if "threads" in at else [])])  # fmt: skip
    yield ", ".join(f"{name} {number}" for name, number in result["versions"].items() if number != "not installed")


def flatten(row: dict, prefix: str = "") -> dict[str, str]:
    """{column: text}; p20 and p80 that stand beside a rate belong to it."""
    row, found = dict(row), {}
    if "images_per_s" in row and {"p20", "p80"} <= row.keys():
        row["images_per_s"] = {"median": row["images_per_s"], "p20": row.pop("p20"), "p80": row.pop("p80")}
    elif "ms" in row and {"p20", "p80"} <= row.keys():
        row["ms"] = {"median": row["ms"], "p20": row.pop("p20"), "p80": row.pop("p80")}
    for key, value in row.items():
        name = prefix + key.replace("_", " ").replace("images per s", "images/s").replace("gflop", "GFLOP")
        if isinstance(value, dict) and value.keys() >= SPREAD:
            found[name] = spread(value)
        elif isinstance(value, dict):
            found |= flatten(value, name + ": ")
        elif key.endswith("_bytes") and isinstance(value, int):
            found[name.removesuffix("bytes") + "MiB"] = f"{value / 2**20:.0f}"
        else:
            found[name] = text(value)
    return found


def spread(value: dict[str, float | None]) -> str:
    if value["median"] is None:
        return ""
    return f"{text(value['median'])} ({text(value['p20'])} to {text(value['p80'])})"


def text(value: Any) -> str:
    """Three digits of a number, more where it is larger; nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    if isinstance(value, list):
        return (" x " if len(value) <= 2 else ", ").join(map(text, value))  # a size, or values along an axis
    return str(value).replace("|", "\\|")


def constants(rows: list[dict[str, str]]) -> tuple[dict[str, str], list[str]]:
    """What all rows share, where there are enough of them, and the columns of the others, in the order of appearance."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    same = {name: rows[0][name] for name in names if len(rows) >= CONSTANT and len({row.get(name, "") for row in rows}) == 1}
    return {name: value for name, value in same.items() if value}, [name for name in names if name not in same]


def rows_table(rows: list[dict]) -> list[str]:
    """Lines of Markdown."""
    flat = [flatten(row) for row in rows]
    same, columns = constants(flat)
    said = "In every row: " + ", ".join(f"{name} {value}" for name, value in same.items()) + "."
    return [*([said, ""] if same else []), *table(columns, flat)]


def table(columns: Iterable[str], rows: list[dict[str, str]]) -> list[str]:
    columns = list(columns)
    head = [" | ".join(columns), " | ".join("---" for _ in columns)]
    return [f"| {line} |" for line in (*head, *(" | ".join(row.get(name, "") for name in columns) for row in rows))]


def headline(results: Sequence[dict]) -> str:
    """The README's table: what each result that stands in HEADLINE comes to, and its command."""
    kept = {result["name"]: result for result in results}
    rows = [{"what": what, "result": said(kept[name]["rows"]), "command": f"`{kept[name]['command']}`"}
            for name, (what, said) in HEADLINE.items() if name in kept]  # fmt: skip
    return "\n".join(table(("what", "result", "command"), rows)) + "\n"


def against_official(rows: list[dict]) -> str:
    ours, theirs = rows
    rates = f"{ours['mfu']:.0%} of the measured GEMM rate against {theirs['mfu']:.0%}"
    memory = f"{ours['peak_bytes'] / 2**20:.0f} against {theirs['peak_bytes'] / 2**20:.0f} MiB"
    return f"{spread(ours['ratio'])} times its images/s; {rates}; {memory}"


def methods(rows: list[dict]) -> str:
    """Images/s by method and column; those that run as their official code does are left to RESULTS.md."""
    return "; ".join(
        f"{row['method']} {row['column']} {flatten(row)['images/s']}" for row in rows
        if row["model"] == rows[-1]["model"] and row["column"] in ("packed", "same")
    )  # fmt: skip


def columns(rows: list[dict]) -> str:
    """Images/s by column, and how many views of an image a pass of the target network serves where they are several."""
    views = {row["column"]: f" ({row['views']} contexts an image)" if row["views"] > 1 else "" for row in rows}
    return "; ".join(f"{row['column']}{views[row['column']]} {flatten(row)['images/s']}" for row in rows)


def updates(rows: list[dict]) -> str:
    """Ours beside torch's loop and its fastest calls."""
    shown = ("ours", "torch._foreach_lerp_", "torch fused + foreach", "for loop", "torch for loops")
    return "; ".join(f"{row['op']} {row['provider']} {spread(row['ms'])} ms" for row in rows if row["provider"] in shown)


HEADLINE = {  # result -> what it is of, what its rows come to
    "step_vit_small": ("a ViT-S/16 step at 224, batch 16, bf16, beside the official code's at equal work", against_official),
    "step_vit_small_fp32": ("the same in fp32", against_official),
    "gpu_hours_cpu": ("images/s of I-JEPA, MAE and iBOT, ViT-S/16 at 224, batch 8", methods),
    "faster_cpu": ("images/s of the keys in docs/faster.md, I-JEPA ViT-S/16 at 224, batch 8", columns),
    "ema": ("averaging the weights of a ViT-B/16 in fp32, alone and with AdamW in one call", updates),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Keep benchmark results and write RESULTS.md.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
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
            print(save(asked.name, command, asked.file))
        else:
            results = load(RESULTS)
            DOCUMENT.write_text(document(results))
            README.write_text(BLOCK.sub(lambda found: found[1] + headline(results) + found[2], README.read_text()))
            print(DOCUMENT, README)
    except (ResultError, OSError) as error:
        print(f"benchmarks/results.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
