"""The log: metrics.jsonl, TensorBoard, the console and throughput."""

import contextlib
import importlib.util
import json
import math
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column
from torch import Tensor

from fastjepa.files import write_atomic
from fastjepa.monitoring.machine import memory_gib


class Peak(NamedTuple):
    """Peak speed of a run: what its images cost, and what its devices can do."""

    flops_per_image: float  # of training on one image, forward and backward
    gemm_rate: float  # FLOP/s of matrix products, of all devices together; 0 where it is not known


class Log:
    """Log of a run in `output`/metrics.jsonl, TensorBoard events and the console; with `output` None it does nothing.

    Call `step` after every optimizer step. Every `every` steps, and at the last, it writes one JSON object; tensors
    among the values are read from the device only then. Rates are over the wall time since the last such step, and `cpu_s`
    is this process's CPU time since then, without what ran under `pause`. Lines later than `start_step`, the step resumed
    from, are dropped on entry.

    Args:
        peak: what utilisation (MFU) is counted with.
        sinks: where lines go beside metrics.jsonl: "console", a progress bar on a terminal, else plain lines; "tensorboard",
            events, where TensorBoard is installed.
    """

    def __init__(
        self,
        output: Path | None,
        total_steps: int,
        every: int,
        peak: Peak,
        start_step: int = 0,
        sinks: Collection[str] = ("console", "tensorboard"),
    ):
        self.output, self.total_steps, self.every, self.start_step = output, total_steps, every, start_step
        self.peak = peak
        self.kept: list[dict[str, Any]] = []  # the entries of a resumed run, oldest first
        self._console, self._tensorboard = "console" in sinks, "tensorboard" in sinks
        self._held: dict[str, float] = {}
        self._file = self._events = self._bar = None

    def __enter__(self) -> "Log":
        if self.output is not None:
            self.output.mkdir(parents=True, exist_ok=True)
            file = self.output / "metrics.jsonl"
            self.kept = _cut_after(file, self.start_step)
            self._file = file.open("a")
            self._events = _tensorboard_writer(self.output, self.start_step) if self._tensorboard else None
            self._bar = _progress_bar(self.total_steps, self.start_step) if self._console and sys.stdout.isatty() else None
        self._restart(self.start_step)
        return self

    def __exit__(self, *exception: Any) -> None:
        for sink, close in ((self._file, "close"), (self._events, "close"), (self._bar, "stop")):
            if sink is not None:
                getattr(sink, close)()
        self._file = self._events = self._bar = None

    @property
    def writes(self) -> bool:
        """Return whether this rank's log is the one that is written."""
        return self._file is not None

    def has_line(self, step: int) -> bool:
        """Return whether `step` (steps taken so far, from 1) is one that gets a line."""
        return step % self.every == 0 or step == self.total_steps

    def due(self, step: int) -> bool:
        """Return whether this rank writes a line after `step`."""
        return self.writes and self.has_line(step)

    def step(self, step: int, epoch: int, values: Mapping[str, float | Tensor], images: int) -> None:
        """Record step number `step`; `images` is how many the step used, over all ranks."""
        self._images += images
        if not self.due(step):
            return
        read = {name: value.item() if isinstance(value, Tensor) else value for name, value in values.items()}
        seconds = max(time.perf_counter() - self._start - self._paused, 1e-9)
        rate = self._images / seconds
        mfu = rate * self.peak.flops_per_image / self.peak.gemm_rate if self.peak.gemm_rate else None
        record = {
            "step": step,
            "epoch": epoch,
            **read,
            "images_per_s": rate,
            "cpu_s": time.process_time() - self._cpu_start - self._cpu_paused,
            "mfu": mfu,
            "memory_gib": memory_gib(),
            **self._held,
        }
        left = (self.total_steps - step) * seconds / max(step - self._since, 1)
        self._write(record, left)
        self._held = {}
        self._restart(step)

    def hold(self, values: Mapping[str, float]) -> None:
        """Keep values for the next line, beside those given to `step`; a later value of the same name replaces one."""
        self._held |= values

    def message(self, text: str) -> None:
        """Print a line of text on the console, above the progress bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif self._file is not None and self._console:
            print(text, flush=True)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leave out time that is not training, such as checkpoints, from every rate. May be nested."""
        start, cpu_start, before = time.perf_counter(), time.process_time(), (self._paused, self._cpu_paused)
        try:
            yield
        finally:
            self._paused = before[0] + time.perf_counter() - start
            self._cpu_paused = before[1] + time.process_time() - cpu_start

    def _restart(self, step: int) -> None:
        self._start, self._paused, self._images, self._since = time.perf_counter(), 0.0, 0, step
        self._cpu_start, self._cpu_paused = time.process_time(), 0.0

    def _write(self, record: dict[str, Any], left: float) -> None:
        finite = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in record.items()}
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in finite.items():
                if name != "step" and value is not None:
                    self._events.add_scalar(name, value, record["step"])
        if self._bar is not None:
            self._bar.update(
                self._bar.task_ids[0], completed=record["step"], description=_console_line(record, self.total_steps, left)
            )
        elif self._console:
            print(_console_line(record, self.total_steps, left), flush=True)


def _console_line(record: Mapping[str, Any], total: int, left: float) -> str:
    shown = [f"step {record['step']}/{total}"]
    for name, label, form in (
        ("loss", "loss", ".4f"), ("lr", "lr", ".2e"), ("ema_momentum", "momentum", ".4f"), ("images_per_s", "img/s", ".1f"),
        ("mfu", "MFU", ".1%"), ("memory_gib", "GiB", ".2f"), ("feature_std", "std", ".3f"), ("effective_rank", "rank", ".1f"),
        ("ema_distance", "distance", ".3g"),
        ("lidar", "LiDAR", ".1f"), ("knn", "k-NN", ".1%"),
    ):  # fmt: skip
        if record.get(name) is not None:
            shown.append(f"{label} {record[name]:{form}}")
    if record.get("skipped"):
        shown.append(f"skipped {record['skipped']:.0f}")
    minutes, seconds = divmod(round(left), 60)
    return "  ".join([*shown, f"ETA {minutes // 60}:{minutes % 60:02}:{seconds:02}"])


def _progress_bar(total: int, start: int) -> Progress:
    wrapped = Column(no_wrap=False)  # a narrow terminal shows two lines rather than half of one
    progress = Progress(BarColumn(bar_width=12), TextColumn("{task.description}", markup=False, table_column=wrapped))
    progress.add_task(f"step {start}/{total}", total=total, completed=start)
    progress.start()
    return progress


def _tensorboard_writer(output: Path, start_step: int) -> Any:
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter  # slow to import

    return SummaryWriter(output / "tensorboard", purge_step=start_step + 1)


def _cut_after(file: Path, last: int) -> list[dict[str, Any]]:
    """Drop the lines of `file` past step `last`, and a line torn by a kill, in one rename; returns the entries that stay."""
    if not file.exists():
        return []
    lines, kept, entries = file.read_text().splitlines(keepends=True), [], []
    for line in lines:
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if line.endswith("\n") and entry["step"] <= last:
                kept.append(line)
                entries.append(entry)
    if len(kept) < len(lines):
        write_atomic(file, "".join(kept))
    return entries
