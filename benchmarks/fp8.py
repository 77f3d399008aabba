"""The error of FP8 in the target features: `python benchmarks/fp8.py --model vit_base --images 8`.

Features are compared as the loss sees them, layer-normalised, with those of fp32 on the same images and weights: by the norm
of the difference over the norm of the features, and by the cosine of the two. The products are torch's own FP8 products, on
a CPU too. The weights are those that training starts from.
"""

import argparse
import os
import sys

import torch
import torch.nn.functional as F
from options import make_parser, run_script
from photographs import photographs
from torch import Tensor

from fastjepa.config.load import load_config
from fastjepa.config.schema import Config
from fastjepa.data.crops import crop_image
from fastjepa.data.decode_pillow import decode_image
from fastjepa.model.fp8 import use_fp8
from fastjepa.model.jepa import build_pair
from fastjepa.model.vit import Encoder, use_auto_attention
from fastjepa.ranks.world import join_world


def input_images(config: Config, count: int) -> Tensor:
    """Return (count, C, H, W) uint8, made to decode like photographs."""
    decoded = [decode_image(raw, config.data.channels) for raw in photographs(count)]
    return torch.stack([crop_image(image, (0, 0, *image.shape[1:]), config.image_size, False) for image in decoded])


@torch.no_grad()
def target_features(encoder: Encoder, images: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (B * N, D) fp32, layer-normalised."""
    use_auto_attention(encoder, images.device, dtype)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        return F.layer_norm(encoder(images).float(), (encoder.embed_dim,))


def feature_error(found: Tensor, expected: Tensor) -> dict[str, float]:
    cosine = F.cosine_similarity(found, expected, dim=1)
    return {"relative": float((found - expected).norm() / expected.norm()), "cosine": float(cosine.mean()),
            "worst_cosine": float(cosine.min())}  # fmt: skip


def measure_asked(options: argparse.Namespace) -> dict:
    keys = [f"meta.model_name={options.model}", f"data.crop_size={options.size}", *options.overrides]
    config = load_config(os.devnull, keys)
    device = join_world(options.device).device
    images = input_images(config, options.images).to(device)
    encoder = build_pair(config)[1].to(device)
    exact = target_features(encoder, images, torch.float32)
    use_fp8(encoder)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    errors = {"fp8": feature_error(target_features(encoder, images, dtype), exact)}
    return {"model": options.model, "weights": "initial", "images": len(images), "errors": errors}


def main(argv: list[str] | None = None) -> int:
    about = "Measure the error of FP8 in the features of the target network."
    parser = make_parser(about, "", device="cpu", model="vit_base", size=224)
    parser.add_argument("--images", type=int, default=4, help="how many (default 4)")
    return run_script("fp8.py", parser.parse_intermixed_args(argv), measure_asked)


if __name__ == "__main__":
    sys.exit(main())
