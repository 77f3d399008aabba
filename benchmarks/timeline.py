"""A few training steps as a Chrome trace (chrome://tracing, ui.perfetto.dev) with the step's parts on a track of their own."""

import json
import tempfile
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import timing
import torch
from torch.profiler import ProfilerActivity, profile, record_function

MARK, TRACK = "fastjepa begins: ", "parts of the step"
LAUNCHES = ("cuda_runtime", "cuda_driver")
DEVICE_WORK = ("kernel", "gpu_memset")  # copies of batches are no work of the step's parts


def mark(part: str) -> None:
    """Say to a profiler that may be listening, on whichever thread this is, that a part begins."""
    with record_function(MARK + part):
        pass


def record(step: Callable[[], object], steps: int, device: torch.device, file: Path | None) -> dict[str, float]:
    """Profile further steps, keep their trace in `file`, and return the device's busy milliseconds a step by part.

    They are none on a CPU. OSError where the file cannot be written.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            step()
        mark("end")
        timing.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(exported))
        trace = json.loads(exported.read_text())
    events = trace["traceEvents"]
    ranges = parts(events)
    if file:
        trace["traceEvents"] = [event for event in events if not is_mark(event)] + ranges
        text = json.dumps(trace)
        file.write_text(text)
    return {part: milliseconds / steps for part, milliseconds in busy(events, ranges).items()}


def parts(events: list[dict]) -> list[dict]:
    """The stretches between marks as events; each mark begins one part and ends another. Times are microseconds."""
    marks = sorted(filter(is_mark, events), key=lambda event: event["ts"])
    return [{"ph": "X", "cat": "part", "name": this["name"].removeprefix(MARK), "pid": "fastjepa", "tid": TRACK,
             "ts": this["ts"], "dur": after["ts"] - this["ts"]}
            for this, after in zip(marks, marks[1:], strict=False)]  # fmt: skip


def is_mark(event: dict) -> bool:
    """On the host: a profiler of CUDA shows them on the device's track too."""
    return event.get("cat") == "user_annotation" and event["name"].startswith(MARK)


def busy(events: list[dict], ranges: list[dict]) -> dict[str, float]:
    """Milliseconds in which kernels ran that the host launched during each part; empty without a GPU."""
    calls = [event for event in events if event.get("cat") in LAUNCHES and "correlation" in event.get("args", {})]
    launched = {call["args"]["correlation"]: call["ts"] for call in calls}
    starts, intervals = [one["ts"] for one in ranges], defaultdict(list)
    for event in events:
        at = launched.get(event["args"]["correlation"]) if event.get("cat") in DEVICE_WORK else None
        if at is not None and at >= starts[0]:
            part = ranges[bisect_right(starts, at) - 1]["name"]
            intervals[part].append((event["ts"], event["ts"] + event["dur"]))
    return {part: covered(found) / 1000 for part, found in intervals.items()}


def covered(intervals: list[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
