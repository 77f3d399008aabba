"""The cost of I-JEPA, MAE and iBOT: `python benchmarks/gpu_hours.py --device cpu --models vit_tiny,vit_small --batch 8`.

Real steps on synthetic images with real masks. The masks of I-JEPA differ in size from step to step: batches of the mean
cost are taken. Columns tell method from implementation: `same` runs every method on timm's ViT in the trainer's own loop,
`packed` is the I-JEPA of this package, and `--reference DIR` adds an unmodified clone of the official I-JEPA code. Further
columns are `packed` with keys set (VARIANTS): `compile`, `graph` and `fp8` train on the same objective; `views4` (four
contexts share a target pass) and `joint` (a predictor that sees a context once) on another one, to which no published epochs
or accuracy belong. On a CPU all rows take turns in every round; on a card those of one model and method do, as its memory
holds no more. Hours are a projection, by the formula that is printed.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import official
import step
import timing
import torch
import vit
from ibot import Ibot
from ijepa import IJepa, draw_work, typical_batches
from mae import WIDTH, Mae
from options import config_of, make_parser, run_script
from rich.progress import track
from timing import Ceiling, Spread
from work import mlp_shapes, prepare_device

from fastjepa.cli.options import positive_int, some_of
from fastjepa.config.load import config_from_dict
from fastjepa.config.schema import MODELS, Config
from fastjepa.engine.precision import COMPUTE_DTYPES
from fastjepa.errors import UserError
from fastjepa.model.vit import choose_attention
from fastjepa.plan.datasheets import DATASHEETS
from fastjepa.plan.plan import IMAGENET_IMAGES
from fastjepa.ranks.world import join_world
from fastjepa.run.build import check_compute

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
COLUMNS = dict.fromkeys(OURS, ("ijepa",)) | {"same": tuple(METHODS), "reference": ("ijepa",)}
# Epochs and top-1 of a linear probe on ImageNet-1k: the papers', iBOT ViT-S/16's its repository's.
PUBLISHED = {
    ("ijepa", "vit_base"): (600, 72.9), ("ijepa", "vit_large"): (600, 77.5), ("ijepa", "vit_huge"): (300, 79.3),
    ("mae", "vit_base"): (1600, 68.0), ("mae", "vit_large"): (1600, 76.0), ("mae", "vit_huge"): (1600, 77.2),
    ("ibot", "vit_small"): (800, 77.9), ("ibot", "vit_base"): (400, 79.5), ("ibot", "vit_large"): (250, 81.0),
}  # fmt: skip
ASSUMED = {"ijepa": 600, "mae": 1600, "ibot": 800}  # epochs of a model for which nobody published them
PATCHES = {"vit_huge": 14}  # else 16
PREDICTOR_DEPTHS = {"vit_large": 12, "vit_huge": 12, "vit_giant": 16}  # else 6
DISTINCT = 2  # batches that the rounds take turns with
BATCH = {"cpu": 8, "cuda": 128}
FORMULA = (
    f"hours = epochs x {IMAGENET_IMAGES} images / (images/s) / 3600, on one such device; "
    "hours a point = hours / published top-1; the objective `another` is not the paper's: images/s compare, accuracy does not"
)
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


def asked_rows(options: argparse.Namespace) -> list[Row]:
    columns = [*options.columns, *(["reference"] if options.reference else [])]
    return [Row(method, model, column) for model in options.models for method in options.methods
            for column in columns if method in COLUMNS[column]]  # fmt: skip


def measure_rows(options: argparse.Namespace) -> dict:
    """Return the result, with the keys that `--json` prints."""
    known = {model: to_config(options, model) for model in options.models}
    every, directory = asked_rows(options), options.reference
    if not every:
        raise UserError("no such row: `packed` is a column of ijepa; name another of --methods or --columns")
    refused = {row: reason for row in every if (reason := refusal(row, known[row.model]))}
    for config in known.values():
        device = prepare_device(config, config.mask.truncate_group)
        if directory:
            official.refuse_config(directory, config)
            step.insist_on_equal_losses(config, device, directory)
    asked = [row for row in every if row not in refused]
    shown = track(asked, "peak memory", disable=not sys.stderr.isatty())
    peaks = {row: timing.in_fresh_process(peak_of_row, row, known[row.model], directory) for row in shown}
    refused |= {row: "out of memory" for row in asked if peaks[row] is None}
    found = []
    for group in groups_of_turns([row for row in every if row not in refused], device):
        found += take_turns(group, known, options, device)
    return {
        "rows": [row | {"peak_bytes": peaks[Row(*(row[field] for field in Row._fields))]} for row in found],
        "not_measured": [{"what": str(row), "reason": refused[row]} for row in every if row in refused],
        "formula": FORMULA, "threads": torch.get_num_threads(),
    }  # fmt: skip


def varied(row: Row, config: Config) -> Config:
    """Return the config with the keys that the column of the row sets."""
    for section, keys in VARIANTS.get(row.column, {}).items():
        config = replace(config, **{section: replace(getattr(config, section), **keys)})
    return config_from_dict(config.to_dict(), row.column)


def refusal(row: Row, config: Config) -> str:
    """Say why the column of a row cannot run on this device; an empty text where it can."""
    try:
        if row.column == "same":
            vit.import_libraries()
        check_compute(varied(row, config), join_world(config.runtime.device).device)
    except UserError as error:
        return str(error)
    return ""


def groups_of_turns(rows: Sequence[Row], device: torch.device) -> list[list[Row]]:
    """Return who takes turns with whom: all rows, or on a card the columns of one model and method."""
    groups: dict[object, list[Row]] = {}
    for row in rows:
        groups.setdefault(None if device.type == "cpu" else (row.model, row.method), []).append(row)
    return list(groups.values())


def take_turns(group: list[Row], known: dict[str, Config], options: argparse.Namespace, device: torch.device) -> list[dict]:
    """Time rounds of some steps of every row, and of the matrix products that are the ceiling of all."""
    dtype = COMPUTE_DTYPES[next(iter(known.values())).runtime.dtype]
    rounds, steps = options.rounds, options.steps
    count = min(rounds * steps, DISTINCT)
    try:
        runs = {row: build_row(row, known[row.model], device, count, options.reference) for row in group}
        shapes = {shape for model in dict.fromkeys(row.model for row in group) for shape in mlp_shapes(known[model])}
        tokens = max(rows for rows, _, _ in shapes)
        ceiling = Ceiling([*sorted(shapes), (tokens, WIDTH, 4 * WIDTH), timing.square_product(device)], dtype, device)
        seconds = timing.interleave({"ceiling": ceiling, **runs}, rounds, device, warmup=-(-count // steps), steps=steps)
    except torch.OutOfMemoryError as error:
        names = ", ".join(map(str, group))
        raise UserError(f"{names} fit alone but not together; measure fewer --columns, or lower --batch") from error
    rates, found = means_of_rounds(ceiling.rates.get, rounds, steps), []
    for row, run in runs.items():
        spent = means_of_rounds(lambda number, each=run.flops: each[number % len(each)], rounds, steps)
        found.append(measured_row(row, Rounds(spent, seconds[row], rates), varied(row, known[row.model]), device))
    return found


def means_of_rounds(of_step: Callable[[int], float], rounds: int, steps: int) -> list[float]:
    """Return the mean of a quantity over the steps of each round."""
    return [float(np.mean([of_step(step) for step in range(n * steps, (n + 1) * steps)])) for n in range(rounds)]


def build_row(row: Row, config: Config, device: torch.device, count: int, directory: str | None = None):
    """Build a contender with `count` batches; call it with the number of a step."""
    numbers, config = typical_batches(config, count), varied(row, config)
    if row.column in (*OURS, "reference"):
        works = [draw_work(config, device, number) for number in numbers]
        return step.build_contender("ours" if row.column in OURS else "theirs", config, device, works, directory)
    method = METHODS[row.method]
    batches = [method.draw(config, device, number) for number in numbers]
    return vit.MethodStep(method, config, device, batches)


def peak_of_row(row: Row, config: Config, directory: str | None) -> int | None:
    """Return the peak bytes of the first steps of a contender; None where the memory of a card is too small.

    It runs in a fresh process.
    """
    device = prepare_device(config, config.mask.truncate_group)
    try:
        return timing.peak_bytes(lambda: build_row(row, config, device, DISTINCT, directory), device)
    except torch.OutOfMemoryError:
        return None


class Rounds(NamedTuple):
    """The rounds of one contender."""

    flops: list[float]  # an image
    seconds: list[float]  # a step
    rates: list[float]  # of matrix products, in FLOP/s


def measured_row(row: Row, rounds: Rounds, config: Config, device: torch.device) -> dict:
    batch, per_image = config.data.batch_size, float(np.mean(rounds.flops))
    speed = Spread.of([batch / s for s in rounds.seconds])
    shares = Spread.of([batch * f / s / rate for f, s, rate in zip(*rounds, strict=True)])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    sheet, dtype = datasheet_flops(name, config.runtime.dtype), COMPUTE_DTYPES[config.runtime.dtype]
    chosen = row.column in (*OURS, "same")
    way = choose_attention(config.runtime.attention, device, dtype, config.head_dims[0]) if chosen else "materialised"
    return {
        **facts_of(row, config, per_image), "device": name, "attention": way, "dtype": config.runtime.dtype,
        "batch": batch, "size": config.image_size[0], "patch": config.mask.patch_size, "n": len(rounds.seconds),
        "images_per_s": speed.median, "p20": speed.p20, "p80": speed.p80,
        "spread": (speed.p80 - speed.p20) / speed.median,
        "gemm_gflops": Spread.of(rounds.rates).median / 1e9,
        "mfu": shares.median, "mfu_spread": (shares.p80 - shares.p20) / shares.median,
        "share_of_datasheet": None if sheet is None else per_image * speed.median / sheet,
        **(found := projected(row, speed.median)),
        "arithmetic": f"{found['epochs']} epochs x {IMAGENET_IMAGES} images / {speed.median:.2f} images/s / 3600 s",
    }  # fmt: skip


def facts_of(row: Row, config: Config, per_image: float) -> dict:
    """Return the row with its objective and its FLOPs, per image and per context of an image."""
    views, objective = config.mask.num_enc_masks, "another" if row.column in OTHER_OBJECTIVES else "paper"
    return {**row._asdict(), "objective": objective, "views": views, "gflop_per_image": per_image / 1e9,
            "gflop_per_view": per_image / views / 1e9}  # fmt: skip


def projected(row: Row, images_per_s: float) -> dict:
    """Return what FORMULA gives; `epochs_published` is false where the number of epochs is another model's."""
    published = None if row.column in OTHER_OBJECTIVES else PUBLISHED.get((row.method, row.model))
    epochs, accuracy = published or (ASSUMED[row.method], None)
    hours = epochs * IMAGENET_IMAGES / images_per_s / 3600
    return {"epochs": epochs, "epochs_published": published is not None, "hours": hours, "accuracy": accuracy,
            "hours_per_point": hours / accuracy if accuracy else None}  # fmt: skip


def datasheet_flops(name: str, dtype: str) -> float | None:
    """Return the dense FLOP/s of a card's data sheet; None for a CPU and for cards that `fastjepa.plan` does not know."""
    return next((sheet.peak(dtype) for card, sheet in DATASHEETS.items() if card in name.lower()), None)


def estimate_rows(options: argparse.Namespace) -> list[dict]:
    """Return rows without a measurement: FLOPs over a stated share of the peak of a data sheet."""
    peak, rows = DATASHEETS[options.estimate].bf16, []
    vit.import_libraries()
    for row in asked_rows(options):
        if row.column in ("reference", "fp8"):  # there is no one peak for fp8
            continue
        config = varied(row, to_config(options, row.model))
        per_image = counted_flops(row, config)
        images_per_s = options.share * peak / per_image
        found = projected(row, images_per_s)
        arithmetic = (f"{found['epochs']} epochs x {IMAGENET_IMAGES} images x {per_image / 1e9:.1f} GFLOP / "
                      f"({options.share:.0%} of {peak / 1e12:.0f} TFLOP/s) / 3600 s")  # fmt: skip
        rows.append({"estimate": True, **facts_of(row, config, per_image), "device": options.estimate,
                     "images_per_s": images_per_s, **found, "arithmetic": arithmetic})  # fmt: skip
    return rows


def counted_flops(row: Row, config: Config) -> float:
    """Return the FLOPs per image of a row, from the masks alone."""
    cpu, numbers = torch.device("cpu"), typical_batches(config, DISTINCT)
    if row.column in OURS:
        return float(np.mean([draw_work(config, cpu, number).flops_per_image(config) for number in numbers]))
    method = METHODS[row.method]
    return float(np.mean(vit.count_flops(method, config, [method.draw(config, cpu, number) for number in numbers])))


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    about = "Time training steps of I-JEPA, MAE and iBOT and project what their published runs cost."
    parser = make_parser(about, EXAMPLES, device="auto", dtype="auto", batch=None, size=224, threads=None, rounds=10)
    parser.add_argument("--models", type=some_of(*MODELS), default="vit_small,vit_base,vit_huge", metavar="NAME,...")
    parser.add_argument("--methods", type=some_of(*METHODS), default=",".join(METHODS), metavar="NAME,...")
    parser.add_argument("--columns", type=some_of(*OURS, "same"), default="packed,same", metavar="NAME,...",
                        help="packed,same, and variants of packed: " + ",".join(VARIANTS))  # fmt: skip
    parser.add_argument("--reference", metavar="DIR", help="clone of the official I-JEPA code, for a column of its own")
    parser.add_argument("--steps", type=positive_int, default=1, help="steps of a round in a row, timed together (default 1)")
    parser.add_argument("--estimate", choices=tuple(DATASHEETS), help="measure nothing: FLOPs over a share of this card's peak")
    parser.add_argument("--share", type=float, default=0.4, help="of the peak, for --estimate (default 0.4)")
    return parser.parse_intermixed_args(argv)


def to_config(options: argparse.Namespace, model: str) -> Config:
    device = "cpu" if options.estimate else options.device
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    return config_of(
        options, runtime__device=device, meta__model_name=model,
        runtime__dtype="bf16" if options.estimate and options.dtype == "auto" else options.dtype,  # as on the card
        meta__pred_depth=PREDICTOR_DEPTHS.get(model, 6), mask__patch_size=PATCHES.get(model, 16),
        data__batch_size=options.batch or BATCH["cuda" if cuda else "cpu"],
    )  # fmt: skip


def measure_asked(options: argparse.Namespace) -> dict:
    if not 0 < options.share <= 1:
        raise UserError(f"--share {options.share}: give a number above 0 and up to 1")
    return {"rows": estimate_rows(options), "formula": FORMULA} if options.estimate else measure_rows(options)


def main(argv: list[str] | None = None) -> int:
    return run_script("gpu_hours.py", parse_options(argv), measure_asked)


if __name__ == "__main__":
    sys.exit(main())
