"""How many JPEGs a second a card decodes, beside what training eats: the part of gpu_check.py that decodes.

DALI's pipeline as the trainer builds it (decode a box, resize it to 224), and torchvision's `decode_jpeg` on the card, whole
images at a time, with and without the crop and resize after it. Files and boxes lie ready in memory: sources and loader
processes are benchmarks/data.py's matter. It needs torch, torchvision and what timm brings. On a CPU both decode there.
"""

import argparse
import contextlib
import itertools
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import timing
import torch
from timing import Spread
from torch import Tensor

BATCH, SIZE = 128, (224, 224)
DISTINCT = 256  # images
AHEAD = 2  # micro-batches, the trainer's default
GEMM_FLOPS = 798e12  # bf16, the highest rate measured for large products on an H100 (datasheet: 989e12)
UTILISATIONS = 0.35, 0.60  # of it: a usual trainer, a very good one
EATERS = {
    "ViT-S/16": ("vit_small", 16, 6),
    "ViT-B/16": ("vit_base", 16, 6),
    "ViT-H/14": ("vit_huge", 14, 12),
}  # predictor depth


def eaten() -> list[dict]:
    """Estimates of the images/s that training takes on an H100: its closed-form FLOPs at a share of what products reach."""
    from fastjepa.config.load import load_config
    from fastjepa.plan.flops import flops_per_image

    found = []
    for name, (model, patch, depth) in EATERS.items():
        keys = {"meta.model_name": model, "mask.patch_size": patch, "meta.pred_depth": depth, "data.batch_size": BATCH}
        per_image = flops_per_image(load_config(os.devnull, [f"{key}={value}" for key, value in keys.items()]), steps=4)
        found += [{"model": name, "utilisation": share, "images_per_s_estimate": share * GEMM_FLOPS / per_image}
                  for share in UTILISATIONS]  # fmt: skip
    return found


@dataclass(frozen=True)
class Work:
    """Batches of files, each with a box (top, left, height, width) of about 0.3 to 1 of its area."""

    files: list[list[bytes]]
    boxes: list[list[tuple[int, int, int, int]]]

    @classmethod
    def make(cls, distinct: int, batch: int) -> "Work":
        from photographs import SIZE as made
        from photographs import photographs

        generator, files = torch.Generator().manual_seed(0), list(photographs(distinct))
        shares = (0.55 + 0.45 * torch.rand(distinct, 2, generator=generator)).tolist()
        boxes = [(int((made[1] - h) / 2), int((made[0] - w) / 2), h, w)
                 for h, w in ((round(made[1] * a), round(made[0] * b)) for a, b in shares)]  # fmt: skip
        starts = range(0, distinct, batch)
        return cls([files[start : start + batch] for start in starts], [boxes[start : start + batch] for start in starts])


def dali(work: Work, device: torch.device) -> Iterator[Tensor]:
    from fastjepa.config.schema import DataConfig
    from fastjepa.data.decode_dali import DaliDecoder, DaliSettings, Encoded, View, require_dali

    @dataclass(frozen=True)
    class Batch:
        images: Encoded | Tensor

    require_dali()
    pairs = zip(work.files, work.boxes, strict=True)
    batches = [Batch(Encoded.of([View(*view, False) for view in zip(*pair, strict=True)])) for pair in pairs]
    threads = min(8, len(os.sched_getaffinity(0)))
    settings = DaliSettings(len(work.files[0]), 3, SIZE, device, threads, AHEAD, DataConfig().hw_decoder_load)
    return (batch.images for batch in DaliDecoder(itertools.cycle(batches), undecoded, settings))


def undecoded(position: int, refused: dict[int, str]) -> None:
    raise RuntimeError(f"DALI cannot decode an image made here: {next(iter(refused.values()), 'for no reason it gives')}")


def torchvision(work: Work, device: torch.device, cropped: bool = True) -> Iterator[list[Tensor]]:
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms.v2.functional import resized_crop

    encoded = [[torch.frombuffer(bytearray(raw), dtype=torch.uint8) for raw in files] for files in work.files]
    for files, boxes in itertools.cycle(zip(encoded, work.boxes, strict=True)):
        images = decode_jpeg(files, mode=ImageReadMode.RGB, device=device)
        pairs = zip(images, boxes, strict=True)
        yield [resized_crop(image, *box, list(SIZE), antialias=True) for image, box in pairs] if cropped else images


PROVIDERS: dict[str, tuple[str, Callable]] = {  # package, endless batches
    "dali": ("nvidia.dali", dali),
    "torchvision": ("torchvision", torchvision),
    "torchvision, decode alone": ("torchvision", lambda work, device: torchvision(work, device, cropped=False)),
}


class Rate:
    """images/s of a provider; call it as a run of `timing.interleave`."""

    def __init__(self, batches: Iterator, seconds: float, device: torch.device):
        self.batches, self.seconds, self.device, self.readings = batches, seconds, device, {}

    def __call__(self, number: int) -> None:
        for _ in range(AHEAD + 2):  # made ahead while others had their turn
            next(self.batches)
        timing.synchronize(self.device)
        images, start = 0, time.perf_counter()
        while time.perf_counter() - start < self.seconds:
            images += len(next(self.batches))
            timing.synchronize(self.device)
        self.readings[number] = images / (time.perf_counter() - start)


def measure(device: torch.device, rounds: int, seconds: float, distinct: int = DISTINCT, batch: int = BATCH) -> dict:
    """{measurements, not_measured}, as gpu_check.py keeps them."""
    runs, missing, work, needs = {}, [], Work.make(distinct, batch), eaten()
    for provider, (package, opened) in PROVIDERS.items():
        if reason := absent(package):
            missing.append({"what": f"decode, {provider}", "reason": reason})
            continue
        try:
            batches = opened(work, device)
            next(batches)
        except (RuntimeError, ImportError) as error:  # a build without nvJPEG, a driver that is too old
            missing.append({"what": f"decode, {provider}", "reason": " ".join(str(error).split())[:300]})
        else:
            runs[provider] = Rate(batches, seconds, device)
    timing.interleave(runs, rounds, device)
    found = []
    for provider, run in runs.items():
        rate = Spread.of([run.readings[number] for number in range(rounds)])
        feeds = [need | {"times": rate.median / need["images_per_s_estimate"]} for need in needs]
        found.append({"op": "decode", "provider": provider, "case": f"{batch} JPEGs of 500x375", "device": device.type,
                      "rounds": rounds, "images_per_s": rate._asdict(), "feeds": feeds})  # fmt: skip
    return {"measurements": found, "not_measured": missing}


def absent(package: str) -> str:
    """Why a package cannot be asked, "" where it can."""
    with contextlib.suppress(ModuleNotFoundError):
        if find_spec(package) is not None:
            return ""
    return f"{package} is not installed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default 5)")
    parser.add_argument("--seconds", type=float, default=1.5, help="counted in each turn (default 1.5)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--toy", action="store_true", help="a few images and short turns")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*(?:TorchCodec|deprecated).*")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = measure(device, 2, 0.05, 8, 4) if asked.toy else measure(device, asked.rounds, asked.seconds)
    for one in found["measurements"]:
        print(f"decode, {one['provider']}: {one['images_per_s']['median']:.0f} images/s on {device.type}")
        for need in one["feeds"]:
            line = "  {times:.2f} times what {model} eats on an H100 at {utilisation:.0%}: {images_per_s_estimate:.0f} images/s"
            print(line.format(**need), "(an estimate)")
    for one in found["not_measured"]:
        print(f"{one['what']}: not measured: {one['reason']}")
    if asked.output:
        asked.output.write_text(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())
