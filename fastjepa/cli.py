"""The `fastjepa` command: train, verify, eval, data, masks, doctor. What a command needs is imported when it runs."""

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

from fastjepa import config as configs  # noqa: E402
from fastjepa.config import ConfigError  # noqa: E402

EXAMPLES = {
    "train": """examples:
  fastjepa train --config configs/demo.yaml
  fastjepa train --config configs/vit_base16.yaml data.source=/data/imagenet runtime.micro_batch=64
  torchrun --nproc_per_node 8 fastjepa/train.py --config configs/vit_huge14.yaml --output runs/h14
  deepspeed fastjepa/train.py --config configs/vit_huge14.yaml""",
    "verify": """example:
  fastjepa verify tests/reference/*.safetensors""",
    "masks": """examples:
  fastjepa masks --config configs/vit_base16.yaml
  fastjepa masks --config configs/demo.yaml --picture masks.png""",
    "eval": """examples:
  fastjepa eval knn --checkpoint runs/demo --data fashion-mnist
  fastjepa eval linear --checkpoint runs/demo --data /data/flowers --encoder random --json
  fastjepa eval table --checkpoint runs/demo --data fashion-mnist""",
    "data": """examples:
  fastjepa data get fashion-mnist
  fastjepa data check /data/imagenet
  fastjepa data shard /data/imagenet /fast/imagenet/train""",
    "data get": """examples:
  fastjepa data get fashion-mnist
  fastjepa data get cifar10 --archive cifar10-jpeg.zip""",
    "data check": """examples:
  fastjepa data check /data/imagenet --workers 16
  fastjepa data check /data/imagenet --split val --output bad-val.txt
  fastjepa data check /fast/imagenet/train --json""",
    "data shard": """examples:
  fastjepa data shard /data/imagenet /fast/imagenet/train
  fastjepa data shard /data/imagenet /fast/imagenet/val --split val
  fastjepa data shard cifar10 /fast/cifar10 --keep-order
  fastjepa data shard /data/photos /fast/photos --shard-size 512MB --resize 256 --workers 16

Stopped, it continues where it was when it is run again. To train: data.source=/fast/imagenet.""",
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
        print(f"fastjepa {args.command}: {error}", file=sys.stderr)
        return 2


def expected(error: Exception) -> bool:
    """Whether an error is the user's to mend: its message is the whole story."""
    return isinstance(error, ConfigError | OSError) or type(error).__name__ == "RunError"


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(prog="fastjepa", description="Pretrain and evaluate I-JEPA.")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train_options(add(commands, "train", train, "pretrain from images to a checkpoint"))
    sub = add(commands, "verify", verify, "replay reference trajectories and compare every quantity")
    sub.add_argument("files", nargs="+", metavar="FILE")
    sub.add_argument("--json", action="store_true")
    masks_options(add(commands, "masks", masks, "statistics and a picture of a config's masks"))
    eval_options(add(commands, "eval", evaluate, "probe frozen features: knn, linear, or a table of both"))
    data_commands(add(commands, "data", None, "get a data set by name, check images, write shards"))
    sub = add(commands, "doctor", doctor, "what would run on this machine, and what is missing")
    sub.add_argument("--json", action="store_true")
    return root


def add(commands, name: str, run, about: str) -> argparse.ArgumentParser:
    shown = {"help": about, "description": about[0].upper() + about[1:] + ".", "epilog": EXAMPLES[name]}
    sub = commands.add_parser(name.split()[-1], **shown, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
    sub.set_defaults(run=run)
    return sub


def train_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--config", required=True, type=Path, help="YAML file")
    sub.add_argument("--output", type=Path, help="run directory (default: logging.folder, or runs/<config>-<time>)")
    sub.add_argument("--max-steps", type=positive, metavar="N", help="save and stop after N optimizer steps in all")
    sub.add_argument(
        "--resume", choices=("auto", "must", "never"), default="auto", help="from the latest checkpoint in --output"
    )
    sub.add_argument("--init", type=Path, metavar="FILE", help="weights to start from: a .safetensors file, checkpoint or run")
    sub.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # launchers append it
    sub.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings in place of the file's")


def masks_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--config", required=True, type=Path, help="YAML file")
    sub.add_argument("--groups", type=positive, default=1000, help="independently sized groups to draw (default 1000)")
    sub.add_argument(
        "--picture", type=Path, metavar="PNG", help="where the picture goes (default masks.png); needs the config's data"
    )
    sub.add_argument("--json", action="store_true", help="print the statistics as JSON; no picture unless --picture")
    sub.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings in place of the file's")


def eval_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "kind", choices=("knn", "linear", "linear_bn", "table"), help="linear_bn: batch norm before the linear layer"
    )
    sub.add_argument("--checkpoint", required=True, type=Path, help="run directory or checkpoint")
    sub.add_argument("--data", required=True, help="data set's name, or a directory with train/ and test/ or val/")
    sub.add_argument("--encoder", choices=("target", "context", "random"), default="target")
    sub.add_argument("--n-train", type=positive, help="use at most this many training images")
    sub.add_argument("--n-test", type=positive, help="use at most this many test images")
    sub.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    sub.add_argument("--no-cache", action="store_true", help="extract the features anew")
    sub.add_argument("--json", action="store_true")


def data_commands(data: argparse.ArgumentParser) -> None:
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    data_get_options(add(actions, "data get", data_get, "get a data set by name"))
    data_check_options(add(actions, "data check", data_check, "read every image once; exit code 1 if any is bad"))
    data_shard_options(add(actions, "data shard", data_shard, "write images as WebDataset shards with an index"))


def data_get_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("name", help="fashion-mnist or cifar10")
    sub.add_argument("--archive", type=Path, help="a local archive to unpack instead of a download")
    sub.add_argument("--directory", type=Path, help="where data sets are kept (default: $FASTJEPA_DATA or ~/.cache/fastjepa)")


def data_source_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("source", metavar="SRC", help="whatever data.source takes: a directory, shards, a data set's name")
    sub.add_argument("--split", choices=("train", "val", "test"), default="train")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    sub.add_argument("--workers", type=positive, default=cores, metavar="N", help="processes (default: one a core)")


def data_check_options(sub: argparse.ArgumentParser) -> None:
    data_source_options(sub)
    limit = "larger images are bad, by their header alone (default, and at most, what a run decodes: 89.5)"
    sub.add_argument("--max-pixels", type=float, metavar="MEGAPIXELS", help=limit)
    listed = "where the paths of bad files go, if there are any (default bad.txt)"
    sub.add_argument("--output", type=Path, default=Path("bad.txt"), metavar="FILE", help=listed)
    sub.add_argument("--json", action="store_true")


def data_shard_options(sub: argparse.ArgumentParser) -> None:
    data_source_options(sub)
    sub.add_argument("destination", metavar="DST", type=Path, help="directory, one for each split")
    sub.add_argument("--shard-size", type=byte_count, default="256MB", metavar="SIZE", help="about, of each (default 256MB)")
    resize = "bring the short side of larger images down to SIDE (JPEG, quality 95; PNG from lossless files)"
    sub.add_argument("--resize", type=positive, metavar="SIDE", help=f"{resize}; without it files are kept byte for byte")
    order = "sample i stays sample i, and a run shows the same images as from SRC; the default is one fixed shuffle, which"
    sub.add_argument("--keep-order", action="store_true", help=f"{order} readers that go through shards in order need")
    sub.add_argument("--max-bad", type=not_negative, default=0, metavar="N", help="unreadable images left out (default 0)")


def byte_count(text: str) -> int:
    match = re.fullmatch(r"([0-9.]+) ?([KMGT]?)(i?)B?", text, re.IGNORECASE)
    try:
        number, unit, binary = match.groups()
        count = int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))
    except (AttributeError, ValueError):
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text} is no size such as 256MB, 512MiB or 1GB")
    return count


def not_negative(text: str) -> int:
    return 0 if int(text) == 0 else positive(text)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number


def train(args: argparse.Namespace) -> None:
    from fastjepa import distributed, train

    config = configs.load(args.config, args.overrides)
    named = args.output or (config.logging.folder and Path(config.logging.folder))
    fresh = Path("runs") / f"{args.config.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    distributed.init(config.runtime.device)
    output = named or Path(distributed.from_main(str(fresh)))
    train.train(config, output, args.max_steps, args.resume, args.init)


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


def evaluate(args: argparse.Namespace) -> None:
    from rich.console import Console

    from fastjepa.evals import table

    limits = {"n_train": args.n_train, "n_test": args.n_test} if args.n_train or args.n_test or args.kind != "table" else {}
    common = limits | {"device": args.device, "cache": not args.no_cache}
    if args.kind == "table":
        result = table.demo_table(args.checkpoint, args.data, **common, out=Console(stderr=args.json))
    else:
        result = table.run(args.kind, args.checkpoint, args.data, args.encoder, **common)
    if args.json:
        print(json.dumps(result))
    elif args.kind != "table":
        low, high = (100 * share for share in result["ci95"])
        print(f"{args.encoder} encoder, {args.kind}: {100 * result['accuracy']:.1f} % (95 % interval {low:.1f} to {high:.1f})")


def data_get(args: argparse.Namespace) -> None:
    from fastjepa import catalog

    print(catalog.get(args.name, args.directory, args.archive))


def data_check(args: argparse.Namespace) -> int:
    from fastjepa import check

    def show(bad: check.Bad) -> None:
        if not args.json:
            print(str(bad).encode(errors="backslashreplace").decode(), flush=True)

    report = check.check(args.source, args.split, args.workers, args.max_pixels, show)
    if report.bad:
        check.write_list(report.bad, args.output)
    reasons = report.by_reason()
    if args.json:
        found = dataclasses.asdict(report) | {"by_reason": reasons, "list": str(args.output) if report.bad else None}
        print(json.dumps({"source": args.source, "split": args.split} | found, indent=1))
        return 1 if report.bad else 0
    shards = f"{report.shards} shards compared with their manifest, " if report.shards else ""
    sizes = [f"{width}x{height}" for width, height in filter(None, (report.smallest, report.largest))]
    print(f"{shards}{report.images} images read{', smallest {}, largest {}'.format(*sizes) if sizes else ''}")
    print(f"bad: {len(report.bad)}{''.join(f', {count} {reason}' for reason, count in reasons.items())}")
    if report.bad:
        print(f"their paths are in {args.output}")
    return 1 if report.bad else 0


def data_shard(args: argparse.Namespace) -> None:
    from fastjepa import catalog, shard_writer
    from fastjepa.sources import open_source

    source = open_source(args.source, args.split)
    named = args.source if args.source in catalog.ENTRIES else os.path.abspath(os.path.expanduser(args.source))
    manifest = shard_writer.write(source, args.destination, {"path": named, "split": args.split}, args.shard_size,
                                  args.resize, args.keep_order, args.workers, args.max_bad)  # fmt: skip
    for name in manifest["left_out"]:
        print(f"left out: {name}", file=sys.stderr)
    print(f"{args.destination}: {manifest['images']} images, {len(manifest['shards'])} shards, {manifest['bytes']} bytes")


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
