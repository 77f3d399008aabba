"""The command `fastjepa plan`: memory of a GPU, hours and traffic of a config, as tables or JSON."""

import argparse
import json
from pathlib import Path

from fastjepa.cli.options import add_command, given_config, positive_float, positive_int

PLAN_EXAMPLES = """examples:
  fastjepa plan --config configs/vit_huge14.yaml --gpus 16
  fastjepa plan --config configs/vit_giant16.yaml --gpus 8 --gpu-memory 40 --card a100 --images 14200000
  fastjepa plan --config configs/vit_huge14.yaml --gpus 64 --zero 3 --micro-batch 64 --json
  fastjepa plan --config configs/vit_huge14.yaml --traffic

Every number is an estimate; with --json bytes, FLOPs, hours and seconds. Peaks are dense ones of NVIDIA's data sheets: h200
and h100 989 TFLOP/s in bf16 and 67 in fp32, a100 312 and 19.5. A tenth of --gpu-memory is kept for what is not counted."""
# Rows of the memory table: {name: note at the end of the row}.
MEMORY_ROWS = {
    "parameters": "fp32",
    "gradients": "fp32",
    "moments": "AdamW's two, fp32",
    "master_weights": "fp32, the optimizer's",
    "ema": "fp32, of the encoder",
    "target_copy": "of the target network",
    "teacher": "frozen, whole on every rank",
    "autocast_copies": "weights in bf16",
    "communication_buffers": "buckets, gathered weights",
    "activations": "",
    "total": "",
    "activations_checkpointed": "",
    "total_checkpointed": "",
}


def register(commands) -> None:
    """Add `plan` to the list of commands."""
    about = "memory a GPU, hours and traffic of a config, before it runs"
    sub = add_command(commands, "plan", run_plan, about, PLAN_EXAMPLES)
    sub.add_argument("--config", required=True, type=Path, help="YAML file")
    sub.add_argument("--gpus", type=positive_int, default=1, metavar="N", help="ranks, one a GPU (default 1)")
    sub.add_argument("--gpu-memory", type=positive_float, metavar="GB", help="of a GPU, in 1e9 bytes (default: the card's)")
    sub.add_argument("--zero", type=int, choices=range(4), help="this ZeRO stage alone (default: all four side by side)")
    sub.add_argument("--micro-batch", type=positive_int, metavar="M", help="images a forward, in place of runtime.micro_batch")
    about = "whose peak and memory are meant: 141, 80 and 80 GB (default h100)"
    sub.add_argument("--card", choices=("h200", "h100", "a100"), default="h100", help=about)
    sub.add_argument("--utilisation", type=share_of_peak, default=0.4, help="share of that peak that is reached (default 0.4)")
    sub.add_argument("--images", type=positive_int, help="images of an epoch (default: ImageNet-1k's 1281167)")
    sub.add_argument("--traffic", action="store_true", help="bytes sent a step on 8 to 512 GPUs, instead (docs/scaling.md)")
    sub.add_argument("--json", action="store_true")
    sub.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings in place of the file's")


def share_of_peak(text: str) -> float:
    """Read a share in (0, 1]."""
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} must be in (0, 1]")
    return float(text)


def run_plan(args: argparse.Namespace) -> None:
    """Print memory and hours of the config, or its traffic."""
    from fastjepa.plan.datasheets import DATASHEETS
    from fastjepa.plan.memory import ZERO_STAGES
    from fastjepa.plan.plan import IMAGENET_IMAGES, Cards, plan_run, plan_traffic

    micro_batch = [f"runtime.micro_batch={args.micro_batch}"] if args.micro_batch else []
    config = given_config(args, *micro_batch)
    memory = args.gpu_memory or DATASHEETS[args.card].memory
    cards = Cards(args.gpus, memory, args.card, args.utilisation)
    if args.traffic:
        rows = plan_traffic(config, cards)
        print(json.dumps(rows) if args.json else traffic_table(rows))
        return
    stages = ZERO_STAGES if args.zero is None else (args.zero,)
    found = plan_run(config, cards, stages, args.images or IMAGENET_IMAGES)
    if args.json:
        print(json.dumps(found))
    else:
        print_plan(found)


def print_plan(found: dict) -> None:
    """Print what `plan_run` found: a table with a column for each ZeRO stage, the cost, and the recommendation."""
    from rich.console import Console
    from rich.table import Table

    console, stages = Console(highlight=False), found["stages"]
    title = f"{found['model']}, {found['gpus']} GPUs, {found['dtype']}, {found['micro_batch']} images a forward: GB a GPU"
    table = Table("", *(f"ZeRO-{stage}" for stage in stages), "", box=None, title=title, title_justify="left")
    for column in table.columns[1:-1]:
        column.justify = "right"
    for name, note in MEMORY_ROWS.items():
        numbers = (f"{needs[name] / 1e9:.2f}" for needs in stages.values())
        table.add_row(row_title(name), *numbers, note, end_section=name.startswith("total"))
    fits = f"in {found['usable'] / 1e9:.0f} of {found['gpu_memory'] / 1e9:.0f} GB"
    for end in ("", "_checkpointed"):
        table.add_row(row_title("fits" + end), *("yes" if needs["fits" + end] else "no" for needs in stages.values()), fits)
        name = "largest_micro_batch" + end
        table.add_row(row_title(name), *(str(needs[name]) for needs in stages.values()), "images")
    console.print(table)

    peak = f"{found['utilisation']:.0%} of the {found['peak_flops'] / 1e12:g} TFLOP/s of an {found['card']}"
    cost = (
        f"{found['flops_per_image'] / 1e9:.0f} GFLOP an image; {found['epochs']} epochs of {found['images_per_epoch']:,} images"
    )
    hours = f"{found['hours']:.1f} hours, {found['gpu_hours']:.0f} GPU hours"
    console.print(f"\n{cost} at {peak}: {hours} (an estimate).", soft_wrap=True)
    for sentence in (f"Recommended: {found['why']}", *found["notes"]):
        console.print(sentence, soft_wrap=True, markup=False)


def row_title(name: str) -> str:
    """Return the name of a row as it is read."""
    return "EMA" if name == "ema" else name.replace("_", " ")


def traffic_table(rows: list[dict]) -> str:
    """Return the traffic as a Markdown table, so that docs/scaling.md can hold what the command prints."""
    units = {"gradients": 1e9, "parameters": 1e9, "target_copy": 1e9, "total": 1e9, "seconds": 1e-3}
    heads = ["GPUs", "ZeRO", "gradients GB", "parameters GB", "target copy GB", "total GB", "ms",
             "binding batch", "images of 2048", "binds", "exposed"]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|" + " --: |" * len(heads)]
    for row in rows:
        cells = [f"{value / units[name]:.2f}" if name in units else str(value) for name, value in row.items()]
        cells[-4:] = [
            f"{row['binding_batch']:.0f}",
            f"{row['images']:g}",
            "yes" if row["binds"] else "no",
            f"{row['exposed']:.0%}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
