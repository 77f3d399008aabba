"""The frame that the benchmark scripts share: their options, the config made of them, and how a result is printed."""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import results

from fastjepa.cli.options import positive_int
from fastjepa.config.load import load_config
from fastjepa.config.schema import MODELS, Config
from fastjepa.engine.precision import settle_dtype
from fastjepa.errors import UserError
from fastjepa.ranks.world import join_world


def int_list(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


COMMON = {
    "device": {"choices": ("auto", "cpu", "cuda")},
    "dtype": {"choices": ("auto", "fp32", "bf16"), "help": "auto: bf16 where the device has instructions for it, else fp32"},
    "model": {"choices": tuple(MODELS), "metavar": "NAME", "help": ", ".join(MODELS)},
    "batch": {"type": positive_int, "help": "images a step (default %(default)s)"},
    "size": {"type": positive_int, "help": "side of an image in pixels (default %(default)s)"},
    "threads": {"type": positive_int, "help": "CPU threads (default: torch's)"},
    "rounds": {"type": positive_int, "help": "timed rounds, in which all take turns (default %(default)s)"},
}


def make_parser(about: str, examples: str, **defaults: Any) -> argparse.ArgumentParser:
    """Return a parser with `--json`, overrides of the config, and the options of COMMON that have a default here."""
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=about, epilog=examples, formatter_class=shape)
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", default=default, **COMMON[name])
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="any further key of the config")
    return parser


KEYS = {"device": "runtime.device", "dtype": "runtime.dtype", "threads": "runtime.threads", "model": "meta.model_name",
        "batch": "data.batch_size", "size": "data.crop_size"}  # fmt: skip


def config_of(options: argparse.Namespace, **keys: Any) -> Config:
    """Return the config of the common options, then of `keys` (`section__key`), then of the overrides; its dtype is decided.

    None leaves a key at its default.
    """
    asked = {KEYS[name]: value for name, value in vars(options).items() if name in KEYS and value is not None}
    asked |= {name.replace("__", "."): value for name, value in keys.items() if value is not None}
    config = load_config(os.devnull, [*(f"{key}={value}" for key, value in asked.items()), *options.overrides])
    dtype = settle_dtype(config.runtime.dtype, join_world(config.runtime.device).device)
    return dataclasses.replace(config, runtime=dataclasses.replace(config.runtime, dtype=dtype))


def run_script(script: str, options: argparse.Namespace, measure: Callable[[argparse.Namespace], Any]) -> int:
    """Measure and print; return 2, with one sentence, where the options ask for what cannot be measured."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            found = measure(options)
    except (UserError, OSError) as error:
        print(f"benchmarks/{script}: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found) if options.json else "\n".join(result_lines(found)))
    return 0


def result_lines(found: Any) -> Iterator[str]:
    """Yield the lines that are printed without `--json`: few rows as columns side by side, many as a table."""
    rows, gaps = results.rows_and_gaps(found)
    flat = [results.flatten(row) for row in rows]
    if len(rows) > 2:
        yield from results.rows_table(rows)
    else:
        for name in dict.fromkeys(name for row in flat for name in row):
            yield f"{name:<28}" + "  ".join(f"{row.get(name, ''):<24}" for row in flat).rstrip()
    yield from (f"{one['what']}: not measured: {one['reason']}" for one in gaps)
    if isinstance(found, dict) and "formula" in found:
        yield found["formula"]
