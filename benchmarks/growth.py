"""The growth of the cost of a run, beside that of the maths: `python benchmarks/growth.py --along batch,tokens`.

Each cost is measured at several values, in turns. A line is fitted through the logarithms of the least time of each value,
as a disturbance only adds to a time, and its slope is the exponent. The maths are the FLOPs of `fastjepa.plan.flops` (on ranks:
those that a core has to do), the bytes of `fastjepa.plan.memory`, and for the work of the host the number of things done. What
grows faster than the maths, beyond TOLERANCE and the error of the fit, is flagged. The tolerance is what a sort of 1,000 or
more things adds, or a cache that is too small for the larger values.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sharded
import step
import timing
import torch
from options import config_of, int_list, make_parser, run_script
from rich.progress import track
from work import TrainerStep, Work, prepare_device

from fastjepa.checkpoint.save import save_checkpoint
from fastjepa.checkpoint.state import TrainState
from fastjepa.cli.options import some_of
from fastjepa.config.schema import Config
from fastjepa.cores import usable_cores
from fastjepa.errors import UserError
from fastjepa.masks.check import check_masks
from fastjepa.masks.draw import draw_masks
from fastjepa.masks.layouts import Masking
from fastjepa.masks.pack import pack
from fastjepa.model.jepa import NetworkShape
from fastjepa.plan.memory import FP32_BYTES, activation_bytes, buffer_bytes, network_sizes, row_counts, state_bytes
from fastjepa.plan.plan import workload_of

TOLERANCE, CONFIDENCE = 0.15, 0.975
LEAST, HEAD = 3, 32  # values, so that the fit has an error; width of an attention head along `width`
EXAMPLES = """examples:
  python benchmarks/growth.py --along batch,tokens,width,depth --threads 1
  python benchmarks/growth.py --along ranks --ranks 1,2,4 --threads 1
  python benchmarks/growth.py --along masks,packing,checkpoint --json
  python benchmarks/growth.py --device cuda --model vit_base --along batch,tokens --batch 16,32,64,128 --size 160,224,320"""


class Point(NamedTuple):
    """One value of a cost; it has bytes too where memory or a file grows."""

    value: float
    run: Callable[[int], object]  # is timed, and called with the number of a round
    work: float  # the quantity that time should be proportional to
    nbytes: Callable[[], int] | None = None  # measures the bytes
    counted: float = 0.0  # bytes by the maths


@dataclass(frozen=True)
class Place:
    """The things that the points of a cost are made of."""

    config: Config
    device: torch.device
    scratch: Path  # an empty folder


def fit_exponent(values: Sequence[float], costs: Sequence[float]) -> tuple[float, float]:
    """Fit the exponent of cost ~ value ** exponent, by least squares on logarithms, and its standard error."""
    x, y = (np.log(them) - np.log(them).mean() for them in (values, costs))
    slope = (x @ y) / (x @ x)
    scatter = y - slope * x
    return float(slope), float(np.sqrt(scatter @ scatter / (len(x) - 2) / (x @ x)))


def growth_row(
    cost: str, quantity: str, against: str, values: Sequence[float], measured: Sequence[float], maths: Sequence[float]
) -> dict:
    """Return the exponents of the measured cost, of the maths, and of their ratio: the excess of the first."""
    try:
        from scipy.stats import t
    except ImportError as error:
        raise UserError("the fits need scipy; pip install 'fastjepa[bench]'") from error
    (exponent, stderr), (counted, _) = fit_exponent(values, measured), fit_exponent(values, maths)
    excess, excess_stderr = fit_exponent(values, np.divide(measured, maths))
    margin = t.ppf(CONFIDENCE, len(values) - 2) * excess_stderr
    return {
        "cost": cost, "quantity": quantity, "against": against, "values": list(values), "measured": list(measured),
        "exponent": exponent, "stderr": stderr, "of_the_maths": counted, "excess": excess, "excess_stderr": excess_stderr,
        "too_fast": bool(excess > max(TOLERANCE, margin)),
    }  # fmt: skip


def time_points(cost: str, against: str, points: Sequence[Point], rounds: int, device: torch.device) -> Iterator[dict]:
    """Yield a row of milliseconds, and one of bytes where the points have them."""
    values = [point.value for point in points]
    seconds = timing.interleave({i: point.run for i, point in enumerate(points)}, rounds, device)
    milliseconds = [1000 * min(taken) for taken in seconds.values()]
    yield growth_row(cost, "ms", against, values, milliseconds, [point.work for point in points])
    if points[0].nbytes:
        held = [point.nbytes() for point in points]
        yield growth_row(cost, "bytes", against, values, held, [point.counted for point in points])


def along(config: Config, axis: str, value: int) -> tuple[float, Config]:
    """Return the value that the cost is fitted against, and the config with another batch, image size, width or depth."""
    if axis == "batch":
        mask = replace(config.mask, truncate_group=value)
        return value, replace(config, data=replace(config.data, batch_size=value), mask=mask)
    if axis == "tokens":
        config = replace(config, data=replace(config.data, crop_size=value))
        return float(np.prod(config.grid)), config
    meta = {"depth": {"depth": value}, "width": {"embed_dim": value, "num_heads": value // HEAD}}[axis]
    return value, replace(config, meta=replace(config.meta, **meta))


def step_point(config: Config, axis: str, value: int, device: torch.device) -> Point:
    value, config = along(config, axis, value)
    check_masks(Masking.of(config), config.data.batch_size)
    works = [Work.draw(config, device, number) for number in range(step.DISTINCT)]
    run = step.OurStep(config, device, works)
    return Point(value, run, config.data.batch_size * float(np.mean(run.flops)),
                 lambda: timing.in_fresh_process(step.peak_of_contender, config, "ours", None), step_bytes(config))  # fmt: skip


def step_bytes(config: Config) -> int:
    """Return the bytes that a step on one device holds at its peak, as `fastjepa.plan.memory` counts them."""
    size, rows = network_sizes(NetworkShape.of(config)), row_counts(workload_of(config), config.micro_batch)
    held = activation_bytes(workload_of(config), rows)
    parts = state_bytes(size, config.runtime.dtype, 1, 0) | buffer_bytes(size, config.runtime.dtype, 0)
    return sum(parts.values()) + held.saved + held.loss


def on_ranks(config: Config, counts: Sequence[int], rounds: int, device: torch.device) -> Iterator[dict]:
    """Yield rows of DDP with one batch a rank: time grows where ranks share cores, and the state of a rank does not."""
    cores = torch.cuda.device_count() if device.type == "cuda" else usable_cores() // torch.get_num_threads()
    starts = {count: [] for count in counts}
    for _ in range(rounds):
        for count in counts:
            whole = replace(config, data=replace(config.data, batch_size=count * config.data.batch_size))
            starts[count].append(sharded.start_ranks(whole, 0, count))
    times = [min(ms for one in starts[count] for ms in one["ms"]) for count in counts]
    yield growth_row("step", "ms", "ranks", counts, times, [max(1.0, count / max(1, cores)) for count in counts])
    held = [starts[count][0]["state_bytes"] for count in counts]
    yield growth_row("state", "bytes", "ranks", counts, held, [1.0 for _ in counts])


def mask_point(place: Place, batch: int) -> Point:
    return Point(batch, lambda number: draw_masks(Masking.of(place.config), number, range(batch), batch), batch)


def packing_point(place: Place, batch: int) -> Point:
    drawn = draw_masks(Masking.of(place.config), 0, range(batch), batch)
    return Point(batch, lambda number: pack(*drawn), batch)


def checkpoint_point(place: Place, depth: int) -> Point:
    """Save checkpoints, against the numbers that one has to hold: weights, two moments and the average."""
    _, config = along(place.config, "depth", depth)
    run, root = TrainerStep(config, place.device), place.scratch / f"checkpoint-{depth}"
    size = network_sizes(NetworkShape.of(config))
    run.take(batch.to(place.device) for batch in Work.draw(config, place.device, 0).packed(config))
    networks = {"encoder": run.jepa.encoder, "predictor": run.jepa.predictor, "target_encoder": run.target_encoder}
    state = TrainState(0, networks, run.engine.optimizer)

    def save_next(number: int) -> None:
        state.step += 1
        save_checkpoint(root, state, keep_last=1)

    numbers = 3 * size.trained + size.encoder
    written = lambda: sum(path.stat().st_size for path in root.rglob("*") if path.is_file())  # noqa: E731
    return Point(numbers, save_next, numbers, written, FP32_BYTES * numbers)


STEP_AXES = {"batch": "batch", "tokens": "size", "width": "width", "depth": "depth"}  # and the option with their values
HOST_COSTS = {  # name: title, the quantity it grows with, the option with its values, how a point is made
    "masks": ("drawing masks", "images", "drawn", mask_point),
    "packing": ("packing", "images", "drawn", packing_point),
    "checkpoint": ("checkpoint", "numbers in it", "depth", checkpoint_point),
}
COSTS = (*STEP_AXES, "ranks", *HOST_COSTS)


def measure_asked(options: argparse.Namespace) -> list[dict]:
    config = to_config(options)
    device = prepare_device(config, config.data.batch_size)
    about = {"model": config.meta.model_name, "dtype": config.runtime.dtype, "rounds": options.rounds}
    with tempfile.TemporaryDirectory(prefix="fastjepa-bench-") as scratch:
        place, named = Place(config, device, Path(scratch)), track(options.along, "measuring", disable=not sys.stderr.isatty())
        return [row | about for name in named for row in cost_rows(name, place, options)]


def cost_rows(name: str, place: Place, options: argparse.Namespace) -> Iterator[dict]:
    if name == "ranks":
        return on_ranks(place.config, options.ranks, options.rounds, place.device)
    if name in STEP_AXES:
        points = [step_point(place.config, name, value, place.device) for value in getattr(options, STEP_AXES[name])]
        return time_points("step", name, points, options.rounds, place.device)
    title, against, option, point = HOST_COSTS[name]
    points = [point(place, value) for value in getattr(options, option)]
    return time_points(title, against, points, options.rounds, torch.device("cpu"))


VALUES = {"batch": "4,8,16,32", "size": "128,192,256,320", "width": "96,192,384,768", "depth": "3,6,12,24", "ranks": "1,2,4",
          "drawn": "64,128,256,512,1024,2048"}  # fmt: skip
MEANINGS = {"batch": "images a step", "size": "pixels, along tokens", "drawn": "images whose masks are drawn"}


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    about = "Fit how time and memory grow, and flag what grows faster than the maths."
    parser = make_parser(about, EXAMPLES, device="auto", model="vit_tiny", dtype="auto", threads=None, rounds=5)
    names = ",".join(COSTS)
    parser.add_argument("--along", type=some_of(*COSTS), default=list(COSTS), metavar="NAME,...", help=f"default {names}")
    for name, values in VALUES.items():
        said = f"{MEANINGS.get(name, name)} (default %(default)s)"
        parser.add_argument(f"--{name}", type=rising_values, default=values, metavar="N,...", help=said)
    return parser.parse_intermixed_args(argv)


def rising_values(text: str) -> list[int]:
    found = sorted(set(int_list(text)))
    if len(found) < LEAST or found[0] < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a fit needs at least {LEAST} different numbers above 0")
    return found


def to_config(options: argparse.Namespace) -> Config:
    """Return the config of what does not grow: 8 images of 128 pixels, unless the overrides say otherwise."""
    still = argparse.Namespace(**{name: value for name, value in vars(options).items() if name not in ("batch", "size")})
    return config_of(still, data__batch_size=8, data__crop_size=128, mask__truncate_group=8, mask__min_keep=4)


def main(argv: list[str] | None = None) -> int:
    return run_script("growth.py", parse_options(argv), measure_asked)


if __name__ == "__main__":
    sys.exit(main())
