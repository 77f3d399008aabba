"""What I-JEPA, MAE and iBOT cost: `python benchmarks/gpu_hours.py --device cpu --models vit_tiny,vit_small --batch 8`.

Real steps on synthetic images with real masks; I-JEPA's, which differ in size from step to step, of the mean cost. Columns
tell method from implementation: `same` runs every method on timm's ViT in the trainer's own loop, `naive` runs each as its
official code does (loop.py), `packed` is this package's I-JEPA, and `--reference DIR` adds an unmodified clone of the
official I-JEPA code. Further columns are `packed` with keys set (VARIANTS): `compile`, `graph` and `fp8` train on the same
objective, `views4` (four contexts share a target pass) and `joint` (a predictor that sees a context once) on another one,
which no published epochs or accuracy belong to. All rows take turns in every round on a CPU; on a card those of one model
and method do, for its memory holds no more. Hours are a projection, by the formula that is printed.
"""

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import NamedTuple

import numpy as np
import official
import step
import timing
import torch
import vit
from ibot import Ibot
from ijepa import IJepa, typical, work
from loop import Naive, Same
from mae import DEPTH, WIDTH, Mae
from options import config_of
from rich.console import Console
from rich.progress import track
from timing import Ceiling, Spread

from fastjepa.cli.options import some_of
from fastjepa.config.load import config_from_dict
from fastjepa.config.schema import MODELS, Config
from fastjepa.engine.precision import compute_dtype
from fastjepa.errors import ConfigError, UserError
from fastjepa.masks.check import check_masks
from fastjepa.model.vit import choose_attention
from fastjepa.plan.flops import flops_of_packed
from fastjepa.plan.plan import CARD_PEAKS, IMAGENET_IMAGES
from fastjepa.ranks.world import join_world
from fastjepa.run.build import apply_process_settings, check_compute

METHODS = {"ijepa": IJepa, "mae": Mae, "ibot": Ibot}
VARIANTS = {  # column -> keys beside those of `packed`
    "compile": {"runtime": {"compile": True}},
    "graph": {"runtime": {"cuda_graph": True}},
    "fp8": {"runtime": {"target_fp8": True, "compile": True}},
    "views4": {"mask": {"num_enc_masks": 4}},
    "joint": {"meta": {"predictor": "joint"}},
}
OTHER_OBJECTIVES = "views4", "joint"
OURS = "packed", *VARIANTS
COLUMNS = dict.fromkeys(OURS, ("ijepa",)) | {"same": tuple(METHODS), "naive": tuple(METHODS), "reference": ("ijepa",)}
# Epochs and top-1 of a linear probe on ImageNet-1k: the papers', iBOT ViT-S/16's its repository's.
PUBLISHED = {
    ("ijepa", "vit_base"): (600, 72.9),
    ("ijepa", "vit_large"): (600, 77.5),
    ("ijepa", "vit_huge"): (300, 79.3),
    ("mae", "vit_base"): (1600, 68.0),
    ("mae", "vit_large"): (1600, 76.0),
    ("mae", "vit_huge"): (1600, 77.2),
    ("ibot", "vit_small"): (800, 77.9),
    ("ibot", "vit_base"): (400, 79.5),
    ("ibot", "vit_large"): (250, 81.0),
}
ASSUMED = {"ijepa": 600, "mae": 1600, "ibot": 800}  # epochs of a model that nobody published
PATCHES = {"vit_huge": 14}  # else 16
PREDICTOR_DEPTHS = {"vit_large": 12, "vit_huge": 12, "vit_giant": 16}  # else 6
DISTINCT = 2  # batches that the rounds take turns with
BATCH = {"cpu": 8, "cuda": 128}
FORMULA = f"hours = epochs x {IMAGENET_IMAGES} images / (images/s) / 3600, on one such device; hours a point = hours / published top-1"
EXAMPLES = """examples:
  python benchmarks/gpu_hours.py --device cuda --models vit_huge --methods ijepa,mae
  python benchmarks/gpu_hours.py --device cpu --models vit_tiny,vit_small --batch 8 --rounds 10 --json
  python benchmarks/gpu_hours.py --device cuda --models vit_base --methods ijepa --reference ../ijepa
  python benchmarks/gpu_hours.py --device cuda --models vit_huge --methods ijepa --columns packed,compile,graph,fp8,views4
  python benchmarks/gpu_hours.py --estimate h100 --share 0.4"""


class Row(NamedTuple):
    method: str
    model: str
    column: str

    def __str__(self) -> str:
        return f"{self.method} {self.model} {self.column}"


def rows(options: argparse.Namespace) -> list[Row]:
    columns = [*options.columns, *(["reference"] if options.reference else [])]
    return [Row(method, model, column) for model in options.models for method in options.methods
            for column in columns if method in COLUMNS[column]]  # fmt: skip


def measure(options: argparse.Namespace) -> dict:
    """The result, with the keys that `--json` prints."""
    known = {model: to_config(options, model) for model in options.models}
    every, directory = rows(options), options.reference
    refused = {row: reason for row in every if (reason := refusal(row, known[row.model]))}
    asked = [row for row in every if row not in refused]
    if not every:
        raise ConfigError("no such row: `packed` is a column of ijepa; name another of --methods or --columns")
    for config in known.values():
        device = start(config)
        if directory:
            official.check(directory, config)
            step.agree(config, device, directory)
    shown = track(asked, "peak memory", console=Console(stderr=True), disable=not sys.stderr.isatty())
    peaks = {row: timing.in_fresh_process(peak, row, known[row.model], directory) for row in shown}
    fitting = [row for row in asked if peaks[row] is not None]
    found = []
    for group in together(fitting, device):
        found += turns(group, known, peaks, options, device)
    return {
        "rows": found,
        "not_measured": [{"what": str(row), "reason": refused.get(row, "out of memory")}
                         for row in every if row in refused or peaks[row] is None],
        "formula": FORMULA, "threads": torch.get_num_threads(), "compile": options.compile,
        "versions": {name: version(name) for name in ("torch", "timm", "lightly")},
    }  # fmt: skip


def varied(row: Row, config: Config) -> Config:
    """The config with what the row's column sets."""
    for section, keys in VARIANTS.get(row.column, {}).items():
        config = replace(config, **{section: replace(getattr(config, section), **keys)})
    return config_from_dict(config.to_dict(), row.column)


def refusal(row: Row, config: Config) -> str:
    """Why a row's column cannot run on this device, or nothing."""
    try:
        check_compute(varied(row, config), join_world(config.runtime.device).device)
    except UserError as error:
        return str(error)
    return ""


def together(fitting: Sequence[Row], device: torch.device) -> list[list[Row]]:
    """Who takes turns: all, or on a card the columns of a model and method."""
    if device.type == "cpu":
        return [list(fitting)] if fitting else []
    pairs = dict.fromkeys((row.model, row.method) for row in fitting)
    return [[row for row in fitting if (row.model, row.method) == pair] for pair in pairs]


def turns(
    group: list[Row], known: dict[str, Config], peaks: dict[Row, int], options: argparse.Namespace, device: torch.device
) -> list[dict]:
    """Rounds of some steps of every row, and of the matrix products that are the ceiling of all."""
    dtype = compute_dtype(next(iter(known.values())))
    rounds, steps = options.rounds, options.steps
    count = min(rounds * steps, DISTINCT)
    try:
        runs = {row: build(row, known[row.model], device, count, options.reference) for row in group}
        shapes = {shape for model in dict.fromkeys(row.model for row in group) for shape in linears(known[model])}
        ceiling = Ceiling([*sorted(shapes), timing.square(device)], dtype, device)
        seconds = timing.interleave({"ceiling": ceiling, **runs}, rounds, device, warmup=-(-count // steps), steps=steps)
    except torch.OutOfMemoryError as error:
        names = ", ".join(map(str, group))
        raise ConfigError(f"{names} fit alone but not together; measure fewer --columns, or lower --batch") from error
    rates = of_rounds(ceiling.rates.get, rounds, steps)
    work = {row: of_rounds(lambda step, done=run.flops: done[step % len(done)], rounds, steps) for row, run in runs.items()}
    return [result(row, work[row], seconds[row], rates, varied(row, known[row.model]), peaks[row], device) for row in group]


def of_rounds(of_step: Callable[[int], float], rounds: int, steps: int) -> list[float]:
    """The mean over the steps of each round."""
    return [float(np.mean([of_step(step) for step in range(n * steps, (n + 1) * steps)])) for n in range(rounds)]


def start(config: Config) -> torch.device:
    """Check the config, set the threads, and return the device."""
    device = join_world(config.runtime.device).device
    check_masks(config.mask, config.grid, config.runtime.seed, config.mask.truncate_group)
    apply_process_settings(config)
    torch.manual_seed(config.runtime.seed)
    return device


def build(row: Row, config: Config, device: torch.device, count: int, directory: str | None = None):
    """One contender, with `count` batches; call it with the number of a round."""
    numbers, config = typical(config, count), varied(row, config)
    if row.column in (*OURS, "reference"):
        works = [work(config, device, number) for number in numbers]
        return step.Ours(config, device, works) if row.column in OURS else step.Theirs(config, device, works, directory)
    method = METHODS[row.method]
    batches = [method.draw(config, device, number) for number in numbers]
    return {"same": Same, "naive": Naive}[row.column](method, config, device, batches)


def peak(row: Row, config: Config, directory: str | None) -> int | None:
    """Peak bytes of one contender's first steps, in a process of its own; None where a card's memory is too small."""
    device = start(config)
    try:
        return timing.peak_bytes(lambda: build(row, config, device, DISTINCT, directory), device)
    except torch.OutOfMemoryError:
        return None


def linears(config: Config) -> list[tuple[int, int, int]]:
    """(rows, in, out) of the first mlp layers of the encoder, the predictor and MAE's decoder over whole images."""
    dim, _, _, mlp_ratio = config.encoder_shape
    tokens = config.data.batch_size * math.prod(config.grid)
    narrow = config.meta.pred_emb_dim
    return [(tokens, dim, round(dim * mlp_ratio)), (tokens, narrow, 4 * narrow), (tokens, WIDTH, 4 * WIDTH)]


def result(
    row: Row, work: list[float], seconds: list[float], rates: list[float], config: Config, peak_bytes: int, device
) -> dict:
    """Of rounds: FLOPs an image (`work`), seconds a step and the measured rates of matrix products."""
    batch = config.data.batch_size
    speed = Spread.of([batch / s for s in seconds])
    achieved = [batch * f / s for f, s in zip(work, seconds, strict=True)]
    per_image = float(np.mean(work))
    shares = Spread.of([a / rate for a, rate in zip(achieved, rates, strict=True)])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    sheet = datasheet(name, config.runtime.dtype)
    dtype = compute_dtype(config)
    chosen = row.column in (*OURS, "same")
    way = choose_attention(config.runtime.attention, device, dtype) if chosen else "materialised"
    return {
        **row._asdict(), **labels(row, config), "device": name, "attention": way, "dtype": config.runtime.dtype,
        "batch": batch, "size": config.image_size[0], "patch": config.mask.patch_size, "n": len(seconds),
        "images_per_s": speed.median, "p20": speed.p20, "p80": speed.p80,
        "spread": (speed.p80 - speed.p20) / speed.median, "gflop_per_image": per_image / 1e9,
        "gflop_per_view": per_image / config.mask.num_enc_masks / 1e9,
        "gemm_gflops": Spread.of(rates).median / 1e9,
        "mfu": shares.median, "mfu_spread": (shares.p80 - shares.p20) / shares.median,
        "share_of_datasheet": None if sheet is None else per_image * speed.median / sheet,
        "peak_bytes": peak_bytes, **(found := projected(row, speed.median)),
        "arithmetic": f"{found['epochs']} epochs x {IMAGENET_IMAGES} images / {speed.median:.2f} images/s / 3600 s",
    }  # fmt: skip


def labels(row: Row, config: Config) -> dict:
    return {"objective": "another" if row.column in OTHER_OBJECTIVES else "paper", "views": config.mask.num_enc_masks}


def projected(row: Row, images_per_s: float) -> dict:
    """What FORMULA gives; `epochs_published` is false where the number of epochs is another model's."""
    published = None if row.column in OTHER_OBJECTIVES else PUBLISHED.get((row.method, row.model))
    epochs, accuracy = published or (ASSUMED[row.method], None)
    hours = epochs * IMAGENET_IMAGES / images_per_s / 3600
    return {"epochs": epochs, "epochs_published": published is not None, "hours": hours, "accuracy": accuracy,
            "hours_per_point": hours / accuracy if accuracy else None}  # fmt: skip


def datasheet(name: str, dtype: str) -> float | None:
    """Dense FLOP/s of a card's data sheet; None for a CPU and for cards that `fastjepa.plan` does not know."""
    alike = {"h100": "h100", "h200": "h100", "a100": "a100"}  # an H200 computes as an H100 does
    return next((CARD_PEAKS[card][dtype] for word, card in alike.items() if word in name.lower()), None)


def estimate(options: argparse.Namespace) -> dict:
    """Rows without a measurement: FLOPs over a stated share of a data sheet's peak."""
    peak_flops = CARD_PEAKS[options.estimate]["bf16"]
    found = []
    for model in options.models:
        config = to_config(options, model)
        for row in rows(options):
            if row.model == model and row.column not in ("naive", "reference", "fp8"):  # no one peak is fp8's
                found.append(estimated(row, varied(row, config), peak_flops, options))
    return {"rows": found, "formula": FORMULA}


def estimated(row: Row, config: Config, peak_flops: float, options: argparse.Namespace) -> dict:
    per_image = counted(row, config)
    images_per_s = options.share * peak_flops / per_image
    found = projected(row, images_per_s)
    arithmetic = (f"{found['epochs']} epochs x {IMAGENET_IMAGES} images x {per_image / 1e9:.1f} GFLOP / "
                  f"({options.share:.0%} of {peak_flops / 1e12:.0f} TFLOP/s) / 3600 s")  # fmt: skip
    return {"estimate": True, **row._asdict(), **labels(row, config), "device": options.estimate,
            "gflop_per_image": per_image / 1e9, "gflop_per_view": per_image / config.mask.num_enc_masks / 1e9,
            "images_per_s": images_per_s, **found, "arithmetic": arithmetic}  # fmt: skip


def counted(row: Row, config: Config) -> float:
    """FLOPs per image of a row, from the masks alone."""
    cpu, numbers = torch.device("cpu"), typical(config, DISTINCT)
    if row.column not in OURS:
        method = METHODS[row.method]
        return float(np.mean([method.flops(config, method.draw(config, cpu, number)) for number in numbers]))
    packed = [work(config, cpu, number).packed(config, pad=False)[0] for number in numbers]
    return float(np.mean([flops_of_packed(config, b.context, b.target, b.blocks).total for b in packed]))


def report(found: dict) -> Iterator[str]:
    """The lines that are printed without `--json`."""
    measured = not any("estimate" in one for one in found["rows"])
    head = f"{'method':6} {'model':10} {'column':9} {'images/s':>9}"
    head += (
        (f" {'p20 to p80':>19} {'spread':>6}" if measured else "")
        + f" {'GFLOP':>7} {'a view':>7}"
        + (f" {'of GEMM':>7} {'of sheet':>8} {'GiB':>6}" if measured else "")
    )
    yield head + f" {'epochs':>7} {'hours':>9} {'top-1':>5} {'h/point':>8}"
    for one in found["rows"]:
        yield line(one, measured)
    for one in found.get("not_measured", ()):
        yield f"{one['what']}: not measured: {one['reason']}"
    yield found["formula"]
    if any(one["objective"] == "another" for one in found["rows"]):
        yield f"{' and '.join(OTHER_OBJECTIVES)}: another objective than the paper's; images/s, not accuracy, compare"
    yield "epochs*: none published for this model, taken from its method's other models; MAE decoder "\
          f"{DEPTH} x {WIDTH}, iBOT 2 x 224 and 10 x 96 pixels"  # fmt: skip


def line(one: dict, measured: bool) -> str:
    text = f"{one['method']:6} {one['model']:10} {one['column']:9} {one['images_per_s']:9.2f}"
    if measured:
        text += f" {one['p20']:8.2f} to {one['p80']:7.2f} {one['spread']:6.1%}"
    text += f" {one['gflop_per_image']:7.1f} {one['gflop_per_view']:7.1f}"
    if measured:
        sheet = "-" if one["share_of_datasheet"] is None else f"{one['share_of_datasheet']:.1%}"
        text += f" {one['mfu']:7.1%} {sheet:>8} {one['peak_bytes'] / 2**30:6.2f}"
    epochs = f"{one['epochs']}{'' if one['epochs_published'] else '*'}"
    top1, point = ("-", "-") if one["accuracy"] is None else (f"{one['accuracy']:.1f}", f"{one['hours_per_point']:.1f}")
    return f"{text} {epochs:>7} {one['hours']:9.0f} {top1:>5} {point:>8}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time training steps of I-JEPA, MAE and iBOT and project what their published runs cost.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--models", type=some_of(*MODELS), default="vit_small,vit_base,vit_huge", metavar="NAME,...")
    parser.add_argument("--methods", type=some_of(*METHODS), default=",".join(METHODS), metavar="NAME,...")
    parser.add_argument("--columns", type=some_of(*OURS, "same", "naive"), default="packed,same,naive", metavar="NAME,...",
                        help="packed,same,naive, and variants of packed: " + ",".join(VARIANTS))  # fmt: skip
    parser.add_argument("--reference", metavar="DIR", help="clone of the official I-JEPA code, for a column of its own")
    parser.add_argument("--batch", type=int, help="images a step (default: 8 on a CPU, 128 on a card)")
    parser.add_argument("--size", type=int, default=224, help="side of an image in pixels (default 224)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "fp32", "bf16"),
                        help="auto: bf16 where the device has instructions for it, else fp32; rows say which")  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="torch.compile the networks of `packed` and `same`")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds of each row (default 10)")
    parser.add_argument("--steps", type=int, default=1, help="steps of a round in a row, timed together (default 1)")
    parser.add_argument("--estimate", choices=tuple(CARD_PEAKS), help="measure nothing: FLOPs over a share of this card's peak")
    parser.add_argument("--share", type=float, default=0.4, help="of the peak, for --estimate (default 0.4)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="any further key of the config")
    return parser.parse_intermixed_args(argv)


def to_config(options: argparse.Namespace, model: str) -> Config:
    device = "cpu" if options.estimate else options.device
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    keys = {
        "runtime.device": device,
        "runtime.dtype": options.dtype,
        "runtime.compile": options.compile,
        "runtime.threads": options.threads,
        "meta.model_name": model,
        "meta.pred_depth": PREDICTOR_DEPTHS.get(model, 6),
        "mask.patch_size": PATCHES.get(model, 16),
        "data.crop_size": options.size,
        "data.batch_size": options.batch or BATCH["cuda" if cuda else "cpu"],
    }
    if options.estimate and options.dtype == "auto":
        keys["runtime.dtype"] = "bf16"  # as on the card
    return config_of(keys, options.overrides)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    try:
        for name, count in (("rounds", options.rounds), ("steps", options.steps)):
            if count < 1:
                raise ConfigError(f"--{name} {count}: time at least one")
        if not 0 < options.share <= 1:
            raise ConfigError(f"--share {options.share}: give a number above 0 and up to 1")
        vit.parts()
        with contextlib.redirect_stdout(sys.stderr):
            found = estimate(options) if options.estimate else measure(options)
    except UserError as error:
        print(f"benchmarks/gpu_hours.py: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found) if options.json else "\n".join(report(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
