"""What FP8 does to the target features: `python benchmarks/fp8.py --model vit_base --images 8`.

Features are compared as the loss sees them, layer-normalised, with those of fp32 on the same images and weights: the norm of
the difference over the norm of the features, and the cosine of the two. The products are torch's own FP8 products, on
a CPU too. `bf16` is the error that autocast makes anyway. Weights are those training starts from, or `--weights`.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import photographs
import torch
import torch.nn.functional as F
from torch import Tensor

from fastjepa.config.load import load_config
from fastjepa.config.schema import MODELS, Config
from fastjepa.data.crops import crop_image
from fastjepa.data.decode_pillow import decode_image
from fastjepa.data.sources import open_source
from fastjepa.errors import CheckpointError, UserError
from fastjepa.loader.micro_batches import MicroBatches
from fastjepa.model.fp8 import use_fp8
from fastjepa.model.jepa import build_pair
from fastjepa.model.vit import Encoder, choose_attention, use_attention
from fastjepa.weights.read import starting_networks


def pictures(config: Config, count: int) -> Tensor:
    """(count, C, H, W) uint8: crops of data.source, or of pictures that decode like photographs."""
    if config.data.source:
        views = MicroBatches(config, open_source(config.data), 0, 1)
        return torch.stack([views.view(0, sample)[0] for sample in range(count)])
    decoded = [decode_image(raw, config.data.channels) for raw in photographs.photographs(count)]
    return torch.stack([crop_image(image, (0, 0, *image.shape[1:]), config.image_size, False) for image in decoded])


@torch.no_grad()
def features(encoder: Encoder, images: Tensor, dtype: torch.dtype) -> Tensor:
    """(b * N, D) fp32, layer-normalised."""
    use_attention(encoder, choose_attention("auto", images.device, dtype))
    with torch.autocast(images.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        return F.layer_norm(encoder(images).float(), (encoder.embed_dim,))


def error(found: Tensor, expected: Tensor) -> dict[str, float]:
    cosine = F.cosine_similarity(found, expected, dim=1)
    return {"relative": float((found - expected).norm() / expected.norm()), "cosine": float(cosine.mean()),
            "worst_cosine": float(cosine.min())}  # fmt: skip


def measure(config: Config, images: Tensor, weights: Path | None, bf16: bool) -> dict:
    device = images.device
    encoder = build_pair(config)[1].to(device)
    if weights:
        given = starting_networks(weights)
        encoder.load_state_dict(given.get("target_encoder") or given["encoder"])
    exact = features(encoder, images, torch.float32)
    errors = {"bf16": error(features(encoder, images, torch.bfloat16), exact)} if bf16 else {}
    use_fp8(encoder)
    errors["fp8"] = error(features(encoder, images, torch.bfloat16 if device.type == "cuda" else torch.float32), exact)
    return {"model": config.meta.model_name, "weights": str(weights or "initial"), "images": len(images), "errors": errors}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the error of FP8 in the target network's features.")
    parser.add_argument("--model", default="vit_base", choices=tuple(MODELS), metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--images", type=int, default=4, help="how many (default 4)")
    parser.add_argument("--size", type=int, default=224, help="side of an image in pixels (default 224)")
    parser.add_argument("--weights", type=Path, help="a checkpoint, or weights of any kind that `fastjepa convert` reads")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--bf16", action="store_true", help="the error of bf16 too; slow on a CPU that emulates it")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="any further key of the config")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    keys = [f"meta.model_name={options.model}", f"data.crop_size={options.size}", *options.overrides]
    try:
        config = load_config(os.devnull, keys)
        images = pictures(config, options.images).to(options.device)
        found = measure(config, images, options.weights, options.bf16)
    except (UserError, CheckpointError, OSError) as failed:
        print(f"benchmarks/fp8.py: {failed}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(found))
        return 0
    print(f"{found['model']}, {found['weights']} weights, {found['images']} images, against fp32")
    for name, one in found["errors"].items():
        print(f"{name}: relative error {one['relative']:.4f}, cosine {one['cosine']:.5f}, worst row {one['worst_cosine']:.5f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
