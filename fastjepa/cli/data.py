"""The command `fastjepa data`: get a data set by name, check images, measure their channels, write shards."""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

from fastjepa.cli.options import (
    CONFIG_HELP,
    add_command,
    byte_count,
    given_config,
    non_negative_int,
    positive_int,
)
from fastjepa.cores import usable_cores

DATA_EXAMPLES = {
    "data": """examples:
  fastjepa data get fashion-mnist
  fastjepa data check /data/imagenet
  fastjepa data stats /data/xrays
  fastjepa data shard /data/imagenet /fast/imagenet/train""",
    "get": """examples:
  fastjepa data get fashion-mnist
  fastjepa data get cifar10 --archive cifar10-jpeg.zip
  fastjepa data get scenes""",
    "check": """examples:
  fastjepa data check /data/imagenet --workers 16
  fastjepa data check /data/imagenet --split val --output bad-val.txt
  fastjepa data check /fast/imagenet/train --json
  fastjepa data check /data/sentinel2 data.channels=12 data.dtype=uint16""",
    "stats": """examples:
  fastjepa data stats /data/xrays --workers 16
  fastjepa data stats fashion-mnist --json
  fastjepa data stats /data/imagenet --limit 10000
  fastjepa data stats /data/sentinel2 --bands 3,2,1 --nodata 0

It ends with the lines for a config. The images are read as a run with those lines reads them: files of more than 8 bits, TIFFs
of 2 or more than 3 bands and NumPy files with all of their bands, any other as grey or RGB.""",
    "shard": """examples:
  fastjepa data shard /data/imagenet /fast/imagenet/train
  fastjepa data shard /data/imagenet /fast/imagenet/val --split val
  fastjepa data shard cifar10 /fast/cifar10 --keep-order
  fastjepa data shard /data/photos /fast/photos --shard-size 512MB --resize 256 --workers 16

Stopped, it continues where it was when it is run again. To train: data.source=/fast/imagenet.""",
}


def register(commands) -> None:
    """Add `data` and its four actions to the list of commands."""
    about = "get a data set by name, check images, measure their channels, write shards"
    data = add_command(commands, "data", None, about, DATA_EXAMPLES["data"])
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    get_options(add_command(actions, "get", run_get, "get a data set by name", DATA_EXAMPLES["get"]))
    about = "read every image once; exit code 1 if any is bad"
    check_options(add_command(actions, "check", run_check, about, DATA_EXAMPLES["check"]))
    about = "mean, deviation, range and missing values of each channel, as lines for the config"
    stats_options(add_command(actions, "stats", run_stats, about, DATA_EXAMPLES["stats"]))
    shard_options(
        add_command(actions, "shard", run_shard, "write images as WebDataset shards with an index", DATA_EXAMPLES["shard"])
    )


def get_options(sub: argparse.ArgumentParser) -> None:
    """Add the options of `data get`."""
    sub.add_argument("name", help="fashion-mnist, cifar10, scenes or scenes-128 (rendered here, 64 or 128 px)")
    sub.add_argument("--archive", type=Path, help="a local archive to unpack instead of a download")
    sub.add_argument("--directory", type=Path, help="where data sets are kept (default: $FASTJEPA_DATA or ~/.cache/fastjepa)")


def source_options(sub: argparse.ArgumentParser) -> None:
    """Add the options that `data check`, `stats` and `shard` share: which images, and how many processes read them."""
    sub.add_argument("source", metavar="SRC", help="whatever data.source takes: a directory, shards, a data set's name")
    sub.add_argument("--split", choices=("train", "val", "test"), default="train")
    cores = usable_cores()
    sub.add_argument("--workers", type=positive_int, default=cores, metavar="N", help="processes (default: one a core)")


def check_options(sub: argparse.ArgumentParser) -> None:
    """Add the options of `data check`."""
    source_options(sub)
    limit = "larger images are bad, by their header alone (default, and at most, what a run decodes: 89.5)"
    sub.add_argument("--max-pixels", type=float, metavar="MEGAPIXELS", help=limit)
    listed = "where the paths of bad files go, if there are any (default bad.txt)"
    sub.add_argument("--output", type=Path, default=Path("bad.txt"), metavar="FILE", help=listed)
    sub.add_argument("--json", action="store_true")
    sub.add_argument("--config", metavar="FILE", help=f"of the run that is to read them: {CONFIG_HELP}")
    keys = "what the images are, by the config's keys data.channels, dtype, bands, pages and nodata"
    sub.add_argument("overrides", nargs="*", metavar="section.key=value", help=keys)


def stats_options(sub: argparse.ArgumentParser) -> None:
    """Add the options of `data stats`."""
    source_options(sub)
    few = "measure so many images, drawn at random with a fixed seed (default: all)"
    sub.add_argument("--limit", type=positive_int, metavar="N", help=few)
    sub.add_argument("--nodata", type=float, metavar="VALUE", help="the value of a file that means no measurement, as NaN does")
    sub.add_argument("--channels", type=positive_int, metavar="N", help="data.channels (default: what the first file holds)")
    sub.add_argument("--dtype", choices=("uint8", "uint16", "float32"), help="data.dtype (default: what the first file needs)")
    sub.add_argument("--bands", type=band_numbers, metavar="LIST", help="data.bands: bands of a file, from 0, such as 3,2,1")
    sub.add_argument("--pages", choices=("first", "bands"), default="first", help="data.pages (default first)")
    sub.add_argument("--json", action="store_true")


def band_numbers(text: str) -> tuple[int, ...]:
    """Read numbers of bands such as 3,2,1."""
    return tuple(map(non_negative_int, text.split(",")))


def shard_options(sub: argparse.ArgumentParser) -> None:
    """Add the options of `data shard`."""
    source_options(sub)
    sub.add_argument("destination", metavar="DST", type=Path, help="directory, one for each split")
    sub.add_argument("--shard-size", type=byte_count, default="256MB", metavar="SIZE", help="about, of each (default 256MB)")
    resize = "bring the short side of larger images down to SIDE (JPEG, quality 95; PNG from lossless files)"
    sub.add_argument("--resize", type=positive_int, metavar="SIDE", help=f"{resize}; without it files are kept byte for byte")
    order = "sample i stays sample i, and a run shows the same images as from SRC; the default is one fixed shuffle, which"
    sub.add_argument("--keep-order", action="store_true", help=f"{order} readers that go through shards in order need")
    sub.add_argument("--max-bad", type=non_negative_int, default=0, metavar="N", help="unreadable images left out (default 0)")


def run_get(args: argparse.Namespace) -> None:
    """Fetch or render a data set, and print the directory it lies in."""
    from fastjepa.data.prepare.catalog import get_dataset

    print(get_dataset(args.name, args.directory, args.archive))


def run_check(args: argparse.Namespace) -> int:
    """Read every image once and list the bad ones; return 1 where there are any."""
    from fastjepa.data.prepare.check_images import BadImage, check_images, write_bad_list
    from fastjepa.files import require_writable
    from fastjepa.loader.loader import pixels_of

    def show(bad: BadImage) -> None:
        if not args.json:
            print(bad, flush=True)

    require_writable(args.output)
    pixels = pixels_of(given_config(args))
    report = check_images(args.source, args.split, args.workers, args.max_pixels, show, pixels)
    if report.bad:
        write_bad_list(report.bad, args.output)
    if args.json:
        found = dataclasses.asdict(report) | {
            "by_reason": report.by_reason(),
            "dropped": dict(report.dropped),  # `asdict` would count the counts
            "held": dict(report.held),
            "list": str(args.output) if report.bad else None,
        }
        print(json.dumps({"source": args.source, "split": args.split} | found, indent=1))
    else:
        print_check(report, args.output)
    return 1 if report.bad else 0


def print_check(report, bad_list: Path) -> None:
    """Print the counts of a check in words, and where the paths of the bad files lie."""
    shards = f"{report.shards} shards compared with their manifest, " if report.shards else ""
    sizes = [f"{width}x{height}" for width, height in filter(None, (report.smallest, report.largest))]
    print(f"{shards}{report.images} images read{', smallest {}, largest {}'.format(*sizes) if sizes else ''}")
    for held, files in report.held.most_common():
        print(f"{files} of {held}")
    print(f"bad: {len(report.bad)}{''.join(f', {count} {reason}' for reason, count in report.by_reason().items())}")
    if report.bad:
        print(f"their paths are in {bad_list}")
    for kind, files in report.dropped.most_common():
        print(f"left out: {files} images hold {kind}")


def run_stats(args: argparse.Namespace) -> None:
    """Measure the channels of a source, and print a table of them with the lines for a config."""
    import torch

    from fastjepa.data.prepare.band_statistics import BandRequest, config_lines, measure_bands
    from fastjepa.data.sources import open_source

    dtype = getattr(torch, args.dtype) if args.dtype else None
    request = BandRequest(args.limit, args.channels, dtype, args.bands, args.pages, args.nodata)
    source = open_source(args.source, args.split)
    report, pixels = measure_bands(source, request, args.workers, lambda bad: print(bad, file=sys.stderr, flush=True))
    keys = config_lines(report.channels, pixels)
    if args.json:
        found = {
            "images": report.images,
            "bad": [dataclasses.asdict(bad) for bad in report.bad],
            "dropped": dict(report.dropped),
        }
        named = {"source": args.source, "split": args.split} | found
        print(json.dumps(named | {"channels": report.channels.rows(), "data": keys}, indent=1))
        return
    print(f"{report.images} images read, bad: {len(report.bad)}")
    for kind, files in report.dropped.most_common():
        print(f"{files} images hold {kind}")
    print("channel        mean         std       least        most    missing")
    for channel, row in enumerate(report.channels.rows()):
        numbers = "".join(f"{row[name]:12.6g}" for name in ("mean", "std", "least", "most"))
        print(f"{channel:7}{numbers}{row['missing']:11.2%}")
        if row["std"] == 0:
            print(
                f"channel {channel} has one value alone, which nothing is learnt of; leave it out by --bands", file=sys.stderr
            )
    print("", "data:", *(f"  {name}: {json.dumps(value)}" for name, value in keys.items()), sep="\n")


def run_shard(args: argparse.Namespace) -> None:
    """Write the images as shards, and print how many, after the names of those that were left out."""
    from fastjepa.data.prepare.catalog import DATASETS
    from fastjepa.data.prepare.write_shards import ShardRequest, write_shards
    from fastjepa.data.sources import open_source
    from fastjepa.files import require_writable

    require_writable(args.destination, folder=True)
    source = open_source(args.source, args.split)
    anywhere = args.source in DATASETS or "://" in args.source
    named = args.source if anywhere else os.path.abspath(os.path.expanduser(args.source))
    request = ShardRequest(args.shard_size, args.resize, args.keep_order, args.max_bad)
    manifest = write_shards(source, args.destination, {"path": named, "split": args.split}, request, args.workers)
    for name in manifest["left_out"]:
        print(f"left out: {name}", file=sys.stderr)
    print(f"{args.destination}: {manifest['images']} images, {len(manifest['shards'])} shards, {manifest['bytes']} bytes")
