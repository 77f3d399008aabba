"""Predictions of every row that `make gpu-check` fills on an H200, written before it: `python benchmarks/predictions.py`.

No number here is measured on a card but the two rates that all start from: 788 TFLOP/s of large bf16 products and 4.3 TB/s
copied. FLOPs are those of `fastjepa plan`, bytes those of the benches; the share of a rate is assumed, and is in each row.
Loaders scale the rate of one process in benchmarks/results/data_cpu.json by the processes.
"""

import argparse
import functools
import inspect
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_check
import gpu_hours
import pytest
import results
import torch
from ops import protocol
from options import make_parser, run_script

from fastjepa.config.load import load_config
from fastjepa.plan.datasheets import DATASHEETS
from fastjepa.plan.flops import flops_per_image
from fastjepa.plan.plan import workload_of

SHEET = DATASHEETS["h200"]
STEP = {"vit_huge": 0.648, "vit_large": 0.56, "vit_base": 0.46, "vit_small": 0.34}  # share of the products' rate
COLUMNS = {"packed": 1.0, "compile": 1.1, "graph": 1.05, "fp8": 1.15, "same": 0.8}  # times that share
# Best published shares of the data sheet, which these are to pass: ViT-L is 962 images/s of two views at 224 on an H200.
PUBLISHED = {"vit_large": 0.36, "vit_small": 0.229}
COPIED = {"ours": 0.9, "compiled": 0.7, "torch fused + foreach": 0.72, "torch._foreach_lerp_": 0.8}  # 10 of 9 bytes at 80 %
OTHERS = 0.35  # several passes over memory
ATTENTION = {"ours": 0.25, "torch varlen": 0.25, "flash-attn": 0.3, "padded SDPA": 0.1, "compiled": 0.02, "eager": 0.005}
WORKERS = 8


def card_sizes() -> protocol.Setting:
    """Return the sizes of a card's benches, with tensors that nobody writes and so take no memory; indices are real."""
    setting = protocol.Setting(torch.device("cpu"), toy=False)
    setting.scale, setting.dtype = "cuda", torch.bfloat16
    setting.randn = lambda *shape, dtype=None: torch.empty(shape, dtype=dtype or setting.dtype)
    return setting


def step_rows() -> Iterator[dict]:
    for model, keys in gpu_check.STEPS.items():
        for masks, cut in gpu_check.MASKS.items():
            batch = ("data.batch_size=128", "mask.truncate_group=128", f"mask.truncate={cut}")
            flops = flops_per_image(workload_of(load_config(os.devnull, (f"meta.model_name={model}", *batch, *keys))))
            above = {"to_pass": PUBLISHED[model] * SHEET.bf16 / flops} if model in PUBLISHED else {}
            yield {"part": "step", "model": model, "masks": masks, **rate_of(flops, STEP[model]), **above}


def rate_of(flops: float, share: float) -> dict[str, Any]:
    images = share * SHEET.gemm / flops
    about = f"{share:.1%} of {SHEET.gemm / 1e12:.0f} TFLOP/s / {flops / 1e9:.0f} GFLOP an image"
    facts = {"gflop_per_image": flops / 1e9, "of_datasheet": images * flops / SHEET.bf16, "arithmetic": about}
    return {"predicted": images, "unit": "images/s", **facts}


def hours_rows() -> Iterator[dict]:
    for model, columns in gpu_check.HOURS:
        options = gpu_hours.parse_options(["--estimate=h200", f"--models={model}", f"--columns={columns}", "--batch=128"])
        for row in gpu_hours.asked_rows(options):
            flops = gpu_hours.counted_flops(row, gpu_hours.varied(row, gpu_hours.to_config(options, model)))
            yield {"part": "gpu_hours", **row._asdict(), **rate_of(flops, STEP[model] * COLUMNS[row.column])}


def data_rows() -> Iterator[dict]:
    for row in json.loads((results.RESULTS / "data_cpu.json").read_text())["rows"]:
        if row["workers"] == 1:
            rate, about = row["images_per_s"]["median"], {"source": row["source"], "loader": row["loader"], "workers": WORKERS}
            text = f"{WORKERS} x {rate:.0f} images/s of one process (data_cpu)"
            yield {"part": "data", **about, "predicted": WORKERS * rate, "unit": "images/s", "arithmetic": text}


def op_rows() -> Iterator[dict]:
    """Yield a row for each bench, by the name that pytest-benchmark gives it, from the inputs of its own file."""
    found, folder = SimpleNamespace(), Path(__file__).parent / "ops"
    found.pytest_collection_finish = lambda session: setattr(found, "items", session.items)
    files = [str(folder / f"bench_{op}.py") for op in gpu_check.BENCHES]
    pytest.main(["--collect-only", "-q", "-c", os.devnull, "--confcutdir", str(folder.parent), *files], plugins=[found])
    for item in found.items:
        params, asks = item.callspec.params, inspect.signature(item.function).parameters
        inputs, direction = bench_inputs(item.function, tuple((name, params[name]) for name in asks if name != "bench"))
        op, provider, both = item.path.stem.removeprefix("bench_"), params["provider"], direction != "forward"
        work, share, rate = inputs.forward + both * inputs.backward, COPIED.get(provider, OTHERS), SHEET.copied
        if inputs.flops:
            work, share, rate = inputs.flops * (1 + both * protocol.ATTENTION_BACKWARD), ATTENTION[provider], SHEET.gemm
        about = f"{work / 1e9:.3g} {'GFLOP' if inputs.flops else 'GB'} / ({share:.1%} of {rate / 1e12:g} T/s)"
        yield {"benchmark": item.name, "op": op, "provider": provider, "direction": direction,
               "predicted": 1000 * work / (share * rate), "unit": "ms", "arithmetic": about}  # fmt: skip


@functools.cache
def bench_inputs(bench_test: Any, given: tuple) -> tuple[protocol.Inputs, str]:
    """Call a bench with what it asks for, and take its inputs instead of timing them."""
    asked = []
    bench_test(bench=lambda make, direction: asked.extend((make(card_sizes()), direction)), **dict(given))
    return tuple(asked)


def predict(options: argparse.Namespace) -> list[dict]:
    rows = (*step_rows(), *op_rows(), *hours_rows(), *data_rows())
    return [{"estimate": True, "card": "h200", **row} for row in rows]


if __name__ == "__main__":
    sys.exit(run_script("predictions.py", make_parser("Predict the rows of an H200.", "").parse_args(), predict))
