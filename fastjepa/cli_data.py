"""`fastjepa data`: get a data set by name, check images, write shards."""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

from fastjepa.arguments import add, byte_count, not_negative, positive

EXAMPLES = {
    "data": """examples:
  fastjepa data get fashion-mnist
  fastjepa data check /data/imagenet
  fastjepa data shard /data/imagenet /fast/imagenet/train""",
    "get": """examples:
  fastjepa data get fashion-mnist
  fastjepa data get cifar10 --archive cifar10-jpeg.zip
  fastjepa data get scenes""",
    "check": """examples:
  fastjepa data check /data/imagenet --workers 16
  fastjepa data check /data/imagenet --split val --output bad-val.txt
  fastjepa data check /fast/imagenet/train --json""",
    "shard": """examples:
  fastjepa data shard /data/imagenet /fast/imagenet/train
  fastjepa data shard /data/imagenet /fast/imagenet/val --split val
  fastjepa data shard cifar10 /fast/cifar10 --keep-order
  fastjepa data shard /data/photos /fast/photos --shard-size 512MB --resize 256 --workers 16

Stopped, it continues where it was when it is run again. To train: data.source=/fast/imagenet.""",
}


def register(commands) -> None:
    about = "get a data set by name, check images, write shards"
    data = add(commands, "data", None, about, EXAMPLES["data"])
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    get_options(add(actions, "get", get, "get a data set by name", EXAMPLES["get"]))
    about = "read every image once; exit code 1 if any is bad"
    check_options(add(actions, "check", check, about, EXAMPLES["check"]))
    shard_options(add(actions, "shard", shard, "write images as WebDataset shards with an index", EXAMPLES["shard"]))


def get_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("name", help="fashion-mnist, cifar10, scenes or scenes-128 (rendered here, 64 or 128 px)")
    sub.add_argument("--archive", type=Path, help="a local archive to unpack instead of a download")
    sub.add_argument("--directory", type=Path, help="where data sets are kept (default: $FASTJEPA_DATA or ~/.cache/fastjepa)")


def source_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("source", metavar="SRC", help="whatever data.source takes: a directory, shards, a data set's name")
    sub.add_argument("--split", choices=("train", "val", "test"), default="train")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    sub.add_argument("--workers", type=positive, default=cores, metavar="N", help="processes (default: one a core)")


def check_options(sub: argparse.ArgumentParser) -> None:
    source_options(sub)
    limit = "larger images are bad, by their header alone (default, and at most, what a run decodes: 89.5)"
    sub.add_argument("--max-pixels", type=float, metavar="MEGAPIXELS", help=limit)
    listed = "where the paths of bad files go, if there are any (default bad.txt)"
    sub.add_argument("--output", type=Path, default=Path("bad.txt"), metavar="FILE", help=listed)
    sub.add_argument("--json", action="store_true")


def shard_options(sub: argparse.ArgumentParser) -> None:
    source_options(sub)
    sub.add_argument("destination", metavar="DST", type=Path, help="directory, one for each split")
    sub.add_argument("--shard-size", type=byte_count, default="256MB", metavar="SIZE", help="about, of each (default 256MB)")
    resize = "bring the short side of larger images down to SIDE (JPEG, quality 95; PNG from lossless files)"
    sub.add_argument("--resize", type=positive, metavar="SIDE", help=f"{resize}; without it files are kept byte for byte")
    order = "sample i stays sample i, and a run shows the same images as from SRC; the default is one fixed shuffle, which"
    sub.add_argument("--keep-order", action="store_true", help=f"{order} readers that go through shards in order need")
    sub.add_argument("--max-bad", type=not_negative, default=0, metavar="N", help="unreadable images left out (default 0)")


def get(args: argparse.Namespace) -> None:
    from fastjepa import catalog

    print(catalog.get(args.name, args.directory, args.archive))


def check(args: argparse.Namespace) -> int:
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


def shard(args: argparse.Namespace) -> None:
    from fastjepa import catalog, shard_writer
    from fastjepa.sources import open_source

    source = open_source(args.source, args.split)
    anywhere = args.source in catalog.ENTRIES or "://" in args.source
    named = args.source if anywhere else os.path.abspath(os.path.expanduser(args.source))
    manifest = shard_writer.write(source, args.destination, {"path": named, "split": args.split}, args.shard_size,
                                  args.resize, args.keep_order, args.workers, args.max_bad)  # fmt: skip
    for name in manifest["left_out"]:
        print(f"left out: {name}", file=sys.stderr)
    print(f"{args.destination}: {manifest['images']} images, {len(manifest['shards'])} shards, {manifest['bytes']} bytes")
