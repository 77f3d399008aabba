"""The `fastjepa` command; `eval` and `data` have files of their own. What a command needs is imported when it runs."""

import argparse
import dataclasses
import json
import os
import re
import sys
import time
from pathlib import Path

# Before torch is imported. By default its CPU threads spin while they wait for each other, and a loader process, or any
# other, then halts them for whole time slices: steps were measured up to 12 times slower on 2 busy cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Each new shape leaves a oneDNN primitive behind, and ragged steps have many: the default, 1024, was seen to hold gigabytes.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")

from fastjepa import cli_convert, cli_data, cli_decoder, cli_eval, cli_plan, cli_report, cli_sweep, cli_visualize  # noqa: E402
from fastjepa import config as configs  # noqa: E402
from fastjepa.arguments import add, positive  # noqa: E402
from fastjepa.config import ConfigError  # noqa: E402

CONFIG = "YAML file, or the name of one that comes with fastjepa: demo, cifar10, vit_base16 ..."
EXAMPLES = {
    "train": """examples:
  fastjepa train --config demo
  fastjepa train --config configs/vit_base16.yaml data.source=/data/imagenet runtime.micro_batch=64
  torchrun --nproc_per_node 8 fastjepa/train.py --config configs/vit_huge14.yaml --output runs/h14
  deepspeed fastjepa/train.py --config configs/vit_huge14.yaml""",
    "verify": """example:
  fastjepa verify tests/reference/*.safetensors""",
    "masks": """examples:
  fastjepa masks --config configs/vit_base16.yaml
  fastjepa masks --config configs/demo.yaml --picture masks.png""",
    "doctor": """example:
  fastjepa doctor""",
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; bad input gives one sentence and exit code 2 (`--debug` shows the traceback)."""
    root = parser()
    args, rest = root.parse_known_args(argv)  # overrides may stand between options, which argparse cannot say
    unknown = [word for word in rest if word.startswith("-") or "overrides" not in args]
    if unknown:
        root.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        args.overrides += rest
    try:
        return args.run(args) or 0
    except KeyboardInterrupt:
        print(f"fastjepa {args.command}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if args.debug or not expected(error):
            raise
        said = memory(error, args.command) if out_of_memory(error) else error
        sys.stderr.write(f"fastjepa {args.command}: {said}\n")  # in one piece: other ranks speak at the same moment
        if started := sys.modules.get("fastjepa.distributed"):  # not imported for this: without it there are no other ranks
            started.linger()
        return 2


def expected(error: Exception) -> bool:
    """Whether an error is the user's to mend: its message is the whole story, or memory ran out."""
    return isinstance(error, ConfigError | OSError) or type(error).__name__ == "RunError" or out_of_memory(error)


def out_of_memory(error: Exception) -> bool:
    """Of a GPU (torch's OutOfMemoryError, or cuBLAS without a workspace) or of the host."""
    named = type(error).__name__ in ("OutOfMemoryError", "MemoryError")
    return named or any(words in str(error) for words in ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED"))


def memory(error: Exception, command: str) -> str:
    """Out of memory in one sentence: torch's own is a paragraph about its allocator."""
    wanted = re.search(r"[Tt]ried to allocate ([0-9.]+ \w+)", str(error))
    asked = f"out of memory{f', {wanted[1]} more were asked for' if wanted else ''}"
    train = "lower runtime.micro_batch or set runtime.checkpoint_activations=true, which change no result; `fastjepa plan` says"
    other = "close what else uses it, take --device cpu, or less at a time: --help says"
    return f"{asked}; {train} what fits" if command == "train" else f"{asked}; {other} how"


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(prog="fastjepa", description="Pretrain and evaluate I-JEPA.")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train_options(add(commands, "train", train, "pretrain from images to a checkpoint", EXAMPLES["train"]))
    sub = add(commands, "verify", verify, "replay reference trajectories and compare every quantity", EXAMPLES["verify"])
    sub.add_argument("files", nargs="+", metavar="FILE")
    sub.add_argument("--json", action="store_true")
    masks_options(add(commands, "masks", masks, "statistics and a picture of a config's masks", EXAMPLES["masks"]))
    cli_eval.register(commands)
    cli_data.register(commands)
    cli_plan.register(commands)
    cli_sweep.register(commands)
    cli_convert.register(commands)
    cli_visualize.register(commands)
    cli_decoder.register(commands)
    cli_report.register(commands)
    sub = add(commands, "doctor", doctor, "what would run on this machine, and what is missing", EXAMPLES["doctor"])
    sub.add_argument("--json", action="store_true")
    return root


def train_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--config", required=True, type=Path, help=CONFIG)
    sub.add_argument("--output", type=Path, help="run directory (default: logging.folder, or runs/<config>-<time>)")
    sub.add_argument("--max-steps", type=positive, metavar="N", help="save and stop after N optimizer steps in all")
    sub.add_argument(
        "--resume", choices=("auto", "must", "never"), default="auto", help="from the latest checkpoint in --output"
    )
    sub.add_argument("--init", type=Path, metavar="FILE", help="weights to start from: a .safetensors file, checkpoint or run")
    extra = "what DeepSpeed shall do beyond the config: offloading, buckets, overlap (JSON)"
    sub.add_argument("--deepspeed_config", "--deepspeed-config", type=Path, metavar="FILE", help=extra)
    sub.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # launchers append it
    sub.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings in place of the file's")


def masks_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--config", required=True, type=Path, help=CONFIG)
    sub.add_argument("--groups", type=positive, default=1000, help="independently sized groups to draw (default 1000)")
    sub.add_argument(
        "--picture", type=Path, metavar="PNG", help="where the picture goes (default masks.png); needs the config's data"
    )
    sub.add_argument("--json", action="store_true", help="print the statistics as JSON; no picture unless --picture")
    sub.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings in place of the file's")


def train(args: argparse.Namespace) -> None:
    from fastjepa import distributed, train

    config = configs.load(args.config, args.overrides)
    named = args.output or (config.logging.folder and Path(config.logging.folder))
    fresh = Path("runs") / f"{args.config.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    distributed.init(config.runtime.device, 2 * config.runtime.timeout)
    output = named or Path(distributed.from_main(str(fresh)))
    train.train(config, output, args.max_steps, args.resume, args.init, args.deepspeed_config)


def verify(args: argparse.Namespace) -> int:
    from fastjepa.verify import passes, tolerance, verify

    results = [{"file": file, "max_rel_err": errors, "ok": passes(errors)} for file in args.files for errors in [verify(file)]]
    if args.json:
        print(json.dumps(results, indent=1))
    for result in [] if args.json else results:
        print(result["file"])
        for name, error in result["max_rel_err"].items():
            print(f"  {name:18} {error:.1e}  {'ok' if error <= tolerance(name) else f'above {tolerance(name):.0e}'}")
    return 0 if all(result["ok"] for result in results) else 1


def masks(args: argparse.Namespace) -> None:
    from fastjepa import masks

    config = configs.load(args.config, args.overrides)
    masks.check(config, config.data.batch_size)
    statistics = masks.statistics(config, args.groups)
    if args.json:
        print(json.dumps(statistics))
    else:
        for name, value in statistics.items():
            print(f"{name:16} {' '.join(f'{v:.2f}' for v in value) if isinstance(value, list) else f'{value:.4g}'}")
    named = config.data.source or config.data.root_path
    if args.picture or (named and not args.json):
        draw_picture(config, args.picture or Path("masks.png"))
        print(f"picture: {args.picture or 'masks.png'}", file=sys.stderr)
    elif not args.json:
        print("no picture: the config names no images; add data.source=DIR", file=sys.stderr)


def draw_picture(config: configs.Config, path: Path, count: int = 8) -> None:
    """The first images of a run as it will see them, with their masks, as a PNG."""
    from PIL import Image

    from fastjepa import masks
    from fastjepa.data import MicroBatches
    from fastjepa.sources import open_source

    source = open_source(config.data)
    count = min(count, len(source))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=count),
                                 runtime=dataclasses.replace(config.runtime, micro_batch=None))  # fmt: skip
    images = MicroBatches(config, source, rank=0, world=1)[0].images.permute(0, 2, 3, 1)
    drawn = masks.draw(config.mask, config.grid, config.runtime.seed, 0, 0, count, count)
    sheet = Image.fromarray(masks.picture(images.expand(-1, -1, -1, 3).numpy(), *drawn, config.mask.patch_size))
    zoom = max(1, 1200 // sheet.width)
    sheet.resize((sheet.width * zoom, sheet.height * zoom), Image.Resampling.NEAREST).save(path)


def doctor(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from fastjepa.doctor import survey

    found = survey()
    if args.json:
        print(json.dumps(found))
        return
    table = Table("", "what", "state", "why", box=None)
    for topic, rows in found.items():
        for number, row in enumerate(rows):
            table.add_row(topic if number == 0 else "", *map(escape, row), end_section=number == len(rows) - 1)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
